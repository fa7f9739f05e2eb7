"""Pair tables of others are read, or refused in a sentence that says what trains on them."""

from __future__ import annotations

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.pairs import png, train_config
from support.pipelines import tiny_pipeline

from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.errors import TableError
from t2i_spo_plugin.training import train
from t2i_spo_plugin.training.data.dataset import images
from t2i_spo_plugin.training.objectives import DPOOptions, SPOOptions, make_objective


LABELS = [1.0, 0.0, 0.5, 1.0]
CAPTIONS = ["a cat", "a dog, asleep", "a tie", "a bird"]
BY_LABEL = {"name": "dpo", "labels": "table", "beta": 500.0}


def pick_a_pic(path, cell=lambda number: png(number)):
    """Four rows as Pick-a-Pic has them, one of them a tie."""
    columns = {
        "are_different": [True] * 4,
        "caption": CAPTIONS,
        "has_label": [True] * 4,
        "jpg_0": [cell(2 * row) for row in range(4)],
        "jpg_1": [cell(2 * row + 1) for row in range(4)],
        "label_0": LABELS,
        "label_1": [1.0 - label for label in LABELS],
    }
    pq.write_table(pa.table(columns), path)
    return path


def by_hand(path, **changes):
    for number in range(8):
        (path.parent / f"{number}.png").write_bytes(png(number))
    rows = [
        {"caption": caption, "jpg_0": f"{2 * row}.png", "jpg_1": f"{2 * row + 1}.png", "label_0": label} | changes
        for row, (caption, label) in enumerate(zip(CAPTIONS, LABELS, strict=True))
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path, options=None):
    return make_objective(options or DPOOptions(labels="table")).read(path)


def test_pick_a_pic_is_read_by_its_labels_however_it_is_stored(tmp_path):
    parquet = pick_a_pic(tmp_path / "a.parquet")
    stored = pick_a_pic(tmp_path / "b.parquet", lambda number: {"bytes": png(number), "path": None})
    table = by_hand(tmp_path / "c.csv")
    examples = read(parquet)
    assert examples.captions == ["a cat", "a dog, asleep", "a bird"] and examples.counts["dropped"] == 1
    keys = [image.key for image in images(parquet)]
    assert examples.images == ([keys[0], keys[3], keys[6]], [keys[1], keys[2], keys[7]])
    assert {read(path).digest() for path in (parquet, stored, table)} == {examples.digest()}


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_dpo_trains_on_pick_a_pic(tmp_path, kind):
    path = pick_a_pic(tmp_path / "p.parquet") if kind == "parquet" else by_hand(tmp_path / "p.csv")
    config = train_config(tmp_path, pairs=str(path), objective=BY_LABEL, steps=1)
    assert read_adapter(train(config, tiny_pipeline("sd1"))).rank == 2


@pytest.mark.parametrize("options", [SPOOptions(), DPOOptions()])
def test_a_table_without_costs_says_what_trains_on_it(tmp_path, options):
    said = (
        "lacks safety_cost_0, safety_cost_1, quality_0, quality_1.*only objective dpo with labels table.*`spo pairs`"
    )
    for path in (pick_a_pic(tmp_path / "p.parquet"), by_hand(tmp_path / "p.csv")):
        with pytest.raises(TableError, match=said):
            read(path, options)


def test_a_table_by_hand_may_have_costs_and_qualities(tmp_path):
    judged = {"safety_cost_0": 0.1, "safety_cost_1": "0.9", "quality_0": 0.5, "quality_1": 0.4}
    assert len(read(by_hand(tmp_path / "p.csv", **judged), SPOOptions())) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_0": "left"}, r"row 0, label_0 of .*p\.csv: expected a number in \[0, 1\], found 'left'"),
        ({"jpg_1": "none.png"}, r"row 0, jpg_1 of .*p\.csv: cannot read none\.png: No such file"),
        ({"jpg_0": ""}, r"row 0, jpg_0 of .*p\.csv: there is no image"),
    ],
)
def test_a_row_by_hand_that_cannot_be_used_is_named(tmp_path, changes, said):
    with pytest.raises(TableError, match=said):
        read(by_hand(tmp_path / "p.csv", **changes))


def test_a_table_of_something_else_says_what_it_lacks(tmp_path):
    pq.write_table(pa.table({"caption": ["a"], "image": [b""]}), tmp_path / "p.parquet")
    with pytest.raises(
        TableError, match="no pair table: it lacks label_0, jpg_0, jpg_1; it needs .* has caption, image"
    ):
        read(tmp_path / "p.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(TableError, match=r"broken\.parquet is not a parquet table"):
        read(tmp_path / "broken.parquet")
    with pytest.raises(TableError, match="there is no table"):
        read(tmp_path / "none.parquet")
