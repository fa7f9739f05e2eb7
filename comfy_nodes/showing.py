"""Nodes for the eye and for keeping: two images side by side under one slider, and files that carry what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy_api.v0_0_2 import io
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from t2i_spo_plugin.guards import safety_content

from . import sockets
from .images import previews, steps
from .patching import Stack
from .scored import ScoredImages


KEY = "spo"
"""The text chunk of a PNG that Save Image with Costs writes."""
FORMAT = "spo-image/1"


class Compare(io.ComfyNode):
    """Two batches under one slider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_Compare",
            display_name="Compare Images A/B",
            category="SPO/report",
            description="Lays two images over each other, with a line to drag between them: left of it is A, right of "
            "it B. In the classic canvas and in Nodes 2.0.",
            search_aliases=["compare images", "before after", "a/b", "side by side", "image comparer", "slider"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image_a", tooltip="Left of the line; of a batch, one after the other."),
                io.Image.Input("image_b", tooltip="Right of the line, in the same order."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, image_a: Tensor, image_b: Tensor) -> io.NodeOutput:
        return io.NodeOutput(ui={"spo_compare": [{"a": previews(image_a), "b": previews(image_b)}]})


class SaveImage(io.ComfyNode):
    """PNG files with their costs and adapters inside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_SaveImage",
            display_name="Save Image with Costs",
            category="SPO/report",
            description="Saves images as the core node does, and writes into each PNG what it costs, by category, and "
            "which adapters it was generated with. It saves what it is given: to withhold, put Safety Switch before.",
            search_aliases=["save image", "png metadata", "safe", "nsfw", "safety metadata", "provenance"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The images to save."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="As of the core node Save Image: folder and beginning of the name in the output folder, "
                    "with %date:yyyy-MM-dd% and its kin.",
                ),
                sockets.Safety.Input(
                    "safety", optional=True, tooltip="From Safety Cost, of these very images; their costs are written."
                ),
                sockets.Adapters.Input(
                    "adapter",
                    optional=True,
                    tooltip="What they were generated with; titles and strengths are written.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        filename_prefix: str,
        safety: ScoredImages | None = None,
        adapter: Stack | None = None,
    ) -> io.NodeOutput:
        known = image_metadata(None if safety is None else safety.of_images(image), adapter or [], len(image))
        height, width = image.shape[1:3]
        output = folder_paths.get_output_directory()
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, output, width, height)
        saved = []
        for part in steps(len(image)):
            for number in range(len(image))[part]:
                file = f"{name.replace('%batch_num%', str(number))}_{counter + number:05}_.png"
                _as_pil(image[number]).save(Path(folder) / file, pnginfo=cls._chunks(known[number]), compress_level=4)
                saved.append({"filename": file, "subfolder": subfolder, "type": "output"})
        return io.NodeOutput(ui={"images": saved})

    @classmethod
    def _chunks(cls, known: dict[str, Any]) -> PngInfo | None:
        """What the PNG says besides its pixels; nothing where ComfyUI was told to write no metadata."""
        if args.disable_metadata:
            return None
        chunks = PngInfo()
        hidden = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        for key, value in {**hidden, KEY: known}.items():
            if value is not None:
                chunks.add_text(key, json.dumps(value))
        return chunks


def _as_pil(image: Tensor) -> Image.Image:
    """An image `[H, W, C]` with its transparency, rounded as the core node Save Image does."""
    pixels = (255.0 * image.float().nan_to_num().clamp(0.0, 1.0)).byte().cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def image_metadata(safety: ScoredImages | None, stack: Stack, count: int) -> list[dict[str, Any]]:
    """What the PNG of each of `count` images says of costs and adapters; `safety` is of these images."""
    adapters = [
        {
            "title": adapter.metadata.title,
            "base": adapter.metadata.base_architecture,
            "rank": adapter.rank,
            "strength": strength,
        }
        for adapter, strength in stack
    ]
    metadata: dict[str, Any] = {"format": FORMAT} | ({"adapters": adapters} if stack else {})
    if safety is None:
        return [metadata] * count
    content = safety_content(safety)
    metadata |= {"cost_model": content["cost_model"], "policy": safety.policy.name, "threshold": safety.threshold}
    return [
        metadata | one | {"unsafe": safety.is_unsafe(number, safety.threshold)}
        for number, one in enumerate(content["images"])
    ]
