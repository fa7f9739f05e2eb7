"""The guard as a block of a Modular Diffusers pipeline."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

from t2i_spo_plugin.errors import PipelineError
from t2i_spo_plugin.guards import Guard

from .domain import pipeline_domain
from .output import NOT_IMAGES


if _HAS_MODULAR := find_spec("diffusers.modular_pipelines") is not None:
    from diffusers.modular_pipelines import ModularPipelineBlocks
    from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
else:
    # An older diffusers: the name exists, and says so when it is used.
    ModularPipelineBlocks = object


class SPOGuardBlock(ModularPipelineBlocks):
    """Scores the images of a modular pipeline; comes after the block that decodes them.

    ```python
    blocks.sub_blocks.insert("guard", SPOGuardBlock(guard), len(blocks.sub_blocks))
    pipe = blocks.init_pipeline("...")
    ```

    Adds to the state `safety_costs`, `unsafe_content_detected`, `category_costs` and `safety_report`, as the output of
    an enabled pipeline has them; all are None for latents, which are not scored. `images` change only if the guard
    blocks. The guard is shared by copies of the block and is not saved with a pipeline.

    Args:
        guard: scores the images.

    Raises:
        PipelineError: the installed diffusers has no modular pipelines.
    """

    def __init__(self, guard: Guard) -> None:
        if not _HAS_MODULAR:
            raise PipelineError("this diffusers has no modular pipelines; install a newer one")
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
            DomainError: the guard's cost model was made for other images than this pipeline generates.
        """
        block_state = self.get_block_state(state)
        report = None
        if block_state.output_type == "latent":
            warnings.warn(NOT_IMAGES, stacklevel=2)
        else:
            report = self.guard(block_state.images, domain=pipeline_domain(components))
            block_state.images, report = self.guard.apply_block(block_state.images, report)
        block_state.safety_costs = None if report is None else report.costs
        block_state.unsafe_content_detected = None if report is None else report.flagged
        block_state.category_costs = None if report is None else report.category_costs
        block_state.safety_report = report
        self.set_block_state(state, block_state)
        return components, state

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible.

        Raises:
            PipelineError: a guard holds a cost model, which a block's configuration has no place for.
        """
        raise PipelineError("a guard block cannot be saved; save the pipeline without it and insert it after loading")
