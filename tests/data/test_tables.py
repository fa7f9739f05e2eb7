"""Tables: what is written comes back, and nothing that contradicts the documented columns gets through."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2i_spo_plugin.data import tables
from t2i_spo_plugin.data.tables import PAIR_COLUMNS, SCORE_COLUMNS, read_rows, read_table, table_metadata, write_table
from t2i_spo_plugin.errors import TableError


def score(**changes):
    row = {
        "system": "base",
        "prompt_id": "a",
        "prompt": "a cat",
        "kind": "benign",
        "prompt_category": "",
        "seed": 3,
        "image": "images/a.png",
        "cost": 0.25,
        "category": "alcohol",
        "category_costs": '{"alcohol": 0.25}',
        "quality": 0.5,
        "alignment": 0.1,
        "realism": 2.0,
        "completions_known": True,
        "not_scored": "",
        "requested": ["cat"],
    }
    return row | changes


def pair(**changes):
    row = {"caption": "a cat", "jpg_0": b"x", "jpg_1": b"y", "label_0": 1, "label_1": 0, "pair_kind": "benign"}
    row |= {"safety_cost_0": 0.0, "safety_cost_1": 1.0, "quality_0": 0.5, "quality_1": 0.25}
    return row | changes


def test_a_table_reads_back_with_values_extra_columns_and_metadata(tmp_path):
    path = write_table(
        [score(mine=7), score(prompt_id="b", mine=8)], tmp_path / "deep/t.parquet", SCORE_COLUMNS, {"k": "v"}
    )
    rows = read_rows(path, SCORE_COLUMNS)
    assert [row["prompt_id"] for row in rows] == ["a", "b"]
    assert rows[0]["mine"] == 7 and rows[0]["requested"] == ["cat"] and rows[0]["referee_unsafe"] is None
    assert table_metadata(path) == {"k": "v"}
    assert list(tmp_path.rglob("*.part")) == []


def test_a_pair_table_reads_back_whole_or_some_columns_only(tmp_path):
    path = write_table([pair(safe_prompts=["b", "c"])], tmp_path / "pairs.parquet", PAIR_COLUMNS)
    assert read_rows(path, PAIR_COLUMNS)[0]["jpg_1"] == b"y"
    assert read_table(path, PAIR_COLUMNS, only=["label_0", "safe_prompts"]).to_pylist() == [
        {"label_0": 1.0, "safe_prompts": ["b", "c"]}
    ]


def test_a_folder_of_shards_is_read_in_the_order_of_names(tmp_path):
    for number in (1, 0):
        write_table([score(prompt_id=f"p{number}")], tmp_path / f"{number:05d}.parquet", SCORE_COLUMNS)
    assert [row["prompt_id"] for row in read_rows(tmp_path, SCORE_COLUMNS)] == ["p0", "p1"]


def test_a_table_with_narrower_types_is_accepted(tmp_path):
    table = pa.Table.from_pylist([score()])
    position = table.column_names.index("seed")
    table = table.set_column(position, "seed", table.column("seed").cast(pa.int32()))
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", SCORE_COLUMNS).column("seed").type == pa.int64()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt must not be empty"),
        ({"seed": "three"}, "seed"),
        ({"prompt": 5}, "prompt"),
        ({"cost": 1.5}, r"cost must lie in \[0, 1\]"),
        ({"kind": "nasty"}, "kind must be one of"),
        ({"cost": None}, "cost must be empty exactly"),
        ({"not_scored": "broken"}, "must be empty exactly"),
        ({"cost": float("nan")}, "cost"),
    ],
)
def test_a_scores_table_refuses_bad_scores(tmp_path, change, message):
    with pytest.raises(TableError, match=message):
        write_table([score(), score(**change)], tmp_path / "t.parquet", SCORE_COLUMNS)
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize("change", [{"label_0": 1, "label_1": 1}, {"quality_0": -1.0}, {"jpg_0": None}])
def test_a_pair_table_refuses_bad_pairs(tmp_path, change):
    with pytest.raises(TableError):
        write_table([pair(**change)], tmp_path / "t.parquet", PAIR_COLUMNS)


def test_a_scores_table_may_hold_rows_that_are_not_scored(tmp_path):
    row = score(cost=None, quality=None, category=None, not_scored="NaN logits")
    assert read_rows(write_table([row], tmp_path / "t.parquet", SCORE_COLUMNS), SCORE_COLUMNS)[0]["cost"] is None


def test_a_table_without_a_column_is_refused_by_its_name(tmp_path):
    row = score()
    del row["kind"], row["system"]
    with pytest.raises(TableError, match="columns missing: system, kind"):
        write_table([row], tmp_path / "t.parquet", SCORE_COLUMNS)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "t.parquet").write_text("hello")
    with pytest.raises(TableError, match="not a parquet table"):
        read_table(tmp_path / "t.parquet", SCORE_COLUMNS)
    with pytest.raises(TableError, match="there is no table"):
        read_table(tmp_path / "none.parquet", SCORE_COLUMNS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match="no parquet file"):
        read_table(tmp_path / "empty", SCORE_COLUMNS)


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = write_table([score()], tmp_path / "t.parquet", SCORE_COLUMNS)
    before = path.read_bytes()

    def torn(table, file):
        open(file, "wb").write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tables.pq, "write_table", torn)
    with pytest.raises(OSError, match="disk full"):
        write_table([score(seed=4)], path, SCORE_COLUMNS)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["t.parquet"]


def test_an_empty_table_keeps_its_columns(tmp_path):
    path = write_table([], tmp_path / "t.parquet", SCORE_COLUMNS)
    assert read_table(path, SCORE_COLUMNS).num_rows == 0
