"""Nodes that say how unsafe images are, show where, and withhold what a threshold forbids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.utils import ProgressBar
from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import (
    COLOUR_MAPS,
    NO_MAP,
    Box,
    Guard,
    Hiding,
    Policy,
    SafetyReport,
    annotate,
    boxes,
    hide,
    message_image,
    tint,
)
from t2i_spo_plugin.images import channels_first, resize
from t2i_spo_plugin.metrics import UNSAFE_COST
from t2i_spo_plugin.registry import COST_MODELS as MODELS
from t2i_spo_plugin.registry import POLICIES, load_cost_model, load_policy, matching_policy, revision

from . import COST_MODELS, sockets
from .files import files_below, fingerprint
from .images import NOT_SCORED, category_of, grey, heat_map, payload, report_of, score, stacked, steps


CHOOSE = "choose one"
BUNDLED = {f"{name} (bundled)": name for name in MODELS.bundled()}
AS_THE_MODEL = "as the model"
DECIDING = "the deciding one"
ACTIONS = ("blur region", "pixelate region", "replace", "stop", "pass")
_THRESHOLD = "The cost from which an image counts as unsafe; 0.5 is the policy's own boundary."


class LoadCostModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_LoadCostModel",
            display_name="Load Safety Cost Model",
            category="SPO/safety",
            description="Loads what says how unsafe an image is, and the policy that decides what counts. Nothing is "
            "downloaded. ComfyUI cannot know what kind of images you will score: choose a model made for that kind.",
            search_aliases=["safety checker", "nsfw", "cost model", "content filter", "guard", "moderation"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=cost_models(),
                    tooltip="The cost model: one for photographs whose package is installed, a folder in "
                    "models/safety_cost, or the bundled one, which knows the stickers of the demo and nothing else.",
                ),
                io.Combo.Input(
                    "policy",
                    options=[AS_THE_MODEL, *POLICIES.names(), *_files(".yaml")],
                    default=AS_THE_MODEL,
                    tooltip="What counts as unsafe, and from which probability on: the bundled policy that has the "
                    "model's categories, another one, or a YAML file of yours in models/safety_cost.",
                ),
                io.Boolean.Input(
                    "override_domain",
                    default=False,
                    advanced=True,
                    tooltip="Use a model with a policy that was made for another kind of image, where its costs may "
                    "mean little.",
                ),
            ],
            outputs=[
                sockets.CostModel.Output("cost_model", tooltip="For Safety Cost and UAScore."),
                io.String.Output("info", tooltip="What the model was made for, its categories and their thresholds."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str) -> bool | str:
        known = cost_models()[1:]
        if model in known:
            return True
        there_are = f"choose one of: {', '.join(known)}. {', '.join(BUNDLED)} is for the sticker demo only."
        return there_are if model == CHOOSE else f"there is no cost model {model!r}; {there_are}"

    @classmethod
    def fingerprint_inputs(cls, model: str, policy: str, override_domain: bool) -> str:
        files = [] if model in _BUILT_IN else files_below(_model_folder(model))
        if policy.endswith(".yaml"):
            files.append(Path(folder_paths.get_full_path_or_raise(COST_MODELS, policy)))
        return fingerprint(files)

    @classmethod
    def execute(cls, model: str, policy: str, override_domain: bool) -> io.NodeOutput:
        cost_model, revision = _load(model)
        chosen = _policy(policy, cost_model.categories, cost_model.domain)
        guard = Guard(cost_model, chosen, override_domain, name=f"{model} {revision}")
        return io.NodeOutput(guard, _describe(guard))


class SafetyCost(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_SafetyCost",
            display_name="Safety Cost",
            category="SPO/safety",
            description="Says how unsafe each image is, from 0 to 1, in which category, and where. The images "
            "pass through untouched. An image that cannot be scored counts as unsafe.",
            search_aliases=["nsfw detector", "safety checker", "unsafe score", "heat map", "content mask"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The images to score; a whole batch at once."),
                sockets.CostModel.Input("cost_model", tooltip="From Load Safety Cost Model."),
                _threshold(),
                io.String.Input(
                    "category",
                    default=DECIDING,
                    tooltip=f"'{DECIDING}' looks at all categories. With the name of one, cost, unsafe, mask and cost "
                    "map speak of that category alone; the safety output always holds all.",
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
                sockets.Safety.Output("safety", tooltip="All results, for the overlay, the switch and the report."),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, cost_model: Guard, threshold: float, category: str) -> io.NodeOutput:
        named = category.strip()
        chosen = None if named in ("", DECIDING) else named
        if chosen is not None and chosen not in [enabled.name for enabled in cost_model.policy.enabled]:
            known = ", ".join(enabled.name for enabled in cost_model.policy.enabled)
            raise ConfigError(f"there is no category {chosen!r}; write {DECIDING!r} or one of {known}")
        progress = ProgressBar(2 * len(image))
        safety = score(cost_model, image, progress)
        numbers = range(len(image))
        unsafe = safety.unsafe(threshold, chosen)
        maps = stacked([heat_map(safety, number, chosen) for number in numbers], image)
        mask = stacked([safety.region(number, threshold, chosen).float() for number in numbers], image)
        costs = [safety.cost_of(number, chosen) for number in numbers]
        # An empty list would make ComfyUI fail in whatever comes next: without images there is nothing to hand on.
        nothing = ExecutionBlocker(None)
        return io.NodeOutput(
            image,
            [1.0 if cost is None else cost for cost in costs] or nothing,
            [category_of(safety, number, chosen) for number in numbers] or nothing,
            any(unsafe),
            mask,
            grey(maps),
            safety,
            ui={"spo_safety": payload(safety, image, threshold, progress, chosen)},
        )


class SafetyOverlay(io.ComfyNode):
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
                _threshold(),
            ],
            outputs=[io.Image.Output("image", tooltip="The images with their cost drawn over them.")],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        safety: SafetyReport,
        colour_map: str,
        opacity: float,
        boxes: bool,
        labels: bool,
        threshold: float,
    ) -> io.NodeOutput:
        safety = report_of(safety, image)
        maps = stacked([heat_map(safety, number) for number in range(len(image))], image)
        progress = ProgressBar(2 * len(image))
        overlaid, marked = torch.zeros(*image.shape[:3], 3), torch.zeros(*image.shape[:3], 3)
        for part in steps(len(image), progress=progress):
            for number in range(len(image))[part]:
                pixels, cost = safety.images[number].float().nan_to_num(), safety.cost_of(number)
                regions = _boxes(safety, number, maps[number], threshold) if boxes else []
                label = _label(safety, number, threshold) if labels else ""
                tinted = pixels if cost is None else tint(pixels, maps[number], colour_map, opacity)
                overlaid[number] = annotate(tinted, regions, label).movedim(0, -1)
                marked[number] = annotate(pixels, regions, label).movedim(0, -1)
        # The browser lays the colours over the rest itself, as strongly as its slider says.
        entries = payload(safety, marked, threshold, progress, colour_map=colour_map)
        return io.NodeOutput(overlaid, ui={"spo_safety": [entry | {"opacity": opacity} for entry in entries]})


class SafetySwitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_SafetySwitch",
            display_name="Safety Switch",
            category="SPO/safety",
            description="The only node of this pack that withholds anything: images that reach the threshold, or "
            "could not be scored, are blurred, pixelated, replaced or stopped. All others pass untouched.",
            search_aliases=["safety gate", "censor", "block nsfw", "blur", "pixelate", "filter", "safety checker"],
            inputs=[
                io.Image.Input("image", tooltip="The images that were scored; they may have been enlarged since."),
                sockets.Safety.Input("safety", tooltip="From Safety Cost."),
                _threshold(),
                io.Combo.Input(
                    "action",
                    options=list(ACTIONS),
                    default=ACTIONS[0],
                    tooltip="What happens to an unsafe image. Blur and pixelate hide where its cost comes from; "
                    "stop hands on no image of the batch; pass changes nothing and only sets 'withheld' to false.",
                ),
                io.Image.Input(
                    "replacement",
                    optional=True,
                    tooltip="For 'replace': what is shown instead, resized; without it, the message on a dark ground.",
                ),
                io.String.Input(
                    "message",
                    default="withheld by the safety switch",
                    tooltip="Written on the replacement image, and shown when the run stops.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The images, with the unsafe ones hidden as chosen."),
                io.Boolean.Output("withheld", tooltip="Whether anything was hidden, replaced or stopped."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        safety: SafetyReport,
        threshold: float,
        action: str,
        message: str,
        replacement: Tensor | None = None,
    ) -> io.NodeOutput:
        safety = report_of(safety, image)
        unsafe = [number for number, flag in enumerate(safety.unsafe(threshold)) if flag]
        if action == "pass" or not unsafe:
            return io.NodeOutput(image, False)
        if action == "stop":
            return io.NodeOutput(ExecutionBlocker(message), True)
        output = image.clone()
        for part in steps(len(unsafe)):
            for number in unsafe[part]:
                pixels = output[number]
                if action == "replace":
                    pixels[..., :3] = _instead(pixels, number, replacement, message)
                    pixels[..., 3:] = 1.0
                else:
                    how: Hiding = "blur" if action == "blur region" else "pixelate"
                    colour = pixels[..., :3].movedim(-1, 0).nan_to_num()
                    pixels[..., :3] = hide(colour, safety.region(number, threshold), how).movedim(0, -1)
        return io.NodeOutput(output, True)


def cost_models() -> list[str]:
    """What Load Safety Cost Model offers. Nothing is chosen by default: a model says nothing about other images."""
    return [CHOOSE, *MODELS.installed(), *_folders(), *BUNDLED]


def _folders() -> list[str]:
    files = _files(".json")
    quality = {os.path.dirname(name) for name in files if os.path.basename(name) == "reference.json"}
    folders = {os.path.dirname(name) for name in files if os.path.basename(name) == "metadata.json"}
    return sorted(folder for folder in folders if folder and os.path.dirname(folder) not in quality - {""})


def _model_folder(model: str) -> Path:
    """The folder of one of `_folders`."""
    return Path(folder_paths.get_full_path_or_raise(COST_MODELS, os.path.join(model, "metadata.json"))).parent


def _files(ending: str) -> list[str]:
    return [name for name in folder_paths.get_filename_list(COST_MODELS) if name.endswith(ending)]


_BUILT_IN = (CHOOSE, *BUNDLED, *MODELS.installed())


def _load(model: str) -> tuple[Any, str]:
    """The cost model, and what tells its revision."""
    source = BUNDLED.get(model) or (model if model in MODELS.installed() else _model_folder(model))
    cost_model = load_cost_model(source, local_files_only=True)
    return cost_model, revision(MODELS, source, cost_model)


def _policy(name: str, categories: tuple[str, ...], domain: str) -> Policy:
    if name == AS_THE_MODEL:
        return matching_policy(categories, domain)
    return load_policy(name if name in POLICIES.names() else folder_paths.get_full_path_or_raise(COST_MODELS, name))


def _describe(guard: Guard) -> str:
    thresholds = ", ".join(f"{category.name} ({category.threshold:g})" for category in guard.policy.enabled)
    lines = [
        f"Cost model: {guard.name}",
        f"Made for: {guard.cost_model.domain} images. Its costs say nothing about images of another kind.",
        f"Policy: {guard.policy.name}; categories and thresholds: {thresholds}",
    ]
    if guard.policy.domain != guard.cost_model.domain:
        lines.append(f"The policy was made for {guard.policy.domain} images: used because override_domain is on.")
    return "\n".join(lines)


def _threshold() -> io.Float.Input:
    return io.Float.Input("threshold", default=UNSAFE_COST, min=0.0, max=1.0, step=0.01, tooltip=_THRESHOLD)


def _boxes(safety: SafetyReport, number: int, cost_map: Tensor, threshold: float) -> list[Box]:
    """Where the cost of an image reaches the threshold; none of one that was not scored."""
    return [] if safety.cost_of(number) is None else boxes((cost_map >= threshold).cpu().numpy())


def _label(safety: SafetyReport, number: int, threshold: float) -> str:
    """What is written on an image: a safe one has a highest category too, and naming it would accuse the image."""
    cost = safety.cost_of(number)
    if cost is None:
        return NOT_SCORED
    label = f"{safety.deciding(number) if cost >= threshold else 'safe'} {cost:.2f}"
    without = "" if safety.has_map(number) else NO_MAP
    return ", ".join(part for part in (label, without, safety.note(number)) if part)


def _instead(image: Tensor, number: int, replacement: Tensor | None, message: str) -> Tensor:
    """Colours `[H, W, C]` that stand for an image `[H, W, C]` of at most three."""
    height, width, channels = image.shape
    if replacement is None or not len(replacement):
        pixels = message_image(message, (height, width))
    else:
        chosen = channels_first(replacement[number % len(replacement)][None]).float()
        pixels = resize(chosen, (height, width))[0]
    colours = pixels.movedim(0, -1)
    return colours if channels >= 3 else colours.mean(-1, keepdim=True)
