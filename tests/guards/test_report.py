"""What a report answers: which category decided, where the cost lies, and what joining reports keeps."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from support.cost_models import ColourCost, NaNCost, colour_policy

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.report import join_reports


RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (90, 90, 90)


@pytest.fixture
def guard():
    return Guard(ColourCost(), colour_policy())


def plain(colour, size=(16, 12)):
    return Image.new("RGB", size, colour)


def test_overlays_show_where_the_cost_is(guard):
    image = plain(GREY, (32, 32))
    image.paste(RED, (16, 0, 32, 16))
    report = guard(image)
    assert report.overlays()[0].size == (32, 32)
    (region,) = report.overlays("mask")
    assert region[4:12, 20:30].all() and not region[20:, :12].any()
    ((box, *rest),) = report.overlays("boxes")
    assert not rest and box[0] >= 12 and box[3] <= 20
    assert report.overlays("boxes", category="blue") == [[]]
    for bad in ({"kind": "circle"}, {"category": "green"}):
        with pytest.raises(ConfigError):
            report.overlays(**bad)


def test_no_place_costs_more_than_the_image(guard):
    image = plain(GREY, (32, 32))
    image.paste(RED, (28, 0, 32, 4))
    report = guard(image)
    (cost_map,) = report.heat_maps()
    assert report.flagged == [False] and float(cost_map.max()) == pytest.approx(float(report.costs[0]), abs=1e-6)
    assert report.overlays("boxes") == [[]]


def test_a_report_answers_for_each_image():
    report = Guard(NaNCost(), colour_policy())([plain(RED), plain((0, 0, 0)), plain(GREY)])
    assert [report.deciding(n) for n in range(3)] == [
        "red",
        None,
        max(report.category_costs[2], key=report.category_costs[2].get),
    ]
    assert report.cost_of(0) == pytest.approx(float(report.costs[0])) and report.cost_of(1) is None
    assert report.cost_of(0, "blue") == report.category_costs[0]["blue"]
    assert report.unsafe() == [True, True, False]
    assert report.unsafe(threshold=1.0) == [False, True, False]
    assert report.unsafe(category="blue") == [False, True, False]
    for ask in (report.cost_of, report.heat_map):
        with pytest.raises(ConfigError, match="no enabled category 'green'"):
            ask(0, category="green")


def test_an_unsafe_image_always_has_a_region():
    report = Guard(NaNCost(), colour_policy())([plain(RED), plain((0, 0, 0)), plain(GREY)])
    assert bool(report.region(0).all()) and bool(report.region(1).all()) and not bool(report.region(2).any())
    assert report.region(0).shape == (12, 16)
    # A map that stays below the threshold everywhere, as rounding or a hint of a map may make it.
    faint = replace(report, logit_maps=[maps - 50 if maps is not None else None for maps in report.logit_maps])
    assert not bool((faint.heat_map(0) >= 0.5).any()) and bool(faint.region(0).all())


def test_reports_join_to_that_of_the_whole_batch(guard):
    images = [plain(RED), plain(BLUE), plain(GREY)]
    joined, whole = join_reports([guard(images[:1]), guard([]), guard(images[1:])]), guard(images)
    assert torch.equal(joined.costs, whole.costs) and joined.category_costs == whole.category_costs
    assert joined.flagged == whole.flagged and joined.images == whole.images
    assert all(torch.equal(a, b) for a, b in zip(joined.heat_maps(), whole.heat_maps(), strict=True))
    with pytest.raises(ValueError, match="no report"):
        join_reports([])


def test_a_report_says_which_look_it_was_and_hides_what_was_not_scored():
    report = Guard(NaNCost(), colour_policy())([plain(RED), plain((0, 0, 0))])
    assert report.view(1) is None and report.note(1) == "" and report.note(0) == ""
    assert report.view(0).image.size == (16, 12) and report.view(0, "blue").note == ""
    assert report.region(1).shape == (12, 16)
    for ask in (report.view, report.note, report.region):
        with pytest.raises(ConfigError, match="no enabled category 'green'"):
            ask(0, category="green")
    with pytest.raises(ConfigError, match="no enabled category"):
        report.unsafe(category="green")


def test_a_region_reaches_down_to_its_threshold(guard):
    image = plain(GREY, (32, 32))
    image.paste(RED, (0, 0, 16, 32))
    report = guard(image)
    heat_map = report.heat_map(0)
    for threshold in (0.3, 0.5, 0.6):
        assert torch.equal(report.region(0, threshold), heat_map >= threshold)
    assert bool(report.region(0, 0.6).any()) and not bool(report.region(0, 0.6).all())
    assert not bool(report.region(0, 0.999).any()), "the image itself does not reach it"
    assert report.unsafe(float(report.costs[0])) == [True]


def test_blocked_images_stand_for_every_look_at_what_they_replace(guard):
    images = [plain(RED), plain(GREY)]
    report = guard(images)
    black = plain((0, 0, 0), (8, 6))
    other = report.with_images([black, images[1]])
    assert other.images == [black, images[1]] and other.costs is report.costs
    assert {view.image.size for view in other.views[0].values()} == {(8, 6)}
    assert set(other.views[0]) == set(report.views[0]) and other.views[1] is report.views[1]
    failed = Guard(NaNCost(), colour_policy())(plain((0, 0, 0)))
    assert failed.with_images([black]).views == [{}]


def test_the_map_of_a_category_is_calibrated_by_its_temperature_and_threshold():
    """The map's logits of two categories, at temperatures and thresholds of their own."""
    report = Guard(ColourCost(), colour_policy())(plain(RED))
    names = [category.name for category in report.policy.enabled]
    for category in report.policy.enabled:
        index = report.categories.index(category.name)
        logit = float(report.logit_maps[0][index].flatten()[0])
        chance = torch.sigmoid(torch.tensor(logit / float(report.temperature[index]))).item()
        low = chance < category.threshold
        expected = 0.5 * chance / category.threshold
        expected = expected if low else 0.5 + 0.5 * (chance - category.threshold) / (1 - category.threshold)
        assert float(report.heat_map(0, category.name)[0, 0]) == pytest.approx(
            min(expected, report.category_costs[0][category.name]), abs=1e-5
        )
    assert len(names) == 2
