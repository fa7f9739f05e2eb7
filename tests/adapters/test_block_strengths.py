"""Strengths for parts of an adapter: which part a module belongs to, and what multiplying its change comes to."""

import pytest
import torch

from t2i_spo_plugin.adapters import Adapter, LoraPair, parse_blocks, scale_by_block
from t2i_spo_plugin.adapters.block_strengths import PARTS, part_by_module
from t2i_spo_plugin.errors import ConfigError


UNET = {
    "unet.down_blocks.0.attentions.0.to_q": "first",
    "unet.mid_block.attentions.0.to_q": "middle",
    "unet.up_blocks.1.attentions.0.to_q": "last",
    "unet.time_embedding.linear_1": "other",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": "text encoder",
}


def adapter(names, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    return Adapter(
        {
            name: LoraPair(
                torch.randn(2, 4, generator=generator).to(dtype), torch.randn(3, 2, generator=generator).to(dtype), 2.0
            )
            for name in names
        }
    )


def test_the_parts_of_a_unet_are_its_ways_down_and_up():
    assert part_by_module(UNET) == UNET


def test_the_parts_of_a_transformer_are_thirds_in_the_order_in_which_it_runs():
    double = [f"transformer.transformer_blocks.{n}.attn.to_q" for n in (10, 2)]
    single = [f"transformer.single_transformer_blocks.{n}.attn.to_q" for n in range(4)]
    found = part_by_module([*single, *double, "transformer.x_embedder", "transformer.blocks_of_it.proj"])
    assert [found[name] for name in (double[1], double[0], *single)] == ["first"] * 2 + ["middle"] * 2 + ["last"] * 2
    assert found["transformer.x_embedder"] == found["transformer.blocks_of_it.proj"] == "other"


def test_every_part_multiplies_the_change_of_its_own_modules():
    before = adapter(UNET)
    factors = dict(zip(PARTS, (0.5, 0.0, 1.0, 3.0, 0.3), strict=True))
    after = scale_by_block(before, factors, {})
    for name, part in UNET.items():
        assert torch.allclose(after.modules[name].delta(), factors[part] * before.modules[name].delta(), rtol=1e-6)
    assert after.metadata is before.metadata and after.rank == before.rank


def test_named_blocks_go_before_the_parts_and_the_longest_name_counts():
    before = adapter(UNET)
    named = {"unet": 0.25, "unet.up_blocks.1": 2.0}
    after = scale_by_block(before, {"first": 0.0, "text encoder": 0.5}, named)
    for name, factor in zip(UNET, (0.25, 0.25, 2.0, 0.25, 0.5), strict=True):
        assert torch.allclose(after.modules[name].delta(), factor * before.modules[name].delta(), rtol=1e-6)


@pytest.mark.parametrize(("parts", "blocks"), [({"up": 1.0}, {}), ({"first": -1.0}, {}), ({}, {"unet": -0.1})])
def test_what_is_no_part_and_what_would_undo_safety_is_refused(parts, blocks):
    with pytest.raises(ConfigError, match="there is no part|at least 0"):
        scale_by_block(adapter(UNET), parts, blocks)


def test_blocks_are_read_line_by_line():
    assert parse_blocks(" unet.up_blocks.1 = 0.5\n\n unet=2 \n") == {"unet.up_blocks.1": 0.5, "unet": 2.0}
    assert parse_blocks("") == {}


@pytest.mark.parametrize("text", ["unet", "unet = many", "= 1", "unet = -1", "unet = nan"])
def test_a_line_of_another_form_is_refused(text):
    with pytest.raises(ConfigError):
        parse_blocks(text)
