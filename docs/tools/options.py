"""The tables of options in docs/training.md, from the dataclasses that the command line takes; none is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import partial
from inspect import cleandoc
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "training"
NAMES = ROOT / "t2i_spo_plugin" / "registry" / "tables.py"
"""Where the names stand that a default may be, such as `STICKER`."""


class Option(NamedTuple):
    """A field of a dataclass: its name, its default as Python writes it, its line of the docstring, and the comment
    above it, which begins a group."""

    name: str
    default: str
    text: str
    group: str


def options(path: str, name: str) -> Iterator[Option]:
    """The fields of the dataclass `name` in the file `path` below `training/`, without those that hold options."""
    source = (TRAINING / path).read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    _, _, attributes = cleandoc(ast.get_docstring(found) or "").partition("Attributes:\n")
    names = dict(re.findall(r'^(\w+) = "(\w+)"$', NAMES.read_text(encoding="utf-8"), re.MULTILINE))
    pairs = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    texts = {field: " ".join(text.split()) for field, text in pairs}
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in texts:
            default = "required" if node.value is None else ast.unparse(node.value).strip("'")
            default = names.get(default, default)
            above = lines[node.lineno - 2].strip()
            group = above.removeprefix("# ") if above.startswith("# ") else ""
            if not default.startswith("field("):
                yield Option(node.target.id, default, texts[node.target.id], group)


def table(*parts: tuple[str, str, str]) -> str:
    """One row an option; each of `parts` is a prefix of its options, a file and a dataclass."""
    rows = ["| option | default | what it is |", "|---|---|---|"]
    for prefix, path, name in parts:
        for option in options(path, name):
            if option.group:
                rows.append(f"| **{option.group}** | | |")
            flag = f"--{prefix}{option.name.rstrip('_').replace('_', '-')}"
            default = (
                f"`{option.default}`" if option.default not in ("", "()", "required") else option.default.strip("()")
            )
            rows.append(f"| `{flag}` | {default} | {option.text} |")
    return "\n".join(rows)


TERMS = "objectives/terms.py"
BLOCKS: dict[str, Callable[[], str]] = {
    "options-dpo": partial(table, ("objective.", "objectives/dpo.py", "DPOOptions")),
    "options-spo": partial(table, ("objective.", "objectives/spo.py", "SPOOptions")),
    "options-scdpo": partial(table, ("objective.", "objectives/scdpo.py", "SCDPOOptions")),
    "options-alignguard": partial(table, ("objective.", "objectives/alignguard.py", "AlignGuardOptions")),
    "options-duo": partial(table, ("objective.", "objectives/duo.py", "DUOOptions")),
    "options-kto": partial(table, ("objective.", "objectives/kto.py", "KTOOptions")),
    "options-mapo": partial(table, ("objective.", "objectives/mapo.py", "MaPOOptions")),
    "options-group": partial(table, ("objective.", "objectives/group.py", "GroupOptions")),
    "options-pareto": partial(table, ("objective.", "objectives/pareto.py", "ParetoOptions")),
    "options-nft": partial(table, ("objective.", "objectives/nft.py", "NFTOptions")),
    "options-cost-gradient": partial(table, ("objective.", "objectives/cost_gradient.py", "CostGradientOptions")),
    "options-terms": partial(
        table,
        ("terms.sft.", TERMS, "SFTTermOptions"),
        ("terms.prior-preservation.", TERMS, "PriorPreservationOptions"),
        ("terms.output-preservation.", TERMS, "OutputPreservationOptions"),
        ("terms.loser-guard.", TERMS, "LoserGuardOptions"),
        ("terms.safedpo.", TERMS, "SafeDPOOptions"),
    ),
    "options-regions": partial(table, ("regions.", "data/regions.py", "RegionOptions")),
    "options-train": partial(table, ("", "config.py", "TrainConfig")),
    "options-rounds": partial(table, ("", "rounds.py", "RoundsConfig")),
    "options-experts": partial(table, ("", "experts.py", "ExpertsConfig")),
    "options-pairs": partial(table, ("", "data/pairing.py", "PairConfig")),
}
