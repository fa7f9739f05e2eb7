"""How weights are stored: 8-bit floats, with a scale beside them or without, and the types one can choose to write."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from t2i_spo_plugin.errors import AdapterError, ConfigError, InvalidAdapterError, UnreadableAdapterError
from t2i_spo_plugin.files import quoted

from .lora import LoraPair
from .safetensors_file import TensorEntry


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What an adapter can be asked to be written in."""

_EIGHT_BIT = ("F8_E4M3", "F8_E5M2")
_MARKER = "scaled_fp8"
_MOST_BYTES = 20 * 10**9
"""Of an adapter's weights: rank 256 of all layers of a transformer of 20 billion parameters has about 6 GB."""
_SPARSE_FROM = 64 * 2**20
"""Bytes from which on a file is asked whether the disk holds it."""


def scales_of(tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Names of the scales by the names of the 8-bit weights they belong to.

    A scale stands as `x.weight_scale` or, in ComfyUI's older spelling, `x.scale_weight` beside `x.weight`.
    """
    scales = {}
    for name, entry in tensors.items():
        if entry.dtype in _EIGHT_BIT and name.endswith("weight"):
            for scale in (f"{name}_scale", f"{name.removesuffix('weight')}scale_weight"):
                if scale in tensors:
                    scales[name] = scale
    return scales


def weight_names(tensors: Mapping[str, TensorEntry]) -> list[str]:
    """The names of all tensors but the scales of others, and the mark of files that have scales."""
    scales = set(scales_of(tensors).values())
    return [name for name in tensors if name not in scales and not (scales and name == _MARKER)]


def read_weights(path: Path, tensors: Mapping[str, TensorEntry], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors `names` of the file `path`, whose header lists `tensors`.

    8-bit floats become float16, which holds each of them exactly; those with a scale become float32, multiplied by it.
    The tensors are copies: what happens to the file afterwards does not reach them.

    Raises:
        UnreadableAdapterError: the file is not readable, larger than any adapter, or has fewer bytes than it claims.
        InvalidAdapterError: a scale is neither one number nor one a row.
    """
    scales = scales_of(tensors)
    _check_size(path, sum(tensors[name].num_bytes() for name in names))
    try:
        with safe_open(path, framework="pt") as file:
            # The reader maps the file: without the copy whoever overwrites it changes the adapter after its checks,
            # and whoever cuts it ends the process.
            stored = {name: file.get_tensor(name).clone() for name in names}
            factors = {name: file.get_tensor(scales[name]).clone() for name in names if name in scales}
    except (SafetensorError, OSError) as error:
        raise UnreadableAdapterError(f"{path.name} is not a readable safetensors file: {error}") from error
    for name, tensor in stored.items():
        if name in factors:
            stored[name] = tensor.float() * _factor(factors[name], tensor, scales[name])
        elif tensors[name].dtype in _EIGHT_BIT:
            stored[name] = tensor.half()
    return stored


def rounded(pair: LoraPair, dtype: torch.dtype, name: str) -> tuple[LoraPair, float]:
    """`pair`, the change of the module `name`, in `dtype`, and the squared Frobenius norm of what rounding changes.

    Raises:
        ConfigError: adapters are not written in `dtype`.
        AdapterError: the largest weight of a matrix lies outside of what `dtype` holds at full precision.
    """
    check_dtype(dtype)
    if pair.down.dtype == dtype == pair.up.dtype:
        return pair, 0.0
    for matrix in (pair.down, pair.up):
        least, most, peak = torch.finfo(dtype).tiny, torch.finfo(dtype).max, float(matrix.abs().amax())
        if 0.0 < peak < least or peak > most:
            raise AdapterError(
                f"{name}: the largest weight is {peak:.1e}, {str(dtype).removeprefix('torch.')} holds {least:.1e} to "
                f"{most:.1e}; write it in float32"
            )
    narrow = LoraPair(pair.down.to(dtype), pair.up.to(dtype), pair.alpha)
    both = torch.cat([narrow.down.double(), pair.down.double()])
    difference = torch.cat([narrow.up.double(), -pair.up.double()], dim=1)
    return narrow, LoraPair(both, difference, 2 * pair.alpha).norm() ** 2


def check_dtype(dtype: torch.dtype) -> None:
    """Raise unless adapters are written in `dtype`.

    Raises:
        ConfigError: they are not.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ConfigError(f"dtype must be one of {names}, got {dtype}")


def _check_size(path: Path, size: int) -> None:
    if size > _MOST_BYTES:
        raise UnreadableAdapterError(
            f"{path.name} claims {size / 1e9:,.0f} GB of weights, more than the {_MOST_BYTES / 1e9:,.0f} GB that an "
            "adapter may have"
        )
    stored = getattr(path.stat(), "st_blocks", None)  # In blocks of 512 bytes, whatever the file system's own are.
    if size > _SPARSE_FROM and stored is not None and stored * 512 < size // 100:
        raise UnreadableAdapterError(
            f"{path.name} claims {size:,} bytes of weights, and only {stored * 512:,} are on the disk: the file was "
            "not downloaded to its end; get it again"
        )


def _factor(scale: Tensor, weight: Tensor, name: str) -> Tensor:
    if scale.numel() == 1:
        return scale.float().reshape(())
    if tuple(scale.shape) == (weight.shape[0], *(1,) * (weight.ndim - 1)):
        return scale.float()
    raise InvalidAdapterError(
        f"{quoted(name)} is the scale of a weight of {list(weight.shape)} and must be one number or one a row, got "
        f"shape {list(scale.shape)}"
    )
