"""How strongly an adapter is applied: one number, or one by block of the models it changes. Pure functions.

A block is a component or a module path inside one, from the left: `unet`, `unet.down_blocks`, `unet.up_blocks.1`,
`transformer.transformer_blocks.0`, `text_encoder`. Where several fit, the longest counts; where none does, 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from t2i_spo_plugin.errors import ConfigError


__all__ = ["Strength", "by_block", "check_blocks", "check_strength", "check_strengths", "factor_at", "inside"]

Strength = float | Mapping[str, float]
"""At least 0: a number for the whole adapter, or numbers by block (what is not named is applied with 1)."""


def check_strength(strength: object) -> float:
    """`strength` as a float.

    Raises:
        ConfigError: not a finite number, or negative, which would turn a safety adapter into its opposite.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise ConfigError(f"strength must be a finite number, got {strength!r}")
    if strength < 0:
        raise ConfigError(f"strength must be at least 0, got {strength}: a negative one would undo safety")
    return float(strength)


def check_strengths(strength: Strength) -> tuple[float, dict[str, float]]:
    """`strength` as the number for the whole and the numbers by block.

    Raises:
        ConfigError: a number is not finite or negative, or a block's name is no text.
    """
    if not isinstance(strength, Mapping):
        return check_strength(strength), {}
    for block in strength:
        if not isinstance(block, str) or not block:
            raise ConfigError(f"a strength by block needs names such as 'unet.down_blocks', got {block!r}")
    return 1.0, {block: check_strength(value) for block, value in strength.items()}


def check_blocks(blocks: Iterable[str], paths: Collection[str]) -> None:
    """Refuse names in `blocks` that hold none of the module `paths` (with component) which an adapter changes.

    Raises:
        ConfigError: with the blocks that there are.
    """
    unknown = [block for block in blocks if not any(inside(path, block) for path in paths)]
    if unknown:
        raise ConfigError(
            f"the adapter changes no block called {', '.join(map(repr, unknown))}; it changes {_blocks_of(paths)}"
        )


def factor_at(path: str, blocks: Mapping[str, float]) -> float:
    """The number that `blocks` give the module `path`: that of the longest block it is in, or 1."""
    matches = [block for block in blocks if inside(path, block)]
    return blocks[max(matches, key=len)] if matches else 1.0


def inside(path: str, block: str) -> bool:
    """Whether the module `path` is `block` or lies in it."""
    return path == block or path.startswith(f"{block}.")


def by_block(strengths: Mapping[str, float]) -> dict[str, float]:
    """The fewest blocks that say the same as `strengths` by module path."""
    uniform: dict[str, float | None] = {}
    for path, strength in strengths.items():
        for block in _prefixes(path):
            common = uniform.setdefault(block, strength)
            if common is not None and not math.isclose(common, strength, rel_tol=1e-6, abs_tol=1e-9):
                uniform[block] = None
    blocks: dict[str, float] = {}
    for path, strength in strengths.items():
        block = next(block for block in _prefixes(path) if uniform[block] is not None)
        blocks.setdefault(block, strength)
    return blocks


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _blocks_of(paths: Iterable[str]) -> str:
    """Components, their parts, and the numbered blocks of these, as a list for people."""
    blocks = set()
    for path in paths:
        parts = path.split(".")
        blocks |= {".".join(parts[:depth]) for depth in (1, 2) if depth < len(parts)}
        if len(parts) > 3 and parts[2].isdigit():
            blocks.add(".".join(parts[:3]))
    return ", ".join(sorted(blocks))
