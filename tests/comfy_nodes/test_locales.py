"""What the ComfyUI nodes say in each language: all of it, in that language, and a help page for every node.

English is what the others are compared with; `tests/comfy/test_every_node.py` compares English with the nodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


PACK = Path(__file__).parents[2] / "comfy_nodes"
LANGUAGES = sorted(folder.name for folder in (PACK / "locales").iterdir())
TRANSLATIONS = [language for language in LANGUAGES if language != "en"]
FILES = ("main.json", "nodeDefs.json")

HAN, KANA = re.compile(r"[\u4e00-\u9fff]"), re.compile(r"[\u3041-\u30ff]")
SAME_EVERYWHERE = {"SPO", "CLIP", "VAE"}


def content(language: str, name: str = "nodeDefs.json") -> dict[str, Any]:
    return json.loads((PACK / "locales" / language / name).read_text(encoding="utf-8"))


def texts(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All texts with where they stand, in the order of the file."""
    if not isinstance(found, dict):
        yield path, found
        return
    for key, value in found.items():
        yield from texts(value, f"{path}/{key}")


NODES = content("en")


def page(node: str, language: str) -> str:
    path = f"{node}.md" if language == "en" else f"{node}/{language}.md"
    return (PACK / "web" / "docs" / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_has_the_texts_of_english_and_no_others(language, name):
    translated = dict(texts(content(language, name)))
    assert list(translated) == [path for path, _ in texts(content("en", name))]
    assert not [path for path, text in translated.items() if not isinstance(text, str) or not text.strip()]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_says_something_else_to_the_browser(language):
    """ComfyUI's browser takes these characters for placeholders, links and plural forms, in some versions only."""
    assert not [path for name in FILES for path, text in texts(content(language, name)) if set(text) & set("{}@|")]


def test_chinese_and_japanese_are_what_they_say():
    def wrong(language: str, fits: Any) -> list[str]:
        found = [pair for name in FILES for pair in texts(content(language, name))]
        return [path for path, text in found if text not in SAME_EVERYWHERE and not fits(path, text)]

    assert not wrong("zh", lambda path, text: HAN.search(text) and not KANA.search(text))
    assert not wrong("ja", lambda path, text: KANA.search(text) or HAN.search(text) and path.endswith("/name"))


def test_there_is_a_help_page_for_every_node_in_every_language_and_no_other():
    docs = PACK / "web" / "docs"
    expected = {f"{node}.md" for node in NODES}
    expected |= {f"{node}/{language}.md" for node in NODES for language in TRANSLATIONS}
    assert {path.relative_to(docs).as_posix() for path in docs.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NODES)
def test_a_help_page_explains_every_socket_under_the_name_shown(node, language):
    entry, written = content(language)[node], page(node, language)
    assert written.startswith(f"# {entry['display_name']}\n")
    for kind in ("inputs", "outputs"):
        for key, socket in entry[kind].items():
            # English shows the ids themselves, with spaces.
            name = NODES[node][kind][key]["name"].replace(" ", "_")
            shown = f"**{name}**" if language == "en" else f"**{name}**（{socket['name']}"
            assert shown in written, f"{node}, {language}: {shown}"


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node", NODES)
def test_a_translated_help_page_is_as_long_as_the_english_one(node, language):
    """As many sections and points, and every option, file and folder that the English page names."""
    original, translated = page(node, "en"), page(node, language)
    for marks in (r"^## ", r"^ *- "):
        assert len(re.findall(marks, translated, re.M)) == len(re.findall(marks, original, re.M))
    assert set(re.findall(r"`[^`]+`", original)) <= set(re.findall(r"`[^`]+`", translated))
