"""Prompts of the wording classes: what is held out for the test is in no training caption."""

import random
from dataclasses import replace

import pytest

from t2i_spo_plugin.sticker import forms
from t2i_spo_plugin.sticker.wording import (
    LANGUAGES,
    Wording,
    described,
    held_out_prompt,
    misspelt,
    prompts,
    training_caption,
    words,
)
from t2i_spo_plugin.sticker.world import CONCEPTS, GENERATOR_CONCEPTS, GENERATOR_STYLES, describe, plural


@pytest.fixture(scope="module")
def captions():
    """4000 training captions of the declared subset."""
    scenes = [describe(seed, "train", concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES) for seed in range(4000)]
    return [training_caption(d, random.Random(d.seed)) for d in scenes]


def test_every_declared_concept_has_listed_and_held_out_words_names_abroad_and_an_emoji():
    listed = [word for name in CONCEPTS for word in words()[name].listed]
    for name in GENERATOR_CONCEPTS:
        entry = words()[name]
        assert len(entry.listed) >= 5 and len(entry.held_out) == 2 and entry.emoji, name
        assert set(entry.foreign) == set(LANGUAGES) and all(entry.foreign.values())
        assert not set(entry.held_out) & set(listed), name
    assert len({words()[name].emoji for name in GENERATOR_CONCEPTS}) == len(GENERATOR_CONCEPTS)


def test_no_word_names_two_declared_concepts():
    owners: dict[str, str] = {}
    for name in GENERATOR_CONCEPTS:
        for word in (*words()[name].listed, *words()[name].held_out):
            assert owners.setdefault(word, name) == name, word


def test_training_captions_hold_no_word_that_is_held_out(captions):
    text = "\n".join(f" {caption.lower()} " for caption in captions)
    for name in GENERATOR_CONCEPTS:
        for word in words()[name].held_out:
            assert f" {word} " not in text, word


def test_training_captions_take_no_form_that_is_held_out(captions):
    held_out = [*forms.HELD_OUT, *forms.HELD_OUT_ORDER, *forms.HELD_OUT_NEGATION]
    trained = {*forms.TRAINED, *forms.TRAINED_ORDER, *forms.TRAINED_NEGATION, forms.GRAMMAR}
    assert not trained & set(held_out)
    # The longest piece of text of a form marks it.
    for form in held_out:
        mark = max(form.replace("}", "{").split("{")[::2], key=len).lower()
        assert len(mark) < 8 or not any(mark in caption.lower() for caption in captions), form


def test_training_captions_are_of_many_kinds(captions):
    assert len(set(captions)) > 3500
    assert any(c.isupper() for c in captions) and any(c.endswith("?") for c in captions)
    assert any("without" in c for c in captions) and any("Hintergrund" in c for c in captions)
    assert any("two " in c for c in captions) and any("small" in c for c in captions)
    assert any(words()["bomb"].emoji in c for c in captions)


@pytest.mark.parametrize("wording", list(Wording))
def test_prompts_of_a_class_are_distinct_and_of_the_test_split(wording):
    asked = prompts(wording, 60)
    assert len({p.text for p in asked}) == 60 and asked == prompts(wording, 60)
    assert {p.description.split for p in asked} == {"test"}
    assert {p.text for p in asked} != {p.text for p in prompts(wording, 60, seed=1)}


def test_a_negated_thing_is_named_and_not_shown():
    for p in prompts(Wording.NEGATION, 80):
        (name,) = p.negated
        assert name not in p.description.concepts
        assert any(word in p.text or plural(word) in p.text for word in words()[name].listed), p


def test_new_words_are_the_held_out_ones():
    for p in prompts(Wording.NEW_WORDS, 60):
        for name in p.description.concepts:
            assert any(word in p.text for word in words()[name].held_out), p


def test_a_misspelling_is_near_its_word_and_never_in_both_halves():
    rng = random.Random(0)
    trained = {misspelt("strawberry", rng, held_out=False) for _ in range(400)}
    held_out = {misspelt("strawberry", rng, held_out=True) for _ in range(400)}
    assert len(trained) > 50 and len(held_out) > 20 and not trained & held_out
    for wrong in trained | held_out:
        assert wrong[0] == "s" and wrong != "strawberry" and abs(len(wrong) - 10) <= 1


def test_positions_in_words_are_those_of_the_scene():
    d = next(d for s in range(200) if len(set((d := describe(s, n_objects=2)).concepts)) == 2)
    for n in range(60):
        text = held_out_prompt(d, Wording.ORDER, random.Random(n)).text
        if text.startswith("right:"):
            right, left = text.removeprefix("right:").split("; left:")
            assert any(w in left for w in words()[d.concepts[0]].listed)
            assert any(w in right for w in words()[d.concepts[1]].listed)
            return
    raise AssertionError("no prompt named right before left")


def test_captions_of_the_grammar_are_read_as_they_were_written():
    for seed in range(400):
        d = describe(seed, "test")
        for one in (d, *(replace(d, concepts=c, words=c, size_words=("",) * len(c)) for c in d.safe_concepts)):
            assert described(one.caption, "test", seed) == one, one.caption
        for wording in (Wording.GRAMMAR, Wording.NEW_WORDS):
            if set(d.concepts) <= set(GENERATOR_CONCEPTS) and len(set(d.concepts)) == len(d.concepts):
                text = held_out_prompt(d, wording, random.Random(seed)).text
                assert described(text, "test", seed).concepts == d.concepts, text


@pytest.mark.parametrize(
    "text",
    ["a cat", "a noto sticker of a unicorn on a blue background", "a cubist sticker of a cat on a blue background"],
)
def test_what_is_no_caption_of_the_grammar_is_refused(text):
    with pytest.raises(ValueError, match="no caption of the grammar|nothing that the world knows"):
        described(text, "test", 0)
