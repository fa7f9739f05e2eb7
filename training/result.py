"""What a run leaves behind: the adapter and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.adapters import Adapter, LoraPair, write_adapter
from t2i_spo_plugin.data import count_cut_prompts
from t2i_spo_plugin.files import write_json
from t2i_spo_plugin.options import to_mapping
from t2i_spo_plugin.pipelines import adapter_metadata

from .run import ADAPTER_NAME, Run


ADAPTER_FILE = "adapter.safetensors"
REPORT_FILE = "report.json"


def write_result(run: Run, folder: Path) -> Path:
    """Write the best adapter, or without validation the last, and `report.json` beside it."""
    best = run.record.best_weights
    path = write_adapter(trained_adapter(run, best if best is not None else run.weights()), folder / ADAPTER_FILE)
    write_json(folder / REPORT_FILE, report(run))
    return path


def trained_adapter(run: Run, weights: dict[str, Tensor]) -> Adapter:
    """The adapter with these weights, and what its header says of the run."""
    module: Any = run.family.module
    alpha = float(module.peft_config[ADAPTER_NAME].lora_alpha)
    modules = {}
    for key, down in weights.items():
        name, mark, _ = key.partition(".lora_A.weight")
        if mark:
            up = weights[f"{name}.lora_B.weight"]
            modules[f"{run.family.component}.{name}"] = LoraPair(down, up, alpha)
    extra = {
        "objective": run.config.objective_name,
        "data": run.training_step.batches.examples.digest(),
        "package_version": __version__,
        "step": str((run.record.best or {"step": run.step})["step"]),
        **run.training_step.objective.header(),
    }
    return Adapter(modules, adapter_metadata(run.pipe, run.config.title, **extra))


def report(run: Run) -> dict[str, Any]:
    """What `report.json` holds."""
    examples = run.training_step.batches.examples
    return {
        "config": to_mapping(run.config),
        "pairs": examples.counts,
        "captions_cut": count_cut_prompts(run.pipe, examples.captions),
        "data": examples.digest(),
        "identity": run.identity,
        "steps": run.step,
        "best": run.record.best,
        "validation": run.record.validation,
        "curve": run.record.curve,
        "passes": run.passes,
        "parameters": sum(value.numel() for value in run.parameters.values()),
        "seconds": round(run.seconds, 1),
        "processes": run.accelerator.num_processes,
        "device": run.accelerator.device.type,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the package and of the libraries that a run depends on."""
    import accelerate
    import diffusers
    import peft

    libraries = {module.__name__: module.__version__ for module in (torch, diffusers, peft, accelerate)}
    return {"t2i_spo_plugin": __version__, **libraries}
