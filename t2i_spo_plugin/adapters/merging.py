"""Several adapters into one: exactly, by concatenation, or at a chosen rank, with the error of that."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, IncompatibleAdapterError

from .adapter import Adapter
from .dtypes import check_dtype, rounded
from .lora import LoraPair
from .metadata import AdapterMetadata


@dataclass(frozen=True)
class MergeResult:
    """Several adapters as one.

    Attributes:
        adapter: the merged adapter, on the CPU, alpha equal to the rank everywhere.
        module_errors: `||merged - exact|| / ||exact||` in the Frobenius norm, by module, of cutting and of rounding to
            16 bits; 0 where nothing was cut or rounded.
        error: the same over all modules together.
    """

    adapter: Adapter
    module_errors: dict[str, float]
    error: float


@dataclass(frozen=True)
class Approximation:
    """A module of the merged adapter.

    Attributes:
        pair: its matrices.
        squared_error: squared Frobenius norm of what the pair leaves out of the exact sum.
        squared_norm: the same of the exact sum.
    """

    pair: LoraPair
    squared_error: float
    squared_norm: float


Method = Callable[[Tensor, Tensor, "int | None"], Approximation]
"""`(down [R, in, ...], up [out, R, ...], rank)` of the exact sum `up @ down` -> the module of the merged adapter."""


def concat(down: Tensor, up: Tensor, rank: int | None) -> Approximation:
    """The exact sum: the ranks add up, and `rank` is not used."""
    pair = LoraPair(down, up, float(down.shape[0]))
    return Approximation(pair, 0.0, pair.norm() ** 2)


def svd(down: Tensor, up: Tensor, rank: int | None) -> Approximation:
    """The nearest pair of at most `rank` in the Frobenius norm, by QR of both matrices and an SVD of `R_up R_down^T`.

    Singular values that are rounding alone are left out, so that a module may come out with a lower rank.
    """
    q_up, r_up = torch.linalg.qr(up.double().flatten(1))
    q_down, r_down = torch.linalg.qr(down.double().flatten(1).T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    parts = float((up.double().flatten(1).norm(dim=0) * down.double().flatten(1).norm(dim=1)).sum())
    values = torch.where(values > torch.finfo(torch.float32).eps * parts, values, 0.0)
    squared, full_rank = values.square(), int(values.count_nonzero())
    keep = max(1, min(full_rank, rank or full_rank))
    weight = (up.shape[0], *down.shape[1:])
    pair = balanced_pair(q_up @ left[:, :keep], values[:keep], right[:keep] @ q_down.T, weight)
    return Approximation(pair, float(squared[keep:].sum()), float(squared.sum()))


def balanced_pair(left: Tensor, values: Tensor, right: Tensor, weight: Sequence[int]) -> LoraPair:
    """`left [out, r] diag(values [r]) right [r, in * ...]` as a float32 pair for a weight of that shape, on the CPU.

    Each matrix takes the root of the singular values, so that 16 bits hold both alike well.
    """
    rank, roots, ones = len(values), values.sqrt(), (1,) * (len(weight) - 2)
    up = (left * roots).to("cpu", torch.float32).reshape(weight[0], rank, *ones)
    down = (roots[:, None] * right).to("cpu", torch.float32).reshape(rank, *weight[1:])
    return LoraPair(down.contiguous(), up.contiguous(), float(rank))


def relative_error(squared_error: float, squared_norm: float) -> float:
    """`sqrt(squared_error / squared_norm)`; 0 for a norm of 0."""
    return math.sqrt(squared_error / squared_norm) if squared_norm > 0.0 else 0.0


METHODS: dict[str, Method] = {"concat": concat, "svd": svd}
"""What `merge_adapters` takes for `method`."""


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "concat",
    rank: int | None = None,
    names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> MergeResult:
    """One adapter that changes every weight by `sum_k weights[k] * delta_k`; where one has no module, it adds nothing.

    Args:
        adapters: at least one, all for the same architecture and prediction type (where they say).
        weights: finite and at least 0, one an adapter and not all 0; 1 each by default.
        method: `concat` is the exact sum, its rank the sum of the ranks; `svd` cuts it to `rank`.
        rank: for `svd`, by default the largest rank of the parents.
        names: of the parents, for the header; their titles by default.
        dtype: of the result: float32, float16 or bfloat16. The arithmetic is float32 or wider.

    Raises:
        AdapterError: `dtype` cannot hold a weight of the result.
        IncompatibleAdapterError: the adapters are for different bases, or their modules have different shapes.
        InvalidAdapterError: `Adapter.validate` refuses one of them, or their sum.
        ConfigError: an argument is outside its range.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    names = [adapter.metadata.title for adapter in adapters] if names is None else list(names)
    _check_arguments(adapters, weights, names, method, rank)
    check_dtype(dtype)
    if method == "svd" and rank is None:
        rank = max(pair.rank for adapter in adapters for pair in adapter.modules.values())
    metadata = _metadata(adapters, weights, names, method)
    stacked = stack(adapters, weights)
    modules = {name: _rounded(METHODS[method](down, up, rank), dtype, name) for name, (down, up) in stacked.items()}
    errors = {name: relative_error(module.squared_error, module.squared_norm) for name, module in modules.items()}
    error = relative_error(
        sum(module.squared_error for module in modules.values()),
        sum(module.squared_norm for module in modules.values()),
    )
    merged = Adapter({name: module.pair for name, module in modules.items()}, metadata).validate()
    return MergeResult(merged, errors, error)


def _rounded(module: Approximation, dtype: torch.dtype, name: str) -> Approximation:
    pair, squared_error = rounded(module.pair, dtype, name)
    return Approximation(pair, module.squared_error + squared_error, module.squared_norm)


def stack(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Both matrices of the exact sum by module, float32: `down [ranks, in, ...]`, `up [out, ranks, ...]`."""
    parts: dict[str, list[tuple[LoraPair, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, pair in adapter.modules.items():
            if weight > 0.0:
                parts.setdefault(name, []).append((pair, weight))
    stacked = {}
    for name, pairs in sorted(parts.items()):
        shapes = sorted({pair.shape for pair, _ in pairs})
        if len(shapes) > 1:
            listed = " and ".join(str(list(shape)) for shape in shapes)
            raise IncompatibleAdapterError(
                f"the adapters are for different models: they change {name} as weights of {listed}"
            )
        down = torch.cat([_plain(pair.down) for pair, _ in pairs])
        up = torch.cat([_plain(pair.up) * (weight * pair.scale) for pair, weight in pairs], dim=1)
        stacked[name] = (down, up)
    return stacked


def _plain(matrix: Tensor) -> Tensor:
    return matrix.detach().to("cpu", torch.float32)


def _metadata(
    adapters: Sequence[Adapter], weights: Sequence[float], names: Sequence[str], method: str
) -> AdapterMetadata:
    architecture = _agreed("architecture", [adapter.metadata.base_architecture for adapter in adapters])
    prediction = _agreed("prediction type", [adapter.metadata.prediction_type for adapter in adapters])
    extras = [adapter.metadata.extra for adapter in adapters]
    fingerprint = _agreed("width or depth", [extra.get("base_fingerprint", "") for extra in extras])
    model = {extra.get("base_model", "") for extra in extras}
    extra = {
        "base_fingerprint": fingerprint,
        "base_model": model.pop() if len(model) == 1 else "",
        "merge_method": method,
        "merge_weights": json.dumps(list(weights)),
        "merged_from": json.dumps(list(names), ensure_ascii=False),
    }
    return AdapterMetadata(
        architecture, prediction, "Merged adapter", {key: value for key, value in extra.items() if value}
    )


def _agreed(what: str, values: Sequence[str]) -> str:
    """The one value among those that are not empty, empty when there is none."""
    names = sorted({value for value in values if value})
    if len(names) > 1:
        raise IncompatibleAdapterError(f"the adapters were made for models of different {what}: {', '.join(names)}")
    return names[0] if names else ""


def _check_arguments(
    adapters: Sequence[Adapter], weights: Sequence[float], names: Sequence[str], method: str, rank: int | None
) -> None:
    if not adapters:
        raise ConfigError("name at least one adapter")
    for what, values in (("weights", weights), ("names", names)):
        if len(values) != len(adapters):
            raise ConfigError(f"{len(adapters)} adapters need as many {what}, got {len(values)}")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ConfigError(
                f"a weight must be finite and at least 0, got {weight}; a negative one would undo safety"
            )
    if not any(weights):
        raise ConfigError("all weights are 0: the result would change nothing")
    if method not in METHODS:
        raise ConfigError(f"there is no method {method}; there are {', '.join(METHODS)}")
    if rank is not None and method == "concat":
        raise ConfigError("concat is exact and its rank is the sum of the ranks; the method svd cuts to a rank")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    for adapter in adapters:
        adapter.validate()
