"""DiffusionNFT (Zheng et al., arXiv 2509.16117): policy improvement on the forward process, from rewarded images.

    x+ = (1 - beta) * x_old + beta * x_model        x- = (1 + beta) * x_old - beta * x_model
    L  = [r * |x+ - x_0|^2 / w+  +  (1 - r) * |x- - x_0|^2 / w-] / beta

x_model and x_old are the clean latents that the model and the policy that generated the images predict, w the mean
absolute difference of the numerator (no gradient), r in [0, 1] an image's reward. As in the released code, but for:

- r is this project's: the sigmoid of the standardised composite reward `R = q - lambda * C` (the source clips a
  standardised reward to a range). Its mean is that of the prompt, its deviation that of the whole table.
- The old policy is the reference of the run, fixed for a round, where the source follows by a moving average. A run
  is one round: the next begins from its adapter, against it (`adapter`, `reference`), on images that it generated.
- The source's small penalty on the distance from the base model is left to `terms.prior_preservation`.
- For epsilon and velocity models the same is done with the clean latents that they predict; the paper is on flows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from t2i_spo_plugin.options import check_choice, check_range

from ..data.batches import Batch
from ..data.dataset import Examples
from ..data.singles import Singles, read_singles
from .base import Context, Need, Objective, ObjectiveOptions, Predictions
from .losses import nft_loss
from .reward import composite_reward


Standardise = Literal["prompt", "table"]


@dataclass(frozen=True)
class NFTOptions(ObjectiveOptions):
    """Options of `nft`.

    Attributes:
        beta: how far model and old policy are mixed, in (0, 1]; smaller steps further from the old policy.
        lambda_: weight of the cost against the quality in the composite reward.
        standardise: rewards are compared with the mean of their `prompt`, or of the whole `table`.
        temperature: divides the standardised reward; a smaller one makes rewards nearer to 0 or 1.
    """

    beta: float = 1.0
    lambda_: float = 1.0
    standardise: Standardise = "prompt"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0.0, 1.0, open_low=True)
        check_range("lambda", self.lambda_, 0.0)
        check_choice("standardise", self.standardise, get_args(Standardise))
        check_range("temperature", self.temperature, 0.0, open_low=True)


def optimality(singles: Singles, lambda_: float, standardise: Standardise, temperature: float) -> Tensor:
    """The reward r `[M]` in [0, 1] of every image; 1/2 where nothing tells images apart."""
    reward = composite_reward(singles.quality, singles.cost, lambda_)
    centre = reward.mean().expand_as(reward).clone()
    if standardise == "prompt":
        for group in singles.by_caption():
            if len(group) > 1:
                centre[group] = reward[group].mean()
    deviation = (reward - reward.mean()).square().mean().sqrt()
    if not deviation > 0.0:
        return torch.full_like(reward, 0.5)
    return torch.sigmoid((reward - centre) / deviation / temperature)


class NFT(Objective):
    """See the file's first lines."""

    needs: ClassVar[frozenset[Need]] = frozenset({"singles", "reference", "reference_output"})
    logged: ClassVar[tuple[str, ...]] = ("reward", "positive", "negative", "moved")

    def __init__(self, options: NFTOptions) -> None:
        self.options = options

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        singles, options = read_singles(path), self.options
        rewards = optimality(singles, options.lambda_, options.standardise, options.temperature)
        members = [(number,) for number in range(len(singles))]
        return singles.examples(members, {"reward": rewards.float()}, "the table is empty")

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        if predictions.reference is None:
            raise TypeError("there are no predictions of the reference: state `reference_output` in `needs`")
        schedule, latents, index = context.batches.family.schedule, batch.latents[0], batch.index[0]
        noisy = schedule.noised(latents, batch.noise[0], index)
        model = schedule.clean(noisy, predictions.model[0].float(), index)
        old = schedule.clean(noisy, predictions.reference[0].float(), index)
        beta, rewards = self.options.beta, batch.columns["reward"]
        positive = nft_loss(old + beta * (model - old), latents, batch.weights)
        negative = nft_loss(old - beta * (model - old), latents, batch.weights)
        losses = (rewards * positive + (1.0 - rewards) * negative) / beta
        statistics = {
            "reward": rewards,
            "positive": positive.detach(),
            "negative": negative.detach(),
            "moved": (model - old).detach().square().flatten(1).mean(1),
        }
        return losses.mean(), statistics

    def header(self) -> dict[str, str]:
        return {"beta": repr(self.options.beta), "lambda": repr(self.options.lambda_)}
