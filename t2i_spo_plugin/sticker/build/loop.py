"""The one training loop behind every bundled model: budgeted, checkpointed, resumable; no pickle on disk.

A job is a callable `step(batch_index) -> loss` over modules; the loop owns the device and its precision, the
optimiser, the learning rate (warm-up, constant, linear decay over the last part of the steps), the checkpoint and the
curve.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from t2i_spo_plugin.errors import SPOError

from .muon import Muon, suits


STATE = ("step", "exp_avg", "exp_avg_sq", "momentum")
"""What AdamW and Muon keep of a weight."""


@dataclass
class LoopConfig:
    """Steps and learning rate of one job.

    Attributes:
        decay: share of the steps over which the rate falls to zero.
        muon: rate of the matrices and convolutions, which Muon updates; 0 leaves them to AdamW too.
        bf16: whether `step` runs under autocast to bfloat16 where the device computes in it; weights, optimiser and
            losses stay float32. A CPU without the instructions is three times slower with it, and does without.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    decay: float = 0.3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.0
    muon: float = 0.0
    bf16: bool = True
    checkpoint_every: int = 200
    report_every: int = 50


@dataclass
class LoopState:
    """Where a job stands: the step, wall seconds so far, and the curve of (step, loss, extra numbers)."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16: CPUs without them only imitate it, slowly."""
    if device.type != "cpu":
        return True
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def rate(step: int, config: LoopConfig) -> float:
    """Learning-rate factor in [0, 1] at `step`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1.0, config.steps * config.decay)
    return warm * min(1.0, max(0.0, left))


class Trainer:
    """Runs a job from its last checkpoint in `folder` to its end.

    `modules`: everything with weights, by name; they are moved to `device`. With `ema` > 0 an exponential moving
    average of the weights is kept and is what `averaged` returns and what the checkpoint's consumers should ship.
    """

    def __init__(
        self,
        folder: Path,
        modules: Mapping[str, torch.nn.Module],
        config: LoopConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.modules, self.config = Path(folder), dict(modules), config
        self.device = torch.device(device)
        self.folder.mkdir(parents=True, exist_ok=True)
        for module in self.modules.values():
            module.to(self.device)
            # Convolutions are faster so, on the CPU and in bfloat16; other weights stay as they are.
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.named = {
            f"{name}.{key}": p
            for name, m in self.modules.items()
            for key, p in m.named_parameters()
            if p.requires_grad
        }
        weights = list(self.named.values())
        matrices = [p for p in weights if config.muon and suits(p)]
        rest = [p for p in weights if not (config.muon and suits(p))]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                rest,
                lr=config.learning_rate,
                betas=config.betas,
                weight_decay=config.weight_decay,
                fused=self.device.type == "cuda",
            )
        ]
        if matrices:
            decay = config.weight_decay * config.learning_rate / config.muon
            self.optimizers.append(Muon(matrices, config.muon, weight_decay=decay))
        self.bf16 = config.bf16 and computes_bfloat16(self.device)
        self.average = {k: p.detach().clone() for k, p in self.named.items()} if config.ema else {}
        self.state = LoopState()
        if (self.folder / "state.json").is_file():
            self._load()

    def _load(self) -> None:
        tensors = load_file(self.folder / "checkpoint.safetensors", str(self.device))
        for name, module in self.modules.items():
            own = {k.removeprefix(f"model.{name}."): v for k, v in tensors.items() if k.startswith(f"model.{name}.")}
            module.load_state_dict(own)
        for key, p in self.named.items():
            parts = {part: tensors[f"{part}.{key}"] for part in STATE if f"{part}.{key}" in tensors}
            if "step" in parts:
                parts["step"] = parts["step"].cpu()
            for optimizer in self.optimizers:
                if parts and any(p is q for group in optimizer.param_groups for q in group["params"]):
                    optimizer.state[p] = parts
        self.average = {k: tensors[f"ema.{k}"] for k in self.average}
        self.state = LoopState(**json.loads((self.folder / "state.json").read_text()))

    def save(self) -> None:
        """Write the checkpoint; a kill at any moment leaves the former or the new one."""
        tensors = {f"model.{n}.{k}": v for n, m in self.modules.items() for k, v in m.state_dict().items()}
        for key, p in self.named.items():
            for optimizer in self.optimizers:
                tensors |= {f"{part}.{key}": value for part, value in optimizer.state.get(p, {}).items()}
        tensors |= {f"ema.{k}": v for k, v in self.average.items()}
        temporary = self.folder / "checkpoint.tmp"
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, temporary)
        os.replace(temporary, self.folder / "checkpoint.safetensors")
        (self.folder / "state.tmp").write_text(json.dumps(self.state.__dict__))
        os.replace(self.folder / "state.tmp", self.folder / "state.json")

    def run(
        self,
        step: Callable[[int], torch.Tensor],
        evaluate: Callable[[], dict[str, float]] | None = None,
        evaluate_every: int = 500,
        title: str = "",
    ) -> LoopState:
        """Run `step` until the configured number of steps; `evaluate`'s numbers join the curve."""
        config, state = self.config, self.state
        started, total, count = time.monotonic() - state.seconds, torch.zeros((), device=self.device), 0
        for module in self.modules.values():
            module.train()
        with tqdm(total=config.steps, initial=state.step, desc=title, mininterval=10) as bar:
            while state.step < config.steps:
                factor = rate(state.step, config)
                for optimizer, full in zip(self.optimizers, (config.learning_rate, config.muon), strict=False):
                    for group in optimizer.param_groups:
                        group["lr"] = full * factor
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss = step(state.step)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.named.values(), config.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                state.step += 1
                if config.ema:
                    # Ramped, so that the first average is not the random start.
                    weight = 1 - min(config.ema, (1 + state.step) / (10 + state.step))
                    torch._foreach_lerp_(
                        list(self.average.values()), [p.detach() for p in self.named.values()], weight
                    )
                total, count = total + loss.detach(), count + 1
                bar.update()
                if state.step % config.report_every == 0 or state.step == config.steps:
                    entry = {"step": state.step, "loss": float(total) / count}
                    total, count = torch.zeros((), device=self.device), 0
                    if not math.isfinite(entry["loss"]):
                        raise SPOError(f"{title}: the loss is {entry['loss']} at step {state.step}; a lower rate helps")
                    if evaluate is not None and (state.step % evaluate_every == 0 or state.step == config.steps):
                        entry |= evaluate()
                        for module in self.modules.values():
                            module.train()
                    state.curve.append(entry)
                    bar.set_postfix({k: f"{v:.4g}" for k, v in entry.items() if k != "step"})
                state.seconds = time.monotonic() - started
                if state.step % config.checkpoint_every == 0 or state.step == config.steps:
                    self.save()
        return state

    def averaged(self, name: str) -> dict[str, torch.Tensor]:
        """The state dict of one module, with averaged weights where an average is kept."""
        own = dict(self.modules[name].state_dict())
        own |= {k.removeprefix(f"{name}."): v for k, v in self.average.items() if k.startswith(f"{name}.")}
        return own
