"""Safety adapters as ComfyUI nodes. ComfyUI calls `comfy_entrypoint`; importing this package needs no ComfyUI."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any


if find_spec("t2i_spo_plugin") is None:
    raise ImportError(
        "the SPO nodes need the Python package t2i_spo_plugin, which this ComfyUI's Python does not have; install it "
        "there with: python -m pip install t2i-spo-plugin"
    )

if TYPE_CHECKING:
    from comfy_api.v0_0_2 import ComfyExtension

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

WEB_DIRECTORY = "web"


async def comfy_entrypoint() -> ComfyExtension:
    """The nodes of this pack, for ComfyUI."""
    from comfy_api.v0_0_2 import ComfyExtension

    from . import adapters, steering, sticker_demo

    nodes: list[type[Any]] = [*adapters.NODES, *steering.NODES, *sticker_demo.NODES]

    class SPOExtension(ComfyExtension):
        async def get_node_list(self) -> list[type[Any]]:
            return nodes

    return SPOExtension()
