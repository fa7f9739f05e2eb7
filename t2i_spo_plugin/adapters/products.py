"""LoHa and LoKr files: the changes that their factors make, as they are, and the nearest low-rank pairs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, ConfigError, InvalidAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.files import quoted

from . import layouts
from .adapter import Adapter
from .dtypes import weight_names
from .io import find_adapter_file, read_tensors
from .layouts.alphas import configured_alphas
from .lora import LoraPair
from .low_rank import decompose, relative_error
from .metadata import metadata_from_header
from .safetensors_file import read_header


_PARTS = frozenset(
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 "
    "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 alpha".split()
)
_METHODS = ("LoHa", "LoKr")
_OF_3X3 = (".conv", ".conv1", ".conv2", ".conv_in", ".conv_out")
_OF_1X1 = (".conv_shortcut",)
_OF_1X1_IN_V1 = (".proj_in", ".proj_out")


@dataclass(frozen=True)
class ProductResult:
    """The nearest adapter of a rank to a LoHa or LoKr file.

    Attributes:
        adapter: the pairs.
        module_errors: by module as the file names it, the relative error in the Frobenius norm.
        error: of all modules together.
    """

    adapter: Adapter
    module_errors: dict[str, float]
    error: float


def is_product(path: str | Path) -> bool:
    """Whether the adapter file at `path` is a LoHa or LoKr.

    Raises:
        UnreadableAdapterError: as `read_adapter`.
    """
    return layouts.other_method(weight_names(read_header(find_adapter_file(path)).tensors)) in _METHODS


def approximate_products(path: str | Path, rank: int, architecture: str = "") -> ProductResult:
    """The low-rank pairs that are nearest to the changes of a LoHa or LoKr file, which are computed exactly.

    Args:
        path: the file, or a PEFT folder, whose `adapter_config.json` states alpha and rank.
        rank: of every pair, at most; the smaller side of a weight where that is less.
        architecture: of the base, where the header does not say; it decides between names that several models share.

    Raises:
        AdapterError: the file is not readable, its factors do not fit, or its module names are not understood.
        ConfigError: the rank is below 1.
    """
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    path = find_adapter_file(path)
    try:
        weights, header, config = read_tensors(path)
        metadata = metadata_from_header(header)
        architecture = metadata.base_architecture or architecture
        factors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in weights.items():
            name, _, part = key.removesuffix(".weight").rpartition(".")
            if part not in _PARTS:
                raise UnsupportedAdapterError(f"{quoted(key)} is no factor of a LoHa or LoKr")
            factors.setdefault(name, {})[part] = tensor.float()
        scales = None if config is None else _configured_scales(factors, config)
        pairs: dict[str, LoraPair] = {}
        squares: dict[str, tuple[float, float]] = {}
        for name, parts in sorted(factors.items()):
            change = _change(name, parts, None if scales is None else scales[name])
            if change.any():
                pairs[name], squares[name] = decompose(change, rank, None)
        if not pairs:
            raise InvalidAdapterError("all weights are zero: the adapter changes nothing")
        modules = layouts.decode(*_as_file(pairs, config is not None), architecture=architecture)
    except AdapterError as error:
        raise type(error)(f"{path.name}: {error}") from error
    shaped = {name: _shaped(name, pair, architecture) for name, pair in modules.items()}
    errors = {name: relative_error(*both) for name, both in squares.items()}
    total = relative_error(*map(sum, zip(*squares.values(), strict=True)))
    return ProductResult(Adapter(shaped, metadata).validate(), errors, total)


def _as_file(
    pairs: Mapping[str, LoraPair], is_peft: bool
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any] | None]:
    """Tensors, header and configuration of a LoRA with these pairs, alpha equal to the rank."""
    down, up = ("lora_A", "lora_B") if is_peft else ("lora_down", "lora_up")
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{name}.{down}.weight"], tensors[f"{name}.{up}.weight"] = pair.down, pair.up
        if not is_peft:
            tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return tensors, {}, {} if is_peft else None


def _configured_scales(names: Collection[str], config: Mapping[str, Any]) -> dict[str, float]:
    """What PEFT multiplies each product with: the configuration's alpha over its rank, whatever the factors are."""
    paths = {name: name.removeprefix("base_model.model.") for name in names}
    numbers = [
        configured_alphas(
            dict.fromkeys(paths.values(), 0), {"lora_alpha": config.get(key), "alpha_pattern": config.get(pattern)}
        )
        for key, pattern in (("alpha", "alpha_pattern"), ("r", "rank_pattern"))
    ]
    scales = {}
    for name, path in paths.items():
        alpha, rank = (number[path] for number in numbers)
        if not (alpha > 0.0 and rank > 0.0):
            raise InvalidAdapterError(
                f"adapter_config.json states alpha {alpha:g} and r {rank:g} for {quoted(path)}; both must be above 0"
            )
        scales[name] = alpha / rank
    return scales


def _change(name: str, parts: Mapping[str, Tensor], scale: float | None = None) -> Tensor:
    """The change of one weight: `[out, in]`, for a convolution with its kernel or with that in the columns.

    Without a `scale` it is that of the factors' own alpha.
    """
    try:
        if "hada_w1_a" in parts:
            change, rank = _hadamard(parts), parts["hada_w1_b"].shape[0]
        else:
            change, rank = _kronecker(parts)
    except (KeyError, RuntimeError) as error:
        raise InvalidAdapterError(f"{quoted(name)}: the factors do not fit each other: {error}") from error
    if scale is None:
        scale = float(parts["alpha"]) / rank if "alpha" in parts and rank else 1.0
    if not torch.isfinite(change).all():
        raise InvalidAdapterError(f"{quoted(name)}: the weights hold NaN or Inf")
    return scale * change


def _hadamard(parts: Mapping[str, Tensor]) -> Tensor:
    first, second = (
        _tucker(parts[f"hada_t{n}"], parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"])
        if f"hada_t{n}" in parts
        else parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"]
        for n in (1, 2)
    )
    return first * second


def _kronecker(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The product, and the rank that alpha is divided by; 0 where both factors are whole, which have no scale."""
    rank = 0
    if "lokr_w1" in parts:
        first = parts["lokr_w1"]
    else:
        first, rank = parts["lokr_w1_a"] @ parts["lokr_w1_b"], parts["lokr_w1_b"].shape[0]
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    else:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        second, rank = (_tucker(parts["lokr_t2"], a, b) if "lokr_t2" in parts else a @ b), b.shape[0]
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return torch.kron(first.contiguous(), second.contiguous()), rank


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ij..., jr, ip -> pr...", core, b, a)


def _shaped(name: str, pair: LoraPair, architecture: str) -> LoraPair:
    """`pair` with the kernel that the module has, where the file's factors have it in their columns."""
    if pair.down.ndim != 2:
        return pair
    is_1x1 = name.endswith(_OF_1X1) or (name.endswith(_OF_1X1_IN_V1) and architecture == "stable-diffusion-v1")
    side = 3 if name.endswith(_OF_3X3) else 1 if is_1x1 else 0
    if not name.startswith("unet.") or not side or pair.down.shape[1] % side**2:
        return pair
    return LoraPair(pair.down.reshape(pair.rank, -1, side, side), pair.up[:, :, None, None], pair.alpha)
