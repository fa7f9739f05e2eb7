"""An adapter with a strength of its own for each part of the models that it changes. Pure functions.

What a part is, for people: the first, the middle and the last blocks of the denoiser, what lies outside its blocks,
and the text encoders. In a UNet these are the blocks on the way down, the one in the middle, and those on the way up;
in a transformer, thirds of the blocks that the adapter changes, in the order in which the model runs them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from t2i_spo_plugin.errors import ConfigError

from .adapter import Adapter
from .lora import block_of
from .strengths import check_strength, factor_at, inside


__all__ = ["PARTS", "parse_blocks", "part_by_module", "scale_by_block"]

PARTS = ("first", "middle", "last", "other", "text encoder")
_UNET = {"unet.down_blocks": "first", "unet.mid_block": "middle", "unet.up_blocks": "last"}
_SECOND = "single_"
"""Begins the name of those blocks of Flux and its kin that run after all others."""


def part_by_module(modules: Collection[str]) -> dict[str, str]:
    """Which of `PARTS` each module of an adapter belongs to, by module name."""
    blocks = sorted({block_of(name) for name in modules if _is_block(block_of(name))}, key=_order)
    thirds = {block: PARTS[3 * place // len(blocks)] for place, block in enumerate(blocks)}
    parts = {}
    for name in modules:
        part = "text encoder" if name.startswith("text_encoder") else thirds.get(block_of(name), "other")
        parts[name] = next((known for block, known in _UNET.items() if inside(name, block)), part)
    return parts


def scale_by_block(adapter: Adapter, parts: Mapping[str, float], blocks: Mapping[str, float]) -> Adapter:
    """`adapter` with the change of every module multiplied.

    Args:
        adapter: is not changed.
        parts: factors by the names in `PARTS`; 1 where there is none.
        blocks: factors by block, as in `strengths`; they go before those of `parts`.

    Raises:
        ConfigError: an unknown part, or a factor that is no finite number of at least 0.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ConfigError(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    for factor in (*parts.values(), *blocks.values()):
        check_strength(factor)
    modules = {}
    for name, part in part_by_module(adapter.modules).items():
        named = any(inside(name, block) for block in blocks)
        factor = factor_at(name, blocks) if named else parts.get(part, 1.0)
        pair = adapter.modules[name]
        # By alpha no digit of 16-bit weights is lost; it cannot be 0.
        modules[name] = replace(pair, alpha=pair.alpha * factor) if factor else replace(pair, up=pair.up * 0.0)
    return replace(adapter, modules=modules)


def parse_blocks(text: str) -> dict[str, float]:
    """Factors by block from lines such as `unet.up_blocks.1 = 0.5`; empty lines are skipped.

    Raises:
        ConfigError: a line is not of that form, or its number is none of at least 0.
    """
    blocks = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, found, number = (part.strip() for part in line.partition("="))
        try:
            factor = float(number)
        except ValueError:
            factor = None
        if not (found and name) or factor is None:
            raise ConfigError(f"strengths by block are lines such as unet.up_blocks.1 = 0.5, got {line!r}")
        blocks[name] = check_strength(factor)
    return blocks


def _is_block(block: str) -> bool:
    """Whether it is a numbered block of a transformer."""
    return block.startswith("transformer.") and block.rpartition(".")[2].isdigit()


def _order(block: str) -> tuple[bool, str, int]:
    """Sorts blocks as the model runs them: of Flux the double blocks before the single ones."""
    path, _, number = block.rpartition(".")
    return _SECOND in path, path, int(number)
