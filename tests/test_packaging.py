"""The package as it is installed: what lands where, and that all ways of getting it agree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import t2i_spo_plugin


if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
DATA = {".json", ".jsonl", ".parquet", ".png", ".safetensors", ".tsv", ".txt", ".webp", ".yaml"}
LINKED = ("training", "eval", "comfy_nodes")


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_the_same_in_code_and_metadata():
    assert project()["version"] == t2i_spo_plugin.__version__


@pytest.mark.parametrize("package", LINKED)
def test_the_folders_at_the_top_are_reached_through_the_package(package):
    link = ROOT / "t2i_spo_plugin" / package
    assert link.is_symlink() and os.readlink(link) == f"../{package}"
    assert link.resolve() == ROOT / package


def test_requirements_are_loose_and_torchvision_is_none_of_them():
    metadata = project()
    every = metadata["dependencies"] + [line for lines in metadata["optional-dependencies"].values() for line in lines]
    assert not [line for line in every if "==" in line or "<" in line]
    assert not [line for line in every if "torchvision" in line]
    assert set(metadata["optional-dependencies"]) >= {"train", "eval", "comfy", "opennsfw", "nudenet", "ray", "dev"}


def test_every_lower_bound_is_of_the_versions_that_are_tested_lowest():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = dict(line.split(">=") for line in project()["dependencies"])
    assert bounds.keys() == pinned.keys()
    assert all(f"{pinned[name]}.".startswith(f"{least}.") for name, least in bounds.items())


def test_notice_names_the_owners_of_the_images():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for owner in ("Google", "Mozilla", "Microsoft", "Twitter", "CC-BY-4.0", "Permission is hereby granted"):
        assert owner in notice


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheel of the sources, sdist, and wheel of the sdist, built from a copy so that this folder stays clean."""
    build = pytest.importorskip("build")
    assert build
    copy = tmp_path_factory.mktemp("source") / "project"
    for folder in ("t2i_spo_plugin", *LINKED, "tests"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, copy / file)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = out.glob("*.tar.gz")
    (from_sdist,) = out.glob("*.whl")
    direct = tmp_path_factory.mktemp("direct")
    done = subprocess.run(
        [*command[:3], "--wheel", "--outdir", str(direct), str(copy)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = direct.glob("*.whl")
    return wheel, sdist, from_sdist


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as content:
        return {name for name in content.namelist() if ".dist-info/" not in name}


def sources() -> set[str]:
    """Every module and data file that belongs into the package, by its name there."""
    found = set()
    for folder, _, names in os.walk(ROOT / "t2i_spo_plugin", followlinks=True):
        if "__pycache__" in folder:
            continue
        for name in names:
            path = Path(folder, name)
            inside = path.relative_to(ROOT)
            wanted = path.suffix == ".py" or name == "py.typed"
            wanted |= "comfy_nodes" in inside.parts or "templates" in inside.parts
            wanted |= path.suffix in DATA and ("sticker" in inside.parts or path.suffix == ".yaml")
            if wanted:
                found.add(inside.as_posix())
    return found


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_same_files(distributions):
    wheel, sdist, from_sdist = distributions
    assert files_of(wheel) == files_of(from_sdist) == sources()
    with tarfile.open(sdist) as content:
        members = content.getmembers()
    assert not [member.name for member in members if member.issym()], "links do not survive everywhere"


@pytest.mark.slow
def test_a_wheel_installs_nothing_but_the_package(distributions):
    assert {name.partition("/")[0] for name in files_of(distributions[0])} == {"t2i_spo_plugin"}
    with zipfile.ZipFile(distributions[0]) as content:
        (points,) = (name for name in content.namelist() if name.endswith("entry_points.txt"))
        assert "spo = t2i_spo_plugin.cli:main" in content.read(points).decode()
        assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in content.namelist() if "/licenses/" in name}


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(distributions, tmp_path):
    with zipfile.ZipFile(distributions[0]) as content:
        content.extractall(tmp_path / "site")
    code = (
        "import t2i_spo_plugin, t2i_spo_plugin.training.config, t2i_spo_plugin.eval.config;"
        "import t2i_spo_plugin.comfy_nodes;"
        "from t2i_spo_plugin import load_policy; print(t2i_spo_plugin.__file__, load_policy('sticker').name)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")) and "sticker" in done.stdout
