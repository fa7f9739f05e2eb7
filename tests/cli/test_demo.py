"""The demo, end to end, on a tiny pipeline: what it writes, what it says, and that it says when it has nothing."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from support.cost_models import ColourCost
from support.pipelines import STEPS, fresh, random_adapter

from t2i_spo_plugin.adapters import write_adapter
from t2i_spo_plugin.cli import demo
from t2i_spo_plugin.cli.demo import DemoConfig, Stage, run_demo, score_table, stored_results
from t2i_spo_plugin.data.prompts import PromptRow
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.eval import image_sheet
from t2i_spo_plugin.eval.scoring import Judges
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.quality.normalise import QualityBatch


class HalfQuality:
    """Finds everything half good."""

    domain = "photo"
    reference_hash = "0" * 12

    def quality(self, images, prompts, safe_completions=None):
        half = torch.full((len(prompts),), 0.5)
        return QualityBatch(half, half, half, half, half)


@pytest.fixture
def stage(tmp_path):
    pipe = fresh("sd1")
    policy = Policy("colours", "photo", (Category("red"), Category("green")))
    return Stage(
        pipe=pipe,
        pipeline_name="tiny",
        judges=Judges(Guard(ColourCost(), policy), HalfQuality(), "colour", "half"),
        rows=[
            PromptRow(f"{kind}-{n}", f"{kind} thing {n}", kind, "red" * (kind == "harmful"), n, (f"a thing {n}",))
            for kind in ("harmful", "benign")
            for n in range(3)
        ],
        adapter=write_adapter(random_adapter(pipe), tmp_path / "spo.safetensors"),
        steps=STEPS,
        guidance_scale=3.0,
    )


def test_the_demo_writes_images_scores_sheet_and_report_and_says_where(stage, tmp_path, capsys):
    config = DemoConfig(out=tmp_path / "out", harmful=3, benign=3, sheet_prompts=2, progress=False)
    assert run_demo(config, stage) == config.out
    printed = capsys.readouterr().out
    for name in ("sheet.png", "report.html"):
        assert str(config.out / name) in printed and (config.out / name).stat().st_size > 1000
    for word in ("3 harmful and 3 benign", "spo eval", "spo generate"):
        assert word in printed
    assert set(json.loads((config.out / "summary.json").read_text())["systems"]) == {"base", "spo"}
    counts = {folder.name: len(list((folder / "images").iterdir())) for folder in (config.out / "images").iterdir()}
    assert counts == {"base": 6, "spo": 6, "spo-half": 2}
    image = next((config.out / "images" / "base" / "images").iterdir())
    with Image.open(config.out / "sheet.png") as sheet, Image.open(image) as one:
        assert sheet.width > 4 * one.width  # four columns
    assert not stage.pipe.get_list_adapters(), "the pipeline is given back without adapter"


@pytest.mark.parametrize(("level", "words"), [(2.0, {"safe"}), (-1.0, {"red", "green"})])
def test_the_sheet_names_a_category_under_unsafe_images_alone(stage, tmp_path, monkeypatch, level, words):
    captions = []

    def keep(rows, titles, texts, **options):
        captions.extend(texts)
        return image_sheet(rows, titles, texts, **options)

    monkeypatch.setattr("t2i_spo_plugin.eval.image_sheet", keep, raising=False)
    judges = replace(stage.judges, guard=Guard(ColourCost(level=level), stage.judges.guard.policy))
    config = DemoConfig(out=tmp_path / "out", harmful=3, benign=3, sheet_prompts=2, progress=False)
    run_demo(config, replace(stage, judges=judges))
    assert len(captions) == 2 and {line[3] for line in captions} <= words


def test_strengths_on_the_sheet_are_really_applied(stage, tmp_path):
    config = DemoConfig(out=tmp_path / "out", harmful=3, benign=3, sheet_prompts=2, progress=False)
    run_demo(config, stage)
    folder = config.out / "images"
    for half in (folder / "spo-half" / "images").iterdir():
        images = [(folder / name / "images" / half.name).read_bytes() for name in ("base", "spo", "spo-half")]
        assert len(set(images)) == 3


def test_a_second_start_generates_nothing_twice(stage, tmp_path):
    config = DemoConfig(out=tmp_path / "out", harmful=3, benign=3, sheet_prompts=2, progress=False)
    run_demo(config, stage)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*.png") if path.name != "sheet.png"}
    run_demo(config, stage)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def system(uascore, **changes):
    rate = {"k": 1, "n": 2, "value": 0.5, "interval": [0.1, 0.9]}
    score = {"uascore": uascore, "interval": [uascore - 5, uascore + 5]}
    score |= {half: {"mean_quality": 0.75, "n_prompts": 500} for half in ("harmful", "benign")}
    content = {"score": score, "referee_score": None, "ip": rate, "referee_ip": None, "safe_scene": None}
    return content | {"recognised": {"benign": rate}} | changes


def test_the_table_shows_the_referees_numbers_where_it_looked():
    judged = system(50.0)["score"] | {"uascore": 88.0, "interval": [80.0, 90.0]}
    lines = score_table({"base": system(50.0), "spo": system(60.0, referee_score=judged)}).splitlines()
    assert "50.0 [45.0, 55.0]" in lines[1] and "50 % [10, 90]" in lines[1] and "0.75" in lines[1]
    assert "88.0 [80.0, 90.0]" in lines[2] and "60.0" not in lines[2]


def test_stored_results_are_printed_or_said_to_be_absent(tmp_path):
    assert "No full results" in stored_results(tmp_path / "none.json")
    (tmp_path / "full.json").write_text(json.dumps({"systems": {"base": system(50.0), "spo": system(88.0)}}))
    printed = stored_results(tmp_path / "full.json")
    assert "500 harmful and 500 benign" in printed and "88.0 [83.0, 93.0]" in printed and "spo eval" in printed
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(SPOError, match="not the summary of an evaluation"):
        stored_results(tmp_path / "broken.json")


def test_the_results_of_the_package_are_a_table_of_its_systems():
    lines = stored_results(demo.RESULTS).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["base", "spo", "dpo"]


@pytest.mark.parametrize("options", [{"harmful": 0}, {"sheet_prompts": 0}, {"batch_size": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="at least 1"):
        DemoConfig(**options)
