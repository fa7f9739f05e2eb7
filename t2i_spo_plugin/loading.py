"""Attach a safety adapter to a pipeline, set its strength, take it off again: plain functions over any pipeline.

Nothing is changed before the adapter has been checked against the pipeline; whatever goes wrong afterwards is undone.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .adapter import Adapter, AdapterFacts, LoraPair, find_adapter_file, read_adapter, refuse_pickle
from .architecture import (
    architecture_of,
    base_fingerprint,
    base_model_of,
    lora_components,
    prediction_type_of,
    weight_shapes,
)
from .attachment import RECORD, Snapshot, attach, detach, strength_in_force, switch, tuner_layers
from .errors import (
    AdapterError,
    ConfigError,
    IncompatibleAdapterError,
    InvalidAdapterError,
    PipelineError,
    UnreadableAdapterError,
)
from .header import shown
from .layouts import canonical
from .trajectory import FULL_WINDOW, ClosedLoop, Schedule, check_window


__all__ = [
    "LoadedAdapter",
    "adapter_facts",
    "adapter_of",
    "architecture_of",
    "load_spo_lora",
    "set_spo_strength",
    "spo_adapters",
    "unload_spo_lora",
]

logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "weight_name")
_REPO_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")


@dataclass(frozen=True)
class LoadedAdapter:
    """A safety adapter as it is attached to a pipeline.

    Attributes:
        name: the adapter's name in the pipeline.
        strength: the multiplier it is applied with.
        window: the part of the denoising in which it is on, 0 is pure noise and 1 the finished image.
        source: where it came from.
        facts: what its header says.
        components: the pipeline components that carry it.
        modules: how many modules it changes.
        notes: what a user should know, such as another checkpoint than the one it was trained on.
        steering: a schedule or closed loop that changes the strength while a picture is drawn.
    """

    name: str
    strength: float
    window: tuple[float, float]
    source: str
    facts: AdapterFacts
    components: tuple[str, ...]
    modules: int
    notes: tuple[str, ...] = field(default=())
    steering: Schedule | ClosedLoop | None = None


def load_spo_lora(
    pipe: Any,
    src: str | Path | Adapter,
    strength: float = 1.0,
    window: tuple[float, float] = FULL_WINDOW,
    adapter_name: str = "spo",
    strict: bool = True,
    steering: Schedule | ClosedLoop | None = None,
    **hub_kwargs: Any,
) -> LoadedAdapter:
    """Attach the safety adapter `src` to `pipe`, beside whatever adapters are active there.

    Args:
        pipe: any diffusers pipeline that can load a LoRA.
        src: a safetensors file, a folder with one, a Hub id (`user/repo`), or an adapter in memory.
        strength: at least 0; 0 is the base model exactly, 1 is as trained.
        window: denoising progress between which the adapter is on; anything but `(0, 1)` needs `enable_spo`.
        adapter_name: the name under which the pipeline knows it.
        strict: refuse an adapter of which only a part fits or is understood, or that changes no denoiser; False loads
            what fits with a warning.
        steering: how the strength changes over the denoising: a `Schedule`, which multiplies it step by step, or a
            `ClosedLoop`, which gives it to those pictures alone that turn out to need it. Needs `enable_spo`.
        hub_kwargs: `weight_name`, `subfolder`, `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`.

    Raises:
        AdapterError: the file cannot be found or read, or does not fit; the pipeline is left as it was.
        ConfigError: strength, window or an option is outside its range.
        PipelineError: the pipeline cannot load a LoRA, or cannot apply a window.
    """
    strength, window = check_strength(strength), check_window(window)
    unknown = sorted(set(hub_kwargs) - set(_HUB_OPTIONS))
    if unknown:
        raise ConfigError(f"load_spo_lora has no option {', '.join(unknown)}; it has {', '.join(_HUB_OPTIONS)}")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ConfigError(f"adapter_name must be a non-empty text without a dot, got {adapter_name!r}")
    components = lora_components(pipe)
    _check_steering(pipe, window, steering)
    _check_ready(components, adapter_name)
    adapter, source = _resolve(src, hub_kwargs, strict)
    matched, notes = _match(adapter, pipe, components, strict)
    if isinstance(steering, ClosedLoop):
        _check_loop(matched)
    record = LoadedAdapter(
        name=adapter_name,
        strength=strength,
        window=window,
        steering=steering,
        source=source,
        facts=adapter.facts,
        components=tuple(matched),
        modules=sum(len(pairs) for pairs in matched.values()),
        notes=notes,
    )
    for note in notes:
        logger.info("%s: %s", source, note)
    snapshots = {name: Snapshot(components[name]) for name in matched}
    try:
        for name, pairs in matched.items():
            attach(pipe, name, adapter_name, pairs, strength, snapshots[name])
            setattr(components[name].peft_config[adapter_name], RECORD, record)
    except BaseException as error:
        for name, snapshot in snapshots.items():
            snapshot.restore(components[name], adapter_name)
        if isinstance(error, Exception) and not isinstance(error, AdapterError):
            raise AdapterError(f"{source} could not be attached, the pipeline is as it was: {error}") from error
        raise
    return record


def set_spo_strength(pipe: Any, strength: float, adapter_name: str | None = None) -> None:
    """Set the strength of one safety adapter, or of all when `adapter_name` is None.

    Raises:
        AdapterError: no such safety adapter is loaded, or the pipeline's LoRA layers are switched off or fused.
        ConfigError: `strength` is negative or not a number.
    """
    strength = check_strength(strength)
    names = _names(pipe, adapter_name)
    if not names:
        raise AdapterError("no safety adapter is loaded; call load_spo_lora first")
    components = lora_components(pipe)
    for name in names:
        _check_effective(components)
        switch(components.values(), name, strength)
        for config in _configs(components, name):
            setattr(config, RECORD, replace(getattr(config, RECORD), strength=strength))


def unload_spo_lora(pipe: Any, adapter_name: str | None = None) -> None:
    """Take one safety adapter off, or all when `adapter_name` is None; other adapters stay as they are.

    Raises:
        AdapterError: no safety adapter called `adapter_name` is loaded, or adapters are fused into the weights.
    """
    names = _names(pipe, adapter_name)
    components = lora_components(pipe)
    for name in names:
        _check_unfused(components)
        for model in components.values():
            if name in getattr(model, "peft_config", {}):
                detach(model, name)


def spo_adapters(pipe: Any) -> dict[str, LoadedAdapter]:
    """The safety adapters that are attached, by name, with the strengths that are in force now.

    A strength changed through the pipeline's own `set_adapters` is seen here; an adapter switched off reads 0.
    """
    found: dict[str, LoadedAdapter] = {}
    for model in lora_components(pipe).values():
        for name, config in getattr(model, "peft_config", {}).items():
            record = getattr(config, RECORD, None)
            if record is not None and name not in found:
                strength = strength_in_force(model, name)
                same = math.isclose(strength, record.strength, rel_tol=1e-6, abs_tol=1e-9)
                found[name] = record if same else replace(record, strength=strength)
    return found


def adapter_facts(pipe: Any, title: str = "Safety adapter", **extra: str) -> AdapterFacts:
    """The facts of an adapter trained on `pipe`: architecture, prediction type, fingerprint, base model's name."""
    facts = {"base_fingerprint": base_fingerprint(pipe)}
    if base_model_of(pipe):
        facts["base_model"] = base_model_of(pipe)
    return AdapterFacts(architecture_of(pipe), prediction_type_of(pipe), title, facts | extra)


def adapter_of(pipe: Any, adapter_name: str, facts: AdapterFacts | None = None) -> Adapter:
    """The LoRA called `adapter_name` out of `pipe` (one just trained, say) as an adapter, copied to the CPU.

    Raises:
        AdapterError: no LoRA layer of that name, or its numbers are not valid.
    """
    modules: dict[str, LoraPair] = {}
    for component, model in lora_components(pipe).items():
        for path, layer in tuner_layers(model):
            if adapter_name in getattr(layer, "lora_A", {}):
                down = layer.lora_A[adapter_name].weight.detach().cpu().clone()
                up = layer.lora_B[adapter_name].weight.detach().cpu().clone()
                rank, alpha = down.shape[0], layer.lora_alpha[adapter_name]
                if layer.use_rslora.get(adapter_name, False):
                    alpha = alpha * math.sqrt(rank)
                modules[canonical(f"{component}.{path}")] = LoraPair(down, up, float(alpha))
    if not modules:
        raise AdapterError(f"the pipeline has no LoRA layers called {adapter_name!r}")
    return Adapter(modules, facts if facts is not None else adapter_facts(pipe)).validate()


def check_strength(strength: float) -> float:
    """`strength` as a float.

    Raises:
        ConfigError: not a finite number, or negative (which would turn a safety adapter into its opposite).
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise ConfigError(f"strength must be a finite number, got {strength!r}")
    if strength < 0:
        raise ConfigError(f"strength must be at least 0, got {strength}: a negative one would make a harm adapter")
    return float(strength)


def can_steer(pipe: Any) -> bool:
    """Whether `pipe` was given to `enable_spo` and calls `callback_on_step_end`."""
    enabled = getattr(type(pipe), "spo_applies_windows", False)
    return bool(enabled) and "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


def _check_steering(pipe: Any, window: tuple[float, float], steering: Schedule | ClosedLoop | None) -> None:
    if steering is not None and not isinstance(steering, (Schedule, ClosedLoop)):
        raise ConfigError(f"steering must be a Schedule or a ClosedLoop, got {type(steering).__name__}")
    if isinstance(steering, ClosedLoop) and window != FULL_WINDOW:
        raise ConfigError("a closed loop decides for itself when the adapter is on; it takes no window")
    if (window != FULL_WINDOW or steering is not None) and not can_steer(pipe):
        what = "a window" if steering is None else "a schedule" if isinstance(steering, Schedule) else "a closed loop"
        raise PipelineError(
            f"{what} needs a pipeline that was given to enable_spo and calls callback_on_step_end; this "
            f"{type(pipe).__name__} is not one"
        )


def _check_loop(matched: Mapping[str, Mapping[str, LoraPair]]) -> None:
    encoders = [component for component in matched if component.startswith("text_encoder")]
    if encoders:
        raise IncompatibleAdapterError(
            f"the adapter changes {', '.join(encoders)}, which has spoken before a closed loop can decide; use a "
            "strength, a window or a schedule, or an adapter of the denoiser alone"
        )


def _check_ready(components: Mapping[str, Any], name: str) -> None:
    for component, model in components.items():
        if hasattr(model, "_orig_mod"):
            raise AdapterError(
                f"pipe.{component} is a wrapper made by torch.compile, which hides its layers; compile in place: "
                f"pipe.{component} = pipe.{component}._orig_mod, then pipe.{component}.compile()"
            )
        if name in getattr(model, "peft_config", {}):
            raise AdapterError(
                f"an adapter called {name!r} is already loaded in {component}; unload it, or pass another adapter_name"
            )
    _check_effective(components)


def _check_effective(components: Mapping[str, Any]) -> None:
    _check_unfused(components)
    for model in components.values():
        if any(layer.disable_adapters for _, layer in tuner_layers(model)):
            raise AdapterError("the pipeline's LoRA layers are switched off; call pipe.enable_lora() first")


def _check_unfused(components: Mapping[str, Any]) -> None:
    for model in components.values():
        if any(layer.merged for _, layer in tuner_layers(model)):
            raise AdapterError("adapters are fused into the weights; call pipe.unfuse_lora() first")


def _resolve(src: str | Path | Adapter, options: Mapping[str, Any], strict: bool) -> tuple[Adapter, str]:
    if isinstance(src, Adapter):
        # The pipeline takes the tensors over as its parameters; the caller keeps their own.
        copies = {
            name: LoraPair(pair.down.clone(), pair.up.clone(), pair.alpha)
            for name, pair in src.validate().modules.items()
        }
        return Adapter(copies, src.facts, src.notes), src.facts.title
    if not isinstance(src, (str, Path)):
        raise AdapterError(f"expected a file, a folder, a Hub id or an Adapter, got {type(src).__name__}")
    try:
        path = Path(src).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UnreadableAdapterError(f"{shown(str(src))} is no path: {error}") from error
    if exists:
        for part in (options.get("subfolder"), options.get("weight_name") if path.is_dir() else None):
            path = path / part if part else path
        return read_adapter(path, strict), path.name
    if isinstance(src, Path) or not _REPO_ID.match(src) or path.suffix == ".safetensors":
        refuse_pickle(path.name if path.suffix else f"{path.name}.safetensors")
        raise UnreadableAdapterError(f"there is no file or folder {src}, and it is no Hub id (user/repo) either")
    return read_adapter(_download(src, dict(options)), strict), src


def _download(repo: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name = options.pop("weight_name", None)
    subfolder = options.pop("subfolder", None)
    try:
        if name is not None:
            refuse_pickle(name)
            return Path(hf_hub_download(repo, name, subfolder=subfolder, **options))
        pattern = f"{subfolder}/*.safetensors" if subfolder else "*.safetensors"
        folder = Path(snapshot_download(repo, allow_patterns=[pattern, "adapter_config.json"], **options))
        return find_adapter_file(folder / subfolder if subfolder else folder)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UnreadableAdapterError(
            f"{repo} is not in the local cache and the Hub cannot be reached (no network, or offline mode); "
            "download it once while online, or pass a file"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnreadableAdapterError(f"there is no file or folder {repo}, and the Hub answers: {reason}") from error


def _match(
    adapter: Adapter, pipe: Any, components: Mapping[str, Any], strict: bool
) -> tuple[dict[str, dict[str, LoraPair]], tuple[str, ...]]:
    """The adapter's pairs by component and module path of `pipe`, and notes; raises when they do not belong there."""
    facts, here = adapter.facts, architecture_of(pipe)
    if facts.base_architecture and facts.base_architecture != here:
        raise IncompatibleAdapterError(f"the adapter was made for {facts.base_architecture}, this pipeline is {here}")
    prediction = prediction_type_of(pipe)
    if facts.prediction_type and prediction and facts.prediction_type != prediction:
        raise IncompatibleAdapterError(
            f"the adapter was made for a model that predicts {facts.prediction_type}, this one predicts {prediction}"
        )
    shapes = {name: weight_shapes(model) for name, model in components.items()}
    flat = {name: {path.replace(".", "_"): path for path in paths} for name, paths in shapes.items()}
    matched: dict[str, dict[str, LoraPair]] = {}
    missing: list[str] = []
    for name, pair in adapter.modules.items():
        component, _, path = name.partition(".")
        found = _find(path, flat.get(component, {}))
        if found is None:
            missing.append(name)
            continue
        expected, shape = shapes[component][found], pair.shape
        if shape != expected:
            raise IncompatibleAdapterError(
                f"the adapter was made for another base of the architecture {here}: it changes {name} as a weight of "
                f"{list(shape)}, in this pipeline it has {list(expected)}"
            )
        if found in matched.setdefault(component, {}):
            raise InvalidAdapterError(f"the adapter changes {component}.{found} twice, under two spellings")
        matched[component][found] = pair
    if not matched:
        raise IncompatibleAdapterError(
            f"none of the adapter's {len(adapter.modules)} modules exists in this {type(pipe).__name__} "
            f"({', '.join(components)}); the first is {missing[0]}"
        )
    fingerprint = facts.extra.get("base_fingerprint")
    problems = []
    if fingerprint and fingerprint != base_fingerprint(pipe):
        problems.append("it was trained on a model of another width or depth")
    if missing:
        problems.append(f"only {len(adapter.modules) - len(missing)} of its {len(adapter.modules)} modules exist here")
    if all(component.startswith("text_encoder") for component in matched):
        problems.append("it changes a text encoder only, and nothing that draws")
    if problems and strict:
        first = f"; the first missing is {missing[0]}" if missing else ""
        raise IncompatibleAdapterError(
            f"the adapter does not fit: {', and '.join(problems)}{first}; strict=False loads what fits"
        )
    if problems:
        warnings.warn(f"the adapter fits only in part: {', and '.join(problems)}", stacklevel=4)
    trained_on, base = facts.extra.get("base_model", ""), base_model_of(pipe)
    if trained_on and base and trained_on != base:
        problems.append(f"it was trained on {trained_on}, this is {base}: the same architecture, another checkpoint")
    return matched, (*adapter.notes, *problems)


def _find(path: str, flat: Mapping[str, str]) -> str | None:
    """The module that `path` means; dots and underscores may differ, and CLIP's `text_model.` may be absent here."""
    key = path.replace(".", "_")
    return flat.get(key) or flat.get(key.removeprefix("text_model_"))


def _names(pipe: Any, adapter_name: str | None) -> list[str]:
    loaded = list(spo_adapters(pipe))
    if adapter_name is None:
        return loaded
    if adapter_name not in loaded:
        have = ", ".join(loaded) or "none"
        raise AdapterError(f"no safety adapter called {adapter_name!r} is loaded; loaded: {have}")
    return [adapter_name]


def _configs(components: Mapping[str, Any], name: str) -> list[Any]:
    configs = [getattr(model, "peft_config", {}).get(name) for model in components.values()]
    return [config for config in configs if getattr(config, RECORD, None) is not None]
