"""Alphas wherever a file states them, and statements that contradict each other."""

import json

import pytest
import torch
from safetensors.torch import save_file

from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.adapters.inspection import as_lines, inspect_adapter
from t2i_spo_plugin.errors import InvalidAdapterError, UnsupportedAdapterError


RANK = 16
PATH = "transformer_blocks.0.attn.to_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
NAMES = {
    "native": (f"transformer.{PATH}", "lora_A", "lora_B"),
    "kohya": (KOHYA, "lora_down", "lora_up"),
    "peft": (f"base_model.model.{PATH}", "lora_A", "lora_B"),
}
HEADERS = [
    {"ss_network_alpha": "8.0", "ss_network_dim": "16"},
    {"lora_alpha": "8", "r": "16"},
    {"transformer.lora_alpha": "8", "transformer.r": "16"},
    {"unet.lora_alpha": "8", "transformer.lora_alpha": "8"},
    {"network_alpha": "8", "rank": "16"},
    {"alpha": "8"},
    {"lora_adapter_metadata": json.dumps({"lora_alpha": 8, "r": 16})},
]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.safetensors"


def matrices(layout="native", rank=RANK, size=40, alpha=None):
    name, down, up = NAMES[layout]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{down}.weight": torch.randn(rank, size, generator=generator),
        f"{name}.{up}.weight": torch.randn(size, rank, generator=generator),
    }
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}


def alpha_of(file):
    (pair,) = read_adapter(file).modules.values()
    return pair.alpha


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("header", HEADERS, ids=lambda header: next(iter(header)))
def test_an_alpha_in_the_header_is_read_whatever_its_spelling(header, layout, file):
    if layout == "kohya":
        header = {key.replace("transformer.", "unet."): value for key, value in header.items()}
    tensors = matrices(layout)
    save_file(tensors, file, header)
    (pair,) = read_adapter(file).modules.values()
    down, up = tensors.values()
    assert torch.allclose(pair.delta(), 0.5 * up @ down, atol=1e-5)
    inspection = inspect_adapter(file)
    assert inspection.alphas == [8.0] and "in the header" in as_lines(inspection)["alpha from"]


def test_the_headers_alpha_is_of_the_component_that_it_names(file):
    encoder = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.{end}.weight": torch.ones(shape)
        for end, shape in (("lora_A", (RANK, 24)), ("lora_B", (24, RANK)))
    }
    save_file(matrices() | encoder, file, {"transformer.lora_alpha": "8", "text_encoder.lora_alpha": "4"})
    modules = read_adapter(file).modules
    assert {name.partition(".")[0]: pair.alpha for name, pair in modules.items()} == {
        "transformer": 8.0,
        "text_encoder": 4.0,
    }


def test_the_headers_alpha_is_that_of_modules_without_their_own(file):
    other = {key.replace("to_q", "to_k"): tensor for key, tensor in matrices().items()}
    save_file(matrices(alpha=8.0) | other, file, {"lora_alpha": "8"})
    assert {pair.alpha for pair in read_adapter(file).modules.values()} == {8.0}


@pytest.mark.parametrize("value", ["Dynamic", "None", ""])
def test_a_header_that_states_no_number_leaves_the_rank(value, file):
    save_file(matrices(), file, {"ss_network_alpha": value, "ss_network_dim": value})
    assert alpha_of(file) == RANK
    assert inspect_adapter(file).alpha_from.startswith("nowhere")


def test_a_kohya_header_over_a_converted_file_is_not_applied_again(file):
    # The converters of sd-scripts and musubi fold alpha into the weights and copy the header.
    save_file(
        matrices(), file, {"ss_network_alpha": "8", "ss_network_dim": "16", "ss_network_module": "networks.lora"}
    )
    adapter = read_adapter(file)
    assert next(iter(adapter.modules.values())).alpha == RANK and "converted" in adapter.notes[0]


@pytest.mark.parametrize(
    ("layout", "header", "alpha", "numbers"),
    [
        ("native", {"lora_alpha": "8", "alpha": "4"}, None, ("8", "4")),
        ("kohya", {"ss_network_alpha": "8"}, 4.0, ("8", "4")),
        ("native", {"transformer.lora_alpha": "8"}, 2.0, ("8", "2")),
        ("native", {"lora_adapter_metadata": '{"transformer.lora_alpha": 8}', "lora_alpha": "2"}, None, ("8", "2")),
        ("native", {"lora_alpha": "8", "r": "32"}, None, ("32", "16")),
        ("native", {"lora_adapter_metadata": '{"transformer.r": 32}'}, None, ("32", "16")),
        ("kohya", {"ss_network_dim": "64"}, 8.0, ("64", "16")),
    ],
)
def test_statements_that_disagree_are_refused_with_both_numbers(layout, header, alpha, numbers, file):
    save_file(matrices(layout, alpha=alpha), file, header)
    with pytest.raises(InvalidAdapterError) as error:
        read_adapter(file)
    assert all(number in str(error.value) for number in numbers)
    inspection = inspect_adapter(file)
    assert not inspection.loads and any("loading refuses" in warning for warning in inspection.warnings)


def test_a_peft_folder_whose_rank_is_not_that_of_the_weights_is_refused(file):
    save_file(matrices("peft"), file)
    (file.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 32}))
    with pytest.raises(InvalidAdapterError, match=r"32 .* rank 16"):
        read_adapter(file)
    (file.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 32, "rank_pattern": {"q": 16}}))
    assert alpha_of(file) == 8.0


def test_modules_may_have_alphas_and_ranks_of_their_own_where_the_header_says_so(file):
    arguments = json.dumps({"conv_dim": "8", "conv_alpha": "1"})
    header = {"ss_network_alpha": "8", "ss_network_dim": "32", "ss_network_args": arguments}
    save_file(matrices("kohya", alpha=1.0), file, header)
    assert alpha_of(file) == 1.0


def test_a_module_narrower_than_the_rank_is_no_contradiction(file):
    save_file(matrices(rank=4, size=4, alpha=8.0), file, {"lora_alpha": "8", "r": "16"})
    assert alpha_of(file) == 8.0


def test_a_flat_header_with_patterns_is_refused(file):
    save_file(matrices(), file, {"lora_alpha": "8", "use_rslora": "true"})
    with pytest.raises(InvalidAdapterError, match="alpha_pattern or use_rslora"):
        read_adapter(file)


def test_an_alpha_that_is_no_number_is_refused(file):
    save_file(matrices(), file, {"lora_alpha": "eight"})
    with pytest.raises(InvalidAdapterError, match="must be a number, got 'eight'"):
        read_adapter(file)


def test_alphas_stated_for_some_modules_only_are_refused(file):
    other = {key.replace("to_q", "to_k"): tensor for key, tensor in matrices().items()}
    save_file(matrices(alpha=8.0) | other, file)
    with pytest.raises(UnsupportedAdapterError, match="only 1 of 2 modules state an alpha"):
        read_adapter(file)
