"""What every registered node has to bring, whoever adds one."""

import json
from pathlib import Path

import pytest


pytestmark = pytest.mark.comfy
pytest.importorskip("comfy", reason="runs where ComfyUI is")

from comfy.cli_args import args  # noqa: E402


args.cpu = True

from locales import english, read_schemas  # noqa: E402

import t2i_spo_plugin.comfy_nodes as pack  # noqa: E402


PACK = Path(pack.__file__).parent
SCHEMAS = read_schemas()
ENGLISH = english(SCHEMAS.values())
SECTIONS = ("SPO/adapters", "SPO/safety", "SPO/report")


@pytest.fixture(params=SCHEMAS)
def schema(request):
    return SCHEMAS[request.param]


def texts(language, name):
    return json.loads((PACK / "locales" / language / name).read_text(encoding="utf-8"))


def test_it_can_be_found_and_says_what_it_is_for(schema):
    assert schema.node_id.startswith("SPO_") and schema.display_name and schema.category in SECTIONS
    assert len(schema.description) > 30 and schema.search_aliases


def test_every_socket_is_explained(schema):
    for socket in (*schema.inputs, *schema.outputs):
        assert socket.tooltip and len(socket.tooltip) > 10, f"{schema.node_id}.{socket.id} has no tooltip"


@pytest.mark.parametrize("name", ENGLISH)
def test_the_english_texts_are_those_of_the_nodes(name):
    """In their order too, which is that of the other languages."""
    written = texts("en", name)
    assert json.dumps(written) == json.dumps(ENGLISH[name]), "write them with tests/comfy/locales.py"


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_it_is_translated(schema, language):
    """Names, tooltips and the help page; `tests/test_comfy_languages.py` reads what they say."""
    entry = texts(language, "nodeDefs.json")[schema.node_id]
    assert entry["display_name"] and entry["description"]
    assert list(entry["inputs"]) == [socket.id for socket in schema.inputs]
    assert list(entry["outputs"]) == [str(number) for number in range(len(schema.outputs))]
    for socket in (*entry["inputs"].values(), *entry["outputs"].values()):
        assert socket["name"] and socket["tooltip"]
    path = f"{schema.node_id}.md" if language == "en" else f"{schema.node_id}/{language}.md"
    page = (PACK / "web" / "docs" / path).read_text(encoding="utf-8")
    assert page.startswith(f"# {entry['display_name']}\n")
    missing = [one.id for one in (*schema.inputs, *schema.outputs) if f"**{one.id}**" not in page]
    assert not missing, f"the help page {path} does not speak of {missing}"


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_no_text_is_left_of_what_is_gone(language):
    assert list(texts(language, "nodeDefs.json")) == list(SCHEMAS)
    sections = {part for schema in SCHEMAS.values() for part in schema.category.split("/")}
    assert set(texts(language, "main.json")["nodeCategories"]) == sections


def test_an_example_uses_it(schema):
    if schema.is_deprecated:
        return  # It is there for saved workflows alone.
    used = set()
    for path in (PACK / "example_workflows").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        graphs = [content, *(content.get("definitions") or {}).get("subgraphs", [])]
        used |= {node["type"] for graph in graphs for node in graph["nodes"]}
    assert schema.node_id in used
