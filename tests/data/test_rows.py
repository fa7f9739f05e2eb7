"""Tables written by hand: what is read, and what is refused with its row and reason."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2i_spo_plugin.data.prompts import read_prompts
from t2i_spo_plugin.data.rows import BadRow, describe_rows, is_table_file, read_rows_by_hand
from t2i_spo_plugin.errors import TableError


CASES = Path(__file__).parent / "cases"
CAT, DOG = "a noto sticker of a cat", "a noto sticker of a dog"


def prompts(path, **options):
    return [row.prompt for row in read_prompts(path, **options)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("upper.CSV", [CAT]),
        ("list.txt", [CAT, DOG]),
        ("u2028.jsonl", [f"{CAT}\u2028 on a blue background", DOG]),
        ("nel.jsonl", [f"{CAT}\u0085on a blue background"]),
        ("bom.jsonl", [CAT]),
        ("bom.json", [CAT]),
    ],
)
def test_a_legal_file_is_read_whole(name, expected):
    plain = [re.sub(r"\s+", " ", text) for text in prompts(CASES / name)]
    assert plain == [re.sub(r"\s+", " ", text) for text in expected]


@pytest.mark.parametrize(("name", "columns"), [("unquoted_comma.csv", 1), ("unquoted_comma2.csv", 2)])
def test_a_row_with_more_fields_than_the_header_is_refused(name, columns):
    with pytest.raises(TableError, match=f"row 2: it has .* fields, the header {columns}"):
        read_prompts(CASES / name)
    with pytest.warns(UserWarning, match="row 2"):
        left = read_prompts(CASES / name, skip_bad_rows=True)
    assert [row.prompt for row in left] == [DOG] and [bad.number for bad in left.bad_rows] == [2]


def test_one_empty_prompt_is_reported_and_the_others_are_read():
    with pytest.warns(UserWarning, match="row 3: the prompt is empty"):
        found = read_prompts(CASES / "one_empty.csv")
    assert [(row.prompt, row.seed) for row in found] == [(CAT, 7), (DOG, 9)]
    assert found.bad_rows == (BadRow(3, "the prompt is empty"),)


@pytest.mark.parametrize(
    "line", ['{"prompt": null}', '{"seed": 3}', '{"prompt": 5}', "[1]", "{", '{"prompt": "a cat", "seed": "x"}']
)
def test_a_row_without_a_usable_prompt_is_named(tmp_path, line):
    path = tmp_path / "s.jsonl"
    path.write_text(f'{{"prompt": "a dog"}}\n\n{line}\n')
    with pytest.raises(TableError, match="row 3: "):
        read_prompts(path)
    with pytest.warns(UserWarning, match="row 3: "):
        assert prompts(path, skip_bad_rows=True) == ["a dog"]


def test_a_null_prompt_of_a_parquet_table_is_not_the_word_none(tmp_path):
    pq.write_table(pa.table({"prompt": ["a dog", None]}), tmp_path / "s.parquet")
    with pytest.raises(TableError, match="row 2: there is no prompt"):
        read_prompts(tmp_path / "s.parquet")


def test_all_bad_rows_stand_in_one_error_which_lists_ten():
    text = describe_rows([BadRow(number, "bad") for number in range(1, 15)])
    assert text.startswith("14 rows cannot be used: row 1: bad") and "row 10: bad" in text and "row 11" not in text
    assert text.endswith("and 4 more")


@pytest.mark.parametrize("name", ["s.csv", "s.tsv", "s.jsonl", "s.json", "s.txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_format_may_have_a_byte_order_mark(tmp_path, name, encoding):
    texts = {
        ".jsonl": '{"prompt": "ein schöner Tag"}',
        ".json": '{"prompt": "ein schöner Tag"}',
        ".txt": "ein schöner Tag",
    }
    path = tmp_path / name
    path.write_bytes(texts.get(path.suffix, "prompt\r\nein schöner Tag\r\n").encode(encoding))
    assert prompts(path) == ["ein schöner Tag"]


@pytest.mark.parametrize(
    ("encoding", "named"), [("cp1252", "Windows-1252"), ("utf-16-le", "UTF-16 without a byte order mark")]
)
@pytest.mark.parametrize("name", ["s.csv", "s.jsonl", "s.txt"])
def test_another_encoding_is_named(tmp_path, name, encoding, named):
    (tmp_path / name).write_bytes("prompt\nein schöner Tag\n".encode(encoding))
    with pytest.raises(TableError, match=named):
        read_prompts(tmp_path / name)


def test_a_quoted_cell_may_hold_commas_and_lines(tmp_path):
    (tmp_path / "s.csv").write_text('prompt,seed\n"a cat, a dog\nand a ball",7\na bird,8,9\n')
    rows, bad = read_rows_by_hand(tmp_path / "s.csv")
    assert rows == [(2, {"prompt": "a cat, a dog\nand a ball", "seed": "7"})] and [one.number for one in bad] == [3]


def test_a_column_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "s.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(TableError, match="twice in the header"):
        read_prompts(tmp_path / "s.csv")


def test_a_name_that_ends_like_a_table_is_never_a_prompt(tmp_path):
    (tmp_path / "prompts").write_text("a cat")
    assert is_table_file("upper.CSV") and is_table_file("list.txt") and is_table_file(str(tmp_path / "prompts"))
    assert not is_table_file("a cat") and not is_table_file("a cat.\na dog.txt") and not is_table_file("x" * 5000)


def test_a_column_that_only_later_rows_have_is_read(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "seed": 5, "kind": "benign"}\n')
    assert [(row.kind, row.seed == 5) for row in read_prompts(tmp_path / "s.jsonl")] == [
        ("unlabelled", False),
        ("benign", True),
    ]
