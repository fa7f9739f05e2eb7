"""Several adapters into one: exactly, at a chosen rank, or by what wins where they contradict, with the error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, IncompatibleAdapterError
from t2i_spo_plugin.options import check_choice, check_range

from . import comerge, task_vectors
from .adapter import Adapter
from .comerge import Activity, Score, Unit
from .dtypes import check_dtype, rounded
from .lora import LoraPair
from .low_rank import balanced_pair, decompose, relative_error
from .metadata import AdapterMetadata


__all__ = ["METHODS", "MERGE_METHODS", "MergeOptions", "MergeResult", "merge_adapters", "relative_error"]


@dataclass(frozen=True)
class MergeResult:
    """Several adapters as one.

    Attributes:
        adapter: the merged adapter, on the CPU, alpha equal to the rank everywhere.
        module_errors: `||merged - exact|| / ||exact||` in the Frobenius norm, by module, of cutting and of rounding to
            16 bits; 0 where nothing was cut or rounded. Exact is what the method gives at full rank.
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


METHODS: dict[str, Method] = {"concat": concat, "svd": svd}
"""Methods that give the sum, from its two stacked matrices."""
CONFLICT_METHODS = ("ties", "dare", "dare-ties", "magnitude", "comerge")
"""Methods that decide where adapters contradict each other."""
MERGE_METHODS = (*METHODS, *CONFLICT_METHODS)
"""What `merge_adapters` takes for `method`."""


@dataclass(frozen=True)
class MergeOptions:
    """Options of the methods that decide where adapters contradict each other.

    Attributes:
        density: of `ties`, `dare`, `dare-ties` and `magnitude`: the share of values that is kept, in (0, 1].
        seed: of what `dare` and `dare-ties` drop.
        unit: of `comerge`: what competes.
        score: of `comerge`: whether the more frequent winner or the larger mean activation wins.
    """

    density: float = 0.5
    seed: int = 0
    unit: Unit = "row"
    score: Score = "frequency"

    def __post_init__(self) -> None:
        check_range("density", self.density, 0.0, 1.0, open_low=True)
        check_choice("unit", self.unit, get_args(Unit))
        check_choice("score", self.score, get_args(Score))


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "concat",
    rank: int | None = None,
    names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    options: MergeOptions | None = None,
    activities: Mapping[str, Activity] | None = None,
) -> MergeResult:
    """One adapter out of several; by the first two methods it changes every weight by `sum_k weights[k] * delta_k`.

    Where an adapter has no module, it adds nothing and takes no part; a module that only one has is left as it is.

    Args:
        adapters: at least one, all for the same architecture and prediction type (where they say).
        weights: finite and at least 0, one an adapter and not all 0; 1 each by default.
        method: `concat` is the exact sum, its rank the sum of the ranks; `svd` cuts it to `rank`; `ties`, `dare`,
            `dare-ties` and `magnitude` are PEFT's (`task_vectors.py`), `comerge` takes each unit from one adapter
            (`comerge.py`).
        rank: of the result, at most: for `svd` by default the largest rank of the parents, for others what they need,
            of methods over values the sum of the parents' ranks.
        names: of the parents, for the header; their titles by default.
        dtype: of the result: float32, float16 or bfloat16. The arithmetic is float32 or wider.
        options: of the methods beside `concat` and `svd`.
        activities: for `comerge`, how active the adapters are in each module, in their order; without them it goes by
            the norms of the weights.

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
    options = options or MergeOptions()
    metadata = _metadata(adapters, weights, names, method, options)
    if method in METHODS:
        stacked = stack(adapters, weights)
        merged_modules = {name: METHODS[method](down, up, rank) for name, (down, up) in stacked.items()}
    else:
        parts = _parts(adapters, weights)
        merged_modules = {
            name: _decided(method, [pair for _, pair, _ in part], [weight for *_, weight in part], rank, options)
            if method != "comerge"
            else _comerged(part, rank, options, (activities or {}).get(name))
            for name, part in sorted(parts.items())
        }
    modules = {name: _rounded(module, dtype, name) for name, module in merged_modules.items()}
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


_Part = tuple[int, LoraPair, float]
"""The number of an adapter, its pair for a module, and its weight."""


def _parts(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[_Part]]:
    """By module what each adapter with a weight has of it, all of one shape."""
    parts: dict[str, list[_Part]] = {}
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for name, pair in adapter.modules.items():
            if weight > 0.0:
                parts.setdefault(name, []).append((number, pair, weight))
    for name, part in sorted(parts.items()):
        shapes = sorted({pair.shape for _, pair, _ in part})
        if len(shapes) > 1:
            listed = " and ".join(str(list(shape)) for shape in shapes)
            raise IncompatibleAdapterError(
                f"the adapters are for different models: they change {name} as weights of {listed}"
            )
    return parts


def stack(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Both matrices of the exact sum by module, float32: `down [ranks, in, ...]`, `up [out, ranks, ...]`."""
    parts = _parts(adapters, weights)
    return {name: _stacked([(pair, weight) for _, pair, weight in part]) for name, part in sorted(parts.items())}


def _stacked(pairs: Sequence[tuple[LoraPair, float]]) -> tuple[Tensor, Tensor]:
    down = torch.cat([_plain(pair.down) for pair, _ in pairs])
    return down, torch.cat([_plain(pair.up) * (weight * pair.scale) for pair, weight in pairs], dim=1)


def _at_rank(down: Tensor, up: Tensor, rank: int | None) -> Approximation:
    return concat(down, up, None) if rank is None or down.shape[0] <= rank else svd(down, up, rank)


def _decided(
    method: str, pairs: Sequence[LoraPair], weights: Sequence[float], rank: int | None, options: MergeOptions
) -> Approximation:
    """A module by one of the methods over values of the changes."""
    if len(pairs) == 1:
        return _at_rank(*_stacked([(pairs[0], weights[0])]), rank)
    deltas, factors = torch.stack([pair.delta().cpu() for pair in pairs]), torch.tensor(list(weights))
    if method in ("ties", "magnitude"):
        decide: Any = task_vectors.ties if method == "ties" else task_vectors.magnitude
        merged = decide(deltas, factors, options.density)
    else:
        masks = [task_vectors.drop_mask(delta, options.density, options.seed) for delta in deltas]
        decide = task_vectors.dare if method == "dare" else task_vectors.dare_ties
        merged = decide(deltas, factors, masks, options.density)
    return _decomposed(merged, pairs, rank)


def _comerged(
    part: Sequence[_Part], rank: int | None, options: MergeOptions, activity: Activity | None
) -> Approximation:
    """A module with each unit from the adapter that is most active there."""
    pairs = [LoraPair(_plain(pair.down), _plain(pair.up), pair.alpha * weight) for _, pair, weight in part]
    if len(pairs) == 1:
        return _at_rank(*_stacked([(pairs[0], 1.0)]), rank)
    if options.unit == "element":
        return _decomposed(comerge.select_elements(torch.stack([pair.delta() for pair in pairs])), pairs, rank)
    numbers, active = [number for number, *_ in part], activity or comerge.norms(pairs)
    if activity is not None:
        # How large an output is depends on the weight of its adapter; how often it wins was seen at weight 1.
        factors = torch.tensor([weight for *_, weight in part])[:, None]
        sizes = (activity.row_sizes[numbers] * factors, activity.rank_sizes[numbers] * factors)
        active = Activity(activity.row_wins[numbers], sizes[0], activity.rank_wins[numbers], sizes[1])
    rows = comerge.winners(active.row_wins, active.row_sizes, options.score)
    ranks = comerge.winners(active.rank_wins, active.rank_sizes, options.score)
    if options.unit == "row":
        matrices = comerge.select_rows(pairs, rows)
    elif options.unit == "rank":
        matrices = comerge.select_ranks(pairs, ranks)
    else:
        matrices = comerge.select_factors(pairs, ranks, rows)
    return _at_rank(*matrices, rank)


def _decomposed(change: Tensor, pairs: Sequence[LoraPair], rank: int | None) -> Approximation:
    pair, (lost, total) = decompose(change, rank or sum(pair.rank for pair in pairs), None)
    return Approximation(pair, lost, total)


def _plain(matrix: Tensor) -> Tensor:
    return matrix.detach().to("cpu", torch.float32)


def _metadata(
    adapters: Sequence[Adapter], weights: Sequence[float], names: Sequence[str], method: str, options: MergeOptions
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
        "merge_density": "" if method in (*METHODS, "comerge") else repr(options.density),
        "merge_unit": options.unit if method == "comerge" else "",
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
    if method not in MERGE_METHODS:
        raise ConfigError(f"there is no method {method}; there are {', '.join(MERGE_METHODS)}")
    if rank is not None and method == "concat":
        raise ConfigError("concat is exact and its rank is the sum of the ranks; the method svd cuts to a rank")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    for adapter in adapters:
        adapter.validate()
