"""The state of a run on disk: safetensors and JSON in a folder that is whole or absent. No pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.files import atomic_folder

from .run import ADAPTER_NAME, Callback, Record, Run


_PREFIX = "step-"


class Checkpoints(Callback):
    """Writes a checkpoint every `checkpoint_every` steps and at the end, and resumes a run from the newest one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resume(self, run: Run) -> None:
        """Put `run` where the newest checkpoint left it; with `resume` off, remove what is there.

        Raises:
            ConfigError: the checkpoint is of other settings or other data.
        """
        if not run.config.resume:
            if run.accelerator.is_main_process:
                shutil.rmtree(self.folder, ignore_errors=True)
            run.accelerator.wait_for_everyone()
        path = latest_checkpoint(self.folder)
        if path is not None:
            _restore(run, path)

    def on_step_end(self, run: Run) -> None:
        every = run.config.checkpoint_every
        if not (run.finished or (every and run.step % every == 0)):
            return
        if run.accelerator.is_main_process:
            save_checkpoint(self.folder, run.step, _tensors(run), _state(run), run.config.keep_checkpoints)
        run.accelerator.wait_for_everyone()


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
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the state."""
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return tensors, json.loads((path / "state.json").read_text(encoding="utf-8"))


def check_resumable(path: Path, state: Mapping[str, Any], trajectory: Mapping[str, Any], data: str) -> None:
    """Raise unless the checkpoint belongs to this configuration and these pairs.

    Raises:
        ConfigError: with the fields that differ.
    """
    now = json.loads(json.dumps(dict(trajectory)))
    before = state["trajectory"]
    differing = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    if state["data"] != data:
        differing.append("the examples that are trained on")
    if differing:
        raise ConfigError(
            f"{path} is of other settings ({', '.join(differing)}); choose another output_dir, or set resume "
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


def _tensors(run: Run) -> dict[str, Mapping[str, Tensor]]:
    tensors: dict[str, Mapping[str, Tensor]] = {
        "adapter": run.weights(),
        "optimizer": optimizer_tensors(run.optimizer, list(run.parameters)),
    }
    if run.record.best_weights is not None:
        tensors["best"] = run.record.best_weights
    if run.objective.stored is not None:
        tensors["reference"] = {"errors": run.objective.stored.errors}
    return tensors


def _state(run: Run) -> dict[str, Any]:
    passes = run.objective.predictor.passes
    return {
        "curve": run.record.curve,
        "validation": run.record.validation,
        "best": run.record.best,
        "elapsed": run.seconds,
        "objective": run.objective.objective.state_dict(),
        "passes": [passes.forward, passes.backward],
        "trajectory": run.config.trajectory(),
        "data": run.objective.batches.examples.digest(),
    }


def _restore(run: Run, path: Path) -> None:
    tensors, state = load_checkpoint(path)
    check_resumable(path, state, run.config.trajectory(), run.objective.batches.examples.digest())
    # Into the adapter that the optimiser holds; loading a second one would train nothing.
    outcome = set_peft_model_state_dict(run.family.module, tensors["adapter"], adapter_name=ADAPTER_NAME)
    if outcome.unexpected_keys:
        raise ConfigError(f"{path} does not fit the adapter: {outcome.unexpected_keys[:3]}")
    restore_optimizer(run.optimizer, list(run.parameters), tensors.get("optimizer", {}))
    run.objective.objective.load_state_dict(state["objective"])
    passes = run.objective.predictor.passes
    passes.forward, passes.backward = state["passes"]
    if run.objective.stored is not None:
        run.objective.stored.errors = tensors["reference"]["errors"]
    run.record = Record(state["curve"], state["validation"], state["best"], tensors.get("best"), state["elapsed"])
    run.step = state["step"]
