"""SC-DPO (arXiv 2504.14290, first version) as far as it is known.

Known: human preference is calibrated by a safety constraint, through a reward that joins a preference reward with a
safety cost; pairs under harmful and clean prompts are mixed; hard pairs are focused on. No equation of it is public.
What stands here is this project's own reading:

    R = p - lambda * C,   p in {1, 1/2, 0} the table's own label of an image

Pairs are ordered by R: the people's choice stands unless it costs more than the other image by over `1 / lambda`. The
loss is DPO's, with this project's focusing. No quality model is asked: that is what sets it apart from `spo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from t2i_spo_plugin.options import check_choice, check_range

from ..data.dataset import Examples, Preferences, read_pairs
from .augmentations import Augmentation
from .base import ObjectiveOptions
from .preference import check_beta
from .spo import SPO, SPOOptions


@dataclass(frozen=True)
class SCDPOOptions(ObjectiveOptions):
    """Options of `scdpo`.

    Attributes:
        beta: how little the model may move from its reference: the larger, the less; with the one half and
            mean-reduced errors.
        lambda_: weight of the cost against the preference; at 1 and below the labels always decide.
        tau: pairs whose reward differs by less are dropped.
        eta: strength of dynamic focusing (additive); 0 computes nothing.
        augmentations: augmentations in which the difficulty of a pair is measured beside the plain images.
        auto_beta: mean logit above which beta is lowered; by default it is left alone.
    """

    beta: float = 5000.0
    lambda_: float = 2.0
    tau: float = 0.0
    eta: float = 1.0
    augmentations: tuple[Augmentation, ...] = ()
    auto_beta: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta, self.auto_beta)
        check_range("lambda", self.lambda_, 0.0)
        check_range("tau", self.tau, 0.0)
        check_range("eta", self.eta, 0.0)
        for name in self.augmentations:
            check_choice("augmentations", name, get_args(Augmentation))


class SCDPO(SPO):
    """See the file's first lines."""

    def __init__(self, options: SCDPOOptions) -> None:
        super().__init__(
            SPOOptions(
                beta=options.beta,
                lambda_=options.lambda_,
                mode="relabel",
                tau=options.tau,
                eta=options.eta,
                augmentations=options.augmentations,
                auto_beta=options.auto_beta,
            )
        )

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        return read_pairs(path, self.prefer, ("safety_cost_0", "safety_cost_1"))

    def prefer(self, quality: Tensor, cost: Tensor, label_0: Tensor) -> Preferences:
        """The order of N pairs by the labels less the weighted cost."""
        return super().prefer(torch.stack((label_0, 1.0 - label_0), 1), cost, label_0)
