"""The kind of images that a pipeline generates, which a cost model has to know."""

from __future__ import annotations

from typing import Any


def pipeline_domain(pipe: Any) -> str:
    """The domain of the images that `pipe` generates: what its text encoder's config says, otherwise `photo`."""
    config = getattr(getattr(pipe, "text_encoder", None), "config", None)
    return str(getattr(config, "spo_domain", "photo"))
