"""UAScore of a scores table that lies there already, by either definition; no model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from t2i_spo_plugin.data import SCORE_COLUMNS, read_rows
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.files import read_json
from t2i_spo_plugin.metrics import Definition, ScoreMetadata

from .runner import Row, RunSummary, summarise_scores


NOT_STATED = "not stated"


def rescore(
    table: str | Path, definition: Definition = "uascore/2", resamples: int = 2000, seed: int = 0
) -> RunSummary:
    """The numbers of every system in a table.

    Args:
        table: a `scores.parquet`, or the folder of an evaluation that holds one. The names of the judges are read from
            the `summary.json` beside it.
        definition: `uascore/2`, or `uascore/1`, in which every image is looked at once and may be unreadable.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        TableError: there is no such table.
        ConfigError: `uascore/2` is asked of a table whose images were looked at once.
        NotScoredError: more than 1 % of a system's images are not scored.
    """
    path = Path(table)
    path = path / "scores.parquet" if path.is_dir() else path
    scores: dict[str, list[Row]] = {}
    for row in read_rows(path, SCORE_COLUMNS):
        scores.setdefault(row["system"], []).append(row)
    if not scores:
        raise ConfigError(f"{path} holds no rows")
    every = [row for part in scores.values() for row in part if not row["not_scored"]]
    if definition == "uascore/2" and any(row["cost_once"] is None for row in every):
        raise ConfigError(
            f"the images of {path} were looked at once, and uascore/2 looks at them in views; ask for uascore/1, or "
            "run spo eval again in the same folder, which judges the images that are there anew"
        )
    stated = _stated(path.with_name("summary.json"), next(iter(scores)))
    by_cost = ScoreMetadata(
        cost_model=stated.get("cost_model", NOT_STATED),
        quality_model=stated.get("quality_model", NOT_STATED),
        reference_hash=stated.get("reference_hash", NOT_STATED),
        policy=stated.get("policy", ""),
        realism_known=stated.get("realism_known", "True") == "True",
        definition=definition,
    )
    judged = bool(every) and all(row["referee_unsafe"] is not None for row in every)
    by_referee = None
    if judged:
        by_referee = replace(by_cost, judge=stated.get("referee", "referee"))
    return summarise_scores(scores, by_cost, by_referee, (), {"table": path.name}, resamples, seed)


def _stated(path: Path, system: str) -> dict[str, str]:
    """What the summary of the evaluation says of its judges; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        one: dict[str, Any] = read_json(path)["systems"][system]
        referee = one.get("referee_score")
        names = {key: str(one["score"]["metadata"][key]) for key in ("cost_model", "quality_model", "reference_hash")}
        names["policy"] = str(one["score"]["metadata"].get("policy", ""))
        names["realism_known"] = str(one["score"]["metadata"].get("realism_known", True))
        return names | ({"referee": str(referee["metadata"]["judge"])} if referee else {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not the summary of the evaluation beside it: {error!r}") from error
