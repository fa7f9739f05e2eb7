"""Boxes and labels can be seen on any ground, are whole, and change nothing else."""

import pytest
import torch
from PIL import ImageFont

from t2i_spo_plugin.guards.annotation import annotate, message_image, wrap_text


@pytest.mark.parametrize("ground", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 53), (512, 200)])
def test_boxes_and_labels_stand_out_from_every_ground_and_change_nothing_else(ground, height, width):
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


@pytest.mark.parametrize(
    "text", ["x" * 200, "many words that do not fit on one line of this image 0.93", "two\n\nparagraphs", "零 0.5"]
)
def test_wrapped_text_is_whole_and_no_wider_than_asked(text):
    font = ImageFont.load_default(size=12)
    lines = wrap_text(text, 60, font)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert len(lines) > 1 or font.getlength(text) <= 60
    assert all(font.getlength(line) <= 60 for line in lines)


def test_wrapped_text_keeps_its_line_breaks_and_needs_a_word():
    font = ImageFont.load_default(size=12)
    assert wrap_text("one\n\ntwo", 200, font) == ["one", "", "two"]
    assert wrap_text("", 200, font) == wrap_text(" \n ", 200, font) == []


@pytest.mark.parametrize("label", ["x" * 30, "a label of many words that do not fit on one line of this image 0.93"])
def test_a_long_label_breaks_before_the_right_edge(label):
    plain = torch.full((3, 120, 90), 0.5)
    ink = (annotate(plain, (), label) != plain).any(0)
    assert ink.any() and not bool(ink[:, -1].any()), "the label is cut by the edge"
    one_line = (annotate(plain, (), "x") != plain).any(0)
    assert int(ink.any(1).sum()) > int(one_line.any(1).sum()), "the label stands on one line"


def test_a_message_can_be_read_in_the_middle():
    image = message_image("withheld", (120, 200))
    ink = torch.nonzero(image[0] > 0.9).float()
    assert image.shape == (3, 120, 200) and abs(float(ink[:, 0].mean()) - 60) < 12
    assert abs(float(ink[:, 1].mean()) - 100) < 12
    assert len(message_image(" ", (8, 8)).unique()) == 1
