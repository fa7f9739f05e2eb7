"""A transformers vision backbone with a linear head whose class activation map is exact: what small judges share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .model_folder import load_weights, read_config, read_metadata, write_model


Pooling = Literal["mean", "peak"]


class MapClassifier(nn.Module):
    """Backbone features, a 1x1 convolution, a pooling: `map [B, K, h, w]` and `logits [B, K]`.

    `pooling` "mean": `logits == map.mean`, exactly. "peak": the soft maximum `logsumexp(map) - log(h w)`, for
    naming several small things, where the mean lets what is elsewhere in the image speak against each.

    `config` is a transformers vision configuration whose model returns a feature map `[B, C, h, w]` as its
    `last_hidden_state` (ResNet, RegNet, ConvNext, MobileNet, ...). Images come in as [0, 1] and are shifted to
    [-1, 1].

    With `fine` > 0 the features are that wide and as fine as the backbone's first stage: a top-down path as in
    feature pyramid networks (arXiv 1612.03144) adds what the deeper stages say to what the first one sees.
    """

    def __init__(self, config: Any, outputs: int, pooling: Pooling = "mean", fine: int = 0) -> None:
        super().__init__()
        from transformers import AutoModel

        self.pooling, self.fine = pooling, fine
        self.backbone = AutoModel.from_config(config)
        if fine:
            self.lateral = nn.ModuleList(nn.Conv2d(width, fine, 1) for width in config.hidden_sizes)
            self.smooth = nn.Sequential(
                nn.BatchNorm2d(fine),
                nn.ReLU(),
                nn.Conv2d(fine, fine, 3, padding=1, bias=False),
                nn.BatchNorm2d(fine),
                nn.ReLU(),
            )
        self.head = nn.Conv2d(fine or config.hidden_sizes[-1], outputs, 1)

    def features(self, pixels: Tensor) -> Tensor:
        """`[B, 3, S, S]` in [0, 1] -> `[B, C, h, w]`."""
        output = self.backbone(pixels * 2 - 1, output_hidden_states=bool(self.fine))
        if not self.fine:
            return output.last_hidden_state
        *finer, coarsest = [
            lateral(state) for lateral, state in zip(self.lateral, output.hidden_states[1:], strict=True)
        ]
        for states in reversed(finer):
            coarsest = states + nn.functional.interpolate(coarsest, size=states.shape[-2:], mode="nearest")
        return self.smooth(coarsest)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, 3, S, S]` in [0, 1] -> logits `[B, K]`, map `[B, K, h, w]`."""
        logit_map = self.head(self.features(pixels))
        if self.pooling == "peak":
            return logit_map.flatten(2).logsumexp(2) - math.log(logit_map[0, 0].numel()), logit_map
        return logit_map.mean((2, 3)), logit_map


def save_network(
    network: nn.Module, config: Any, metadata: Mapping[str, Any], folder: Path | str, without: str | None = None
) -> None:
    """Write `config.json` (transformers), `metadata.json` and fp16 weights into `folder`.

    Weights whose names start with `without` are left out.
    """
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
        if without is None or not name.startswith(without)
    }
    write_model(folder, metadata, state)
    config.save_pretrained(folder)


def load_map_classifier(folder: Path | str, *needed: str) -> tuple[MapClassifier, dict[str, Any]]:
    """The network of a folder written by `save_network`, and its metadata, of which `needed` are there.

    Raises:
        UnreadableFileError: the folder is something else, or a part of it is missing or broken.
    """
    metadata = read_metadata(folder, "outputs", *needed)
    network = MapClassifier(
        read_config(folder), len(metadata["outputs"]), metadata.get("pooling", "mean"), metadata.get("fine", 0)
    )
    load_weights(network, folder)
    return network, metadata
