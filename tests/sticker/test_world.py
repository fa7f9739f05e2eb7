"""The sticker world: deterministic scenes, a truth that fits the image, and splits that share nothing."""

from collections import Counter

import numpy as np
import pytest

from t2i_spo_plugin.data.minors import mentions_minors
from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.guards.policy import Policy
from t2i_spo_plugin.sticker import FOLDER, prompt_rows, world
from t2i_spo_plugin.sticker.atlas import atlas_index, sticker
from t2i_spo_plugin.sticker.wording import described


def test_equal_arguments_give_equal_scenes_and_other_seeds_others():
    first, again, other = world.scene(7), world.scene(7), world.scene(8)
    assert np.array_equal(first.image, again.image) and first.caption == again.caption
    assert first.caption != other.caption or not np.array_equal(first.image, other.image)


def test_there_are_enough_concepts_and_every_unsafe_one_has_a_harmless_twin_it_shares_a_style_with():
    assert len(world.CONCEPTS) >= 120
    unsafe = [c for c in world.CONCEPTS.values() if c.category]
    assert {c.category for c in unsafe} == set(world.CATEGORIES) and len(unsafe) == 42
    for concept in unsafe:
        twin = world.CONCEPTS[concept.twin]
        assert twin.category is None
        assert set(concept.styles) & set(twin.styles), concept.name


def test_the_pistol_is_never_the_water_pistol():
    assert set(world.CONCEPTS["pistol"].styles) == {"noto_v1", "fxemoji"}


def test_the_declared_subset_covers_what_is_promised():
    assert len(world.GENERATOR_CONCEPTS) >= 60 and len(world.GENERATOR_STYLES) >= 3
    counts = Counter(world.CONCEPTS[n].category for n in world.GENERATOR_UNSAFE)
    assert set(counts) == set(world.CATEGORIES) and min(counts.values()) >= 2
    assert {world.CONCEPTS[n].twin for n in world.GENERATOR_UNSAFE} <= set(world.GENERATOR_CONCEPTS)
    for name in world.GENERATOR_CONCEPTS:
        assert set(world.GENERATOR_STYLES) <= set(world.CONCEPTS[name].styles), name


@pytest.mark.parametrize("aligned", [True, False])
def test_boxes_hold_the_objects_and_nothing_is_drawn_outside(aligned):
    for seed in range(60):
        s = world.scene(seed, aligned=aligned)
        background = np.asarray(world.BACKGROUNDS[s.background], np.int16)
        drawn = np.abs(s.image.astype(np.int16) - background).max(-1) > 2
        inside = np.zeros_like(drawn)
        for thing in s.objects:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= world.SIZE and 0 <= y0 < y1 <= world.SIZE
            assert drawn[y0:y1, x0:x1].any(), (seed, thing)
            inside[y0:y1, x0:x1] = True
        assert not (drawn & ~inside).any(), seed


@pytest.mark.parametrize("aligned", [True, False])
def test_masks_cover_what_is_drawn_and_lie_in_their_boxes(aligned):
    for seed in range(60):
        s = world.scene(seed, aligned=aligned)
        drawn = np.abs(s.image.astype(np.int16) - np.asarray(world.BACKGROUNDS[s.background], np.int16)).max(-1)
        covered = np.logical_or.reduce([thing.mask for thing in s.objects])
        # What is drawn strongly is covered, and what is covered differs from the ground, but for pale stickers.
        assert (covered | (drawn < 140)).all(), seed
        for thing in s.objects:
            x0, y0, x1, y1 = thing.box
            outside = thing.mask.copy()
            outside[y0:y1, x0:x1] = False
            assert thing.mask.any() and not outside.any(), (seed, thing)


def test_the_masks_of_a_pair_are_apart_and_in_the_order_of_the_caption():
    for seed in range(60):
        s = world.scene(seed, n_objects=2)
        left, right = (thing.mask for thing in s.objects)
        assert not (left & right).any()
        assert np.nonzero(left)[1].mean() < np.nonzero(right)[1].mean()


def test_the_same_concept_twice_is_counted_in_the_caption():
    twice = [d for d in (world.describe(s, n_objects=2) for s in range(300)) if len(set(d.concepts)) == 1]
    assert 15 < len(twice) < 60
    for d in twice:
        assert " two " in d.caption and " next to " not in d.caption, d.caption


@pytest.mark.parametrize(
    ("one", "many"),
    [("bomb", "bombs"), ("pile of poo", "piles of poo"), ("kitchen knife", "kitchen knives"), ("key", "keys"),
     ("game die", "game dice"), ("wine glass", "wine glasses"), ("candy", "candies"),
     ("cake with candles", "cakes with candles"), ("two swords", "two swords")],
)  # fmt: skip
def test_plurals(one, many):
    assert world.plural(one) == many


def test_splits_share_no_combination():
    seen = {}
    for split in ("train", "val", "test"):
        for seed in range(400):
            d = world.describe(seed, split)
            key = (tuple(sorted(d.concepts)), d.background if len(d.concepts) == 1 else None)
            assert seen.setdefault(key, split) == split


def test_kinds_mean_what_they_say():
    for seed in range(100):
        harmful = world.describe(seed, kind="harmful")
        assert len(harmful.unsafe) == 1
        assert world.describe(seed, kind="benign").unsafe == frozenset()
        lookalike = world.describe(seed, kind="lookalike")
        assert not lookalike.unsafe and set(lookalike.concepts) & set(world.TWINS)


def test_safe_completions_name_no_unsafe_thing_and_keep_the_rest():
    for seed in range(100):
        d = world.describe(seed, kind="harmful", n_objects=2)
        if len(set(d.concepts)) == 1:
            assert d.safe_concepts == ((world.CONCEPTS[d.concepts[0]].twin,) * 2,)
            continue
        kept = next(n for n in d.concepts if world.CONCEPTS[n].category is None)
        unsafe = next(n for n in d.concepts if world.CONCEPTS[n].category is not None)
        replaced, left_out = d.safe_completions
        assert world.CONCEPTS[unsafe].twin in replaced and kept in replaced and kept in left_out
        assert d.background in replaced and d.background in left_out
        for shown in d.safe_concepts:
            assert not any(world.CONCEPTS[n].category for n in shown)


def test_impossible_wishes_are_refused():
    with pytest.raises(ValueError, match="no harmful combination"):
        world.describe(0, kind="harmful", concepts=["cat", "dog"])


def test_stickers_are_premultiplied_and_unknown_ones_refused():
    pixels = sticker("bomb", "noto", 40)
    assert pixels.shape == (40, 40, 4) and (pixels[..., :3] <= pixels[..., 3:]).all()
    with pytest.raises(KeyError, match="no sticker"):
        sticker("pistol", "twemoji", 40)


def test_the_held_out_style_is_no_training_style_and_every_style_names_its_licence():
    assert world.HELD_OUT_STYLE not in world.STYLES and world.HELD_OUT_STYLE not in world.GENERATOR_STYLES
    styles = atlas_index()["styles"]
    assert set(styles) == {*world.STYLES, world.HELD_OUT_STYLE}
    assert {s: e["licence"] for s, e in styles.items() if s == "twemoji"} == {"twemoji": "CC-BY-4.0"}
    assert all(e["licence"] in ("Apache-2.0", "MIT") for s, e in styles.items() if s != "twemoji")


def test_the_policy_has_the_world_s_categories():
    policy = Policy.from_yaml(FOLDER / "sticker.yaml")
    assert policy.domain == "sticker" and tuple(c.name for c in policy.categories) == world.CATEGORIES


def test_prompt_rows_are_distinct_deterministic_and_know_their_completions():
    rows = prompt_rows("harmful", 50, "test")
    assert rows == prompt_rows("harmful", 50, "test") and len({r.prompt for r in rows}) == 50
    for row in rows:
        assert row.category in world.CATEGORIES and row.safe_prompts and row.requested
    assert {r.prompt for r in rows} != {r.prompt for r in prompt_rows("harmful", 50, "test", seed=1)}
    assert not any(world.CONCEPTS[n].category for r in prompt_rows("lookalike", 30) for n in r.requested)


@pytest.mark.parametrize("wording", ["trained", "sentences", "new words", "order", "negation", "language", "typos"])
def test_prompt_rows_of_every_wording_know_what_they_ask_for(wording):
    rows = prompt_rows("harmful", 30, "test", wording=wording)
    assert len({r.prompt for r in rows}) == 30 and rows == prompt_rows("harmful", 30, "test", wording=wording)
    assert {r.prompt for r in rows}.isdisjoint(r.prompt for r in prompt_rows("harmful", 60, "test"))
    assert all(wording.replace(" ", "_") in r.id and r.category and r.safe_prompts and r.requested for r in rows)
    assert {r.wording for r in rows} == {wording} and prompt_rows("benign", 1)[0].wording == "grammar"
    assert not any(mentions_minors(r.prompt) for r in rows), "such rows are dropped, and the set would be smaller"


def test_prompt_rows_say_what_each_safe_completion_shows():
    for row in prompt_rows("harmful", 40, "test"):
        assert len(row.safe_objects) == len(row.safe_prompts)
        assert {thing for shown in row.safe_objects for thing in shown} == set(row.requested)
        for text, shown in zip(row.safe_prompts, row.safe_objects, strict=True):
            assert described(text, "test", 0).concepts == shown
    assert any(len(row.safe_objects) == 2 for row in prompt_rows("harmful", 40, "test"))


@pytest.mark.parametrize(("wording", "twice"), [("new words", False), ("language", False), ("typos", True)])
def test_a_class_without_plurals_asks_for_nothing_twice(wording, twice):
    rows = prompt_rows("benign", 60, "test", wording=wording)
    scenes = [world.describe(r.seed, "test", "benign", world.GENERATOR_CONCEPTS, world.GENERATOR_STYLES) for r in rows]
    assert any(len(set(d.concepts)) < len(d.concepts) for d in scenes) is twice


def test_an_unknown_wording_is_refused():
    with pytest.raises(SPOError, match="wording must be one of trained, grammar, .*got .slang"):
        prompt_rows("benign", 3, wording="slang")
