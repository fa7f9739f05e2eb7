"""Systems x prompts -> images -> scores table -> summary and report.

Everything lies below one folder: `images/SYSTEM/`, `scores/SYSTEM/*.parquet` (one table a shard), `scores.parquet`,
`summary.json`, `report.html`. Whoever starts again with the same options does only what is missing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.data import (
    SCORE_COLUMNS,
    GeneratedImage,
    PromptRow,
    generate,
    read_rows,
    table_metadata,
    write_table,
)
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.identity import pipeline_identity
from t2i_spo_plugin.metrics import ScoreMetadata, percent
from t2i_spo_plugin.pipelines import pipeline_domain

from .metrics import compare, system_summary, wordings_of
from .promptsets import check_rows
from .scoring import Judges, score_generated
from .summaries import Comparison, Judge, SystemSummary, WordingSummary
from .systems import BASE, System


Row = dict[str, Any]


@dataclass(frozen=True)
class GenerationOptions:
    """How images are generated: denoising steps, guidance scale, batch and shard sizes, further call arguments."""

    steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 8
    shard_size: int = 64
    progress: bool = True
    call_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSummary:
    """The numbers of an evaluation; `str()` prints it.

    Attributes:
        systems: by name, the base first.
        comparisons: paired differences, by every judge that looked; then by wording class, by the referee if it did.
        metadata: what a reader needs to make the same numbers again.
    """

    systems: Mapping[str, SystemSummary]
    comparisons: tuple[Comparison, ...]
    metadata: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        comparisons = [comparison.to_dict() for comparison in self.comparisons]
        systems = {name: summary.to_dict() for name, summary in self.systems.items()}
        return {"systems": systems, "comparisons": comparisons, "metadata": dict(self.metadata)}

    def __str__(self) -> str:
        lines: list[str] = []
        for summary in self.systems.values():
            lines.append(str(summary.score))
            if summary.ip_once is not None:
                lines.append(f"  looked at once, not in views: IP {summary.ip_once}")
            if summary.referee_score is not None:
                lines.append(str(summary.referee_score))
                lines.extend(_referee_lines(summary))
            if summary.lookalike is not None:
                half = summary.lookalike
                lines.append(
                    f"  lookalike: mean s {half.mean_safety:.3f}, mean q {half.mean_quality:.3f}, {half.n} images, "
                    f"{half.not_scored} not scored, flagged {percent(half.unsafe_rate, half.unsafe_interval)}"
                )
            for wording, one in summary.by_wording.items():
                lines.append(f"  {wording}: {_wording_line(one)}")
        if self.comparisons:
            lines += [
                "Differences of UAScore and IP, paired over prompts and seeds:",
                *(f"  {c}" for c in self.comparisons),
            ]
        for name, value in self.metadata.get("referee", {}).items():
            lines.append(f"referee {name}: {value}")
        return "\n".join(lines)


def generate_and_score(
    pipe: Any,
    systems: Sequence[System],
    rows: Sequence[PromptRow],
    judges: Judges,
    out_dir: str | Path,
    options: GenerationOptions | None = None,
) -> dict[str, list[Row]]:
    """Rows of `SCORE_COLUMNS` for every system, also written to `out_dir/scores.parquet`.

    Args:
        rows: harmful, benign and lookalike prompts; every system generates the same prompts with the same seeds.

    Raises:
        DomainError: the judges do not know the pipeline's domain.
        ConfigError: kinds of prompts are missing, names repeat, or the folder holds another run.
    """
    options, out_dir = options or GenerationOptions(), Path(out_dir)
    names = [system.name for system in systems]
    if len(set(names)) != len(names) or not names:
        raise ConfigError(f"systems need names of their own, got {', '.join(names) or 'none'}")
    judges.check_domain(pipeline_domain(pipe))
    allowed, _ = check_rows(rows)
    scores = {system.name: _run_system(pipe, system, allowed, judges, out_dir, options) for system in systems}
    write_table([row for part in scores.values() for row in part], out_dir / "scores.parquet", SCORE_COLUMNS)
    return scores


def summarise_run(
    scores: Mapping[str, Sequence[Row]],
    judges: Judges,
    comparisons: Sequence[tuple[str, str]] = (),
    metadata: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> RunSummary:
    """Numbers of every system and the paired differences asked for, in `uascore/2`.

    Args:
        scores: rows by system; the first system is the base that the others are held against.
        comparisons: pairs of names; by default each system against the base, and the second against those after it.

    Raises:
        NotScoredError: more than 1 % of a system's images are not scored.
        ConfigError: a comparison names an unknown system.
    """
    judged = judges.referee is not None
    by_cost = ScoreMetadata(
        cost_model=judges.cost_name,
        quality_model=judges.quality_name,
        reference_hash=judges.quality_model.reference_hash,
        policy=judges.guard.policy.name,
        realism_known=getattr(judges.quality_model, "knows_realism", True),
        definition="uascore/2",
    )
    content = dict(metadata or {}) | {"versions": versions()}
    if judged:
        content["referee"] = {"name": judges.referee_name} | dict(judges.referee_metadata)
    by_referee = replace(by_cost, judge=f"referee {judges.referee_name}".strip()) if judged else None
    return summarise_scores(scores, by_cost, by_referee, comparisons, content, resamples, seed)


def summarise_scores(
    scores: Mapping[str, Sequence[Row]],
    by_cost: ScoreMetadata,
    by_referee: ScoreMetadata | None,
    comparisons: Sequence[tuple[str, str]] = (),
    metadata: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> RunSummary:
    """As `summarise_run`, of rows whose judges are known by name alone.

    Args:
        by_cost, by_referee: printed with the scores, what the rows say of completions and wording aside; None where
            no referee looked. Their definition says how the rows are read.
    """
    names = list(scores)
    pairs = list(comparisons) or default_comparisons(names)
    unknown = sorted({name for pair in pairs for name in pair} - set(names))
    if unknown:
        raise ConfigError(f"no system called {', '.join(unknown)}; there are {', '.join(names)}")
    every = [row for part in scores.values() for row in part]
    wordings, known = wordings_of(every), all(row["completions_known"] for row in every)
    by_cost = replace(by_cost, completions_known=known, wordings=wordings)
    if by_referee is not None:
        by_referee = replace(by_referee, completions_known=known, wordings=wordings)
    base = scores[names[0]]
    systems = {name: system_summary(part, base, by_cost, by_referee, resamples, seed) for name, part in scores.items()}
    looked: tuple[Judge, ...] = ("cost model",) if by_referee is None else ("referee", "cost model")

    def difference(a: str, b: str, judge: Judge, wording: str = "") -> Comparison:
        return compare(scores[a], scores[b], judge, resamples, seed, wording, by_cost.definition)

    compared = [difference(a, b, judge) for judge in looked for a, b in pairs]
    if len(wordings) > 1:
        # Those with harmful and benign prompts, by every system.
        classes = [
            name
            for name in wordings
            if all((one := s.by_wording.get(name)) and one.uascore is not None for s in systems.values())
        ]
        compared += [difference(a, b, looked[0], name) for a, b in pairs for name in classes]
    return RunSummary(systems, tuple(compared), dict(metadata or {}))


def default_comparisons(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each system against the base, and the first adapter against every other one."""
    return [(name, names[0]) for name in names[1:]] + [(names[1], name) for name in names[2:]]


def versions() -> dict[str, str]:
    """Of this package, Python, and what generates and judges."""
    numbers = {"t2i_spo_plugin": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "peft", "numpy"):
        numbers[package] = importlib.metadata.version(package)
    return numbers


def write_summary(summary: RunSummary, path: str | Path) -> Path:
    """The summary as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary.to_dict(), indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    return path


def drop_images(out_dir: str | Path) -> None:
    """Remove the images of a run; its scores stay."""
    shutil.rmtree(Path(out_dir) / "images", ignore_errors=True)


def image_path(out_dir: str | Path, row: Mapping[str, Any]) -> Path | None:
    """Where the image of a scores row lies; None when it was not generated or is gone."""
    if not row["image"]:
        return None
    path = Path(out_dir) / "images" / row["system"] / "images" / row["image"]
    return path if path.is_file() else None


def _run_system(
    pipe: Any,
    system: System,
    rows: Sequence[PromptRow],
    judges: Judges,
    out_dir: Path,
    options: GenerationOptions,
) -> list[Row]:
    shards = [rows[i : i + options.shard_size] for i in range(0, len(rows), options.shard_size)]
    paths = [out_dir / "scores" / system.name / f"{number:05d}.parquet" for number in range(len(shards))]
    metadata = {"system": dict(system.metadata if system.identity is None else system.identity)}
    with system.prepare(pipe):
        weights = pipeline_identity(pipe)
        prints = [_fingerprint(shard, metadata | {"pipeline": weights}, judges, options) for shard in shards]
        todo = [n for n, path in enumerate(paths) if not _is_current(path, prints[n])]
        if todo:
            report = generate(
                pipe,
                rows,
                out_dir / "images" / system.name,
                batch_size=options.batch_size,
                steps=options.steps,
                guidance_scale=options.guidance_scale,
                shard_size=options.shard_size,
                progress=options.progress,
                metadata=metadata,
                call_options=options.call_options,
                identity=weights,
            )
    if todo:
        generated = {(image.row.id, image.row.seed): image for image in report.images}
        for number in tqdm(todo, disable=not options.progress, desc=f"scoring {system.name}", unit="shard"):
            images: list[GeneratedImage] = [generated[row.id, row.seed] for row in shards[number]]
            table = score_generated(images, system.name, judges)
            write_table(table, paths[number], SCORE_COLUMNS, {"fingerprint": prints[number]})
    return [row for path in paths for row in read_rows(path, SCORE_COLUMNS)]


def _is_current(path: Path, fingerprint: str) -> bool:
    return path.is_file() and table_metadata(path).get("fingerprint") == fingerprint


def _fingerprint(
    rows: Sequence[PromptRow], metadata: Mapping[str, Any], judges: Judges, options: GenerationOptions
) -> str:
    content = {
        "rows": [repr(row) for row in rows],
        "metadata": metadata,
        "judges": judges.identity,
        "generation": [options.steps, options.guidance_scale, dict(options.call_options)],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _referee_lines(summary: SystemSummary) -> list[str]:
    lines = [f"  looked at once, not in views: IP {summary.referee_ip_once}"] if summary.referee_ip_once else []
    lines.append(
        f"  safe scene on harmful prompts: complete {summary.safe_scene_complete}, partial {summary.safe_scene}"
    )
    for kind, rate in summary.recognised.items():
        relative = (
            f", {summary.recognised_relative[kind]} of the base's" if kind in summary.recognised_relative else ""
        )
        relative = relative if summary.system != BASE else ""
        lines.append(f"  requested objects recognised, {kind}: {rate}{relative}")
    lines.append(f"  cost model agrees with the referee: {summary.agreement}")
    return lines


def _wording_line(one: WordingSummary) -> str:
    parts = [f"IP {one.ip}", f"prompts with an unsafe image {one.unsafe_prompts}"]
    if one.uascore is not None and one.interval is not None:
        parts.insert(0, f"UAScore {one.uascore:.1f} [{one.interval.low:.1f}, {one.interval.high:.1f}]")
    parts.append(f"unreadable {'not asked' if one.unreadable is None else one.unreadable}")
    if one.safe_scene_complete is not None:
        parts.append(f"complete safe scene {one.safe_scene_complete}")
    if one.recognised is not None:
        parts.append(f"benign objects recognised {one.recognised}")
    return "; ".join(parts)
