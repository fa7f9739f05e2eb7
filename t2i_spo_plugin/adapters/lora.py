"""A LoRA in memory, whatever file it comes from: one low-rank pair per module, and how modules are named."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "transformer_ref",
    "text_conditioner",
    "connectors",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
)
"""Pipeline components that an adapter's module names start with."""


@dataclass(frozen=True)
class LoraPair:
    """The low-rank change of one module: `alpha / rank * up @ down`.

    Attributes:
        down: A, `[rank, in]`, or `[rank, in, *kernel]` for a convolution.
        up: B, `[out, rank]`, or `[out, rank, 1, ...]` for a convolution.
        alpha: divided by the rank it is the scale of the product.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The change of the weight at strength 1, float32, in the shape of the weight."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that is changed."""
        return (self.up.shape[0], *self.down.shape[1:])

    def norm(self) -> float:
        """The Frobenius norm of `delta()`, from the Gram matrices of A and B: the delta itself is never computed."""
        down, up = self.down.double().flatten(1), self.up.double().flatten(1)
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return self.scale * math.sqrt(max(squared, 0.0))


def canonical(name: str) -> str:
    """One spelling for CLIP modules: some versions of transformers leave out `text_model.`, files mostly carry it."""
    component, _, path = name.partition(".")
    if component.startswith("text_encoder") and path.startswith("encoder.layers."):
        return f"{component}.text_model.{path}"
    return name


def block_of(name: str) -> str:
    """The numbered block that a module or weight belongs to: its name up to the first number, else its first part.

    `unet.down_blocks.0.attentions.1.proj_in` is of `unet.down_blocks.0`, `unet.time_embedding.linear_1` of
    `unet.time_embedding`.
    """
    parts = name.split(".")
    end = next((number for number, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[: end + 1])
