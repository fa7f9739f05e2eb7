"""Prompt sets: many spellings of one thing, clear errors, and a minors filter that cannot be turned off."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2i_spo_plugin.data.minors import mentions_minors
from t2i_spo_plugin.data.prompts import PromptRow, drop_minors, prompt_seed, read_prompts, with_seeds
from t2i_spo_plugin.errors import TableError


def write_csv(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_csv_file_may_have_the_columns_of_public_sets(tmp_path):
    path = write_csv(
        tmp_path / "set.csv",
        "case_number,Prompt,evaluation_seed,categories,safe_prompt\n"
        "7,a pistol,42,violence,a hairdryer\n8,a knife,43,violence,\n",
    )
    first, second = read_prompts(path, kind="harmful")
    assert first == PromptRow("7", "a pistol", "harmful", "violence", 42, ("a hairdryer",))
    assert second.safe_prompts == () and second.seed == 43


def test_prompts_read_alike_from_jsonl_parquet_and_csv(tmp_path):
    content = {"id": "a", "prompt": "a pistol", "kind": "unsafe", "category": "weapons", "seed": 5}
    content |= {"safe_prompts": ["a spoon", "a street"], "requested": ["spoon"]}
    (tmp_path / "s.jsonl").write_text(json.dumps(content) + "\n\n")
    pq.write_table(pa.Table.from_pylist([content | {"jpg_0": b"\x00\xff"}]), tmp_path / "s.parquet")
    header = ",".join(content)
    cells = ['""'.join(json.dumps(v).split('"')) if isinstance(v, list) else str(v) for v in content.values()]
    write_csv(tmp_path / "s.csv", header + "\n" + ",".join(f'"{cell}"' for cell in cells) + "\n")
    expected = [PromptRow("a", "a pistol", "harmful", "weapons", 5, ("a spoon", "a street"), ("spoon",))]
    for name in ("s.jsonl", "s.parquet", "s.csv"):
        assert list(read_prompts(tmp_path / name)) == expected, name


def test_a_file_may_say_what_each_completion_shows_and_its_wording(tmp_path):
    content = {"prompt": "a knife", "kind": "harmful", "safe_prompts": ["a spoon", "a cat"], "wording": "typos"}
    content |= {"safe_objects": [["spoon", "cat"], ["cat"]]}
    (tmp_path / "s.jsonl").write_text(json.dumps(content) + "\n")
    write_csv(tmp_path / "s.csv", 'prompt,kind,safe_objects,safe_prompt\na knife,harmful,"[[""cat""]]",a cat\n')
    (row,) = read_prompts(tmp_path / "s.jsonl")
    assert row.safe_objects == row.counterparts == (("spoon", "cat"), ("cat",)) and row.wording == "typos"
    assert read_prompts(tmp_path / "s.csv").rows[0].safe_objects == (("cat",),)
    for wrong in ("[", '["cat"]', "cat"):
        (tmp_path / "s.jsonl").write_text(json.dumps(content | {"safe_objects": wrong}) + "\n")
        with pytest.raises(TableError, match="list of lists of texts"):
            read_prompts(tmp_path / "s.jsonl")
    with pytest.raises(TableError, match="1 lists of safe_objects for 2 safe_prompts"):
        PromptRow("a", "x", "harmful", safe_prompts=("a", "b"), safe_objects=(("cat",),))
    with pytest.raises(TableError, match="list of lists"):
        PromptRow("a", "x", "harmful", safe_prompts=("a",), safe_objects=("cat",))


def test_without_more_knowledge_all_that_is_requested_is_one_counterpart():
    assert PromptRow("a", "x", "harmful", requested=("cat", "car")).counterparts == (("cat", "car"),)
    assert PromptRow("a", "x", "harmful").counterparts == ()


def test_seeds_of_a_prompt_begin_with_its_own_and_are_the_same_every_time():
    rows = [PromptRow("a", "x", "benign", seed=7), PromptRow("b", "y", "benign", seed=7)]
    assert with_seeds(rows, 1) == rows
    four = with_seeds(rows, 4)
    assert [row.id for row in four] == ["a"] * 4 + ["b"] * 4 and four == with_seeds(rows, 4)
    seeds = [row.seed for row in four]
    assert seeds[0] == seeds[4] == 7 and len(set(seeds)) == 7 and max(seeds) < 2**31


def test_seeds_from_the_text_do_not_depend_on_the_order(tmp_path):
    one = read_prompts(write_csv(tmp_path / "a.csv", "prompt\nfirst\nsecond\nfirst\n"), kind="benign")
    two = read_prompts(write_csv(tmp_path / "b.csv", "prompt\nsecond\nfirst\nfirst\n"), kind="benign")
    assert [r.seed for r in one] == [two.rows[1].seed, two.rows[0].seed, two.rows[2].seed]
    assert len({row.seed for row in one}) == 3
    assert prompt_seed("first") != prompt_seed("first", seed=1)


@pytest.mark.parametrize(
    "text",
    [
        "a 12 year old with a gun",
        "a 12-year-old",
        "12yo",
        "17 y/o student",
        "twelve years old",
        "aged 12",
        "at the age of 9",
        "age: 15",
        "under 18",
        "younger than sixteen years of age, sixteen years old",
        "a child",
        "Children playing",
        "the child's toy",
        "two kids",
        "BABIES",
        "a toddler",
        "teenagers",
        "a teen-aged person",
        "pre-teen",
        "school girl",
        "schoolgirls",
        "little boy",
        "girls",
        "a minor",
        "underage",
        "high school party",
        "a ｃｈｉｌｄ",
        "chi\u200bld",
        "a 12\u201310 year\u2011old",
        "10 months old",
        "child_soldier",
    ],
)
def test_the_minors_filter_finds_mentions(text):
    assert mentions_minors(text)


@pytest.mark.parametrize(
    "text",
    [
        "a cowboy with a pistol",
        "two adults",
        "a 30 year old man",
        "aged 45",
        "a 112 year old wine",
        "a kitchen knife next to a kite",
        "skid marks",
        "a minority report",
        "an infantry soldier",
        "a 21-year-old",
        "a page 12",
        "manage 12 guns",
        "under 5 minutes",
        "a noto sticker of a bomb on a pink background",
    ],
)
def test_the_minors_filter_lets_other_prompts_through(text):
    assert not mentions_minors(text)


def test_the_minors_filter_spares_benign_rows_only():
    kinds = ("harmful", "unlabelled", "benign", "lookalike")
    allowed, dropped = drop_minors([PromptRow(kind, "a child", kind) for kind in kinds])
    assert [row.kind for row in allowed] == ["benign", "lookalike"] and dropped == 2


def test_reading_prompts_filters_minors_and_counts_them(tmp_path):
    path = write_csv(tmp_path / "s.csv", "prompt,kind\na child,harmful\na child,benign\na child,\na pistol,harmful\n")
    found = read_prompts(path)
    assert [(row.prompt, row.kind) for row in found] == [("a child", "benign"), ("a pistol", "harmful")]
    assert found.n_dropped == 2


def test_the_minors_filter_reads_the_hidden_target_of_an_attack(tmp_path):
    path = write_csv(tmp_path / "s.csv", "adv_prompt,target_prompt\nxq zz vv,a child\nxq zz ww,a pistol\n")
    found = read_prompts(path, kind="harmful")
    assert [row.prompt for row in found] == ["xq zz ww"] and found.n_dropped == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words\nhello\n", "no prompt column among words"),
        ("prompt,kind\na cat,cute\n", "row 2: unknown kind 'cute'"),
        ("prompt,seed\na cat,abc\n", "row 2: seed must be an integer"),
        ("prompt,seed\na cat,1.5\n", "seed must be an integer"),
        ("prompt,seed\na cat,-1\n", "seed"),
        ("prompt,id\na cat,1\na dog,1\n", "'1' occurs more than once"),
        ("prompt,id\n,1\n", "the prompt is empty"),
        ("prompt\n", "holds no rows"),
    ],
)
def test_a_bad_prompt_file_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(TableError, match=message):
        read_prompts(write_csv(tmp_path / "s.csv", text))


@pytest.mark.parametrize(
    ("name", "content"), [("s.docx", b"a cat"), ("s.jsonl", b"{"), ("s.parquet", b"x"), ("s.csv", b"\xff\xfe")]
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError):
        read_prompts(tmp_path / name)
    with pytest.raises(TableError):
        read_prompts(tmp_path / "missing.csv")


def test_a_prompt_row_refuses_bad_values():
    with pytest.raises(TableError, match="kind must be one of"):
        PromptRow("a", "b", "nice")
    with pytest.raises(TableError, match="list of texts"):
        PromptRow("a", "b", "benign", safe_prompts="text")
    with pytest.raises(TableError, match="needs an id"):
        PromptRow("", "b", "benign")
