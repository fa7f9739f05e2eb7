"""The pack's way into a ComfyUI, with folders that look like one."""

import json
import re
import sys
from pathlib import Path

import pytest

import t2i_spo_plugin
from t2i_spo_plugin import cli
from t2i_spo_plugin.cli.comfyui import LEAST_COMFYUI, PACK, check_pack, install_pack, pack_folder, uninstall_pack
from t2i_spo_plugin.errors import ConfigError


ROOT = Path(__file__).parents[2]


@pytest.fixture
def comfyui(tmp_path):
    folder = tmp_path / "ComfyUI"
    for name in ("custom_nodes", "models", "comfy"):
        (folder / name).mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / "comfyui_version.py").write_text('__version__ = "0.30.0"\n')
    (folder / "comfy" / "cli_args.py").write_text("class args: cpu = False\n")
    return folder


def statuses(checks):
    return {check.name: check.status for check in checks}


def fake_pack(folder, entry="raise RuntimeError('no nodes today')"):
    """A copy of the pack whose nodes are replaced."""
    pack = install_pack(folder, copy=True)
    (pack / "__init__.py").write_text(f"async def comfy_entrypoint():\n    {entry}\n")
    return pack


def test_the_pack_is_linked_and_taken_away_again(comfyui):
    pack = install_pack(comfyui)
    assert pack == comfyui / "custom_nodes" / PACK and pack.is_symlink()
    assert pack.resolve() == pack_folder() and (pack / "__init__.py").exists()
    assert install_pack(comfyui) == pack
    assert uninstall_pack(comfyui) == pack
    assert list((comfyui / "custom_nodes").iterdir()) == [] and (pack_folder() / "__init__.py").exists()
    with pytest.raises(ConfigError, match="not installed"):
        uninstall_pack(comfyui)


def test_a_copy_holds_the_whole_pack_and_replaces_a_link(comfyui):
    install_pack(comfyui)
    pack = install_pack(comfyui, copy=True)
    assert not pack.is_symlink()
    expected = {
        path.relative_to(pack_folder())
        for path in pack_folder().rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path.relative_to(pack) for path in pack.rglob("*") if path.is_file()} == expected
    assert not any(path.is_symlink() for path in pack.rglob("*"))
    (pack / "left-over.py").write_text("")
    assert not (install_pack(comfyui, copy=True) / "left-over.py").exists()
    uninstall_pack(comfyui)
    assert list((comfyui / "custom_nodes").iterdir()) == []


def test_a_base_directory_takes_the_pack_too(tmp_path):
    for name in ("custom_nodes", "models"):
        (tmp_path / name).mkdir()
    install_pack(tmp_path)
    assert statuses(check_pack(tmp_path)) == {"comfyui": "note", "pack": "ok", "import": "note"}


def test_folders_that_are_no_comfyui_are_refused(comfyui, tmp_path):
    with pytest.raises(ConfigError, match="is no ComfyUI: it has no folders"):
        install_pack(tmp_path / "custom_nodes")
    with pytest.raises(ConfigError, match=f"did you mean {re.escape(str(comfyui))}"):
        install_pack(comfyui.parent)


@pytest.mark.parametrize("name", ["__init__.py", ".git", ".tracking"])
def test_foreign_files_in_the_place_of_the_pack_are_left_alone(comfyui, name):
    target = comfyui / "custom_nodes" / PACK
    if name == "__init__.py":
        target.mkdir()
    else:
        install_pack(comfyui, copy=True)
    (target / name).write_text("")
    before = sorted(target.iterdir())
    for action in (install_pack, uninstall_pack):
        with pytest.raises(ConfigError, match=PACK):
            action(comfyui)
    assert sorted(target.iterdir()) == before


def test_a_link_to_nowhere_is_replaced(comfyui):
    (comfyui / "custom_nodes" / PACK).symlink_to(comfyui / "gone")
    assert install_pack(comfyui).exists()


def test_check_counts_the_nodes_that_comfyui_would_get(comfyui):
    fake_pack(
        comfyui, "return type('E', (), {'get_node_list': staticmethod(nodes)})\nasync def nodes(): return [1, 2]"
    )
    checks = {check.name: check for check in check_pack(comfyui)}
    assert checks["import"].detail == "2 nodes" and checks["comfyui"].detail == "0.30.0"
    assert checks["python"].detail == sys.executable


def test_check_says_what_does_not_work(comfyui, tmp_path):
    assert statuses(check_pack(comfyui)) == {"comfyui": "ok", "pack": "broken"}
    pack = fake_pack(comfyui)
    checks = {check.name: check for check in check_pack(comfyui)}
    assert checks["import"].status == "broken" and "no nodes today" in checks["import"].detail
    text = (pack / "pyproject.toml").read_text()
    (pack / "pyproject.toml").write_text(text.replace(t2i_spo_plugin.__version__, "0.0.9"))
    (comfyui / "comfyui_version.py").write_text('__version__ = "0.9.12"\n')
    assert statuses(check_pack(comfyui)) | {"comfyui": "broken", "pack": "note"} == statuses(check_pack(comfyui))
    with pytest.raises(ConfigError, match="cannot run"):
        check_pack(comfyui, tmp_path / "no-python")


def test_check_looks_into_comfyuis_own_python(comfyui):
    """An interpreter in which nothing is installed."""
    fake_pack(comfyui)
    bare = comfyui / "venv" / "bin" / "python"
    bare.parent.mkdir(parents=True)
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    checks = {check.name: check for check in check_pack(comfyui)}
    assert checks["python"].detail == str(bare)
    assert checks["t2i_spo_plugin"].status == "broken"
    assert checks["t2i_spo_plugin"].detail == f"not installed: {bare} -m pip install t2i-spo-plugin"


def test_the_command_installs_checks_and_uninstalls(comfyui, capsys):
    assert cli.main(["comfyui", "install", "--path", str(comfyui), "--copy"]) == 0
    assert "restart ComfyUI" in capsys.readouterr().out
    fake_pack(comfyui)
    assert cli.main(["comfyui", "check", "--path", str(comfyui), "--json"]) == 2
    printed = capsys.readouterr()
    assert {check["name"] for check in json.loads(printed.out)} >= {"comfyui", "pack", "import"}
    assert "broken" in printed.err and "import" in printed.err
    assert cli.main(["comfyui", "uninstall", "--path", str(comfyui)]) == 0
    assert cli.main(["comfyui", "uninstall", "--path", str(comfyui)]) == 2
    assert cli.main(["comfyui", "install", "--path", str(comfyui / "models")]) == 2
    assert "is no ComfyUI" in capsys.readouterr().err


def test_metadata_for_the_node_registry_agrees_with_the_package():
    tomllib = pytest.importorskip("tomllib")
    content = tomllib.loads((pack_folder() / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = content["project"], content["tool"]["comfy"]
    assert project["name"] == PACK and "comfyui" not in project["name"].lower()
    assert project["version"] == t2i_spo_plugin.__version__ and project["version"].count(".") == 2
    assert comfy["requires-comfyui"] == f">={'.'.join(map(str, LEAST_COMFYUI))}"
    lines = (pack_folder() / "requirements.txt").read_text().split()
    assert project["dependencies"] == lines == [f"t2i-spo-plugin>={project['version']}"]
    assert (pack_folder() / project["license"]["file"]).read_bytes() == (ROOT / "LICENSE").read_bytes()
