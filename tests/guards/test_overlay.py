import numpy as np
import pytest
import torch
from PIL import Image

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards.overlay import COLOUR_MAPS, boxes, heat, layer, mask, overlay, tint
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


def test_heat_is_interpolated_between_the_logits():
    logits = torch.tensor([[0.0, 4.0]])
    expected = torch.sigmoid(torch.tensor([0.0, 1.0, 3.0, 4.0]) / 2.0)
    torch.testing.assert_close(heat(logits, (1, 4), temperature=2.0)[0], expected)
    assert heat(torch.zeros(2, 3, requires_grad=True), 5).shape == (5, 5)
    assert not heat(torch.zeros(2, 3, requires_grad=True), 5).requires_grad
    torch.testing.assert_close(heat(logits, (1, 2)), torch.sigmoid(logits))


def test_heat_refuses_what_is_no_single_map():
    for shape in ((4,), (1, 4, 4)):
        with pytest.raises(ValueError, match="one map"):
            heat(torch.zeros(shape), 8)
    for bad in ({"threshold": 0.0}, {"temperature": -1.0}, {"threshold": float("nan")}):
        with pytest.raises(ValueError, match="expected temperature"):
            heat(torch.zeros(4, 4), 8, **bad)


def test_a_colour_lies_over_the_image_as_strongly_as_it_costs():
    pixels, colour = torch.full((3, 1, 3), 0.5), torch.tensor([0.0, 0.85, 0.95])[:, None]
    costs = torch.tensor([[0.0, 0.5, 1.0]])
    for options, opacity in (({}, 0.75), ({"opacity": 0.4}, 0.4), ({"opacity": 1.0}, 1.0)):
        expected = (1 - opacity * costs) * 0.5 + opacity * costs * colour
        torch.testing.assert_close(tint(pixels, costs, "cyan", **options)[:, 0], expected)


@pytest.mark.parametrize("colour_map", [name for name, colours in COLOUR_MAPS.items() if len(colours) > 1])
def test_colours_run_evenly_from_one_to_the_next(colour_map):
    anchors = torch.tensor(COLOUR_MAPS[colour_map])
    steps = len(anchors) - 1
    at = torch.arange(0, steps + 0.25, 0.5)[None] / steps
    expected = torch.stack([(anchors[int(n)] + anchors[int(n + 0.5)]) / 2 for n in torch.arange(0, steps + 0.25, 0.5)])
    made = layer(at, colour_map)
    torch.testing.assert_close(made[:3, 0].T, expected)
    assert torch.equal(made[3], at)


def test_the_heat_runs_from_yellow_to_red_and_is_the_default():
    low, high = layer(torch.tensor([[0.0, 1.0]]))[:3, 0].T
    assert low.tolist() == pytest.approx([1.0, 0.93, 0.55]) and high.tolist() == pytest.approx([0.86, 0.10, 0.10])
    ramp = torch.linspace(0.0, 1.0, 9)[None]
    assert torch.equal(tint(torch.zeros(3, 1, 9), ramp), tint(torch.zeros(3, 1, 9), ramp, "heat", 0.75))
    with pytest.raises(ConfigError, match="colour_map must be one of heat"):
        layer(torch.zeros(2, 2), "rainbow")


def test_an_overlay_takes_maps_of_any_size_and_range_and_its_own_opacity():
    image = np.full((4, 6, 3), 0.5, dtype=np.float32)
    high = torch.full((2, 3), 7.0, requires_grad=True)
    assert np.array_equal(np.asarray(overlay(image, high)), np.asarray(overlay(image, torch.ones(4, 6))))
    assert np.array_equal(np.asarray(overlay(image, -high)), np.asarray(overlay(image, torch.zeros(4, 6))))
    drawn = np.asarray(overlay(image, torch.ones(4, 6), "cyan", 0.5)).astype(float) / 255
    assert drawn[0, 0].tolist() == pytest.approx([0.25, 0.675, 0.725], abs=0.003)
    standard = np.asarray(overlay(image, torch.ones(4, 6), "cyan")).astype(float) / 255
    assert standard[0, 0, 0] == pytest.approx(0.125, abs=0.003), "three quarters"
    ramp = np.asarray(overlay(image, torch.tensor([[0.0, 1.0]]), "cyan", 1.0)).astype(float)[0, :, 0] / 255
    assert ramp.tolist() == pytest.approx([0.5, 0.5, 0.5 * 2 / 3, 0.5 / 3, 0.0, 0.0], abs=0.003)


def test_opacity_may_be_anything_from_none_to_whole():
    for opacity in (-0.01, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="opacity"):
            tint(torch.zeros(3, 2, 2), torch.zeros(2, 2), opacity=opacity)


def test_a_mask_holds_what_reaches_its_threshold():
    costs = torch.tensor([[0.49, 0.5, 0.7]], requires_grad=True)
    assert mask(costs).tolist() == [[False, True, True]] and mask(costs, 0.7).tolist() == [[False, False, True]]


def test_boxes_of_one_size_come_from_top_to_bottom_and_left_to_right():
    region = np.zeros((9, 9), dtype=bool)
    for y, x in ((6, 0), (0, 6), (0, 2)):
        region[y : y + 2, x : x + 2] = True
    assert boxes(region) == [(2, 0, 4, 2), (6, 0, 8, 2), (0, 6, 2, 8)]


def test_the_area_of_a_part_counts_its_pixels_and_not_its_box():
    region = np.zeros((9, 12), dtype=bool)
    region[0:6, 0] = region[5, 0:6] = True  # 11 pixels in a box of 36
    region[0:4, 8:11] = True  # 12 pixels
    assert boxes(region) == [(8, 0, 11, 4), (0, 0, 6, 6)]


def test_arms_that_meet_below_are_one_part():
    region = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=bool)
    assert boxes(region) == [(0, 0, 5, 3)]
    with pytest.raises(ValueError, match="bool array"):
        boxes(np.zeros((2, 2, 2), dtype=bool))
