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


def ink_of(plain, drawn):
    """Where something was drawn: first and last row, first and last column."""
    rows, columns = ((plain != drawn).any(0).any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    return rows[0], rows[-1], columns[0], columns[-1]


@pytest.mark.parametrize(("edge", "line"), [(40, 1), (200, 1), (400, 2), (900, 4)])
def test_a_box_is_a_white_line_between_two_black_ones_inside_of_its_corners(edge, line):
    plain = torch.full((3, edge, edge), 0.5)
    x0, y0, x1, y1 = edge // 8, edge // 4, edge - edge // 8, edge - edge // 4
    drawn = annotate(plain, [(x0, y0, x1, y1)])
    expected = plain.clone()
    for inset, value in ((0, 0.0), (line, 1.0), (2 * line, 0.0), (3 * line, 0.5)):
        expected[:, y0 + inset : y1 - inset, x0 + inset : x1 - inset] = value
    assert torch.equal(drawn, expected)


def test_lines_grow_with_the_shorter_edge():
    for shape in ((3, 400, 900), (3, 900, 400)):
        column = annotate(torch.full(shape, 0.5), [(20, 20, 300, 300)])[0, 150, 15:40]
        assert column.tolist() == [0.5] * 5 + [0.0] * 2 + [1.0] * 2 + [0.0] * 2 + [0.5] * 14


@pytest.mark.parametrize(("size", "values"), [(1, [0.0]), (2, [0.0, 0.0]), (3, [0.0, 1.0, 0.0])])
def test_a_box_too_small_for_all_of_its_lines_has_those_that_fit(size, values):
    plain = torch.full((3, 40, 40), 0.5)
    drawn = annotate(plain, [(10, 10, 10 + size, 10 + size)])
    assert drawn[0, 10 + size // 2, 10 : 10 + size].tolist() == values
    assert all(7 <= place < 10 + size + 3 for place in ink_of(plain, drawn))


def test_every_box_is_drawn():
    plain = torch.full((3, 60, 60), 0.5)
    both = annotate(plain, [(2, 2, 20, 20), (30, 30, 55, 50)])
    first, second = annotate(plain, [(2, 2, 20, 20)]), annotate(plain, [(30, 30, 55, 50)])
    assert torch.equal(both != plain, (first != plain) | (second != plain))


def test_a_label_alone_stands_at_the_top_left_within_a_margin_of_a_64th():
    for edge in (64, 640):
        plain = torch.full((3, edge, edge), 0.5)
        top, bottom, left, right = ink_of(plain, annotate(plain, (), "Hg"))
        margin, size = edge // 64, max(8, min(40, edge // 16))
        outline = max(1, size // 9)
        # Letters are wide and tall as their font; nothing is left of the margin but the outline.
        assert margin - outline <= left <= margin + size // 4 and margin - outline <= top <= margin + size // 2
        assert 0.8 * size < bottom - top < 1.6 * size and right < edge // 2


def test_letters_grow_with_the_image_between_8_and_40_pixels():
    def tall(height, width):
        plain = torch.full((3, height, width), 0.5)
        top, bottom, _, _ = ink_of(plain, annotate(plain, (), "H"))
        return bottom - top

    assert tall(40, 40) == tall(128, 128) == tall(128, 900) < tall(256, 256) < tall(480, 480) < tall(640, 640)
    assert tall(640, 640) == tall(1000, 1000)


def test_lines_of_a_label_stand_one_and_a_quarter_font_sizes_apart():
    plain = torch.full((3, 320, 320), 0.5)  # a font of 20
    one, two = (annotate(plain, (), label) != plain for label in ("H", "H\nH"))
    assert torch.equal(two, one | one.roll(25, 1)) and not bool((one & one.roll(25, 1)).any())


@pytest.mark.parametrize(("edge", "lines"), [(128, 1), (320, 1), (320, 2)])
def test_a_label_stands_right_above_its_box_where_there_is_room(edge, lines):
    plain = torch.full((3, edge, edge), 0.5)
    tall = -(-max(8, edge // 16) * 5 // 4) * lines
    label = "\n".join(["Hg"] * lines)
    alone = ink_of(plain, annotate(plain, (), label))
    margin = edge // 64
    for y0 in (tall, tall + 7, edge // 2):
        box = (edge // 3, y0, edge - 4, edge - 4)
        drawn = annotate(plain, [box], label)
        bare = annotate(plain, [box])
        top, bottom, left, _ = ink_of(bare, drawn)
        assert (top - alone[0], left - alone[2]) == (y0 - tall - margin, box[0] - margin)
        assert bottom < y0 + 3


def test_without_room_above_the_label_stands_inside_its_box():
    plain = torch.full((3, 320, 320), 0.5)
    alone = ink_of(plain, annotate(plain, (), "Hg"))
    box = (100, 24, 300, 300)  # a line of 20 needs 25
    top, _, left, _ = ink_of(annotate(plain, [box]), annotate(plain, [box], "Hg"))
    # Below the box's lines (of 2 pixels, three of them) and a margin of 5.
    assert top - alone[0] == 24 + 3 * 2 + 5 - 5
    assert 0 <= left - alone[2] - (100 - 5) < 6, "its outline may vanish in the box's"


def test_a_label_inside_a_box_at_the_bottom_stays_in_the_image():
    plain = torch.full((3, 64, 320), 0.5)
    label = "\n".join("HHHHH")
    box = (100, 45, 300, 64)
    _, bottom, _, _ = ink_of(annotate(plain, [box]), annotate(plain, [box], label))
    alone = ink_of(plain, annotate(plain, (), label))
    assert bottom - alone[1] == 64 - 50 - 1


def test_a_label_by_a_box_at_the_right_ends_within_the_image():
    plain = torch.full((3, 320, 320), 0.5)
    label = "smoking_drugs 0.93"
    alone = ink_of(plain, annotate(plain, (), label))
    box = (290, 200, 318, 300)
    _, _, left, right = ink_of(annotate(plain, [box]), annotate(plain, [box], label))
    assert right - left == alone[3] - alone[2] and 310 <= right < 320
    _, _, left, _ = ink_of(annotate(plain, [(0, 200, 40, 300)]), annotate(plain, [(0, 200, 40, 300)], label))
    assert left == alone[2], "and one at the left begins within it"


def test_a_label_of_spaces_is_none():
    plain = torch.full((3, 64, 64), 0.5)
    assert torch.equal(annotate(plain, (), "  "), plain)


def test_a_half_covered_pixel_is_mixed_with_what_it_covers():
    light, dark = (annotate(torch.full((3, 320, 320), ground), (), "Hg") for ground in (1.0, 0.0))
    difference = (light - dark)[0]
    assert bool(((difference > 0.05) & (difference < 0.95)).any()), "letters have soft edges"
    assert float(light.max()) == 1.0 and float(dark.min()) == 0.0
    assert annotate(torch.full((3, 64, 64), 0.5, dtype=torch.float64), (), "H").dtype == torch.float64


def test_a_label_shrinks_until_its_longest_word_fits():
    plain = torch.full((3, 640, 320), 0.5)  # a font of 20
    short, long = (ink_of(plain, annotate(plain, (), "H" * count)) for count in (4, 28))
    assert long[1] - long[0] < short[1] - short[0] and 240 < long[3] < 320


@pytest.mark.parametrize(("size", "room"), [((120, 200), 10), ((480, 480), 40), ((900, 1200), 75)])
def test_a_message_is_a_12th_of_the_shorter_edge_tall_on_a_dark_ground(size, room):
    image = message_image("H", size)
    assert torch.equal(image[:, 0, 0], torch.full((3,), 0.12))
    top, bottom, left, right = ink_of(torch.full((3, *size), 0.12), image)
    font = max(8, min(40, room))
    assert 0.6 * font < bottom - top < 1.2 * font + 2
    assert abs((left + right + 1) / 2 - size[1] / 2) <= 2 and abs((top + bottom + 1) / 2 - size[0] / 2) <= 0.3 * font


def test_a_long_message_breaks_within_a_margin_of_a_16th():
    size = (320, 320)
    ink = ink_of(torch.full((3, *size), 0.12), message_image("withheld " * 12, size))
    assert ink[2] >= 20 and ink[3] < 300 and ink[3] - ink[2] > 200
    assert ink[0] > 0 and ink[1] < 319 and ink[1] - ink[0] > 3 * 25


def test_words_fill_their_lines():
    font = ImageFont.load_default(size=12)
    words = ["ab"] * 30
    width = int(font.getlength("ab ab ab") + 1)
    assert wrap_text(" ".join(words), width, font) == ["ab ab ab"] * 10
    exact = font.getlength("ab ab")
    assert wrap_text("ab ab ab ab", exact, font) == ["ab ab"] * 2


def test_a_word_that_is_too_long_is_cut_where_the_line_is_full():
    font = ImageFont.load_default(size=12)
    width = font.getlength("xxxx")
    assert wrap_text("x" * 10, width, font) == ["xxxx", "xxxx", "xx"]
    assert wrap_text("ab " + "x" * 5 + " cd", width, font) == ["ab", "xxxx", "x cd"]
    assert wrap_text("xyz", 1, font) == ["x", "y", "z"], "one letter at least"
    assert wrap_text("\n\nab\n", width, font) == ["ab"]


@pytest.mark.parametrize("box", [(10, 10, 12, 30), (10, 10, 30, 12)])
def test_a_narrow_box_is_black(box):
    x0, y0, x1, y1 = box
    drawn = annotate(torch.full((3, 40, 40), 0.5), [box])
    assert not drawn[:, y0:y1, x0:x1].any() and not bool((drawn == 1.0).any())
