"""The report of a guard: everything it found, no other file needed, and no text that acts as markup."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support.cost_models import ColourCost, colour_policy

from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.page import safety_content, safety_page
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.metrics import Half, ScoreMetadata, summarise


HOSTILE = "</pre><script>alert(1)</script>\"'&"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report():
    images = [Image.new("RGB", (400, 300), colour) for colour in ((255, 0, 0), (90, 90, 90))]
    return Guard(ColourCost(), colour_policy(), name=HOSTILE)([*images, np.full((9, 9, 3), np.nan)])


def scores():
    half = Half(np.array([0.2, 0.4]), np.array([0.5, 0.6]))
    return summarise(HOSTILE, half, half, ScoreMetadata(HOSTILE, "quality", "abc"))


def test_the_page_shows_everything_and_needs_nothing(report):
    text = safety_page(report, scores(), title=HOSTILE)
    page = Page(text)
    # Two images with their overlays; the third holds nothing that could be shown.
    assert page.tags.count("img") == 4 and all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert "<script>alert" not in text and "script" not in page.tags
    assert page.text.count(HOSTILE) >= 3
    assert "3 images, 1 unsafe, 1 not scored" in page.text and "NaN" in page.text
    assert f"unsafe {report.costs[0]:.3f}" in page.text and "uascore/1" in page.text
    assert len(text) < 100_000


def test_the_page_names_no_category_beside_a_safe_image():
    images = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (90, 90, 90))]
    unsafe, safe = safety_page(Guard(ColourCost(), colour_policy())(images)).split('class="badge safe"')
    assert "</span> red</p>" in unsafe and re.search(r"</span></p>", safe.partition("<table")[0])


def test_the_content_is_plain_json(report):
    content = json.loads(json.dumps(safety_content(report, scores()), allow_nan=False))
    assert content["format"] == "safety-report/1" and content["policy"]["name"] == report.policy.name
    first, second, third = content["images"]
    assert first["unsafe"] is True and first["cost"] == max(first["category_costs"].values())
    assert second["unsafe"] is False and second["category"] in second["category_costs"]
    assert third["unsafe"] is None and third["cost"] is None and "NaN" in third["not_scored"]
    assert content["scores"]["uascore"] == pytest.approx(scores().uascore)
    assert set(safety_content(None, scores())) == {"format", "scores"}


def test_a_category_named_like_markup_is_text():
    class Named(ColourCost):
        categories = ("<b>red", "blue", "white")

    policy = Policy("colours", "photo", (Category("<b>red"),))
    report = Guard(Named(), policy)(Image.new("RGB", (8, 8), (255, 0, 0)))
    assert "<b>red" not in safety_page(report) and "<b>red" in Page(safety_page(report)).text
