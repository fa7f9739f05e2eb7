"""What a strength may be, and which one a module has when they differ by block."""

import pytest

from t2i_spo_plugin.adapters.strengths import by_block, check_blocks, check_strength, check_strengths, factor_at
from t2i_spo_plugin.errors import ConfigError


@pytest.mark.parametrize("strength", [-0.1, -1, float("nan"), float("inf"), True, "1", None])
def test_a_strength_must_be_a_number_of_at_least_0(strength):
    with pytest.raises(ConfigError, match="strength must be"):
        check_strength(strength)


@pytest.mark.parametrize("strength", [0, 0.0, 1, 2.5])
def test_a_strength_of_at_least_0_is_accepted(strength):
    assert check_strength(strength) == strength and isinstance(check_strength(strength), float)


PATHS = (
    "unet.down_blocks.1.attentions.0.to_q",
    "unet.down_blocks.10.attentions.0.to_q",
    "unet.mid_block.attentions.0.to_q",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
)


def test_the_longest_block_that_holds_a_module_counts():
    blocks = {"unet": 0.5, "unet.down_blocks": 0.25, "unet.down_blocks.1": 2.0, PATHS[0]: 3.0}
    assert [factor_at(path, blocks) for path in PATHS] == [3.0, 0.25, 0.5, 1.0]
    del blocks[PATHS[0]]
    assert factor_at(PATHS[0], blocks) == 2.0


def test_strengths_by_block_are_checked_one_by_one():
    assert check_strengths(0.5) == (0.5, {})
    assert check_strengths({"unet": 2, "text_encoder": 0.0}) == (1.0, {"unet": 2.0, "text_encoder": 0.0})
    for strengths, words in (
        ({"unet": -1.0}, "at least 0, got -1.0"),
        ({"": 1.0}, "names such as"),
        ({3: 1.0}, "got 3"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_strengths(strengths)


def test_a_block_that_holds_no_module_is_refused_with_those_that_do():
    check_blocks(["unet", "unet.down_blocks.1", PATHS[3]], PATHS)
    with pytest.raises(ConfigError) as caught:
        check_blocks(["unet", "unet.down", "unet.up_blocks"], PATHS)
    assert "no block called 'unet.down', 'unet.up_blocks'; it changes" in str(caught.value)
    assert str(caught.value).endswith(
        "text_encoder, text_encoder.text_model, unet, unet.down_blocks, unet.down_blocks.1, unet.down_blocks.10, "
        "unet.mid_block"
    )


def test_equal_strengths_are_written_with_the_fewest_blocks():
    strengths = dict(zip(PATHS, (0.5, 0.5, 0.5, 2.0), strict=True))
    assert by_block(strengths) == {"unet": 0.5, "text_encoder": 2.0}
    strengths |= {PATHS[2]: 1.0}
    assert by_block(strengths) == {"unet.down_blocks": 0.5, "unet.mid_block": 1.0, "text_encoder": 2.0}
    assert all(factor_at(path, by_block(strengths)) == strength for path, strength in strengths.items())
