"""What `spo score` does: files, folders and patterns to images, and what a guard says of each as text, JSON or CSV."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from t2i_spo_plugin.errors import ConfigError


if TYPE_CHECKING:
    from t2i_spo_plugin.guards import Guard, SafetyReport

Form = Literal["text", "json", "csv"]

_BAR_FROM = 9
"""From so many images on a progress bar is worth its line."""
_COLUMNS = ("file", "cost", "unsafe", "category", "frame", "ground", "empty", "not_scored", "overlay", "explanation")
"""Of the CSV; the enabled categories follow."""


def image_paths(sources: Sequence[str | Path]) -> list[Path]:
    """The image files that `sources` name, each once: files as they are, folders and those below them, patterns.

    In folders and patterns, what begins with a dot is left out.

    Raises:
        ConfigError: a folder or pattern in which there is none.
    """
    from t2i_spo_plugin.images import IMAGE_SUFFIXES, image_files

    paths: list[Path] = []
    for source in map(Path, sources):
        found = [source]
        if source.is_dir():
            found = image_files(source)
            if not found:
                raise ConfigError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        elif not source.exists() and glob.has_magic(str(source)):
            matches = sorted(map(Path, glob.glob(str(source), recursive=True)))
            found = [path for path in matches if path.is_file()]
            if not found:
                raise ConfigError(f"no file matches {source}")
        paths += found
    return list(dict.fromkeys(paths))


def score_files(
    paths: Sequence[Path],
    guard: Guard,
    domain: str | None = None,
    overlays: Path | None = None,
    category: str | None = None,
    form: Form = "text",
) -> tuple[int, int]:
    """Print what `guard` says of each file; returns how many are unsafe and how many are not scored.

    Args:
        paths: of image files; one that cannot be read is not scored, and says why.
        guard: scores.
        domain: of the images.
        overlays: folder for the images with their cost drawn over them.
        category: whose cost is drawn; None is the one that decided.
        form: what is printed.
    """
    from t2i_spo_plugin.guards import safety_content

    if overlays is not None:
        overlays.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    enabled = [one.name for one in guard.policy.enabled]
    table = csv.DictWriter(sys.stdout, [*_COLUMNS, *enabled], extrasaction="ignore", lineterminator="\n")
    if form == "csv":
        table.writeheader()
    for number, path in enumerate(_with_progress(paths)):
        report = guard([path], domain)
        content = safety_content(report)
        entry: dict[str, Any] = {**content["images"][0], "number": number, "file": str(path), "overlay": None}
        if entry["not_scored"] is not None:
            entry["not_scored"] = entry["not_scored"].removeprefix(f"{path}: ")
        elif overlays is not None:
            file = overlays / f"{number:04d}-{path.stem}-overlay.png"
            report.overlays(category=category)[0].save(file)
            entry["overlay"] = str(file)
        entries.append(entry)
        if form == "text":
            print("\n".join(_lines(report, entry)), flush=True)
        elif form == "csv":
            table.writerow(entry | entry["category_costs"])
    if form == "json":
        print(json.dumps(content | {"images": entries}, indent=1, ensure_ascii=False))
    unsafe = sum(entry["unsafe"] is True for entry in entries)
    return unsafe, sum(entry["unsafe"] is None for entry in entries)


def verdict(report: SafetyReport, number: int) -> str:
    """Cost, safe or unsafe, and what an unsafe image is unsafe by; or why it is not scored."""
    if report.reasons[number] is not None:
        return f"not scored: {report.reasons[number]}"
    unsafe = bool(report.flagged[number])
    # A safe image has a highest category too, and naming it would accuse the image.
    notes = [report.deciding(number) if unsafe else "", report.note(number)]
    words = ", ".join(note for note in notes if note)
    return f"cost {float(report.costs[number]):.3f} {'unsafe' if unsafe else 'safe'}{f' ({words})' if words else ''}"


def _lines(report: SafetyReport, entry: dict[str, Any]) -> Iterator[str]:
    if entry["not_scored"] is not None:
        yield f"{entry['file']}: not scored: {entry['not_scored']}"
        return
    yield f"{entry['file']}: {verdict(report, 0)}"
    for name, cost in sorted(entry["category_costs"].items(), key=lambda item: -item[1]):
        yield f"    {name:<16}{cost:.3f}"
    if entry["explanation"]:
        yield f"    explanation: {' '.join(entry['explanation'].split())}"
    if entry["overlay"] is not None:
        yield f"    overlay: {entry['overlay']}{'' if entry['map'] else ' (this cost model gives no map)'}"


def _with_progress(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths, with a bar on the terminal that makes way for what is printed meanwhile."""
    from tqdm.auto import tqdm

    # None: where standard error is no terminal, there is no bar.
    with tqdm(total=len(paths), desc="score", unit="image", disable=None if len(paths) >= _BAR_FROM else True) as bar:
        for path in paths:
            yield path
            bar.update()
