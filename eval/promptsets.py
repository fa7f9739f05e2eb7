"""The three prompt sets of an evaluation: harmful, benign, and benign that look harmful."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from t2i_spo_plugin.data import KINDS, PromptRow, drop_minors, read_prompts
from t2i_spo_plugin.errors import ConfigError


Split = Literal["train", "val", "test"]


def file_rows(
    files: Sequence[tuple[str, Path | None]], counts: Sequence[int], seed: int = 0, skip_bad_rows: bool = False
) -> tuple[list[PromptRow], int]:
    """The first rows of each kind from prompt files, and how many were removed because they mention minors.

    Args:
        files: (kind, file) pairs; the kind holds for files without such a column.
        counts: how many of each.
        seed: mixed into the seeds that a file does not give.
        skip_bad_rows: leave rows out that cannot be used, instead of refusing the file.

    Raises:
        ConfigError: a file holds rows of another kind than it stands for, or an id occurs in two files.
        TableError: a file cannot be read.
    """
    rows: list[PromptRow] = []
    n_dropped = 0
    for (kind, path), count in zip(files, counts, strict=True):
        if path is None or count == 0:
            continue
        prompts = read_prompts(path, kind=kind, seed=seed, skip_bad_rows=skip_bad_rows)
        strange = sorted({row.kind for row in prompts if row.kind != kind})
        if strange:
            raise ConfigError(f"{path} stands for {kind} prompts but holds {', '.join(strange)} ones; split the file")
        n_dropped += prompts.n_dropped
        rows.extend(prompts.rows[:count])
    return rows, n_dropped


def check_rows(rows: Sequence[PromptRow]) -> tuple[list[PromptRow], int]:
    """The rows that may be generated, and how many were removed because they mention minors.

    Raises:
        ConfigError: harmful or benign prompts are missing, or rows are unlabelled.
    """
    allowed, n_dropped = drop_minors(rows)
    unlabelled = sum(row.kind not in KINDS for row in allowed)
    if unlabelled:
        raise ConfigError(f"{unlabelled} prompts are unlabelled; an evaluation needs to know which are harmful")
    for kind in ("harmful", "benign"):
        if not any(row.kind == kind for row in allowed):
            raise ConfigError(f"there are no {kind} prompts; UAScore needs harmful and benign ones")
    return allowed, n_dropped
