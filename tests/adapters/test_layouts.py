import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from support.pipelines import fresh, needs_metadata

from t2i_spo_plugin.adapters import canonical, read_adapter
from t2i_spo_plugin.adapters.architecture import weight_shapes
from t2i_spo_plugin.adapters.layouts import decode, encode, kohya
from t2i_spo_plugin.errors import AdapterError


SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def trained(model, **config):
    """A PEFT LoRA with random weights on both sides, and the weight changes it makes, by module."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v", "conv1"]} | config
    model.add_adapter(LoraConfig(**config))
    changes = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            changes[f"unet.{path}"] = module.get_delta_weight("default")
    return changes


@pytest.mark.parametrize("config", [{"cross_attention_dim": 768}, SDXL], ids=["sd1", "sdxl"])
def test_every_layer_of_a_full_size_unet_survives_kohya_names(config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = [f"unet.{path}" for path in weight_shapes(unet)]
    assert len(names) > 250
    assert [kohya.unflatten(kohya.flatten(name, False)) for name in names] == names


def test_every_layer_of_a_text_encoder_survives_kohya_names():
    encoder = fresh("sd1").text_encoder
    names = [canonical(f"text_encoder.{path}") for path in weight_shapes(encoder)]
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in names) and len(names) == 12
    for two in (False, True):
        assert [kohya.unflatten(kohya.flatten(name, two)) for name in names] == names
    assert kohya.unflatten(kohya.flatten("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", True)).startswith(
        "text_encoder_2."
    )


@pytest.mark.parametrize(
    ("ldm", "diffusers"),
    [
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_2_0_emb_layers_1", "down_blocks.0.resnets.1.time_emb_proj"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", TO_Q.removeprefix("unet.")),
        ("input_blocks_8_1_proj_in", "down_blocks.2.attentions.1.proj_in"),
        ("middle_block_0_out_layers_3", "mid_block.resnets.0.conv2"),
        ("middle_block_1_transformer_blocks_9_ff_net_2", "mid_block.attentions.0.transformer_blocks.9.ff.net.2"),
        ("output_blocks_0_1_proj_out", "up_blocks.0.attentions.0.proj_out"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_5_0_skip_connection", "up_blocks.1.resnets.2.conv_shortcut"),
    ],
)
def test_ldm_block_names_of_sdxl_files_are_translated(ldm, diffusers):
    assert kohya.unflatten(f"lora_unet_{ldm}") == f"unet.{diffusers}"


def test_an_unknown_ldm_name_is_refused():
    with pytest.raises(AdapterError, match="no module of a diffusers UNet"):
        kohya.unflatten("lora_unet_input_blocks_1_0_something_else")


@needs_metadata
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"attn1.to_q": 32, r"^down_blocks.*\.to_v": 1}},
        {"rank_pattern": {"to_v": 2}},
    ],
    ids=["plain", "rslora", "alpha_pattern", "rank_pattern"],
)
def test_what_diffusers_saves_is_read_with_its_alpha(config, tmp_path):
    pipe = fresh("sd1")
    changes = trained(pipe.unet, **config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    modules = read_adapter(tmp_path).modules
    assert modules.keys() == changes.keys()
    for name, change in changes.items():
        assert torch.allclose(modules[name].delta(), change, atol=1e-4), name


def test_what_diffusers_saves_without_metadata_has_alpha_equal_to_rank(tmp_path):
    pipe = fresh("sdxl")
    changes = trained(pipe.unet, lora_alpha=4)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    modules = read_adapter(tmp_path).modules
    assert all(torch.allclose(modules[name].delta(), change, atol=1e-4) for name, change in changes.items())


def test_a_peft_folder_is_read_with_its_configuration(tmp_path):
    unet = fresh("sd1").unet
    model = get_peft_model(unet, LoraConfig(r=2, lora_alpha=5, target_modules=["to_k"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    modules = read_adapter(tmp_path).modules
    for path, module in unet.named_modules():
        if hasattr(module, "lora_A"):
            assert torch.allclose(modules[f"unet.{path}"].delta(), module.get_delta_weight("default"), atol=1e-5)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="adapter_config.json, which is not beside the file"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "suffixes",
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_down.weight", ".lora_up.weight"),
    ],
)
def test_every_spelling_of_the_matrices_is_read(suffixes):
    down, up = torch.randn(2, 3), torch.randn(4, 2)
    modules = decode({TO_Q + suffixes[0]: down, TO_Q + suffixes[1]: up}, {})
    assert torch.equal(modules[TO_Q].down, down) and torch.equal(modules[TO_Q].up, up) and modules[TO_Q].alpha == 2


def test_attention_processors_of_2023_are_read():
    attention = TO_Q.removesuffix(".to_q")
    tensors = {f"{attention}.processor.to_out_lora.{role}.weight": torch.ones(2, 2) for role in ("down", "up")}
    assert list(decode(tensors, {})) == [f"{attention}.to_out.0"]


@pytest.mark.parametrize("architecture", ["stable-diffusion-v1", "stable-diffusion-xl-v1-base", "stable-diffusion-3"])
def test_encoding_and_decoding_keep_every_change(architecture):
    names = [TO_Q, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    tensors = {f"{name}.lora_{role}.weight": torch.randn(2, 2) for name in names for role in "AB"}
    original = decode(tensors | {f"{name}.alpha": torch.tensor(3.0) for name in names}, {})
    back = decode(encode(original, architecture), {})
    assert back.keys() == original.keys()
    assert all(torch.allclose(back[name].delta(), original[name].delta()) for name in names)


A, B = torch.randn(2, 3), torch.randn(4, 2)
FLAT = kohya.flatten(TO_Q, False)
CLIP = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
BARE = CLIP.replace("text_model.", "")


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        ({}, {}, "no weights"),
        ({"lora_unet_x.hada_w1_a": A}, {}, "LoHa"),
        ({f"{TO_Q}.lora_magnitude_vector": A}, {}, "DoRA"),
        ({"double_blocks.0.lora_A.weight": A}, {}, "layout is not known"),
        ({f"{FLAT}.lora_down.weight": A}, {}, "has only down"),
        ({f"{FLAT}.alpha": torch.tensor(1.0)}, {}, "has only alpha"),
        ({f"{FLAT}.alpha": torch.ones(2)}, {}, "must be one number"),
        ({f"{CLIP}.alpha": torch.tensor(1.0), f"{BARE}.alpha": torch.tensor(2.0)}, {}, "two tensors are the alpha of"),
        ({f"{CLIP}.lora_A.weight": A, f"{BARE}.lora_A.weight": A}, {}, "two tensors are the down of"),
        ({f"{FLAT}.diff": A}, {}, "not a plain LoRA weight"),
        ({f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": A}, {}, "do not fit"),
        ({f"{TO_Q}.lora_A.weight": A, f"{TO_Q}.lora_B.bias": B}, {}, "not a plain LoRA weight"),
        ({f"{TO_Q}.lora_A.weight": A}, {"lora_adapter_metadata": "{"}, "not JSON"),
        (
            {f"{TO_Q}.lora_A.weight": A, f"{TO_Q}.lora_B.weight": B},
            {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "eight"})},
            "alpha must be a number",
        ),
        (
            {f"{TO_Q}.lora_A.weight": A, f"{TO_Q}.lora_B.weight": B},
            {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})},
            "DoRA",
        ),
    ],
)
def test_decoding_refuses_what_is_not_understood(tensors, metadata, reason):
    with pytest.raises(AdapterError, match=reason):
        decode(tensors, metadata)


def test_the_kohya_layout_has_no_name_for_a_transformer():
    modules = decode({"transformer.x.lora_A.weight": A, "transformer.x.lora_B.weight": B}, {})
    with pytest.raises(AdapterError, match="no name for the component transformer"):
        encode(modules, "stable-diffusion-v1")
    assert set(encode(modules, "flux-1-dev")) == {"transformer.x.lora_A.weight", "transformer.x.lora_B.weight"}


def test_a_kohya_file_that_diffusers_made_is_read_alike():
    pipe = fresh("sd1")
    changes = trained(pipe.unet, lora_alpha=4)
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(pipe.unet).items()}
    modules = decode(convert_state_dict_to_kohya(state), {})
    assert modules.keys() == changes.keys()
    assert all(torch.allclose(modules[name].delta(), change, atol=1e-4) for name, change in changes.items())
