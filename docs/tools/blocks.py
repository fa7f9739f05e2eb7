"""Fills the parts of pages that are made from files of the repository: tables of results, of layers and of options.

    python docs/tools/blocks.py           writes them
    python docs/tools/blocks.py --check   changes nothing and fails when one is out of date

Such a part stands between `<!-- block: NAME -->` and `<!-- /block -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import architecture
import options
import results


ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/results.md", "docs/architecture.md", "docs/training.md")
BLOCKS: dict[str, Callable[[], str]] = {**results.BLOCKS, **architecture.BLOCKS, **options.BLOCKS}
FILES: dict[str, Callable[[], str]] = {"docs/images/architecture.svg": architecture.picture}

_BLOCK = re.compile(r"(<!-- block: (?P<name>[\w-]+) -->\n).*?(<!-- /block -->)", re.DOTALL)


def filled(text: str) -> str:
    """`text` with every block made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match['name']]()}\n\n{match[3]}", text)


def main(check: bool) -> int:
    """Write pages and pictures, or only compare; returns the exit code."""
    wanted = {name: filled((ROOT / name).read_text(encoding="utf-8")) for name in PAGES}
    wanted |= {name: make() for name, make in FILES.items()}
    old = [name for name, text in wanted.items() if _read(ROOT / name) != text]
    if check and old:
        print(f"out of date: {', '.join(old)}; `python docs/tools/blocks.py` writes them anew", file=sys.stderr)
        return 1
    for name in old:
        (ROOT / name).write_text(wanted[name], encoding="utf-8")
        print(name)
    return 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
