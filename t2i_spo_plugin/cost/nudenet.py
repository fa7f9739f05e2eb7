"""NudeNet: a detector of body parts in photographs. Its network is AGPL-3.0: an opt-in, never imported unasked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t2i_spo_plugin.images import resize
from t2i_spo_plugin.networks.onnx import OnnxNetwork, packaged_file

from .onnx import OnnxCostModel, boundary_logit


_SHA256 = "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f"
_INSTALL = (
    "pip install 't2i_spo_plugin[nudenet]' (the licence of NudeNet and of its network is AGPL-3.0, although the "
    "package index says MIT: see that you can comply with it)"
)
# Numbers among the 18 parts of the network: buttocks, female breast, female genitalia, anus, male genitalia, exposed.
_EXPOSED = (2, 3, 4, 6, 14)
_SIZE, _MAP = 320, 40
_LEAST_SCORE, _LEAST_SCORE_OF_A_BOX, _MOST_OVERLAP = 0.2, 0.25, 0.45
_NO_BOX = 0.05


class NudeNet(OnnxCostModel):
    """One category, `sexual`: the best score of an exposed breast, buttock, anus or genital. Licence: AGPL-3.0.

    An image's logit is that of its best such box, moved so that `boundary` becomes 0. The map paints each box with
    its score; this is where the detector saw something, and its largest value, not its mean, is the logit. The
    detector says nothing of boxes below 0.25: without any box the score counts as 0.05.

    Args:
        boundary: the score that becomes cost 0.5 at a policy's threshold of 0.5. NudeNet documents none; 0.5 is a
            choice of this project.

    Raises:
        MissingExtraError: the extra is not installed.
        ConfigError: `boundary` is not strictly between 0 and 1.
    """

    def __init__(self, boundary: float = 0.5) -> None:
        self._shift = boundary_logit(boundary)
        path = packaged_file("nudenet", "320n.onnx", _INSTALL)
        super().__init__(OnnxNetwork(path, _SHA256, "nudenet"), ("sexual",))

    def judge(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `OnnxCostModel.judge`; the map is 40 x 40."""
        boxes, scores, parts = self.detect(pixels)
        painted = torch.full((_MAP, _MAP), _NO_BOX)
        for box, score, part in zip(boxes.tolist(), scores, parts.tolist(), strict=True):
            if part in _EXPOSED:
                left, top = (math.floor(_MAP * edge) for edge in box[:2])
                right, bottom = (math.ceil(_MAP * edge) for edge in box[2:])
                region = painted[top:bottom, left:right]
                region.clamp_(min=float(score))
        places = torch.logit(painted, eps=1e-6) - self._shift
        return places.amax()[None], places[None]

    def detect(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All parts that the detector names in one image `[1, 3, H, W]`, the surest first.

        Returns:
            boxes `[N, 4]` (x0, y0, x1, y1) as shares of width and height, scores `[N]`, numbers of the parts `[N]`.
        """
        height, width = pixels.shape[-2:]
        longer = max(height, width)
        inside = (max(1, round(_SIZE * height / longer)), max(1, round(_SIZE * width / longer)))
        square = torch.zeros(1, 3, _SIZE, _SIZE)
        square[:, :, : inside[0], : inside[1]] = resize(pixels, inside, "bilinear")
        detections = self.network(square)[0].T
        scores, parts = detections[:, 4:].max(1)
        sure = scores >= _LEAST_SCORE
        detections, scores, parts = detections[sure], scores[sure], parts[sure]
        centre, half = detections[:, :2], detections[:, 2:4] / 2
        corners = torch.cat([centre - half, centre + half], 1)
        scale = torch.tensor([inside[1], inside[0]] * 2, dtype=torch.float32)
        boxes = (corners / scale).clamp(0.0, 1.0)
        best = _suppressed(boxes * scale, scores)
        return boxes[best], scores[best], parts[best]


def _suppressed(boxes: Tensor, scores: Tensor) -> list[int]:
    """Greedy non-maximum suppression: which boxes stay, the best first."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    waiting = [int(number) for number in scores.argsort(descending=True) if scores[number] >= _LEAST_SCORE_OF_A_BOX]
    stay: list[int] = []
    while waiting:
        best, *rest = waiting
        stay.append(best)
        common = torch.minimum(boxes[rest, 2:], boxes[best, 2:]) - torch.maximum(boxes[rest, :2], boxes[best, :2])
        shared = common.clamp(min=0.0).prod(1)
        overlap = shared / (areas[rest] + areas[best] - shared).clamp(min=1e-9)
        waiting = [number for number, share in zip(rest, overlap.tolist(), strict=True) if share <= _MOST_OVERLAP]
    return stay
