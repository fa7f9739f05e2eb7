"""A report that knows its images again: what it takes for the same image, what not, and which categories count."""

from __future__ import annotations

import pytest
import torch
from support.cost_models import ColourCost
from torch.nn.functional import interpolate

from t2i_spo_plugin.comfy_nodes.scored import (
    ALL,
    ANOTHER_IMAGE,
    SHOWS,
    ScoredImages,
    chosen_categories,
    signatures,
    stricter,
)
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import Guard, Policy, join_reports
from t2i_spo_plugin.guards.policy import Category
from t2i_spo_plugin.sticker.world import scene


COLOURS = Policy("colours", "photo", (Category("red", 0.5), Category("green", 0.5), Category("blue", 0.5)))


def scenes(count: int = 6) -> torch.Tensor:
    """Images `[B, 64, 64, 3]`."""
    kinds = ("harmful", "benign", "lookalike")
    drawn = [torch.from_numpy(scene(number, "test", kinds[number % 3]).image) for number in range(count)]
    return torch.stack(drawn).float() / 255.0


def scored(image: torch.Tensor, threshold: float = 0.5) -> ScoredImages:
    guard = Guard(ColourCost(), COLOURS)
    report = join_reports([guard(image[n : n + 1].movedim(-1, 1)) for n in range(len(image))])
    return ScoredImages.of(report, image, threshold, "image and map")


def scaled(image: torch.Tensor, factor: float, mode: str) -> torch.Tensor:
    size = [round(factor * side) for side in image.shape[1:3]]
    return interpolate(image.movedim(-1, 1), size, mode=mode).clamp(0.0, 1.0).movedim(1, -1)


def strangers(report: ScoredImages, image: torch.Tensor) -> list[bool]:
    return [reason == ANOTHER_IMAGE for reason in report.of_images(image).reasons]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 4.0])
def test_an_enlarged_image_is_the_same_image(factor, mode):
    image = scenes()
    assert not any(strangers(scored(image), scaled(image, factor, mode)))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area"])
def test_a_reduced_one_is_too(mode):
    image = scenes()
    assert not any(strangers(scored(image), scaled(image, 0.5, mode)))


def test_rounding_as_a_file_or_a_decoder_does_changes_nothing():
    image = scenes()
    noise = 0.02 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    assert not any(strangers(scored(image), (image + noise).clamp(0.0, 1.0).mul(31).round() / 31))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.roll(1, 0),
        lambda image: image.flip(2),
        lambda image: image[:, 4:-4, 4:-4],
        lambda image: scaled(image[:, 8:, 8:], 64 / 56, "bicubic"),
        lambda image: image[:, :, :48],
        lambda image: scaled(image, 1.0, "area")[:, :, torch.arange(0, 64, 2)],
        lambda image: 1.0 - image,
        lambda image: torch.cat([image[..., :2], image[..., 2:] * 0.5], -1),
    ],
    ids=["order", "mirror", "crop", "crop enlarged", "cut off", "stretched", "negative", "colour"],
)
def test_another_image_is_not_scored(change):
    image = scenes()
    found = scored(image).of_images(change(image))
    assert found.reasons == [ANOTHER_IMAGE] * len(image)
    assert bool(found.costs.isnan().all()) and found.flagged == [None] * len(image)
    for number in range(len(image)):
        assert found.is_unsafe(number, 1.0) and found.deciding_of(number) is None
        assert bool(found.region_of(number, 1.0).all())


def test_one_stranger_in_a_batch_leaves_the_others_their_costs():
    image = scenes(3)
    report, other = scored(image), image.clone()
    other[1] = image[2]
    found = report.of_images(other)
    assert [reason is None for reason in found.reasons] == [True, False, True]
    for number in (0, 2):
        assert found.category_costs[number] == report.category_costs[number]
        assert torch.allclose(found.heat_map(number), report.heat_map(number))


def test_what_is_changed_in_place_afterwards_is_another_image():
    image = scenes(1)
    report = scored(image)
    image[0] = scenes(2)[1]
    assert strangers(report, image) == [True]


def test_transparency_is_part_of_an_image():
    image = torch.cat([scenes(2), torch.full((2, 64, 64, 1), 0.5)], -1)
    report = scored(image)
    assert strangers(report, image) == [False, False]
    assert strangers(report, image[..., :3]) == [True, True], (
        "without its transparency it is seen as it was not scored"
    )


def test_a_report_of_no_images_is_one_of_none():
    image = scenes(1)
    empty = ScoredImages.of(join_reports([Guard(ColourCost(), COLOURS)([])]), image[:0], 0.5, "nothing")
    assert empty.of_images(image[:0]).reasons == [] and signatures(image[:0]).shape == (0, 6, 8, 8)
    with pytest.raises(ConfigError, match="is of 0 images and the image batch has 1"):
        empty.of_images(image)


def half_red_half_blue() -> torch.Tensor:
    image = torch.zeros(1, 64, 64, 3)
    image[:, :, :32, 0] = 1.0
    image[:, :, 32:, 2] = 1.0
    return image


def test_every_category_that_reaches_the_threshold_is_in_the_region():
    report = scored(half_red_half_blue())
    left = report.region_of(0, 0.4, ["red"])
    right = report.region_of(0, 0.4, ["blue"])
    both = report.region_of(0, 0.4)
    assert bool(left[:, :28].all()) and not bool(left[:, 36:].any())
    assert bool(right[:, 36:].all()) and not bool(right[:, :28].any())
    assert torch.equal(both, left | right)
    assert not bool(report.region_of(0, 0.99).any())


def test_of_the_chosen_categories_the_highest_decides():
    report = scored(half_red_half_blue())
    costs = report.category_costs[0]
    assert report.deciding_of(0) == max(costs, key=costs.__getitem__) != "green"
    assert report.deciding_of(0, ["green"]) == "green"
    assert report.deciding_of(0, ["green", "blue"]) == "blue"
    assert not report.is_unsafe(0, costs["blue"], ["green"]) and report.is_unsafe(0, costs["blue"], ["green", "blue"])


def test_categories_come_from_a_choice_and_a_list_whatever_their_case():
    known = ["weapons", "Blood", "smoking"]
    assert chosen_categories(ALL, "", known) == chosen_categories("", " , ", known) == ()
    assert chosen_categories("Weapons", "", known) == ("weapons",)
    assert chosen_categories(ALL, "blood, SMOKING", known) == ("Blood", "smoking")
    assert chosen_categories("blood", "weapons,blood", known) == ("Blood", "weapons")
    with pytest.raises(ConfigError, match="no category 'gluten'; choose 'the deciding one' or one of weapons, Blood"):
        chosen_categories(ALL, "weapons, gluten", known)


def test_what_shows_least_wins():
    assert [stricter(one, SHOWS[1]) for one in SHOWS] == [SHOWS[1], SHOWS[1], SHOWS[2]]
