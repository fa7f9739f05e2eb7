"""A LoRA in a denoiser for the length of a run, and the denoiser as it was afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from t2i_spo_plugin.errors import ConfigError

from .config import TrainConfig


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
def fresh_adapter(module: Any, config: TrainConfig, name: str) -> Iterator[None]:
    """A new LoRA in `module`, drawn from the configuration's seed, in float32; taken out again at the end.

    Raises:
        ConfigError: no module has the names that `config.targets` asks for.
    """
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        init_lora_weights="gaussian",
        target_modules=list(config.targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            module.add_adapter(lora, name)
        except ValueError as error:
            raise ConfigError(f"targets {', '.join(config.targets)} do not fit the denoiser: {error}") from error
    for value in module.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    try:
        yield
    finally:
        module.unload_lora()
        module._hf_peft_config_loaded = False  # older versions of diffusers forget to


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
