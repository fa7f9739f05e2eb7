"""The node pack in a ComfyUI: put it there, take it away, say whether it works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.files import atomic_folder, remove

from .doctor import Check


PACK = "t2i-spo-nodes"
"""The pack's name in the registry, and of its folder in `custom_nodes`."""
LEAST_COMFYUI = (0, 16, 3)

_FOREIGN = (".git", ".tracking")
"""What a clone and ComfyUI's manager leave in a folder that is theirs to update and to remove."""
_PYTHONS = (
    "venv/bin/python",
    ".venv/bin/python",
    "venv/Scripts/python.exe",
    ".venv/Scripts/python.exe",
    "../python_embeded/python.exe",
)
_PROBE = """
import asyncio, importlib.metadata, importlib.util, json, re, sys
tree, pack = sys.argv[1:]
answer = {"python": sys.version.split()[0], "missing": [], "package": "", "nodes": 0, "error": ""}
try:
    answer["package"] = importlib.metadata.version("t2i-spo-plugin")
    for line in importlib.metadata.requires("t2i-spo-plugin") or []:
        if ";" not in line:
            name = re.match(r"[\\w.-]+", line)[0]
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                answer["missing"].append(name)
except importlib.metadata.PackageNotFoundError:
    pass
try:
    sys.path.insert(0, tree)
    from comfy.cli_args import args
    args.cpu = True
    spec = importlib.util.spec_from_file_location("spo_pack", pack + "/__init__.py", submodule_search_locations=[pack])
    module = importlib.util.module_from_spec(spec)
    sys.modules["spo_pack"] = module
    spec.loader.exec_module(module)
    async def count():
        return len(await (await module.comfy_entrypoint()).get_node_list())
    answer["nodes"] = asyncio.run(count())
except Exception as error:
    answer["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(answer))
"""


def pack_folder() -> Path:
    """The complete pack, as it lies in this package."""
    return (Path(__file__).parents[1] / "comfy_nodes").resolve()


def install_pack(comfyui: str | Path, copy: bool = False) -> Path:
    """Link the pack into ComfyUI's `custom_nodes`, or copy it, and return the new link or folder.

    A link follows this package when it is upgraded; a copy has to be renewed. Earlier links and copies of the pack
    are replaced.

    Args:
        comfyui: ComfyUI's folder, or the base directory that it was started with.
        copy: copy instead.

    Raises:
        ConfigError: `comfyui` is no ComfyUI, something else is in the pack's place, or no link can be created there.
    """
    target = _target(comfyui)
    _refuse_foreign(target)
    try:
        # The dot before its name keeps ComfyUI, should it start in this moment, from importing an incomplete pack.
        with atomic_folder(target) as part:
            if copy:
                shutil.copytree(pack_folder(), part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                part.symlink_to(pack_folder(), target_is_directory=True)
    except OSError as error:
        cure = "" if copy else "; --copy needs no links"
        raise ConfigError(f"cannot write {target}: {error.strerror or error}{cure}") from error
    return target


def uninstall_pack(comfyui: str | Path) -> Path:
    """Remove the link or copy that `install_pack` made, and return where it was.

    Raises:
        ConfigError: `comfyui` is no ComfyUI, the pack is not there, or what is there was put there by something else.
    """
    target = _target(comfyui)
    if not target.is_symlink() and not target.exists():
        raise ConfigError(f"the pack is not installed: there is no {target}")
    _refuse_foreign(target)
    remove(target)
    return target


def check_pack(comfyui: str | Path, python: str | Path = "") -> list[Check]:
    """Say whether the pack is installed, current, and imports in the Python that runs ComfyUI.

    Args:
        comfyui: ComfyUI's folder, or the base directory that it was started with; a base directory holds no ComfyUI,
            and the pack is not imported then.
        python: the interpreter that runs ComfyUI; by default the one of a virtual environment in its folder, of the
            portable build, or else this one.

    Raises:
        ConfigError: `comfyui` is no ComfyUI, or `python` cannot be run.
    """
    target, tree = _target(comfyui), Path(comfyui).resolve()
    checks = [_comfyui(tree), _pack(target)]
    if not (tree / "main.py").exists():
        checks.append(Check("import", "note", f"{tree} holds no ComfyUI to try the import with"))
        return checks
    if checks[1].status == "broken":
        return checks
    return [*checks, *_probe(tree, target, str(python) or _python(tree))]


def _target(comfyui: str | Path) -> Path:
    folder = Path(comfyui).expanduser()
    for candidate, hint in ((folder, ""), (folder / "ComfyUI", f"; did you mean {folder / 'ComfyUI'}?")):
        if (candidate / "custom_nodes").is_dir() and (candidate / "models").is_dir():
            if hint:
                raise ConfigError(f"{folder} is no ComfyUI{hint}")
            return candidate.resolve() / "custom_nodes" / PACK
    raise ConfigError(f"{folder} is no ComfyUI: it has no folders custom_nodes and models")


def _refuse_foreign(target: Path) -> None:
    """Raise unless `target` is free, a link to the pack or to nothing, or a copy of the pack."""
    if not target.exists():
        return
    if not target.is_dir() or _version(target) is None:
        raise ConfigError(f"{target} is something else than this pack; it was left alone")
    foreign = [name for name in _FOREIGN if (target / name).exists()]
    if foreign and not target.is_symlink():
        raise ConfigError(
            f"{target} holds {foreign[0]}: git or ComfyUI's manager put it there, and updates and removes it"
        )


def _version(pack: Path) -> str | None:
    """The version that a folder's pyproject.toml states if it is this pack."""
    try:
        text = (pack / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    stated = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return stated[1] if stated and f'name = "{PACK}"' in text else None


def _comfyui(tree: Path) -> Check:
    file = tree / "comfyui_version.py"
    stated = re.search(r'__version__ = "([\d.]+)"', file.read_text(encoding="utf-8")) if file.exists() else None
    least = ".".join(map(str, LEAST_COMFYUI))
    if stated is None:
        return Check("comfyui", "note", f"does not state its version; needed is {least} or newer")
    if tuple(int(part) for part in stated[1].split(".") if part) < LEAST_COMFYUI:
        return Check("comfyui", "broken", f"{stated[1]} is too old; needed is {least} or newer")
    return Check("comfyui", "ok", stated[1])


def _pack(target: Path) -> Check:
    version = _version(target)
    if version is None:
        state = "is something else than this pack" if target.exists() else "is not there"
        return Check("pack", "broken", f"{target} {state}; install it with: spo comfyui install")
    kind = f"a link to {target.resolve()}" if target.is_symlink() else "a copy"
    if version != __version__:
        return Check("pack", "note", f"{version}, {kind}; this package has {__version__}: install it again")
    return Check("pack", "ok", f"{version}, {kind}")


def _python(tree: Path) -> str:
    return next((str(tree / name) for name in _PYTHONS if (tree / name).exists()), sys.executable)


def _probe(tree: Path, target: Path, python: str) -> list[Check]:
    """What the pack does in `python`, which may be another one than this."""
    command = [python, "-c", _PROBE, str(tree), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tree, check=False)
    except OSError as error:
        raise ConfigError(f"cannot run {python}: {error.strerror or error}") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        return [Check("import", "broken", f"{python} failed: {last}")]
    answer = json.loads(lines[-1])
    install = f"{python} -m pip install"
    package = Check("t2i_spo_plugin", "ok", f"{answer['package']} in Python {answer['python']}")
    if not answer["package"]:
        package = Check("t2i_spo_plugin", "broken", f"not installed: {install} t2i-spo-plugin")
    checks = [Check("python", "ok", python), package]
    if answer["missing"]:
        names = " ".join(answer["missing"])
        checks.append(Check("requirements", "note", f"not installed: {install} {names}"))
    if answer["error"]:
        return [*checks, Check("import", "broken", f"the pack does not import: {answer['error']}")]
    return [*checks, Check("import", "ok", f"{answer['nodes']} nodes")]
