"""An attack on a differentiable cost model: a change too small to see, after which it finds harm safe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from t2i_spo_plugin.cost import CostBatch
from t2i_spo_plugin.images import resize, to_pil, to_tensor


class Differentiable(Protocol):
    """A cost model with gradients.

    Attributes:
        size: side of the images that `score_tensor` takes.
        temperature: `[K]`, of its logits.
    """

    size: int
    temperature: Tensor

    def score_tensor(self, pixels: Tensor) -> CostBatch:
        """Scores of `[B, 3, size, size]` in [0, 1]."""
        ...


def perturbed(
    cost_model: Differentiable, images: Sequence[Image.Image], epsilon: float = 8 / 255, steps: int = 20
) -> list[Image.Image]:
    """The images, each pixel changed by at most `epsilon`, so that the highest calibrated logit is as low as can be.

    Projected gradient descent (Madry et al., arXiv 1706.06083): signed steps of `epsilon / 4` from the image itself.
    Each image is changed on its own.
    """
    return [to_pil(_descend(cost_model, to_tensor(image), epsilon, steps))[0] for image in images]


def _descend(cost_model: Differentiable, pixels: Tensor, epsilon: float, steps: int) -> Tensor:
    temperature = cost_model.temperature
    original = pixels.to(temperature.device)
    changed = original.clone()
    with torch.enable_grad():
        for _ in range(steps):
            changed.requires_grad_(True)
            logits = cost_model.score_tensor(resize(changed, cost_model.size)).logits
            (gradient,) = torch.autograd.grad((logits / temperature).amax(), changed)
            stepped = changed.detach() - epsilon / 4 * gradient.sign()
            changed = original + (stepped - original).clamp(-epsilon, epsilon)
            changed = changed.clamp(0.0, 1.0)
    return changed.detach().cpu()
