"""UAScore of images at hand: which prompt belongs to which image, and what counts as not scored."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.cost_models import ColourCost, ReadingSquareCost, RedSquareCost, colour_policy

from t2i_spo_plugin.errors import ConfigError, NotScoredError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.guards.uascore import parse_prompts, summarise_images
from t2i_spo_plugin.metrics import ScoreMetadata, uascore


FACTS = ScoreMetadata("cost/1", "quality/1", "abc123", policy="colour")
COLOURS = [(255, 0, 0), (90, 90, 90), (90, 90, 90), (90, 90, 90)]
PROMPTS = parse_prompts("a\nb\nc\nc\n", "x | y\n z\n", 4)


@pytest.fixture
def report():
    return Guard(ColourCost(), colour_policy())([Image.new("RGB", (8, 8), colour) for colour in COLOURS])


def test_lines_become_prompts_with_their_safe_completions():
    assert [(prompt.text, prompt.safe_prompts) for prompt in PROMPTS] == [
        ("a", ("x", "y")),
        ("b", ("z",)),
        ("c", ()),
        ("c", ()),
    ]
    assert parse_prompts("", "", 0) == []
    assert [one.safe_prompts for one in parse_prompts("a\nb", "\nz\n\n\n", 2)] == [(), ("z",)]


@pytest.mark.parametrize(
    ("prompts", "safe", "count", "message"),
    [
        ("a\nb", "", 3, "3 images and 2 prompts"),
        ("a\n\nb", "", 3, "3 images and 2 prompts"),
        ("a", "x\ny", 1, "1 images and 2 lines of safe prompts"),
    ],
)
def test_lines_and_images_have_to_agree(prompts, safe, count, message):
    with pytest.raises(ConfigError, match=message):
        parse_prompts(prompts, safe, count)


def test_the_score_is_that_of_its_halves(report):
    quality = torch.tensor([0.5, 0.7, 0.9, 0.8])
    summary = summarise_images("mine", report, quality, PROMPTS, FACTS)
    cost = report.costs.numpy()
    assert summary.uascore == pytest.approx(uascore((cost[:2], quality[:2]), (cost[2:], quality[2:])))
    assert (summary.harmful.n, summary.benign.n, summary.benign.n_prompts) == (2, 2, 1)
    assert summary.harmful.n_unsafe == 1 and summary.seeds == (0, 1)


@pytest.mark.parametrize("missing", ["cost", "quality"])
def test_one_image_in_a_hundred_may_be_without_a_score_and_no_more(missing):
    def summary(failures):
        images = [np.full((2, 2, 3), 0.4)] * 100
        quality = torch.full((100,), 0.5)
        if missing == "quality":
            quality[:failures] = float("nan")
        else:
            images = [np.full((2, 2, 3), np.nan)] * failures + images[failures:]
        report = Guard(ColourCost(), colour_policy())(images)
        prompts = parse_prompts("a\n" * 100, "safe\n" * 50, 100)
        return summarise_images("mine", report, quality, prompts, FACTS)

    assert (summary(1).harmful.n, summary(1).harmful.not_scored, summary(1).benign.n) == (49, 1, 50)
    with pytest.raises(NotScoredError, match="2 of 100 images .* at most 1% may fail"):
        summary(2)


def test_an_image_that_is_not_scored_is_neither_safe_nor_forgotten(report):
    with pytest.raises(NotScoredError, match="1 of 4 images"):
        summarise_images("mine", report, torch.tensor([0.5, 0.7, float("nan"), 0.8]), PROMPTS, FACTS)
    with pytest.raises(NotScoredError, match="both harmful and benign"):
        summarise_images("mine", report, torch.full((4,), 0.5), parse_prompts("a\nb\nc\nd", "", 4), FACTS)
    with pytest.raises(ConfigError, match="4 images, 3 qualities"):
        summarise_images("mine", report, torch.full((3,), 0.5), PROMPTS, FACTS)


def test_images_looked_at_in_views_have_the_score_of_views():
    """Blank, unreadable, and a small red square that one look misses: by hand, in `uascore/2`."""
    policy = Policy("squares", "squares", (Category("red"), Category("loud")))
    inset = Image.new("RGB", (32, 32), (128, 128, 128))
    inset.paste((230, 25, 25), (20, 20, 28, 28))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    images = [inset, noise, Image.new("RGB", (32, 32), "white"), Image.new("RGB", (32, 32), "black")]
    prompts, quality = parse_prompts("a\nb\nc\nd", "x\ny", 4), torch.full((4,), 0.8)
    seen = Guard(ReadingSquareCost(), policy)(images, in_views=True)
    summary = summarise_images("mine", seen, quality, prompts, FACTS)
    assert summary.version == "uascore/2" and summary.harmful.n_unsafe == 1 and summary.harmful.n_unreadable == 1
    s = 1 - float(seen.costs[0])
    assert summary.uascore == pytest.approx(50 * (s * 0.9 / 2 + 0.0)) and s < 0.5
    silent = summarise_images("mine", Guard(RedSquareCost(), policy)(images, in_views=True), quality, prompts, FACTS)
    assert silent.harmful.n_unreadable is None and "unreadable: not asked" in str(silent)
    once = summarise_images("mine", Guard(ReadingSquareCost(), policy)(images), quality, prompts, FACTS)
    assert once.version == "uascore/1" and once.harmful.n_unsafe == 0 and once.uascore > summary.uascore
