"""Where an adapter file states its alphas: in tensors, in a configuration, or in one of the header's spellings.

Taking alpha for the rank where a header states another one applies the adapter several times too strongly, so every
spelling is read, and statements that contradict each other or the weights are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import InvalidAdapterError
from t2i_spo_plugin.files import quoted

from . import layouts
from .lora import COMPONENTS
from .metadata import FORMAT_KEY
from .safetensors_file import parse_metadata


_CONFIG = "adapter_config.json"
_KOHYA_ALPHA, _KOHYA_RANK = "ss_network_alpha", "ss_network_dim"
_ALPHAS = ("lora_alpha", "network_alpha", "alpha", _KOHYA_ALPHA)
_RANKS = ("r", "rank", "lora_rank", "network_dim", "network_rank", _KOHYA_RANK)
_DENOISERS = ("unet", "transformer", "transformer_2", "prior")
_SILENT = ("", "dynamic", "none", "null")
"""Values that state no number."""
_OF_SOME_MODULES = re.compile(r"alpha|dim|rank|rs_?lora")
"""Options in `ss_network_args` that give some modules an alpha or rank of their own."""
_TOLERANCE = 0.01
"""Relative: alphas of tensors may have been rounded to bfloat16."""


@dataclass(frozen=True)
class AlphaSource:
    """Where the alphas of a file come from.

    Attributes:
        where: in words.
        tensors: the alphas that the header states, as tensors with the keys that the file would have for them.
        conflicts: statements that contradict each other or the weights, a sentence each.
        problems: what only `strict=False` reads, a sentence each.
        notes: what is assumed, a sentence each.
        config: the file's PEFT configuration; empty where the header's alphas stand for a missing one.
    """

    where: str
    tensors: dict[str, Tensor]
    conflicts: list[str]
    problems: list[str]
    notes: list[str]
    config: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Statement:
    key: str
    source: str
    component: str
    value: float
    for_all: bool
    """Whether no pattern or option may give single modules another value."""

    def __str__(self) -> str:
        return f"{self.key} {self.value:g} in {self.source}"


def alpha_source(
    layout: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: Mapping[str, Any] | None
) -> AlphaSource:
    """Where the alphas of a file come from, and what is wrong with what it states.

    Args:
        layout: as `layouts.recognise` or `layouts.layout_of` names it.
        tensors: the file's LoRA weights and alphas.
        metadata: the file's header.
        config: the `adapter_config.json` beside the file, where there is one.

    Raises:
        InvalidAdapterError: a stated alpha or rank is no number.
        UnreadableAdapterError: the configuration in the header is not readable.
    """
    given, config = config, config if layout in ("peft", "original") else None
    alphas, ranks = _statements(metadata, config)
    downs: dict[str, Tensor] = {}
    stated: dict[str, float] = {}
    own: set[str] = set()
    for key, tensor in tensors.items():
        name, role = layouts.diffusers.split(key)
        if role == "down":
            downs[name] = tensor
        elif role == "alpha":
            own.add(name)
            if tensor.numel() == 1:
                stated[name] = float(tensor)
    conflicts: list[str] = []
    added: dict[str, Tensor] = {}
    used: list[str] = []
    folded = _is_folded(layout, metadata, own)
    for component in sorted({_component(name) for name in downs}):
        names = sorted(name for name in downs if _component(name) == component)
        theirs = _of(alphas, component)
        conflicts += _disagreements(theirs, {name: stated[name] for name in names if name in stated})
        conflicts += _rank_disagreements(_of(ranks, component), {name: downs[name] for name in names})
        flat = [one for one in theirs if one.source != _CONFIG]
        if not flat or config or _is_configured(layout, component, metadata) or (folded and _is_kohyas(flat)):
            continue
        if not flat[0].for_all and not _is_kohyas(flat):
            conflicts.append(f"{flat[0]} stands beside alpha_pattern or use_rslora, which are not understood there")
        value = torch.tensor(flat[0].value, dtype=torch.float64)
        missing = {f"{name}.alpha": value for name in names if name not in own}
        added |= missing
        used += [flat[0].key] if missing else []
    problems: list[str] = []
    notes: list[str] = []
    total, known = len(downs), len(own) + len(added)
    if config is not None:
        where = _CONFIG
    elif used:
        where = f"{' and '.join(dict.fromkeys(used))} in the header" + (", and the file's tensors" if own else "")
    elif own:
        where = "the file's tensors"
    elif layouts.diffusers.METADATA_KEY in metadata:
        where = f"{layouts.diffusers.METADATA_KEY} in the header"
    elif FORMAT_KEY in metadata:
        where = "the rank, since it is folded into the weights"
    else:
        where = "nowhere; it is taken to be the rank"
    if layout != "peft" and layouts.diffusers.METADATA_KEY not in metadata and FORMAT_KEY not in metadata:
        if folded and _KOHYA_ALPHA in metadata:
            notes.append(
                f"the header's {_KOHYA_ALPHA} is that of the kohya file this one was converted from, which folds "
                "alpha into the weights; alpha is taken to be the rank"
            )
        elif known == 0:
            notes.append("the file states no alpha; it is taken to be the rank, as other programs do")
        elif known < total:
            problems.append(f"only {known} of {total} modules state an alpha")
    stands_for_config = layout == "peft" and given is None and added
    return AlphaSource(where, added, conflicts, problems, notes, {} if stands_for_config else given)


def _statements(
    metadata: Mapping[str, str], config: Mapping[str, Any] | None
) -> tuple[list[_Statement], list[_Statement]]:
    """What is stated of alphas and of ranks."""
    sources: list[tuple[str, Mapping[str, Any]]] = [("the header", metadata)]
    text = metadata.get(layouts.diffusers.METADATA_KEY)
    if text:
        parsed = parse_metadata(text, f"{layouts.diffusers.METADATA_KEY} in the header")
        if isinstance(parsed, dict):
            sources.append((layouts.diffusers.METADATA_KEY, parsed))
    if config is not None:
        sources.append((_CONFIG, config))
    alphas: list[_Statement] = []
    ranks: list[_Statement] = []
    kohya_for_all = not _OF_SOME_MODULES.search(metadata.get("ss_network_args", ""))
    for source, values in sources:
        for key, value in values.items():
            prefix, _, last = key.rpartition(".")
            if last not in (*_ALPHAS, *_RANKS) or (prefix and prefix not in COMPONENTS):
                continue
            number = _number(key, value)
            if number is None:
                continue
            dotted = f"{prefix}." if prefix else ""
            own = kohya_for_all if last.startswith("ss_") else True
            if last in _ALPHAS:
                own = own and not values.get(f"{dotted}alpha_pattern") and not values.get(f"{dotted}use_rslora")
                alphas.append(_Statement(key, source, prefix, number, own))
            else:
                own = own and not values.get(f"{dotted}rank_pattern")
                ranks.append(_Statement(key, source, prefix, number, own))
    return alphas, ranks


def _number(key: str, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and value.strip().lower() in _SILENT):
        return None
    try:
        number = math.nan if isinstance(value, (bool, list, dict)) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        what = "rank" if key.rpartition(".")[2] in _RANKS else "alpha"
        raise InvalidAdapterError(f"{quoted(key)}: {what} must be a number, got {quoted(str(value))}")
    return number


def _of(statements: list[_Statement], component: str) -> list[_Statement]:
    """Those about `component`, empty for a denoiser that the file does not name, and about all modules.

    What is said of all modules may be meant of the denoiser alone: where an encoder has its own, that is asked.
    """
    names = (component,) if component else _DENOISERS
    named = [one for one in statements if one.component in names]
    general = [one for one in statements if not one.component]
    return [*named, *general] if not component or component in _DENOISERS else named or general


def _disagreements(theirs: list[_Statement], stated: Mapping[str, float]) -> Iterator[str]:
    for first, second in zip(theirs, theirs[1:], strict=False):
        if first.for_all and second.for_all and not _same(first.value, second.value):
            yield f"two statements of alpha disagree: {first}, {second}"
    for one in theirs[:1]:
        other = next((name for name, alpha in stated.items() if not _same(alpha, one.value)), None)
        if one.for_all and other is not None:
            yield (
                f"two statements of alpha disagree: {one}, {stated[other]:g} in the tensor {quoted(other + '.alpha')}"
            )


def _rank_disagreements(theirs: list[_Statement], downs: Mapping[str, Tensor]) -> Iterator[str]:
    for one in theirs:
        other = next((name for name, down in downs.items() if not _is_of_rank(down, one.value)), None)
        if one.for_all and other is not None:
            yield (
                f"{one} is not the rank of the weights: {quoted(other)} has rank {downs[other].shape[0]}, and alpha "
                "divided by the wrong rank is the wrong strength"
            )


def _is_of_rank(down: Tensor, rank: float) -> bool:
    """Whether the matrix has this rank; some trainers give a module that is smaller its whole width instead."""
    return down.ndim == 0 or down.shape[0] == rank or (down.shape[0] < rank and down.shape[0] >= down[0].numel())


def _same(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=_TOLERANCE)


def _is_kohyas(theirs: list[_Statement]) -> bool:
    return theirs[0].key == _KOHYA_ALPHA


def _is_folded(layout: str, metadata: Mapping[str, str], own: set[str]) -> bool:
    """Whether a trainer's kohya file was converted: its tools fold alpha into the weights and keep the header."""
    by_trainer = metadata.get("ss_network_module", "").startswith("networks.")
    return by_trainer and layout != "kohya" and not own and FORMAT_KEY not in metadata


def _is_configured(layout: str, component: str, metadata: Mapping[str, str]) -> bool:
    """Whether the configuration in the header is that of `component`: the codec takes its alphas from there."""
    text = metadata.get(layouts.diffusers.METADATA_KEY, "")
    return bool(text) and (layout == "bare" or f'"{component}.' in text)


def _component(name: str) -> str:
    """The component that a file's key names; empty for a denoiser's own name."""
    first = name.partition(".")[0]
    if first in COMPONENTS:
        return first
    named = next((of for prefix, of in layouts.kohya.PREFIXES.items() if name.startswith(prefix)), "")
    return named if named.startswith("text_encoder") else ""
