"""The guard as a block of a Modular Diffusers pipeline; needs a diffusers that has them."""

from __future__ import annotations

import warnings
from typing import Any

from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from t2i_spo_plugin.errors import PipelineError
from t2i_spo_plugin.guards import Guard

from .domain import pipeline_domain
from .mixin import NOT_IMAGES


class SPOGuardBlock(ModularPipelineBlocks):
    """Scores the images of a modular pipeline; comes after the block that decodes them::

        blocks.sub_blocks.insert("guard", SPOGuardBlock(guard), len(blocks.sub_blocks))
        pipe = blocks.init_pipeline("...")

    Adds to the state `safety_costs`, `unsafe_content_detected`, `category_costs` and `safety_report`, as the output of
    an enabled pipeline has them; all are None for latents, which are not scored. `images` change only if the guard
    blocks. The guard is shared by copies of the block and is not saved with a pipeline.

    Args:
        guard: scores the images.
    """

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard

    def __deepcopy__(self, memo: dict[int, Any]) -> SPOGuardBlock:
        return type(self)(self.guard)

    @property
    def description(self) -> str:
        return "Says how unsafe each image is, overall and by category"

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("images", required=True, description="The decoded images"),
            InputParam("output_type", default="pil"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("safety_costs", description="[B] in [0, 1], 0.5 is the boundary; NaN where not scored"),
            OutputParam("unsafe_content_detected", description="whether each cost reaches 0.5; None where not scored"),
            OutputParam("category_costs", description="the cost by category of each image"),
            OutputParam("safety_report", description="the guard's full report, with overlays"),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Score `images`.

        Raises:
            DomainError: the guard's cost model was made for other images than this pipeline draws.
        """
        found = self.get_block_state(state)
        found.safety_costs = found.unsafe_content_detected = found.category_costs = found.safety_report = None
        if found.output_type == "latent":
            warnings.warn(NOT_IMAGES, stacklevel=2)
        else:
            report = self.guard(found.images, domain=pipeline_domain(components))
            found.images, report = self.guard.apply_block(found.images, report)
            found.safety_costs, found.unsafe_content_detected = report.costs, report.flagged
            found.category_costs, found.safety_report = report.category_costs, report
        self.set_block_state(state, found)
        return components, state

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible.

        Raises:
            PipelineError: a guard holds a cost model, which a block's configuration has no place for.
        """
        raise PipelineError("a guard block cannot be saved; save the pipeline without it and insert it after loading")
