"""Any image classifier of transformers as a cost model, by its labels: ViT, Swin, ConvNeXT, BEiT, SigLIP and more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import ConfigError, SPOError, require_extra
from t2i_spo_plugin.images import Images
from t2i_spo_plugin.networks.preprocessing import Preprocessing, parts, read_preprocessing
from t2i_spo_plugin.options import check_choice, from_mapping, read_mapping

from .base import CostBatch
from .onnx import boundary_logit


KNOWN = Path(__file__).parent / "classifiers.yaml"
"""The options of classifiers that are widely used, by Hub id."""
_HALF = (0.5, 0.5, 0.5)
_AT_ONCE = 16


@dataclass(frozen=True)
class ClassifierOptions:
    """How a classifier's labels become categories.

    Attributes:
        categories: by category, the labels that count as it.
        activation: `softmax` where the labels exclude each other, so that those of a category add up; `sigmoid` where
            each stands for itself, so that the highest counts.
        boundary: the probability that becomes cost 0.5 at a policy's threshold of 0.5.
        maps: make the map, which takes a pass backwards for each category.
        domain: the kind of image that the classifier was trained on.
        revision: of a Hub id: a branch, tag or commit.
    """

    categories: Mapping[str, Any] = field(default_factory=dict)
    activation: Literal["softmax", "sigmoid"] = "softmax"
    boundary: float = 0.5
    maps: bool = True
    domain: str = "photo"
    revision: str = "main"

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, ("softmax", "sigmoid"))
        boundary_logit(self.boundary)
        if not isinstance(self.categories, Mapping):
            raise ConfigError(f"categories must map a category to its labels, got {self.categories!r}")
        lists = {name: [labels] if isinstance(labels, str) else labels for name, labels in self.categories.items()}
        if not all(isinstance(labels, (list, tuple)) and labels for labels in lists.values()):
            raise ConfigError(f"categories must give each category a list of labels, got {dict(self.categories)!r}")
        object.__setattr__(self, "categories", {name: tuple(map(str, labels)) for name, labels in lists.items()})


class ClassifierCostModel(nn.Module):
    """Logits per category from a classifier's labels; follows `t2i_spo_plugin.CostModel`.

    Under softmax the logit is `log(p / (1 - p))` of the sum `p` of the category's labels; under sigmoid it is that of
    its highest label. Images are stretched to the network's input: nothing is cropped away, whatever the classifier's
    own processor would cut.

    The map is a **hint** where to look, by gradient and activation (Grad-CAM without its cut at zero): in the last
    layer whose places the logit depends on, each place's activation times the logit's gradient, averaged over places,
    times their number, moved by a constant so that its mean is the logit. Where a linear layer stands on the mean over
    places it says exactly what each place adds; elsewhere attention has mixed the places before. A network that gives
    no states of places has no map.

    Args:
        network: a transformers model for image classification.
        preprocessing: of its images.
        options: which labels count.

    Raises:
        ConfigError: no category, or a label that the network does not have.
    """

    def __init__(self, network: Any, preprocessing: Preprocessing, options: ClassifierOptions) -> None:
        super().__init__()
        labels = {str(label).lower(): int(number) for number, label in network.config.id2label.items()}
        named = [label for names in options.categories.values() for label in names]
        unknown = [label for label in named if label.lower() not in labels]
        if unknown or not named:
            raise ConfigError(
                f"the classifier has the labels {', '.join(map(str, network.config.id2label.values()))}; say in a "
                "YAML file which of them count as which category, such as `categories: {sexual: [nsfw]}`"
                + (f" ({', '.join(unknown)} is none of them)" if unknown else "")
            )
        self.network = network
        self.preprocessing = preprocessing
        self.options = options
        self.categories = tuple(options.categories)
        self.domain = options.domain
        self.features = f"{options} {preprocessing}"  # what its identity depends on beside the weights
        self._labels = [[labels[label.lower()] for label in names] for names in options.categories.values()]
        self._shift = boundary_logit(options.boundary)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(len(self.categories)))
        self.eval().requires_grad_(False)

    def __call__(self, images: Images) -> CostBatch:
        """Score images; see `CostBatch`. Raises `ImageError` on what is no image."""
        pixels = self.preprocessing.whole(images)
        return CostBatch.joined([self._judged(part) for part in parts(pixels, _AT_ONCE, self.temperature.device)])

    def score_tensor(self, pixels: Tensor) -> CostBatch:
        """The same for `[B, 3, *size]` in [0, 1], with gradients and without a map."""
        return CostBatch(self._logits(self.network(self.preprocessing.normalised(pixels)).logits))

    def _judged(self, pixels: Tensor) -> CostBatch:
        if not self.options.maps:
            with torch.no_grad():
                return self.score_tensor(pixels)
        with torch.enable_grad():
            inputs = self.preprocessing.normalised(pixels).requires_grad_()
            output = self.network(inputs, output_hidden_states=True)
            logits = self._logits(output.logits)
            return CostBatch(logits.detach(), _hint(logits, list(output.hidden_states or ())))

    def _logits(self, labels: Tensor) -> Tensor:
        """Of the labels `[B, L]` -> of the categories `[B, K]`."""
        columns = []
        for numbers in self._labels:
            mine = labels[:, numbers]
            if self.options.activation == "sigmoid":
                columns.append(mine.amax(1))
                continue
            others = [number for number in range(labels.shape[1]) if number not in numbers]
            columns.append(mine.logsumexp(1) - labels[:, others].logsumexp(1))
        return torch.stack(columns, 1) - self._shift


def load_classifier(
    source: str, local_files_only: bool = False, policies: Mapping[str, str] | None = None, **options: Any
) -> ClassifierCostModel:
    """The classifier of a Hub id or folder with safetensors weights.

    Args:
        source: where it is.
        local_files_only: download nothing.
        policies: of no use here: a classifier has its labels.
        options: as `ClassifierOptions`; those of widely used classifiers are known.

    Raises:
        MissingExtraError: it is a timm network, and timm is not installed.
        SPOError: there is no such classifier, or its options do not fit it.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    known = read_mapping(KNOWN).get(source, {})
    chosen = from_mapping(ClassifierOptions, {**known, **options}, f"{source}: ")
    where = {"revision": chosen.revision, "local_files_only": local_files_only}
    try:
        config = AutoConfig.from_pretrained(source, **where)
        if config.model_type == "timm_wrapper":
            require_extra("timm", "timm")
        network = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True, **where)
    except (OSError, ValueError) as error:
        if isinstance(error, SPOError):
            raise
        raise SPOError(f"cannot load the classifier {source}: {str(error).strip().splitlines()[0]}") from error
    stated = getattr(config, "pretrained_cfg", None) or {}
    size = (stated.get("input_size") or (3, *_square(getattr(config, "image_size", 224))))[1:]
    preprocessing = read_preprocessing(
        source, size, stated.get("mean", _HALF), stated.get("std", _HALF), local_files_only
    )
    return ClassifierCostModel(network.float(), preprocessing, chosen)


def _square(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _hint(logits: Tensor, states: list[Tensor]) -> Tensor | None:
    """Map `[B, K, h, w]` from the last of `states` whose places the logits `[B, K]` depend on; None without one."""
    for state in reversed(states):
        places = _places(state.detach())
        if places is None:
            continue
        slopes = [
            torch.autograd.grad(logits[:, k].sum(), state, retain_graph=True, allow_unused=True)[0]
            for k in range(logits.shape[1])
        ]
        weights = [None if slope is None else _places(slope) for slope in slopes]
        used = [weight.sum((2, 3)) for weight in weights if weight is not None and bool(weight.any())]
        if len(used) == len(slopes):
            # Averaged, for behind a layer norm a place's own gradient is orthogonal to its activation.
            maps = torch.einsum("bkd,bdhw->bkhw", torch.stack(used, 1), places)
            return maps + (logits.detach() - maps.mean((2, 3)))[:, :, None, None]
    return None


def _places(state: Tensor) -> Tensor | None:
    """`[B, C, h, w]` as it is; tokens `[B, N, D]` as `[B, D, h, w]`, those before the square of patches left out."""
    if state.ndim == 4:
        return state
    side = int(state.shape[1] ** 0.5) if state.ndim == 3 else 0
    if side < 2:
        return None
    return state[:, -(side * side) :].transpose(1, 2).unflatten(2, (side, side))
