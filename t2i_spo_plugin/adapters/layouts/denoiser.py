"""Whose modules a file of a transformer changes, and the same modules by diffusers' names."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from t2i_spo_plugin.errors import InvalidAdapterError
from t2i_spo_plugin.files import quoted

from ..lora import LoraPair
from .bases import BASES, Base


_COMPONENT = "transformer"


def owns(path: str) -> bool:
    """Whether `path`, with dots or with underscores for them, is a module of a transformer that is known."""
    flat = path.replace(".", "_")
    return any(base.find(flat) is not None for base in BASES)


def is_original(path: str) -> bool:
    """Whether `path` is known, and by no base's diffusers names."""
    flat = path.replace(".", "_")
    return owns(path) and not any(base.find(flat, fused_only=True) for base in BASES)


def original_name(name: str, architecture: str) -> str | None:
    """What the own code of `architecture` calls the module `name`; None where that is not known, or it is fused."""
    base = next((base for base in BASES if base.architecture == architecture), None)
    return base.original_name(name) if base else None


def candidates(paths: Collection[str], fused_only: bool = False) -> list[Base]:
    """The bases that have the most of `paths`, in the order of `BASES`; none when no base has one."""
    flats = [path.replace(".", "_") for path in paths]
    counts = {base.architecture: sum(base.find(flat, fused_only) is not None for flat in flats) for base in BASES}
    most = max(counts.values())
    return [base for base in BASES if most and counts[base.architecture] == most]


def architectures_of(modules: Mapping[str, LoraPair]) -> list[str]:
    """The architectures that transformer modules by diffusers' names, as `in_diffusers_names` returns them, may be of.

    Several where the names are shared, such as those of an attention; none where no base has all of them.
    """
    paths = [name.partition(".")[2] for name in modules if name.startswith(f"{_COMPONENT}.")]
    flats = [path.replace(".", "_") for path in paths]
    return [base.architecture for base in BASES if flats and all(base.find(flat, fused_only=True) for flat in flats)]


def in_diffusers_names(
    modules: Mapping[str, LoraPair], architecture: str = "", fused_only: bool = False
) -> dict[str, LoraPair]:
    """`modules` with those of the transformer renamed to diffusers' names; layers that are fused are parted.

    Args:
        modules: names begin with the component; the rest may have underscores for dots.
        architecture: of the model they are for, where it is known: it decides between bases that share names.
        fused_only: the names are diffusers' own, only fused projections are parted.

    Raises:
        InvalidAdapterError: a fused layer has other sizes than its parts, or a module is changed under two names.
    """
    ours = {name.partition(".")[2]: pair for name, pair in modules.items() if name.startswith(f"{_COMPONENT}.")}
    base = _choose(ours, architecture, fused_only)
    if base is None:
        return dict(modules)
    renamed: dict[str, LoraPair] = {}
    for name, pair in modules.items():
        component, _, path = name.partition(".")
        parts = _parts(path, pair, base, fused_only) if component == _COMPONENT else {}
        for target, part in (parts or {name: pair}).items():
            if target in renamed:
                raise InvalidAdapterError(f"{target} is changed twice, under two names")
            renamed[target] = part
    return dict(sorted(renamed.items()))


def _choose(modules: Mapping[str, LoraPair], architecture: str, fused_only: bool) -> Base | None:
    bases = candidates(modules, fused_only)
    if fused_only:
        bases = [base for base in bases if all(base.find(path.replace(".", "_"), True) for path in modules)]
    named = [base for base in bases if base.architecture == architecture]
    fitting = [base for base in bases if _has_ratios(base, modules)]
    return next(iter(named or fitting or bases), None)


def _has_ratios(base: Base, modules: Mapping[str, LoraPair]) -> bool:
    for path, pair in modules.items():
        rule = base.find(path.replace(".", "_"))
        ratio = base.ratio_rules.get(rule[0]) if rule else None
        if ratio is not None and pair.shape[0] != ratio * pair.shape[1]:
            return False
    return True


def _parts(path: str, pair: LoraPair, base: Base, fused_only: bool) -> dict[str, LoraPair]:
    """What `path` is in diffusers, empty when the base has no such module."""
    rule = base.find(path.replace(".", "_"), fused_only)
    if rule is None:
        return {}
    template, targets = rule
    names = [target.replace(":", ".", 1) if ":" in target else f"{_COMPONENT}.{target}" for target in targets]
    if template in base.swapped:
        pair = LoraPair(pair.down, _swapped(pair.up, pair.down.shape[1], path), pair.alpha)
    if len(names) == 1:
        return {names[0]: pair}
    sizes = _sizes(len(names), pair.up.shape[0], pair.down.shape[1])
    if pair.down.ndim != 2 or sum(sizes) != pair.up.shape[0] or min(sizes) <= 0:
        raise InvalidAdapterError(
            f"{quoted(path)} changes a weight of {list(pair.shape)}: that is no {len(names)} layers side by side"
        )
    ups = zip(names, pair.up.split(sizes), strict=True)
    return {name: LoraPair(pair.down.clone(), up.clone(), pair.alpha) for name, up in ups}


def _sizes(parts: int, rows: int, width: int) -> list[int]:
    """The rows of layers side by side: queries are as wide as what they come from, keys and values may be narrower."""
    if parts == 2:
        return [rows // 2] * 2
    if parts == 3:
        return [width] + [(rows - width) // 2] * 2
    return [width] * 3 + [rows - 3 * width]


def _swapped(up: Tensor, width: int, path: str) -> Tensor:
    """(shift, scale) as (scale, shift); a modulation of more parts has the same order in both codes."""
    if up.shape[0] % 2:
        raise InvalidAdapterError(f"{quoted(path)} has {up.shape[0]} rows, which are no shift and scale")
    return torch.cat(up.chunk(2)[::-1]) if up.shape[0] == 2 * width else up
