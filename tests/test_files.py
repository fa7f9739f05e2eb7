"""Files are written whole or not at all, and their hashes are those of their bytes."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from t2i_spo_plugin import files
from t2i_spo_plugin.errors import ConfigError, UnreadableFileError


def test_an_atomic_file_is_readable_by_all(tmp_path):
    path = tmp_path / "new" / "table.txt"
    with files.atomic(path) as part:
        part.write_text("rows")
        assert not path.exists() and part.parent == path.parent  # On one file system: renaming it takes no copy.
    assert path.read_text() == "rows"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_an_atomic_file_replaces_the_old_one_at_the_end_only(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")
    with files.atomic(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_atomic_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path, neighbour = tmp_path / "table.txt", tmp_path / ".other.part"
    path.write_text("old")
    neighbour.write_text("of another writer")
    with pytest.raises(error), files.atomic(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert set(tmp_path.iterdir()) == {path, neighbour}


def test_an_atomic_file_is_kept_from_two_writers_mixing(tmp_path):
    path = tmp_path / "table.txt"
    with files.atomic(path) as first, files.atomic(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # Its block ends last.
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_by_the_next_process_and_nothing_else(tmp_path):
    path, foreign = tmp_path / "table.txt", tmp_path / ".download.part"
    foreign.write_text("of another program")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    begin = "from t2i_spo_plugin import files; import os, signal, sys\nwith files.atomic(sys.argv[1]) as part:\n"
    killed, whole = (f"{begin} part.write_text('half'); {end}" for end in ("os.kill(os.getpid(), signal.SIGKILL)", ""))
    assert subprocess.run([sys.executable, "-c", killed, path], env=environment).returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - {foreign}
    assert left.read_text() == "half"
    with files.atomic(tmp_path / "other.txt") as part:
        part.write_text("being written")
        left.exists() or left.write_text("half")
        assert subprocess.run([sys.executable, "-c", whole, path], env=environment).returncode == 0
        assert set(tmp_path.iterdir()) == {foreign, path, part}, "what another process is writing stays"
    assert files.remove_leftovers(tmp_path) == [] and (tmp_path / "other.txt").read_text() == "being written"


def test_an_atomic_file_may_have_the_longest_name_there_is(tmp_path):
    path = tmp_path / ("x" * 251 + ".txt")
    files.write_bytes(path, b"a", b"b")
    assert path.read_bytes() == b"ab"


def test_an_atomic_folder_replaces_all_of_the_old_one(tmp_path):
    path = tmp_path / "step-1"
    path.mkdir()
    (path / "old").touch()
    with files.atomic_folder(path) as part:
        part.mkdir()
        (part / "new").touch()
        assert [file.name for file in path.iterdir()] == ["old"] and part.name.startswith(".")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomic_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "step-1"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(RuntimeError), files.atomic_folder(path) as part:
        part.mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [path] and [file.name for file in path.iterdir()] == ["old"]


def test_an_atomic_folder_removes_what_a_killed_writer_left(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "step-1") as part:
        raise RuntimeError
    part.mkdir()
    (part / "half").touch()
    with files.atomic_folder(tmp_path / "step-1") as part:
        part.mkdir()
    assert list((tmp_path / "step-1").iterdir()) == []


def test_an_atomic_link_replaces_a_link_and_not_what_it_points_to(tmp_path):
    old, new, path = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    for folder in (old, new):
        folder.mkdir()
        (folder / "file").touch()
    path.symlink_to(old, target_is_directory=True)
    with files.atomic_folder(path) as part:
        part.symlink_to(new, target_is_directory=True)
    assert path.readlink() == new
    assert (old / "file").exists()


def test_removing_what_is_not_there_is_no_error(tmp_path):
    files.remove(tmp_path / "nothing")


def test_json_is_written_as_it_is_read(tmp_path):
    content = {"b": [1, 2.5, None], "a": "naïve 😀"}
    files.write_json(tmp_path / "report.json", content)
    text = (tmp_path / "report.json").read_bytes().decode("utf-8")
    assert list(json.loads(text)) == ["b", "a"] and json.loads(text) == content
    assert "naïve 😀" in text and text.endswith("}\n")
    assert files.read_json(tmp_path / "report.json") == content


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "report.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "report.json", {"a": object()})
    assert files.read_json(tmp_path / "report.json") == {"a": 1}


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3 * 2**20 + 7])
def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path, size):
    content = bytes(number % 251 for number in range(1000)) * (size // 1000 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    assert files.sha256_of(path) == hashlib.sha256(content[:size]).hexdigest()
    assert files.sha256_of(path, 5) == hashlib.sha256(content[:size][5:]).hexdigest()


def test_the_hash_of_a_folder_is_that_of_its_files_names_and_bytes_in_order(tmp_path):
    contents = {"b/weights": b"1", "a.json": b"2", "b.txt": b"3", "c/d/e": b""}
    for name, content in contents.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    digest = hashlib.sha256()
    for name in ("a.json", "b/weights", "b.txt", "c/d/e"):  # Folders before the files whose names they begin.
        digest.update(f"{name}\0".encode() + contents[name])
    assert files.folder_hash(tmp_path / "model") == digest.hexdigest()[:16]
    (tmp_path / "model" / "report.json").write_bytes(b"measured")
    assert files.folder_hash(tmp_path / "model") == digest.hexdigest()[:16]


def test_the_hash_of_a_path_without_files_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="neither a file nor a folder with files"):
            files.folder_hash(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
        (b'{"b": {"a": 1, "a": 1}}', "has the key 'a' twice"),
        (b"[" * 400_000 + b"]" * 100_000, "is nested too deeply"),
        (b"[" + b"1," * 500_000 + b"1]", "has too many parts"),
        (b"12345678901234567890", "holds a number of more than 19 digits"),
        (b'"' + b"x" * (files.MAX_JSON - 1) + b'"', "has 8,388,609 bytes, more than 8,388,608"),
        (b"[]", "is not a mapping"),
    ],
    ids=range(10),
)
def test_untrusted_json_is_refused_before_it_costs_much(text, reason, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UnreadableFileError, match=f"a.json {reason}"):
        files.read_json(tmp_path / "a.json")


def test_untrusted_json_up_to_the_limits_is_read(tmp_path):
    assert files.parse_json(b'"' + b"x" * (files.MAX_JSON - 2) + b'"', "a") == "x" * (files.MAX_JSON - 2)
    assert files.parse_json(b'{"a": 1234567890123456789, "{[,:": "12345678901234567890"}', "a") == {
        "a": 1234567890123456789,
        "{[,:": "12345678901234567890",
    }
    with pytest.raises(UnreadableFileError, match="cannot read .*none.json: No such file"):
        files.read_json(tmp_path / "none.json")
