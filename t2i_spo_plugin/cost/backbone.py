"""A transformers vision backbone with a linear head whose class activation map is exact: what small judges share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import SPOError, UnreadableAdapterError
from ..header import read_json
from ..images import Images, to_tensor


WEIGHTS = "model.safetensors"
Pooling = Literal["mean", "peak"]
_COPY = "copy the model's folder again, with all its files"


class MapClassifier(nn.Module):
    """Backbone features, a 1x1 convolution, a pooling: ``map [B, K, h, w]`` and ``logits [B, K]``.

    ``pooling`` "mean": ``logits == map.mean``, exactly. "peak": the soft maximum ``logsumexp(map) - log(h w)``, for
    naming several small things, where the mean lets what is elsewhere in the picture speak against each.

    ``config`` is a transformers vision configuration whose model returns a feature map ``[B, C, h, w]`` as its
    ``last_hidden_state`` (ResNet, RegNet, ConvNext, MobileNet, ...). Pictures come in as [0, 1] and are shifted to
    [-1, 1].

    With ``fine`` > 0 the features are that wide and as fine as the backbone's first stage: a top-down path as in
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
        """``[B, 3, S, S]`` in [0, 1] -> ``[B, C, h, w]``."""
        found = self.backbone(pixels * 2 - 1, output_hidden_states=bool(self.fine))
        if not self.fine:
            return found.last_hidden_state
        *finer, coarsest = [
            lateral(state) for lateral, state in zip(self.lateral, found.hidden_states[1:], strict=True)
        ]
        for states in reversed(finer):
            coarsest = states + nn.functional.interpolate(coarsest, size=states.shape[-2:], mode="nearest")
        return self.smooth(coarsest)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 3, S, S]`` in [0, 1] -> logits ``[B, K]``, map ``[B, K, h, w]``."""
        logit_map = self.head(self.features(pixels))
        if self.pooling == "peak":
            return logit_map.flatten(2).logsumexp(2) - math.log(logit_map[0, 0].numel()), logit_map
        return logit_map.mean((2, 3)), logit_map


def save_network(network: nn.Module, config: Any, facts: dict[str, Any], folder: Path | str) -> None:
    """Write ``config.json`` (transformers), ``facts.json`` and fp16 weights into ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS)


def read_facts(folder: Path | str, *needed: str) -> dict[str, Any]:
    """The ``facts.json`` of a model folder.

    Raises:
        SPOError: there is none, it is no JSON mapping, or it does not say what is ``needed``.
    """
    path = Path(folder) / "facts.json"
    if not path.is_file():
        raise SPOError(f"{folder} is no model folder of this package: it has no facts.json")
    try:
        facts = read_json(path)
    except UnreadableAdapterError as error:
        raise SPOError(f"{error}; {_COPY}") from error
    missing = [name for name in needed if name not in facts]
    if missing:
        raise SPOError(f"{path} does not say {', '.join(missing)}; {_COPY}")
    return facts


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """The tensors of a model folder, as they are stored.

    Raises:
        SPOError: there is no file of weights, or it is broken.
    """
    path = Path(folder) / WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SPOError(f"cannot read the weights {path}: {error}; {_COPY}") from error


def load_weights(network: nn.Module, folder: Path | str, rename: Callable[[str], str] = str) -> None:
    """Load the safetensors weights of ``folder`` into ``network`` as float32, and switch it to inference.

    ``rename`` gives the network's name of a weight by the file's.

    Raises:
        SPOError: as ``read_weights``, or they are another network's.
    """
    state = {rename(k): v.float() if v.is_floating_point() else v for k, v in read_weights(folder).items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise SPOError(f"the weights of {folder} are not those of the model it describes: {error}") from error
    network.eval().requires_grad_(False)


def load_map_classifier(folder: Path | str, *needed: str) -> tuple[MapClassifier, dict[str, Any]]:
    """The network of a folder written by :func:`save_network`, and its facts, of which ``needed`` are there.

    Raises:
        SPOError: the folder is something else, or a part of it is missing or broken.
    """
    from transformers import AutoConfig

    facts = read_facts(folder, "outputs", *needed)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        found = str(error).strip().splitlines()[0]
        raise SPOError(f"cannot read the configuration of {folder}: {found}; {_COPY}") from error
    network = MapClassifier(config, len(facts["outputs"]), facts.get("pooling", "mean"), facts.get("fine", 0))
    load_weights(network, folder)
    return network, facts


def batches(images: Images, size: int, device: torch.device, batch_size: int = 64) -> Iterator[Tensor]:
    """Pictures as ``[<= batch_size, 3, size, size]`` in [0, 1] on ``device``."""
    pixels = to_tensor(images, size)
    for start in range(0, len(pixels), batch_size):
        yield pixels[start : start + batch_size].to(device)
