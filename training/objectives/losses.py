"""Losses that objectives and terms share, as pure functions over per-sample errors: tensors in, tensors out.

Throughout, `err_w, err_l` are the errors `[B]` of the model in training on winner and loser, `ref_w, ref_l` those of
the reference (the same model with its adapter switched off), all four at the same timestep and with the same noise.

Diffusion-DPO is exact (Wallace et al., arXiv 2311.12908, as in its released code): mean over dims, one half, omega
constant. diffusers' example writes beta without the one half: its 2500 is our 5000.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from t2i_spo_plugin.errors import ConfigError


def per_sample_error(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error `[B]` over all dims but the first, in float32; each square times its place in `weights`."""
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ValueError(f"expected two equal shapes [B, ...], got {tuple(prediction.shape)}, {tuple(target.shape)}")
    squares = (prediction.float() - target.float()).square()
    return (squares if weights is None else weights * squares).flatten(1).mean(1)


def preference_logit(err_w: Tensor, err_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    """`-0.5 * beta * D [B]` with `D = (err_w - err_l) - (ref_w - ref_l)`; its sigmoid is the implicit preference."""
    return -0.5 * beta * ((err_w - err_l) - (ref_w - ref_l))


def preference_loss(logit: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """`-log sigmoid(logit - margin) [B]`. A positive margin demands a larger gap (as in SafeDPO, 2505.20065)."""
    return -F.logsigmoid(logit - margin)


def soft_preference_loss(logit: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy `[B]` of `sigmoid(logit)` against the probability `target` that the winner is better."""
    return F.binary_cross_entropy_with_logits(logit, target.to(logit.dtype), reduction="none")


def diffusion_dpo_loss(err_w: Tensor, err_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float = 5000.0) -> Tensor:
    """`-log sigmoid(-0.5 * beta * D) [B]`, as in DiffusionDPO with errors that are means over dims."""
    return preference_loss(preference_logit(err_w, err_l, ref_w, ref_l, beta))


def output_preservation(prediction: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference `[B]` between the model and its reference.

    DUO (arXiv 2407.21035) takes it on pure noise at the last timestep with the empty prompt, weight 1e6 * beta / 100
    for its own beta. On benign examples at their own timestep and prompt it is this project's own variant.
    """
    return per_sample_error(prediction, reference.detach())


def loser_gradient_scale(
    prediction_w: Tensor, target_w: Tensor, prediction_l: Tensor, target_l: Tensor, mu: float, per_pair: bool = False
) -> Tensor:
    """How much of the loser's gradient may pass, `[B]` in [0, 1], so that the winner's error does not grow.

    `k = clip((1 - mu) * |g_w|^2 / <g_w, g_l>, 0, 1)` where `<g_w, g_l> > 0`, else 1, with g the gradients of the
    errors by the output (Diffusion-SDPO, arXiv 2511.03317). The source takes one k for the whole batch; `per_pair`
    takes one for each pair, which does not depend on the batch.
    """
    if not 0.0 <= mu <= 1.0:
        raise ConfigError(f"mu must lie in [0, 1], got {mu}")
    grad_w = (prediction_w.detach().float() - target_w.float()).flatten(1)
    grad_l = (prediction_l.detach().float() - target_l.float()).flatten(1)
    square, inner = grad_w.square().sum(1), (grad_w * grad_l).sum(1)
    if not per_pair:
        square, inner = square.sum().expand_as(square), inner.sum().expand_as(inner)
    against = inner > 0
    scale = (1.0 - mu) * square / torch.where(against, inner, torch.ones_like(inner))
    return torch.where(against, scale.clamp(0.0, 1.0), torch.ones_like(scale))


def scale_gradient(error: Tensor, scale: Tensor) -> Tensor:
    """`error [B]` unchanged in value, its gradient times `scale [B]`."""
    fixed = error.detach()
    return fixed + scale.detach() * (error - fixed)


def kto_loss(
    gain: Tensor, desirable: Tensor, beta: float, point: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """`w * (1 - sigmoid(s * beta * (gain - point))) [B]` of Diffusion-KTO (arXiv 2404.04465), sigmoid utility.

    Args:
        gain: `[B]`, the reference's error less the model's.
        desirable: `[B]` bool; s is 1 there and -1 elsewhere.
        beta: without the one half.
        point: the reference point, at least 0.
        desirable_weight, undesirable_weight: w.
    """
    sign = desirable.to(gain.dtype) * 2.0 - 1.0
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(gain.dtype)
    return weight * (1.0 - torch.sigmoid(sign * beta * (gain - point)))


def mapo_logit(err_w: Tensor, err_l: Tensor, snr: float, timesteps: int) -> Tensor:
    """`T * [a(err_w) - a(err_l)] [B]` with `a(l) = s l / (exp(s l) - 1)`, 1 at 0 (MaPO, arXiv 2406.06424)."""

    def amplitude(error: Tensor) -> Tensor:
        scaled = snr * error
        is_zero = scaled == 0.0
        return torch.where(is_zero, 1.0, scaled / torch.where(is_zero, 1.0, torch.expm1(scaled)))

    return timesteps * (amplitude(err_w) - amplitude(err_l))


def group_loss(scores: Tensor, present: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """`-log softmax(scores)[0] [B]` over those of `scores [S, B]` that are `present [S, B]`; the first always is.

    `margin [B]` is demanded of the first on top. With one negative it is `preference_loss` of the difference.
    """
    against = scores[1:].masked_fill(~present[1:], -torch.inf)
    return F.softplus(torch.logsumexp(against, 0) - scores[0] + margin)


def nft_loss(prediction: Tensor, latents: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared error `[B]` of clean latents over its own mean absolute error, which has no gradient (DiffusionNFT)."""
    difference = prediction - latents.float()
    scale = difference.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return per_sample_error(prediction, latents, weights) / scale
