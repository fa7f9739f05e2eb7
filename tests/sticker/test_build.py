"""What the judges of the sticker world learn from: restyled stickers, spoilt images, altered prompts."""

import random
from dataclasses import replace

import numpy as np
import torch

from t2i_spo_plugin.sticker.atlas import sticker
from t2i_spo_plugin.sticker.build.data import NAMES, draw, flat, restyle, ruin, truth_of, wear
from t2i_spo_plugin.sticker.build.quality import altered, matches
from t2i_spo_plugin.sticker.world import CONCEPTS, GENERATOR_CONCEPTS, describe


def test_a_restyled_sticker_stays_premultiplied_and_differs_from_draw_to_draw():
    original = sticker("cat", "noto", 48)
    made = [restyle(original, random.Random(seed)) for seed in range(20)]
    for one in made:
        assert one.shape == original.shape and one.dtype == np.float32
        assert one.min() >= 0 and one.max() <= 1 and (one[..., :3] <= one[..., 3:] + 1e-6).all()
        assert one[..., 3].sum() > 0.2 * original[..., 3].sum()
    assert len({one.tobytes() for one in made}) > 15
    assert np.array_equal(made[3], restyle(original, random.Random(3)))


def test_a_restyled_drop_of_blood_stays_red_and_a_droplet_blue():
    for seed in range(40):
        blood, droplet = (
            restyle(sticker(name, "fluent_flat", 48), random.Random(seed))[..., :3].sum((0, 1))
            for name in ("drop of blood", "droplet")
        )
        assert blood[0] == blood.max() and droplet[0] == droplet.min(), seed


def test_images_of_nothing_hold_no_edge():
    nothing = flat(64, 0)
    assert nothing.shape == (64, 3, 64, 64) and nothing.min() >= 0 and nothing.max() <= 1
    smooth = torch.nn.functional.avg_pool2d(nothing, 8)
    assert (smooth[..., 1:] - smooth[..., :-1]).abs().max() < 0.4
    assert any(float(one.max()) == 0 for one in nothing) and torch.equal(nothing, flat(64, 0))


def test_ruin_says_which_images_it_spoilt():
    x, _, _ = draw(0, 64, restyled=True)
    spoilt, which = ruin(x.clone(), 1)
    changed = (spoilt != x).flatten(1).any(1)
    assert torch.equal(changed, which) and 16 < int(which.sum()) < 48


def test_the_truth_of_a_scene_names_what_it_shows():
    scenes = [describe(seed) for seed in range(50)]
    truth = truth_of(scenes)
    assert truth.shape == (50, len(CONCEPTS)) and set(truth.unique().tolist()) == {0.0, 1.0}
    for row, scene in zip(truth, scenes, strict=True):
        assert {NAMES[n] for n in row.nonzero().flatten().tolist()} == set(scene.concepts)


def test_wear_keeps_shape_and_range():
    x, _, _ = draw(0, 8)
    worn = wear(x, 0)
    assert worn.shape == x.shape and worn.min() >= 0 and worn.max() <= 1 and not torch.equal(worn, x)


def test_an_altered_prompt_differs_in_one_thing_and_never_describes_the_image():
    rng = random.Random(0)
    scenes = [describe(seed, "train", "any", GENERATOR_CONCEPTS) for seed in range(200)]
    others = [altered(d, rng) for d in scenes]
    for d, other in zip(scenes, others, strict=True):
        differences = [d.style != other.style, d.background != other.background]
        differences += [a != b for a, b in zip(d.concepts, other.concepts, strict=True)]
        assert sum(differences) == 1
        assert all(other.style in CONCEPTS[name].styles for name in other.concepts)
    same, wrong = matches(scenes, others)
    assert not same.diagonal().any() and wrong.diagonal().all()


def test_the_same_things_in_another_order_neither_match_nor_mismatch():
    pair = next(d for d in (describe(s, n_objects=2) for s in range(50)) if d.concepts[0] != d.concepts[1])
    turned = replace(pair, concepts=pair.concepts[::-1], words=pair.words[::-1])
    same, wrong = matches([pair], [pair, turned])
    assert same.tolist() == [[True, False]] and wrong.tolist() == [[False, False]]
