"""Boxes and labels can be seen on any ground; what is hidden cannot be made out again, and nothing else changes."""

import pytest
import torch

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards.annotation import CELLS_ACROSS, annotate, hide, message_image


def noise(height, width, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def region(height, width, box):
    found = torch.zeros(height, width, dtype=torch.bool)
    x0, y0, x1, y1 = box
    found[y0:y1, x0:x1] = True
    return found


@pytest.mark.parametrize("ground", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 53), (512, 200)])
def test_marks_stand_out_from_every_ground_and_change_nothing_else(ground, height, width):
    plain = torch.full((3, height, width), ground)
    before = plain.clone()
    for marked, label in (([(10, 12, 30, 30)], ""), ([], "weapons 0.93")):
        drawn = annotate(plain, marked, label)
        changed = (drawn - plain).abs().amax(0) > 0
        assert 0 < changed.float().mean() < 0.6 and torch.equal(plain, before)
        if ground != 1.0:
            assert float(drawn.max()) > 0.9, "no white on a dark ground"
        if ground != 0.0:
            assert float(drawn.min()) < 0.1, "no black on a light ground"
    assert torch.equal(annotate(plain), plain)


def test_the_label_stands_by_the_largest_box_and_stays_inside():
    plain = torch.full((3, 200, 200), 0.5)
    for box in [(0, 0, 40, 40), (150, 150, 200, 200), (60, 100, 120, 140)]:
        both, boxes_only = annotate(plain, [box], "smoking_drugs 0.93"), annotate(plain, [box])
        where = torch.nonzero((both != boxes_only).any(0))
        assert len(where)
        centre = where.float().mean(0)
        assert abs(float(centre[0]) - (box[1] + box[3]) / 2) < 60
        # The whole label: as much ink as on an image where nothing is in its way.
        ink = (annotate(plain, (), "smoking_drugs 0.93") != plain).any(0).sum()
        assert len(where) > 0.6 * float(ink)


@pytest.mark.parametrize("label", ["x" * 200, "many words that do not fit on one line of this image 0.93", "零 0.5"])
def test_a_long_label_does_no_harm(label):
    assert annotate(noise(24, 24), [(0, 0, 24, 24)], label).shape == (3, 24, 24)


@pytest.mark.parametrize("how", ["blur", "pixelate"])
@pytest.mark.parametrize(("height", "width", "box"), [(64, 64, (10, 20, 30, 50)), (101, 67, (0, 0, 20, 9))])
def test_hiding_leaves_no_detail_in_the_region_and_all_of_it_elsewhere(how, height, width, box):
    image, where = noise(height, width), region(height, width, box)
    before = image.clone()
    hidden = hide(image, where, how)
    assert torch.equal(image, before)
    x0, y0, x1, y1 = box
    inside = hidden[:, y0:y1, x0:x1]
    # Another image with the same averages would give the same: fine detail is gone.
    assert float(inside.std()) < 0.5 * float(image[:, y0:y1, x0:x1].std())
    margin = 3 * -(-max(x1 - x0, y1 - y0) // CELLS_ACROSS)
    far = ~region(height, width, (max(0, x0 - margin), max(0, y0 - margin), x1 + margin, y1 + margin))
    assert bool(far.any()) and torch.equal(hidden[:, far], image[:, far])


def test_a_large_thing_is_hidden_as_well_as_a_small_one():
    """A checkerboard of six fields is lost at either size."""
    for size in (24, 240):
        board = ((torch.arange(size)[:, None] * 12 // size + torch.arange(size)[None] * 12 // size) % 2).float()
        image = board.expand(3, size, size)
        hidden = hide(image, torch.ones(size, size, dtype=torch.bool), "pixelate")
        assert len(hidden[0].unique()) <= CELLS_ACROSS**2
        assert float(hidden.std()) < 0.1


@pytest.mark.parametrize("channels", [1, 4])
def test_hiding_takes_any_channels_and_types(channels):
    image = torch.rand(channels, 20, 20).half()
    hidden = hide(image, region(20, 20, (0, 0, 9, 9)))
    assert hidden.shape == image.shape and hidden.dtype == image.dtype
    assert hide(image, torch.zeros(20, 20, dtype=torch.bool)) is image


def test_hiding_says_what_is_wrong():
    with pytest.raises(ConfigError, match="blur or pixelate"):
        hide(noise(8, 8), torch.ones(8, 8, dtype=torch.bool), "smear")
    with pytest.raises(ConfigError, match=r"region \[8, 8\], got \[4, 8\]"):
        hide(noise(8, 8), torch.ones(4, 8, dtype=torch.bool))


def test_a_message_can_be_read_in_the_middle():
    told = message_image("withheld", (120, 200))
    ink = torch.nonzero(told[0] > 0.9).float()
    assert told.shape == (3, 120, 200) and abs(float(ink[:, 0].mean()) - 60) < 12
    assert abs(float(ink[:, 1].mean()) - 100) < 12
    assert len(message_image(" ", (8, 8)).unique()) == 1
