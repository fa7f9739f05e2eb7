import numpy as np
import pytest
import torch
from PIL import Image

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards.overlay import COLOUR_MAPS, boxes, heat, mask, overlay, tint
from t2i_spo_plugin.guards.policy import stretch


def flood_fill(region):
    """Bounding boxes by the plainest algorithm there is, as the reference."""
    region = region.copy()
    parts = []
    while region.any():
        stack = [tuple(np.argwhere(region)[0])]
        pixels = []
        while stack:
            y, x = stack.pop()
            if 0 <= y < region.shape[0] and 0 <= x < region.shape[1] and region[y, x]:
                region[y, x] = False
                pixels.append((y, x))
                stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        ys, xs = zip(*pixels, strict=True)
        parts.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return parts


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.8])
def test_boxes_agree_with_a_flood_fill(density):
    for seed in range(5):
        region = np.random.default_rng(seed).random((17, 23)) < density
        assert sorted(boxes(region)) == sorted(flood_fill(region))


def test_boxes_are_sorted_by_area_and_exclude_their_end():
    region = np.zeros((10, 12), dtype=bool)
    region[1, 1] = True
    region[4:8, 5:9] = True
    assert boxes(region) == [(5, 4, 9, 8), (1, 1, 2, 2)]
    assert boxes(np.zeros((4, 4), dtype=bool)) == []
    with pytest.raises(ValueError, match="bool array"):
        boxes(np.zeros((4, 4)))


def test_heat_of_a_flat_map_is_the_cost():
    logit, temperature, threshold = 0.7, 2.0, 0.3
    expected = stretch(torch.sigmoid(torch.tensor(logit / temperature)), threshold)
    heat_map = heat(torch.full((4, 4), logit), (12, 10), temperature, threshold)
    assert heat_map.shape == (12, 10)
    assert torch.allclose(heat_map, expected.expand(12, 10))


def test_heat_stands_where_the_logits_stand():
    logits = torch.full((4, 4), -6.0)
    logits[3, 0] = 6.0
    heat_map = heat(logits, 64)
    y, x = divmod(int(heat_map.argmax()), 64)
    assert y >= 48 and x < 16
    assert boxes(mask(heat_map)) and boxes(mask(heat_map))[0][0] == 0 and boxes(mask(heat_map))[0][3] == 64


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"threshold": 1.0}, {"temperature": float("nan")}])
def test_heat_refuses_numbers_out_of_range(bad):
    with pytest.raises(ValueError, match="expected temperature"):
        heat(torch.zeros(4, 4), 8, **bad)


def test_overlay_leaves_a_harmless_image_as_it_is_and_reddens_a_costly_one():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    before = np.asarray(image).copy()
    assert np.array_equal(np.asarray(overlay(image, torch.zeros(9, 7))), before)
    red = np.asarray(overlay(image, torch.ones(3, 3))).astype(int)
    assert (red[..., 0] > red[..., 1]).all() and (red[..., 0] > red[..., 2]).all()
    assert np.array_equal(np.asarray(image), before)
    with pytest.raises(ValueError, match="one image"):
        overlay([image, image], torch.zeros(9, 7))


@pytest.mark.parametrize("colour_map", COLOUR_MAPS)
def test_every_colour_map_is_clear_where_nothing_costs(colour_map):
    pixels = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, 63).reshape(9, 7)
    tinted = tint(pixels, ramp, colour_map, 0.6)
    assert torch.equal(tinted[:, 0, 0], pixels[:, 0, 0])
    assert torch.equal(tint(pixels, ramp, colour_map, 0.0), pixels)
    assert torch.allclose(
        tint(pixels, torch.ones(9, 7), colour_map, 1.0)[:, 3, 3], torch.tensor(COLOUR_MAPS[colour_map][-1])
    )
    assert float(tinted.min()) >= 0.0 and float(tinted.max()) <= 1.0


def test_colours_and_opacity_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="colour_map must be one of heat"):
        tint(torch.zeros(3, 2, 2), torch.zeros(2, 2), "rainbow")
    with pytest.raises(ConfigError, match="opacity"):
        tint(torch.zeros(3, 2, 2), torch.zeros(2, 2), opacity=1.5)
