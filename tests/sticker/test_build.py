"""What the judges of the sticker world learn from: restyled stickers, spoilt images, altered prompts."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from t2i_spo_plugin.sticker.atlas import sticker
from t2i_spo_plugin.sticker.build.autoencoder import crop
from t2i_spo_plugin.sticker.build.data import NAMES, JudgedScenes, draw, judged_pair, restyle, truth_of, wear
from t2i_spo_plugin.sticker.build.quality import altered, matches
from t2i_spo_plugin.sticker.build.store import prefetched, rendered
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


def test_the_truth_of_a_scene_names_what_it_shows():
    scenes = [describe(seed) for seed in range(50)]
    truth = truth_of(scenes)
    assert truth.shape == (50, len(CONCEPTS)) and set(truth.unique().tolist()) == {0.0, 1.0}
    for row, scene in zip(truth, scenes, strict=True):
        assert {NAMES[n] for n in row.nonzero().flatten().tolist()} == set(scene.concepts)


def test_wear_keeps_shape_and_range_and_moves_masks_with_what_they_cover():
    x, _, objects = draw(0, 8)
    masks = torch.from_numpy(np.stack([placed[0].mask for placed in objects])).float()[:, None]
    worn, moved = wear(x, masks, 0)
    assert worn.shape == x.shape and worn.min() >= 0 and worn.max() <= 1 and not torch.equal(worn, x)
    assert moved.shape == masks.shape and not torch.equal(moved, masks)
    marked, also_moved = wear(masks.expand(-1, 3, -1, -1).clone(), masks, 0)
    # Colours are worn too, places alike.
    layers = [torch.stack([a[0].flatten(), b[0].flatten()]) for a, b in zip(marked, moved, strict=True)]
    alike = [float(torch.corrcoef(both)[0, 1]) for both in layers]
    assert torch.equal(moved, also_moved) and min(abs(r) for r in alike) > 0.5


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A hundred scenes of the judges."""
    shares = {"disguised": 0.3, "spoilt": 0.2, "malformed": 0.2, "empty": 0.1}
    return JudgedScenes(tmp_path_factory.mktemp("judged") / "scenes.uint8", 100, **shares)


def test_what_cannot_be_recognised_has_no_truth_and_no_mask(scenes):
    for n in range(4):
        batch = scenes.batch(n, 48, 32)
        assert batch.images.shape == (48, 3, 128, 128) and batch.masks.shape == (48, len(NAMES), 32, 32)
        assert 8 < int(batch.readable.sum()) < 40
        assert torch.equal(batch.truth.any(1), batch.readable)
        assert not batch.masks[~batch.readable].any()
        shown = batch.masks.amax((2, 3)) > 0.5
        assert not (shown & ~batch.truth.bool()).any()
        # Wear moves a few out of sight, and an inset makes them small.
        assert float((shown & batch.truth.bool()).sum() / batch.truth.sum()) > 0.8


def test_a_batch_is_a_function_of_its_number_and_every_third_image_is_safe_where_the_one_before_is_not(scenes):
    one, again, other = scenes.batch(5, 24, 8), scenes.batch(5, 24, 8), scenes.batch(6, 24, 8)
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    unsafe = [d for d in one.described[1::3] if d.unsafe]
    assert unsafe
    for scene, cover in zip(one.described[1::3], one.described[2::3], strict=True):
        assert not cover.unsafe and scene.concepts != cover.concepts


def test_batches_made_ahead_by_other_processes_are_the_same_and_in_order(scenes):
    ahead = prefetched(lambda n: scenes.batch(n, 6, 4), 3, 7, jobs=2)
    for n in range(3, 7):
        one, own = ahead(n), scenes.batch(n, 6, 4)
        assert torch.equal(one.images, own.images) and one.described == own.described


def test_crops_stand_on_the_latents_grid_and_prefer_what_is_drawn():
    images = torch.zeros(40, 128, 128, 3, dtype=torch.uint8)
    images[:, 16:32, 96:112] = torch.arange(256, dtype=torch.uint8).view(16, 16)[None, :, :, None]
    parts = crop(images, 64, torch.Generator().manual_seed(0))
    assert parts.shape == (40, 64, 64, 3)
    shown = [int(part.any()) for part in parts]
    # One place in four shows it, and of two places the better one is taken.
    assert 12 < sum(shown) < 34
    for part in parts[torch.tensor(shown).bool()]:
        top, left = (int(n) for n in part[..., 0].nonzero()[0])
        assert top % 16 == 0 and left // 16 * 16 in (0, 16, 32, 48)


def test_rendered_scenes_are_taken_up_again_and_read_from_the_file(tmp_path):
    path = tmp_path / "scenes.uint8"
    first = rendered(path, judged_pair, 7, 3).clone()
    more = rendered(path, judged_pair, 7, 5)
    assert torch.equal(more[:3], first) and np.array_equal(more[4].numpy(), judged_pair(11))
    # Other seeds are other scenes, whatever the file holds.
    assert np.array_equal(rendered(path, judged_pair, 8, 2)[0].numpy(), judged_pair(8))


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
