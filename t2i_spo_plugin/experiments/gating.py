"""Constant strengths, windows and adapter gates compared on the sticker world.

`python -m t2i_spo_plugin.experiments.gating` generates images of the same harmful and benign test prompts with each,
lets the referee judge them, counts the benign images that are the base model's own, and plots safety against what
benign prompts keep. A run that was stopped goes on where it was; `--stored steering.json` prints and plots the numbers
of an earlier one.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np

from t2i_spo_plugin import sticker
from t2i_spo_plugin.data import with_seeds
from t2i_spo_plugin.errors import ConfigError, require_extra
from t2i_spo_plugin.eval import (
    EvalConfig,
    GenerationOptions,
    System,
    SystemSummary,
    adapter_system,
    base_system,
    generate_and_score,
    image_path,
    load_judges,
    paired_difference,
    rate_text,
    summarise_run,
    versions,
)
from t2i_spo_plugin.files import folder_hash, write_bytes, write_json
from t2i_spo_plugin.gating import FULL_WINDOW, AdapterGate
from t2i_spo_plugin.images import open_image
from t2i_spo_plugin.metrics import Rate
from t2i_spo_plugin.options import read_options
from t2i_spo_plugin.registry import PIPELINES, STICKER, load_pipeline, load_prompts, name_with_revision


CONSTANT, GATE, NORM_GATE = "strength 1", "adapter gate", "adapter gate, by norm"


@dataclass(frozen=True)
class GatingConfig:
    """What is compared.

    Attributes:
        out: folder for images, tables, `steering.json` and `steering.svg`.
        stored: a `steering.json` that is printed and plotted again; nothing is generated.
        n_harmful: harmful prompts of the test split in each wording class.
        n_benign: benign prompts of the test split in each wording class.
        wordings: wording classes of the prompts, by which results are printed.
        seeds_per_prompt: images of each prompt.
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
        batch_size: images generated at once.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        progress: show progress bars.
    """

    out: Path = Path("runs/steering")
    stored: Path | None = None
    n_harmful: int = 125
    n_benign: int = 125
    wordings: tuple[str, ...] = ("grammar", "sentences")
    seeds_per_prompt: int = 4
    steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 8
    seed: int = 0
    resamples: int = 2000
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("n_harmful", "n_benign", "seeds_per_prompt", "steps", "batch_size", "resamples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.wordings:
            raise ConfigError("wordings must name at least one wording class")


def run_gating(config: GatingConfig) -> dict[str, Any]:
    """Generate and judge with every system; returns what `steering.json` holds, and writes it."""
    counts = {"harmful": config.n_harmful, "benign": config.n_benign}
    prompts = load_prompts(STICKER, counts, "test", config.seed, wordings=config.wordings)
    rows = with_seeds(prompts, config.seeds_per_prompt)
    judges = load_judges(EvalConfig(judge="referee"))
    pipe, name = load_pipeline(STICKER), name_with_revision(PIPELINES, STICKER)
    options = GenerationOptions(config.steps, config.guidance_scale, config.batch_size, progress=config.progress)
    scores = generate_and_score(pipe, gated_systems(), rows, judges, config.out, options)
    summary = summarise_run(scores, judges, resamples=config.resamples, seed=config.seed)
    same = {name: _same_images(config.out, part, scores["base"]) for name, part in scores.items()}
    against = scores[CONSTANT]
    content: dict[str, Any] = {
        "systems": {name: _numbers(one, same[name]) for name, one in summary.systems.items()},
        "differences": {
            name: _difference(scores[name], against)
            | {"by_wording": {w: _difference(scores[name], against, w) for w in config.wordings}}
            for name in (GATE, NORM_GATE)
        },
        "metadata": {
            "options": {
                key: value for key, value in asdict(config).items() if key not in ("out", "stored", "progress")
            },
            "pipeline": name,
            "adapter gate": folder_hash(sticker.gate_path()),
            "versions": versions(),
        },
    }
    write_json(config.out / "steering.json", content)
    return content


def gated_systems() -> list[System]:
    """The base, and the bundled adapter with every strength, window and gate that is compared."""
    return [
        base_system(),
        adapter_system(CONSTANT, sticker.adapter_path("spo")),
        *(adapter_system(f"strength {s:g}", sticker.adapter_path("spo"), s) for s in (0.75, 0.5)),
        _gated(GATE, steering=sticker.load_adapter_gate()),
        _gated(NORM_GATE, steering=sticker.load_adapter_gate("norm")),
        _gated("window 0 to 0.5", window=(0.0, 0.5)),
        _gated("window 0.2 to 1", window=(0.2, 1.0)),
    ]


def results_text(content: Mapping[str, Any]) -> str:
    """The numbers as lines of text."""
    lines = [f"{'':<24}{'unsafe (IP)':<24}{'objects, of the base':<28}{'base images':<24}UAScore"]
    for name, one in content["systems"].items():
        cells = [rate_text(one[key]) if one[key] else "" for key in ("ip", "recognised_relative", "identical")]
        score = one["uascore"]
        low, high = score["interval"]
        lines.append(
            f"{name:<24}{cells[0]:<24}{cells[1]:<28}{cells[2]:<24}{score['value']:.1f} [{low:.1f}, {high:.1f}]"
        )
        for wording, part in one.get("by_wording", {}).items():
            lines.append(f"  {wording:<22}{rate_text(part['ip']):<52}{rate_text(part['identical'])}")
    lines.append(f"IP differences from {CONSTANT} in points, paired over prompts:")
    for name, one in content["differences"].items():
        low, high = (100 * end for end in one["interval"])
        lines.append(f"  {name}: {100 * one['value']:+.1f} [{low:+.1f}, {high:+.1f}]")
        for wording, part in one.get("by_wording", {}).items():
            low, high = (100 * end for end in part["interval"])
            lines.append(f"    {wording}: {100 * part['value']:+.1f} [{low:+.1f}, {high:+.1f}]")
    return "\n".join(lines)


def plot(systems: Mapping[str, Mapping[str, Any]]) -> bytes:
    """IP against what benign prompts keep of the base's objects, with 95 % intervals, as one SVG; equal for equal
    numbers.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require_extra("matplotlib", "eval")
    figure_class = require_extra("matplotlib.figure", "eval").Figure

    # Text stays text, and neither ids nor a date differ from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gating", "font.family": "sans-serif"}):
        figure = figure_class(figsize=(8.0, 4.8), layout="constrained")
        axes = figure.subplots()
        for (name, one), marker in zip(systems.items(), cycle("oDDDsP^v"), strict=False):
            relative = one["recognised_relative"] or {"value": 1.0, "interval": [1.0, 1.0]}
            axes.errorbar(
                100 * relative["value"],
                100 * one["ip"]["value"],
                xerr=_whisker(relative),
                yerr=_whisker(one["ip"]),
                marker=marker,
                markersize=6,
                elinewidth=1,
                linestyle="none",
                label=name,
            )
        axes.set_xlabel("benign prompts: objects recognised, relative to the base (%)")
        axes.set_ylabel("harmful prompts: unsafe images, IP (%)")
        axes.set_ylim(bottom=0)
        axes.grid(color="#e2e0db", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _whisker(rate: Mapping[str, Any]) -> list[list[float]]:
    """How far the interval reaches below and above the value, in percent, as matplotlib takes it."""
    low, high = rate["interval"]
    return [[100 * (rate["value"] - low)], [100 * (high - rate["value"])]]


def _gated(name: str, window: tuple[float, float] = FULL_WINDOW, steering: AdapterGate | None = None) -> System:
    @contextmanager
    def prepare(pipe: Any) -> Iterator[Any]:
        from t2i_spo_plugin.pipelines import enable_spo

        enabled = enable_spo(pipe)
        enabled.load_spo_lora(sticker.adapter_path("spo"), window=window, steering=steering, adapter_name="evaluated")
        try:
            yield enabled
        finally:
            enabled.unload_spo_lora("evaluated")

    metadata: dict[str, Any] = {"window": list(window)}
    if steering is not None:
        score: Literal["network", "norm"] = "norm" if steering.network is None else "network"
        metadata |= {"threshold": steering.threshold, "until": steering.until, "score": score}
        metadata["gate_hash"] = folder_hash(sticker.gate_path(score))
    return System(name, prepare, metadata | {"adapter_hash": folder_hash(sticker.adapter_path("spo"))})


def _same_images(
    out: Path, rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, bool]]:
    """Wording class and prompt of each benign image, and whether it is pixel for pixel the base model's."""
    pairs = [(a, b) for a, b in zip(rows, base, strict=True) if a["kind"] == "benign"]
    same = []
    for a, b in pairs:
        mine, theirs = image_path(out, a), image_path(out, b)
        equal = bool(mine and theirs) and np.array_equal(_pixels(mine), _pixels(theirs))
        same.append((a["wording"], a["prompt_id"], equal))
    return same


def _difference(
    rows: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], wording: str = ""
) -> dict[str, Any]:
    """IP of `rows` minus that of `other`, by the referee, paired over prompts; of one wording class or of all."""
    pairs = [
        (a, b)
        for a, b in zip(rows, other, strict=True)
        if a["kind"] == "harmful" and wording in ("", a["wording"]) and not a["not_scored"] and not b["not_scored"]
    ]
    first, second = ([row["referee_unsafe"] for row in part] for part in zip(*pairs, strict=True))
    return paired_difference(first, second, [row["prompt_id"] for row, _ in pairs])


def _pixels(path: Path | None) -> np.ndarray:
    assert path is not None
    return np.asarray(open_image(path))


def _numbers(summary: SystemSummary, same: Sequence[tuple[str, str, bool]]) -> dict[str, Any]:
    assert summary.referee_ip is not None and summary.referee_score is not None
    assert summary.referee_unsafe_prompts is not None
    relative = summary.recognised_relative.get("benign")
    score = summary.referee_score
    return {
        "ip": summary.referee_ip.to_dict(),
        "unsafe_prompts": summary.referee_unsafe_prompts.to_dict(),
        "recognised_relative": {"value": relative.value, "interval": list(relative.interval)} if relative else None,
        "identical": Rate.of((prompt, equal) for _, prompt, equal in same).to_dict(),
        "uascore": {"value": score.uascore, "interval": list(score.interval)},
        "by_wording": {
            wording: one.to_dict()
            | {"identical": Rate.of((prompt, equal) for name, prompt, equal in same if name == wording).to_dict()}
            for wording, one in summary.by_wording.items()
        },
    }


def main(args: Sequence[str]) -> None:
    """Run the comparison, or read a stored one; print its numbers and write their plot."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = read_options(GatingConfig, args, "python -m t2i_spo_plugin.experiments.gating")
    stored = config.stored
    content = run_gating(config) if stored is None else json.loads(stored.read_text(encoding="utf-8"))
    print(results_text(content))
    write_bytes(config.out / "steering.svg", plot(content["systems"]))


if __name__ == "__main__":
    main(sys.argv[1:])
