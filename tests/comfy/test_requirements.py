"""What installing the pack changes in a user's ComfyUI: packages are added, and none is replaced."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import REPOSITORY


pytestmark = pytest.mark.comfy

USER = Path(sys.prefix).parent / "bin" / "python"
"""The interpreter of ComfyUI as its own requirements leave it."""
BROUGHT = {"accelerate", "diffusers", "peft", "pyarrow", "tyro"}
"""What t2i-spo-plugin requires and ComfyUI does not."""


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--python", str(USER), "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """What pip would install for the pack's requirements, by name; t2i-spo-plugin is a wheel of this repository."""
    if not USER.exists():
        pytest.skip("needs the environments that `make comfy-env` builds")
    wheels, source = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, source)
    # Only what the wheel says of itself matters here; built in the repository it would leave a folder behind.
    (source / "t2i_spo_plugin").mkdir()
    (source / "t2i_spo_plugin" / "__init__.py").write_text("")
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(source))
    requirements = REPOSITORY / "comfy_nodes" / "requirements.txt"
    options = ["--quiet", "--dry-run", "--find-links", str(wheels), "--report", "-"]
    report = json.loads(pip("install", *options, "--requirement", str(requirements)))
    return {plain(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}


def test_no_installed_package_is_replaced(planned):
    installed = {plain(item["name"]): item["version"] for item in json.loads(pip("list", "--format", "json"))}
    assert {"torch", "torchvision", "transformers", "numpy"} <= installed.keys()
    assert not {name: (installed[name], planned[name]) for name in planned.keys() & installed.keys()}


def test_it_brings_what_the_package_requires_and_no_torch(planned):
    assert BROUGHT | {"t2i-spo-plugin"} <= planned.keys()
    assert not [name for name in planned if name.startswith(("torch", "nvidia", "transformers", "numpy", "pillow"))]
