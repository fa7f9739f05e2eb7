"""A cost exactly at the boundary is unsafe, wherever the question is asked; next below it is safe."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.cost_models import BoundaryCost

from t2i_spo_plugin.eval.gallery import Cell
from t2i_spo_plugin.eval.metrics import system_summary
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.page import safety_content, safety_page
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.metrics import UNSAFE_COST, Half, Rate, ScoreMetadata
from t2i_spo_plugin.training.objectives.reward import both_unsafe, composite_preferences, safety_preferences


BELOW = float(np.nextafter(UNSAFE_COST, 0.0))
IMAGE = Image.new("RGB", (8, 8), (90, 90, 90))


def report(threshold=0.5):
    return Guard(BoundaryCost(), Policy("at the boundary", "photo", (Category("anything", threshold),)))(IMAGE)


def test_the_guard_flags_an_image_at_the_boundary():
    at, below = report(), report(threshold=0.51)
    assert at.costs.tolist() == [UNSAFE_COST] and at.flagged == [True]
    assert below.costs[0] < UNSAFE_COST and below.flagged == [False]


def test_the_guard_blocks_an_image_at_the_boundary():
    guard = Guard(BoundaryCost(), Policy("at the boundary", "photo", (Category("anything"),)), block="black")
    blocked, _ = guard.apply_block(IMAGE, guard(IMAGE))
    assert not np.asarray(blocked).any()


def test_the_report_calls_an_image_at_the_boundary_unsafe_and_shows_where():
    half = report()
    half.logit_maps[0][:, :, 2:] = -9.0
    assert half.unsafe() == [True] and report(threshold=0.51).unsafe() == [False]
    # Far from the middle of the image, where the map is interpolated, its left half has the boundary exactly.
    assert bool(half.region(0)[:, :3].all()) and not bool(half.region(0)[:, 5:].any())
    (mask,) = half.overlays("mask")
    assert mask[:, :3].all() and not mask[:, 5:].any()


def test_the_safety_report_shows_an_image_at_the_boundary_as_unsafe():
    assert safety_content(report())["images"][0]["unsafe"] is True
    assert "unsafe 0.500" in safety_page(report()) and "1 unsafe" in safety_page(report())


def test_metrics_count_an_image_at_the_boundary_as_unsafe():
    assert Half(np.array([UNSAFE_COST, BELOW]), np.ones(2)).n_unsafe == 1


def test_the_evaluation_counts_an_image_at_the_boundary_as_unsafe():
    def row(number, kind, cost):
        texts = {"system": "s", "prompt_id": f"{kind}{number}", "prompt": "p", "kind": kind, "not_scored": ""}
        return texts | {"prompt_category": "red", "seed": number, "cost": cost, "quality": 1.0}

    rows = [row(0, "harmful", UNSAFE_COST), row(1, "harmful", BELOW), row(0, "benign", 0.0)]
    metadata = ScoreMetadata("cost", "quality", "reference")
    summary = system_summary(rows, rows, metadata, resamples=10)
    assert summary.ip == summary.ip_by_category["red"] == Rate(1, 2)


def test_the_gallery_marks_an_image_at_the_boundary_as_unsafe():
    assert Cell("base", None, cost=UNSAFE_COST).unsafe is True and Cell("base", None, cost=BELOW).unsafe is False


def test_training_pairs_treat_an_image_at_the_boundary_as_unsafe():
    cost = torch.tensor([[UNSAFE_COST, BELOW], [UNSAFE_COST, UNSAFE_COST]], dtype=torch.float64)
    quality = torch.tensor([[0.9, 0.1], [0.9, 0.1]], dtype=torch.float64)
    assert both_unsafe(cost).tolist() == [False, True]
    assert safety_preferences(quality, cost, "drop").keep.tolist() == [True, False]
    assert safety_preferences(quality, cost, "drop").winner.tolist()[0] == 1
    # Only where a safe image beats an unsafe one does this mode ask for a margin.
    margin = composite_preferences(1.0 - quality, cost, 2.0, "relabel+margin").margin
    assert margin[0] == pytest.approx(2.0 * (UNSAFE_COST - BELOW)) and margin[0] > 0.0
