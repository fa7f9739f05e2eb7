"""Names of modules as templates, and what one base's are in another's spelling.

A name is a template: `#` stands for the number of a block, braces for alternatives. Files write it with dots or, as
kohya's do, with underscores for dots, so templates are looked up by the flat form. Where the own code has one layer
for several of diffusers, its rows are theirs, one after the other: each takes its rows of B, and all share A.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache


Rule = tuple[str, tuple[str, ...]]
"""A template and what it is in diffusers, one layer or several side by side."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""What diffusers itself makes of projections when a trainer has it fuse them."""


@dataclass(frozen=True, eq=False)
class Base:
    """The module names of one architecture.

    Attributes:
        architecture: as `AdapterMetadata.base_architecture`.
        diffusers: templates of diffusers' names.
        original: templates of the own code's names, with diffusers' names for each; equal ones are left out.
        swapped: templates of the own code that compute (shift, scale) where diffusers computes (scale, shift).
        ratios: rows by column of the weights that tell this base from others which use the same names.
    """

    architecture: str
    diffusers: tuple[str, ...]
    original: Mapping[str, str] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    ratios: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def own_rules(self) -> dict[str, list[Rule]]:
        """The rules for diffusers' names, by flat template."""
        return _by_key((name, (name,)) for template in self.diffusers for name in _expand(template))

    @cached_property
    def fused_rules(self) -> dict[str, list[Rule]]:
        """The rules for projections that diffusers fused."""
        names = {name for template in self.diffusers for name in _expand(template)}
        rules = []
        for parent in sorted({name.rpartition(".")[0] for name in names}):
            for fused, parts in _FUSED.items():
                targets = tuple(f"{parent}.{part}" for part in parts)
                if names.issuperset(targets):
                    rules.append((f"{parent}.{fused}", targets))
        return _by_key(rules)

    @cached_property
    def original_rules(self) -> dict[str, list[Rule]]:
        """The rules for the own code's names."""
        rules = []
        for names, targets in self.original.items():
            expanded = [_expand(target) for target in targets.split()]
            rules += [(name, found) for name, *found in zip(_expand(names), *expanded, strict=True)]
        return _by_key((name, tuple(found)) for name, found in rules)

    def original_name(self, name: str) -> str | None:
        """What the own code calls the module `name`, or None where it is none, or only a part of one, there."""
        component, _, path = name.partition(".")
        target = path if component == "transformer" else f"{component}:{path}"
        key, numbers = _key(target.replace(".", "_"))
        for template, found in self._inverse_rules.get(key, ()):
            wild = _wildcards(template, numbers)
            if wild is not None:
                return _filled(found[0], wild)
        return None

    @cached_property
    def _inverse_rules(self) -> dict[str, list[Rule]]:
        single = [
            (targets[0], (template,))
            for rules in self.original_rules.values()
            for template, targets in rules
            if len(targets) == 1 and template not in self.swapped
        ]
        renamed = {target for target, _ in single}
        same = [rule for rules in self.own_rules.values() for rule in rules if rule[0] not in renamed]
        return _by_key([*single, *same])

    def find(self, flat: str, fused_only: bool = False) -> Rule | None:
        """The template of a flat path and diffusers' names for it, or None when this base has no such module."""
        key, numbers = _key(flat)
        tables = (self.own_rules, self.fused_rules) if fused_only else self._tables
        for table in tables:
            for template, targets in table.get(key, ()):
                wild = _wildcards(template, numbers)
                if wild is not None:
                    return template, tuple(_filled(target, wild) for target in targets)
        return None

    @cached_property
    def ratio_rules(self) -> dict[str, int]:
        """`ratios` by single templates."""
        return {name: ratio for names, ratio in self.ratios.items() for name in _expand(names)}

    @cached_property
    def _tables(self) -> tuple[dict[str, list[Rule]], ...]:
        return self.own_rules, self.original_rules, self.fused_rules


def _expand(template: str) -> list[str]:
    """`a.{b,c}.d` as `a.b.d` and `a.c.d`, the first braces varying slowest."""
    pieces = _BRACES.split(template)
    choices = [piece.split(",") if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


@lru_cache(maxsize=4096)
def _key(flat: str) -> tuple[str, tuple[str, ...]]:
    words = flat.split("_")
    return "_".join("#" if word.isdigit() else word for word in words), tuple(word for word in words if word.isdigit())


def _by_key(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    table: dict[str, list[Rule]] = {}
    for name, targets in rules:
        table.setdefault(_key(name.replace(".", "_"))[0], []).append((name, targets))
    return table


def _wildcards(template: str, numbers: tuple[str, ...]) -> list[str] | None:
    """The numbers that stand for the template's `#`, or None when another number differs from the template's."""
    places = [word for word in template.replace(".", "_").split("_") if word == "#" or word.isdigit()]
    if any(place not in ("#", number) for place, number in zip(places, numbers, strict=True)):
        return None
    return [number for place, number in zip(places, numbers, strict=True) if place == "#"]


def _filled(target: str, numbers: list[str]) -> str:
    parts = target.split("#")
    if len(parts) - 1 != len(numbers):
        raise ValueError(f"{target} has {len(parts) - 1} numbers, its own name {len(numbers)}")
    return "".join(itertools.chain(*zip(parts, [*numbers, ""], strict=True)))
