"""What training minimises: one file an objective, one row in `OBJECTIVES`, and terms that any of them may carry."""

from __future__ import annotations

from typing import Any, NamedTuple

from .alignguard import AlignGuard, AlignGuardOptions
from .base import Objective, ObjectiveOptions
from .cost_gradient import CostGradient, CostGradientOptions
from .dpo import DPO, DPOOptions
from .duo import DUO, DUOOptions
from .group import Group, GroupOptions
from .kto import KTO, KTOOptions
from .mapo import MaPO, MaPOOptions
from .nft import NFT, NFTOptions
from .pareto import Pareto, ParetoOptions
from .scdpo import SCDPO, SCDPOOptions
from .sft import SFT, SFTOptions
from .spo import SPO, SPOOptions


class Row(NamedTuple):
    """An objective and the dataclass of its options."""

    objective: Any
    options: type[ObjectiveOptions]


OBJECTIVES: dict[str, Row] = {
    "dpo": Row(DPO, DPOOptions),
    "spo": Row(SPO, SPOOptions),
    "sft": Row(SFT, SFTOptions),
    "scdpo": Row(SCDPO, SCDPOOptions),
    "alignguard": Row(AlignGuard, AlignGuardOptions),
    "duo": Row(DUO, DUOOptions),
    "kto": Row(KTO, KTOOptions),
    "mapo": Row(MaPO, MaPOOptions),
    "group": Row(Group, GroupOptions),
    "pareto": Row(Pareto, ParetoOptions),
    "nft": Row(NFT, NFTOptions),
    "cost-gradient": Row(CostGradient, CostGradientOptions),
}
OBJECTIVE_OPTIONS: dict[str, type[ObjectiveOptions]] = {name: row.options for name, row in OBJECTIVES.items()}


def objective_name(options: ObjectiveOptions) -> str:
    """The row of `OBJECTIVES` that `options` belong to."""
    return next(name for name, kind in OBJECTIVE_OPTIONS.items() if kind is type(options))


def make_objective(options: ObjectiveOptions) -> Objective:
    """The objective with these options."""
    return OBJECTIVES[objective_name(options)].objective(options)
