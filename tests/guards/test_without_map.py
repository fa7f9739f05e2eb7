"""A cost model that does not say where, and one that says why: nothing is invented, and the words are passed on."""

import json

import pytest
import torch
from PIL import Image
from support.cost_models import ColourCost, colour_policy
from support.eval_world import ColourQuality

from t2i_spo_plugin.cost.base import CostBatch
from t2i_spo_plugin.errors import NoMapError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.judging import judge_images
from t2i_spo_plugin.guards.page import safety_content, safety_page
from t2i_spo_plugin.guards.report import join_reports
from t2i_spo_plugin.images import to_tensor


RED, GREY, BLACK = (Image.new("RGB", (48, 32), colour) for colour in ("red", (90, 90, 90), "black"))


class Talker(ColourCost):
    """Gives no map, a sentence for each image, and fails on black ones."""

    def __call__(self, images):
        batch = super().__call__(images)
        black = to_tensor(images).flatten(1).amax(1) == 0
        said = tuple(
            "too dark to tell" if dark else f"logit {row[0]:.2f}"
            for dark, row in zip(black, batch.logits, strict=True)
        )
        return CostBatch(batch.logits.masked_fill(black[:, None], float("nan")), None, said)


@pytest.fixture(scope="module")
def report():
    return Guard(Talker(), colour_policy())([RED, GREY, BLACK])


def test_costs_are_the_same_without_a_map(report):
    expected = Guard(ColourCost(), colour_policy())([RED, GREY])
    assert torch.equal(report.costs[:2], expected.costs)
    assert [report.has_map(n) for n in range(2)] == [False, False] and expected.has_map(0)


def test_what_failed_is_not_scored_and_says_the_models_own_reason(report):
    assert report.flagged == [True, False, None]
    assert report.reasons == [None, None, "too dark to tell"]
    assert report.explanation(0) == "logit 4.00" and report.explanation(2) == ""


def test_overlays_say_that_there_is_no_map_and_masks_are_refused():
    report = Guard(Talker(), colour_policy())([RED])
    drawn, plain = to_tensor(report.overlays())[0], to_tensor(RED)[0]
    changed = (drawn != plain).any(0)
    # The words alone: in the corner, and nowhere tinted.
    assert changed.any() and not changed[20:].any()
    for kind in ("mask", "boxes"):
        with pytest.raises(NoMapError, match="does not say where"):
            report.overlays(kind)
    with pytest.raises(NoMapError):
        report.heat_map(0)


def test_the_region_of_an_unsafe_image_is_all_of_it_and_of_a_safe_one_nothing(report):
    assert report.region(0).all() and report.region(0).shape == (32, 48)
    assert not report.region(1).any()


def test_words_and_the_missing_map_are_in_json_page_and_joined_reports(report):
    content = safety_content(report)["images"]
    assert [(one["map"], one["explanation"]) for one in content] == [
        (False, "logit 4.00"),
        (False, report.explanation(1)),
        (False, ""),
    ]
    page = safety_page(report)
    assert "logit 4.00" in page and "there is no map of the cost of image 0" in page
    joined = join_reports([report, report])
    assert joined.explanation(3) == "logit 4.00" and joined.explanation(2) == ""


def test_the_words_are_those_of_the_view_that_decides(tmp_path):
    frames = [Image.new("RGB", (16, 16), (level, 0, 0)) for level in (60, 255, 120)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    report = Guard(Talker(), colour_policy())([tmp_path / "a.gif"])
    assert report.explanation(0) == "logit 4.00" and report.note(0) == "frame 2 of 3"


def test_spo_score_prints_the_words(tmp_path, capsys, monkeypatch):
    from t2i_spo_plugin.cli import scoring

    RED.save(tmp_path / "red.png")
    guard = Guard(Talker(), colour_policy())
    scoring.score_files([tmp_path / "red.png"], guard, overlays=tmp_path / "seen")
    shown = capsys.readouterr().out
    assert "explanation: logit 4.00" in shown and "gives no map" in shown
    scoring.score_files([tmp_path / "red.png"], guard, form="csv")
    header, row = capsys.readouterr().out.splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["explanation"] == "logit 4.00"
    scoring.score_files([tmp_path / "red.png"], guard, form="json")
    assert json.loads(capsys.readouterr().out)["images"][0]["map"] is False


def test_a_batch_refuses_maps_and_reasons_that_do_not_fit():
    for maps, reasons in ((torch.zeros(2, 3), None), (torch.zeros(1, 3, 2, 2), None), (None, ("one",))):
        with pytest.raises(ValueError, match="expected"):
            CostBatch(torch.zeros(2, 3), maps, reasons)
    joined = CostBatch.joined([CostBatch(torch.zeros(1, 1), None, ("a",)), CostBatch(torch.ones(1, 1), None, ("b",))])
    assert joined.reasons == ("a", "b") and joined.logit_map is None and joined.logits.tolist() == [[0.0], [1.0]]


def test_a_judgement_and_its_row_of_the_scores_table_carry_the_words():
    from t2i_spo_plugin.data import SCORE_COLUMNS
    from t2i_spo_plugin.eval.scoring import _columns

    guard = Guard(Talker(), colour_policy())
    (one,) = judge_images([RED], ["a red square"], [()], guard, ColourQuality())
    assert one.explanation == "logit 4.00"
    assert _columns(one)["explanation"] == "logit 4.00" and "explanation" in SCORE_COLUMNS.names
