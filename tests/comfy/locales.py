"""The pack's English texts for ComfyUI's translations, taken from the schemas; as a program, writes them.

    COMFYUI=path/to/ComfyUI python tests/comfy/locales.py

ComfyUI's browser shows the texts in `comfy_nodes/locales/<language>` instead of those that the nodes bring: names and
tooltips of inputs by their id, of outputs by their number, and the parts of a category wherever they occur. Only what
is shown changes; saved workflows go by ids.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "comfy_nodes" / "locales"


def read_schemas() -> dict[str, Any]:
    """The schemas of the pack's nodes by node id; ComfyUI's tree has to be importable."""
    import t2i_spo_plugin.comfy_nodes as pack

    nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes)}


def english(schemas: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """What the files of `locales/en` hold, by file name."""
    schemas = list(schemas)
    parts = [part for schema in schemas for part in schema.category.split("/")]
    return {
        "main.json": {"nodeCategories": {part: part for part in parts}},
        "nodeDefs.json": {schema.node_id: _texts(schema) for schema in schemas},
    }


def _texts(schema: Any) -> dict[str, Any]:
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {socket.id: _socket(socket) for socket in schema.inputs},
        "outputs": {str(number): _socket(socket) for number, socket in enumerate(schema.outputs)},
    }


def _socket(socket: Any) -> dict[str, str]:
    return {"name": socket.id.replace("_", " "), "tooltip": socket.tooltip}


def main() -> None:
    sys.path[:0] = [os.environ["COMFYUI"], str(REPOSITORY)]
    sys.argv[1:] = []  # ComfyUI reads the command line when it is imported
    from comfy.cli_args import args

    args.cpu = True
    for name, content in english(read_schemas().values()).items():
        path = FOLDER / "en" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
