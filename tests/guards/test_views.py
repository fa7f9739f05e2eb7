"""What a guard says of an image that is more than one opaque look: frames, and transparency over white and black."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.cost_models import ColourCost, RedSquareCost, colour_policy

from t2i_spo_plugin.guards import Guard, Policy, join_reports, safety_content, safety_page
from t2i_spo_plugin.guards.policy import Category


RED, BLUE, GREY, BLACK = (255, 0, 0), (0, 0, 255), (90, 90, 90), (0, 0, 0)


@pytest.fixture
def guard():
    return Guard(ColourCost(), colour_policy())


def plain(colour, size=(16, 12)):
    return Image.new("RGB", size, colour)


def animation(*colours, form="GIF", size=(16, 12)):
    first, *others = [plain(colour, size) for colour in colours]
    stream = io.BytesIO()
    first.save(stream, form, save_all=True, append_images=others, duration=80, lossless=True)
    return stream.getvalue()


def on_clear(colour, under=(255, 255, 255)):
    """A square of a colour on a ground that is transparent, with another colour under the alpha of 0."""
    image = Image.new("RGBA", (16, 16), (*under, 0))
    image.paste((*colour, 255), (0, 0, 8, 16))
    return image


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_worst_frame_counts_and_is_named(guard, form):
    report = guard([animation(GREY, RED, BLACK, form=form), plain(RED)])
    assert report.flagged == [True, True] and report.deciding(0) == "red"
    assert report.costs[0] == pytest.approx(float(report.costs[1]), abs=1e-3)
    assert report.note(0) == "frame 2 of 3" and report.note(1) == ""
    assert report.view(0).image.getpixel((3, 3))[0] > 200


def test_each_category_costs_what_its_own_worst_frame_costs(guard):
    report = guard(animation(BLUE, GREY, RED))
    alone = guard([plain(BLUE), plain(GREY), plain(RED)])
    for name, frame in (("blue", 1), ("red", 3)):
        assert report.view(0, name).frame == frame
        highest = max(costs[name] for costs in alone.category_costs)
        assert report.cost_of(0, name) == pytest.approx(highest, abs=1e-3)
        assert bool(report.region(0, category=name).all())


def test_frames_of_an_open_image_are_judged_and_its_place_is_kept(guard):
    with Image.open(io.BytesIO(animation(GREY, BLACK, RED))) as image:
        image.seek(1)
        report = guard(image)
        assert report.flagged == [True] and report.view(0).frame == 3
        assert image.tell() == 1


def test_long_animations_are_scored_in_parts(monkeypatch, guard):
    frames = [(number, number, number) for number in range(1, 150)]
    assert guard(animation(*frames, RED, *frames)).note(0) == "frame 150 of 299"
    assert guard.cost_model.calls == 5
    monkeypatch.setattr("t2i_spo_plugin.guards.guard._PIXELS_AT_ONCE", 2 * 16 * 12)
    assert Guard(ColourCost(), colour_policy())(animation(GREY, BLACK, GREY, RED, GREY)).note(0) == "frame 4 of 5"


def test_frames_of_other_sizes_share_one_report():
    pages = [Image.new("RGB", size, "grey") for size in ((16, 16), (32, 24), (8, 8))]
    pages[1].paste((255, 0, 0), (8, 6, 24, 18))
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    report = Guard(RedSquareCost(), Policy("p", "squares", (Category("red"), Category("loud"))))(stream.getvalue())
    assert report.flagged == [True] and report.view(0).frame == 2
    assert report.heat_map(0).shape == (24, 32) and report.overlays()[0].size == (32, 24)


def test_a_frame_that_fails_leaves_the_image_not_scored():
    class Failing(ColourCost):
        def __call__(self, images):
            batch = super().__call__(images)
            blue = batch.logits[:, 2] > 0
            return type(batch)(batch.logits.masked_fill(blue[:, None], float("nan")), batch.logit_map)

    report = Guard(Failing(), colour_policy())([animation(GREY, BLUE), plain(GREY)])
    assert report.flagged == [None, False]
    assert report.reasons[0].startswith("frame 2 of 2: ") and report.views[0] == {}


def test_a_cut_off_animation_is_not_scored(guard):
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    first, second = map(Image.fromarray, noise)
    first.save(stream, "PNG", save_all=True, append_images=[second])
    report = guard(stream.getvalue()[:-4000])
    assert report.flagged == [None] and "decoded" in report.reasons[0]


class DarkAndLightCost(ColourCost):
    """`white` where an image is mostly white, `black` where it is mostly black."""

    categories = ("white", "black", "none")

    def __call__(self, images):
        batch = super().__call__(images)
        maps = torch.stack([batch.logit_map.mean(1), -batch.logit_map.mean(1), -batch.logit_map.abs().mean(1)], 1)
        return type(batch)(maps.mean((2, 3)), maps)


def test_transparency_is_judged_over_white_and_over_black():
    policy = Policy("shades", "photo", (Category("white"), Category("black")))
    guard = Guard(DarkAndLightCost(), policy)
    half_grey = Image.new("RGBA", (16, 16), (128, 128, 128, 40))
    report = guard(half_grey)
    assert report.cost_of(0, "white") > 0.8 and report.cost_of(0, "black") > 0.8
    for ground in ("white", "black"):
        assert report.note(0, ground) == f"transparency over {ground}"
    light, dark = report.overlays("overlay", "white")[0], report.overlays("overlay", "black")[0]
    assert light.getpixel((15, 15)) != dark.getpixel((15, 15))


@pytest.mark.parametrize("form", ["pil", "array", "floats", "tensor"])
def test_transparency_counts_in_every_form_of_an_image(form):
    guard = Guard(DarkAndLightCost(), Policy("shades", "photo", (Category("black"),)))
    array = np.full((16, 16, 4), (128, 128, 128, 20), dtype=np.uint8)
    image = {
        "pil": Image.fromarray(array),
        "array": array,
        "floats": array.astype(np.float32) / 255,
        "tensor": torch.from_numpy(array).permute(2, 0, 1) / 255,
    }[form]
    report = guard([image, plain((255, 255, 255), (8, 8))])
    assert report.flagged == [True, False] and report.view(0).ground == "black"


def test_colours_under_full_transparency_are_not_seen():
    guard = Guard(RedSquareCost(), Policy("p", "squares", (Category("red"),)))
    assert guard([on_clear(GREY, under=RED), on_clear(RED, under=GREY)]).flagged == [False, True]


def test_an_image_that_is_transparent_all_over_is_safe_and_said_to_be_empty():
    always = Guard(DarkAndLightCost(gain=-100.0), Policy("shades", "photo", (Category("white"), Category("black"))))
    empty = Image.new("RGBA", (16, 12), (*RED, 0))
    report = always([empty, plain(GREY)])
    assert report.flagged[0] is False and float(report.costs[0]) == 0.0
    assert set(report.category_costs[0].values()) == {0.0}
    assert "empty" in report.note(0) and report.note(1) == ""
    assert report.heat_map(0).shape == (12, 16) and not report.heat_map(0).any()
    assert report.overlays()[0].size == (16, 12)


def test_empty_frames_do_not_make_an_animation_empty(guard):
    empty, bad = Image.new("RGBA", (16, 12), (0, 0, 0, 0)), Image.new("RGBA", (16, 12), (*RED, 255))
    stream = io.BytesIO()
    empty.save(stream, "PNG", save_all=True, append_images=[bad, empty], disposal=1)
    report = guard(stream.getvalue())
    assert report.flagged == [True] and report.view(0).frame == 2 and not report.view(0).empty


def test_an_image_that_lies_on_its_side_is_judged_and_drawn_upright(guard):
    upright = plain(GREY, (32, 16))
    upright.paste(RED, (0, 0, 16, 16))
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    lying.save(stream, "PNG", exif=exif)
    with Image.open(stream) as opened:
        for image in (stream.getvalue(), opened):
            report, expected = guard(image), guard(upright)
            assert torch.equal(report.costs, expected.costs)
            assert report.overlays()[0].tobytes() == expected.overlays()[0].tobytes()
            assert report.overlays("mask")[0].shape == (16, 32)


def test_page_and_content_say_which_frame_and_ground(guard):
    report = guard([animation(GREY, RED), on_clear(RED), plain(RED)])
    first, second, third = safety_content(report)["images"]
    assert (first["frame"], first["ground"], first["empty"]) == (2, None, False)
    assert second["frame"] is None and second["ground"] in ("white", "black")
    assert (third["frame"], third["ground"], third["empty"]) == (None, None, False)
    page = safety_page(report)
    assert "red (frame 2 of 2)" in page and "red (transparency over" in page


def test_joined_reports_keep_their_views(guard):
    sources = [animation(GREY, RED), plain(GREY)]
    joined = join_reports([guard(source) for source in sources])
    assert joined.note(0) == "frame 2 of 2" and joined.note(1) == ""
    assert joined.overlays()[0].tobytes() == guard(sources).overlays()[0].tobytes()


@pytest.mark.parametrize("block", ["black", "blur"])
@pytest.mark.parametrize("form", ["pil", "array", "tensor"])
def test_a_transparent_image_is_blocked_in_its_form(block, form):
    guard = Guard(ColourCost(), colour_policy(), block=block)
    array = np.zeros((2, 16, 16, 4), dtype=np.uint8)
    array[..., 0], array[..., 3] = 255, 200
    array[1, ..., 0] = 0
    images = {
        "pil": [Image.fromarray(one) for one in array],
        "array": array,
        "tensor": torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255,
    }[form]
    blocked, report = guard.apply_block(images, guard(images))
    assert report.flagged == [True, False] and type(blocked) is type(images)
    assert guard([blocked[0]]).flagged == ([False] if block == "black" else [True])
    assert report.overlays()[0].getpixel((8, 8)) != (255, 0, 0)


def test_files_are_blocked_as_images(guard, tmp_path):
    plain(RED).save(tmp_path / "red.png")
    plain(GREY).save(tmp_path / "grey.png")
    files = [tmp_path / "red.png", str(tmp_path / "grey.png")]
    strict = Guard(guard.cost_model, guard.policy, block="black")
    report = strict(files)
    assert report.flagged == [True, False] and report.region(0).shape == (12, 16)
    blocked, after = strict.apply_block(files, report)
    assert blocked[1] is files[1] and blocked[0].getextrema() == ((0, 0),) * 3
    assert after.overlays()[0].getextrema() != report.overlays()[0].getextrema()


def test_the_second_image_of_a_phones_photograph_is_no_frame(guard):
    # What MPO files carry beside the photograph is a depth map, or the brightness for other screens.
    assert guard(animation(GREY, RED, form="MPO")).flagged == [False]
