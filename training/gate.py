"""Train an adapter gate for an adapter: learn from prompts what its change looks like before an unsafe image.

No image is generated: for each prompt the denoising steps of the decision window are taken with the base model, and
the predictions without and with the adapter are recorded. A small network learns to tell harmful from benign prompts
by them; held-out prompts give the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from t2i_spo_plugin.adapters import download_adapter, find_adapter_file
from t2i_spo_plugin.data import PromptRow, call_pipeline, drop_minors, read_prompts
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.files import folder_hash
from t2i_spo_plugin.gating import AdapterGate, GateNetwork, change_features, norm_score, save_adapter_gate
from t2i_spo_plugin.metrics import Interval, percent, wilson
from t2i_spo_plugin.options import expand_home
from t2i_spo_plugin.pipelines import enable_spo, load_spo_lora, unload_spo_lora
from t2i_spo_plugin.registry import STICKER, adapter_source, load_pipeline, load_prompts


@dataclass(frozen=True)
class GateConfig:
    """How an adapter gate is trained, which gives an adapter to the images that are going to be unsafe.

    Attributes:
        adapter: adapter that the gate is for: a bundled one such as `spo`, a file, a folder or a Hub id. It may change
            denoisers only.
        out: .safetensors file to write.
        pipeline: what generates: `sticker` (the bundled one), a diffusers folder, or a Hub id.
        prompts: harmful and benign prompts to learn from: `sticker` (bundled), or a prompt file.
        harmful: number of harmful prompts of the sticker world.
        benign: number of benign prompts of the sticker world.
        lookalike: number of benign prompts of the sticker world that look harmful.
        score: what decides: `network` trains a gate network on the predictions; `norm` takes how much they change, and
            trains nothing.
        max_benign: share of benign prompts that may be gated on; the threshold follows from it.
        until: progress at which the decision window ends; 0.04 is the first of 25 steps.
        strength: strength of the adapter, as it will be used.
        denoising_steps: denoising steps of a whole image, as it will be generated.
        guidance_scale: classifier-free guidance scale, as it will be used.
        batch_size: prompts at a time.
        held_out: prompts that give the threshold and are not trained on, as a share of those that are: of the sticker
            world those of the validation split, of a file any.
        train_steps: training steps of the gate network.
        skip_bad_rows: leave rows of a prompt file out that cannot be used, instead of refusing the file.
        seed: seed of the prompt choice, the split and the training.
        device: where the pipeline runs.
        progress: show progress bars.

    Raises:
        ConfigError: an option out of range.
    """

    adapter: str = "spo"
    out: Path = Path("adapter_gate.safetensors")
    pipeline: str = STICKER
    prompts: str = STICKER
    harmful: int = 3000
    benign: int = 2500
    lookalike: int = 1000
    score: Literal["network", "norm"] = "network"
    max_benign: float = 0.06
    until: float = 0.04
    strength: float = 1.0
    denoising_steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 16
    held_out: float = 0.2
    train_steps: int = 1500
    skip_bad_rows: bool = False
    seed: int = 0
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        expand_home(self)
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
class GateTrainingReport:
    """An adapter gate and what it does on held-out prompts; `str()` prints it.

    Attributes:
        gate: for `load_spo_lora(..., steering=gate)`.
        path: the file that it was written to.
        harmful: share of harmful prompts that are gated on, with its 95 % interval.
        benign: share of benign prompts that are gated on, with its 95 % interval.
        counts: held-out harmful and benign prompts.
    """

    gate: AdapterGate
    path: Path
    harmful: tuple[float, Interval]
    benign: tuple[float, Interval]
    counts: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"{self.path}: threshold {self.gate.threshold:.3f}; on held-out prompts the adapter is used for "
            f"{percent(*self.harmful)} of {self.counts[0]} harmful and {percent(*self.benign)} of {self.counts[1]} "
            "benign ones"
        )


@dataclass
class _Recorder:
    """Stands where a gate network stands, and records the predictions; its own score is 0."""

    features: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    def score(self, without: Tensor, with_adapter: Tensor) -> Tensor:
        self.features.append(change_features(without, with_adapter).cpu())
        self.norms.append(norm_score(without, with_adapter).cpu())
        return torch.zeros(len(without))


def train_gate(config: GateConfig, pipe: Any = None, rows: Sequence[PromptRow] | None = None) -> GateTrainingReport:
    """Record predictions, train the gate network, choose the threshold, and write `config.out`.

    Args:
        config: see `GateConfig`.
        pipe: a loaded pipeline instead of the one that `config` names.
        rows: likewise, the prompts.

    Raises:
        ConfigError: harmful or benign prompts are missing.
        AdapterError: the adapter does not fit, or changes a text encoder.
    """
    source = adapter_source(config.adapter)
    adapter = find_adapter_file(source if Path(source).exists() else download_adapter(str(source)))
    training, held_out = _split(config, rows)
    for part, name in ((held_out, "held-out"), (training, "remaining")):
        if len({row.kind == "harmful" for row in part}) < 2:
            raise ConfigError(f"the {len(part)} {name} prompts are all of one kind; give more harmful and benign ones")
    if pipe is None:
        pipe = load_pipeline(config.pipeline).to(config.device)
    features, norms = _record(config, adapter, enable_spo(pipe), [*training, *held_out])
    unsafe = torch.tensor([row.kind == "harmful" for row in (*training, *held_out)])
    n_training = len(training)
    network = None
    if config.score == "network":
        network = train_gate_network(
            features[:n_training], unsafe[:n_training], config.train_steps, config.seed, config.progress
        )
        # As it will be read from its file.
        network.load_state_dict({name: tensor.half().float() for name, tensor in network.state_dict().items()})
    scores = norms[n_training:].amax(1) if network is None else _highest(network, features[n_training:])
    unsafe = unsafe[n_training:]
    threshold = float(scores[~unsafe].quantile(1.0 - config.max_benign))
    gate = AdapterGate(threshold, config.until, network)
    metadata = {
        "adapter": Path(config.adapter).name,
        "adapter_hash": folder_hash(adapter),
        "score": config.score,
        "strength": f"{config.strength:g}",
    }
    gated_on = gate.is_on(scores)
    n_harmful = int(unsafe.sum())
    path = save_adapter_gate(gate, config.out, metadata)
    counts = n_harmful, len(unsafe) - n_harmful
    return GateTrainingReport(gate, path, _rate(gated_on[unsafe]), _rate(gated_on[~unsafe]), counts)


def train_gate_network(
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
        network = GateNetwork(flat.shape[1] // 2)
        network.mean.copy_(flat.mean((0, 2, 3)))
        network.std.copy_(flat.std((0, 2, 3)).clamp(min=1e-4))
        optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="gate network", unit="step", disable=not progress):
            batch = torch.randint(len(flat), (min(256, len(flat)),))
            loss = nn.functional.binary_cross_entropy_with_logits(network(flat[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def _split(config: GateConfig, rows: Sequence[PromptRow] | None) -> tuple[Sequence[PromptRow], Sequence[PromptRow]]:
    """The prompts to train on, and those that give the threshold."""
    if rows is None and config.prompts == STICKER:
        counts = {"harmful": config.harmful, "benign": config.benign, "lookalike": config.lookalike}
        held = {kind: round(config.held_out * count) for kind, count in counts.items()}
        return load_prompts(STICKER, counts, "train", config.seed), load_prompts(STICKER, held, "val", config.seed)
    if rows is None:
        rows = list(read_prompts(config.prompts, seed=config.seed, skip_bad_rows=config.skip_bad_rows))
    rows = drop_minors(rows)[0]
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    n_held = max(1, round(config.held_out / (1.0 + config.held_out) * len(rows)))
    return [rows[number] for number in order[n_held:]], [rows[number] for number in order[:n_held]]


def _record(config: GateConfig, adapter: Path, pipe: Any, rows: Sequence[PromptRow]) -> tuple[Tensor, Tensor]:
    """Features `[N, K, 2 C, H, W]` and norms of the change `[N, K]` at the K steps of the decision window."""
    recorder = _Recorder()
    gate = AdapterGate(1.0, config.until, recorder)  # type: ignore[arg-type]
    features, norms = [], []
    load_spo_lora(pipe, adapter, config.strength, adapter_name="recorded", steering=gate)
    try:
        for first in tqdm(
            range(0, len(rows), config.batch_size), desc="recording", unit="batch", disable=not config.progress
        ):
            batch = rows[first : first + config.batch_size]
            recorder.features.clear()
            recorder.norms.clear()
            call_pipeline(
                pipe,
                batch,
                num_inference_steps=config.denoising_steps,
                guidance_scale=config.guidance_scale,
                output_type="latent",
                callback_on_step_end=_stop_after(config.until),
            )
            if not recorder.features:
                raise SPOError("no step fell into the decision window; raise `until`")
            features.append(torch.stack(recorder.features, 1))
            norms.append(torch.stack(recorder.norms, 1))
    finally:
        unload_spo_lora(pipe, "recorded")
    return torch.cat(features), torch.cat(norms)


def _stop_after(until: float) -> Callable[..., dict[str, Any]]:
    """Most pipelines skip what is left once they are interrupted; others go on to the end, which costs time only."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if (step + 1) / len(pipe.scheduler.timesteps) >= until:
            pipe._interrupt = True
        return tensors

    return on_step_end


@torch.no_grad()
def _highest(network: GateNetwork, features: Tensor) -> Tensor:
    """`[N]` the highest score over the K steps of `features [N, K, ...]`."""
    return network(features.flatten(0, 1)).view(features.shape[:2]).amax(1)


def _rate(gated_on: Tensor) -> tuple[float, Interval]:
    hits, total = int(gated_on.sum()), len(gated_on)
    return hits / total, wilson(hits, total)
