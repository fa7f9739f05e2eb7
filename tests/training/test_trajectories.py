"""Trajectories recorded once: the losses of a few steps, by which any change of what training computes is seen.

They were recorded on one thread, with the code that made the bundled adapters. A change of the method is a reason to
record them anew, a change of the code is not.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.pairs import pair_table, png, train_config
from support.pipelines import tiny_pipeline

from t2i_spo_plugin.registry import load_pipeline
from t2i_spo_plugin.training import TrainConfig, train


RELATIVE = 1e-4
"""Kernels of another processor add up in another order: recorded on one, these are met to 1.3e-5 on another."""
EVERYTHING = {
    "steps": 4,
    "batch_size": 2,
    "objective": {"name": "spo", "beta": 500.0, "eta": 1.0, "augmentations": ["flip", "shift", "noise"]},
    "terms": {
        "sft": {"weight": 0.1},
        "output_preservation": {"weight": 10.0},
        "prior_preservation": {"weight": 10.0},
        "loser_guard": {"mu": 0.5},
    },
    "caption_dropout": 0.3,
    "random_flip": True,
    "benign_share": 0.5,
    "warmup": 3,
    "schedule": "cosine",
    "gradient_accumulation": 2,
}
STORED = {
    "steps": 8,
    "objective": {"name": "dpo", "beta": 500.0, "safe_pairs": "quality"},
    "terms": {"sft": {"weight": 1.0}},
    "draws_per_pair": 2,
}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(path: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads(path.with_name("report.json").read_text())["curve"]]


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("sticker-spo", [639.9545288085938, 647.0879516601562, 600.4408569335938, 640.2333984375]),
        ("sticker-dpo", [0.6931471824645996, 0.6887485384941101, 0.6759507656097412, 0.5567948818206787]),
        ("sticker-style", [2.3648271560668945, 2.2616472244262695, 2.112583637237549, 2.2416722774505615]),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_bundled_configurations_follow_their_recorded_trajectory(name, recorded, tmp_path):
    bundled = TrainConfig.from_yaml(name)
    options = {"output_dir": str(tmp_path / "run"), "validate_every": 0, "log_every": 1, "device": "cpu"}
    options |= {"tensorboard": False, "progress": False}
    # Steps decide the learning rate's course: the budget stops the run.
    passes = 2 if bundled.images else 6
    options["budget"] = passes * bundled.batch_size * len(recorded)
    if bundled.images:
        folder = tmp_path / "images"
        folder.mkdir()
        for number in range(4):
            (folder / f"{number}.png").write_bytes(png(number))
            (folder / f"{number}.txt").write_text(f"an image number {number}\n")
        options["images"] = str(folder)
    else:
        options["pairs"] = str(pair_table(tmp_path / "pairs.parquet"))
    path = train(TrainConfig.from_yaml(name, **options), load_pipeline("sticker"))
    assert losses(path) == pytest.approx(recorded, rel=RELATIVE)


@pytest.mark.parametrize(
    ("name", "options", "recorded"),
    [
        ("sd1", EVERYTHING, [1.0414741039276123, 1.0852422714233398, 2.8155159950256348, 1.2628421783447266]),
        ("sdxl", EVERYTHING, [1.0456843376159668, 0.992475152015686, 0.7705467939376831, 1.3799996376037598]),
        ("sd3", EVERYTHING, [1.0604112148284912, 1.0629854202270508, 1.085033893585205, 1.2359414100646973]),
        (
            "sd1",
            STORED,
            [
                1.7517915964126587,
                2.8533921241760254,
                3.3697848320007324,
                1.3786823749542236,
                1.539023756980896,
                1.5824302434921265,
                1.6160218715667725,
                1.4525820016860962,
            ],
        ),
    ],
    ids=["sd1", "sdxl", "sd3", "stored errors"],
)
@pytest.mark.usefixtures("one_thread")
def test_every_option_follows_its_recorded_trajectory(name, options, recorded, tmp_path):
    pairs = pair_table(tmp_path / "pairs.parquet")
    path = train(train_config(tmp_path, pairs=str(pairs), **options), tiny_pipeline(name))
    assert losses(path) == pytest.approx(recorded, rel=RELATIVE)
