"""The pack's languages as a running ComfyUI gives them to the browser."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest


pytestmark = pytest.mark.comfy

LOCALES = Path(__file__).resolve().parents[2] / "comfy_nodes" / "locales"


def own_nodes(server):
    """The pack's nodes, each with the folder name that the browser asks its help pages under."""
    own = {name: node for name, node in server.get("/api/object_info").items() if name.startswith("SPO_")}
    return {name: node["python_module"].removeprefix("custom_nodes.") for name, node in own.items()}


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_the_browser_gets_every_text(server, language):
    served = server.get("/api/i18n")[language]
    for name, found in (("nodeDefs.json", served["nodeDefs"]), ("main.json", served)):
        written = json.loads((LOCALES / language / name).read_text(encoding="utf-8"))
        assert written.items() <= found.items()
    assert own_nodes(server).keys() <= served["nodeDefs"].keys()


@pytest.mark.parametrize("language", ["zh", "ja", None])
def test_the_browser_gets_every_help_page(server, language):
    """Under the path that it tries first for a language, and the one it falls back to, which is English."""
    names = server.get("/api/i18n")[language or "en"]["nodeDefs"]
    for node, module in own_nodes(server).items():
        path = f"{node}/{language}.md" if language else f"{node}.md"
        with urllib.request.urlopen(f"{server.url}/extensions/{module}/docs/{path}", timeout=60) as answer:
            # A page that is HTML would be taken for the server's answer to what it does not know.
            assert "html" not in answer.headers.get_content_type()
            assert answer.read().decode().startswith(f"# {names[node]['display_name']}\n")
