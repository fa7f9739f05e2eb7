"""How a scene can be asked for: wording classes, and prompts of each for training and for the test.

| class | words | sentence form |
|---|---|---|
| `grammar` | listed | the world's template |
| `sentences` | listed | forms of `forms.HELD_OUT` |
| `new words` | column `held_out` of `words.tsv`: in no training caption | the template |
| `order` | listed | `forms.HELD_OUT_ORDER`: background first, the right object first |
| `negation` | listed | `forms.HELD_OUT_NEGATION`: something that must not be there |
| `language` | German, French and Spanish names | `forms.HELD_OUT_LANGUAGE` |
| `typos` | listed, one letter wrong; other misspellings than training's | the template |

Training captions take the template and the `TRAINED` forms, with listed words, emoji characters, and misspellings.
"""

from __future__ import annotations

import csv
import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path

from . import forms
from .world import (
    BACKGROUNDS,
    CONCEPTS,
    GENERATOR_CONCEPTS,
    GENERATOR_STYLES,
    STYLE_WORDS,
    Description,
    Kind,
    Split,
    describe,
    plural,
    with_article,
)


LANGUAGES = ("de", "fr", "es")


class Wording(str, Enum):
    """Wording classes, by which results are printed."""

    GRAMMAR = "grammar"
    SENTENCES = "sentences"
    NEW_WORDS = "new words"
    ORDER = "order"
    NEGATION = "negation"
    LANGUAGE = "language"
    TYPOS = "typos"


TWICE_UNNAMED = (Wording.LANGUAGE, Wording.NEW_WORDS)
"""Classes that have no plurals, and so no way to ask for one concept twice."""


@dataclass(frozen=True)
class Words:
    """Names of one concept: `listed` may stand in training captions, `held_out` may not. `foreign` by language."""

    listed: tuple[str, ...]
    held_out: tuple[str, ...]
    foreign: dict[str, str]
    emoji: str


@dataclass(frozen=True)
class Prompt:
    """A text that asks for a scene: what the scene shows, how it is asked for, and concepts that must not be there."""

    text: str
    description: Description
    wording: Wording
    negated: tuple[str, ...] = ()


@cache
def words() -> dict[str, Words]:
    """Names of every concept: those of `concepts.tsv`, and what `words.tsv` adds for the declared ones."""
    with open(Path(__file__).with_name("words.tsv"), encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}
    out = {}
    for name, concept in CONCEPTS.items():
        row = rows.get(name)
        if row is None:
            out[name] = Words(concept.words, (), {}, "")
            continue
        listed = tuple(dict.fromkeys((*concept.words, *row["listed"].split(","))))
        foreign = {language: row[language] for language in LANGUAGES}
        out[name] = Words(listed, tuple(row["held_out"].split(",")), foreign, row["emoji"])
    return out


def misspelt(word: str, rng: random.Random, held_out: bool) -> str:
    """`word` with one letter left out, doubled, exchanged with its neighbour or another one.

    The first letter stays. Of all misspellings one in four is held out for the test, by its hash.
    """
    places = [n for n in range(1, len(word)) if word[n].isalpha()]
    if len(places) < 2:
        return word
    for _ in range(200):
        n, kind = rng.choice(places), rng.randrange(4)
        letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
        out = (
            word[:n] + word[n + 1 :],
            word[:n] + word[n] + word[n:],
            word[: n - 1] + word[n] + word[n - 1] + word[n + 1 :] if n > 1 else word,
            word[:n] + letter + word[n + 1 :],
        )[kind]
        is_held_out = hashlib.sha256(out.encode()).digest()[0] % 4 == 0
        if out != word and is_held_out == held_out:
            return out
    return word


def training_caption(description: Description, rng: random.Random) -> str:
    """A caption of the scene as training writes them: all wording classes but what is held out for the test."""
    names = [rng.choice(words()[n].listed) if rng.random() < 0.7 else n for n in description.concepts]
    if len(set(description.concepts)) < len(names):
        names = names[:1] * 2
    kind = rng.random()
    has_words = all(words()[n].foreign for n in description.concepts)
    if kind < 0.06 and has_words and len(set(names)) == len(names):
        return _foreign(description, rng, forms.TRAINED_LANGUAGE)
    if kind < 0.10 and has_words:
        names = [words()[n].emoji for n in description.concepts]
        return rng.choice(("{things}", "{bare}", "{style} {bare}", "{bare} {background}", "draw {bare}")).format_map(
            _slots(description, names, " ", bare=True)
        )
    if kind < 0.25:
        place = rng.randrange(len(names))
        wrong = misspelt(names[place], rng, held_out=False)
        names = [wrong if n == place or names[n] == names[place] else word for n, word in enumerate(names)]
    if kind < 0.5:
        text = _caption_with(description, names)
    elif kind < 0.58:
        return _negated(description, names, rng, forms.TRAINED_NEGATION)[0]
    else:
        pool = forms.TRAINED_ORDER if kind < 0.68 else forms.TRAINED
        text = _fill(description, names, rng, pool, forms.CONNECTORS)
    return _case(text, rng)


def held_out_prompt(description: Description, wording: Wording, rng: random.Random) -> Prompt:
    """The scene asked for in `wording`, with what is held out for the test."""
    listed = [rng.choice(words()[n].listed) for n in description.concepts]
    if len(set(description.concepts)) < len(listed):
        listed = listed[:1] * 2
    negated: tuple[str, ...] = ()
    if wording is Wording.GRAMMAR:
        text = _caption_with(description, listed)
    elif wording is Wording.SENTENCES:
        text = _fill(description, listed, rng, forms.HELD_OUT, forms.HELD_OUT_CONNECTORS)
    elif wording is Wording.NEW_WORDS:
        text = _caption_with(description, [rng.choice(words()[n].held_out) for n in description.concepts])
    elif wording is Wording.ORDER:
        text = _fill(description, listed, rng, forms.HELD_OUT_ORDER, forms.HELD_OUT_CONNECTORS)
    elif wording is Wording.NEGATION:
        text, negated = _negated(description, listed, rng, forms.HELD_OUT_NEGATION)
    elif wording is Wording.LANGUAGE:
        text = _foreign(description, rng, forms.HELD_OUT_LANGUAGE)
    else:
        text = _caption_with(description, [misspelt(word, rng, held_out=True) for word in listed])
    return Prompt(text, description, wording, negated)


def described(caption: str, split: Split, seed: int) -> Description:
    """The scene that a caption of the grammar asks for: what `Description.caption` wrote, read again.

    Raises:
        ValueError: it is no caption of the grammar.
    """
    match = re.fullmatch(r"an? (\S+) sticker of (.+) on an? (\S+) background", caption)
    styles = {word: style for style, word in STYLE_WORDS.items()}
    if match is None or match[1] not in styles or match[3] not in BACKGROUNDS:
        raise ValueError(f"{caption!r} is no caption of the grammar")
    owners = {word: name for name, entry in words().items() for word in (*entry.listed, *entry.held_out)}
    things: list[tuple[str, str]] = []
    for part in match[2].split(" next to "):
        bare = re.sub(r"^an? ", "", part)
        size = "small" if bare.startswith("small ") and bare not in owners else ""
        word = bare.removeprefix("small ") if size else bare
        twice = part.removeprefix("two ")
        if part not in owners and part != twice:
            size = "small" if twice.startswith("small ") else ""
            things += 2 * [(size, w) for w in owners if plural(f"{size} {w}".strip()) == twice][:1]
        elif word in owners:
            things.append((size, word))
        else:
            raise ValueError(f"{caption!r} names {part!r}, which is nothing that the world knows")
    if not 1 <= len(things) <= 2:
        raise ValueError(f"{caption!r} asks for {len(things)} things; a scene shows one or two")
    sizes, names = zip(*things, strict=True)
    concepts = tuple(owners[word] for word in names)
    return Description(concepts, names, sizes, styles[match[1]], match[3], split, seed)


def prompts(
    wording: Wording,
    count: int,
    kind: Kind = "any",
    split: Split = "test",
    seed: int = 0,
    n_objects: int | None = None,
) -> list[Prompt]:
    """`count` different test prompts of one wording class for what the bundled generator draws."""
    out: dict[str, Prompt] = {}
    first = 700_000_001 + 1_000_003 * seed
    for number in range(first, first + 60 * count + 1000):
        d = describe(number, split, kind, GENERATOR_CONCEPTS, GENERATOR_STYLES, n_objects)
        if wording in TWICE_UNNAMED and len(set(d.concepts)) < len(d.concepts):
            continue
        prompt = held_out_prompt(d, wording, random.Random(f"{number}|{wording.value}"))
        out.setdefault(prompt.text, prompt)
        if len(out) == count:
            return list(out.values())
    raise ValueError(f"only {len(out)} different {kind} prompts of the class {wording.value}, {count} were asked for")


def _caption_with(description: Description, names: list[str]) -> str:
    return replace(description, words=tuple(names)).caption


def _slots(description: Description, names: list[str], connector: str, bare: bool = False) -> dict[str, str]:
    """What the slots of a form stand for; `bare` writes the objects without articles and counts."""
    sized = [f"{size} {word}".strip() for size, word in zip(description.size_words, names, strict=True)]
    joint = connector if connector.startswith((",", " ")) else f" {connector}"
    joint = joint if joint.endswith(" ") else f"{joint} "
    if len(sized) == 2 and sized[0] == sized[1] and not bare:
        things, plain = f"two {plural(sized[0])}", f"two {plural(sized[0])}"
    else:
        articled = sized if bare else [with_article(word) for word in sized]
        things, plain = joint.join(articled), joint.join(sized)
    style, background = STYLE_WORDS[description.style], description.background
    return {
        "things": things,
        "bare": plain,
        "first": with_article(sized[0]),
        "second": with_article(sized[-1]),
        "style": style,
        "background": background,
        "a_style": with_article(style),
        "a_background": with_article(background),
    }


def _fill(
    description: Description,
    names: list[str],
    rng: random.Random,
    pool: tuple[str, ...],
    connectors: tuple[str, ...],
) -> str:
    pair = len(set(names)) == 2
    form = rng.choice([f for f in pool if pair or "{second}" not in f])
    return form.format_map(_slots(description, names, rng.choice(connectors)))


def _negated(
    description: Description, names: list[str], rng: random.Random, pool: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    other = rng.choice([n for n in GENERATOR_CONCEPTS if n not in description.concepts])
    word = rng.choice(words()[other].listed)
    slots = _slots(description, names, "and") | {"other": with_article(word), "others": plural(word)}
    return rng.choice(pool).format_map(slots), (other,)


def _foreign(description: Description, rng: random.Random, pool: Mapping[str, tuple[str, ...]]) -> str:
    language = rng.choice(LANGUAGES)
    names = [words()[n].foreign[language] for n in description.concepts]
    colour = forms.FOREIGN_COLOURS[language][list(BACKGROUNDS).index(description.background)]
    things = f" {forms.FOREIGN_AND[language]} ".join(names)
    return rng.choice(pool[language]).format(things=things, background=colour)


def _case(text: str, rng: random.Random) -> str:
    """Now and then in capitals, with a capital at the start, or with a full stop: what people type."""
    kind = rng.random()
    if kind < 0.05:
        return text.upper()
    if kind < 0.2:
        text = text[0].upper() + text[1:]
    return text + "." if 0.15 < kind < 0.25 and text[-1].isalnum() else text
