"""The neutral form that every codec translates to and from: one low-rank pair per module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from t2i_spo_plugin.errors import InvalidAdapterError
from t2i_spo_plugin.files import quoted


COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
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
        """The Frobenius norm of `delta()`, from the Gram matrices of the halves: the delta itself is never made."""
        down, up = self.down.double().flatten(1), self.up.double().flatten(1)
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return self.scale * math.sqrt(max(squared, 0.0))


class Parts:
    """The halves and alphas of a file while it is read, by module, each at most once."""

    def __init__(self) -> None:
        self.halves: dict[str, dict[str, Tensor]] = {}
        self.alphas: dict[str, float] = {}

    def add(self, name: str, half: str, tensor: Tensor, key: str) -> None:
        """Take `tensor`, which stands under `key`, as the `half` ("down", "up" or "alpha") of the module `name`.

        Raises:
            InvalidAdapterError: there is one already, or an alpha is not one number.
        """
        halves = self.halves.setdefault(name, {})
        if half in halves or (half == "alpha" and name in self.alphas):
            raise InvalidAdapterError(f"two tensors are the {half} of {quoted(name)}, the second is {quoted(key)}")
        if half != "alpha":
            halves[half] = tensor
        elif tensor.numel() == 1:
            self.alphas[name] = float(tensor)
        else:
            raise InvalidAdapterError(f"{quoted(key)} must be one number, got shape {tuple(tensor.shape)}")

    def ranks(self) -> dict[str, int]:
        """The rank of every module whose down matrix was found."""
        return {
            name: halves["down"].shape[0]
            for name, halves in self.halves.items()
            if "down" in halves and halves["down"].ndim
        }

    def pairs(self, alphas: Mapping[str, float] | None = None) -> dict[str, LoraPair]:
        """The pairs, sorted by module; an alpha is the file's own, else that of `alphas`, else the rank.

        Raises:
            InvalidAdapterError: a module has only one half, or A and B do not fit each other.
        """
        alphas = {**(alphas or {}), **self.alphas}
        pairs = {}
        for name in sorted(self.halves):
            halves = self.halves[name]
            if set(halves) != {"down", "up"}:
                have = ", ".join(sorted(halves)) or "alpha"
                raise InvalidAdapterError(
                    f"{name} has only {have}; an adapter needs a down and an up matrix for every module"
                )
            down, up = halves["down"], halves["up"]
            if not (
                down.ndim >= 2
                and up.ndim == down.ndim
                and up.shape[1] == down.shape[0]
                and all(size == 1 for size in up.shape[2:])
                and down.numel()
                and up.numel()
            ):
                raise InvalidAdapterError(
                    f"{name}: the matrices do not fit each other, down {tuple(down.shape)} and up {tuple(up.shape)}"
                )
            pairs[name] = LoraPair(down, up, float(alphas.get(name, down.shape[0])))
        return pairs


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
