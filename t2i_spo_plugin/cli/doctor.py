"""What is installed here, what would not work, and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.errors import SPOError


Status = Literal["ok", "note", "broken"]

_DISTRIBUTION = "t2i-spo-plugin"
_IMPORTED = ("torch", "transformers", "peft", "diffusers", "accelerate", "safetensors", "huggingface_hub")
_NEEDED_FOR = {"dev": "; for developing this package", "train": "; for the log that TensorBoard shows"}
_UNWANTED = {
    "torchvision": (
        "transformers, peft and diffusers import torchvision whenever it is installed, so they fail with it. A build "
        "for CUDA does not import beside a torch for the CPU. Uninstall it, or install the build that belongs to your "
        "torch; this package does without it"
    ),
    "xformers": (
        "diffusers imports xformers whenever it is installed, so it fails with it. Uninstall it, or install the build "
        "that belongs to your torch; this package does without it"
    ),
}


@dataclass(frozen=True)
class Check:
    """One finding: `broken` stops something that has to work, `note` says what is missing or slow.

    Attributes:
        name: what was looked at.
        status: `ok`, `note` or `broken`.
        detail: a version, or what would not work and what to do about it.
    """

    name: str
    status: Status
    detail: str


def examine(import_module: Callable[[str], object] = importlib.import_module) -> list[Check]:
    """Look at versions, optional parts, devices and the bundled files. Imports the libraries; opens no network.

    Args:
        import_module: what imports a library; another one in tests.
    """
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Check("t2i_spo_plugin", "ok", __version__),
        *_dependencies(import_module),
        *_unwanted(import_module),
        *_extras(),
        *_devices(import_module),
        _bundled(),
        *_offline(),
    ]


def broken(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if check.status == "broken"]


def _dependencies(import_module: Callable[[str], object]) -> list[Check]:
    try:
        requirements = _requirements()
    except importlib.metadata.PackageNotFoundError:
        return [Check("dependencies", "note", f"{_DISTRIBUTION} is not installed as a package: versions not checked")]
    checks = []
    for requirement in requirements:
        name, version = requirement.name, _version(requirement.name)
        needed = f"needed is {_bounds(requirement)}"
        if version is None:
            checks.append(Check(name, "broken", f"not installed; {needed}"))
        elif not requirement.specifier.contains(version, prereleases=True):
            checks.append(Check(name, "broken", f"{version} is too old; {needed}"))
        else:
            flaw = _import_flaw(name, import_module) if name in _IMPORTED else ""
            checks.append(
                Check(name, "broken" if flaw else "ok", f"{version} does not import: {flaw}" if flaw else version)
            )
    return checks


def _unwanted(import_module: Callable[[str], object]) -> list[Check]:
    checks = []
    for name, advice in _UNWANTED.items():
        version = _version(name)
        if version is None:
            checks.append(Check(name, "ok", "not installed, and not needed"))
            continue
        flaw = _import_flaw(name, import_module)
        detail = f"{version} does not import: {flaw}. {advice}" if flaw else f"{version}, imports; not needed"
        checks.append(Check(name, "broken" if flaw else "ok", detail))
    return checks


def _extras() -> list[Check]:
    try:
        extras = importlib.metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    checks = []
    for extra in sorted(extras):
        requirements = _requirements(extra)
        if not requirements:
            continue
        missing = [requirement.name for requirement in requirements if _version(requirement.name) is None]
        purpose = _NEEDED_FOR.get(extra, "")
        if missing:
            detail = f"{', '.join(missing)} not installed{purpose}: pip install 't2i_spo_plugin[{extra}]'"
            checks.append(Check(f"[{extra}]", "note", detail))
        else:
            checks.append(Check(f"[{extra}]", "ok", f"installed{purpose}"))
    return checks


def _devices(import_module: Callable[[str], object]) -> list[Check]:
    if _import_flaw("torch", import_module):
        return []
    import torch

    checks = [Check("cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            metadata = torch.cuda.get_device_properties(number)
            checks.append(Check(f"cuda:{number}", "ok", f"{metadata.name}, {metadata.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        checks.append(Check("mps", "ok", "available"))
    if len(checks) == 1:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        detail = (
            f"none that torch {torch.__version__} ({built}) can use: the sticker world runs, large models are slow"
        )
        checks.append(Check("gpu", "note", detail))
    return checks


def _bundled() -> Check:
    name = "sticker world"
    flaw = _import_flaw("t2i_spo_plugin.sticker", importlib.import_module)
    if flaw:
        return Check(name, "broken", f"does not import: {flaw}")
    from t2i_spo_plugin import sticker

    try:
        for path in (sticker.pipeline_path(), *map(sticker.adapter_path, sticker.ADAPTERS)):
            path.stat()
    except SPOError as error:
        return Check(name, "broken", str(error))
    return Check(name, "ok", f"pipeline, adapters {', '.join(sticker.ADAPTERS)}")


def _offline() -> list[Check]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return [Check("HF_HUB_OFFLINE", "note", "is set: only what is in the local cache can be loaded from the Hub")]
    return []


def _import_flaw(name: str, import_module: Callable[[str], object]) -> str:
    try:
        import_module(name)
    except Exception as error:  # a broken binary raises whatever it likes
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(extra: str = "") -> list[Requirement]:
    """What this package needs here: always, or for one of its extras beside that.

    Raises:
        PackageNotFoundError: it is not installed as a package.
    """
    lines = importlib.metadata.requires(_DISTRIBUTION) or []
    return [requirement for requirement in map(Requirement, lines) if _applies(requirement, extra)]


def _applies(requirement: Requirement, extra: str) -> bool:
    """Whether Python, platform and `extra` ask for it, and `extra` where one is given."""
    marker = requirement.marker
    if marker is None:
        return not extra
    always = marker.evaluate({"extra": ""})
    return marker.evaluate({"extra": extra}) and not always if extra else always


def _bounds(requirement: Requirement) -> str:
    """Such as `2.4 or newer`."""
    specifiers = list(requirement.specifier)
    if len(specifiers) == 1 and specifiers[0].operator == ">=":
        return f"{specifiers[0].version} or newer"
    return str(requirement.specifier) or "any version"
