"""What the codecs share: the matrices of a file, collected by module while it is read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from t2i_spo_plugin.errors import InvalidAdapterError
from t2i_spo_plugin.files import quoted

from ..lora import LoraPair


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
