"""The state of a run on disk: safetensors and JSON in a folder that is whole or absent. No pickle."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, UnreadableFileError
from t2i_spo_plugin.files import atomic_folder, remove
from t2i_spo_plugin.identity import changes

from .run import ADAPTER_NAME, Callback, Record, Run


_PREFIX = "step-"


class Checkpoints(Callback):
    """Writes a checkpoint every `checkpoint_every` steps and at the end, and resumes a run from the newest one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resume(self, run: Run) -> None:
        """Put `run` where the newest whole checkpoint left it; with `resume` off, remove what is there.

        Raises:
            ConfigError: the checkpoint is of other settings or other data.

        Warns:
            UserWarning: a checkpoint is damaged, and an older one, or none, was taken.
        """
        main = run.accelerator.is_main_process
        if not run.config.resume:
            if main:
                shutil.rmtree(self.folder, ignore_errors=True)
            run.accelerator.wait_for_everyone()
        damaged = []
        for path in reversed(_checkpoints(self.folder)):
            try:
                tensors, state = load_checkpoint(path)
            except UnreadableFileError as error:
                warnings.warn(f"{error}; it is removed, and the run goes on from before", stacklevel=2)
                damaged.append(path)
                continue
            _restore(run, path, tensors, state)
            break
        # Only now, for every process has to see the same ones.
        run.accelerator.wait_for_everyone()
        if main:
            for path in [*damaged, *self.folder.glob(f".{_PREFIX}*.part")]:
                remove(path)

    def on_step_end(self, run: Run) -> None:
        if not run.checkpoint_due:
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
        (part / "state.json").write_text(json.dumps({**state, "step": step, "files": list(tensors)}), encoding="utf-8")
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the state.

    Raises:
        UnreadableFileError: a file of it is missing or cut, or the adapter holds NaN.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        for file in [path / f"{name}.safetensors" for name in state["files"]]:
            tensors[file.stem] = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UnreadableFileError(f"the checkpoint {path} is damaged: cannot read {file.name} ({error})") from error
    bad = [name for name, value in tensors["adapter"].items() if not bool(value.isfinite().all())]
    if bad:
        raise UnreadableFileError(f"the checkpoint {path} is damaged: {bad[0]} of the adapter holds NaN or Inf")
    return tensors, state


def check_resumable(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise unless the checkpoint depends on what the run depends on, by content; see `Run.identity`.

    Raises:
        ConfigError: with what differs, as it was and as it is. Nothing is changed.
    """
    # Who validates does not decide the weights: a run may go on without, and scores that do not compare are refused.
    compared = {key: value for key, value in now.items() if key != "validation" or (value and before["validation"])}
    differing = changes({key: before[key] for key in compared}, json.loads(json.dumps(compared)))
    if differing:
        raise ConfigError(
            f"{path} is of another run ({'; '.join(differing)}); put back what was there, choose another output_dir, "
            "or set resume to false to begin again"
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
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _tensors(run: Run) -> dict[str, Mapping[str, Tensor]]:
    tensors: dict[str, Mapping[str, Tensor]] = {
        "adapter": run.weights(),
        "optimizer": optimizer_tensors(run.optimizer, list(run.parameters)),
    }
    if run.record.best_weights is not None:
        tensors["best"] = run.record.best_weights
    if run.training_step.stored is not None:
        tensors["reference"] = {"errors": run.training_step.stored.errors}
    return tensors


def _state(run: Run) -> dict[str, Any]:
    passes = run.training_step.predictor.passes
    return {
        "curve": run.record.curve,
        "validation": run.record.validation,
        "best": run.record.best,
        "elapsed": run.seconds,
        "objective": run.training_step.objective.state_dict(),
        "passes": [passes.forward, passes.backward],
        "identity": run.identity,
    }


def _restore(run: Run, path: Path, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
    check_resumable(path, state["identity"], run.identity)
    # Into the adapter that the optimiser holds; loading a second one would train nothing.
    outcome = set_peft_model_state_dict(run.family.module, tensors["adapter"], adapter_name=ADAPTER_NAME)
    if outcome.unexpected_keys:
        raise ConfigError(f"{path} does not fit the adapter: {outcome.unexpected_keys[:3]}")
    restore_optimizer(run.optimizer, list(run.parameters), tensors.get("optimizer", {}))
    run.training_step.objective.load_state_dict(state["objective"])
    passes = run.training_step.predictor.passes
    passes.forward, passes.backward = state["passes"]
    if run.training_step.stored is not None:
        run.training_step.stored.errors = tensors["reference"]["errors"]
    run.record = Record(state["curve"], state["validation"], state["best"], tensors.get("best"), state["elapsed"])
    run.step = state["step"]
