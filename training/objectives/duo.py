"""DUO (Park et al., arXiv 2407.21035): unlearning by pairs of images, without their prompts; exact.

    L = -log sigmoid(-beta * D) + lambda * mean |model - reference|^2 on pure noise at the last timestep,
    D = [l(x_w) - l_ref(x_w)] - [l(x_l) - l_ref(x_l)],   lambda = 1e6 * beta / 100

There is no one half before beta. All prompts are empty; winner and loser share the noise, but each has a timestep of
its own. The source's configuration trains self-attention alone (`targets: [attn1.to_q, ...]`), on timesteps below 750
(`t_max: 750`), at the learning rate `3e-4 * 100 / beta`: the bundled `duo` states them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, get_args

from torch import Tensor

from t2i_spo_plugin.options import check_choice, check_range

from ..data.batches import Batch
from ..data.dataset import Examples
from .base import Context, ObjectiveOptions, Predictions, Term
from .dpo import Labels, read_labelled
from .losses import preference_loss
from .preference import PairObjective, check_beta, pair_statistics
from .reward import SafePairs
from .terms import OutputPreservation, OutputPreservationOptions


@dataclass(frozen=True)
class DUOOptions(ObjectiveOptions):
    """Options of `duo`.

    Attributes:
        beta: how little the model may move from its reference: the larger, the less; without the one half, for
            mean-reduced errors; the source takes 500 for nudity, 1000 for violence.
        preservation: weight of the difference from the base model on pure noise; by default the source's 1e4 times
            beta.
        preservation_batch_size: samples of pure noise in each forward pass.
        labels: `safety` puts safe over unsafe, `table` takes the table's own labels.
        safe_pairs: what `safety` labels do with pairs that are safe on both sides: drop them, or order them by cost or
            quality.
        auto_beta: mean logit above which beta is lowered; by default it is left alone.
    """

    beta: float = 500.0
    preservation: float | None = None
    preservation_batch_size: int = 1
    labels: Labels = "safety"
    safe_pairs: SafePairs = "drop"
    auto_beta: float | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta, self.auto_beta)
        if self.preservation is not None:
            check_range("preservation", self.preservation, 0.0)
        check_range("preservation_batch_size", self.preservation_batch_size, 1, whole=True)
        check_choice("labels", self.labels, get_args(Labels))
        check_choice("safe_pairs", self.safe_pairs, get_args(SafePairs))


class DUO(PairObjective):
    """See the file's first lines."""

    independent_timesteps: ClassVar[bool] = True

    def __init__(self, options: DUOOptions) -> None:
        super().__init__(2.0 * options.beta, options.auto_beta)
        self.options = options

    def terms(self) -> Mapping[str, Term]:
        options = self.options
        weight = 1e4 * options.beta if options.preservation is None else options.preservation
        preservation = OutputPreservationOptions(weight, options.preservation_batch_size)
        return {"output_preservation": OutputPreservation(preservation)} if preservation.active else {}

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        examples = read_labelled(path, self.options.labels, self.options.safe_pairs)
        return replace(examples, captions=[""] * len(examples))

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        logit = self.logit(predictions)
        return preference_loss(logit, batch.columns["margin"]).mean(), pair_statistics(logit, predictions)

    def header(self) -> dict[str, str]:
        return {"beta": repr(self.options.beta), "beta_convention": "no half, mean over dims"}
