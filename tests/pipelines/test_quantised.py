"""Adapters on quantised models: torchao, quanto and GGUF keep `nn.Linear` and store its weight in a type of their own.

Here two such layers stand for theirs, one by each mark that they are known by: a weight of whole numbers (GGUF,
bitsandbytes), and a weight of a tensor class of its own (torchao, quanto). `docs/adapters.md` says which of the
libraries themselves were run.
"""

import pytest
import torch
from support.pipelines import denoiser, fresh, images, random_adapter
from torch import nn

from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.gating import Schedule
from t2i_spo_plugin.pipelines.loading import load_spo_lora, set_spo_strength, spo_adapters, unload_spo_lora
from t2i_spo_plugin.pipelines.mixin import enable_spo


class WholeNumbers(nn.Linear):
    """A layer with 8 bits a weight and one scale a row."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class OwnClass(torch.Tensor):
    """A weight that says nothing of being rounded but by its class."""


def whole_numbers(layer):
    layer.scale = nn.Buffer(layer.weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127)
    weight = (layer.weight / layer.scale).round().to(torch.int8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.__class__ = WholeNumbers


def own_class(layer):
    weight = layer.weight.detach().to(torch.float8_e4m3fn).to(layer.weight.dtype)
    layer.weight = nn.Parameter(weight.as_subclass(OwnClass), requires_grad=False)


def quantised(family, change):
    pipe = enable_spo(fresh(family))
    for layer in list(denoiser(pipe).modules()):
        if type(layer) is nn.Linear:
            change(layer)
    return pipe


@pytest.mark.parametrize("change", [whole_numbers, own_class])
@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_an_adapter_works_beside_quantised_weights_and_comes_off_them(family, change):
    pipe, whole = quantised(family, change), fresh(family)
    adapter = random_adapter(whole)
    base, plain = images(pipe), images(whole)
    load_spo_lora(pipe, adapter)
    load_spo_lora(whole, adapter)
    on = images(pipe)
    difference = images(whole) - plain
    assert torch.norm((on - base) - difference) < 0.3 * torch.norm(difference)
    set_spo_strength(pipe, 0.0)
    assert torch.equal(images(pipe), base)
    load_spo_lora(
        pipe, random_adapter(whole, seed=5), adapter_name="other", steering=Schedule(((0.0, 1.0), (0.5, 0.0)))
    )
    assert not torch.equal(images(pipe), base)
    unload_spo_lora(pipe, "other")
    load_spo_lora(pipe, adapter, hotswap=True)
    assert torch.equal(images(pipe), on)
    unload_spo_lora(pipe)
    assert torch.equal(images(pipe), base)


@pytest.mark.parametrize(("change", "stored"), [(whole_numbers, "int8"), (own_class, "float32 by OwnClass")])
def test_fusing_into_quantised_weights_is_refused_and_changes_nothing(change, stored):
    pipe = quantised("sd3", change)
    load_spo_lora(pipe, random_adapter(fresh("sd3")))
    on, before = images(pipe), spo_adapters(pipe)
    with pytest.raises(AdapterError, match=rf"cannot be fused into quantised weights: .* is stored as {stored}"):
        pipe.fuse_lora()
    assert torch.equal(images(pipe), on) and spo_adapters(pipe) == before


def test_fusing_into_weights_stored_in_8_bits_is_refused(sd1):
    load_spo_lora(enable_spo(sd1), random_adapter(sd1))
    sd1.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    on = images(sd1)
    with pytest.raises(AdapterError, match="is stored as float8_e4m3fn"):
        sd1.fuse_lora()
    assert torch.equal(images(sd1), on)
