"""The output of an enabled pipeline: the base's fields, the guard's scores, and what an adapter gate decided."""

from __future__ import annotations

import functools
from dataclasses import fields, make_dataclass
from typing import Any

from t2i_spo_plugin.errors import NotScoredError
from t2i_spo_plugin.gating import GateReport
from t2i_spo_plugin.guards import OverlayKind, SafetyReport


NOT_IMAGES = "output_type='latent' gives no images, so the guard has scored nothing"


class SafetyOutput:
    """What the output of an enabled pipeline has besides the base's fields.

    Attributes:
        safety_costs: `[B]` in [0, 1], NaN where an image is not scored; None without a guard and for latents.
        unsafe_content_detected: whether each cost reaches 0.5; None where an image is not scored.
        category_costs: cost by category for each image.
        safety_report: the guard's full report, with the reasons of what is not scored.
        gate_report: which images an adapter gate gave its adapter, and the gate scores; None without an adapter gate.
    """

    safety_report: SafetyReport | None = None
    gate_report: GateReport | None = None
    _not_scored: str | None = None

    def overlays(self, kind: OverlayKind = "overlay", category: str | None = None) -> list[Any]:
        """The cost of each image as `overlay` (PIL), `mask` (bool `[H, W]`) or `boxes` (x0, y0, x1, y1).

        Raises:
            NotScoredError: nothing was scored, and why.
        """
        if self.safety_report is None:
            raise NotScoredError(f"there are no overlays: {self._not_scored}")
        return self.safety_report.overlays(kind, category)

    def __reduce__(self) -> Any:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return _new_output, (base_of(type(self)), values, self.safety_report, self._not_scored, self.gate_report)


def with_report(output: Any, report: SafetyReport | None, reason: str | None) -> Any:
    """A pipeline's `output` with the guard's `report`, or with the `reason` why nothing was scored."""
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    if report is not None:
        values |= {
            "safety_costs": report.costs,
            "unsafe_content_detected": report.flagged,
            "category_costs": report.category_costs,
        }
    return _new_output(type(output), values, report, reason)


def base_of(twin: Any) -> type:
    """The class of diffusers' that `twin`, of a pipeline or an output, was made from."""
    base: type = twin._spo_base
    return base


@functools.cache
def _output_class(base: Any) -> type:
    added = [(name, Any, None) for name in ("safety_costs", "unsafe_content_detected", "category_costs")]
    return make_dataclass(
        f"SPO{base.__name__}",
        added,
        bases=(SafetyOutput, base),
        namespace={"__module__": __name__, "_spo_base": base},
        repr=False,
    )


def _new_output(
    base: type,
    values: dict[str, Any],
    report: SafetyReport | None,
    reason: str | None,
    gate_report: GateReport | None = None,
) -> Any:
    output = _output_class(base)(**values)
    output.safety_report = report
    output._not_scored = reason
    output.gate_report = gate_report
    return output
