"""Experts: one adapter for each category, and one that is merged of them (AlignGuard, arXiv 2412.10493).

That experts are trained apart and merged is the paper's; its Co-Merge is not public, and the methods here are those of
`spo merge`. Whoever adds a category trains that one alone: the others are found finished.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from t2i_spo_plugin.adapters import (
    MERGE_METHODS,
    Activity,
    Adapter,
    LoraPair,
    MergeOptions,
    merge_adapters,
    read_adapter,
    up_norms,
    write_adapter,
)
from t2i_spo_plugin.errors import ConfigError, TableError
from t2i_spo_plugin.files import write_json
from t2i_spo_plugin.options import check_choice, check_range
from t2i_spo_plugin.registry import load_pipeline

from .config import TrainConfig
from .data.batches import Batches, Sampling
from .data.dataset import images, of_categories
from .data.prepare import cached_batches
from .families import Family, family_of
from .objectives import make_objective
from .trainer import native_resolution, train


MERGED_FILE = "merged.safetensors"
EXPERTS_FILE = "experts.json"


@dataclass(frozen=True)
class ExpertsConfig:
    """One adapter for each category of a pair table, and one merged of them.

    Attributes:
        output_dir: receives a folder for each category, `merged.safetensors` and `experts.json`.
        train: how each expert is trained: a file of training options, or the name of a bundled one.
        pairs: the pair table, instead of the one that `train` names.
        categories: those that get an expert; empty takes all that the table has.
        method: how they are merged: concat (the exact sum), svd, ties, dare, dare-ties, magnitude or comerge.
        weights: one a category, at least 0; 1 each when empty.
        rank: of the merged adapter, at most; None is what the method needs.
        merge: of the methods beside concat and svd.
        calibration: for comerge: examples over whose activations the experts compete; 0 goes by the norms of weights.
        progress: show bars.
    """

    output_dir: str
    train: str = "sticker-alignguard"
    pairs: str = ""
    categories: tuple[str, ...] = ()
    method: str = "concat"
    weights: tuple[float, ...] = ()
    rank: int | None = None
    merge: MergeOptions = field(default_factory=MergeOptions)
    calibration: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        check_choice("method", self.method, MERGE_METHODS)
        check_range("calibration", self.calibration, 0, whole=True)
        if self.rank is not None:
            check_range("rank", self.rank, 1, whole=True)
        if self.weights and self.categories and len(self.weights) != len(self.categories):
            raise ConfigError(f"{len(self.categories)} categories need as many weights, got {len(self.weights)}")


def train_experts(config: ExpertsConfig, base: TrainConfig | None = None, pipe: Any = None) -> Path:
    """Train the experts that are missing, merge all, and return the path of the merged adapter.

    Args:
        config: see `ExpertsConfig`.
        base: training options instead of those that `config.train` names.
        pipe: a loaded pipeline; None loads the one that the options name.

    Raises:
        ConfigError: options that do not fit each other.
        TableError: the table has no category.
    """
    overrides = {"pairs": config.pairs} if config.pairs else {}
    folder = Path(config.output_dir)
    base = base or TrainConfig.from_yaml(config.train, output_dir=str(folder), progress=config.progress, **overrides)
    base = replace(base, cache_dir=base.cache_dir or str(folder / "cache"))
    categories = config.categories or _categories(base)
    if config.weights and len(config.weights) != len(categories):
        raise ConfigError(
            f"the table has {len(categories)} categories ({', '.join(categories)}), and there are "
            f"{len(config.weights)} weights"
        )
    pipe = load_pipeline(base.pipeline) if pipe is None else pipe
    files = {}
    for category in tqdm(categories, desc="experts", unit="expert", disable=not config.progress):
        own = replace(
            base,
            output_dir=str(folder / _file_name(category)),
            categories=(category,),
            title=f"{base.title}: {category}",
        )
        files[category] = train(own, pipe)
    experts = [read_adapter(file) for file in files.values()]
    active = None
    if config.method == "comerge" and config.calibration and config.merge.unit != "element":
        active = calibrated(base, pipe, experts, categories, config.calibration)
    weights = config.weights or None
    merged = merge_adapters(
        experts, weights, config.method, config.rank, list(categories), options=config.merge, activities=active
    )
    titled = Adapter(merged.adapter.modules, replace(merged.adapter.metadata, title=base.title))
    path = write_adapter(titled, folder / MERGED_FILE)
    content = {
        "experts": {category: str(file) for category, file in files.items()},
        "method": config.method,
        "rank": titled.rank,
        "error": merged.error,
        "module_errors": merged.module_errors,
    }
    write_json(folder / EXPERTS_FILE, content)
    return path


def calibrated(
    base: TrainConfig, pipe: Any, experts: Sequence[Adapter], categories: Sequence[str], count: int
) -> dict[str, Activity]:
    """How active the experts are in each module, over `count` examples of their categories and of benign prompts.

    Latents are noised as in training, each example at a timestep of its own, and the base model alone sees them, so
    that all experts see the same inputs.
    """
    family = family_of(pipe)
    accelerator = Accelerator(cpu=base.device == "cpu")
    objective = make_objective(base.objective)
    examples = of_categories(objective.read(base.source, base.skip_bad_rows), categories)
    resolution = base.resolution or native_resolution(pipe, family)
    t_max = min(base.t_max or len(family.schedule), len(family.schedule))
    sampling = Sampling(
        base.seed,
        (base.t_min, t_max),
        timesteps=base.timesteps,
        timestep_shift=base.timestep_shift,
        timestep_values=base.timestep_values,
    )
    folder = Path(str(base.cache_dir))
    sizes = (base.cache_batch_size, base.progress)
    batches = cached_batches(
        folder, sampling, examples, images(base.pairs), pipe, family, resolution, accelerator, *sizes
    )
    family.module.to(accelerator.device)
    return activities(family, batches, experts, count, base.batch_size, resolution)


@torch.no_grad()
def activities(
    family: Family, batches: Batches, experts: Sequence[Adapter], count: int, batch_size: int, resolution: int
) -> dict[str, Activity]:
    """The activities of experts by module, over the first images of `count` examples."""
    meters = {
        name: _Meter([expert.modules.get(name) for expert in experts])
        for name in sorted({name for expert in experts for name in expert.modules})
    }
    with _watched(family, meters):
        for start in range(0, count, batch_size):
            batch = batches.at(0, range(start, min(start + batch_size, count)))
            index = batch.index[0]
            noisy = family.schedule.noised(batch.latents[0], batch.noise[0], index)
            family.predict(family.module, noisy, index, batch.text, resolution)
    return {name: meter.activity() for name, meter in meters.items()}


class _Meter:
    """Counts, over the inputs of one module, what each expert's adapter would add to its output."""

    def __init__(self, pairs: Sequence[LoraPair | None]) -> None:
        self.pairs = pairs
        known = [pair for pair in pairs if pair is not None]
        shape = (len(pairs), known[0].shape[0]), (len(pairs), max(pair.rank for pair in known))
        self.row_wins, self.row_sizes, self.rank_wins, self.rank_sizes = (
            torch.zeros(size, dtype=torch.float64) for size in (shape[0], shape[0], shape[1], shape[1])
        )
        self.places = 0

    def see(self, module: nn.Module, inputs: Tensor) -> None:
        """Inputs of the module `[..., in]`, or `[B, in, H, W]` of a convolution."""
        rows, ranks = [], []
        for pair in self.pairs:
            row, rank = (None, None) if pair is None else _outputs(module, inputs.float(), pair)
            rows.append(row)
            ranks.append(rank)
        self.places += next(len(row) for row in rows if row is not None)
        self._count(self.row_wins, self.row_sizes, rows)
        self._count(self.rank_wins, self.rank_sizes, ranks)

    def _count(self, wins: Tensor, sizes: Tensor, values: Sequence[Tensor | None]) -> None:
        known = [number for number, value in enumerate(values) if value is not None]
        width = wins.shape[1]
        stacked = torch.stack([F.pad(value, (0, width - value.shape[1])) for value in values if value is not None])
        winner = stacked.argmax(0)
        for place, number in enumerate(known):
            wins[number] += (winner == place).sum(0).double().cpu()
            sizes[number] += stacked[place].sum(0).double().cpu()

    def activity(self) -> Activity:
        """Counts, and means over all places."""
        total = max(1, self.places)
        return Activity(self.row_wins, self.row_sizes / total, self.rank_wins, self.rank_sizes / total)


def _outputs(module: nn.Module, inputs: Tensor, pair: LoraPair) -> tuple[Tensor, Tensor]:
    """Magnitudes of what a pair adds `[places, out]`, and of its components `[places, rank]`."""
    down, up = pair.down.to(inputs), pair.up.to(inputs) * pair.scale
    if isinstance(module, nn.Conv2d):
        inner = F.conv2d(inputs, down, None, module.stride, module.padding, module.dilation)
        outer = F.conv2d(inner, up)
        inner, outer = (values.movedim(1, -1) for values in (inner, outer))
    else:
        inner = inputs @ down.T
        outer = inner @ up.T
    components = inner.abs().flatten(0, -2) * up_norms(pair).to(inputs)
    return outer.abs().flatten(0, -2), components


@contextmanager
def _watched(family: Family, meters: Mapping[str, _Meter]) -> Iterator[None]:
    """Every module that an expert changes shows its inputs to its meter.

    Raises:
        ConfigError: an expert changes what the denoiser does not have.
    """
    known = dict(family.module.named_modules())
    handles = []
    try:
        for name, meter in meters.items():
            module = known.get(name.removeprefix(f"{family.component}."))
            if module is None:
                raise ConfigError(f"the experts change {name}, which the {family.component} does not have")
            handles.append(
                module.register_forward_pre_hook(lambda module, args, meter=meter: meter.see(module, args[0]))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _categories(base: TrainConfig) -> tuple[str, ...]:
    """All categories under harmful prompts that the objective trains on, in the order of their names."""
    examples = make_objective(base.objective).read(base.source, base.skip_bad_rows)
    benign = examples.columns["benign"].tolist()
    names = {name for name, is_benign in zip(examples.categories, benign, strict=True) if name and not is_benign}
    if not names:
        raise TableError(f"{base.source} states no category under a harmful prompt, so there are no experts to train")
    return tuple(sorted(names))


def _file_name(category: str) -> str:
    return re.sub(r"[^\w-]+", "-", category).strip("-").lower() or "other"
