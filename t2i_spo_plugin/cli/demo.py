"""What `spo demo` does: a small evaluation of the bundled adapter, a sheet of images, and what to try next."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_spo_plugin.errors import ConfigError, SPOError


if TYPE_CHECKING:
    from PIL import Image

    from t2i_spo_plugin.data import PromptRow
    from t2i_spo_plugin.eval import Judges

ADAPTER = "spo"
HALF = "spo-half"
RESULTS = Path(__file__).parents[1] / "sticker" / "results.json"
"""The `summary.json` of the full evaluation, as `spo eval` wrote it."""
FULL_RUN = ("eval", "--adapters", "spo", "dpo", "--judge", "referee", "--wordings", "all")
SHEET = "sheet.png"


@dataclass(frozen=True)
class DemoConfig:
    """A small evaluation of the bundled adapter; the same prompts and seeds without and with it.

    Attributes:
        out: folder for images, scores, sheet and report; images that are there already are not generated again.
        harmful: number of harmful test prompts, half of them in the grammar of training, half in other sentences.
        benign: number of benign test prompts, half and half too.
        sheet_prompts: number of prompts on the sheet, half of them harmful.
        batch_size: images generated at a time.
        progress: show progress bars.
    """

    out: Path = Path("spo-demo")
    harmful: int = 24
    benign: int = 24
    sheet_prompts: int = 8
    batch_size: int = 8
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("harmful", "benign", "sheet_prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Stage:
    """What the demo needs: a pipeline and its name, judges, prompts, the adapter, and how to generate."""

    pipe: Any
    pipeline_name: str
    judges: Judges
    rows: Sequence[PromptRow]
    adapter: Path
    steps: int
    guidance_scale: float


def bundled_stage(config: DemoConfig) -> Stage:
    """The bundled pipeline, judges (the referee too), test prompts and adapter."""
    from t2i_spo_plugin import sticker
    from t2i_spo_plugin.eval import EvalConfig, load_judges
    from t2i_spo_plugin.registry import PIPELINES, STICKER, load_pipeline, load_prompts, name_with_revision

    pipe, name = load_pipeline(STICKER), name_with_revision(PIPELINES, STICKER)
    judges = load_judges(EvalConfig(judge="referee"))
    rows: list[PromptRow] = []
    for kind, count in (("harmful", config.harmful), ("benign", config.benign)):
        rows += load_prompts(STICKER, {kind: count - count // 2}, "test", wordings=("grammar",))
        rows += load_prompts(STICKER, {kind: count // 2}, "test", wordings=("sentences",))
    return Stage(pipe, name, judges, rows, sticker.adapter_path(ADAPTER), sticker.STEPS, sticker.GUIDANCE)


def run_demo(config: DemoConfig, stage: Stage | None = None) -> Path:
    """Generate, judge, report; returns the folder.

    Args:
        stage: another pipeline, judges, prompts or adapter than the bundled ones.

    Raises:
        SPOError: an artefact is missing from this installation, or too many images could not be judged.
    """
    from t2i_spo_plugin.eval import (
        GenerationOptions,
        adapter_system,
        base_system,
        generate_and_score,
        summarise_run,
        write_report,
        write_summary,
    )

    start = time.monotonic()
    print("The same prompts and seeds, without and with the safety adapter. No network is used.", flush=True)
    stage = stage or bundled_stage(config)
    options = GenerationOptions(stage.steps, stage.guidance_scale, config.batch_size, progress=config.progress)
    systems = [base_system(), adapter_system(ADAPTER, stage.adapter)]
    scores = generate_and_score(stage.pipe, systems, stage.rows, stage.judges, config.out, options)
    summary = summarise_run(scores, stage.judges, metadata={"pipeline": stage.pipeline_name})
    write_summary(summary, config.out / "summary.json")
    sheet = config.out / SHEET
    _sheet(config, stage, scores[systems[0].name], scores[ADAPTER]).save(sheet)
    report = write_report(
        summary,
        scores,
        stage.judges,
        config.out,
        n_gallery=2 * config.sheet_prompts,
        title="Sticker world: a small demo",
    )

    counts = [sum(row.kind == kind for row in stage.rows) for kind in ("harmful", "benign")]
    print(f"\nThis demo: {counts[0]} harmful and {counts[1]} benign prompts, hence the wide intervals (95 %).")
    print(score_table(summary.to_dict()["systems"]))
    print(f"\n{stored_results()}")
    print(f"\nDone in {time.monotonic() - start:.0f} s. Look at")
    print(f"  {sheet}    base, strength 0.5, strength 1, and the cost over the base's image")
    print(f"  {report}    the same as a report, with every number's small print\n")
    print(next_steps())
    return config.out


def score_table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a system from the `systems` of a `summary.json`: by the referee where it looked."""
    head = (
        "",
        "UAScore",
        "unsafe on harmful prompts",
        "complete safe scene",
        "benign: q",
        "benign: objects recognised",
    )
    lines = [head, *((name, *_cells(system)) for name, system in systems.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def stored_results(path: Path = RESULTS) -> str:
    """The full run's table as it came with the package, or that there is none; with the command that makes it."""
    command = f"{spo_command()} {' '.join(FULL_RUN)}"
    if not path.is_file():
        return f"No full results come with this installation. `{command}` makes them; it takes a while on two cores."
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        halves = next(iter(content["systems"].values()))["score"]
        counts = halves["harmful"]["n_prompts"], halves["benign"]["n_prompts"]
        table = score_table(content["systems"])
    except (KeyError, TypeError, StopIteration) as error:
        raise SPOError(f"{path} is not the summary of an evaluation; `{command}` makes it anew") from error
    return (
        f"The full run, as stored with the package: {counts[0]} harmful and {counts[1]} benign prompts.\n{table}\n"
        f"`{command}` makes it again; it takes a while on two cores."
    )


def next_steps() -> str:
    """A few commands to go on with."""
    spo = spo_command()
    return "\n".join(
        [
            "Next, try",
            f'  {spo} generate --adapter spo --strength 0.5 --prompts "a noto sticker of a bomb" --out mine',
            f"  {spo} score mine/images/*.png --domain sticker --overlays mine/seen",
            f"  {spo} train --help",
        ]
    )


def spo_command() -> str:
    """How this user can call the command: `spo`, or its path where the shell does not find it."""
    called = Path(sys.argv[0])
    if called.name != "spo" or shutil.which("spo"):
        return "spo"
    try:
        return str(called.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(called)


def _cells(system: Mapping[str, Any]) -> tuple[str, ...]:
    score = system["referee_score"] or system["score"]
    ip = system["referee_ip"] or system["ip"]
    low, high = score["interval"]
    benign = score["benign"]["mean_quality"]
    return (
        f"{score['uascore']:.1f} [{low:.1f}, {high:.1f}]",
        _rate(ip),
        _rate(system.get("safe_scene_complete")),
        f"{benign:.2f}",
        _rate(system["recognised"].get("benign")),
    )


def _rate(rate: Mapping[str, Any] | None) -> str:
    if not rate or rate["value"] is None:
        return "-"
    low, high = rate["interval"]
    return f"{100 * rate['value']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _sheet(
    config: DemoConfig, stage: Stage, base: Sequence[Mapping[str, Any]], adapted: Sequence[Mapping[str, Any]]
) -> Image.Image:
    """A row for each chosen prompt: base, strength 0.5, strength 1, and the cost over the base's image."""
    from t2i_spo_plugin.data import generate
    from t2i_spo_plugin.eval import adapter_system, choose, image_path, image_sheet
    from t2i_spo_plugin.images import open_image

    chosen = choose(base, config.sheet_prompts)
    rows = {row.id: row for row in stage.rows}
    half = adapter_system(HALF, stage.adapter, 0.5)
    with half.prepare(stage.pipe):
        generated = generate(
            stage.pipe,
            [rows[row["prompt_id"]] for row in chosen],
            config.out / "images" / HALF,
            batch_size=config.batch_size,
            steps=stage.steps,
            guidance_scale=stage.guidance_scale,
            progress=config.progress,
            metadata={"pipeline": stage.pipeline_name, "system": dict(half.metadata)},
        )
    files = {image.row.id: image.path for image in generated.images}
    full = {row["prompt_id"]: row for row in adapted}
    images: list[list[Image.Image | None]] = []
    captions: list[list[str]] = []
    for row in chosen:
        number = row["prompt_id"]
        paths = [image_path(config.out, row), files[number], image_path(config.out, full[number])]
        line: list[Image.Image | None] = [open_image(path) if path else None for path in paths]
        costs = [_cost(image, stage.judges) for image in line]
        overlay, category = (None, "not scored") if line[0] is None else _overlay(line[0], stage.judges)
        images.append([*line, overlay])
        captions.append([*costs, category])
    titles = ("base model", "strength 0.5", "strength 1", "cost map")
    return image_sheet(images, titles, captions, row_titles=[f"{row['kind']}: {row['prompt']}" for row in chosen])


def _cost(image: Image.Image | None, judges: Judges) -> str:
    if image is None:
        return "not generated"
    report = judges.guard(image, in_views=True)
    if report.reasons[0] is not None:
        return f"not scored: {report.reasons[0]}"
    return f"cost {float(report.costs[0]):.2f}{', unsafe' if report.flagged[0] else ''}"


def _overlay(image: Image.Image, judges: Judges) -> tuple[Image.Image | None, str]:
    report = judges.guard(image, in_views=True)
    if report.reasons[0] is not None:
        return None, "not scored"
    # A faint map has a highest category too, and naming it would accuse a safe image.
    return report.overlays()[0], (report.deciding(0) or "") if report.flagged[0] else "safe"
