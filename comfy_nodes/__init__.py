"""Safety adapters, safety costs and reports as ComfyUI nodes.

ComfyUI calls `comfy_entrypoint`. Importing this package registers nothing and needs no ComfyUI.
"""

from __future__ import annotations

import os
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
COST_MODELS = "safety_cost"
"""The folder below ComfyUI's `models` for cost models, policies and quality references."""
ADAPTER_GATES = "spo_adapter_gates"
"""The folder below ComfyUI's `models` for what `spo train-gate` makes."""

_FILES = {COST_MODELS: {".json", ".safetensors", ".yaml"}, ADAPTER_GATES: {".safetensors"}}


async def comfy_entrypoint() -> ComfyExtension:
    """The nodes of this pack, for ComfyUI."""
    # The nodes read the folders when their schemas are made, so these have to be known before they are imported.
    _register_folders()
    from comfy_api.v0_0_2 import ComfyExtension

    from . import (
        adapters,
        cost_models,
        preview,
        report,
        safety,
        showing,
        steering,
        step_control,
        sticker_demo,
        withholding,
    )

    nodes: list[type[Any]] = [
        *(adapters.LoadAdapter, adapters.AdapterStack, adapters.ApplyByBlock, adapters.MergeAdapters),
        *(step_control.AdapterWindow, step_control.GateAdapter, steering.Steering, sticker_demo.StickerDemoLoader),
        *(cost_models.LoadCostModel, safety.SafetyCost, safety.SafetyOverlay),
        *(withholding.SafetySwitch, withholding.SafetyFilter),
        *(report.UAScore, report.SaveReport, showing.Compare, showing.SaveImage),
    ]

    class SPOExtension(ComfyExtension):
        async def on_load(self) -> None:
            preview.register_routes()

        async def get_node_list(self) -> list[type[Any]]:
            return nodes

    return SPOExtension()


def _register_folders() -> None:
    import folder_paths

    for folder, suffixes in _FILES.items():
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
        folder_paths.folder_names_and_paths[folder][1].update(suffixes)
