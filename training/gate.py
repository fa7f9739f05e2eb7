"""Make an adapter gate for an adapter: learn from prompts what its change looks like before an unsafe image.

No image is drawn: for each prompt the first denoising steps are taken with the base model, and the predictions
without and with the adapter are kept. A small network learns to tell harmful from benign prompts by them; prompts
that it has not seen decide the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from t2i_spo_plugin.data import PromptRow, call_pipeline, drop_minors, read_prompts
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.gating import AdapterGate, GateNetwork, change_features, norm_score, save_adapter_gate
from t2i_spo_plugin.metrics import Interval, percent, wilson
from t2i_spo_plugin.pipelines import enable_spo, load_spo_lora, unload_spo_lora
from t2i_spo_plugin.registry import STICKER, adapter_source, load_pipeline, load_prompts


@dataclass(frozen=True)
class ClosedLoopConfig:
    """What an adapter gate is made from.

    Attributes:
        adapter: a bundled one such as `spo`, a file, a folder or a Hub id. It may change denoisers only.
        out: the .safetensors file to write.
        pipeline: `sticker` (bundled), a pipeline folder or a Hub id.
        prompts: `sticker` or a file with harmful and benign prompts (csv, jsonl, parquet).
        harmful: harmful prompts of the sticker world.
        benign: benign prompts of the sticker world.
        lookalike: benign prompts of the sticker world that look harmful.
        evidence: `reader` learns from the predictions; `size` takes how much they change, and learns nothing.
        max_benign: share of benign prompts that may be drawn with the adapter; the threshold follows from it.
        until: progress before which the adapter gate looks; 0.04 is the first of 25 steps.
        strength: of the adapter, as it will be used.
        denoising_steps: of a whole image, as it will be drawn.
        guidance_scale: classifier-free guidance, as it will be used.
        batch_size: prompts at once.
        held_out: prompts that decide the threshold and are not learned from, as a share of those that are: of the
            sticker world those of the validation split, of a file any.
        train_steps: of the reader.
        seed: of the prompt choice, the split and the training.
        device: where the pipeline runs.
        progress: show progress bars.

    Raises:
        ConfigError: an option out of range.
    """

    adapter: str = "spo"
    out: Path = Path("adapter_gate.safetensors")
    pipeline: str = "sticker"
    prompts: str = "sticker"
    harmful: int = 3000
    benign: int = 2500
    lookalike: int = 1000
    evidence: Literal["reader", "size"] = "reader"
    max_benign: float = 0.06
    until: float = 0.04
    strength: float = 1.0
    denoising_steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 16
    held_out: float = 0.2
    train_steps: int = 1500
    seed: int = 0
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("harmful", "benign", "denoising_steps", "batch_size", "train_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.max_benign < 1.0:
            raise ConfigError(f"max_benign must lie between 0 and 1, got {self.max_benign}")
        if not self.held_out > 0.0:
            raise ConfigError(f"held_out must be above 0, got {self.held_out}")
        if self.lookalike < 0:
            raise ConfigError(f"lookalike must be at least 0, got {self.lookalike}")


@dataclass(frozen=True)
class ClosedLoopReport:
    """An adapter gate and what it did on prompts that were held out; `str()` prints it.

    Attributes:
        loop: for `load_spo_lora(..., steering=loop)`.
        path: where it was written.
        harmful: share of harmful prompts that are drawn with the adapter, with its 95 % interval.
        benign: share of benign prompts that are drawn with the adapter, with its 95 % interval.
        counts: held-out harmful and benign prompts.
    """

    loop: AdapterGate
    path: Path
    harmful: tuple[float, Interval]
    benign: tuple[float, Interval]
    counts: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"{self.path}: threshold {self.loop.threshold:.3f}; on held-out prompts the adapter is used for "
            f"{percent(*self.harmful)} of {self.counts[0]} harmful and {percent(*self.benign)} of {self.counts[1]} "
            "benign ones"
        )


@dataclass
class _Recorder:
    """Stands where a reader stands, keeps what it is shown, and finds nothing."""

    features: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)

    def evidence(self, without: Tensor, with_adapter: Tensor) -> Tensor:
        self.features.append(change_features(without, with_adapter).cpu())
        self.sizes.append(norm_score(without, with_adapter).cpu())
        return torch.zeros(len(without))


def make_adapter_gate(
    config: ClosedLoopConfig, pipe: Any = None, rows: Sequence[PromptRow] | None = None
) -> ClosedLoopReport:
    """Record, learn, choose the threshold, and write `config.out`.

    Args:
        config: see `ClosedLoopConfig`.
        pipe: a loaded pipeline instead of the one that `config` names.
        rows: likewise, the prompts.

    Raises:
        ConfigError: harmful or benign prompts are missing.
        AdapterError: the adapter does not fit, or changes a text encoder.
    """
    learned, held = _parted(config, rows)
    for part, name in ((held, "held-out"), (learned, "remaining")):
        if len({row.kind == "harmful" for row in part}) < 2:
            raise ConfigError(f"the {len(part)} {name} prompts are all of one kind; give more harmful and benign ones")
    if pipe is None:
        pipe = load_pipeline(config.pipeline).to(config.device)
    features, sizes = _record(config, enable_spo(pipe), [*learned, *held])
    unsafe = torch.tensor([row.kind == "harmful" for row in (*learned, *held)])
    n_learned = len(learned)
    reader = None
    if config.evidence == "reader":
        reader = train_reader(
            features[:n_learned], unsafe[:n_learned], config.train_steps, config.seed, config.progress
        )
        # As it will be read from its file.
        reader.load_state_dict({name: tensor.half().float() for name, tensor in reader.state_dict().items()})
    found = sizes[n_learned:].amax(1) if reader is None else _most(reader, features[n_learned:])
    unsafe = unsafe[n_learned:]
    threshold = float(found[~unsafe].quantile(1.0 - config.max_benign))
    loop = AdapterGate(threshold, config.until, reader)
    metadata = {"adapter": Path(config.adapter).name, "evidence": config.evidence, "strength": f"{config.strength:g}"}
    used = loop.needed(found)
    n_harmful = int(unsafe.sum())
    path = save_adapter_gate(loop, config.out, metadata)
    counts = n_harmful, len(unsafe) - n_harmful
    return ClosedLoopReport(loop, path, _rate(used[unsafe]), _rate(used[~unsafe]), counts)


def train_reader(
    features: Tensor, unsafe: Tensor, steps: int = 1500, seed: int = 0, progress: bool = False
) -> GateNetwork:
    """Fit a `GateNetwork` by cross-entropy.

    Args:
        features: `[N, K, 2 C, H, W]` of N prompts at K denoising steps.
        unsafe: `[N]`, bool.
        steps: of AdamW, 256 examples each.
        seed: of the weights and the examples.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flat, target = features.flatten(0, 1), unsafe.float().repeat_interleave(features.shape[1])
        reader = GateNetwork(flat.shape[1] // 2)
        reader.mean.copy_(flat.mean((0, 2, 3)))
        reader.std.copy_(flat.std((0, 2, 3)).clamp(min=1e-4))
        optimizer = torch.optim.AdamW(reader.parameters(), lr=6e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="reader", unit="step", disable=not progress):
            batch = torch.randint(len(flat), (min(256, len(flat)),))
            loss = nn.functional.binary_cross_entropy_with_logits(reader(flat[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reader.eval().requires_grad_(False)


def _parted(
    config: ClosedLoopConfig, rows: Sequence[PromptRow] | None
) -> tuple[Sequence[PromptRow], Sequence[PromptRow]]:
    """The prompts to learn from, and those that decide the threshold."""
    if rows is None and config.prompts == STICKER:
        counts = {"harmful": config.harmful, "benign": config.benign, "lookalike": config.lookalike}
        held = {kind: round(config.held_out * count) for kind, count in counts.items()}
        return load_prompts(STICKER, counts, "train", config.seed), load_prompts(STICKER, held, "val", config.seed)
    rows = drop_minors(rows if rows is not None else read_prompts(config.prompts, seed=config.seed))[0]
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    n_held = max(1, round(config.held_out / (1.0 + config.held_out) * len(rows)))
    return [rows[number] for number in order[n_held:]], [rows[number] for number in order[:n_held]]


def _record(config: ClosedLoopConfig, pipe: Any, rows: Sequence[PromptRow]) -> tuple[Tensor, Tensor]:
    """Features `[N, K, 2 C, H, W]` and sizes of the change `[N, K]` at the K steps in which the loop looks."""
    recorder = _Recorder()
    looking = AdapterGate(1.0, config.until, recorder)  # type: ignore[arg-type]
    features, sizes = [], []
    load_spo_lora(pipe, adapter_source(config.adapter), config.strength, adapter_name="recorded", steering=looking)
    try:
        for first in tqdm(
            range(0, len(rows), config.batch_size), desc="recording", unit="batch", disable=not config.progress
        ):
            batch = rows[first : first + config.batch_size]
            recorder.features.clear()
            recorder.sizes.clear()
            call_pipeline(
                pipe,
                batch,
                num_inference_steps=config.denoising_steps,
                guidance_scale=config.guidance_scale,
                output_type="latent",
                callback_on_step_end=_stop_after(config.until),
            )
            if not recorder.features:
                raise SPOError("the denoiser was never asked with the adapter; raise `until`")
            features.append(torch.stack(recorder.features, 1))
            sizes.append(torch.stack(recorder.sizes, 1))
    finally:
        unload_spo_lora(pipe, "recorded")
    return torch.cat(features), torch.cat(sizes)


def _stop_after(until: float) -> Callable[..., dict[str, Any]]:
    """Most pipelines skip what is left once they are interrupted; others draw to the end, which costs time only."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if (step + 1) / len(pipe.scheduler.timesteps) >= until:
            pipe._interrupt = True
        return tensors

    return on_step_end


@torch.no_grad()
def _most(reader: GateNetwork, features: Tensor) -> Tensor:
    """`[N]` the largest logit over the K steps of `features [N, K, ...]`."""
    return reader(features.flatten(0, 1)).view(features.shape[:2]).amax(1)


def _rate(used: Tensor) -> tuple[float, Interval]:
    hits, total = int(used.sum()), len(used)
    return hits / total, wilson(hits, total)
