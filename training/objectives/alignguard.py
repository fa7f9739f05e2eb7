"""AlignGuard, first SafetyDPO (Liu et al., arXiv 2412.10493): Diffusion-DPO with safe over unsafe, for one expert.

The loss of the released code is DPO's (`dpo.py`), exactly. Its setting: of each pair one image is unsafe and wins
never; the released table has every pair under the harmful prompt and once more under its safe counterpart. One adapter
is trained for each category (`TrainConfig.categories`). The paper speaks of losses in the plural; which others it
compared is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from t2i_spo_plugin.errors import TableError
from t2i_spo_plugin.options import check_choice

from ..data.dataset import Examples, Preferences, read_pairs
from .base import ObjectiveOptions
from .dpo import DPO, DPOOptions
from .preference import check_beta
from .reward import safety_preferences


Under = Literal["both", "harmful"]


@dataclass(frozen=True)
class AlignGuardOptions(ObjectiveOptions):
    """Options of `alignguard`.

    Attributes:
        beta: how little the model may move from its reference: the larger, the less; with the one half and
            mean-reduced errors; 5000 in the released launchers.
        under: which prompts a pair is trained under: `harmful` alone, or `both`, the safe counterpart too.
        auto_beta: mean logit above which beta is lowered; by default it is left alone.
    """

    beta: float = 5000.0
    under: Under = "both"
    auto_beta: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta, self.auto_beta)
        check_choice("under", self.under, get_args(Under))


class AlignGuard(DPO):
    """See the file's first lines."""

    def __init__(self, options: AlignGuardOptions) -> None:
        super().__init__(DPOOptions(options.beta, "safety", "drop", options.auto_beta))
        self.under = options.under

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        examples = read_pairs(path, self.prefer, ("safety_cost_0", "safety_cost_1"))
        if self.under == "both":
            return examples
        harmful = (~examples.columns["benign"]).nonzero()[:, 0].tolist()
        if not harmful:
            raise TableError(f"{path} has no pair of a safe and an unsafe image under a harmful prompt")
        return examples.pick(harmful)

    def prefer(self, quality: Tensor, cost: Tensor, label_0: Tensor) -> Preferences:
        """Safe over unsafe; all other pairs are left out."""
        return safety_preferences(quality, cost, "drop")
