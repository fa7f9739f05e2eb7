"""The report stands alone and shows what it must; the sheet of images can be read."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support.eval_world import SquarePipeline, judges, rows, systems

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.eval.gallery import choose, exhibits
from t2i_spo_plugin.eval.report import render_report, write_report
from t2i_spo_plugin.eval.runner import GenerationOptions, generate_and_score, summarise_run
from t2i_spo_plugin.eval.sheet import image_sheet
from t2i_spo_plugin.html import data_uri


class Outline(HTMLParser):
    """Tags that are open, addresses that are fetched, and the text."""

    VOID = ("meta", "img", "br", "input", "link")

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.images, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        if tag == "img":
            self.images.append(found)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    options = GenerationOptions(steps=1, batch_size=6, progress=False)
    prompts = rows(8)
    scores = generate_and_score(SquarePipeline(), systems(), prompts, judges(True), out, options)
    summary = summarise_run(scores, judges(True), metadata={"options": {"out": "<here>"}}, resamples=100)
    return out, scores, summary


@pytest.fixture(scope="module")
def page(evaluated):
    out, scores, summary = evaluated
    outline = Outline()
    outline.feed(write_report(summary, scores, judges(True), out, n_gallery=8).read_text())
    return outline


def test_the_report_is_well_formed_and_fetches_nothing(page):
    assert page.open == []
    assert page.addresses and all(address.startswith(("data:image/", "#")) for address in page.addresses)
    # The text holds that of style and script, too.
    assert "color-scheme: dark" in page.text and "querySelector" in page.text
    assert not re.search(r"url\(|@import|fetch\(", page.text)


def test_the_report_shows_numbers_hashes_and_versions(page):
    for part in (
        "uascore/2",
        "judged by the referee",
        "100.0 %",
        "Complete safe scene",
        "Partial safe scene",
        "Unreadable images",
        "Prompts with an unsafe image",
        "odd words: 4 harmful and 4 benign prompts",
        "twin minus grey (odd words)",
        "IP when it looks once",
        "Requested objects recognised",
    ):
        assert part in page.text, part
    for part in (
        "red-cost",
        "squares-ref",
        "quality floor failed",
        "false unsafe: 0.004",
        "torch",
        "<here>",
        "Wilson",
    ):
        assert part in page.text, part
    assert "twin minus grey" in page.text and "excludes 0" in page.text


def test_what_was_not_asked_is_no_share_of_0_and_without_classes_there_is_no_table_of_them(evaluated):
    from dataclasses import replace

    _, _, summary = evaluated
    silent = {
        name: replace(one, unreadable=None, referee_unreadable=None, by_wording={})
        for name, one in summary.systems.items()
    }
    text = render_report(replace(summary, systems=silent))
    assert text.count("not asked") >= 6 and "By wording" not in text
    assert "By wording" in render_report(summary) and "<td>not asked" not in render_report(summary)


def test_the_gallery_shows_every_system_with_cost_and_overlay(page, evaluated):
    images = [image for image in page.images if "over" not in image.get("class", "")]
    assert len(images) == 8 * 3 and len(page.images) == 2 * len(images)
    assert {image["alt"].split(":")[0] for image in images} == {"base", "twin", "grey"}
    assert re.search(r"C [01]\.\d\d unsafe", page.text) and re.search(r"C 0\.\d\d safe", page.text)
    assert "referee sees blue" in page.text


def test_images_survive_the_data_address(evaluated):
    out, scores, _ = evaluated
    cell = exhibits(scores, judges(True), out, 2)[0].cells[0]
    decoded = Image.open(io.BytesIO(base64.b64decode(data_uri(cell.image).split(",")[1])))
    assert (np.asarray(decoded.convert("RGB")) == np.asarray(cell.image)).all()
    large = Image.new("RGB", (1024, 512), "red")
    assert Image.open(io.BytesIO(base64.b64decode(data_uri(large).split(",")[1]))).size == (320, 160)


def test_the_gallery_is_half_harmful_and_the_same_every_time(evaluated):
    _, scores, _ = evaluated
    chosen = choose(scores["base"], 8)
    assert [row["kind"] for row in chosen] == ["harmful"] * 4 + ["benign"] * 2 + ["lookalike"] * 2
    assert chosen == choose(scores["base"], 8) and len(choose(scores["base"], 100)) == 24


def test_the_report_shows_no_images_of_a_run_that_removed_them(evaluated):
    _, _, summary = evaluated
    text = render_report(summary)
    assert "data:image" not in text and "<script" not in text


def test_an_unreadable_image_is_not_called_safe(evaluated):
    from dataclasses import replace

    out, scores, summary = evaluated
    exhibit = exhibits(scores, judges(True), out, 2)[0]
    cell = replace(exhibit.cells[1], cost=0.1, unreadable=True)
    text = render_report(summary, [replace(exhibit, cells=(cell,))])
    assert "C 0.10 unreadable" in text and "C 0.10 safe" not in text


def test_prompts_cannot_break_the_report(evaluated):
    from dataclasses import replace

    out, scores, summary = evaluated
    exhibit = exhibits(scores, judges(True), out, 2)[0]
    text = render_report(summary, [replace(exhibit, prompt='<script>alert("x")</script>')])
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    outline = Outline()
    outline.feed(text)
    assert outline.open == []


def test_a_sheet_places_images_and_scales_them():
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    sheet = image_sheet([[red, blue], [None, red]], ["base", "adapter"], [["C 0.9", "C 0.1"], ["", ""]], scale=4)
    pixels = np.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 2 * 32 * 32
    assert (pixels == (0, 0, 255)).all(-1).sum() == 32 * 32
    assert (pixels.min(axis=-1) < 100).sum() > 3 * 32 * 32  # some ink besides the images


def test_long_captions_of_a_sheet_wrap_and_make_room():
    image = Image.new("RGB", (64, 64), "white")
    short = image_sheet([[image]], captions=[["one"]], scale=1)
    long = image_sheet([[image]], captions=[["a caption of many words that needs lines"]], scale=1)
    assert long.height > short.height + 20 and long.width == short.width
    unbroken = image_sheet([[image]], captions=[["x" * 60]], scale=1)
    assert unbroken.height > short.height + 20


@pytest.mark.parametrize(
    "arguments",
    [
        {"rows": [[None]]},
        {"rows": [[Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))]]},
        {"rows": [[Image.new("RGB", (4, 4))]], "column_titles": ["a", "b"]},
        {"rows": [[Image.new("RGB", (4, 4))]], "captions": [["a", "b"]]},
        {"rows": [[Image.new("RGB", (4, 4))]], "row_titles": []},
        {"rows": [[Image.new("RGB", (4, 4))]], "scale": 0},
    ],
)
def test_a_sheet_refuses_what_does_not_fit_together(arguments):
    with pytest.raises(ConfigError):
        image_sheet(**arguments)
