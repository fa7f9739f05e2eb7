"""What a name stands for, kind by kind."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_spo_plugin.errors import ConfigError, PolicyError

from .kind import Kind, own_path
from .tables import (
    ADAPTER_GATES,
    ADAPTERS,
    COST_MODELS,
    PIPELINES,
    POLICIES,
    PROMPT_SETS,
    QUALITY_MODELS,
    QUALITY_REWARDS,
)


if TYPE_CHECKING:
    from t2i_spo_plugin.cost import CostModel
    from t2i_spo_plugin.data import PromptRow
    from t2i_spo_plugin.gating import AdapterGate
    from t2i_spo_plugin.guards import Guard, Policy
    from t2i_spo_plugin.quality import CompositeQuality, QualityModel, QualityReward


_PIPELINE_LOGGERS = ("configuration_utils", "pipelines.pipeline_utils")
_FALSE_ALARMS = (
    re.compile(r"The config attributes \{'block_out_channels': [^}]*\} were passed to AutoencoderTiny"),
    re.compile(r"Expected types for vae: .*AutoencoderKL.*, got <class '[\w.]*\.AutoencoderTiny'>"),
)


def load_pipeline(name: str | Path) -> Any:
    """A diffusers pipeline: `sticker`, a folder or a Hub id; safetensors weights only.

    Two warnings of diffusers about `AutoencoderTiny` are left out, both false: of the option that this class itself
    writes into its configuration, and of its standing where a pipeline's signature says `AutoencoderKL`.

    Raises:
        PipelineError: there is none, or it cannot be loaded.
    """
    loggers = [logging.getLogger(f"diffusers.{name}") for name in _PIPELINE_LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_no_false_alarm)
    try:
        return PIPELINES.load(name)
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_false_alarm)


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    return not any(alarm.match(record.getMessage()) for alarm in _FALSE_ALARMS)


def load_cost_model(name: str | Path, local_files_only: bool = False, policy: Policy | None = None) -> CostModel:
    """A safety cost model: `sticker`, one for photographs by name, or the user's own.

    Args:
        name: `sticker`; `open_nsfw` (sexual), `owen` (graphic, sexual) or `nudenet` (sexual; AGPL-3.0), each of which
            needs the extra that its error names; `hf-classifier:ID`, `shieldgemma2:ID`, `vlm:ID` or `endpoint:URL`; a
            YAML file that describes one of these or an ensemble; one of another package; a folder that
            `save_pretrained` of a cost model wrote; or the Hub id of such a folder.
        local_files_only: download nothing, also where a folder names a model on the Hub that it stands on.
        policy: what models that read a policy in words are asked about: its enabled categories, by their descriptions.

    Raises:
        MissingExtraError: the extra that brings the weights is not installed.
        SPOError: there is no such cost model, or it cannot be read.
    """
    policies = None
    if policy is not None:
        policies = {category.name: category.description or category.name for category in policy.enabled}
    return COST_MODELS.load(name, local_files_only=local_files_only, policies=policies)


def load_quality_model(name: str | Path, reference: str | Path | None = None) -> QualityModel | CompositeQuality:
    """A quality model: `sticker`, a folder with `alignment/`, `realism/` and `reference.json`, or a Hub id of one.

    Args:
        name: which one; also the file `rewards.json` that `spo reference` wrote, or its folder.
        reference: another reference file than its own, such as that of another base model.

    Raises:
        ConfigError: there is none, or it lacks a part.
    """
    model = QUALITY_MODELS.load(name, reference=reference)
    row = QUALITY_MODELS.rows.get(str(name))
    model.domain = model.domain or (row.domain if row is not None else "")
    return model


def load_quality_reward(name: str | Path, local_files_only: bool = False) -> QualityReward:
    """A quality reward, on its own scale.

    Args:
        name: `pickscore`, `clipscore:ID`, `hpsv2:FOLDER`, `aesthetic:FOLDER`, `vqa:vlm:ID`, `vqa:endpoint:URL`,
            `unified-reward:URL`, `realism:FOLDER`, a YAML file that describes one of these, or one of another package.
        local_files_only: download nothing.

    Raises:
        SPOError: there is none, or it cannot be loaded.
    """
    return QUALITY_REWARDS.load(name, local_files_only=local_files_only)


def load_policy(name: str | Path) -> Policy:
    """A policy: `sticker`, `photo`, `photo-sexual`, or a YAML file.

    Raises:
        PolicyError: there is none, or it is malformed.
    """
    return POLICIES.load(name)


def matching_policy(categories: Sequence[str], domain: str) -> Policy:
    """The bundled policy of this domain with exactly these categories, in any order.

    Raises:
        PolicyError: there is none.
    """
    for name in POLICIES.bundled(domain):
        policy = load_policy(name)
        if {category.name for category in policy.categories} == set(categories):
            return policy
    raise PolicyError(
        f"no bundled policy is about {', '.join(categories)} in {domain} images; name a policy, or a YAML file of "
        "your own"
    )


def load_guard(cost_model: str | Path, policy: str | Path | None = None, override_domain: bool = False) -> Guard:
    """A guard from the names of a cost model and of a policy, by default the bundled one with the model's categories.

    Raises:
        SPOError: either cannot be loaded, or they do not fit each other.
    """
    from t2i_spo_plugin.guards import Guard

    rules = load_policy(policy) if policy is not None else None
    model = load_cost_model(cost_model, policy=rules)
    return Guard(model, rules or matching_policy(model.categories, model.domain), override_domain)


def load_prompts(
    name: str | Path,
    counts: Mapping[str, int],
    split: str,
    seed: int = 0,
    skip_bad_rows: bool = False,
    wordings: Sequence[str] = (),
) -> list[PromptRow]:
    """Prompts by kind, as many of each as `counts` says; rows that mention minors are left out.

    Args:
        name: `sticker` or a prompt file.
        counts: by kind, `harmful`, `benign` or `lookalike`.
        split: of the bundled prompts: `train`, `val` or `test`; a file has none.
        seed: another one gives other bundled prompts.
        skip_bad_rows: leave rows of a file out that cannot be used, instead of refusing the file.
        wordings: classes of wordings of the bundled prompts, so many prompts of each; a file says its own.

    Raises:
        SPOError: there is no such wording class.
        ConfigError: there is no such prompt set, or the file has none of a kind that is asked for.
        TableError: the file cannot be read.
    """
    from t2i_spo_plugin.data import drop_minors, read_prompts

    rows: list[PromptRow] = []
    path = own_path(name)
    row = PROMPT_SETS.rows.get(str(name))
    if row is not None:
        options = [{"wording": wording} for wording in wordings] or [{}]
        for kind, count in counts.items():
            for option in options if count else ():
                rows += row.imported()(kind, count, split, seed, **option)
    elif path is None or not path.is_file():
        raise PROMPT_SETS.unknown(name)
    else:
        every = list(read_prompts(path, skip_bad_rows=skip_bad_rows))
        for kind, count in counts.items():
            of_kind = [row for row in every if row.kind == kind][:count]
            if count and not of_kind:
                raise ConfigError(f"{name} holds no {kind} prompt; add a column kind with harmful or benign")
            rows += of_kind
    return drop_minors(rows)[0]


def adapter_source(name: str | Path) -> str | Path:
    """The file of a bundled adapter, or `name` itself: a file, a folder or a Hub id, as `load_spo_lora` takes it.

    Raises:
        AdapterError: the name is empty.
    """
    row = ADAPTERS.rows.get(str(name))
    if row is not None:
        return row.path
    own = own_path(name)
    if own is None:
        raise ADAPTERS.unknown(name)
    return own if own.exists() else name


def load_adapter_gate(name: str | Path) -> AdapterGate:
    """An adapter gate: `sticker` (for the bundled adapter `spo`) or a file that `spo train-gate` wrote.

    Raises:
        AdapterError: there is no such file, or it is none of an adapter gate.
    """
    return ADAPTER_GATES.load(name)


def revision(kind: Kind[Any], name: str | Path, model: Any = None) -> str:
    """What tells the weights behind `name` apart: the `identity` of `model` where it has one, or a hash of its files.

    Empty for a pipeline by Hub id.

    Args:
        kind: such as `COST_MODELS`.
        name: as it was loaded.
        model: what was loaded.
    """
    from t2i_spo_plugin.files import folder_hash

    path = kind.path(name)
    identity: str = getattr(model, "identity", "")
    return identity or (folder_hash(path) if path is not None else "")


def name_with_revision(kind: Kind[Any], name: str | Path, model: Any = None) -> str:
    """`name` without its folders, and its `revision`: for tables and reports."""
    own = own_path(name)
    short = str(name) if str(name) in kind.names() or own is None or not own.exists() else own.name
    return f"{short} {revision(kind, name, model)}".rstrip()
