"""The guard as the `safety_checker` component that Stable Diffusion 1.x pipelines have a place for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_spo_plugin.guards import Guard, SafetyReport


class SPOSafetyChecker:
    """Called by the pipeline with its images; says which are unsafe, and blocks those as the guard does.

    The pipeline only knows safe and unsafe, so an image that is not scored counts as unsafe here. With
    `Guard(..., block="none")` images are flagged and left as they are.

    It is no part of a saved pipeline: `save_pretrained` leaves it out, because whoever loads that folder need not have
    this package. Set it again after loading.

    Args:
        guard: scores the images.
        domain: the kind of image that the pipeline generates.

    Attributes:
        last_report: what the guard said about the images of the latest call, with costs and overlays; None before.

    Raises:
        DomainError: the guard's cost model was made for other images.
    """

    def __init__(self, guard: Guard, domain: str = "photo") -> None:
        guard.check_domain(domain)
        self.guard = guard
        self.last_report: SafetyReport | None = None

    def __call__(self, images: Tensor | np.ndarray, clip_input: Any = None) -> tuple[Tensor | np.ndarray, list[bool]]:
        """Judge the images of one call.

        Args:
            images: `[B, 3, H, W]` in [-1, 1] as the decoder gives them, or numpy `[B, H, W, 3]` in [0, 1].
            clip_input: not used; the cost model prepares images in its own way.

        Returns:
            The images and which are unsafe. An unsafe one comes back in [0, 1], because the pipeline takes only the
            others out of [-1, 1] afterwards; the others come back bit for bit.
        """
        pixels = (images * 0.5 + 0.5).clamp(0, 1) if isinstance(images, Tensor) else images
        report = self.guard(pixels)
        blocked, self.last_report = self.guard.apply_block(pixels, report)
        unsafe = [flag is not False for flag in report.flagged]
        if not any(unsafe):
            return images, unsafe
        which = np.array(unsafe)[:, None, None, None]
        if isinstance(images, Tensor):
            return torch.where(torch.from_numpy(which).to(images.device), blocked, images), unsafe
        return np.where(which, blocked, images), unsafe
