"""One trainer: a pair table (or captioned images) and a pipeline in, a LoRA adapter out.

Latents and text are cached, winners and losers go through the denoiser together, the reference is the same denoiser
with its adapter switched off. Every random number is a function of seed, step and position (`sampling.py`), so a run
that is killed and resumed gives bit for bit the adapter of a run that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from tqdm.auto import tqdm

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.adapters import Adapter, LoraPair, write_adapter
from t2i_spo_plugin.errors import ConfigError, PipelineError, SPOError, require_extra
from t2i_spo_plugin.files import write_json
from t2i_spo_plugin.pipelines import adapter_metadata
from t2i_spo_plugin.registry import load_pipeline

from .checkpoints import (
    check_resumable,
    latest_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from .config import TrainConfig
from .data.caches import ShardStore, build_latents, build_text, fingerprint
from .data.captions import caption_data, captioned_images
from .data.dataset import images, read_pairs
from .denoisers import Denoiser, denoiser_of, encode_prompts, text_encoders
from .lora import fresh_adapter, frozen, placed
from .objectives.denoise import DenoiseStep
from .objectives.preference import Batches, PreferenceStep
from .sampling import learning_rate_factor


__all__ = ["ADAPTER_FILE", "REPORT_FILE", "TrainConfig", "Validation", "train"]

ADAPTER_FILE = "adapter.safetensors"
REPORT_FILE = "report.json"
Validation = Callable[[int, Any], float]
"""Gets the step and the pipeline with the adapter as it is then; returns a score, higher is better."""

_NAME = "spo_training"


def train(config: TrainConfig, pipe: Any = None, validate: Validation | None = None) -> Path:
    """Train an adapter and return the path of its file; `report.json` lies beside it.

    Args:
        config: everything the result depends on.
        pipe: a loaded pipeline; None loads `config.pipeline`. It is left without adapter, as it came.
        validate: called every `config.validate_every` steps on the main process. The adapter that scores best is the
            one that is written; without validation it is the last. None makes one from `config.validation_prompts`.

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
    if config.fixed_draws and accelerator.num_processes > 1:
        raise ConfigError("fixed_draws keeps its reference errors in one process; set it to 0 to train on several")
    pipe = load_pipeline(config.pipeline) if pipe is None else pipe
    denoiser = denoiser_of(pipe)
    if getattr(denoiser.module, "peft_config", None):
        raise PipelineError("the pipeline already has an adapter; unload it before training another")
    if validate is None and config.validate_every and config.validation_prompts:
        from .validation import validation_from_config

        validate = validation_from_config(config)
    if config.validate_every and validate is None:
        raise ConfigError("validate_every needs validation_prompts, or a validate callable")
    with frozen(denoiser.module), fresh_adapter(denoiser.module, config, _NAME):
        return _Run(config, accelerator, pipe, denoiser, validate).run()


class _Run:
    """One run, from caches to adapter."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, pipe: Any, denoiser: Denoiser, validate: Validation | None
    ) -> None:
        self.config, self.accelerator, self.pipe, self.denoiser = config, accelerator, pipe, denoiser
        self.validate = validate if config.validate_every else None
        self.output = Path(config.output_dir)
        self.started = time.monotonic()
        self.resolution = config.resolution or _native_resolution(pipe, denoiser)
        self.plain = config.objective == "denoise"
        self.data = caption_data(config.images) if self.plain else read_pairs(config)
        named = [(name, value) for name, value in denoiser.module.named_parameters() if value.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [value for _, value in named]
        self.state: dict[str, Any] = {"curve": [], "validation": [], "best": None, "elapsed": 0.0}
        self.best: dict[str, Tensor] | None = None
        self.step = 0

    def run(self) -> Path:
        batches = self._batches()
        self._prepare(batches)
        self._resume()
        self._loop()
        return self._finish()

    def _batches(self) -> Batches:
        config, main = self.config, self.accelerator.is_local_main_process
        root = Path(config.cache_dir) if config.cache_dir else self.output / "cache"
        shard = (self.accelerator.process_index, self.accelerator.num_processes)
        device, vae = self.accelerator.device, self.pipe.vae
        latents = ShardStore(root / f"latents-{fingerprint(vae)}-{self.resolution}")
        bar = config.progress and main
        with placed(device, vae):
            build_latents(
                latents,
                captioned_images(config.images) if self.plain else images(config.pairs),
                vae,
                self.resolution,
                config.cache_batch_size,
                config.pixel_flip,
                shard,
                bar,
            )
        encoders = text_encoders(self.pipe)
        text = ShardStore(root / f"text-{fingerprint(*encoders)}")
        with placed(device, *encoders):
            prompts = ["", *self.data.captions]
            build_text(text, prompts, lambda some: encode_prompts(self.pipe, some, device), shard=shard, progress=bar)
        self.accelerator.wait_for_everyone()
        for store in (latents, text):
            store.refresh()
        return Batches(config, self.data, latents, text, vae.config, len(self.denoiser.schedule), device)

    def _prepare(self, batches: Batches) -> None:
        config, accelerator = self.config, self.accelerator
        self.denoiser.module.to(accelerator.device)
        if config.gradient_checkpointing:
            module: Any = self.denoiser.module
            module.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=accelerator.device.type == "cuda",
        )
        # Modes are left alone: a denoiser in eval mode draws no dropout, for the reference as for the model.
        self.model = accelerator.prepare_model(self.denoiser.module) if accelerator.num_processes > 1 else None
        kind = DenoiseStep if self.plain else PreferenceStep
        self.objective = kind(
            config, self.denoiser, self.model or self.denoiser.module, batches, self.resolution, accelerator.autocast
        )
        if config.tensorboard:
            accelerator.init_trackers("train")

    def _resume(self) -> None:
        folder = self.output / "checkpoints"
        if not self.config.resume:
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        path = latest_checkpoint(folder)
        if path is None:
            return
        tensors, state = load_checkpoint(path)
        check_resumable(path, state, self.config.trajectory(), self.data.digest())
        # Into the adapter that the optimiser holds; loading a second one would train nothing.
        outcome = set_peft_model_state_dict(self.denoiser.module, tensors["adapter"], adapter_name=_NAME)
        if outcome.unexpected_keys:
            raise ConfigError(f"{path} does not fit the adapter: {outcome.unexpected_keys[:3]}")
        restore_optimizer(self.optimizer, self.names, tensors.get("optimizer", {}))
        self.objective.focusing.load_state_dict(state["focusing"])
        self.objective.passes.forward, self.objective.passes.backward = state["passes"]
        if self.objective.kept is not None:
            self.objective.kept = tensors["reference"]["errors"]
        self.best = tensors.get("best")
        self.state = {key: state[key] for key in self.state}
        self.step = state["step"]

    def _loop(self) -> None:
        config, accelerator = self.config, self.accelerator
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not (config.progress and accelerator.is_local_main_process),
        )
        sums, since = None, 0
        while self.step < config.steps and not self._spent():
            rate = config.learning_rate * learning_rate_factor(self.step, config.steps, config.warmup, config.schedule)
            stats = self._optimiser_step(rate)
            sums, since = (stats if sums is None else sums + stats), since + 1
            self.step += 1
            bar.update()
            last = self.step == config.steps or self._spent()
            if self.step % config.log_every == 0 or last:
                self._log(sums / since, rate, bar)
                sums, since = None, 0
            if self.validate and (self.step % config.validate_every == 0 or last):
                self._validate()
            if last or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                self._checkpoint()
        bar.close()

    def _optimiser_step(self, rate: float) -> Tensor:
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        micro, ranks = config.batch_size, accelerator.num_processes
        first = self.step * micro * config.gradient_accumulation * ranks
        total = torch.zeros(len(self.objective.logged), device=accelerator.device)
        for number in range(config.gradient_accumulation):
            start = first + (number * ranks + accelerator.process_index) * micro
            closing = number == config.gradient_accumulation - 1
            with contextlib.nullcontext() if closing or self.model is None else self.model.no_sync():
                loss, stats = self.objective(self.step, range(start, start + micro))
                (loss / config.gradient_accumulation).backward()
            total += stats / config.gradient_accumulation
        torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.objective.focusing.active:
            pending = self.objective.focusing.pending().to(accelerator.device)
            self.objective.focusing.update(accelerator.reduce(pending, "sum"))
        return total

    def _spent(self) -> bool:
        passes = self.objective.passes.total * self.accelerator.num_processes
        return self.config.budget is not None and passes >= self.config.budget

    def _log(self, stats: Tensor, rate: float, bar: Any) -> None:
        means = dict(zip(self.objective.logged, self.accelerator.reduce(stats, "mean").tolist(), strict=True))
        if not means["loss"] - means["loss"] == 0.0:
            raise SPOError(f"the loss is {means['loss']} at step {self.step}; lower learning_rate or beta")
        entry = {"step": self.step, "learning_rate": rate, **means, "focusing_mean": self.objective.focusing.mean}
        self.state["curve"].append(entry)
        self.accelerator.log({key: value for key, value in entry.items() if key != "step"}, step=self.step)
        bar.set_postfix({key: f"{means[key]:.4f}" for key in ("loss", "accuracy") if key in means})

    def _validate(self) -> None:
        score = torch.zeros(1, dtype=torch.float64, device=self.accelerator.device)
        if self.accelerator.is_main_process and self.validate is not None:
            score += self.validate(self.step, self.pipe)
        value = float(self.accelerator.reduce(score, "sum"))
        if value != value:
            raise SPOError(f"the validation at step {self.step} gave NaN")
        self.state["validation"].append({"step": self.step, "score": value})
        self.accelerator.log({"validation": value}, step=self.step)
        if self.state["best"] is None or value > self.state["best"]["score"]:
            self.state["best"] = {"step": self.step, "score": value}
            self.best = self._weights()

    def _weights(self) -> dict[str, Tensor]:
        weights = get_peft_model_state_dict(self.denoiser.module, adapter_name=_NAME)
        return {key: value.detach().cpu().clone() for key, value in weights.items()}

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            tensors = {"adapter": self._weights(), "optimizer": optimizer_tensors(self.optimizer, self.names)}
            if self.best is not None:
                tensors["best"] = self.best
            if self.objective.kept is not None:
                tensors["reference"] = {"errors": self.objective.kept}
            state = {
                **self.state,
                "elapsed": self._elapsed(),
                "focusing": self.objective.focusing.state_dict(),
                "passes": [self.objective.passes.forward, self.objective.passes.backward],
                "trajectory": self.config.trajectory(),
                "data": self.data.digest(),
            }
            save_checkpoint(self.output / "checkpoints", self.step, tensors, state, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _elapsed(self) -> float:
        return self.state["elapsed"] + time.monotonic() - self.started

    def _finish(self) -> Path:
        path = self.output / ADAPTER_FILE
        if self.accelerator.is_main_process:
            weights = self.best if self.best is not None else self._weights()
            write_adapter(self._adapter(weights), path)
            write_json(self.output / REPORT_FILE, self._report())
        self.accelerator.wait_for_everyone()
        if self.config.tensorboard:
            self.accelerator.end_training()
        return path

    def _adapter(self, weights: dict[str, Tensor]) -> Adapter:
        config, alpha = self.config, float(self.config.alpha or self.config.rank)
        modules = {}
        for key, down in weights.items():
            name, mark, _ = key.partition(".lora_A.weight")
            if mark:
                modules[f"{self.denoiser.component}.{name}"] = LoraPair(down, weights[f"{name}.lora_B.weight"], alpha)
        extra = {
            "objective": config.objective,
            "data": self.data.digest(),
            "package_version": __version__,
            "step": str((self.state["best"] or {"step": self.step})["step"]),
        }
        if not self.plain:
            extra |= {"beta": repr(config.beta), "beta_convention": "one half, mean over dims"}
        if config.objective == "spo":
            extra |= {"lambda": repr(config.lambda_), "reward_mode": config.mode, "eta": repr(config.eta)}
        return Adapter(modules, adapter_metadata(self.pipe, config.title, **extra))

    def _report(self) -> dict[str, Any]:
        passes, ranks = self.objective.passes, self.accelerator.num_processes
        return {
            "config": dataclasses.asdict(self.config),
            "pairs": self.data.counts,
            "data": self.data.digest(),
            "steps": self.step,
            "best": self.state["best"],
            "validation": self.state["validation"],
            "curve": self.state["curve"],
            "passes": {"forward": passes.forward * ranks, "backward": passes.backward * ranks},
            "parameters": sum(value.numel() for value in self.parameters),
            "seconds": round(self._elapsed(), 1),
            "processes": ranks,
            "device": self.accelerator.device.type,
            "versions": _versions(),
        }


def _native_resolution(pipe: Any, denoiser: Denoiser) -> int:
    config: Any = denoiser.module.config
    sample, factor = config.sample_size, pipe.vae_scale_factor
    if not isinstance(sample, int):
        raise ConfigError("the pipeline does not say its resolution; set resolution")
    return sample * factor


def _versions() -> dict[str, str]:
    import accelerate
    import diffusers
    import peft

    made = {module.__name__: module.__version__ for module in (torch, diffusers, peft, accelerate)}
    return {"t2i_spo_plugin": __version__, **made}
