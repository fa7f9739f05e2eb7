"""`spo score`: what it takes, what it says in each form, its exit codes, and the right values of small files."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from t2i_spo_plugin import cli


CASES = Path(__file__).parents[1] / "cases" / "images"
BOMB, CLEAR = CASES / "bomb.png", CASES / "bomb_fully_transparent.png"
STICKER = ["--domain", "sticker"]


def scores(capsys, *args):
    """Exit code, and the entries of `spo score --json` by the names of the files."""
    code = cli.main(["score", *map(str, args), *STICKER, "--json"])
    content = json.loads(capsys.readouterr().out)
    return code, {Path(entry["file"]).name: entry for entry in content["images"]}


def test_small_files_of_every_kind_have_the_right_values(capsys, tmp_path):
    code, found = scores(capsys, CASES, "--overlays", tmp_path)
    assert code == 0 and set(found) == {path.name for path in CASES.iterdir()}
    empty = found.pop("bomb_fully_transparent.png")
    assert empty["cost"] == 0.0 and empty["unsafe"] is False and empty["empty"] is True
    for name, entry in found.items():
        assert entry["cost"] == pytest.approx(1.0, abs=1e-3), name
        assert entry["unsafe"] is True and entry["category"] == "weapons" and entry["not_scored"] is None, name
        assert entry["frame"] == (2 if name.startswith("cat_then_bomb") else None), name
        assert (entry["ground"] is not None) == (name in ("bomb_cutout_rgba.png", "bomb_palette_trns.png")), name
    grey = found["bomb_grey8.png"]["category_costs"]
    for name in ("bomb_grey16.png", "bomb_grey16.tiff", "bomb_float.tiff"):
        assert found[name]["category_costs"] == pytest.approx(grey, abs=1e-3)
    upright = found["bomb_wide.jpg"]["category_costs"]
    assert found["bomb_wide_exif6.jpg"]["category_costs"] == pytest.approx(upright, abs=1e-3)
    for name in ("bomb_wide.jpg", "bomb_wide_exif6.jpg"):
        with Image.open(found[name]["overlay"]) as overlay:
            assert overlay.size == (384, 256)


def test_the_text_names_categories_of_unsafe_images_only(capsys):
    assert cli.main(["score", str(CASES / "cat_then_bomb.gif"), str(BOMB), str(CLEAR), *STICKER]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert lines[0].endswith("cat_then_bomb.gif: cost 1.000 unsafe (weapons, frame 2 of 2)")
    assert lines[1].endswith("bomb.png: cost 1.000 unsafe (weapons)")
    assert lines[2].endswith("bomb_fully_transparent.png: cost 0.000 safe (empty: transparent all over)")


@pytest.fixture
def folder(tmp_path):
    """Safe images in a folder and one below it; unsafe ones whose names begin with a dot."""
    (tmp_path / "deep" / ".cache").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        (tmp_path / name).write_bytes(CLEAR.read_bytes())
    for name in (".hidden.png", "deep/.cache/c.png"):
        (tmp_path / name).write_bytes(BOMB.read_bytes())
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folders_and_patterns_name_their_images_once(folder, capsys):
    assert list(scores(capsys, folder)[1]) == ["a.png", "b.png"]
    assert list(scores(capsys, f"{folder}/**/*.png", folder)[1]) == ["a.png", "b.png"]
    assert list(scores(capsys, f"{folder}/?.png")[1]) == ["a.png"]
    assert list(scores(capsys, folder / ".hidden.png")[1]) == [".hidden.png"]
    (folder / "[1].png").write_bytes(BOMB.read_bytes())
    assert list(scores(capsys, folder / "[1].png")[1]) == ["[1].png"]


def test_nothing_to_score_is_said(folder, capsys):
    (folder / "empty").mkdir()
    for source, reason in ((folder / "empty", "holds no images"), (f"{folder}/*.webp", "no file matches")):
        assert cli.main(["score", str(source), *STICKER]) == 2
        assert reason in capsys.readouterr().err
    assert cli.main(["score", str(folder), *STICKER, "--json", "--csv"]) == 2
    assert "name one" in capsys.readouterr().err


def test_the_exit_code_says_safe_unsafe_or_not_scored(folder, capsys):
    fail = ["--fail-on", "unsafe"]
    assert scores(capsys, folder, *fail)[0] == 0
    assert scores(capsys, folder, BOMB)[0] == 0
    assert scores(capsys, folder, BOMB, *fail)[0] == 1
    (folder / "cut.png").write_bytes(BOMB.read_bytes()[:2000])
    for options in ([], fail):
        code, found = scores(capsys, folder, BOMB, *options)
        assert code == 2 and found["bomb.png"]["unsafe"] is True
        assert found["cut.png"]["unsafe"] is None and found["cut.png"]["cost"] is None
        assert found["cut.png"]["not_scored"].startswith("it cannot be decoded")


def test_the_table_has_a_row_for_each_image(folder, capsys):
    (folder / "cut.png").write_bytes(b"no image")
    assert cli.main(["score", str(folder), str(BOMB), *STICKER, "--csv"]) == 2
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(row["file"]).name for row in rows] == ["a.png", "cut.png", "b.png", "bomb.png"]
    assert [row["unsafe"] for row in rows] == ["False", "", "False", "True"]
    assert float(rows[3]["weapons"]) == pytest.approx(1.0, abs=1e-3) and rows[1]["weapons"] == ""
    assert "it is no image" in rows[1]["not_scored"]


def test_what_is_not_scored_names_file_and_reason(tmp_path, capsys):
    (tmp_path / "cut.gif").write_bytes((CASES / "cat_then_bomb.gif").read_bytes()[:6000])
    names = [str(tmp_path / "cut.gif"), str(tmp_path / "none.png")]
    assert cli.main(["score", *names, *STICKER]) == 2
    shown = capsys.readouterr()
    assert f"{names[0]}: not scored: it cannot be decoded" in shown.out
    assert f"{names[1]}: not scored: it cannot be read: No such file" in shown.out
    assert "2 of 2 images were not scored" in shown.err and "Traceback" not in shown.err


def test_long_work_shows_a_bar_on_a_terminal_alone(capsys, monkeypatch, folder):
    for number in range(12):
        (folder / f"{number}.png").write_bytes(CLEAR.read_bytes())
    assert cli.main(["score", str(folder), *STICKER]) == 0
    assert "14/14" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(["score", str(folder), *STICKER]) == 0
    assert "14/14" in capsys.readouterr().err


def test_the_exit_code_reaches_the_shell():
    command = [sys.executable, "-m", "t2i_spo_plugin", "score", str(BOMB), *STICKER, "--fail-on", "unsafe"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
