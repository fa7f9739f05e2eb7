"""`enable_spo`: safety adapters and a guard on any LoRA-capable pipeline; binds loading, step control and guard.

The instance is given a twin class that keeps the base's name and module, so that saving, hooks, offloading,
AutoPipeline and `isinstance` go on as before. The guard is a plain attribute: it is no component, is not saved, and
follows the images' device.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from t2i_spo_plugin.adapters import Adapter
from t2i_spo_plugin.adapters.strengths import Strength
from t2i_spo_plugin.errors import AdapterError, ConfigError, PipelineError
from t2i_spo_plugin.gating import FULL_WINDOW, AdapterGate, Schedule
from t2i_spo_plugin.guards import Guard, SafetyReport

from .architecture import lora_components
from .domain import pipeline_domain
from .loaded import LoadedAdapter, is_safety
from .loading import check_projections, check_unfused, load_spo_lora, set_spo_strength, spo_adapters, unload_spo_lora
from .output import NOT_IMAGES, SafetyOutput, base_of, with_report
from .step_control import StepControl, changes_between_steps
from .storage import check_fusable
from .upstream_calls import keep_active, keep_others, undo_fusing_scale, undo_scale, without_fusing_scale


P = TypeVar("P")


class SPOLoraLoaderMixin:
    """Safety adapters and an optional guard for a diffusers pipeline; comes before the pipeline class in the bases.

    Attributes:
        guard: scores every image the pipeline returns; None, the default, scores nothing.
        last_safety_report: the guard's report on the images of the last call; None where it has scored nothing.
    """

    guard: Guard | None = None
    last_safety_report: SafetyReport | None = None
    spo_applies_windows = True

    def load_spo_lora(
        self,
        src: str | Path | Adapter,
        strength: Strength = 1.0,
        window: tuple[float, float] = FULL_WINDOW,
        adapter_name: str = "spo",
        strict: bool = True,
        steering: Schedule | AdapterGate | None = None,
        hotswap: bool = False,
        **hub_kwargs: Any,
    ) -> LoadedAdapter:
        """See `t2i_spo_plugin.load_spo_lora`."""
        return load_spo_lora(self, src, strength, window, adapter_name, strict, steering, hotswap, **hub_kwargs)

    def set_spo_strength(self, strength: Strength, adapter_name: str | None = None) -> None:
        """See `t2i_spo_plugin.set_spo_strength`."""
        set_spo_strength(self, strength, adapter_name)

    def unload_spo_lora(self, adapter_name: str | None = None) -> None:
        """See `t2i_spo_plugin.unload_spo_lora`."""
        unload_spo_lora(self, adapter_name)

    def spo_adapters(self) -> dict[str, LoadedAdapter]:
        """See `t2i_spo_plugin.spo_adapters`."""
        return spo_adapters(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base's call, then the guard's scores.

        An output gets the fields `safety_costs`, `unsafe_content_detected` and `category_costs` and the method
        `overlays`; a tuple (`return_dict=False`) stays as it is. `last_safety_report` has the scores in either case.
        """
        self.last_safety_report = None
        call = super().__call__  # type: ignore[misc]
        bound = inspect.signature(call).bind(*args, **kwargs)
        arguments = _with_defaults(bound)
        latent = arguments.get("output_type") == "latent"
        if latent and self.guard is not None and self.guard.block != "none":
            raise ConfigError(
                "output_type='latent' gives no images that the guard could block; set its block to 'none'"
            )
        components = lora_components(self)
        adapters = spo_adapters(self)
        if adapters:
            check_projections(components)
        controlled = {name: adapter for name, adapter in adapters.items() if changes_between_steps(adapter)}
        if not controlled:
            with undo_scale(components, arguments):
                output = call(*args, **kwargs)
            return self._guarded(output, latent)
        check_unfused(components)
        with undo_scale(components, arguments), StepControl(self, controlled, arguments) as control:
            callback = arguments["callback_on_step_end"]
            bound.arguments["callback_on_step_end"] = control.callback(callback)
            if hasattr(callback, "tensor_inputs"):
                bound.arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
            output = call(*bound.args, **bound.kwargs)
        output = self._guarded(output, latent)
        if control.gated is not None and isinstance(output, SafetyOutput):
            output.gate_report = control.gated.report
        return output

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `load_lora_weights`, which switches every other adapter off; safety adapters stay on.

        Raises:
            AdapterError: it would exchange the weights of a safety adapter, which `load_spo_lora` checks.
        """
        load, safety = super().load_lora_weights, spo_adapters(self)  # type: ignore[misc]
        arguments = inspect.signature(load).bind(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        if arguments.get("hotswap") and arguments.get("adapter_name") in safety:
            raise AdapterError(
                f"{arguments['adapter_name']!r} is a safety adapter; put another one in its place with "
                "load_spo_lora(..., hotswap=True), or load this LoRA under a name of its own"
            )
        with keep_active(lora_components(self).values(), safety):
            return load(*args, **kwargs)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """The base's `delete_adapters`, which may switch another adapter on; all others stay as they are.

        Raises:
            AdapterError: adapters are fused into the weights, which would keep what is deleted.
        """
        components = lora_components(self)
        if spo_adapters(self):
            check_unfused(components)
        deleted = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        with keep_others(components.values(), deleted):
            super().delete_adapters(adapter_names)  # type: ignore[misc]

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        """The base's `set_adapters`.

        Raises:
            AdapterError: safety adapters are attached, and fused adapters would come out of the weights with other
                strengths than they went in with.
        """
        if spo_adapters(self):
            check_unfused(lora_components(self))
        super().set_adapters(*args, **kwargs)  # type: ignore[misc]

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """The base's `fuse_lora`; `lora_scale` counts for what is fused and until it is unfused.

        Raises:
            AdapterError: safety adapters are attached to weights that are quantised, or stored in 8 bits.
        """
        if spo_adapters(self):
            check_fusable(lora_components(self))
        with without_fusing_scale(lora_components(self).values()):
            super().fuse_lora(*args, **kwargs)  # type: ignore[misc]

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """The base's `unfuse_lora`; every adapter has the strength again that it had before `fuse_lora`."""
        super().unfuse_lora(*args, **kwargs)  # type: ignore[misc]
        undo_fusing_scale(lora_components(self).values())

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `save_pretrained`; where only foreign LoRAs are attached it does what it does without the mixin.

        Raises:
            AdapterError: a safety adapter is attached. Upstream would write its wrapped layers, and the folder would
                come back with weights missing.
        """
        attached = {
            name: [
                adapter for adapter in sorted(getattr(model, "peft_config", None) or {}) if is_safety(model, adapter)
            ]
            for name, model in lora_components(self).items()
        }
        if any(attached.values()):
            where = "; ".join(f"{', '.join(names)} in {component}" for component, names in attached.items() if names)
            raise AdapterError(
                f"safety adapters are attached ({where}) and a pipeline saved so cannot be loaded again; take them "
                "off first (unload_spo_lora, unload_lora_weights) and keep the adapter's own file beside the saved "
                "pipeline, or make them part of its weights: fuse_lora, then unload_lora_weights"
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if "_spo_base" not in vars(type(self)):
            return reduced
        return (_new_twin, (base_of(type(self)),), *reduced[2:])

    def _guarded(self, output: Any, latent: bool) -> Any:
        guard = self.guard
        is_tuple = isinstance(output, tuple)
        if guard is None:
            return output if is_tuple or not is_dataclass(output) else with_report(output, None, "there is no guard")
        if latent:
            warnings.warn(NOT_IMAGES, stacklevel=3)
            return output if is_tuple else with_report(output, None, NOT_IMAGES)
        images = output[0] if is_tuple else getattr(output, "images", None)
        if images is None or _is_video(images):
            reason = f"{type(self).__name__} returns no images, so the guard has scored nothing"
            warnings.warn(reason, stacklevel=3)
            return output if is_tuple else with_report(output, None, reason)
        report = guard(images, domain=pipeline_domain(self))
        images, report = guard.apply_block(images, report)
        self.last_safety_report = report
        if is_tuple:
            return (images, *output[1:])
        output.images = images
        return with_report(output, report, None)


def enable_spo(pipe: P, guard: Guard | None = None) -> P:
    """Give `pipe` safety adapters and, when `guard` is given, a guard; returns the same pipeline.

    A pipeline that is enabled already keeps its guard unless another one is given; `pipe.guard = None` takes it off.

    Raises:
        PipelineError: (a TypeError) the pipeline cannot load a LoRA, or is modular and cannot be guarded this way.
        DomainError: the guard's cost model was made for other images than this pipeline generates.
        ConfigError: `guard` is not a Guard.
    """
    lora_components(pipe)
    if guard is not None:
        if not isinstance(guard, Guard):
            raise ConfigError(f"guard must be a Guard, got {type(guard).__name__}")
        if _is_modular(type(pipe)):
            raise PipelineError(
                "a modular pipeline returns no images of its own accord; give its blocks a "
                "t2i_spo_plugin.SPOGuardBlock, or call the guard on its output"
            )
        guard.check_domain(pipeline_domain(pipe))
    pipe.__class__ = spo_pipeline_class(type(pipe))
    if guard is not None:
        pipe.guard = guard  # type: ignore[attr-defined]
    return pipe


def spo_pipeline_class(base: Any) -> type:
    """The twin of the pipeline class `base`: the same name and module, `SPOLoraLoaderMixin` before it; one per base.

    Raises:
        PipelineError: (a TypeError) `base` declares no component that can carry a LoRA.
    """
    if issubclass(base, SPOLoraLoaderMixin):
        return cast(type, base)
    if not getattr(base, "_lora_loadable_modules", None):
        raise PipelineError(f"{base.__name__} cannot load a LoRA: it declares no component that can carry one")
    return _twin(base)


@functools.cache
def _twin(base: Any) -> type:
    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SPOLoraLoaderMixin.__call__(self, *args, **kwargs)

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__call__": __call__,
        "_spo_base": base,
    }
    twin: type = type(base)(base.__name__, (SPOLoraLoaderMixin, base), namespace)
    return twin


def _new_twin(base: type) -> Any:
    twin: Any = spo_pipeline_class(base)
    return twin.__new__(twin)


def _with_defaults(bound: inspect.BoundArguments) -> dict[str, Any]:
    complete = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    complete.apply_defaults()
    return complete.arguments


def _is_video(images: Any) -> bool:
    """Whether they are frames by video, `[B, F, ...]`: a tuple does not say what it holds."""
    return isinstance(next(iter(images), None), list) if isinstance(images, list) else images.ndim == 5


def _is_modular(kind: type) -> bool:
    return any(parent.__name__ == "ModularPipeline" for parent in kind.__mro__)
