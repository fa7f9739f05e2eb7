"""Everything a training run depends on, in one dataclass; a YAML file holds the same fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from t2i_spo_plugin.errors import ConfigError

from .objectives.focusing import KINDS, VIEWS, FocusingKind, View
from .objectives.reward import MODES, RewardMode


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FOR_PAIRS = ("benign_share", "eta", "preservation", "benign_preservation", "anchor", "sdpo_mu", "fixed_draws")
_NOT_IN_THE_TRAJECTORY = {
    "output_dir",
    "cache_dir",
    "checkpoint_every",
    "keep_checkpoints",
    "validate_every",
    "log_every",
    "tensorboard",
    "resume",
    "progress",
    "device",
    "cache_batch_size",
}


@dataclass(frozen=True)
class TrainConfig:
    """How one adapter is trained.

    Data
        output_dir: receives `adapter.safetensors`, `report.json`, `checkpoints/` and `logs/`.
        pairs: the pair table, a parquet file or a folder of them; for every objective but `denoise`.
        images: for `denoise`: a folder of images, captions in metadata.jsonl, metadata.csv or a .txt beside each.
        pipeline: `sticker` (the bundled one), a diffusers folder, or a Hub id.
        resolution: edge in pixels the images are encoded at; None takes the pipeline's own.
        benign_share: share of benign pairs among those trained on, in [0, 1]; None leaves the table's own.
        caption_dropout: probability of training a pair under the empty prompt; 1 is DUO's way.
        random_flip: mirror a pair (both images alike) half of the time.
        pixel_flip: cache mirrored images through the autoencoder too; else latents are mirrored.
        cache_dir: where latents and text embeddings are kept; None is `output_dir/cache`.

    Adapter
        rank: of the LoRA.
        alpha: of the LoRA; None is the rank.
        targets: names that the adapted modules end with; attention by default, `attn1.to_q` style names narrow it.

    Optimiser (AdamW)
        learning_rate: after the warm-up; 3e-4 suits a LoRA of rank 8 on a small denoiser.
        warmup: steps in which the learning rate rises from 0.
        schedule: of the learning rate after the warm-up.
        weight_decay, max_grad_norm: as usual.
        steps: optimiser steps.
        budget: stop once this many sample passes (forward and backward) of the denoiser are spent; None is no limit.
        batch_size: pairs per forward pass and process.
        gradient_accumulation: forward passes per step.

    Objective
        objective: `dpo` is plain Diffusion-DPO, `spo` adds composite reward and focusing; `denoise` is the
            ordinary loss on captioned images, for a style or a subject, and uses nothing of what follows but the
            timesteps.
        beta: with the one half and mean-reduced errors (DiffusionDPO's 5000 for SD; small nets want less).
        labels: for `dpo`: `safety` puts safe over unsafe, `table` takes the table's own labels.
        safe_pairs: for `safety` labels: pairs safe on both sides are dropped, or ordered by cost or quality.
        lambda_: weight of the cost against the quality in the composite reward.
        mode: how the reward enters the loss (`reward.py`).
        tau: pairs whose reward differs by less are dropped.
        tau_soft: temperature of mode `soft`.
        eta: strength of dynamic focusing; 0 computes nothing.
        focusing: its formula (`focusing.py`).
        views: in which the difficulty of a pair is measured besides the plain one.
        view_mean: difficulty over the views.
        focusing_momentum: of the running mean that normalises the weights.
        preservation: weight of DUO's output preservation.
        preservation_batch: samples of pure noise that it sees in a forward pass.
        benign_preservation: weight of keeping the reference's prediction on benign pairs (this project's own).
        anchor: weight of the winner's own error (this project's own).
        sdpo_mu: Diffusion-SDPO's guard on the loser's gradient; None is off.
        sdpo_per_pair: one scale a pair instead of the source's one a batch.
        t_min, t_max: timesteps are drawn from [t_min, t_max); t_max None is the last. DUO takes 0 and 750.
        fixed_draws: K fixed (timestep, noise) draws per pair whose reference errors are kept; 0 draws afresh.

    Run
        seed: of everything random.
        validate_every: steps between validations by UAScore, 0 for never. The best adapter is the one that is kept.
        validation_prompts: a prompt file, or `sticker` for its validation split.
        validation_count: prompts of each kind.
        validation_seed: another one gives other sticker prompts.
        validation_steps, validation_guidance: how they are drawn.
        validation_cost_model, validation_policy, validation_quality_model: `sticker`, or folder, YAML file, folder.
        checkpoint_every: steps between checkpoints, 0 for the last one alone.
        keep_checkpoints: how many of them stay.
        log_every: steps between entries of the curve.
        tensorboard: write the curve for TensorBoard too.
        resume: go on from the newest checkpoint in `output_dir`; otherwise begin again.
        progress: show bars.
        gradient_checkpointing: save memory for time.
        precision: `no` is float32.
        device: `auto` takes an accelerator where there is one.
        title: of the adapter, in its header.
    """

    output_dir: str
    pairs: str = ""
    images: str = ""
    pipeline: str = "sticker"
    resolution: int | None = None
    benign_share: float | None = None
    caption_dropout: float = 0.0
    random_flip: bool = False
    pixel_flip: bool = False
    cache_dir: str | None = None
    cache_batch_size: int = 16

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ATTENTION

    learning_rate: float = 1e-4
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    steps: int = 1000
    budget: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1

    objective: Literal["dpo", "spo", "denoise"] = "spo"
    beta: float = 5000.0
    labels: Literal["safety", "table"] = "safety"
    safe_pairs: Literal["drop", "cost", "quality"] = "drop"
    lambda_: float = 1.0
    mode: RewardMode = "relabel+margin"
    tau: float = 0.0
    tau_soft: float = 0.1
    eta: float = 0.0
    focusing: FocusingKind = "additive"
    views: tuple[View, ...] = ()
    view_mean: Literal["mean", "max"] = "mean"
    focusing_momentum: float = 0.9
    preservation: float = 0.0
    preservation_batch: int = 1
    benign_preservation: float = 0.0
    anchor: float = 0.0
    sdpo_mu: float | None = None
    sdpo_per_pair: bool = True
    t_min: int = 0
    t_max: int | None = None
    fixed_draws: int = 0

    seed: int = 0
    validate_every: int = 0
    validation_prompts: str | None = None
    validation_seed: int = 0
    validation_cost_model: str = "sticker"
    validation_policy: str = "sticker"
    validation_quality_model: str = "sticker"
    validation_count: int = 24
    validation_steps: int = 25
    validation_guidance: float = 3.0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    tensorboard: bool = True
    resume: bool = True
    progress: bool = True
    gradient_checkpointing: bool = False
    precision: Literal["no", "bf16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    title: str = "SPO safety adapter"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _strings("targets", self.targets))
        object.__setattr__(self, "views", _strings("views", self.views))
        self._check_ranges()
        self._check_choices()
        self._check_combinations()

    def _check_ranges(self) -> None:
        at_least = {
            1: ("rank", "steps", "batch_size", "gradient_accumulation", "keep_checkpoints", "log_every"),
            0: ("warmup", "fixed_draws", "validate_every", "checkpoint_every", "t_min"),
        }
        at_least[1] += ("preservation_batch", "cache_batch_size", "validation_count", "validation_steps")
        for low, names in at_least.items():
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, int) or isinstance(value, bool) or value < low:
                    raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}")
        for name in ("learning_rate", "max_grad_norm", "beta", "tau_soft"):
            if not _number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        for name in ("weight_decay", "lambda_", "tau", "eta", "preservation", "benign_preservation", "anchor"):
            if not _number(getattr(self, name)) or not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}")
        for name in ("caption_dropout", "benign_share", "sdpo_mu"):
            value = getattr(self, name)
            if value is not None and (not _number(value) or not 0.0 <= value <= 1.0):
                raise ConfigError(f"{name} must lie in [0, 1], got {value!r}")
        if not _number(self.focusing_momentum) or not 0.0 <= self.focusing_momentum < 1.0:
            raise ConfigError(f"focusing_momentum must lie in [0, 1), got {self.focusing_momentum!r}")
        for name in ("alpha", "resolution", "budget"):
            value = getattr(self, name)
            if value is not None and (not _number(value) or not value > 0):
                raise ConfigError(f"{name} must be positive or left out, got {value!r}")
        if self.t_max is not None and not self.t_max > self.t_min:
            raise ConfigError(f"t_max must be above t_min {self.t_min}, got {self.t_max!r}")

    def _check_choices(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "objective": ("dpo", "spo", "denoise"),
            "labels": ("safety", "table"),
            "safe_pairs": ("drop", "cost", "quality"),
            "mode": MODES,
            "focusing": KINDS,
            "view_mean": ("mean", "max"),
            "schedule": ("constant", "linear", "cosine"),
            "precision": ("no", "bf16"),
            "device": ("auto", "cpu"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        unknown = [view for view in self.views if view not in VIEWS]
        if unknown:
            raise ConfigError(f"views must be among {', '.join(VIEWS)}, got {', '.join(unknown)}")
        if not self.targets:
            raise ConfigError("targets must name at least one module")

    def _check_combinations(self) -> None:
        needed, other = ("images", "pairs") if self.objective == "denoise" else ("pairs", "images")
        if not getattr(self, needed):
            raise ConfigError(f"{needed} must be given: {self.objective} is trained on them")
        if getattr(self, other):
            raise ConfigError(f"{self.objective} is trained on {needed}, not on {other}: leave {other} out")
        if self.objective == "denoise":
            set_ = [name for name in _FOR_PAIRS if getattr(self, name)]
            if set_:
                raise ConfigError(f"denoise knows no pairs and no reference: leave out {', '.join(set_)}")
        if self.objective == "dpo" and self.eta > 0:
            raise ConfigError("plain dpo has no focusing: set eta to 0 or objective to spo")
        if self.fixed_draws and (self.benign_preservation or self.preservation):
            raise ConfigError(
                "fixed_draws keeps reference errors, not predictions: set both preservation weights to 0"
            )
        if self.validate_every and self.steps < self.validate_every:
            raise ConfigError(f"validate_every {self.validate_every} is never reached in {self.steps} steps")

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """Read a file of fields; `overrides` win over it.

        Raises:
            ConfigError: the file is missing or no YAML mapping, or a field is unknown, missing or out of range.
        """
        return config_from_yaml(cls, path, overrides)

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the weights: a run may only be resumed with the same ones."""
        made = {key: value for key, value in dataclasses.asdict(self).items() if key not in _NOT_IN_THE_TRAJECTORY}
        if self.schedule == "constant":
            made.pop("steps")
            made.pop("budget")
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in made.items()
            if not key.startswith("validation_") and key != "title"
        }


def config_from_yaml(cls: Any, path: str | Path, overrides: dict[str, Any]) -> Any:
    """A dataclass of options from a YAML file and overrides; ConfigError for anything it does not know."""
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got {type(content).__name__}")
    content = {**content, **overrides}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in content if key not in fields)
    if unknown:
        raise ConfigError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
    missing = [
        name
        for name, field in fields.items()
        if name not in content
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path}: {', '.join(missing)} must be given")
    for key, value in content.items():
        # YAML 1.1 reads 1e-4 as text; nothing else is converted.
        if isinstance(value, str) and "float" in str(fields[key].type):
            content[key] = _float(path, key, value)
    return cls(**content)


def _float(path: Path, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{path}: {key} must be a number, got {value!r}") from error


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name} must be a list of names, got {value!r}")
    return tuple(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
