"""Everything a training run depends on, in one dataclass; a YAML file holds the same fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.options import check_choice, check_range, expand_home, from_yaml, to_mapping
from t2i_spo_plugin.registry import STICKER

from .data.regions import RegionOptions
from .objectives import OBJECTIVE_OPTIONS, OBJECTIVES, ObjectiveOptions, SPOOptions, make_objective, objective_name
from .objectives.terms import TERMS, TermOptions


Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["no", "bf16"]
Device = Literal["auto", "cpu"]
Noise = Literal["fresh", "drawn"]
Reference = Literal["base", "adapter"]
Timesteps = Literal["family", "uniform", "logit-normal"]

_NOT_IN_THE_TRAJECTORY = {
    # Known by content: see `Run.identity`.
    "pairs",
    "images",
    "pipeline",
    "adapter",
    "output_dir",
    "cache_dir",
    "cache_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "tensorboard",
    "resume",
    "progress",
    "device",
    "title",
}


@dataclass(frozen=True)
class TrainConfig:
    """How one adapter is trained, on a pair table or on captioned images.

    Attributes:
        output_dir: folder that receives `adapter.safetensors`, `report.json`, `checkpoints/` and `logs/`.
        pairs: pair table, for objectives over pairs: a parquet file, a folder of them, or a csv, tsv, jsonl or json
            file with paths of images.
        images: folder of images for `sft`, captions in metadata.jsonl, metadata.csv or a .txt beside each.
        pipeline: base model: `sticker` (the bundled one), a diffusers folder, or a Hub id.
        resolution: edge in pixels that images are encoded at; by default the pipeline's own.
        categories: categories of harmful prompts that are trained on beside the benign ones, for experts; empty takes
            all.
        benign_share: share of benign pairs among those trained on, in [0, 1]; by default the table's own.
        caption_dropout: probability of training an example under the empty prompt; 1 is DUO's way.
        random_flip: mirror an example (its images alike) half of the time.
        pixel_flip: cache mirrored images through the autoencoder too; else latents are mirrored.
        cache_dir: folder of the cached latents and text embeddings; by default `cache` in the output folder.
        cache_batch_size: images that the autoencoder encodes at once.
        t_min: first timestep that is trained on; timesteps are drawn from this one up to `t_max`.
        t_max: timestep before which drawing ends; by default all are drawn. DUO takes 0 to 750.
        timesteps: their distribution: the `family`'s own, `uniform`, or `logit-normal`.
        timestep_shift: shifts what `uniform` and `logit-normal` draw, above 1 towards noise: `s u / (1 + (s - 1) u)`.
        timestep_values: a few timesteps instead, each equally often; all from `t_min` up to `t_max`.
        draws_per_pair: number of fixed (timestep, noise) draws of each pair, whose reference errors are stored; 0
            draws afresh each time.
        noise: `fresh`, or the noise an image was `drawn` from where its seed is known: for tables of images that this
            pipeline generated at this resolution, in float32.
        adapter: a safetensors file to go on from, instead of a new LoRA; rank, alpha and targets are then the file's.
        reference: what the model is compared with: the `base`, or the `adapter` that the run begins from.
        rank: rank of the LoRA.
        alpha: alpha of the LoRA, whose change is multiplied by alpha over rank; by default the rank.
        targets: names that the adapted modules end with, such as `attn1.to_q`; by default the attention of the model's
            family.
        objective: loss: `dpo` is plain Diffusion-DPO, `spo` adds composite reward and focusing; `sft` is the ordinary
            loss on captioned images, for a style or a subject; the others are rivals of the literature.
        terms: what is added to the objective's own loss.
        regions: errors weighed by where an image is unsafe.
        learning_rate: learning rate after the warm-up; 3e-4 suits a LoRA of rank 8 on a small denoiser.
        warmup: steps in which the learning rate rises from 0.
        schedule: course of the learning rate after the warm-up.
        weight_decay: weight decay of AdamW.
        max_grad_norm: norm that the gradient is clipped to.
        steps: number of optimiser steps.
        budget: sample passes (forward and backward) of the denoiser after which training stops; by default there is no
            limit.
        batch_size: examples in a forward pass of each process.
        gradient_accumulation: forward passes in a step.
        gradient_checkpointing: save memory for time.
        precision: number type of the forward pass under autocast; `no` is float32.
        device: where training runs; `auto` takes an accelerator where there is one.
        validate_every: steps between validations by UAScore, 0 for never; the best adapter is the one that is written.
        validation_prompts: prompts of the validation: a prompt file, or `sticker` for its validation split.
        validation_count: validation prompts of each kind.
        skip_bad_rows: leave rows of caption and prompt files out that cannot be used, instead of refusing them.
        validation_seed: seed of the validation prompts; another one gives other sticker prompts.
        validation_steps: denoising steps of the validation images.
        validation_guidance: classifier-free guidance scale of the validation images.
        validation_cost_model: cost model of the validation: `sticker`, `open_nsfw`, `owen`, `nudenet`, a folder, or a
            Hub id.
        validation_policy: what counts as unsafe in the validation: `sticker`, `photo`, `photo-sexual`, or a YAML file.
        validation_quality_model: quality model of the validation: `sticker`, a folder, or a Hub id.
        validation_override_domain: judge images of another domain than that of the validation's cost and quality
            models.
        seed: seed of everything random.
        checkpoint_every: steps between checkpoints, 0 for the last one alone.
        keep_checkpoints: number of checkpoints that stay.
        log_every: steps between entries of the curve.
        tensorboard: write the curve for TensorBoard too.
        resume: go on from the newest checkpoint in the output folder; otherwise begin again.
        progress: show progress bars.
        title: title of the adapter, in its header.
    """

    configs: ClassVar[Path] = Path(__file__).parent / "configs"

    # Data
    output_dir: str
    pairs: str = ""
    images: str = ""
    pipeline: str = STICKER
    resolution: int | None = None
    categories: tuple[str, ...] = ()
    benign_share: float | None = None
    caption_dropout: float = 0.0
    random_flip: bool = False
    pixel_flip: bool = False
    cache_dir: str | None = None
    cache_batch_size: int = 16
    # Timesteps and noise
    t_min: int = 0
    t_max: int | None = None
    timesteps: Timesteps = "family"
    timestep_shift: float = 1.0
    timestep_values: tuple[int, ...] = ()
    draws_per_pair: int = 0
    noise: Noise = "fresh"
    # Adapter
    adapter: str | None = None
    reference: Reference = "base"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    # Objective
    objective: ObjectiveOptions = field(default_factory=SPOOptions, metadata={"choices": OBJECTIVE_OPTIONS})
    terms: TermOptions = field(default_factory=TermOptions)
    regions: RegionOptions = field(default_factory=RegionOptions)
    # Optimiser
    learning_rate: float = 1e-4
    warmup: int = 0
    schedule: Schedule = "constant"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    steps: int = 1000
    budget: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: Precision = "no"
    device: Device = "auto"
    # Validation
    validate_every: int = 0
    validation_prompts: str | None = None
    validation_count: int = 24
    skip_bad_rows: bool = False
    validation_seed: int = 0
    validation_steps: int = 25
    validation_guidance: float = 3.0
    validation_cost_model: str = STICKER
    validation_policy: str = STICKER
    validation_quality_model: str = STICKER
    validation_override_domain: bool = False
    # Run
    seed: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    tensorboard: bool = True
    resume: bool = True
    progress: bool = True
    title: str = "SPO safety adapter"

    def __post_init__(self) -> None:
        expand_home(self)
        self._check_ranges()
        self._check_choices()
        self._check_objective()
        if self.validate_every and self.steps < self.validate_every:
            raise ConfigError(f"validate_every {self.validate_every} is never reached in {self.steps} steps")

    def _check_ranges(self) -> None:
        counts = ("rank", "steps", "batch_size", "gradient_accumulation", "keep_checkpoints", "log_every")
        for name in (*counts, "cache_batch_size", "validation_count", "validation_steps"):
            check_range(name, getattr(self, name), 1, whole=True)
        for name in ("warmup", "draws_per_pair", "validate_every", "checkpoint_every", "t_min"):
            check_range(name, getattr(self, name), 0, whole=True)
        for name in ("learning_rate", "max_grad_norm"):
            check_range(name, getattr(self, name), 0.0, open_low=True)
        check_range("weight_decay", self.weight_decay, 0.0)
        check_range("caption_dropout", self.caption_dropout, 0.0, 1.0)
        if self.benign_share is not None:
            check_range("benign_share", self.benign_share, 0.0, 1.0)
        for name in ("alpha", "resolution", "budget"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0.0, open_low=True)
        if self.t_max is not None:
            check_range("t_max", self.t_max, self.t_min, open_low=True)

    def _check_choices(self) -> None:
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("device", self.device, get_args(Device))
        check_choice("noise", self.noise, get_args(Noise))
        check_choice("timesteps", self.timesteps, get_args(Timesteps))
        check_range("timestep_shift", self.timestep_shift, 0.0, open_low=True)
        if self.timesteps == "family" and self.timestep_shift != 1.0:
            raise ConfigError("timestep_shift needs a distribution: set timesteps to uniform or logit-normal")
        for value in self.timestep_values:
            check_range("timestep_values", value, self.t_min, math.inf if self.t_max is None else self.t_max - 1)
        check_choice("reference", self.reference, get_args(Reference))
        if self.reference == "adapter" and not self.adapter:
            raise ConfigError("reference adapter needs an adapter to begin from: name it as adapter")
        if self.targets is not None:
            targets: Any = self.targets
            if isinstance(targets, str) or not all(isinstance(name, str) for name in targets):
                raise ConfigError(f"targets must be a list of names, got {self.targets!r}")
            object.__setattr__(self, "targets", tuple(self.targets))

    def _check_objective(self) -> None:
        if type(self.objective) not in OBJECTIVE_OPTIONS.values():
            raise ConfigError(f"objective must be the options of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        name = objective_name(self.objective)
        kind = OBJECTIVES[name].objective
        needs = kind.needs
        needed, other = ("images", "pairs") if "images" in needs else ("pairs", "images")
        if not getattr(self, needed):
            raise ConfigError(f"{needed} must be given: {name} is trained on them")
        if getattr(self, other):
            raise ConfigError(f"{name} is trained on {needed}, not on {other}: leave {other} out")
        if "images" in needs:
            asked = {
                "benign_share": self.benign_share is not None,
                "categories": bool(self.categories),
                "noise": self.noise == "drawn",
                "regions": self.regions.active,
            }
            for option in (option for option, is_set in asked.items() if is_set):
                raise ConfigError(f"{name} knows no benign and harmful pairs: leave out {option}")
        if self.regions.active and not kind.weighs_errors:
            raise ConfigError(f"{name} has no errors that could be weighed: leave out regions")
        if self.terms.safedpo.active and getattr(self.objective, "mode", "") == "soft":
            raise ConfigError(
                "mode soft has targets instead of margins: leave out terms.safedpo, or take another mode"
            )
        active = [term for term in TERMS if getattr(self.terms, term).active]
        for term in active:
            if "pairs" in TERMS[term].needs and "pairs" not in needs:
                raise ConfigError(f"{name} knows no winners and losers: leave out terms.{term}")
        if self.draws_per_pair:
            if "reference" not in needs:
                raise ConfigError(f"{name} has no reference whose errors could be stored: leave out draws_per_pair")
            if "reference_output" in needs:
                raise ConfigError(
                    f"draws_per_pair stores the reference's errors, not its predictions, which {name} needs"
                )
            predicted = [term for term in active if "reference_output" in TERMS[term].needs]
            predicted += [term for term in make_objective(self.objective).terms() if term not in active]
            if predicted:
                raise ConfigError(
                    f"draws_per_pair stores the reference's errors, not its predictions, which terms.{predicted[0]} "
                    "needs: set its weight or draws_per_pair to 0"
                )

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """Read a file of fields, or a bundled configuration by name; `overrides` win over it.

        Raises:
            ConfigError: the file is missing or no YAML mapping, or a field is unknown, missing or out of range.
        """
        return from_yaml(cls, path, **overrides)

    @property
    def objective_name(self) -> str:
        """The objective's row in `OBJECTIVES`."""
        return objective_name(self.objective)

    @property
    def lora_alpha(self) -> float:
        """`alpha`, or the rank."""
        return float(self.alpha or self.rank)

    @property
    def source(self) -> str:
        """`pairs` or `images`, whichever the objective is trained on."""
        return self.pairs or self.images

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the weights: a run may only be resumed with the same ones."""
        content = {name: value for name, value in to_mapping(self).items() if name not in _NOT_IN_THE_TRAJECTORY}
        if self.schedule == "constant":
            content.pop("steps")
            content.pop("budget")
        return _flat({name: value for name, value in content.items() if not name.startswith("valid")})


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
