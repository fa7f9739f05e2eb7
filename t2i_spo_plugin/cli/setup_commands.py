"""Commands about the installation: `spo comfyui` and `spo doctor`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from t2i_spo_plugin.errors import SPOError

from .parsing import AsJSON, command, summary


if TYPE_CHECKING:
    from .doctor import Check


@command
def doctor(json_: AsJSON = False) -> None:
    """Report what is installed here, what would not work, and why.

    Args:
        json_: print a JSON list instead of lines.
    """
    from .doctor import examine

    _print_checks(examine(), json_)


def comfyui(args: Sequence[str]) -> None:
    """Put the node pack into a ComfyUI, take it away, or check it."""
    actions = {"install": _install, "uninstall": _uninstall, "check": _check}
    tyro.extras.subcommand_cli_from_dict(actions, args=args, prog="spo comfyui", description=summary(comfyui))


def _install(path: Path, copy: bool = False) -> None:
    """Put the node pack into ComfyUI's custom_nodes.

    Args:
        path: ComfyUI's folder, or the base directory that it is started with.
        copy: copy the pack instead of linking it; a copy has to be renewed after an upgrade.
    """
    from .comfyui import install_pack

    print(f"{install_pack(path, copy)}: restart ComfyUI")


def _uninstall(path: Path) -> None:
    """Take the node pack away again.

    Args:
        path: ComfyUI's folder, or the base directory that it is started with.
    """
    from .comfyui import uninstall_pack

    print(f"{uninstall_pack(path)}: removed")


def _check(path: Path, python: str = "", json_: AsJSON = False) -> None:
    """Report whether the pack is there, current, and imports.

    Args:
        path: ComfyUI's folder, or the base directory that it is started with.
        python: the interpreter that runs ComfyUI, where it is not in its folder and not the one of this command.
        json_: print a JSON list instead of lines.
    """
    from .comfyui import check_pack

    _print_checks(check_pack(path, python), json_)


def _print_checks(checks: Sequence[Check], as_json: bool) -> None:
    from .doctor import broken

    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], ensure_ascii=False, indent=2))
    else:
        for check in checks:
            print(f"{check.status:<8}{check.name:<18}{check.detail}")
    failed = broken(checks)
    if failed:
        raise SPOError(f"broken: {', '.join(check.name for check in failed)}")
