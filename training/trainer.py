"""One trainer: a pair table (or captioned images) and a pipeline in, a LoRA adapter out.

Latents and text are cached, the images of an example go through the denoiser together, the reference is the same
denoiser with its adapter switched off. Every random number is a function of seed, step and position (`sampling.py`),
so a run that is killed and resumed gives bit for bit the adapter of a run that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from t2i_spo_plugin.adapters import Adapter, read_adapter
from t2i_spo_plugin.errors import ConfigError, PipelineError, TableError, require_extra
from t2i_spo_plugin.identity import content_hash, pipeline_identity
from t2i_spo_plugin.registry import load_pipeline

from .best import BestByValidation, Validate
from .checkpoints import Checkpoints
from .config import TrainConfig
from .curve import Curve
from .data.batches import Sampling
from .data.captions import captioned_images
from .data.dataset import Examples, images, of_categories
from .data.prepare import cached_batches, cached_regions
from .families import Family, family_of
from .finite import FiniteCheck
from .lora import continued_adapter, fresh_adapter, frozen
from .objectives import Objective, make_objective
from .objectives.base import Term
from .objectives.terms import active_terms
from .predictor import Predictor, StoredErrors
from .result import ADAPTER_FILE, REPORT_FILE, write_result
from .run import ADAPTER_NAME, REFERENCE_NAME, Callback, Run
from .step import TrainingStep


__all__ = ["ADAPTER_FILE", "REPORT_FILE", "TrainConfig", "train"]


def train(
    config: TrainConfig, pipe: Any = None, validate: Validate | None = None, callbacks: Sequence[Callback] = ()
) -> Path:
    """Train an adapter and return the path of its file; `report.json` lies beside it.

    Args:
        config: everything the result depends on.
        pipe: a loaded pipeline; None loads `config.pipeline`. It is left without adapter, as it came.
        validate: called every `config.validate_every` steps on the main process. The adapter that scores best is the
            one that is written; without validation it is the last. None makes one from `config.validation_prompts`.
        callbacks: called after the trainer's own at the beginning, after each step and at the end.

    Raises:
        ConfigError: options that do not fit the pipeline or the checkpoint to resume from.
        PipelineError: a pipeline that cannot be trained here, or that already has an adapter.
        TableError: the pair table is not usable.
        SPOError: the loss is not finite.
    """
    if config.tensorboard:
        require_extra("tensorboard", "train")
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=config.precision,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=str(Path(config.output_dir) / "logs"),
    )
    if config.draws_per_pair and accelerator.num_processes > 1:
        raise ConfigError("draws_per_pair stores errors in one process; set it to 0 to train on several")
    pipe = load_pipeline(config.pipeline) if pipe is None else pipe
    family = family_of(pipe)
    if getattr(family.module, "peft_config", None):
        raise PipelineError("the pipeline already has an adapter; unload it before training another")
    validate = validate or _validation(config)
    # Before the adapter is there; the schedule is all that training takes from the scheduler.
    models = pipeline_identity(pipe, (family.component, "vae", "text_encoder", "tokenizer"))
    schedule = family.schedule
    models["schedule"] = content_hash(schedule.prediction, schedule.signal, schedule.sigma, schedule.timesteps)
    begun = read_adapter(config.adapter) if config.adapter else None
    if begun is not None:
        pairs = sorted(begun.modules.items())
        models["adapter"] = content_hash(*(part for name, pair in pairs for part in (name, *vars(pair).values())))
    with frozen(family.module), _adapter(config, family, begun):
        step = _training_step(config, accelerator, pipe, family)
        models |= step.objective.identity()
        if step.batches.regions is not None:
            models["regions"] = step.batches.regions.store.folder.name
        checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints")
        best = [BestByValidation(validate)] if validate and config.validate_every else []
        every = [FiniteCheck(), Curve(), *best, checkpoints, *callbacks]
        judges = getattr(validate, "identity", {}) if best else {}
        run = Run(config, accelerator, pipe, family, step, every, models, judges)
        checkpoints.resume(run)
        run.train()
        if accelerator.is_main_process:
            write_result(run, Path(config.output_dir))
        accelerator.wait_for_everyone()
    return Path(config.output_dir) / ADAPTER_FILE


def _training_step(config: TrainConfig, accelerator: Accelerator, pipe: Any, family: Family) -> TrainingStep:
    """The objective over cached examples, with the denoiser on the accelerator."""
    objective = make_objective(config.objective)
    terms = {**objective.terms(), **active_terms(config.terms)}
    resolution = config.resolution or native_resolution(pipe, family)
    cell = pipe.vae_scale_factor * family.patch
    if resolution % cell:
        raise ConfigError(f"resolution {resolution} is not divisible by {cell}, the edge of a token of this model")
    t_max = min(config.t_max or len(family.schedule), len(family.schedule))
    sampling = Sampling(
        config.seed,
        (config.t_min, t_max),
        config.benign_share,
        config.caption_dropout,
        config.random_flip,
        config.pixel_flip,
        config.draws_per_pair,
        config.noise == "drawn",
        objective.independent_timesteps,
        config.timesteps,
        config.timestep_shift,
        config.timestep_values,
    )
    if max(config.timestep_values, default=0) >= t_max:
        raise ConfigError(f"timestep_values must be below {t_max}, got {max(config.timestep_values)}")
    cache = Path(config.cache_dir) if config.cache_dir else Path(config.output_dir) / "cache"
    examples = _examples(config, objective, terms)
    batches = cached_batches(
        cache,
        sampling,
        examples,
        images(config.pairs) if config.pairs else captioned_images(examples),
        pipe,
        family,
        resolution,
        accelerator,
        config.cache_batch_size,
        config.progress,
    )
    sizes = (config.cache_batch_size, config.progress)
    batches.regions = cached_regions(
        cache, config.regions, images(config.pairs) if config.pairs else (), pipe, resolution, accelerator, *sizes
    )
    family.module.to(accelerator.device)
    module: Any = family.module
    if config.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    # Modes are left alone: a denoiser in eval mode draws no dropout, for the reference as for the model.
    model = accelerator.prepare_model(module) if accelerator.num_processes > 1 else module
    reference = REFERENCE_NAME if config.reference == "adapter" else None
    predictor = Predictor(family, model, resolution, accelerator.autocast, ADAPTER_NAME, reference)
    objective.prepare(pipe, family, accelerator.device)
    stored = None
    if config.draws_per_pair:
        stored = StoredErrors(len(examples), config.draws_per_pair, len(examples.images))
    return TrainingStep(objective, terms, batches, predictor, stored)


def _adapter(config: TrainConfig, family: Family, begun: Adapter | None) -> AbstractContextManager[None]:
    """The LoRA to be trained, a new one or that of a file, and the one it is compared with, if any."""
    if begun is not None:
        reference = REFERENCE_NAME if config.reference == "adapter" else None
        return continued_adapter(family.module, ADAPTER_NAME, begun, family.component, reference)
    targets = config.targets or family.targets
    return fresh_adapter(family.module, ADAPTER_NAME, targets, config.rank, config.lora_alpha, config.seed)


def _examples(config: TrainConfig, objective: Objective, terms: Mapping[str, Term]) -> Examples:
    """What the objective reads, of the categories asked for, as the terms want it."""
    examples = objective.read(config.source, config.skip_bad_rows)
    if config.categories:
        examples = of_categories(examples, config.categories)
    for term in terms.values():
        examples = term.examples(examples)
    if config.noise == "drawn":
        known = int((examples.columns["seed"] >= 0).sum())
        if not known:
            raise TableError(f"{config.source} states the seed of no image (seed_0, seed_1): set noise to fresh")
        examples.counts["images_with_seed"] = known
    return examples


def _validation(config: TrainConfig) -> Validate | None:
    if not config.validate_every:
        return None
    if not config.validation_prompts:
        raise ConfigError("validate_every needs validation_prompts, or a validate callable")
    from .validation import validation_from_config

    return validation_from_config(config)


def native_resolution(pipe: Any, family: Family) -> int:
    """The edge in pixels that the denoiser's configuration states.

    Raises:
        ConfigError: it states none.
    """
    config: Any = family.module.config
    sample, factor = getattr(config, "sample_size", None), pipe.vae_scale_factor
    if not isinstance(sample, int):
        raise ConfigError("the pipeline does not say its resolution; set resolution")
    return sample * factor
