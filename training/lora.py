"""A LoRA in a denoiser for the length of a run, and the denoiser as it was afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from t2i_spo_plugin.errors import ConfigError


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` asks for a gradient; what asked before asks again afterwards."""
    before = {name: value.requires_grad for name, value in module.named_parameters()}
    module.requires_grad_(False)
    try:
        yield
    finally:
        for name, value in module.named_parameters():
            value.requires_grad_(before[name])


@contextlib.contextmanager
def fresh_adapter(
    module: Any, name: str, targets: Sequence[str], rank: int, alpha: float, seed: int
) -> Iterator[None]:
    """A new LoRA in `module`, drawn from `seed`, in float32; taken out again at the end.

    Raises:
        ConfigError: no module has the names that `targets` asks for.
    """
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            module.add_adapter(lora, name)
        except ValueError as error:
            raise ConfigError(f"targets {', '.join(targets)} do not fit the denoiser: {error}") from error
    for value in module.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    try:
        yield
    finally:
        module.unload_lora()
        module._hf_peft_config_loaded = False  # older versions of diffusers forget to
