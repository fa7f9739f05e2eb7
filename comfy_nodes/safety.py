"""Nodes that say how unsafe images are, and show where."""

from __future__ import annotations

from typing import Any

import torch
from comfy.utils import ProgressBar
from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from t2i_spo_plugin.guards import COLOUR_MAPS, NO_MAP, Box, Guard, annotate, boxes, marks, tint
from t2i_spo_plugin.metrics import UNSAFE_COST

from . import sockets
from .cost_models import categories as known_categories
from .images import NOT_SCORED, category_of, grey, ground_of, heat_map, payload, previews, score, stacked, steps
from .scored import ALL, SHOWS, ScoredImages, Show, chosen_categories, stricter


class SafetyCost(io.ComfyNode):
    """What images cost, and where."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_SafetyCost",
            display_name="Safety Cost",
            category="SPO/safety",
            description="Says how unsafe each image is, from 0 to 1, in which category, and where. The images "
            "pass through untouched. An image that cannot be scored counts as unsafe.",
            search_aliases=[
                "nsfw detector",
                "nsfw",
                "safe",
                "safety checker",
                "unsafe score",
                "heat map",
                "content mask",
            ],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The images to score; a whole batch at once."),
                sockets.CostModel.Input("cost_model", tooltip="From Load Safety Cost Model."),
                io.Float.Input(
                    "threshold",
                    default=UNSAFE_COST,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The cost from which an image counts as unsafe, here and in every node behind; 0.5 is the "
                    "policy's own boundary.",
                ),
                category_input(
                    f"'{ALL}' looks at all categories. With one of them, cost, unsafe, mask and cost map speak of "
                    "that category alone; the safety output always holds all."
                ),
                categories_input(),
                io.Combo.Input(
                    "show",
                    options=list(SHOWS),
                    default=SHOWS[0],
                    optional=True,
                    tooltip="What of the images this node and those behind it write, for the browser or a report. "
                    "What is not shown is not written: with 'nothing' there are numbers alone, for whoever hosts "
                    "ComfyUI for others.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The same images, unchanged."),
                io.Float.Output(
                    "cost", is_output_list=True, tooltip="The cost of each image; 1 for one that was not scored."
                ),
                io.String.Output(
                    "category", is_output_list=True, tooltip="The category of each cost; 'not scored' where unknown."
                ),
                io.Boolean.Output(
                    "unsafe", tooltip="True when any image reaches the threshold or could not be scored."
                ),
                io.Mask.Output(
                    "mask",
                    tooltip="Where each image's cost reaches the threshold, to inpaint or blur; all of an image "
                    "that was not scored.",
                ),
                io.Image.Output("cost_map", tooltip="The cost at every place as a grey image, white for 1."),
                sockets.Safety.Output(
                    "safety", tooltip="All results, for the overlay, the switch, the filter and the report."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, category: str | None = ALL) -> bool | str:
        return check_category(category)

    @classmethod
    def execute(
        cls,
        image: Tensor,
        cost_model: Guard,
        threshold: float,
        category: str,
        categories: str = "",
        show: Show = SHOWS[0],
    ) -> io.NodeOutput:
        chosen = chosen_categories(category, categories, [one.name for one in cost_model.policy.enabled])
        progress = ProgressBar(2 * len(image))
        safety = ScoredImages.of(score(cost_model, image, progress), image, threshold, show)
        numbers = range(len(image))
        maps = stacked([heat_map(safety, number, chosen) for number in numbers], image)
        mask = stacked([safety.region_of(number, threshold, chosen).float() for number in numbers], image)
        costs = [safety.cost_of(number, safety.deciding_of(number, chosen)) for number in numbers]
        # An empty list would make ComfyUI fail in whatever comes next: without images there is nothing to hand on.
        nothing = ExecutionBlocker(None)
        return io.NodeOutput(
            image,
            [1.0 if cost is None else cost for cost in costs] or nothing,
            [category_of(safety, number, chosen) for number in numbers] or nothing,
            any(safety.is_unsafe(number, threshold, chosen) for number in numbers),
            mask,
            grey(maps),
            safety,
            ui={"spo_safety": payload(safety, image, threshold, progress, chosen)},
        )


class SafetyOverlay(io.ComfyNode):
    """The cost drawn over the images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_SafetyOverlay",
            display_name="Safety Overlay",
            category="SPO/safety",
            description="Draws the cost over the images: clear where it is 0, with boxes around what reaches the "
            "threshold and a label with category and cost.",
            search_aliases=["heat map", "saliency", "attribution", "bounding boxes", "explain", "cost map"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The images that were scored; they may have been enlarged since."),
                sockets.Safety.Input("safety", tooltip="From Safety Cost."),
                io.Combo.Input(
                    "colour_map",
                    options=list(COLOUR_MAPS),
                    default="heat",
                    tooltip="Colours from low to high cost; a low cost is clear in all of them.",
                ),
                io.Float.Input(
                    "opacity", default=0.6, min=0.0, max=1.0, step=0.05, tooltip="How strong the colour is at cost 1."
                ),
                io.Boolean.Input(
                    "boxes", default=True, tooltip="Draw a box around each part that reaches the threshold."
                ),
                io.Boolean.Input(
                    "labels", default=True, tooltip="Write the cost, and on an unsafe image the deciding category."
                ),
                threshold_input(),
                own_threshold_input(),
                io.Combo.Input(
                    "show",
                    options=list(SHOWS),
                    default=SHOWS[0],
                    optional=True,
                    tooltip="What this node writes for the browser, at most what Safety Cost lets show. The image "
                    "output is not changed by it.",
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The images with their cost drawn over them.")],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        safety: ScoredImages,
        colour_map: str,
        opacity: float,
        boxes: bool,
        labels: bool,
        threshold: float,
        own_threshold: bool = False,
        show: Show = SHOWS[0],
    ) -> io.NodeOutput:
        safety = safety.of_images(image).showing(stricter(safety.show, show))
        threshold = threshold if own_threshold else safety.threshold
        maps = stacked([heat_map(safety, number) for number in range(len(image))], image)
        progress = ProgressBar(2 * len(image))
        overlaid, plain = torch.zeros(*image.shape[:3], 3), torch.zeros(*image.shape[:3], 3)
        words: list[Any] = []
        for part in steps(len(image), progress=progress):
            for number in range(len(image))[part]:
                pixels, cost = safety.images[number].float().nan_to_num(), safety.cost_of(number)
                regions = _boxes(safety, number, maps[number], threshold) if boxes else []
                label = _label(safety, number, threshold) if labels else ""
                tinted = pixels if cost is None else tint(pixels, maps[number], colour_map, opacity)
                overlaid[number] = annotate(tinted, regions, label).movedim(0, -1)
                under = pixels if safety.show == SHOWS[0] else ground_of(image[number]).movedim(-1, 0)
                plain[number] = under.movedim(0, -1)
                is_marked = (regions or label) and safety.show != "nothing"
                drawn = marks((image.shape[1], image.shape[2]), regions, label).movedim(0, -1)[None]
                words.append(previews(drawn)[0] if is_marked else None)
        # The browser lays the colours over the image itself, as strongly as its slider says, and the words over both.
        entries = payload(safety.showing(_MARKED[safety.show]), plain, threshold, progress, colour_map=colour_map)
        drawn_with = {"opacity": opacity, "show": safety.show}
        shown = [entry | drawn_with | {"marks": mark} for entry, mark in zip(entries, words, strict=True)]
        return io.NodeOutput(overlaid, ui={"spo_safety": shown})


_MARKED: dict[Show, Show] = {"image and map": "image and map", "map only": "image and map", "nothing": "nothing"}
"""What to show of what the overlay has marked: there the image has gone already where it is not to be seen."""


def threshold_input() -> io.Float.Input:
    """The threshold of a node behind Safety Cost."""
    return io.Float.Input(
        "threshold",
        default=UNSAFE_COST,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="With own_threshold: the cost from which an image counts as unsafe in this node.",
    )


def own_threshold_input() -> io.Boolean.Input:
    """Whether that one counts."""
    return io.Boolean.Input(
        "own_threshold",
        default=False,
        optional=True,
        advanced=True,
        tooltip="Off: the threshold of Safety Cost counts here too. On: that of this node.",
    )


def category_input(tooltip: str, optional: bool = False) -> io.Combo.Input:
    """A drop-down of the categories of every policy there is."""
    options = [ALL, *known_categories()]
    return io.Combo.Input("category", options=options, default=ALL, optional=optional, tooltip=tooltip)


def categories_input() -> io.String.Input:
    """More categories than one."""
    return io.String.Input(
        "categories",
        default="",
        optional=True,
        advanced=True,
        tooltip="More categories that count, with commas between; the highest cost of them is taken.",
    )


def check_category(category: str | None) -> bool | str:
    """What ComfyUI asks of a drop-down, whatever the case; None is one that is linked."""
    known = [ALL, *known_categories()]
    if category is None or category.strip().casefold() in ("", *(name.casefold() for name in known)):
        return True
    return f"there is no category {category!r}; choose one of {', '.join(known)}"


def _boxes(safety: ScoredImages, number: int, cost_map: Tensor, threshold: float) -> list[Box]:
    """Where the cost of an image reaches the threshold; none of one that was not scored."""
    return [] if safety.cost_of(number) is None else boxes((cost_map >= threshold).cpu().numpy())


def _label(safety: ScoredImages, number: int, threshold: float) -> str:
    """What is written on an image: a safe one has a highest category too, and naming it would accuse the image."""
    cost = safety.cost_of(number)
    if cost is None:
        return NOT_SCORED
    label = f"{safety.deciding(number) if cost >= threshold else 'safe'} {cost:.2f}"
    without = "" if safety.has_map(number) else NO_MAP
    return ", ".join(part for part in (label, without, safety.note(number)) if part)
