"""What the codecs share: the matrices of a file, collected by module while it is read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from t2i_spo_plugin.errors import InvalidAdapterError
from t2i_spo_plugin.files import quoted

from ..lora import LoraPair


class PairBuilder:
    """Collects the matrices and alphas of a file by module, each at most once, and builds the pairs of them."""

    def __init__(self) -> None:
        self.matrices: dict[str, dict[str, Tensor]] = {}
        self.alphas: dict[str, float] = {}

    def add(self, name: str, role: str, tensor: Tensor, key: str) -> None:
        """Take `tensor`, which stands under `key`, as the `role` ("down", "up" or "alpha") of the module `name`.

        Raises:
            InvalidAdapterError: there is one already, or an alpha is not one number.
        """
        matrices = self.matrices.setdefault(name, {})
        if role in matrices or (role == "alpha" and name in self.alphas):
            raise InvalidAdapterError(f"two tensors are the {role} of {quoted(name)}, the second is {quoted(key)}")
        if role != "alpha":
            matrices[role] = tensor
        elif tensor.numel() == 1:
            self.alphas[name] = float(tensor)
        else:
            raise InvalidAdapterError(f"{quoted(key)} must be one number, got shape {tuple(tensor.shape)}")

    def ranks(self) -> dict[str, int]:
        """The rank of every module whose down matrix is there."""
        return {
            name: matrices["down"].shape[0]
            for name, matrices in self.matrices.items()
            if "down" in matrices and matrices["down"].ndim
        }

    def build(self, alphas: Mapping[str, float] | None = None) -> dict[str, LoraPair]:
        """The pairs, sorted by module; an alpha is the file's own, else that of `alphas`, else the rank.

        Raises:
            InvalidAdapterError: a module has only one matrix, or A and B do not fit each other.
        """
        alphas = {**(alphas or {}), **self.alphas}
        pairs = {}
        for name in sorted(self.matrices):
            matrices = self.matrices[name]
            if set(matrices) != {"down", "up"}:
                have = ", ".join(sorted(matrices)) or "alpha"
                raise InvalidAdapterError(
                    f"{name} has only {have}; an adapter needs a down and an up matrix for every module"
                )
            down, up = matrices["down"], matrices["up"]
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
