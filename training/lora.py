"""A LoRA in a denoiser for the length of a run, and the denoiser as it was afterwards."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import nn

from t2i_spo_plugin.adapters import Adapter
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


@contextlib.contextmanager
def continued_adapter(
    module: Any, name: str, adapter: Adapter, component: str, reference: str | None = None
) -> Iterator[None]:
    """A LoRA in `module` that begins as `adapter`, in float32; taken out again at the end.

    Args:
        module: the denoiser.
        name: of the LoRA.
        adapter: for this denoiser, of one rank and one alpha.
        component: the denoiser's name in the pipeline.
        reference: name of a second LoRA with the same weights, which is neither active nor trained; None makes none.

    Raises:
        ConfigError: the adapter has modules elsewhere, of several ranks, or none that the denoiser has.
    """
    elsewhere = [one for one in adapter.modules if not one.startswith(f"{component}.")]
    if elsewhere:
        raise ConfigError(f"only the {component} is trained, and the adapter changes {elsewhere[0]}")
    kinds = {(pair.rank, pair.alpha) for pair in adapter.modules.values()}
    if len(kinds) > 1:
        raise ConfigError(
            "the adapter has modules of several ranks or alphas, and training knows one; `spo merge FILE --method svd "
            "--rank R` cuts it to one"
        )
    ((rank, alpha),) = kinds
    targets = [one.removeprefix(f"{component}.") for one in adapter.modules]
    weights: dict[str, torch.Tensor] = {}
    for target, pair in zip(targets, adapter.modules.values(), strict=True):
        weights[f"{target}.lora_A.weight"], weights[f"{target}.lora_B.weight"] = pair.down.float(), pair.up.float()
    known = dict(module.named_modules())
    unknown = [target for target in targets if target not in known]
    if unknown:
        raise ConfigError(f"the adapter is for another {component}: this one has no {unknown[0]}")
    with fresh_adapter(module, name, targets, rank, alpha, 0):
        set_peft_model_state_dict(module, weights, adapter_name=name)
        if reference is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                module.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), reference)
            set_peft_model_state_dict(module, weights, adapter_name=reference)
            module.set_adapter(name)
            for one, value in module.named_parameters():
                value.requires_grad_(f".{name}." in one)
        yield
