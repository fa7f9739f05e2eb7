"""Models that are made of others, each of which has a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_spo_plugin.options import from_mapping

from .tables import COST_MODELS, QUALITY_REWARDS


if TYPE_CHECKING:
    from t2i_spo_plugin.cost import CostModel
    from t2i_spo_plugin.quality import CompositeQuality


def load_ensemble(
    source: str = "", local_files_only: bool = False, policies: Mapping[str, str] | None = None, **options: Any
) -> CostModel:
    """An ensemble of cost models.

    Args:
        source: of no use here.
        local_files_only: download nothing.
        policies: for the members that read a policy in words.
        options: as `EnsembleOptions`; members are names of cost models, or mappings as `Member`.

    Raises:
        SPOError: a member cannot be loaded, or the members do not fit each other.
    """
    from t2i_spo_plugin.cost import Ensemble, EnsembleOptions, Member

    chosen = from_mapping(EnsembleOptions, options, "ensemble: ")
    rows = [Member(one) if isinstance(one, str) else from_mapping(Member, one, "member: ") for one in chosen.members]
    loaded = [
        (row.model, COST_MODELS.load(row.model, local_files_only=local_files_only, policies=policies), row.categories)
        for row in rows
    ]
    return Ensemble(loaded, chosen)


def load_composite(file: Path, local_files_only: bool = False) -> CompositeQuality:
    """The rewards that a file of `spo reference` names, on its scales; paths in it are from the file's folder.

    `local_files_only` downloads nothing.

    Raises:
        SPOError: it is no such file, or a reward cannot be loaded or is another one than that which was measured.
    """
    from t2i_spo_plugin.quality import CompositeQuality, RewardReference

    reference = RewardReference.load(file)
    names = {scale.reward: _located(scale.reward, file.parent) for scale in reference.scales}
    rewards = {reward: QUALITY_REWARDS.load(name, local_files_only=local_files_only) for reward, name in names.items()}
    return CompositeQuality(rewards, reference)


def _located(name: str, folder: Path) -> str:
    """`realism:bank` as `realism:FOLDER/bank`, if that is there; any other name as it is."""
    scheme, colon, what = name.partition(":")
    return f"{scheme}:{folder / what}" if colon and what and (folder / what).exists() else name
