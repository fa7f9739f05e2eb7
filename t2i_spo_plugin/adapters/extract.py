"""A LoRA out of a model that was tuned as a whole, or into which one was merged: the weights' difference, by SVD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from t2i_spo_plugin.errors import AdapterError, ConfigError, InvalidAdapterError

from .adapter import Adapter
from .architecture import fingerprint_of_shapes
from .architecture_names import normalise_architecture
from .checkpoints import ModelFiles, Weights, find_model, layer_names
from .dtypes import check_dtype, rounded
from .lora import LoraPair, block_of, canonical
from .low_rank import decompose, relative_error
from .metadata import AdapterMetadata


DEFAULT_ENERGY = 0.99

_EMBEDDINGS = (
    "token_embedding",
    "position_embedding",
    "embed_tokens",
    "shared",
    "relative_attention_bias",
    "class_embedding",
    "embedding_table",
)
_DENOISERS = ("unet", "transformer", "prior")


@dataclass(frozen=True)
class ExtractionResult:
    """What a tuned model changes, as an adapter, and what got lost on the way.

    Attributes:
        adapter: alpha equal to the rank, with the modules that changed.
        module_errors: `||extracted - change|| / ||change||` in the Frobenius norm, by module, rounding to 16 bits
            included.
        block_errors: the same over the modules of a block, see `layouts.block_of`.
        error: the same over all modules of the adapter.
        unexpressed: weights that changed and that no LoRA can change (norms, biases, embeddings), each with
            `||change|| / ||weight||`; they are not counted in the errors.
    """

    adapter: Adapter
    module_errors: dict[str, float]
    block_errors: dict[str, float]
    error: float
    unexpressed: dict[str, float]


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    component: str = "",
    architecture: str = "",
    prediction_type: str = "",
    device: str = "cpu",
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ExtractionResult:
    """The adapter that turns `base` into `tuned`, as nearly as its rank allows; float32 arithmetic.

    The weights are read tensor by tensor: memory is bounded by the largest layer and the adapter itself. A change of
    low rank, such as a merged LoRA, is computed without decomposing the whole weight. Of pipelines, the components are
    compared that can carry a LoRA.

    Args:
        base: a local diffusers folder of a pipeline or of a component, or a safetensors file with diffusers' names.
        tuned: the same.
        rank: of every module at most.
        energy: keep so many singular values that their squares sum up to this share, in (0, 1], module by module;
            0.99 when neither is given; with both the smaller rank is taken.
        component: what a file or folder is, such as `unet`; of a pipeline, the only component to compare.
        architecture: such as `stable-diffusion-v1`; needed where the files do not say.
        prediction_type: the same.
        device: where the decomposition runs; `cuda` is much faster for large models.
        progress: show a bar.
        dtype: of the result: float32, float16 or bfloat16.

    Raises:
        AdapterError: the models are of different make, do not differ, or differ only in what a LoRA cannot change; or
            `dtype` cannot hold a weight of the result.
        UnreadableAdapterError: a file is missing or not readable.
        UnsupportedAdapterError: what lies there is not understood as a model.
        InvalidAdapterError: a weight holds NaN or Inf.
        ConfigError: rank or energy is outside its range.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ConfigError(f"energy must be above 0 and at most 1, got {energy}")
    check_dtype(dtype)
    if rank is None and energy is None:
        energy = DEFAULT_ENERGY
    sources = find_model(base, component), find_model(tuned, component)
    pairs = _common(*sources)
    claims = _claims(*sources, architecture, prediction_type)
    modules: dict[str, LoraPair] = {}
    squares: dict[str, tuple[float, float]] = {}
    unexpressed: dict[str, float] = {}
    fingerprint = ""
    opened = {name: (Weights(ours), Weights(theirs)) for name, (ours, theirs) in pairs.items()}
    shapes = {name: _agreed_shapes(name, *both) for name, both in opened.items()}
    layers = {
        name: _layers(shapes[name], layer_names(pairs[name][0]) if name in _DENOISERS else None) for name in shapes
    }
    for name in _DENOISERS:
        if name in layers and not fingerprint:
            fingerprint = fingerprint_of_shapes(layers[name])
    work = [(name, key) for name in shapes for key in shapes[name]]
    for name, key in tqdm(work, desc="comparing", unit="tensor", disable=not progress):
        before, after = (weights.read(key).to(device, torch.float32) for weights in opened[name])
        change = after - before
        size = float(change.norm())
        if not math.isfinite(size):
            raise InvalidAdapterError(f"{name}.{key} holds NaN or Inf")
        if size == 0.0:
            continue
        # A LoRA changes linear layers and convolutions over images.
        if len(layers[name].get(key.removesuffix(".weight"), ())) not in (2, 4):
            whole = float(before.norm())
            unexpressed[f"{name}.{key}"] = size / whole if whole else 1.0
            continue
        module = canonical(f"{name}.{key.removesuffix('.weight')}")
        pair, (lost, total) = decompose(change, rank, energy)
        modules[module], off = rounded(pair, dtype, module)
        squares[module] = lost + off, total
    if not modules:
        also = f"; changed are only {', '.join(sorted(unexpressed)[:3])}" if unexpressed else ""
        raise AdapterError(f"{sources[1].name} changes nothing of {sources[0].name} that a LoRA can change{also}")
    errors = _errors(squares)
    extra = {
        "base_model": sources[0].name,
        "base_fingerprint": fingerprint,
        "extracted_from": sources[1].name,
        "extract_rank": str(rank or ""),
        "extract_energy": str(energy or ""),
        "extract_error": f"{errors[2]:.6f}",
    }
    metadata = AdapterMetadata(*claims, "Extracted adapter", {key: value for key, value in extra.items() if value})
    return ExtractionResult(Adapter(dict(sorted(modules.items())), metadata).validate(), *errors, unexpressed)


def _errors(squares: Mapping[str, tuple[float, float]]) -> tuple[dict[str, float], dict[str, float], float]:
    """Relative errors by module, by block and in all."""
    blocks: dict[str, list[tuple[float, float]]] = {}
    for name, both in squares.items():
        blocks.setdefault(block_of(name), []).append(both)
    return (
        {name: relative_error(*both) for name, both in sorted(squares.items())},
        {block: relative_error(*map(sum, zip(*both, strict=True))) for block, both in sorted(blocks.items())},
        relative_error(*map(sum, zip(*squares.values(), strict=True))),
    )


def _common(base: ModelFiles, tuned: ModelFiles) -> dict[str, tuple[Path, Path]]:
    """The components to compare, each with its place in both models."""
    ours, theirs = set(base.components), set(tuned.components)
    shared = [name for name in base.components if name in theirs]
    complete = ours == theirs or (shared and not (base.is_pipeline and tuned.is_pipeline))
    if not complete:
        raise AdapterError(
            f"{base.name} has {', '.join(sorted(ours))}, {tuned.name} has {', '.join(sorted(theirs))}; "
            "name the component to compare"
        )
    return {name: (base.components[name], tuned.components[name]) for name in shared}


def _claims(base: ModelFiles, tuned: ModelFiles, architecture: str, prediction_type: str) -> tuple[str, str]:
    """Architecture and prediction type; the arguments fill in what the files do not say."""
    claims = []
    for what, values in (
        ("architecture", (base.architecture, tuned.architecture, normalise_architecture(architecture))),
        ("prediction type", (base.prediction_type, tuned.prediction_type, prediction_type)),
    ):
        names = sorted({value for value in values if value})
        if len(names) > 1:
            raise AdapterError(f"{base.name} and {tuned.name} must share the {what}, got {' and '.join(names)}")
        claims.append(names[0] if names else "")
    if not claims[0]:
        raise AdapterError(f"{base.name} and {tuned.name} do not say which architecture they are of; name it")
    return claims[0], claims[1]


def _agreed_shapes(component: str, base: Weights, tuned: Weights) -> dict[str, tuple[int, ...]]:
    ours, theirs = base.shapes(), tuned.shapes()
    for what, only in (("base", ours.keys() - theirs.keys()), ("tuned model", theirs.keys() - ours.keys())):
        if only:
            raise AdapterError(f"{component}: {len(only)} weights are in the {what} only, such as {min(only)}")
    for key, shape in ours.items():
        if theirs[key] != shape:
            raise AdapterError(
                f"{component}.{key} is {list(shape)} in the base, {list(theirs[key])} in the tuned model"
            )
    return ours


def _layers(shapes: Mapping[str, tuple[int, ...]], names: frozenset[str] | None) -> dict[str, tuple[int, ...]]:
    """The weight shapes of linear layers and convolutions by module name: `names`, or guessed where it is None."""
    weights = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(".weight")}
    return {
        name: shape for name, shape in weights.items() if (_is_layer(name, shape) if names is None else name in names)
    }


def _is_layer(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and name.rpartition(".")[2] not in _EMBEDDINGS
