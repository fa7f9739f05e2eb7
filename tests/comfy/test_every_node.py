"""What every registered node has to bring, whoever adds one."""

import asyncio
import json
from pathlib import Path

import pytest


pytestmark = pytest.mark.comfy
pytest.importorskip("comfy", reason="runs where ComfyUI is")

from comfy.cli_args import args  # noqa: E402


args.cpu = True

import t2i_spo_plugin.comfy_nodes as pack  # noqa: E402


PACK = Path(pack.__file__).parent
NODES = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
SECTIONS = ("SPO/adapters", "SPO/safety", "SPO/report")


@pytest.fixture(params=SCHEMAS)
def schema(request):
    return SCHEMAS[request.param]


def test_it_can_be_found_and_says_what_it_is_for(schema):
    assert schema.node_id.startswith("SPO_") and schema.display_name and schema.category in SECTIONS
    assert len(schema.description) > 30 and schema.search_aliases


def test_every_socket_is_explained(schema):
    for socket in (*schema.inputs, *schema.outputs):
        assert socket.tooltip and len(socket.tooltip) > 10, f"{schema.node_id}.{socket.id} has no tooltip"


def test_its_help_page_speaks_of_every_socket(schema):
    page = (PACK / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    missing = [one.id for one in (*schema.inputs, *schema.outputs) if f"**{one.id}**" not in page]
    assert not missing, f"the help page of {schema.node_id} does not speak of {missing}"


@pytest.mark.xfail(not (PACK / "locales").is_dir(), reason="there are no translations yet", strict=False)
@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_it_is_translated(schema, language):
    content = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    entry = content[schema.node_id]
    assert entry["display_name"] and entry["description"]
    assert set(entry.get("inputs", {})) == {given.id for given in schema.inputs}


@pytest.mark.xfail(not (PACK / "example_workflows").is_dir(), reason="there are no examples yet", strict=False)
def test_an_example_uses_it(schema):
    used = set()
    for path in (PACK / "example_workflows").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        graphs = [content, *content.get("definitions", {}).get("subgraphs", [])]
        used |= {node["type"] for graph in graphs for node in graph["nodes"]}
    assert schema.node_id in used
