"""Disguises keep what an image shows, and its masks with it; spoilings leave nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from t2i_spo_plugin.cost.views import is_blank
from t2i_spo_plugin.sticker.disguises import (
    COLOUR_DEFINED,
    DISGUISES,
    MALFORMATIONS,
    SPOILINGS,
    STATED,
    Layers,
    blank,
    disguises_for,
)
from t2i_spo_plugin.sticker.world import GENERATOR_CONCEPTS, GENERATOR_STYLES, describe, render


def layers(seed):
    """A harmful scene with its mask, and its safe counterpart as the cover."""
    d = describe(seed, "test", "harmful", GENERATOR_CONCEPTS, GENERATOR_STYLES, n_objects=1)
    images = [render(x, seed, aligned=True) for x in (d, replace(d, concepts=d.safe_concepts[0]))]
    scene, cover = (torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image, _ in images)
    return Layers(scene, torch.from_numpy(np.stack([o.mask for o in images[0][1]])).float(), cover)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", list(DISGUISES))
def test_a_disguise_changes_the_image_the_same_way_each_time_and_stays_in_range(name):
    x = layers(3)
    image, masks = DISGUISES[name](x, rng())
    again, _ = DISGUISES[name](x, rng())
    assert image.shape == x.image.shape and masks.shape == x.masks.shape
    assert image.min() >= 0 and image.max() <= 1 and torch.equal(image, again)
    assert not torch.equal(image, x.image)


@pytest.mark.parametrize("name", ["upside down", "turned by 90 degrees", "mirrored", "halves exchanged"])
def test_a_mask_moves_with_what_it_covers(name):
    x = layers(5)
    marked = replace(x, image=x.masks.expand(3, -1, -1).clone())
    image, masks = DISGUISES[name](marked, rng(1))
    assert torch.equal(image[:1], masks)


@pytest.mark.parametrize(("name", "share"), [("inset of a third", 1 / 9), ("black frame", 0.5625)])
def test_a_smaller_image_has_a_smaller_mask_in_the_same_place(name, share):
    x = layers(7)
    marked = Layers(x.masks.expand(3, -1, -1).clone(), x.masks, torch.zeros_like(x.cover))
    image, masks = DISGUISES[name](marked, rng(2))
    assert (image[:1] - masks).abs().max() < 1e-5
    assert float(masks.sum() / x.masks.sum()) == pytest.approx(share, rel=0.1)


def test_half_transparent_over_its_twin_shows_both_halves():
    x = layers(9)
    image, _ = STATED["half transparent over its twin"](x, rng())
    assert torch.allclose(image, (x.image + x.cover) / 2)


def test_what_its_colour_defines_has_no_disguise_in_other_colours():
    assert set(DISGUISES) - set(disguises_for(("drop of blood",))) == {"grey", "tinted", "negative"}
    assert disguises_for(("bomb",)) == tuple(DISGUISES)
    assert {"drop of blood"} <= COLOUR_DEFINED


@pytest.mark.parametrize("name", list(SPOILINGS))
def test_a_spoilt_image_has_lost_the_object_and_is_not_blank(name):
    x = layers(11)
    spoilt = SPOILINGS[name](x.image, rng())
    assert spoilt.shape == x.image.shape and spoilt.min() >= 0 and spoilt.max() <= 1
    assert not is_blank(spoilt[None]).item()
    # No edge of the object stands where it stood.
    edges = [(i[:, :, 1:] - i[:, :, :-1]).abs().sum(0).flatten() for i in (x.image, spoilt)]
    assert float(torch.corrcoef(torch.stack(edges))[0, 1]) < 0.5


@pytest.mark.parametrize("name", list(MALFORMATIONS))
def test_a_malformed_image_differs_where_the_object_stands(name):
    x = layers(13)
    image = MALFORMATIONS[name](x, rng())
    changed = (image - x.image).abs().amax(0) > 0.05
    assert image.shape == x.image.shape and image.min() >= -1e-6 and image.max() <= 1 + 1e-6
    assert float((changed & (x.masks[0] > 0)).sum() / x.masks.sum()) > 0.2


def test_blank_images_are_blank_and_scenes_are_not():
    empty = torch.stack([blank(128, rng(n)) for n in range(60)])
    scenes = torch.stack([layers(n).image for n in range(20)])
    assert is_blank(empty).all() and not is_blank(scenes).any()
    assert not is_blank(0.5 + (scenes - 0.5) / 4).any()
    assert len({tuple(i.flatten(1).mean(1).tolist()) for i in empty}) > 30
