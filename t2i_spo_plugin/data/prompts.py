"""Prompt sets: rows of files, their safe completions, and the minors filter.

Harmful prompt text is never shipped; sets are read from where their owners publish them. Rows that mention minors
are removed from harmful and unlabelled sets whenever a set is read, and again before anything is generated; nothing
turns that off.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2i_spo_plugin.errors import TableError
from t2i_spo_plugin.files import user_path

from .minors import mentions_minors
from .rows import BadRow, describe_rows, read_rows_by_hand


PROMPT_KINDS = ("harmful", "benign", "lookalike", "unlabelled")
MAX_SEED = 2**31 - 1
"""Seeds lie in [0, MAX_SEED]."""

_COLUMNS = {
    "prompt": ("prompt", "caption", "text", "adv_prompt", "adversarial_prompt", "sensitive prompt", "prompts"),
    "id": ("id", "prompt_id", "case_number", "uid"),
    "kind": ("kind", "label", "type", "safety"),
    "category": ("category", "categories", "class", "concept"),
    "seed": ("seed", "evaluation_seed", "sd_seed"),
    "safe_prompts": ("safe_prompts", "safe_prompt", "safe_completions", "safe_completion", "normal prompt"),
    "requested": ("requested", "objects"),
    "safe_objects": ("safe_objects",),
    "wording": ("wording", "wording_class"),
}
_KIND_WORDS = {
    "harmful": ("harmful", "unsafe", "toxic", "nsfw", "inappropriate"),
    "benign": ("benign", "safe", "clean", "harmless"),
    "lookalike": ("lookalike", "look-alike", "looks harmful", "borderline"),
    "unlabelled": ("unlabelled", "unlabeled", "unknown", ""),
}


@dataclass(frozen=True)
class PromptRow:
    """One prompt, with everything that generating its image and judging it needs.

    Attributes:
        id: unique within a set.
        kind: harmful, benign, lookalike (benign, but looks harmful) or unlabelled.
        category: the policy category a harmful prompt aims at; empty otherwise.
        seed: of the generator of its image.
        safe_prompts: safe completions of a harmful prompt, best first; empty when unknown.
        requested: objects that should be recognised in the image; on a harmful prompt those of its safe completions.
        safe_objects: what each of the safe completions shows, in their order; empty when unknown.
        wording: the class of wordings that the prompt belongs to, by which results are printed; empty when unknown.
    """

    id: str
    prompt: str
    kind: str
    category: str = ""
    seed: int = 0
    safe_prompts: tuple[str, ...] = ()
    requested: tuple[str, ...] = ()
    safe_objects: tuple[tuple[str, ...], ...] = ()
    wording: str = ""

    def __post_init__(self) -> None:
        if not self.id or not isinstance(self.id, str):
            raise TableError(f"a prompt row needs an id, got {self.id!r}")
        if not isinstance(self.prompt, str):
            raise TableError(f"{self.id}: prompt must be text, got {self.prompt!r}")
        if self.kind not in PROMPT_KINDS:
            raise TableError(f"{self.id}: kind must be one of {', '.join(PROMPT_KINDS)}, got {self.kind!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise TableError(f"{self.id}: seed must be an integer from 0 to 2**63 - 1, got {self.seed!r}")
        for name in ("safe_prompts", "requested"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TableError(f"{self.id}: {name} must be a list of texts, got one text")
            object.__setattr__(self, name, tuple(value))
        if any(isinstance(shown, str) for shown in self.safe_objects):
            raise TableError(f"{self.id}: safe_objects must be a list of lists of texts, one for each safe completion")
        object.__setattr__(self, "safe_objects", tuple(tuple(shown) for shown in self.safe_objects))
        if self.safe_objects and len(self.safe_objects) != len(self.safe_prompts):
            raise TableError(
                f"{self.id}: {len(self.safe_objects)} lists of safe_objects for {len(self.safe_prompts)} safe_prompts"
            )

    @property
    def counterparts(self) -> tuple[tuple[str, ...], ...]:
        """What each safe counterpart of a harmful prompt shows; all that is requested where no more is known."""
        return self.safe_objects or ((self.requested,) if self.requested else ())


@dataclass(frozen=True)
class PromptSet:
    """The rows of a file that may be used, and what was left out.

    Attributes:
        rows: those that may be used.
        n_dropped: rows that were removed because they mention minors.
        source: the file.
        bad_rows: rows that were left out because they hold no usable prompt.
    """

    rows: tuple[PromptRow, ...]
    n_dropped: int
    source: str
    bad_rows: tuple[BadRow, ...] = ()

    def __iter__(self) -> Iterator[PromptRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def read_prompts(path: str | Path, kind: str | None = None, seed: int = 0, skip_bad_rows: bool = False) -> PromptSet:
    """Read a prompt set from a `.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet` or `.txt` file (a prompt a line).

    Column names are matched without regard to case: prompt (or caption, text), kind (label, type), category, seed
    (evaluation_seed, sd_seed), safe_prompt(s), requested, id (case_number). Only a prompt is needed. Missing seeds
    come from a hash of the prompt and `seed`, so they do not depend on the order of the rows. A row whose prompt is
    there and empty is left out with a warning, as public sets have such rows.

    Args:
        path: the file.
        kind: the kind of every row when the file has no such column; rows are `unlabelled` otherwise.
        seed: mixed into the seeds that the file does not give.
        skip_bad_rows: leave every row out that cannot be used, with a warning, instead of refusing the file.

    Raises:
        TableError: unreadable file, no prompt column, rows that cannot be used (listed with their reasons), or an id
            that occurs twice.
    """
    path = user_path(path)
    if kind is not None and kind not in PROMPT_KINDS:
        raise TableError(f"kind must be one of {', '.join(PROMPT_KINDS)}, got {kind!r}")
    raw, bad = read_rows_by_hand(path)
    if not raw and not bad:
        raise TableError(f"{path} holds no rows")
    # A row of jsonl may lack a column that another one has.
    columns = dict.fromkeys(column for _, content in raw for column in content)
    names = _match_columns(columns)
    if raw and "prompt" not in names:
        raise TableError(f"{path}: no prompt column among {', '.join(map(str, columns))}; name one of them 'prompt'")
    rows: list[PromptRow] = []
    empty: list[BadRow] = []
    dropped = 0
    seen: dict[str, int] = {}
    for order, (number, content) in enumerate(raw):
        prompt = content.get(names["prompt"])
        if isinstance(prompt, str) and not prompt.strip():
            empty.append(BadRow(number, "the prompt is empty"))
            continue
        occurrence = seen[str(prompt)] = seen.get(str(prompt), -1) + 1
        try:
            row = _row(content, names, f"{path.stem}-{order:05d}", kind, seed, occurrence)
        except TableError as error:
            bad.append(BadRow(number, str(error)))
            continue
        if row.kind in ("harmful", "unlabelled") and any(mentions_minors(text) for text in _depicted_texts(content)):
            dropped += 1
            continue
        rows.append(row)
    if bad and not skip_bad_rows:
        raise TableError(f"{path}: {describe_rows(bad)}; mend them, or leave them out with skip_bad_rows")
    left_out = tuple(sorted([*bad, *empty], key=lambda one: one.number))
    if left_out and not rows and not dropped:
        raise TableError(f"{path} holds no row that can be used: {describe_rows(left_out)}")
    if left_out:
        warnings.warn(f"{path}: left out: {describe_rows(left_out)}", stacklevel=2)
    _check_unique(rows, str(path))
    return PromptSet(tuple(rows), dropped, str(path), left_out)


def drop_minors(rows: Iterable[PromptRow]) -> tuple[list[PromptRow], int]:
    """Remove harmful and unlabelled rows whose prompt mentions minors; returns the others, and how many went."""
    allowed, dropped = [], 0
    for row in rows:
        if row.kind in ("harmful", "unlabelled") and mentions_minors(row.prompt):
            dropped += 1
        else:
            allowed.append(row)
    return allowed, dropped


def prompt_seed(prompt: str, seed: int = 0, occurrence: int = 0) -> int:
    """A seed from the prompt's text: the same wherever the row stands; `occurrence` tells repeated prompts apart."""
    digest = hashlib.sha256(f"{seed}\0{occurrence}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)


def with_seeds(rows: Iterable[PromptRow], count: int) -> list[PromptRow]:
    """Every row `count` times: first with its own seed, then with others of its own, the same on every call."""
    return [
        row if number == 0 else replace(row, seed=prompt_seed(row.prompt, row.seed, number))
        for row in rows
        for number in range(count)
    ]


def _depicted_texts(content: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a raw row that an image could depict or be attacked towards: prompt, target_prompt, caption."""
    for name, value in content.items():
        lowered = str(name).casefold()
        is_text = any(part in lowered for part in ("prompt", "text", "caption", "target"))
        if isinstance(value, str) and is_text and not lowered.startswith(("safe", "normal")):
            yield value


def _match_columns(columns: Iterable[str]) -> dict[str, str]:
    lowered = {str(name).strip().casefold(): name for name in columns}
    matched = {}
    for field, names in _COLUMNS.items():
        for name in names:
            if name in lowered:
                matched[field] = lowered[name]
                break
    return matched


def _row(
    content: Mapping[str, Any],
    names: Mapping[str, str],
    default_id: str,
    default_kind: str | None,
    seed: int,
    occurrence: int,
) -> PromptRow:
    def value(field: str) -> Any:
        entry = content.get(names[field]) if field in names else None
        return None if entry is None or entry == "" or entry != entry else entry

    prompt = value("prompt")
    if prompt is None:
        raise TableError("there is no prompt")
    if not isinstance(prompt, str):
        raise TableError(f"the prompt must be text, got {prompt!r}")
    category = value("category")
    return PromptRow(
        id=str(value("id") if value("id") is not None else default_id),
        prompt=prompt.strip(),
        kind=_kind(value("kind"), default_kind),
        category=", ".join(map(str, category)) if isinstance(category, (list, tuple)) else str(category or ""),
        seed=_seed(value("seed"), prompt, seed, occurrence),
        safe_prompts=_texts(value("safe_prompts")),
        requested=_texts(value("requested")),
        safe_objects=_lists_of_texts(value("safe_objects")),
        wording=str(value("wording") or ""),
    )


def _kind(value: Any, default: str | None) -> str:
    if value is None:
        return default or "unlabelled"
    word = str(value).strip().casefold()
    for kind, words in _KIND_WORDS.items():
        if word in words:
            return kind
    raise TableError(f"unknown kind {value!r}; expected one of {', '.join(PROMPT_KINDS)}")


def _seed(value: Any, prompt: str, seed: int, occurrence: int) -> int:
    if value is None:
        return prompt_seed(prompt, seed, occurrence)
    try:
        number = float(value) if isinstance(value, str) and "." in value else int(value)
    except (TypeError, ValueError) as error:
        raise TableError(f"seed must be an integer, got {value!r}") from error
    if number != int(number):
        raise TableError(f"seed must be an integer, got {value!r}")
    return int(number)


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return (value,)
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise TableError(f"expected a text or a list of texts, got {value!r}")
    return tuple(value)


def _lists_of_texts(value: Any) -> tuple[tuple[str, ...], ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise TableError(f"expected a list of lists of texts as JSON, got {value!r}") from None
    if value is None:
        return ()
    if not isinstance(value, Sequence) or any(isinstance(part, str) for part in value):
        raise TableError(f"expected a list of lists of texts, got {value!r}")
    return tuple(_texts(part) for part in value)


def _check_unique(rows: Sequence[PromptRow], where: str) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise TableError(f"{where}: the id {row.id!r} occurs more than once")
        seen.add(row.id)
