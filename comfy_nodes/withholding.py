"""Nodes that withhold what a threshold forbids: the switch hides it, the filter leaves it out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from t2i_spo_plugin.guards import Hiding, hide, message_image
from t2i_spo_plugin.images import channels_first, resize

from . import sockets
from .images import steps
from .safety import categories_input, category_input, check_category, own_threshold_input, threshold_input
from .scored import ALL, ANOTHER_IMAGE, ScoredImages, chosen_categories


ACTIONS = ("blur region", "pixelate region", "replace", "stop", "pass")
_CATEGORY = f"'{ALL}' withholds for every category. With one of them, only what is unsafe in that one is withheld."

_log = logging.getLogger(__name__)


class SafetySwitch(io.ComfyNode):
    """What is unsafe, hidden."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_SafetySwitch",
            display_name="Safety Switch",
            category="SPO/safety",
            description="Withholds images that reach the threshold, could not be scored, or are not those that were "
            "scored: they are blurred, pixelated, replaced or stopped. All others pass untouched.",
            search_aliases=[
                "safety gate",
                "safe",
                "censor",
                "nsfw",
                "hide",
                "blur",
                "pixelate",
                "block",
                "safety checker",
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The images that were scored; they may have been enlarged since. Any other image "
                    "counts as not scored.",
                ),
                sockets.Safety.Input("safety", tooltip="From Safety Cost."),
                threshold_input(),
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
                own_threshold_input(),
                category_input(_CATEGORY, optional=True),
                categories_input(),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The images, with the unsafe ones hidden as chosen."),
                io.Boolean.Output("withheld", tooltip="Whether anything was hidden, replaced or stopped."),
            ],
        )

    @classmethod
    def validate_inputs(cls, category: str | None = ALL) -> bool | str:
        return check_category(category)

    @classmethod
    def execute(
        cls,
        image: Tensor,
        safety: ScoredImages,
        threshold: float,
        action: str,
        message: str,
        replacement: Tensor | None = None,
        own_threshold: bool = False,
        category: str = ALL,
        categories: str = "",
    ) -> io.NodeOutput:
        threshold = threshold if own_threshold else safety.threshold
        safety, chosen, unsafe = _judged(image, safety, threshold, category, categories)
        if action == "pass" or not unsafe:
            said = f"passed as they are: {len(image)} of {len(image)}"
            return io.NodeOutput(image, False, ui={"text": [said]})
        said = _reasons(safety, unsafe, chosen)
        if action == "stop":
            strange = any(safety.reasons[number] == ANOTHER_IMAGE for number in unsafe)
            blocker = ExecutionBlocker(f"{message}: {ANOTHER_IMAGE}" if strange else message)
            return io.NodeOutput(blocker, True, ui={"text": [said]})
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
                    region = safety.region_of(number, threshold, chosen)
                    pixels[..., :3] = hide(colour, region, how).movedim(0, -1)
        return io.NodeOutput(output, True, ui={"text": [said]})


class SafetyFilter(io.ComfyNode):
    """What is safe, alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_SafetyFilter",
            display_name="Safety Filter",
            category="SPO/safety",
            description="Lets only the safe images of a batch through, and says which they are. What reaches the "
            "threshold, could not be scored, or is not what was scored, is left out.",
            search_aliases=[
                "filter",
                "nsfw",
                "censor",
                "safe",
                "remove unsafe",
                "select safe images",
                "safety checker",
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The images that were scored; they may have been enlarged since. Any other image "
                    "counts as not scored.",
                ),
                sockets.Safety.Input("safety", tooltip="From Safety Cost."),
                threshold_input(),
                own_threshold_input(),
                category_input(_CATEGORY.replace("withholds", "leaves out").replace("withheld", "left out"), True),
                categories_input(),
            ],
            outputs=[
                io.Image.Output(
                    "image", tooltip="The safe images, untouched; where there is none, nothing behind this runs."
                ),
                io.Int.Output(
                    "indices",
                    is_output_list=True,
                    tooltip="The places of the safe images in the batch, from 0, to pick their latents or masks by.",
                ),
                io.Int.Output("left_out", tooltip="How many images were left out."),
            ],
        )

    @classmethod
    def validate_inputs(cls, category: str | None = ALL) -> bool | str:
        return check_category(category)

    @classmethod
    def execute(
        cls,
        image: Tensor,
        safety: ScoredImages,
        threshold: float,
        own_threshold: bool = False,
        category: str = ALL,
        categories: str = "",
    ) -> io.NodeOutput:
        threshold = threshold if own_threshold else safety.threshold
        safety, chosen, unsafe = _judged(image, safety, threshold, category, categories)
        safe = [number for number in range(len(image)) if number not in unsafe]
        said = f"let through: {len(safe)} of {len(image)}"
        if unsafe:
            said += f"\n{_reasons(safety, unsafe, chosen)}"
        # A batch of no images, or an empty list, would make ComfyUI fail in whatever comes next.
        nothing = ExecutionBlocker(None)
        passed = (image if not unsafe else image[safe]) if safe else nothing
        return io.NodeOutput(passed, safe or nothing, len(unsafe), ui={"text": [said]})


def _judged(
    image: Tensor, safety: ScoredImages, threshold: float, category: str, categories: str
) -> tuple[ScoredImages, tuple[str, ...], list[int]]:
    """The report of just these images, the categories that count, and the numbers of the unsafe images."""
    chosen = chosen_categories(category, categories, [one.name for one in safety.policy.enabled])
    safety = safety.of_images(image)
    return safety, chosen, [number for number in range(len(image)) if safety.is_unsafe(number, threshold, chosen)]


def _reasons(safety: ScoredImages, numbers: Sequence[int], chosen: Sequence[str]) -> str:
    """Why images are withheld, one line; of those that are another's, in the log too, for that is a wrong wire."""
    found = []
    for number in numbers:
        deciding = safety.deciding_of(number, chosen)
        why = safety.reasons[number] if deciding is None else f"{deciding} {safety.cost_of(number, deciding):.2f}"
        found.append(f"{number}: {why}")
    if any(safety.reasons[number] == ANOTHER_IMAGE for number in numbers):
        _log.warning("an image was withheld: %s", ANOTHER_IMAGE)
    return f"withheld: {len(numbers)} of {len(safety.images)} ({'; '.join(found)})"


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
