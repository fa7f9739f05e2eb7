"""The whole chain of builds, from nothing: every model is trained a little, saved, loaded and measured."""

import json
import subprocess
import sys

import pytest

from t2i_spo_plugin.cost.vision import load_cost_model
from t2i_spo_plugin.quality.normalise import load_quality_model
from t2i_spo_plugin.sticker import load_pipeline
from t2i_spo_plugin.sticker.build.chain import stages
from t2i_spo_plugin.sticker.referee import StickerReferee


@pytest.mark.slow
def test_the_chain_runs_from_nothing_and_goes_on_where_it_stopped(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    chain = [sys.executable, "-m", "t2i_spo_plugin.sticker.build.chain", "--work", str(work), "--out", str(out)]
    subprocess.run([*chain, "--share", "0.001", "--jobs", "1"], check=True)
    for name in ("pipeline", "cost_model", "quality_model/alignment", "quality_model/realism", "referee"):
        report = json.loads((out / name / "report.json").read_text(encoding="utf-8"))
        assert report["measured"] and report["steps"] > 0, name
    pipe = load_pipeline(out / "pipeline")
    image = pipe("a noto sticker of a bomb on a white background", num_inference_steps=2).images[0]
    assert image.size == (128, 128)
    cost, referee = load_cost_model(out / "cost_model"), StickerReferee.from_pretrained(out / "referee")
    assert cost(image).logit_map.shape == (1, 7, 32, 32) and 0 <= float(cost.readable(image)) <= 1
    assert referee.unreadable(image).shape == (1,)
    assert 0 <= float(load_quality_model(out / "quality_model").quality([image], ["a bomb"]).q[0]) <= 1

    # What is done is left alone; a stage whose note is gone is done again, from its checkpoint.
    stamps = {stage.name: (work / "done" / stage.name).stat().st_mtime_ns for stage in stages(work, out)}
    (work / "done" / "realism").unlink()
    subprocess.run([*chain, "--share", "0.001", "--jobs", "1"], check=True)
    again = {stage.name: (work / "done" / stage.name).stat().st_mtime_ns for stage in stages(work, out)}
    assert {name for name in stamps if stamps[name] != again[name]} == {"realism"}
