"""Latents and text of a run, cached once, and the batches that are drawn from the caches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.pipelines import pipeline_domain
from t2i_spo_plugin.registry import load_guard

from ..families import Family
from ..placement import placed
from .batches import Batches, Sampling
from .caches import ShardStore, SourceImage, build_latents, build_text
from .dataset import Examples
from .regions import RegionOptions, Regions, build_maps


def cached_batches(
    folder: Path,
    sampling: Sampling,
    examples: Examples,
    images: Iterable[SourceImage],
    pipe: Any,
    family: Family,
    resolution: int,
    accelerator: Accelerator,
    batch_size: int = 16,
    progress: bool = True,
) -> Batches:
    """Cache what is missing, each process its share, and return the batches.

    Args:
        folder: of the caches; within it they are told apart by the models and the resolution that made them.
        sampling: how examples are drawn.
        examples: what is trained on.
        images: all images, each with its key and name.
        pipe: with autoencoder and text encoders, which are on the accelerator for as long as they are needed.
        family: of the pipeline.
        resolution: edge in pixels.
        accelerator: of the run.
        batch_size: images that are encoded at once.
        progress: show bars.
    """
    device = accelerator.device
    shard = (accelerator.process_index, accelerator.num_processes)
    bar = progress and accelerator.is_local_main_process
    latents = ShardStore(folder / f"latents-{content_hash(pipe.vae)}-{resolution}")
    with placed(device, pipe.vae):
        build_latents(latents, images, pipe.vae, resolution, batch_size, sampling.pixel_flip, shard, bar)
    encoders = family.text_encoders(pipe)
    tokenizers = [part for name, part in sorted(pipe.components.items()) if name.startswith("tokenizer") and part]
    text = ShardStore(folder / f"text-{content_hash(*encoders, *tokenizers)}")

    def encode(prompts: list[str]) -> dict[str, torch.Tensor]:
        return family.encode_prompts(pipe, prompts, device)

    with placed(device, *encoders):
        build_text(text, ["", *examples.captions], encode, shard=shard, progress=bar)
    accelerator.wait_for_everyone()
    for store in (latents, text):
        store.refresh()
    return Batches(sampling, examples, latents, text, family, device)


def cached_regions(
    folder: Path,
    options: RegionOptions,
    images: Iterable[SourceImage],
    pipe: Any,
    resolution: int,
    accelerator: Accelerator,
    batch_size: int = 16,
    progress: bool = True,
) -> Regions | None:
    """The cost maps that errors are weighed by, made by the main process where they are missing; None if they are off.

    Arguments as in `cached_batches`.
    """
    if not options.active:
        return None
    guard = load_guard(options.cost_model, options.policy, options.override_domain)
    store = ShardStore(folder / f"maps-{content_hash(*map(repr, sorted(guard.identity.items())))}-{resolution}")
    if accelerator.is_main_process:
        build_maps(store, images, guard, resolution, pipeline_domain(pipe), batch_size, progress)
    accelerator.wait_for_everyone()
    store.refresh()
    return Regions(store, options.inside, options.outside)
