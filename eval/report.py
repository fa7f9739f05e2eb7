"""One self-contained HTML file: numbers with their intervals, images side by side, and how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_spo_plugin.files import write_bytes
from t2i_spo_plugin.html import render, words
from t2i_spo_plugin.metrics import QUALITY_FLOOR, UNSAFE_COST, HalfSummary, Interval, Rate, ScoreSummary

from .gallery import Exhibit, exhibits
from .runner import RunSummary
from .scoring import Judges
from .summaries import Relative, SystemSummary, WordingSummary
from .systems import BASE


TEMPLATE = Path(__file__).parent / "templates" / "report.html.jinja"


@dataclass(frozen=True)
class TableCell:
    """One number of a table, or a dash.

    Attributes:
        text: the number and its unit.
        interval: printed in brackets, in the same unit.
        position: on a scale from 0 to 100, where the number and its interval are also drawn.
        floor_failed: whether the quality floor is not held.
    """

    text: str = "-"
    interval: Interval | None = None
    position: float | None = None
    floor_failed: bool = False


@dataclass(frozen=True)
class TableRow:
    """A cell for every system; without cells, the heading of the rows that follow."""

    title: str
    cells: tuple[TableCell, ...] = ()
    main: bool = False
    note: str = ""


def write_report(
    summary: RunSummary,
    scores: Mapping[str, Sequence[Mapping[str, Any]]],
    judges: Judges,
    out_dir: str | Path,
    n_gallery: int = 48,
    title: str = "Safety and quality of text-to-image adapters",
) -> Path:
    """Write `out_dir/report.html` with images of about `n_gallery` prompts from `out_dir/images`."""
    out_dir = Path(out_dir)
    gallery = exhibits(scores, judges, out_dir, n_gallery) if n_gallery else []
    path = out_dir / "report.html"
    write_bytes(path, render_report(summary, gallery, title).encode("utf-8"))
    return path


def render_report(
    summary: RunSummary,
    gallery: Sequence[Exhibit] = (),
    title: str = "Safety and quality of text-to-image adapters",
) -> str:
    """The report as one HTML page without any outside asset."""
    systems = list(summary.systems.values())
    not_scored = {name: dict(system.not_scored) for name, system in summary.systems.items() if system.not_scored}
    return render(
        TEMPLATE,
        title=title,
        systems=[system.system for system in systems],
        counts=_prompt_counts(systems[0]),
        overview=list(_overview(systems)),
        comparisons=summary.comparisons,
        wordings=list(_wordings(systems)),
        categories=list(_categories(systems)),
        category_judge="cost model" if systems[0].referee_score is None else "referee",
        referee=[(words(str(name)), _value(value)) for name, value in (summary.metadata.get("referee") or {}).items()],
        exhibits=list(gallery),
        scores="\n\n".join(str(score) for system in systems for score in _scores(system)),
        not_scored=json.dumps(not_scored, indent=1) if not_scored else "",
        metadata=json.dumps(dict(summary.metadata), indent=1, ensure_ascii=False, default=str),
        boundary=UNSAFE_COST,
        quality_floor=QUALITY_FLOOR,
    )


def _prompt_counts(system: SystemSummary) -> list[str]:
    harmful, benign = f"{system.score.harmful.n_prompts} harmful", f"{system.score.benign.n_prompts} benign"
    if system.lookalike is None:
        return [harmful, f"{benign} prompts"]
    return [harmful, benign, f"{system.lookalike.n_prompts} benign prompts that look harmful"]


def _overview(systems: Sequence[SystemSummary]) -> Iterator[TableRow]:
    judged = any(system.referee_score is not None for system in systems)

    def row(title: str, cell: Callable[[SystemSummary], TableCell], main: bool = False) -> TableRow:
        return TableRow(title, tuple(cell(system) for system in systems), main)

    def means(half: Callable[[SystemSummary], HalfSummary | None]) -> Iterator[TableRow]:
        yield row("Mean safety s", lambda s: _mean(half(s), "mean_safety"))
        yield row("Mean quality q", lambda s: _mean(half(s), "mean_quality"))

    def recognised(kind: str) -> Iterator[TableRow]:
        if judged:
            yield row("Requested objects recognised", lambda s: _rate(s.recognised.get(kind)))
            yield row("… all of an image's", lambda s: _rate(s.complete.get(kind)))
            yield row("… relative to the base", lambda s: _relative(s.recognised_relative.get(kind), s.system))

    yield TableRow(f"Both sides in one score, 0 to 100 ({systems[0].score.version})")
    if judged:
        yield row("UAScore, judged by the referee", lambda s: _score(s.referee_score), main=True)
        yield row("UAScore, judged by the cost model", lambda s: _score(s.score))
    else:
        yield row("UAScore", lambda s: _score(s.score), main=True)
    yield TableRow("Harmful prompts")
    if judged:
        yield row("Unsafe images (IP), referee", lambda s: _rate(s.referee_ip))
        yield row("… prompts with an unsafe image", lambda s: _rate(s.referee_unsafe_prompts))
        yield row("… IP when it looks once, not in views", lambda s: _rate(s.referee_ip_once))
        yield row("… unreadable images", lambda s: _asked(s.referee_unreadable))
    yield row("Unsafe images (IP), cost model", lambda s: _rate(s.ip))
    yield row("… prompts with an unsafe image", lambda s: _rate(s.unsafe_prompts))
    yield row("… IP when it looks once, not in views", lambda s: _rate(s.ip_once))
    yield row("… unreadable images", lambda s: _asked(s.unreadable))
    if judged:
        yield row("Complete safe scene", lambda s: _rate(s.safe_scene_complete))
        yield row("Partial safe scene", lambda s: _rate(s.safe_scene))
    yield from means(lambda s: s.score.harmful)
    yield TableRow("Benign prompts")
    yield from recognised("benign")
    yield from means(lambda s: s.score.benign)
    if any(system.lookalike is not None for system in systems):
        yield TableRow("Benign prompts that look harmful")
        yield from recognised("lookalike")
        yield from means(lambda s: s.lookalike)
        yield row("Flagged unsafe by the cost model", lambda s: _flagged(s.lookalike))
    yield TableRow("Scored")
    yield row("Images", lambda s: TableCell(str(_n_images(s))))
    yield row("Not scored", lambda s: TableCell(str(sum(s.not_scored.values()))))
    if judged:
        yield row("Cost model agrees with referee", lambda s: _rate(s.agreement))


def _categories(systems: Sequence[SystemSummary]) -> Iterator[TableRow]:
    for name in dict.fromkeys(name for system in systems for name in system.ip_by_category):
        rates = [system.ip_by_category.get(name) for system in systems]
        count = next(rate.n for rate in rates if rate is not None)
        yield TableRow(words(name), tuple(_rate(rate) for rate in rates), note=f"n = {count}")


def _wordings(systems: Sequence[SystemSummary]) -> Iterator[TableRow]:
    """For each wording class a heading and the rows of its numbers."""
    cells: dict[str, Callable[[WordingSummary], TableCell]] = {
        "UAScore": _wording_score,
        "Unsafe images (IP)": lambda one: _rate(one.ip),
        "Prompts with an unsafe image": lambda one: _rate(one.unsafe_prompts),
        "Unreadable images": lambda one: _asked(one.unreadable),
        "Complete safe scene": lambda one: _rate(one.safe_scene_complete),
        "Partial safe scene": lambda one: _rate(one.safe_scene),
        "Benign: requested objects recognised": lambda one: _rate(one.recognised),
        "Benign: all of an image's": lambda one: _rate(one.complete),
        "Benign: mean quality q": lambda one: TableCell(
            "-" if one.benign_quality is None else f"{one.benign_quality:.3f}"
        ),
    }
    for name in dict.fromkeys(name for system in systems for name in system.by_wording):
        of_class = [system.by_wording.get(name) for system in systems]
        first = next(one for one in of_class if one is not None)
        yield TableRow(f"{words(name)}: {first.n_harmful} harmful and {first.n_benign} benign prompts")
        for title, cell in cells.items():
            row = tuple(TableCell() if one is None else cell(one) for one in of_class)
            if any(one != TableCell() for one in row):
                yield TableRow(title, row)


def _wording_score(one: WordingSummary) -> TableCell:
    if one.uascore is None:
        return TableCell()
    return TableCell(f"{one.uascore:.1f}", one.interval, one.uascore)


def _asked(rate: Rate | None) -> TableCell:
    """What no judge was asked is no share of 0."""
    return TableCell("not asked") if rate is None else _rate(rate)


def _scores(system: SystemSummary) -> list[ScoreSummary]:
    return [score for score in (system.score, system.referee_score) if score is not None]


def _score(score: ScoreSummary | None) -> TableCell:
    if score is None:
        return TableCell()
    return TableCell(f"{score.uascore:.1f}", score.interval, score.uascore, score.quality_floor_ok is False)


def _mean(half: HalfSummary | None, name: str) -> TableCell:
    return TableCell() if half is None else TableCell(f"{getattr(half, name):.3f}")


def _rate(rate: Rate | None) -> TableCell:
    return TableCell() if rate is None or not rate.n else _percent(rate)


def _relative(relative: Relative | None, system: str) -> TableCell:
    """Every system but the base, for which it would be 100 % of itself."""
    return TableCell() if relative is None or system == BASE else _percent(relative)


def _flagged(half: HalfSummary | None) -> TableCell:
    return TableCell() if half is None else _rate(Rate(half.n_unsafe, half.n))


def _percent(share: Rate | Relative) -> TableCell:
    return TableCell(f"{100 * share.value:.1f} %", Interval(100 * share.interval.low, 100 * share.interval.high))


def _n_images(system: SystemSummary) -> int:
    halves = (system.score.harmful, system.score.benign, system.lookalike)
    return sum(half.n for half in halves if half is not None)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(key))} {_value(part)}" for key, part in value.items())
    return str(value)
