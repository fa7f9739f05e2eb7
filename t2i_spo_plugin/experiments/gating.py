"""Constant strengths, windows and adapter gates compared on the sticker world.

`python -m t2i_spo_plugin.experiments.gating` draws the same harmful and benign test prompts with each, lets the
referee look, counts the benign images that are the base model's own, and draws safety against what benign prompts
keep. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import html
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i_spo_plugin import sticker
from t2i_spo_plugin.eval import (
    EvalConfig,
    GenerationOptions,
    Rate,
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
from t2i_spo_plugin.files import folder_hash
from t2i_spo_plugin.gating import FULL_WINDOW, AdapterGate
from t2i_spo_plugin.options import read_options
from t2i_spo_plugin.registry import PIPELINES, STICKER, load_pipeline, load_prompts, name_with_revision


CONSTANT, READER, SIZE = "strength 1", "adapter gate", "adapter gate, by size"


@dataclass(frozen=True)
class SteeringConfig:
    """What the comparison draws.

    Attributes:
        out: folder for images, tables, `steering.json` and `steering.svg`.
        n_harmful: harmful prompts of the test split.
        n_benign: benign prompts of the test split.
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
        batch_size: images drawn at once.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        progress: show progress bars.
    """

    out: Path = Path("runs/steering")
    n_harmful: int = 500
    n_benign: int = 500
    steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 8
    seed: int = 0
    resamples: int = 2000
    progress: bool = True


def run_steering(config: SteeringConfig) -> dict[str, Any]:
    """Draw and judge every system; returns what `steering.json` holds, and writes it with the plot."""
    counts = {"harmful": config.n_harmful, "benign": config.n_benign}
    rows = load_prompts(STICKER, counts, "test", config.seed)
    judges = load_judges(EvalConfig(judge="referee"))
    pipe, name = load_pipeline(STICKER), name_with_revision(PIPELINES, STICKER)
    options = GenerationOptions(config.steps, config.guidance_scale, config.batch_size, progress=config.progress)
    scores = generate_and_score(pipe, steered_systems(), rows, judges, config.out, options, name)
    summary = summarise_run(scores, judges, resamples=config.resamples, seed=config.seed)
    same = {name: _same_images(config.out, part, scores["base"]) for name, part in scores.items()}
    content: dict[str, Any] = {
        "systems": {name: _numbers(one, same[name]) for name, one in summary.systems.items()},
        "differences": {name: _difference(scores[name], scores[CONSTANT]) for name in (READER, SIZE)},
        "metadata": {
            "options": {key: value for key, value in asdict(config).items() if key not in ("out", "progress")},
            "pipeline": name,
            "adapter gate": folder_hash(sticker.gate_path()),
            "versions": versions(),
        },
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (config.out / "steering.json").write_text(text + "\n", encoding="utf-8")
    (config.out / "steering.svg").write_text(plot(content["systems"]), encoding="utf-8")
    return content


def steered_systems() -> list[System]:
    """The base, and the bundled adapter steered in every way that is compared."""
    return [
        base_system(),
        adapter_system(CONSTANT, sticker.adapter_path("spo")),
        *(adapter_system(f"strength {s:g}", sticker.adapter_path("spo"), s) for s in (0.75, 0.5)),
        _steered(READER, steering=sticker.load_adapter_gate()),
        _steered(SIZE, steering=sticker.load_adapter_gate("size")),
        _steered("window 0 to 0.5", window=(0.0, 0.5)),
        _steered("window 0.2 to 1", window=(0.2, 1.0)),
    ]


def report(content: Mapping[str, Any]) -> str:
    """The numbers as lines of text."""
    lines = [f"{'':<24}{'unsafe (IP)':<24}{'objects, of the base':<28}{'base images':<24}UAScore"]
    for name, one in content["systems"].items():
        cells = [rate_text(one[key]) if one[key] else "" for key in ("ip", "recognised_relative", "identical")]
        score = one["uascore"]
        low, high = score["interval"]
        lines.append(
            f"{name:<24}{cells[0]:<24}{cells[1]:<28}{cells[2]:<24}{score['value']:.1f} [{low:.1f}, {high:.1f}]"
        )
    lines.append(f"IP differences from {CONSTANT} in points, paired over prompts:")
    for name, one in content["differences"].items():
        low, high = (100 * end for end in one["interval"])
        lines.append(f"  {name}: {100 * one['value']:+.1f} [{low:+.1f}, {high:+.1f}]")
    return "\n".join(lines)


def plot(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """IP against what benign prompts keep of the base's objects, with 95 % intervals, as one SVG."""
    width, height, left, bottom, top, right = 760, 460, 62, 48, 18, 16
    shown = {
        name: (one["recognised_relative"] or {"value": 1.0, "interval": [1.0, 1.0]}, one["ip"])
        for name, one in systems.items()
    }
    low = min(kept["interval"][0] for kept, _ in shown.values())
    start, end = np.floor(20 * low) / 20, max(1.01, max(kept["interval"][1] for kept, _ in shown.values()) + 0.005)

    def x(value: float) -> float:
        return left + (value - start) / (end - start) * (width - left - right)

    def y(value: float) -> float:
        return top + (1.0 - value) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13" fill="#1d1f23"><rect width="100%" height="100%" fill="#fbfaf8"/>'
    ]
    for tick in np.arange(0.0, 1.01, 0.2):
        parts.append(f'<path d="M{left} {y(tick):.1f}H{width - right}" stroke="#e2e0db"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.0f} %</text>')
    for tick in np.arange(start, end, 0.05 if end - start < 0.4 else 0.1):
        parts.append(f'<path d="M{x(tick):.1f} {top}V{height - bottom}" stroke="#e2e0db"/>')
        parts.append(
            f'<text x="{x(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{100 * tick:.0f} %</text>'
        )
    parts.append(
        f'<text x="{(left + width) / 2}" y="{height - 10}" text-anchor="middle">benign prompts: objects recognised, '
        "relative to the base</text>"
    )
    parts.append(
        f'<text transform="translate(15 {height / 2}) rotate(-90)" text-anchor="middle">harmful prompts: unsafe '
        "images (IP)</text>"
    )
    points = {name: (x(kept["value"]), y(ip["value"])) for name, (kept, ip) in shown.items()}
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in points.values()]
    for name, (kept, ip) in shown.items():
        colour = "#1b6b3a" if name.startswith("closed") else "#1d1f23" if name == "base" else "#2b5fb4"
        px, py = points[name]
        (k0, k1), (i0, i1) = kept["interval"], ip["interval"]
        parts.append(
            f'<path d="M{x(k0):.1f} {py:.1f}H{x(k1):.1f}M{px:.1f} {y(i0):.1f}V{y(i1):.1f}" stroke="{colour}" '
            'stroke-width="1.5" opacity="0.5"/>'
        )
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{colour}"/>')
        tx, ty = _label_place(px, py, 7.0 * len(name), taken, (left, top, width - right, height - bottom))
        parts.append(f'<text x="{tx:.1f}" y="{ty:.1f}" fill="{colour}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


Box = tuple[float, float, float, float]


def _label_place(px: float, py: float, length: float, taken: list[Box], inside: Box) -> tuple[float, float]:
    """Where the text of a point begins: beside it, above or below, where nothing else stands; adds to `taken`."""
    for far in (9, 22, 35):
        for tx in (px + 9, px - 9 - length):
            for ty in (py - far, py + far + 8):
                box = (tx, ty - 11, tx + length, ty + 3)
                free = all(box[2] < o[0] or box[0] > o[2] or box[3] < o[1] or box[1] > o[3] for o in taken)
                if (
                    free
                    and inside[0] <= box[0]
                    and box[2] <= inside[2]
                    and inside[1] <= box[1]
                    and box[3] <= inside[3]
                ):
                    taken.append(box)
                    return tx, ty
    return px + 9, py - 9


def _steered(name: str, window: tuple[float, float] = FULL_WINDOW, steering: AdapterGate | None = None) -> System:
    @contextmanager
    def prepare(pipe: Any) -> Iterator[Any]:
        from t2i_spo_plugin.pipelines import enable_spo

        enabled = enable_spo(pipe)
        enabled.load_spo_lora(sticker.adapter_path("spo"), window=window, steering=steering, adapter_name="evaluated")
        try:
            yield enabled
        finally:
            enabled.unload_spo_lora("evaluated")

    told: dict[str, Any] = {"window": list(window)}
    if steering is not None:
        told |= {"threshold": steering.threshold, "until": steering.until, "reader": steering.reader is not None}
        told["loop_hash"] = folder_hash(sticker.gate_path("reader" if steering.reader else "size"))
    return System(name, prepare, told | {"adapter_hash": folder_hash(sticker.adapter_path("spo"))})


def _same_images(out: Path, rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> Rate:
    """Of the benign images, how many are pixel for pixel the base model's."""
    kept = [(image_path(out, a), image_path(out, b)) for a, b in zip(rows, base, strict=True) if a["kind"] == "benign"]
    same = [bool(a and b) and np.array_equal(_pixels(a), _pixels(b)) for a, b in kept]
    return Rate(sum(same), len(same))


def _difference(rows: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """IP of `rows` minus that of `other`, by the referee, paired over prompts."""
    pairs = [(a, b) for a, b in zip(rows, other, strict=True) if a["kind"] == "harmful"]
    own, others = ([row["referee_unsafe"] for row in part] for part in zip(*pairs, strict=True))
    return paired_difference(own, others, [row["prompt_id"] for row, _ in pairs])


def _pixels(path: Path | None) -> np.ndarray:
    assert path is not None
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _numbers(summary: SystemSummary, same: Rate) -> dict[str, Any]:
    assert summary.referee_ip is not None and summary.referee_score is not None
    relative = summary.recognised_relative.get("benign")
    score = summary.referee_score
    return {
        "ip": summary.referee_ip.to_dict(),
        "recognised_relative": {"value": relative.value, "interval": list(relative.interval)} if relative else None,
        "identical": same.to_dict(),
        "uascore": {"value": score.uascore, "interval": list(score.interval)},
    }


def main(args: Sequence[str]) -> None:
    """Run the comparison and print its numbers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(report(run_steering(read_options(SteeringConfig, args, "python -m t2i_spo_plugin.experiments.gating"))))


if __name__ == "__main__":
    main(sys.argv[1:])
