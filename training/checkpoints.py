"""The state of a run on disk: safetensors and JSON, written aside and renamed: a checkpoint is whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.files import atomic_folder


_PREFIX = "step-"


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `folder/step-...` with one safetensors file for each group of tensors and `state.json`; prune old ones."""
    path = folder / f"{_PREFIX}{step:08d}"
    with atomic_folder(path) as part:
        part.mkdir()
        for name, group in tensors.items():
            content = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(content, part / f"{name}.safetensors")
        (part / "state.json").write_text(json.dumps({**state, "step": step}), encoding="utf-8")
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the state."""
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return tensors, json.loads((path / "state.json").read_text(encoding="utf-8"))


def check_resumable(path: Path, state: Mapping[str, Any], trajectory: Mapping[str, Any], data: str) -> None:
    """Raise unless the checkpoint belongs to this configuration and these pairs.

    Raises:
        ConfigError: with the fields that differ.
    """
    made = json.loads(json.dumps(dict(trajectory)))
    before = state["trajectory"]
    differing = sorted(key for key in made.keys() | before.keys() if made.get(key) != before.get(key))
    if state["data"] != data:
        differing.append("the pairs kept from the table")
    if differing:
        raise ConfigError(
            f"{path} was made with other settings ({', '.join(differing)}); choose another output_dir, or set resume "
            "to false to begin again"
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's state as `parameter name/field` -> tensor; `names` are in the optimiser's order."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[number]}/{field}": torch.as_tensor(value)
        for number, fields in state.items()
        for field, value in fields.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        state.setdefault(names.index(name), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / "state.json").is_file())
