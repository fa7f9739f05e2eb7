"""Small networks on the embedding of a CLIP image tower, as published heads are: a few linear layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2i_spo_plugin.errors import UnreadableFileError


@dataclass(frozen=True)
class Layer:
    """A linear layer `[out, in]`, and whether ReLU comes before the next one."""

    weight: Tensor
    bias: Tensor
    relu: bool = False


class ClipHead(nn.Module):
    """K heads, each a few linear layers, on an embedding.

    Args:
        heads: the layers of each, the first on the embedding, the last with one output.
        unit: whether they stand on the unit vector, or on the embedding as the projection gives it.

    Raises:
        UnreadableFileError: the layers of a head do not fit each other.
    """

    def __init__(self, heads: Sequence[Sequence[Layer]], unit: bool = True) -> None:
        super().__init__()
        self.unit = unit
        self.relu = [[layer.relu for layer in head] for head in heads]
        self.heads = nn.ModuleList(nn.ModuleList(_linear(layer) for layer in head) for head in heads)
        for head in heads:
            widths = [(layer.weight.shape[1], layer.weight.shape[0]) for layer in head]
            joins = all(before[1] == after[0] for before, after in zip(widths, widths[1:], strict=False))
            if not widths or not joins or widths[-1][1] != 1 or widths[0][0] != heads[0][0].weight.shape[1]:
                raise UnreadableFileError(f"these layers (inputs, outputs) make no head with one output: {widths}")
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Of the embedding."""
        return int(next(self.parameters()).shape[1])

    def forward(self, embedding: Tensor) -> Tensor:
        """`[..., D]` -> `[..., K]`."""
        start = nn.functional.normalize(embedding, dim=-1) if self.unit else embedding
        outputs = []
        for head, relu in zip(self.heads, self.relu, strict=True):
            state = start
            for layer, bends in zip(head, relu, strict=True):  # type: ignore[call-overload]
                state = torch.relu(layer(state)) if bends else layer(state)
            outputs.append(state)
        return torch.cat(outputs, -1)


def stored_head(tensors: Mapping[str, Tensor], relu: Sequence[Sequence[bool]], unit: bool, where: str) -> ClipHead:
    """The head whose `state_dict` is `tensors`.

    Raises:
        UnreadableFileError: they are not those of such heads.
    """
    try:
        heads = [
            [
                Layer(tensors[f"heads.{h}.{n}.weight"], tensors[f"heads.{h}.{n}.bias"], bool(bends))
                for n, bends in enumerate(flags)
            ]
            for h, flags in enumerate(relu)
        ]
    except (KeyError, TypeError) as error:
        raise UnreadableFileError(f"{where} does not hold the heads that it describes: {error}") from error
    return ClipHead(heads, unit)


def published_layers(tensors: Mapping[str, Tensor], where: str, relu: bool) -> list[Layer]:
    """The linear layers of a `Sequential`, in their order; a batch norm is folded into the layer after it.

    Args:
        tensors: its state, with the place of each module as the last number in the names.
        where: for the message.
        relu: whether a gap between two linear layers stands for a ReLU (and a dropout), as in most published heads; a
            dropout alone leaves a gap too.

    Raises:
        UnreadableFileError: there is no linear layer, or a tensor that is none of these.
    """
    modules: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.search(r"(?:^|\.)(\d+)\.(\w+)$", name)
        if not match:
            raise UnreadableFileError(f"{where} holds {name}, which is no layer of a simple head")
        modules.setdefault(int(match[1]), {})[match[2]] = tensor.double()
    layers: list[Layer] = []
    scale: Tensor | None = None
    shift: Tensor | None = None
    previous = -1
    for place, module in sorted(modules.items()):
        if "running_mean" in module:
            scale = module["weight"] / (module["running_var"] + 1e-5).sqrt()
            shift = module["bias"] - module["running_mean"] * scale
            continue
        weight, bias = module["weight"], module["bias"]
        if layers:
            bends = relu and place - previous > 1
            layers[-1] = Layer(layers[-1].weight, layers[-1].bias, bends)
        if scale is not None and shift is not None:
            weight, bias = weight * scale, bias + weight @ shift
            scale = shift = None
        layers.append(Layer(weight.float(), bias.float()))
        previous = place
    if not layers:
        raise UnreadableFileError(f"{where} holds no linear layer")
    return layers


def _linear(layer: Layer) -> nn.Linear:
    linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
    linear.load_state_dict({"weight": layer.weight.float(), "bias": layer.bias.float()})
    return linear
