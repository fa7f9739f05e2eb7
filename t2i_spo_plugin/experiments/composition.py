"""Does benign fine-tuning bring back what was suppressed, and does composing keep it away? On the sticker world.

`python -m t2i_spo_plugin.experiments.composition` generates images of the same test prompts with the base, the bundled
safety adapter, a style adapter alone, both side by side, and a model into whose weights the safety adapter was fused
before it was fine-tuned on the style's images. The referee judges. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i_spo_plugin import sticker
from t2i_spo_plugin.data import GeneratedImage, PromptRow, generate
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.eval import Rate, RefereeBatch, image_sheet, judge, paired_difference, rate_text, versions
from t2i_spo_plugin.files import folder_hash, write_json
from t2i_spo_plugin.metrics import bootstrap_ratio
from t2i_spo_plugin.options import read_options
from t2i_spo_plugin.pipelines import CombinedStrength, combined_strength, compose, load_spo_lora
from t2i_spo_plugin.sticker.build.style import STYLE_COLOUR, write_images
from t2i_spo_plugin.training import TrainConfig, train


SAFETY, STYLE, BOTH, TUNED = "spo", "style", "spo + style", "aligned, then tuned"


@dataclass(frozen=True)
class StudyConfig:
    """What the study generates.

    Attributes:
        out: folder for images, the fine-tune's training, `composition.json` and `sheet.png`.
        n_harmful: harmful prompts of the test split; unsafe images are counted on them.
        n_benign: benign prompts of the test split; requested objects and the style are counted on them.
        n_strength: of those, prompts that are generated at every one of `strengths`.
        strengths: of both adapters together, to find from which on they are too strong.
        fine_tune_steps: of the aligned model's fine-tune; None is as long as the style adapter's.
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
        batch_size: images generated at once.
        progress: show progress bars.
    """

    out: Path = Path("runs/composition")
    n_harmful: int = 500
    n_benign: int = 100
    n_strength: int = 40
    strengths: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0)
    fine_tune_steps: int | None = None
    steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 16
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("n_harmful", "n_benign", "n_strength", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_strength > self.n_benign:
            raise ConfigError(f"n_strength {self.n_strength} is more than the {self.n_benign} benign prompts")


@dataclass(frozen=True)
class SystemImages:
    """A system's images and what they show; every list follows the same prompts."""

    images: list[GeneratedImage]
    referee: RefereeBatch
    styled: list[bool]

    def unsafe(self) -> list[bool]:
        """Whether each image of a harmful prompt is unsafe."""
        flags = self.referee.unsafe.tolist()
        return [flag for flag, image in zip(flags, self.images, strict=True) if image.row.kind == "harmful"]

    def recognised(self) -> list[tuple[str, int, int]]:
        """Prompt id, requested objects recognised, and requested, for each image of a benign prompt."""
        pairs = zip(self.images, self.referee.objects, strict=True)
        return [
            (image.row.id, len(set(image.row.requested) & set(objects)), len(image.row.requested))
            for image, objects in pairs
            if image.row.kind == "benign"
        ]


def run_study(config: StudyConfig) -> dict[str, Any]:
    """Train the fine-tune, generate and judge with every system; returns what `composition.json` holds.

    Raises:
        NotScoredError: the base shows none of the objects that were asked for (too few denoising steps, say).
    """
    rows = [*sticker.prompt_rows("harmful", config.n_harmful), *sticker.prompt_rows("benign", config.n_benign)]
    safety, style = sticker.adapter_path(SAFETY), sticker.adapter_path(STYLE)
    tuned = fine_tune(config)
    base = sticker.load_pipeline
    plans: dict[str, tuple[Callable[[], Any], Mapping[str | Path, float]]] = {
        "base": (base, {}),
        SAFETY: (base, {safety: 1.0}),
        STYLE: (base, {style: 1.0}),
        BOTH: (base, {safety: 1.0, style: 1.0}),
        TUNED: (aligned_pipeline, {tuned: 1.0}),
    }
    referee = sticker.load_referee()
    judged, combined = {}, {}
    for name, (load, adapters) in plans.items():
        judged[name], combined[name] = _judge(name, load(), adapters, rows, config, referee)
    some = [row for row in rows if row.kind == "benign"][: config.n_strength]
    levels: dict[float, Any] = {}
    for level in config.strengths:
        adapters = {safety: level, style: level}
        levels[level] = _judge(f"both at {level:g}", base(), adapters, some, config, referee)
    content = {
        "systems": {name: _numbers(one, combined[name]) for name, one in judged.items()},
        "differences": {f"{name} - {SAFETY}": _difference(judged[name], judged[SAFETY]) for name in (BOTH, TUNED)},
        "strengths": {
            f"{level:g}": _level(one, judged["base"], together) for level, (one, together) in levels.items()
        },
        "metadata": {
            "options": {key: value for key, value in asdict(config).items() if key not in ("out", "progress")},
            "adapters": {path.name: folder_hash(path) for path in (safety, style, tuned)},
            "fine-tune": json.loads(tuned.with_name("report.json").read_text(encoding="utf-8"))["config"],
            "versions": versions(),
        },
    }
    write_json(config.out / "composition.json", content)
    contact_sheet(judged).save(config.out / "sheet.png")
    return content


def fine_tune(config: StudyConfig) -> Path:
    """Fine-tune the aligned model on the style's benign images, with the style adapter's own configuration."""
    options = TrainConfig.from_yaml("sticker-style")
    write_images(Path(options.images))
    options = replace(
        options,
        output_dir=str(config.out / "fine-tune"),
        steps=config.fine_tune_steps or options.steps,
        progress=config.progress,
        tensorboard=False,
    )
    return train(options, aligned_pipeline())


def aligned_pipeline() -> Any:
    """The bundled pipeline with the safety adapter fused into its weights: nothing marks it as an adapter any more."""
    pipe = sticker.load_pipeline()
    load_spo_lora(pipe, sticker.adapter_path(SAFETY))
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    return pipe


def contact_sheet(judged: Mapping[str, SystemImages], count: int = 3) -> Image.Image:
    """One column a system, one prompt a row, none on green, which hides the style.

    The rows: the first `count` harmful prompts, the first on which only the fine-tuned one of the aligned systems is
    unsafe (chosen for that, and called so in docs/results.md), and the first benign ones.
    """
    first = judged["base"].images
    visible = [number for number, image in enumerate(first) if not _on_green(image)]
    harmful = [number for number in visible if first[number].row.kind == "harmful"]
    unsafe = {name: one.referee.unsafe.tolist() for name, one in judged.items()}
    again = [n for n in harmful if unsafe[TUNED][n] and not unsafe[BOTH][n] and not unsafe[SAFETY][n]]
    chosen = harmful[:count] + [number for number in again if number not in harmful[:count]][:count]
    chosen += [number for number in visible if first[number].row.kind == "benign"][:count]
    rows = [[one.images[number].open() for one in judged.values()] for number in chosen]
    captions = [["unsafe" if unsafe[name][number] else "" for name in judged] for number in chosen]
    return image_sheet(rows, list(judged), captions, row_titles=[first[number].row.prompt for number in chosen])


def results_text(content: Mapping[str, Any]) -> str:
    """The numbers as lines of text."""
    lines = [f"{'':<20}{'unsafe (IP)':<24}{'objects recognised':<24}{'in the style':<24}combined strength"]
    for name, one in content["systems"].items():
        cells = [rate_text(one[key]) for key in ("ip", "recognised", "styled")]
        lines.append(f"{name:<20}{cells[0]:<24}{cells[1]:<24}{cells[2]:<24}{one['combined_strength']:.2f}")
    lines.append("IP differences in points, paired over prompts:")
    for name, one in content["differences"].items():
        low, high = (100 * end for end in one["interval"])
        lines.append(f"  {name}: {100 * one['value']:+.1f} [{low:+.1f}, {high:+.1f}]")
    lines.append(
        "both adapters at one strength: combined, change of the weights, objects recognised relative to the base"
    )
    for level, one in content["strengths"].items():
        lines.append(
            f"  {level:<6}{one['combined_strength']:<8.2f}{one['change']:<8.3f}{rate_text(one['recognised_relative'])}"
        )
    return "\n".join(lines)


def _judge(
    name: str,
    pipe: Any,
    adapters: Mapping[str | Path, float],
    rows: Sequence[PromptRow],
    config: StudyConfig,
    referee: Any,
) -> tuple[SystemImages, CombinedStrength]:
    """Images of `rows` with `adapters` on `pipe`, judged by the referee, and how far the weights were moved."""
    if config.progress:
        print(name, file=sys.stderr)
    if adapters:
        with warnings.catch_warnings():
            # What too much strength does is measured here.
            warnings.filterwarnings("ignore", message=".*together they move the weights")
            compose(pipe, adapters)
    report = generate(
        pipe,
        rows,
        config.out / "images" / re.sub(r"\W+", "-", name),
        batch_size=config.batch_size,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        progress=config.progress,
        metadata={"system": name, "adapters": {folder_hash(path): strength for path, strength in adapters.items()}},
    )
    images = [image.open() for image in report.images]
    styled = [in_style(np.asarray(image)) for image in images]
    return SystemImages(list(report.images), judge(referee, images), styled), combined_strength(pipe)


def in_style(image: np.ndarray) -> bool:
    """Whether the lowest rows of `image` `[H, W, 3]` are mostly the style's green, within 25 of 255."""
    rows = image[-image.shape[0] // 16 :].reshape(-1, 3).astype(int)
    return bool((np.abs(np.median(rows, axis=0) - STYLE_COLOUR) <= 25).all())


def _on_green(image: GeneratedImage) -> bool:
    """Whether the prompt asks for a green background, on which the style cannot be seen."""
    return " green background" in image.row.prompt


def _numbers(one: SystemImages, combined: CombinedStrength) -> dict[str, Any]:
    objects, unsafe = one.recognised(), one.unsafe()
    plain = [styled for styled, image in zip(one.styled, one.images, strict=True) if not _on_green(image)]
    return {
        "ip": Rate(sum(unsafe), len(unsafe)).to_dict(),
        "recognised": Rate(sum(hits for _, hits, _ in objects), sum(requested for *_, requested in objects)).to_dict(),
        "styled": Rate(sum(plain), len(plain)).to_dict(),
        "combined_strength": combined.value,
        "change": combined.change,
    }


def _difference(one: SystemImages, other: SystemImages) -> dict[str, Any]:
    """IP of `one` minus that of `other`, paired over prompts."""
    ids = [image.row.id for image in one.images if image.row.kind == "harmful"]
    return paired_difference(one.unsafe(), other.unsafe(), ids)


def _level(one: SystemImages, base: SystemImages, combined: CombinedStrength) -> dict[str, Any]:
    """Requested objects recognised relative to the base's, on the prompts that both have."""
    of_base = {name: hits for name, hits, _ in base.recognised()}
    objects = one.recognised()
    ids, above, below = [n for n, *_ in objects], [hits for _, hits, _ in objects], [of_base[n] for n, *_ in objects]
    interval = bootstrap_ratio(above, below, ids)  # Refuses a base that shows nothing of what was asked for.
    relative = {"value": sum(above) / sum(below), "interval": list(interval), "n": len(ids)}
    return {"combined_strength": combined.value, "change": combined.change, "recognised_relative": relative}


def main(args: Sequence[str]) -> None:
    """Run the study and print its numbers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(results_text(run_study(read_options(StudyConfig, args, "python -m t2i_spo_plugin.experiments.composition"))))


if __name__ == "__main__":
    main(sys.argv[1:])
