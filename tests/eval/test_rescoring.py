"""A scores table that lies there already is summed up again, by either definition, without a model."""

import json

import pytest
from support.eval_world import SquarePipeline, judges, rows, switched

from t2i_spo_plugin import cli
from t2i_spo_plugin.data.tables import SCORE_COLUMNS, read_rows, write_table
from t2i_spo_plugin.errors import ConfigError, TableError
from t2i_spo_plugin.eval.rescoring import rescore
from t2i_spo_plugin.eval.runner import GenerationOptions, generate_and_score, summarise_run, write_summary
from t2i_spo_plugin.eval.systems import base_system
from t2i_spo_plugin.metrics import uascore


NEW = (
    "cost_once",
    "blank",
    "unreadable",
    "referee_unsafe_once",
    "referee_unreadable",
    "safe_scene_complete",
    "wording",
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    systems = [base_system(), switched("tiny", tiny=True)]
    options = GenerationOptions(steps=1, batch_size=6, progress=False)
    scores = generate_and_score(SquarePipeline(), systems, rows(6), judges(True), out, options)
    summary = summarise_run(scores, judges(True), resamples=100)
    write_summary(summary, out / "summary.json")
    return out, summary


def test_the_numbers_of_a_run_are_found_again_with_the_names_of_its_judges(evaluated):
    out, summary = evaluated
    again = rescore(out, resamples=100)
    assert {n: s.to_dict() for n, s in again.systems.items()} == {n: s.to_dict() for n, s in summary.systems.items()}
    assert [c.to_dict() for c in again.comparisons] == [c.to_dict() for c in summary.comparisons]


def test_uascore_1_looks_once_and_lets_images_be_unreadable(evaluated):
    """By hand from the table: the tiny squares are safe at one look, and the base's red ones are not."""
    out, _ = evaluated
    first = rescore(out / "scores.parquet", "uascore/1", resamples=100)
    tiny = first.systems["tiny"]
    table = [row for row in read_rows(out / "scores.parquet", SCORE_COLUMNS) if row["system"] == "tiny"]
    halves = [
        ([r["cost_once"] for r in part], [r["quality"] for r in part])
        for part in ([r for r in table if r["kind"] == kind] for kind in ("harmful", "benign"))
    ]
    assert tiny.score.version == "uascore/1" and tiny.score.uascore == pytest.approx(uascore(*halves))
    assert (tiny.ip.value, tiny.referee_ip.value, tiny.unsafe_prompts.k) == (0.0, 0.0, 0)
    assert rescore(out, resamples=100).systems["tiny"].ip.value == 1.0
    assert tiny.unreadable is None and "unreadable" not in str(tiny.score)
    tinier = next(c for c in first.comparisons if c.judge == "referee" and not c.wording)
    assert (tinier.first, tinier.ip) == ("tiny", -1.0)


def test_an_older_table_has_the_older_score_alone(evaluated, tmp_path):
    out, _ = evaluated
    table = [
        {key: value for key, value in row.items() if key not in NEW}
        for row in read_rows(out / "scores.parquet", SCORE_COLUMNS)
    ]
    write_table(table, tmp_path / "old.parquet", SCORE_COLUMNS)
    with pytest.raises(ConfigError, match="were looked at once.*ask for uascore/1"):
        rescore(tmp_path / "old.parquet")
    old = rescore(tmp_path / "old.parquet", "uascore/1", resamples=50).systems["base"]
    assert old.score.version == "uascore/1" and old.ip_once is None and old.by_wording == {}
    assert old.score.metadata.cost_model == "not stated" and old.safe_scene_complete is None


def test_a_table_that_is_none_is_refused(tmp_path):
    with pytest.raises(TableError, match="there is no table"):
        rescore(tmp_path / "none.parquet")
    write_table([], tmp_path / "scores.parquet", SCORE_COLUMNS)
    with pytest.raises(ConfigError, match="holds no rows"):
        rescore(tmp_path)


def test_the_command_prints_text_or_json(evaluated, capsys):
    out, summary = evaluated
    assert cli.main(["uascore", str(out), "--resamples", "100"]) == 0
    text = capsys.readouterr().out
    assert f"uascore/2 {summary.systems['base'].score.uascore:.1f}" in text and "red-cost" in text
    assert cli.main(["uascore", str(out), "--definition", "uascore/1", "--resamples", "100", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["systems"]["tiny"]["score"]["version"] == "uascore/1"
    assert cli.main(["uascore", str(out / "nothing")]) == 2 and "there is no table" in capsys.readouterr().err
