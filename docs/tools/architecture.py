"""The table and the picture of docs/architecture.md, from import-linter's configuration and docstrings."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "t2i_spo_plugin"


def contract(name: str) -> dict[str, Any]:
    """The import-linter contract `name` of pyproject.toml."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return next(one for one in content["tool"]["importlinter"]["contracts"] if one["id"] == name)


def layers() -> list[list[str]]:
    """The modules of each layer, highest first; those that are configured but do not exist are left out."""
    found = [re.findall(r"\w+", line) for line in contract("layers")["layers"]]
    return [names for names in ([name for name in line if _source(name)] for line in found) if names]


def purpose(name: str) -> str:
    """The first paragraph of the docstring of a package or module."""
    source = _source(name)
    assert source is not None, name
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def table() -> str:
    """One row a package or module, highest layer first."""
    rows = ["| layer | package or module | what it is for |", "|---|---|---|"]
    lines = layers()
    for number, names in enumerate(lines):
        for name in names:
            suffix = "/" if (PACKAGE / name).is_dir() else ".py"
            rows.append(f"| {len(lines) - number} | `{name}{suffix}` | {purpose(name)} |")
    return "\n".join(rows)


def light() -> str:
    """The packages that need no diffusion library, and the libraries that they do without."""
    found = contract("light")
    names = ", ".join(f"`{name.rpartition('.')[2]}`" for name in found["source_modules"])
    without = ", ".join(found["forbidden_modules"])
    return f"{names} do without {without}."


def picture() -> str:
    """The layers as one SVG."""
    width, left, gap, height = 960, 20, 12, 70
    lines = layers()
    total = 30 + len(lines) * (height + gap)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" font-family="DejaVu Sans, Verdana, '
        'Helvetica, Arial, sans-serif" role="img" aria-label="Layers of the package: imports only go down">',
        f'<rect width="{width}" height="{total}" fill="#ffffff"/>',
    ]
    colours = ("#dbe9f6", "#d9f0e0", "#fbeecb", "#fbe0d3", "#ece3f4", "#e9ecef")
    for number, names in enumerate(lines):
        top = 16 + number * (height + gap)
        across = (width - 2 * left - (len(names) - 1) * gap) / len(names)
        for place, name in enumerate(names):
            x = left + place * (across + gap)
            middle = x + across / 2
            parts.append(
                f'<rect x="{x:.0f}" y="{top}" width="{across:.0f}" height="{height}" rx="6" '
                f'fill="{colours[number % len(colours)]}" stroke="#8a8a8a"/>'
            )
            parts.append(
                f'<text x="{middle:.0f}" y="{top + 23}" font-size="16" font-weight="bold" text-anchor="middle" '
                f'fill="#222222">{escape(name)}</text>'
            )
            text = wrap(purpose(name).replace("`", ""), int(across / 6.7))
            if len(text) > 2:
                text = [text[0], text[1].rstrip(",;:.") + " …"]
            for line, words in enumerate(text):
                parts.append(
                    f'<text x="{middle:.0f}" y="{top + 43 + 15 * line}" font-size="11" text-anchor="middle" '
                    f'fill="#444444">{escape(words)}</text>'
                )
    return "\n".join([*parts, "</svg>", ""])


def _source(name: str) -> Path | None:
    for path in (PACKAGE / name / "__init__.py", PACKAGE / f"{name}.py"):
        if path.is_file():
            return path
    return None


BLOCKS: dict[str, Callable[[], str]] = {"layers": table, "light": light}
