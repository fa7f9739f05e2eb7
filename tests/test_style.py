"""Docstrings are Markdown, which the API reference renders; reStructuredText would stand there as it is."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for folder in ("t2i_spo_plugin", "training", "eval", "comfy_nodes")
    for path in (ROOT / folder).rglob("*.py")
    if "sticker" not in path.parts and not any(parent.is_symlink() for parent in path.parents)
)
RST = re.compile(r"(?<!`)``(?!`)|:(?:attr|class|data|exc|func|meth|mod|obj|py:\w+|ref):`")


def rst(source: str) -> list[str]:
    """The lines of docstrings, of attributes too, that hold double backticks or roles."""
    texts = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return [line.strip() for text in texts for line in text.splitlines() if RST.search(line)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_hold_no_restructured_text(path):
    assert rst(path.read_text(encoding="utf-8")) == []


def test_restructured_text_is_recognised():
    assert rst('"""As ``this``."""') == ["As ``this``."]
    assert rst("class A:\n    b: int\n    '''See :meth:`save`.'''") == ["See :meth:`save`."]
    assert rst('"""`code`, and a fence:\n```python\npass\n```"""\nx = "``"') == []
    assert len(FILES) > 100


def opened_images(source: str) -> list[int]:
    """The lines that open an image through Pillow."""
    return sorted(
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr == "open"
        and ast.unparse(node.value).rpartition(".")[2] in ("Image", "PIL")
    )


def test_images_are_opened_in_one_place():
    paths = [path for path in (ROOT / "t2i_spo_plugin").rglob("*.py") if "build" not in path.parts]
    paths += [path for folder in ("training", "eval", "comfy_nodes") for path in (ROOT / folder).rglob("*.py")]
    where = {path: lines for path in paths if (lines := opened_images(path.read_text(encoding="utf-8")))}
    # Elsewhere a file would not be upright, scaled by its depth, laid over a ground, or named when it is broken.
    assert {path.relative_to(ROOT).as_posix(): len(lines) for path, lines in where.items()} == {
        "t2i_spo_plugin/images.py": 1
    }
    assert opened_images("import PIL\nPIL.Image.open(a)\nImage.open\nopen(b)\nimage.open()") == [2, 3]
