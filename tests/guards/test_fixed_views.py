"""What a guard says in the fixed views of evaluation, held against the same cost model called by hand."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from support.cost_models import ReadingSquareCost, RedSquareCost

from t2i_spo_plugin.cost.base import CostBatch
from t2i_spo_plugin.cost.views import VIEW_NAMES, fixed_views
from t2i_spo_plugin.errors import DomainError
from t2i_spo_plugin.guards import Guard, join_reports, judge_images
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.images import to_tensor


POLICY = Policy("squares", "squares", (Category("red"), Category("loud")))
RED, BLUE, GREY = (230, 25, 25), (25, 25, 230), (128, 128, 128)


def square(colour, side=32, edge=16, at=(0, 0), ground=GREY):
    image = Image.new("RGB", (side, side), ground)
    image.paste(colour, (*at, at[0] + edge, at[1] + edge))
    return image


def noise(seed=0, side=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


INSET = square(RED, edge=8, at=(20, 21))
"""A sixteenth of the image, wholly in its lower right quadrant."""


def test_harm_that_is_too_small_at_one_look_is_seen_enlarged():
    guard = Guard(RedSquareCost(), POLICY)
    report = guard(INSET, in_views=True)
    assert guard(INSET).flagged == [False] and report.flagged == [True]
    assert report.costs_once[0] == guard(INSET).costs[0] and report.costs_once[0] < 0.5 < report.costs[0]


@pytest.mark.parametrize("image", [INSET, square(BLUE), noise(), square(RED, side=20, edge=11, at=(4, 2))])
def test_the_cost_is_the_highest_over_the_nine_views(image):
    model = RedSquareCost()
    report = Guard(model, POLICY)([image, INSET], in_views=True)
    seen = fixed_views(to_tensor(image))[:, 0]
    by_hand = [float(model(view).logits.sigmoid().max()) for view in seen]
    assert len(by_hand) == len(VIEW_NAMES) == 9
    assert float(report.costs[0]) == pytest.approx(max(by_hand), abs=1e-5)
    assert float(report.costs_once[0]) == pytest.approx(by_hand[0], abs=1e-5)
    for place, name in enumerate(model.categories):
        highest = max(float(model(view).logits.sigmoid()[0, place]) for view in seen)
        assert report.category_costs[0][name] == pytest.approx(highest, abs=1e-5)


def test_maps_are_those_of_the_whole_image():
    guard = Guard(RedSquareCost(), POLICY)
    assert torch.equal(guard(INSET, in_views=True).logit_maps[0], guard(INSET).logit_maps[0])


def test_what_is_recognised_in_no_view_and_is_not_blank_is_unreadable():
    images = [noise(), square(BLUE), INSET, Image.new("RGB", (32, 32), "white"), square(BLUE, edge=6, at=(1, 1))]
    report = Guard(ReadingSquareCost(), POLICY)(images, in_views=True)
    assert report.unreadable == [True, False, False, False, False]
    assert report.blank == [False, False, False, True, False]


def test_an_unsafe_image_is_unsafe_and_not_unreadable():
    class Blind(ReadingSquareCost):
        def __call__(self, images):
            batch = super().__call__(images)
            return CostBatch(batch.logits, batch.logit_map, readable=torch.zeros(len(batch.logits)))

    report = Guard(Blind(), POLICY)([square(RED), square(BLUE)], in_views=True)
    assert report.flagged == [True, False] and report.unreadable == [False, True]


def test_a_cost_model_that_does_not_say_was_not_asked():
    report = Guard(RedSquareCost(), POLICY)([noise(), square(BLUE)], in_views=True)
    assert report.unreadable == [None, None] and report.blank == [False, False]
    once = Guard(ReadingSquareCost(), POLICY)(noise())
    assert (once.unreadable, once.blank, once.costs_once) == (None, None, None)


def test_every_frame_is_looked_at_in_views():
    stream = io.BytesIO()
    square(GREY, 32).save(stream, "GIF", save_all=True, append_images=[INSET], duration=50)
    empty = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    report = Guard(ReadingSquareCost(), POLICY)([stream.getvalue(), empty], in_views=True)
    assert report.flagged == [True, False] and report.blank == [False, True]
    assert report.unreadable == [False, None] or report.unreadable == [False, False]
    assert report.note(0) == "frame 2 of 2" and report.costs_once[0] < 0.5


def test_nan_in_one_view_is_not_scored_and_spoils_no_other():
    class Dizzy(RedSquareCost):
        """NaN wherever blue stands in the upper left and not below, which is so in some views alone."""

        def __call__(self, images):
            batch, pixels = super().__call__(images), to_tensor(images)
            lost = (pixels[:, 2, 0, 0] > 0.8) & (pixels[:, 2, -1, -1] < 0.8)
            return CostBatch(batch.logits.masked_fill(lost[:, None], math.nan), batch.logit_map)

    report = Guard(Dizzy(), POLICY)([square(BLUE, edge=8, at=(24, 24)), square(GREY)], in_views=True)
    assert report.reasons == ["the cost model gave NaN", None]
    assert math.isnan(report.costs[0]) and math.isnan(report.costs_once[0]) and report.flagged == [None, False]


def test_reports_in_views_are_joined_and_do_not_depend_on_the_batch():
    guard = Guard(ReadingSquareCost(), POLICY)
    images = [INSET, noise(), square(BLUE, side=24)]
    whole = guard(images, in_views=True)
    joined = join_reports([guard(image, in_views=True) for image in images])
    assert torch.equal(whole.costs, joined.costs) and torch.equal(whole.costs_once, joined.costs_once)
    assert (whole.unreadable, whole.blank) == (joined.unreadable, joined.blank) == ([False, True, False], [False] * 3)
    assert join_reports([guard(INSET)]).costs_once is None
    with pytest.raises(DomainError):
        guard(images, "photo", in_views=True)


def test_many_looks_are_scored_in_parts(monkeypatch):
    calls = []

    class Counting(RedSquareCost):
        def __call__(self, images):
            calls.append(len(images))
            return super().__call__(images)

    Guard(Counting(), POLICY)([noise(n) for n in range(20)], in_views=True)
    assert sum(calls) == 20 * 9 and max(calls) <= 64 + 9


def test_judging_looks_in_views_only_when_it_is_told_to():
    class Half:
        domain = "squares"

        def quality(self, images, prompts, safe_completions=None):
            from t2i_spo_plugin.quality.normalise import QualityBatch

            half = torch.full((len(prompts),), 0.5)
            return QualityBatch(half, half, half, half, half)

    guard = Guard(ReadingSquareCost(), POLICY)
    (once,) = judge_images([INSET], ["x"], [()], guard, Half())
    (seen,) = judge_images([INSET], ["x"], [()], guard, Half(), in_views=True)
    assert once.cost < 0.5 <= seen.cost and seen.cost_once == once.cost and once.cost_once is None
    assert (once.blank, once.unreadable) == (None, None) and (seen.blank, seen.unreadable) == (False, False)
