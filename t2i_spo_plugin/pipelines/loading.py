"""Attach a safety adapter to a pipeline, set its strength, take it off again: plain functions over any pipeline.

Nothing is changed before the adapter has been checked against the pipeline; whatever goes wrong afterwards is undone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair, canonical, read_adapter, refuse_pickle
from t2i_spo_plugin.adapters.architecture import weight_shapes
from t2i_spo_plugin.adapters.compatibility import Target, match_modules
from t2i_spo_plugin.adapters.download import download_adapter, is_repo_id
from t2i_spo_plugin.adapters.strengths import Strength, check_blocks, check_strengths
from t2i_spo_plugin.errors import (
    AdapterError,
    ConfigError,
    IncompatibleAdapterError,
    UnreadableAdapterError,
)
from t2i_spo_plugin.files import quoted
from t2i_spo_plugin.gating import FULL_WINDOW, AdapterGate, Schedule, check_window

from .architecture import (
    architecture_of,
    base_fingerprint,
    base_model_of,
    lora_components,
    lora_converter,
    prediction_type_of,
)
from .loaded import AttachedAdapter, LoadedAdapter, attached_adapters, is_safety, strengths_of
from .lora_layers import bypassed_layers, pairs_of, tuner_layers
from .step_control import check_steering
from .storage import check_casting, check_name, check_numbers, check_on_disk


__all__ = [
    "adapter_metadata",
    "adapter_of",
    "load_spo_lora",
    "set_spo_strength",
    "spo_adapters",
    "unload_spo_lora",
]

logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "weight_name")


# Under `torch.inference_mode` the new weights would be tensors that can never again take part in ordinary calls.
@torch.inference_mode(False)
def load_spo_lora(
    pipe: Any,
    src: str | Path | Adapter,
    strength: Strength = 1.0,
    window: tuple[float, float] = FULL_WINDOW,
    adapter_name: str = "spo",
    strict: bool = True,
    steering: Schedule | AdapterGate | None = None,
    hotswap: bool = False,
    **hub_kwargs: Any,
) -> LoadedAdapter:
    """Attach the safety adapter `src` to `pipe`, beside whatever adapters are active there.

    Args:
        pipe: any diffusers pipeline that can load a LoRA.
        src: a safetensors file, a folder with one, a Hub id (`user/repo`), or an adapter in memory.
        strength: at least 0; 0 is the base model exactly, 1 is as trained. A mapping sets it by block, such as
            `{"unet.down_blocks": 0.5, "text_encoder": 0}`; what it does not name is applied with 1.
        window: denoising progress between which the adapter is on; anything but `(0, 1)` needs `enable_spo`.
        adapter_name: the name under which the pipeline knows it.
        strict: refuse an adapter of which only a part fits or is understood, or that changes no denoiser; False loads
            what fits with a warning.
        steering: how the strength changes over the denoising: a `Schedule`, which multiplies it step by step, or an
            `AdapterGate`, which decides for each image whether the adapter is on. Needs `enable_spo`.
        hotswap: put it in the place of the safety adapter that is loaded as `adapter_name`, in the same tensors. Its
            modules must be among those of the old one and its rank no larger than the room there: the old one's rank,
            or what `pipe.enable_lora_hotswap(target_rank=...)` made before the first adapter was loaded, with which
            nothing that is compiled is compiled anew. On failure the old one is as it was.
        hub_kwargs: `weight_name`, `subfolder`, `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`.

    Raises:
        AdapterError: the file cannot be found or read, or does not fit; the pipeline is left as it was.
        ConfigError: strength, window or an option is outside its range.
        PipelineError: the pipeline cannot load a LoRA, or cannot apply a window.
    """
    (overall, blocks), window = check_strengths(strength), check_window(window)
    unknown = sorted(set(hub_kwargs) - set(_HUB_OPTIONS))
    if unknown:
        raise ConfigError(f"load_spo_lora has no option {', '.join(unknown)}; it has {', '.join(_HUB_OPTIONS)}")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ConfigError(f"adapter_name must be a non-empty text without a dot, got {adapter_name!r}")
    check_name(adapter_name)
    components = lora_components(pipe)
    check_steering(pipe, window, steering)
    _check_ready(components, adapter_name, hotswap)
    adapter, source = _resolve(pipe, src, hub_kwargs, strict)
    matched, notes = _match(adapter, pipe, components, strict)
    check_numbers(components, matched)
    if isinstance(steering, AdapterGate):
        _check_gateable(matched)
    check_blocks(blocks, [f"{component}.{path}" for component, pairs in matched.items() for path in pairs])
    record = LoadedAdapter(
        name=adapter_name,
        strength=overall,
        window=window,
        steering=steering,
        source=source,
        metadata=adapter.metadata,
        components=tuple(matched),
        modules=sum(len(pairs) for pairs in matched.values()),
        notes=notes,
        blocks=blocks,
    )
    for note in notes:
        logger.info("%s: %s", source, note)
    try:
        adapter_here = AttachedAdapter(components, adapter_name)
        adapter_here.exchange(matched, record) if hotswap else adapter_here.attach(pipe, matched, record)
    except Exception as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{source} could not be attached, the pipeline is as it was: {error}") from error
    return record


def set_spo_strength(pipe: Any, strength: Strength, adapter_name: str | None = None) -> None:
    """Set the strength of one safety adapter, or of all when `adapter_name` is None.

    Args:
        pipe: the pipeline that carries it.
        strength: at least 0, as for `load_spo_lora`: a number, or numbers by block, with 1 for what is not named.
        adapter_name: the name it was loaded with.

    Raises:
        AdapterError: no such safety adapter is loaded, or the pipeline's LoRA layers are switched off or fused, or its
            q, k and v are.
        ConfigError: a strength is negative or not a number, or a block is none that the adapter changes.
    """
    overall, blocks = check_strengths(strength)
    components = lora_components(pipe)
    adapters = _chosen(components, adapter_name)
    if not adapters:
        raise AdapterError("no safety adapter is loaded; call load_spo_lora first")
    _check_effective(components)
    for name in adapters:
        check_blocks(blocks, strengths_of(components, name))
    for adapter in adapters.values():
        adapter.scale(overall, blocks)


def unload_spo_lora(pipe: Any, adapter_name: str | None = None) -> None:
    """Take one safety adapter off, or all when `adapter_name` is None; other adapters stay as they are.

    Raises:
        AdapterError: no safety adapter called `adapter_name` is loaded, or the weights have adapters fused into them
            or lie on the disk.
    """
    components = lora_components(pipe)
    chosen = _chosen(components, adapter_name)
    if chosen:
        check_on_disk(components, "nothing can be taken off it", "set_spo_strength(pipe, 0) switches it off exactly")
    for adapter in chosen.values():
        check_unfused(components)
        adapter.detach()


def spo_adapters(pipe: Any) -> dict[str, LoadedAdapter]:
    """The safety adapters that are attached, by name, with the strengths that are in force now.

    Strengths changed through the pipeline's own `set_adapters` are seen here; an adapter switched off reads 0, and so
    does one that is not fused while another is, and any in q, k and v that `fuse_qkv_projections` bypasses.
    """
    return {name: adapter.in_force for name, adapter in attached_adapters(lora_components(pipe)).items()}


def adapter_metadata(pipe: Any, title: str = "Safety adapter", **extra: str) -> AdapterMetadata:
    """The metadata of an adapter trained on `pipe`: architecture, prediction type, fingerprint, base model's name."""
    metadata = {"base_fingerprint": base_fingerprint(pipe)}
    if base_model_of(pipe):
        metadata["base_model"] = base_model_of(pipe)
    return AdapterMetadata(architecture_of(pipe), prediction_type_of(pipe), title, metadata | extra)


def adapter_of(pipe: Any, adapter_name: str, metadata: AdapterMetadata | None = None) -> Adapter:
    """The LoRA called `adapter_name` out of `pipe` (one just trained, say) as an adapter, copied to the CPU.

    Raises:
        AdapterError: no LoRA layer of that name, or its numbers are not valid.
    """
    modules = {
        canonical(f"{component}.{path}"): pair
        for component, model in lora_components(pipe).items()
        for path, pair in pairs_of(model, adapter_name).items()
    }
    if not modules:
        raise AdapterError(f"the pipeline has no LoRA layers called {adapter_name!r}")
    return Adapter(modules, metadata if metadata is not None else adapter_metadata(pipe)).validate()


def _check_gateable(matched: Mapping[str, Mapping[str, LoraPair]]) -> None:
    encoders = [component for component in matched if component.startswith("text_encoder")]
    if encoders:
        raise IncompatibleAdapterError(
            f"the adapter changes {', '.join(encoders)}, which runs before an adapter gate can decide; use a "
            "strength, a window or a schedule, or an adapter of the denoiser alone"
        )


def _check_ready(components: Mapping[str, Any], name: str, hotswap: bool) -> None:
    for component, model in components.items():
        if hasattr(model, "_orig_mod"):
            raise AdapterError(
                f"pipe.{component} is a wrapper made by torch.compile, which hides its layers; compile in place: "
                f"pipe.{component} = pipe.{component}._orig_mod, then pipe.{component}.compile()"
            )
        if name in getattr(model, "peft_config", {}) and not hotswap:
            raise AdapterError(
                f"an adapter called {name!r} is already loaded in {component}; unload it, pass another adapter_name, "
                "or hotswap=True to put the new one in its place"
            )
    if hotswap and not any(is_safety(model, name) for model in components.values()):
        raise AdapterError(
            f"there is no safety adapter called {name!r} to put another one in the place of; load it without hotswap"
        )
    if not hotswap:
        check_casting(components)
    check_on_disk(components, "nothing can be attached to it", "load the adapter first, then enable_group_offload()")
    _check_effective(components)


def _check_effective(components: Mapping[str, Any]) -> None:
    """Refuse models on which a strength has no effect.

    Raises:
        AdapterError: their LoRA layers are fused, switched off, or bypassed.
    """
    check_unfused(components)
    check_projections(components)
    for model in components.values():
        if any(layer.disable_adapters for _, layer in tuner_layers(model)):
            raise AdapterError("the pipeline's LoRA layers are switched off; call pipe.enable_lora() first")


def check_projections(components: Mapping[str, Any]) -> None:
    """Refuse models whose q, k and v are bypassed, and with them whatever an adapter changes there.

    Raises:
        AdapterError: with the cure.
    """
    for component, model in components.items():
        if bypassed_layers(model):
            raise AdapterError(
                f"one layer stands in the place of q, k and v in pipe.{component} (fuse_qkv_projections), and "
                f"adapters of these have no effect; call pipe.{component}.unfuse_qkv_projections() first"
            )


def check_unfused(components: Mapping[str, Any]) -> None:
    """Refuse models with LoRAs fused into their weights.

    Raises:
        AdapterError: with the cure.
    """
    for model in components.values():
        if any(layer.merged for _, layer in tuner_layers(model)):
            raise AdapterError("adapters are fused into the weights; call pipe.unfuse_lora() first")


def _resolve(pipe: Any, src: str | Path | Adapter, options: Mapping[str, Any], strict: bool) -> tuple[Adapter, str]:
    if isinstance(src, Adapter):
        # The pipeline takes the tensors over as its parameters; the caller keeps their own.
        copies = {
            name: LoraPair(pair.down.clone(), pair.up.clone(), pair.alpha)
            for name, pair in src.validate().modules.items()
        }
        return Adapter(copies, src.metadata, src.notes), src.metadata.title
    if not isinstance(src, (str, Path)):
        raise AdapterError(f"expected a file, a folder, a Hub id or an Adapter, got {type(src).__name__}")
    if not str(src):
        raise UnreadableAdapterError("the adapter's name is empty; pass a file, a folder or a Hub id (user/repo)")
    try:
        path = Path(src).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UnreadableAdapterError(f"{quoted(str(src))} is no path: {error}") from error
    if exists:
        for part in (options.get("subfolder"), options.get("weight_name") if path.is_dir() else None):
            path = path / part if part else path
        return _read(pipe, path, strict), path.name
    if isinstance(src, Path) or not is_repo_id(src):
        refuse_pickle(path.name if path.suffix else f"{path.name}.safetensors")
        raise UnreadableAdapterError(f"there is no file or folder {src}, and it is no Hub id (user/repo) either")
    return _read(pipe, download_adapter(src, **options), strict), src


def _read(pipe: Any, path: Path, strict: bool) -> Adapter:
    return read_adapter(path, strict, architecture_of(pipe), lora_converter(pipe))


def _match(
    adapter: Adapter, pipe: Any, components: Mapping[str, Any], strict: bool
) -> tuple[dict[str, dict[str, LoraPair]], tuple[str, ...]]:
    """The adapter's pairs by component and module path of `pipe`, and notes; raises when they do not belong there."""
    lacks = f"this {type(pipe).__name__} ({', '.join(components)}) lacks"
    target = Target(
        "pipeline", architecture_of(pipe), prediction_type_of(pipe), lambda name: lacks, base_fingerprint(pipe)
    )
    shapes = {name: weight_shapes(model) for name, model in components.items()}
    flat = {name: {path.replace(".", "_"): path for path in paths} for name, paths in shapes.items()}
    weights = {}
    for name in adapter.modules:
        component, _, spelled = name.partition(".")
        path = _find(spelled, flat.get(component, {}))
        if path is not None:
            weights[name] = (component, path), shapes[component][path]
    match = match_modules(adapter, target, weights, strict)
    if match.problems:
        warnings.warn(f"the adapter fits only in part: {'; '.join(match.problems)}", stacklevel=4)
    matched: dict[str, dict[str, LoraPair]] = {}
    for name, (component, path) in match.places.items():
        matched.setdefault(component, {})[path] = adapter.modules[name]
    notes = [*adapter.notes, *match.problems, *match.notes]
    trained_on, base = adapter.metadata.extra.get("base_model", ""), base_model_of(pipe)
    if trained_on and base and trained_on != base:
        notes.append(f"it was trained on {trained_on}, this is {base}: the same architecture, another checkpoint")
    return matched, tuple(notes)


def _find(path: str, flat: Mapping[str, str]) -> str | None:
    """The module that `path` means; dots and underscores may differ, and CLIP's `text_model.` may be absent here."""
    key = path.replace(".", "_")
    return flat.get(key) or flat.get(key.removeprefix("text_model_"))


def _chosen(components: Mapping[str, Any], adapter_name: str | None) -> dict[str, AttachedAdapter]:
    """The safety adapter called `adapter_name`, or all."""
    adapters = attached_adapters(components)
    if adapter_name is None:
        return adapters
    if adapter_name not in adapters:
        names = ", ".join(adapters) or "none"
        raise AdapterError(f"no safety adapter called {adapter_name!r} is loaded; loaded: {names}")
    return {adapter_name: adapters[adapter_name]}
