"""Every row of the last table of docs/refusals.md: the state of the pipeline that a call is refused for."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from support.pipelines import fresh, images, random_adapter
from torch import nn

from t2i_spo_plugin import errors
from t2i_spo_plugin.gating import AdapterGate
from t2i_spo_plugin.pipelines.loading import load_spo_lora, set_spo_strength, unload_spo_lora
from t2i_spo_plugin.pipelines.mixin import enable_spo


DOCS = Path(__file__).parents[2] / "docs" / "refusals.md"
ROW = re.compile(r"^\| (?P<what>[^|]+) \| `(?P<kind>\w+Error)` \| (?P<message>[^|]+) \|$", re.MULTILINE)
STATES = DOCS.read_text(encoding="utf-8").partition("## The state of the pipeline")[2]
ROWS = {row["what"]: (row["kind"], row["message"]) for row in ROW.finditer(STATES)}
GATE = AdapterGate(1e9, until=0.3)


def adapter(**options):
    return random_adapter(fresh("sd1"), **options)


def loaded(pipe, **options):
    load_spo_lora(pipe, adapter(), **options)


def on_disk(pipe, folder):
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder))


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / 127.0, self.bias)


def quantised(pipe):
    for layer in [layer for layer in pipe.unet.modules() if type(layer) is nn.Linear]:
        weight = (layer.weight.clamp(-1, 1) * 127).round().to(torch.int8)
        layer.weight, layer.__class__ = nn.Parameter(weight, requires_grad=False), Scaled
    loaded(pipe)


def compiled(pipe):
    pipe.unet = torch.compile(pipe.unet)


def switched_off(pipe):
    loaded(pipe)
    pipe.disable_lora()


def fused(pipe):
    loaded(pipe)
    pipe.fuse_lora()


def two_gates(pipe):
    loaded(pipe, steering=GATE)
    loaded(pipe, steering=GATE, adapter_name="other")


def with_a_cache(pipe):
    loaded(pipe, window=(0.0, 0.5))
    # UNets have no `enable_cache`; any hook that keeps what it computed is recognised.
    from diffusers.hooks import HookRegistry, ModelHook

    hook = type("StepCache", (ModelHook,), {"_is_stateful": True})()
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(hook, "step_cache")


def nothing(pipe):
    pass


def load(pipe, **options):
    load_spo_lora(pipe, adapter(), **options)


def save(pipe):
    pipe.save_pretrained("/nonexistent")


CASES = {
    "the name is taken (load)": (loaded, load),
    "the name is one of torch's (load)": (nothing, lambda pipe: load(pipe, adapter_name="keys")),
    "nothing to swap (load)": (nothing, lambda pipe: load(pipe, hotswap=True)),
    "a larger rank (load, hotswap)": (loaded, lambda pipe: load_spo_lora(pipe, adapter(rank=8), hotswap=True)),
    "a wrapper of torch.compile (load)": (compiled, load),
    "layerwise casting (load)": (
        lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        load,
    ),
    "fused adapters (load)": (fused, lambda pipe: load(pipe, adapter_name="other")),
    "fused adapters (set a strength)": (fused, lambda pipe: set_spo_strength(pipe, 0.5)),
    "fused adapters (unload)": (fused, unload_spo_lora),
    "quantised weights (fuse)": (quantised, lambda pipe: pipe.fuse_lora()),
    "fused q, k, v (load)": (lambda pipe: pipe.unet.fuse_qkv_projections(), load),
    "layers switched off (load)": (switched_off, lambda pipe: load(pipe, adapter_name="other")),
    "no adapter (set a strength)": (nothing, lambda pipe: set_spo_strength(pipe, 0.5)),
    "another name (set a strength)": (loaded, lambda pipe: set_spo_strength(pipe, 0.5, "other")),
    "attached adapters (save)": (loaded, save),
    "text encoders (load with a gate)": (
        nothing,
        lambda pipe: load_spo_lora(pipe, adapter(components=("unet", "text_encoder")), steering=GATE),
    ),
}
"""Row -> what is done to an enabled pipeline before, and the call."""
ELSEWHERE = {
    "it cannot load a LoRA (load)",
    "offloaded to the disk (load)",
    "offloaded to the disk (unload)",
    "no enable_spo (load with a window)",
    "two gates (generate)",
    "a step cache (generate with a window)",
}
"""Rows with a test of their own below."""


def assert_refused(what, call):
    kind, message = ROWS[what]
    with pytest.raises(errors.SPOError) as caught:
        call()
    assert type(caught.value) is getattr(errors, kind)
    assert re.search(".+".join(map(re.escape, message.split("…"))), str(caught.value)), str(caught.value)


def test_the_table_has_a_row_for_every_state():
    assert set(ROWS) == {*CASES, *ELSEWHERE}


@pytest.mark.parametrize("what", CASES)
def test_a_call_is_refused_for_the_state_of_the_pipeline_and_changes_nothing(what, sd1):
    prepare, call = CASES[what]
    prepare(enable_spo(sd1))
    # A compiled wrapper would be compiled to generate, and switched-off q, k and v are as they were.
    before = None if "compile" in what else images(sd1)
    assert_refused(what, lambda: call(sd1))
    assert before is None or torch.equal(images(sd1), before)


def test_loading_into_and_unloading_from_what_lies_on_the_disk_is_refused(sd1, tmp_path):
    other = fresh("sd1")
    on_disk(other, tmp_path / "a")
    assert_refused("offloaded to the disk (load)", lambda: load(other))
    loaded(sd1)
    on_disk(sd1, tmp_path / "b")
    assert_refused("offloaded to the disk (unload)", lambda: unload_spo_lora(sd1))


def test_a_pipeline_that_takes_no_lora_or_no_window_is_refused(sd1):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pipe = DDPMPipeline(UNet2DModel(block_out_channels=(8,), norm_num_groups=4, **blocks), DDIMScheduler())
    assert_refused("it cannot load a LoRA (load)", lambda: load(pipe))
    assert_refused("no enable_spo (load with a window)", lambda: load(sd1, window=(0.0, 0.5)))


def test_generating_is_refused_with_two_gates_and_with_a_step_cache():
    for what, prepare in (
        ("two gates (generate)", two_gates),
        ("a step cache (generate with a window)", with_a_cache),
    ):
        pipe = enable_spo(fresh("sd1"))
        prepare(pipe)
        assert_refused(what, lambda: images(pipe))  # noqa: B023
