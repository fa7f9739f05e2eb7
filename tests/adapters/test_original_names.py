"""Files that name modules by a model's own code, flat as sd-scripts or dotted as ComfyUI: no delta changes."""

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import save_file
from support.pipelines import fresh, images, random_adapter

from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.adapters.architecture import weight_shapes
from t2i_spo_plugin.adapters.inspection import inspect_adapter
from t2i_spo_plugin.adapters.layouts import decode
from t2i_spo_plugin.errors import AdapterError, InvalidAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.pipelines.loading import load_spo_lora


RANK, ALPHA = 4, 3.0
SPELLINGS = {
    "kohya": ("lora_unet_", "_", ".lora_down.weight", ".lora_up.weight"),
    "lycoris": ("lycoris_", "_", ".lora_down.weight", ".lora_up.weight"),
    "comfy": ("diffusion_model.", ".", ".lora_A.weight", ".lora_B.weight"),
    "comfy down and up": ("diffusion_model.", ".", ".lora_down.weight", ".lora_up.weight"),
    "bare": ("", ".", ".lora_A.weight", ".lora_B.weight"),
}


def flux_modules(width, mlp):
    """Original name -> (in, {diffusers' name: rows}) of the first double and single block and what lies outside."""
    double, single = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
    modules = {}
    for side, qkv, out, mlp_name, norm in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
    ):
        block = f"double_blocks.0.{side}"
        modules[f"{block}_attn.qkv"] = (width, {f"{double}.attn.{name}": width for name in qkv})
        modules[f"{block}_attn.proj"] = (width, {f"{double}.attn.{out}": width})
        modules[f"{block}_mlp.0"] = (width, {f"{double}.{mlp_name}.net.0.proj": mlp})
        modules[f"{block}_mlp.2"] = (mlp, {f"{double}.{mlp_name}.net.2": width})
        modules[f"{block}_mod.lin"] = (width, {f"{double}.{norm}.linear": 6 * width})
    heads = {f"{single}.attn.{name}": width for name in ("to_q", "to_k", "to_v")}
    modules["single_blocks.0.linear1"] = (width, heads | {f"{single}.proj_mlp": mlp})
    modules["single_blocks.0.linear2"] = (width + mlp, {f"{single}.proj_out": width})
    modules["single_blocks.0.modulation.lin"] = (width, {f"{single}.norm.linear": 3 * width})
    return modules


def outside(width, image, text, pooled, time=256):
    """The same outside of the blocks, and the layer whose halves are swapped."""
    embed = "transformer.time_text_embed"
    return {
        "img_in": (image, {"transformer.x_embedder": width}),
        "txt_in": (text, {"transformer.context_embedder": width}),
        "time_in.in_layer": (time, {f"{embed}.timestep_embedder.linear_1": width}),
        "time_in.out_layer": (width, {f"{embed}.timestep_embedder.linear_2": width}),
        "vector_in.in_layer": (pooled, {f"{embed}.text_embedder.linear_1": width}),
        "vector_in.out_layer": (width, {f"{embed}.text_embedder.linear_2": width}),
        "guidance_in.in_layer": (time, {f"{embed}.guidance_embedder.linear_1": width}),
        "guidance_in.out_layer": (width, {f"{embed}.guidance_embedder.linear_2": width}),
        "final_layer.linear": (width, {"transformer.proj_out": image}),
        "final_layer.adaLN_modulation.1": (width, {"transformer.norm_out.linear": 2 * width}),
    }


TINY = flux_modules(32, 128) | outside(32, 16, 32, 32)


def random_matrices(modules):
    """A down and an up matrix for every original name."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(RANK, inner, generator=generator) * 0.3,
            torch.randn(sum(parts.values()), RANK, generator=generator) * 0.3,
        )
        for name, (inner, parts) in modules.items()
    }


def tensors_of(modules, spelling):
    """The tensors of a file."""
    prefix, dot, down_name, up_name = SPELLINGS[spelling]
    tensors = {}
    for name, (down, up) in random_matrices(modules).items():
        key = prefix + name.replace(".", dot)
        tensors |= {key + down_name: down, key + up_name: up, f"{key}.alpha": torch.tensor(ALPHA)}
    return tensors


def random_file(modules, spelling):
    """The tensors of a file, and by diffusers' names the change of every weight as the original layer has it."""
    changes = {}
    for name, (down, up) in random_matrices(modules).items():
        parts = modules[name][1]
        rows = (ALPHA / RANK * (up.double() @ down.double())).split(list(parts.values()))
        changes |= dict(zip(parts, rows, strict=True))
    if "transformer.norm_out.linear" in changes:
        shift, scale = changes["transformer.norm_out.linear"].chunk(2)
        changes["transformer.norm_out.linear"] = torch.cat([scale, shift])
    return tensors_of(modules, spelling), changes


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_module_of_flux_is_read_exactly(spelling, tmp_path):
    pipe = fresh("flux")
    tensors, changes = random_file(TINY, spelling)
    shapes = weight_shapes(pipe.transformer)
    assert {name: tuple(change.shape) for name, change in changes.items()} == {
        f"transformer.{path}": shape for path, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": "flux-1-dev/lora"})
    back = read_adapter(tmp_path / "a.safetensors").modules
    assert back.keys() == changes.keys()
    for name, change in changes.items():
        assert torch.allclose(back[name].delta().double(), change, rtol=0, atol=1e-6), name
    assert load_spo_lora(pipe, tmp_path / "a.safetensors").modules == len(changes)
    layout = "kohya" if spelling in ("kohya", "lycoris") else "original"
    assert inspect_adapter(tmp_path / "a.safetensors").layout == layout


def test_flux_generates_with_the_file_what_it_generates_with_the_changes_in_its_weights(tmp_path):
    pipe, changed = fresh("flux"), fresh("flux")
    without = images(pipe)
    tensors, changes = random_file(TINY, "comfy")
    save_file(tensors, tmp_path / "a.safetensors")
    load_spo_lora(pipe, tmp_path / "a.safetensors")
    with torch.no_grad():
        for name, change in changes.items():
            changed.transformer.get_submodule(name.partition(".")[2]).weight.add_(change.float())
    assert torch.allclose(images(pipe), images(changed), atol=1e-3)
    assert not torch.allclose(images(pipe), without, atol=1e-2)


def test_diffusers_reads_sd_scripts_flux_files_alike_at_full_size():
    tensors = tensors_of(flux_modules(3072, 12288), "kohya")
    theirs = _convert_kohya_flux_lora_to_diffusers({key: tensor.clone() for key, tensor in tensors.items()})
    ours = decode(tensors, {})
    assert {f"{name}.lora_A.weight" for name in ours} == {key for key in theirs if "lora_A" in key}
    for name, pair in ours.items():
        probe = torch.randn(pair.down.shape[1], generator=torch.Generator().manual_seed(1))
        expected = theirs[f"{name}.lora_B.weight"] @ (theirs[f"{name}.lora_A.weight"] @ probe)
        assert torch.allclose(pair.scale * (pair.up @ (pair.down @ probe)), expected, rtol=1e-4, atol=1e-4), name


def test_layers_of_a_fused_one_share_no_memory():
    tensors, _ = random_file(flux_modules(32, 128), "kohya")
    matrices = [matrix for pair in decode(tensors, {}).values() for matrix in (pair.down, pair.up)]
    assert len({matrix.untyped_storage().data_ptr() for matrix in matrices}) == len(matrices)


def test_clip_beside_flux_is_read_under_every_name(tmp_path):
    pipe = fresh("flux")
    modules = random_adapter(pipe, alpha=ALPHA, components=("transformer", "text_encoder")).modules
    for transformer, encoder, dot in (
        ("lora_transformer_", "lora_te1_", "_"),
        ("lora_transformer_", "lora_te_", "_"),
        ("transformer.", "text_encoder.", "."),
    ):
        tensors = {}
        for name, pair in modules.items():
            component, _, path = name.partition(".")
            key = (encoder if component == "text_encoder" else transformer) + path.replace(".", dot)
            tensors |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        back = decode(tensors, {})
        assert back.keys() == modules.keys()
        assert all(torch.equal(back[name].delta(), pair.delta()) for name, pair in modules.items())
    clip = {f"{ENCODERS[name]}.{CLIP}": f"{name}.{CLIP}" for name in ENCODERS}
    for theirs, name in clip.items():
        tensors = {f"{theirs}.lora_A.weight": torch.ones(2, 8), f"{theirs}.lora_B.weight": torch.ones(8, 2)}
        assert list(decode(tensors, {})) == [name]


CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
ENCODERS = {
    "text_encoder": "text_encoders.clip_l.transformer",
    "text_encoder_2": "text_encoders.clip_g.transformer",
}
UNET = {
    "input_blocks.0.0": "conv_in",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks.4.0.in_layers.2": "down_blocks.1.resnets.0.conv1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "output_blocks.3.1.transformer_blocks.0.ff.net.2": "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    "output_blocks.8.0.skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "out.2": "conv_out",
}


def test_a_unet_is_read_as_comfyui_names_it():
    tensors = {}
    for name in UNET:
        tensors |= {
            f"diffusion_model.{name}.lora_A.weight": torch.ones(2, 8),
            f"diffusion_model.{name}.lora_B.weight": torch.ones(8, 2),
        }
    assert decode(tensors, {}).keys() == {f"unet.{name}" for name in UNET.values()}


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("double_blocks.0.img_attn.qkv", 95, "no 3 layers side by side"),
        ("single_blocks.0.linear1", 96, "no 4 layers side by side"),
        ("final_layer.adaLN_modulation.1", 33, "no shift and scale"),
        ("double_blocks.0.img_attn.norm", 32, "names no module of a model whose own names are known"),
    ],
)
def test_fused_layers_of_other_sizes_are_refused(name, rows, reason):
    key = f"diffusion_model.{name}"
    with pytest.raises(AdapterError, match=reason):
        decode({f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(rows, 2)}, {})


def test_a_module_under_an_original_and_a_diffusers_name_is_refused():
    def matrices(name, rows):
        return {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(rows, 2)}

    both = matrices("lora_unet_double_blocks_0_img_attn_qkv", 96)
    both |= matrices("lora_transformer_transformer_blocks_0_attn_to_q", 32)
    with pytest.raises(InvalidAdapterError, match="transformer_blocks.0.attn.to_q is changed twice"):
        decode(both, {})


def test_t5_is_left_out_when_not_strict_and_the_rest_is_exact(tmp_path):
    tensors, changes = random_file(flux_modules(32, 128), "kohya")
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    more = {f"{t5}.lora_down.weight": torch.ones(2, 32), f"{t5}.lora_up.weight": torch.ones(32, 2)}
    save_file(tensors | more | {f"{t5}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(
        UnsupportedAdapterError, match="3 of 42 tensors do.* can load no LoRA; without strict, the rest is read"
    ):
        read_adapter(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="T5 text encoder"):
        back = read_adapter(tmp_path / "a.safetensors", strict=False)
    assert back.modules.keys() == changes.keys()
    assert "T5 text encoder" in inspect_adapter(tmp_path / "a.safetensors").warnings[0]
