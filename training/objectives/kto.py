"""Diffusion-KTO (Li et al., arXiv 2404.04465): single images, each good or bad by its label; no pairs.

    L = w * (1 - sigmoid(s * beta * (g - z))),   g = l_ref(x) - l(x),   z = max(0, mean of g)

with s = 1 and the weight w of desirable images, s = -1 and that of undesirable ones. The source's loss with its
sigmoid utility, but for z: it takes the mean over the batch at hand, this project a running mean over the steps before
and over all ranks, so that a loss depends on no micro-batch.

What the labels are is this project's own: safe images (cost below 1/2) of some quality are desirable, unsafe ones are
not, and safe but poor ones are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from t2i_spo_plugin.metrics import UNSAFE_COST
from t2i_spo_plugin.options import check_range

from ..data.batches import Batch
from ..data.dataset import Examples
from ..data.singles import read_singles
from .base import Context, Need, Objective, ObjectiveOptions, Predictions
from .losses import kto_loss
from .preference import check_beta, reference_errors
from .running import Beta, RunningMean


@dataclass(frozen=True)
class KTOOptions(ObjectiveOptions):
    """Options of `kto`.

    Attributes:
        beta: how little the model may move from its reference: the larger, the less; without the one half, for
            mean-reduced errors.
        desirable_weight: weight of safe images.
        undesirable_weight: weight of unsafe images.
        min_quality: safe images below it are left out, in [0, 1].
        momentum: momentum of the running mean that is the reference point, in [0, 1); 0 takes the step before alone.
        auto_beta: mean logit above which beta is lowered; by default it is left alone.
    """

    beta: float = 5000.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    min_quality: float = 0.3
    momentum: float = 0.9
    auto_beta: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta, self.auto_beta)
        check_range("desirable_weight", self.desirable_weight, 0.0)
        check_range("undesirable_weight", self.undesirable_weight, 0.0)
        check_range("min_quality", self.min_quality, 0.0, 1.0)
        check_range("momentum", self.momentum, 0.0, 1.0, open_high=True)


class KTO(Objective):
    """See the file's first lines."""

    needs: ClassVar[frozenset[Need]] = frozenset({"singles", "reference"})
    logged: ClassVar[tuple[str, ...]] = ("accuracy", "gain", "error", "reference_error")

    def __init__(self, options: KTOOptions) -> None:
        self.options = options
        self.beta = Beta(options.beta, options.auto_beta)
        self.mean_gain = RunningMean(options.momentum)

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        singles = read_singles(path)
        unsafe = singles.cost >= UNSAFE_COST
        keep = (unsafe | (singles.quality >= self.options.min_quality)).nonzero()[:, 0]
        columns = {"desirable": ~unsafe[keep]}
        return singles.examples([(number,) for number in keep.tolist()], columns, "safe ones are below min_quality")

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        error, reference = predictions.errors[0], reference_errors(predictions)[0]
        gain, desirable = reference - error, batch.columns["desirable"]
        self.mean_gain.see(gain)
        self.beta.see(2.0 * gain)
        point = max(0.0, self.mean_gain.value)
        options = self.options
        weights = (options.desirable_weight, options.undesirable_weight)
        losses = kto_loss(gain, desirable, self.beta.value, point, *weights)
        towards = (gain.detach() - point) * (desirable.float() * 2.0 - 1.0)
        statistics = {
            "accuracy": (towards > 0).float(),
            "gain": gain.detach(),
            "error": error.detach(),
            "reference_error": reference,
        }
        return losses.mean(), statistics

    def header(self) -> dict[str, str]:
        return {"beta": repr(self.options.beta), "beta_convention": "no half, mean over dims"}

    def end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.mean_gain.end_step(sum_over_ranks)
        self.beta.end_step(sum_over_ranks)

    def state_dict(self) -> dict[str, float]:
        return {"reference_point": self.mean_gain.value, **self.beta.state_dict()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.mean_gain.set(state["reference_point"])
        self.beta.load_state_dict(state)
