"""The cost itself, back-propagated: an image is noised a little, denoised in one step, decoded, and judged.

    L = lambda * C(x) - a(x, prompt),   x the image that the model sees at one timestep

with C the policy's cost of a differentiable cost model and a the alignment of a differentiable quality model, under
benign prompts alone: whether an image shows a harmful prompt well is never asked. The idea is that of ReFL
(ImageReward, arXiv 2304.05977) and SRPO (arXiv 2509.06942); those begin from the model's own samples and late steps of
its sampler, this from noised images of the table, at low noise (`t_max`), where one step shows the image. This
project's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.identity import model_identity
from t2i_spo_plugin.images import resize
from t2i_spo_plugin.options import check_range
from t2i_spo_plugin.pipelines import pipeline_domain
from t2i_spo_plugin.registry import STICKER, load_guard, load_quality_model

from ..data.batches import Batch
from ..data.dataset import Examples
from ..data.singles import read_singles
from ..families import Family
from ..lora import frozen
from .base import Context, Need, Objective, ObjectiveOptions, Predictions


@dataclass(frozen=True)
class CostGradientOptions(ObjectiveOptions):
    """Options of `cost-gradient`.

    Attributes:
        lambda_: weight of the cost against the alignment.
        cost_model: what says how unsafe an image is: `sticker`, a name such as `open_nsfw`, a folder, or a Hub id; it
            must be differentiable.
        policy: `sticker`, or a policy's name or YAML file.
        quality_model: `sticker`, or a folder; empty asks for the cost alone.
        override_domain: use the models on images of another domain than theirs.
    """

    lambda_: float = 1.0
    cost_model: str = STICKER
    policy: str = STICKER
    quality_model: str = ""
    override_domain: bool = False

    def __post_init__(self) -> None:
        check_range("lambda", self.lambda_, 0.0, open_low=True)


class CostGradient(Objective):
    """See the file's first lines."""

    needs: ClassVar[frozenset[Need]] = frozenset({"singles"})
    logged: ClassVar[tuple[str, ...]] = ("cost", "alignment")
    weighs_errors: ClassVar[bool] = False

    def __init__(self, options: CostGradientOptions) -> None:
        self.options = options

    def read(self, path: str | Path, skip_bad_rows: bool = False) -> Examples:
        singles = read_singles(path)
        return singles.examples([(number,) for number in range(len(singles))], {}, "the table is empty")

    def prepare(self, pipe: Any, family: Family, device: torch.device) -> None:
        """Load the judges, and keep the autoencoder on the device.

        Raises:
            ConfigError: a judge without gradients.
            DomainError: the cost model was made for other images.
        """
        options = self.options
        self._guard = load_guard(options.cost_model, options.policy, options.override_domain)
        self._guard.check_domain(pipeline_domain(pipe))
        model: Any = self._guard.cost_model
        if not hasattr(model, "score_tensor"):
            raise ConfigError(f"cost-gradient needs a cost model with gradients; {type(model).__name__} has none")
        model.to(device)
        self._quality: Any = None
        if options.quality_model:
            self._quality = getattr(load_quality_model(options.quality_model), "alignment", None)
            if not hasattr(self._quality, "embed_pixels"):
                raise ConfigError(f"the quality model {options.quality_model} has no alignment with gradients")
            self._quality.to(device)
        self._vae = pipe.vae.to(device)

    def loss(self, batch: Batch, predictions: Predictions, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        family, index = context.batches.family, batch.index[0]
        noisy = family.schedule.noised(batch.latents[0], batch.noise[0], index)
        latents = family.schedule.clean(noisy, predictions.model[0].float(), index)
        # Gradients go through the autoencoder, not into it.
        with frozen(self._vae):
            pixels = family.decode(self._vae, latents)
        cost = self._cost(pixels)
        alignment = torch.zeros_like(cost)
        benign = batch.columns["benign"]
        if self._quality is not None and bool(benign.any()):
            captions = [context.batches.examples.captions[number] for number in batch.examples]
            images = self._quality.embed_pixels(resize(pixels, self._quality.size))
            alignment = benign.float() * self._quality.alignment(images, self._quality.embed_prompts(captions))
        losses = self.options.lambda_ * cost - alignment
        return losses.mean(), {"cost": cost.detach(), "alignment": alignment.detach()}

    def _cost(self, pixels: Tensor) -> Tensor:
        """C `[B]` of `pixels [B, 3, H, W]` in [0, 1], with gradients."""
        model: Any = self._guard.cost_model
        size = model.size if hasattr(model, "size") else model.tower.size
        logits = model.score_tensor(resize(pixels, size)).logits
        policy = self._guard.policy
        return policy.cost(policy.category_costs(logits, model.temperature, tuple(model.categories))[0])

    def identity(self) -> dict[str, str]:
        quality = {} if self._quality is None else {"quality_model": model_identity(self._quality)}
        return {**self._guard.identity, **quality}

    def header(self) -> dict[str, str]:
        return {"lambda": repr(self.options.lambda_), "cost_model": self.options.cost_model}
