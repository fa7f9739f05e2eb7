"""Modules on a device for as long as they are needed there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def placed(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Modules on `device`, and back where they were afterwards."""
    before = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, place in zip(modules, before, strict=True):
            module.to(place)
