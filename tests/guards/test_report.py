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
