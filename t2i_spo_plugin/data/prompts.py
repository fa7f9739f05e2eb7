"""Prompt sets: rows from csv, jsonl and parquet files, their safe completions, and the minors filter.

Harmful prompt text is never shipped; sets are read from where their owners publish them. Rows that mention minors
are removed from harmful and unlabelled sets whenever a set is read, and again before anything is generated; nothing
turns that off.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_spo_plugin.errors import TableError


PROMPT_KINDS = ("harmful", "benign", "lookalike", "unlabelled")
MAX_SEED = 2**31 - 1

_COLUMNS = {
    "prompt": ("prompt", "caption", "text", "adv_prompt", "adversarial_prompt", "sensitive prompt", "prompts"),
    "id": ("id", "prompt_id", "case_number", "uid"),
    "kind": ("kind", "label", "type", "safety"),
    "category": ("category", "categories", "class", "concept"),
    "seed": ("seed", "evaluation_seed", "sd_seed"),
    "safe_prompts": ("safe_prompts", "safe_prompt", "safe_completions", "safe_completion", "normal prompt"),
    "requested": ("requested", "objects"),
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
    """

    id: str
    prompt: str
    kind: str
    category: str = ""
    seed: int = 0
    safe_prompts: tuple[str, ...] = ()
    requested: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class PromptSet:
    """The rows of a file that may be used, and how many were removed because they mention minors."""

    rows: tuple[PromptRow, ...]
    n_dropped: int
    source: str

    def __iter__(self) -> Iterator[PromptRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def read_prompts(path: str | Path, kind: str | None = None, seed: int = 0) -> PromptSet:
    """Read a prompt set from a `.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet` file.

    Column names are matched without regard to case: prompt (or caption, text), kind (label, type), category, seed
    (evaluation_seed, sd_seed), safe_prompt(s), requested, id (case_number). Only a prompt is needed. Missing seeds
    come from a hash of the prompt and `seed`, so they do not depend on the order of the rows.

    Args:
        kind: the kind of every row when the file has no such column; rows are `unlabelled` otherwise.
        seed: mixed into the seeds that the file does not give.

    Raises:
        TableError: unreadable file, no prompt column, a bad value (with its row), or an id that occurs twice.
    """
    path = Path(path)
    if kind is not None and kind not in PROMPT_KINDS:
        raise TableError(f"kind must be one of {', '.join(PROMPT_KINDS)}, got {kind!r}")
    raw = _read_raw(path)
    if not raw:
        raise TableError(f"{path} holds no rows")
    names = _match_columns(raw[0])
    if "prompt" not in names:
        raise TableError(f"{path}: no prompt column among {', '.join(map(str, raw[0]))}; name one of them 'prompt'")
    rows: list[PromptRow] = []
    dropped = 0
    seen: dict[str, int] = {}
    for number, content in enumerate(raw):
        prompt = str(content.get(names["prompt"]) or "")
        occurrence = seen[prompt] = seen.get(prompt, -1) + 1
        row = _row(content, names, f"{path.stem}-{number:05d}", f"{path}, row {number + 1}", kind, seed, occurrence)
        if row.kind in ("harmful", "unlabelled") and any(mentions_minors(text) for text in _depicted_texts(content)):
            dropped += 1
            continue
        rows.append(row)
    _check_unique(rows, str(path))
    return PromptSet(tuple(rows), dropped, str(path))


def drop_minors(rows: Iterable[PromptRow]) -> tuple[list[PromptRow], int]:
    """Remove harmful and unlabelled rows whose prompt mentions minors; returns the others, and how many went."""
    allowed, dropped = [], 0
    for row in rows:
        if row.kind in ("harmful", "unlabelled") and mentions_minors(row.prompt):
            dropped += 1
        else:
            allowed.append(row)
    return allowed, dropped


def mentions_minors(text: str) -> bool:
    """Whether `text` mentions children, teenagers or an age under 18. Errs on the side of yes."""
    return _MINORS.search(_plain(text)) is not None


def prompt_seed(prompt: str, seed: int = 0, occurrence: int = 0) -> int:
    """A seed from the prompt's text: the same wherever the row stands; `occurrence` tells repeated prompts apart."""
    digest = hashlib.sha256(f"{seed}\0{occurrence}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)


_AGE = (
    r"(?:0?[0-9]|1[0-7]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    r"sixteen|seventeen)"
)
_YEARS = r"(?:years?|yrs?|months?|weeks?|days?)"
_TERMS = (
    r"child(?:ren)?(?:'?s)?|child(?:like|ish|hood)|schoolchild(?:ren)?|grandchild(?:ren)?|kid(?:s|do|dos|die|dies|dy)?|"
    r"bab(?:y|ies|e in arms)|newborns?|infants?|infantile|toddlers?|tots?|minors?|under-?aged?|"
    r"boys?|girls?|(?:school|little|young) ?(?:boys?|girls?)|schoolgirls?|schoolboys?|lads?|lass(?:es|ie)?|"
    r"pre-?teens?|tweens?|teens?|teen-?age(?:d|rs?)?|adolescen(?:t|ts|ce)|pubescents?|juveniles?|youths?|youngsters?|"
    r"pre-?schoolers?|preschool|kindergart(?:en|ens|eners?|ners?)|nursery|"
    r"(?:primary|elementary|middle|junior high|high|grade) ?school(?:ers?)?|"
    r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|[1-9]th|1st|2nd|3rd) ?graders?|"
    r"loli(?:s|ta|tas|con)?|shota(?:s|con)?|jail ?bait|barely legal|foet(?:us|uses)|fetus(?:es)?"
)
_AGES = (
    rf"{_AGE}[ -]*{_YEARS}[ -]*(?:olds?|of age|young)|{_AGE}[ -]*(?:yo|y/o|y\.o\.?|yrs? ?old)|"
    rf"(?:aged?|age of|age is|ages)[ :]*{_AGE}|(?:under|below|younger than|less than)[ -]*(?:the age of )?"
    r"(?:1[0-8]|[1-9]|eighteen)(?: years?)?"
    r"(?! ?(?:minutes?|hours?|dollars?|euros?|degrees?|metres?|meters?|percent|%|km|kg|cm))"
)
_MINORS = re.compile(rf"(?<![a-z0-9])(?:{_TERMS}|{_AGES})(?![a-z0-9])")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


def _plain(text: str) -> str:
    """Lower case, full-width and accented letters made plain, dashes and spaces unified, invisible marks removed."""
    text = unicodedata.normalize("NFKD", _INVISIBLE.sub("", text)).casefold()
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    text = re.sub("[\u2010-\u2015\u2212_]", "-", text).replace("\u2019", "'")
    return re.sub(r"\s+", " ", text.replace("_", " "))


def _depicted_texts(content: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a raw row that an image could depict or be attacked towards: prompt, target_prompt, caption."""
    for name, value in content.items():
        lowered = str(name).casefold()
        is_text = any(part in lowered for part in ("prompt", "text", "caption", "target"))
        if isinstance(value, str) and is_text and not lowered.startswith(("safe", "normal")):
            yield value


def _match_columns(row: Mapping[str, Any]) -> dict[str, str]:
    lowered = {str(name).strip().casefold(): name for name in row}
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
    where: str,
    default_kind: str | None,
    seed: int,
    occurrence: int,
) -> PromptRow:
    def value(field: str) -> Any:
        entry = content.get(names[field]) if field in names else None
        return None if entry is None or entry == "" or entry != entry else entry

    prompt = value("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise TableError(f"{where}: the prompt is empty")
    category = value("category")
    return PromptRow(
        id=str(value("id") if value("id") is not None else default_id),
        prompt=prompt.strip(),
        kind=_kind(value("kind"), default_kind, where),
        category=", ".join(map(str, category)) if isinstance(category, (list, tuple)) else str(category or ""),
        seed=_seed(value("seed"), prompt, seed, occurrence, where),
        safe_prompts=_texts(value("safe_prompts"), where),
        requested=_texts(value("requested"), where),
    )


def _kind(value: Any, default: str | None, where: str) -> str:
    if value is None:
        return default or "unlabelled"
    word = str(value).strip().casefold()
    for kind, words in _KIND_WORDS.items():
        if word in words:
            return kind
    raise TableError(f"{where}: unknown kind {value!r}; expected one of {', '.join(PROMPT_KINDS)}")


def _seed(value: Any, prompt: str, seed: int, occurrence: int, where: str) -> int:
    if value is None:
        return prompt_seed(prompt, seed, occurrence)
    try:
        number = float(value) if isinstance(value, str) and "." in value else int(value)
    except (TypeError, ValueError) as error:
        raise TableError(f"{where}: seed must be an integer, got {value!r}") from error
    if number != int(number):
        raise TableError(f"{where}: seed must be an integer, got {value!r}")
    return int(number)


def _texts(value: Any, where: str) -> tuple[str, ...]:
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
        raise TableError(f"{where}: expected a text or a list of texts, got {value!r}")
    return tuple(value)


def _check_unique(rows: Sequence[PromptRow], where: str) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise TableError(f"{where}: the id {row.id!r} occurs more than once")
        seen.add(row.id)


def _read_raw(path: Path) -> list[dict[str, Any]]:
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
        if suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return [_object(json.loads(line), path) for line in lines if line.strip()]
        if suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return [_object(row, path) for row in (content if isinstance(content, list) else [content])]
        if suffix == ".parquet":
            return _read_parquet(path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise TableError(f"cannot read the prompt set {path}: {error}") from error
    raise TableError(f"{path}: expected a .csv, .tsv, .jsonl, .json or .parquet file")


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        columns = [field.name for field in schema if not pa.types.is_binary(field.type)]
        return pq.read_table(path, columns=columns, partitioning=None).to_pylist()
    except pa.ArrowInvalid as error:
        raise TableError(f"{path} is not a parquet table: {error}") from error


def _object(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TableError(f"{path}: expected one JSON object a row, got {type(content).__name__}")
    return content
