"""Files as other programs write them, in every storage type: no weight change differs by more than 1e-6."""

import json
import time

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from support.pipelines import denoiser, fresh, random_adapter

from t2i_spo_plugin.adapters import LoraPair, canonical, read_adapter
from t2i_spo_plugin.adapters.architecture import weight_shapes
from t2i_spo_plugin.adapters.inspection import inspect_adapter
from t2i_spo_plugin.adapters.layouts import decode, kohya
from t2i_spo_plugin.adapters.layouts.alphas import configured_alphas
from t2i_spo_plugin.errors import InvalidAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.pipelines.architecture import lora_components
from t2i_spo_plugin.pipelines.loading import load_spo_lora


LAYERS = ("to_q", "to_v", "to_out.0", "q_proj", "out_proj", "fc1", "conv1", "conv_shortcut")
ENCODERS = ("text_encoder", "text_encoder_2")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def pairs(family="sd1", alpha=2.0, components=("unet", *ENCODERS), layers=LAYERS, dtype=torch.float32):
    """Random pairs of linear and convolution layers, by module."""
    return random_adapter(fresh(family), alpha=alpha, components=components, layers=layers, dtype=dtype).modules


def tensors_as(modules, down, up, rename=str):
    tensors = {rename(name) + down: pair.down for name, pair in modules.items()}
    return tensors | {rename(name) + up: pair.up for name, pair in modules.items()}


def with_alphas(tensors, modules, rename=str):
    return tensors | {f"{rename(name)}.alpha": torch.tensor(pair.alpha) for name, pair in modules.items()}


def assert_read_as(modules, tensors, path, metadata=None):
    save_file(tensors, path, metadata)
    back = read_adapter(path).modules
    assert back.keys() == modules.keys()
    for name, pair in modules.items():
        assert torch.allclose(back[name].delta(), pair.delta(), rtol=0, atol=1e-6), name


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("alpha", [3.0, None])
def test_reading_kohya_files_with_and_without_alpha_with_one_text_encoder_and_two(alpha, family, file):
    modules = pairs(family, alpha or 4.0)
    assert {name.partition(".")[0] for name in modules} == {"unet", *ENCODERS[: 2 if family == "sdxl" else 1]}

    def rename(name):
        return kohya.flatten(name, two_text_encoders=family == "sdxl")

    tensors = tensors_as(modules, ".lora_down.weight", ".lora_up.weight", rename)
    assert_read_as(modules, with_alphas(tensors, modules, rename) if alpha else tensors, file)


@pytest.mark.parametrize(
    ("down", "up"), [(".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")]
)
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_reading_every_spelling_of_diffusers(family, down, up, file):
    modules = pairs(family, 4.0, ("unet", "transformer", *ENCODERS))
    assert_read_as(modules, tensors_as(modules, down, up), file)
    scaled = pairs(family, 3.0, ("unet", "transformer", *ENCODERS))
    assert_read_as(scaled, with_alphas(tensors_as(scaled, down, up), scaled), file)


def test_diffusers_metadata_names_each_components_alpha(file):
    unet, encoder = pairs(alpha=3.0, components=("unet",)), pairs(alpha=5.0, components=ENCODERS)
    tensors = tensors_as(unet | encoder, ".lora_A.weight", ".lora_B.weight")
    config = {"unet.lora_alpha": 3, "text_encoder.lora_alpha": 7, "text_encoder.alpha_pattern": {"fc1": 5}}
    expected = {
        name: pair if name.endswith("fc1") else LoraPair(pair.down, pair.up, 7.0) for name, pair in encoder.items()
    }
    assert_read_as(unet | expected, tensors, file, {"lora_adapter_metadata": json.dumps(config)})


def test_reading_text_encoders_as_diffusers_wrote_them_in_2023(file):
    encoder = pairs(alpha=4.0, components=ENCODERS, layers=("q_proj", "k_proj", "v_proj", "out_proj"))
    linear = tensors_as(encoder, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    assert (
        linear.keys()
        == convert_state_dict_to_diffusers(tensors_as(encoder, ".lora_A.weight", ".lora_B.weight")).keys()
    )
    assert_read_as(encoder, linear, file)
    oldest = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

    def rename(name):
        path, _, last = name.rpartition(".")
        return f"{path}.{oldest[last]}"

    assert_read_as(encoder, tensors_as(encoder, "_lora.down.weight", "_lora.up.weight", rename), file)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_reading_attention_processors_of_2023(prefix, file):
    modules = pairs(alpha=4.0, components=("unet",), layers=ATTENTION)

    def rename(name):
        path, _, last = name.removeprefix("unet.").replace(".to_out.0", ".to_out").rpartition(".")
        return f"{prefix}{path}.processor.{last}"

    tensors = tensors_as(modules, "_lora.down.weight", "_lora.up.weight", rename)
    theirs = convert_unet_state_dict_to_peft({key.removeprefix("unet."): t for key, t in tensors.items()})
    ours = tensors_as(modules, ".lora_A.weight", ".lora_B.weight")
    assert {f"unet.{key}" for key in theirs} == set(ours)
    assert_read_as(modules, tensors, file)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rank_pattern": {"to_v": 2, "conv1": 3}},
        {"alpha_pattern": {"attn1.to_q": 32, r"^up_blocks.*\.to_v": 1, "to_v": 5}},
        {"rank_pattern": {"to_q": 1}, "alpha_pattern": {"to_q": 9}, "use_rslora": True},
    ],
    ids=["plain", "rank_pattern", "alpha_pattern", "both"],
)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_reading_a_peft_folder_follows_its_configuration(component, config, tmp_path):
    model = getattr(fresh("sd1"), component)
    targets = ["to_q", "to_v", "conv1"] if component == "unet" else ["q_proj", "fc1"]
    options = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False} | config
    wrapped = get_peft_model(model, LoraConfig(**options))
    wrapped.save_pretrained(tmp_path)
    modules = read_adapter(tmp_path).modules
    changes = {
        canonical(f"{component}.{path}"): layer.get_delta_weight("default")
        for path, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert modules.keys() == changes.keys() and get_peft_model_state_dict(wrapped)
    for name, change in changes.items():
        assert torch.allclose(modules[name].delta(), change, rtol=1e-6, atol=1e-6), name


def test_alpha_patterns_match_as_in_peft():
    paths = {path: 4 for path in weight_shapes(fresh("sd1").unet)}
    patterns = [
        "attn1.to_q",
        "to_q",
        r"^down_blocks.*\.to_k",
        "conv1",
        ".*resnets.1.*",
        "mid_block.*to_v",
        "^conv_in$",
    ]
    patterns += ["attentions.0.*attn2.*to_out.0", "block", "ff.net.*", r"up_blocks\.0.*conv2"]
    for order in (patterns, patterns[::-1]):
        config = {"alpha_pattern": {pattern: 10.0 + n for n, pattern in enumerate(order)}, "lora_alpha": 1}
        alphas = configured_alphas(paths, config)
        expected = {path: config["alpha_pattern"].get(get_pattern_key(order, path), 1.0) for path in paths}
        assert alphas == expected and len(set(alphas.values())) > 8


def test_a_thousand_alpha_patterns_for_a_thousand_modules_take_no_time():
    paths = {f"blocks.{n}.attn.to_q": 4 for n in range(1000)}
    start = time.process_time()
    alphas = configured_alphas(paths, {"alpha_pattern": {f"^blocks.{n}.attn.to_q": n + 1 for n in range(1000)}})
    assert list(alphas.values()) == [n + 1.0 for n in range(1000)] and time.process_time() - start < 0.5
    many = {f"blocks.{n}.*.to_q": 1 for n in range(1000)}
    with pytest.raises(UnsupportedAdapterError, match="1000 entries with a wildcard"):
        configured_alphas(paths, {"alpha_pattern": many})
    with pytest.raises(InvalidAdapterError, match="too large"):
        configured_alphas(paths, {"lora_alpha": 10**400})


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_reading_lycoris_locon_with_its_own_prefix(family, file):
    pipe = fresh(family)
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    layers = tuple(path for path in weight_shapes(denoiser(pipe)))
    modules = pairs(family, 2.0, (component,), layers)
    assert len(modules) == len(layers)

    def rename(name):
        return "lycoris_" + name.removeprefix(f"{component}.").replace(".", "_")

    tensors = with_alphas(tensors_as(modules, ".lora_down.weight", ".lora_up.weight", rename), modules, rename)
    assert_read_as(modules, tensors, file)
    assert load_spo_lora(pipe, file).modules == len(modules)


@pytest.mark.parametrize(
    ("ldm", "diffusers"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("out_2", "conv_out"),
        ("time_embed_0", "time_embedding.linear_1"),
        ("label_emb_0_2", "add_embedding.linear_2"),
    ],
)
def test_ldm_names_outside_of_the_blocks_are_translated(ldm, diffusers):
    assert kohya.unflatten(f"lora_unet_{ldm}") == f"unet.{diffusers}"


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_every_storage_type_keeps_its_values(dtype, file):
    modules = pairs(alpha=2.0, components=("unet",))
    narrow = {name: LoraPair(pair.down.to(dtype), pair.up.to(dtype), 2.0) for name, pair in modules.items()}
    tensors = with_alphas(tensors_as(narrow, ".lora_down.weight", ".lora_up.weight", flat), narrow, flat)
    assert_read_as(narrow, tensors, file)
    back = read_adapter(file).modules
    assert {pair.down.dtype for pair in back.values()} == {torch.float16 if dtype.itemsize == 1 else dtype}
    pipe = fresh("sd1")
    load_spo_lora(pipe, file)
    assert all(torch.isfinite(weight).all() for weight in lora_components(pipe)["unet"].parameters())


def flat(name):
    return kohya.flatten(name, False)


def eight_bit(modules, dtype, scale):
    """Halves as 8-bit floats beside their scales, in tensors, and what they are worth."""
    tensors, worth = {}, {}
    for number, (name, pair) in enumerate(modules.items()):
        for role, weight in (("lora_down", pair.down), ("lora_up", pair.up)):
            key = f"{flat(name)}.{role}"
            rows = (weight.shape[0], *(1,) * (weight.ndim - 1)) if number % 2 else ()
            factor = torch.rand(rows, generator=torch.Generator().manual_seed(number)) * 0.01 + 1e-3
            narrow = (weight / factor / 10).to(dtype)
            tensors |= {f"{key}.weight": narrow, f"{key}.{scale}": factor}
            worth[key] = narrow.double() * factor.double()
    exact = {name: LoraPair(worth[f"{flat(name)}.lora_down"], worth[f"{flat(name)}.lora_up"], 2.0) for name in modules}
    return with_alphas(tensors, modules, flat), exact


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_8_bit_floats_are_multiplied_by_the_scale_beside_them(dtype, scale, file):
    tensors, exact = eight_bit(pairs(layers=("to_q", "conv1"), components=("unet",)), dtype, scale)
    mark = {"scaled_fp8": torch.empty(0, dtype=dtype)} if scale == "scale_weight" else {}
    assert_read_as(exact, tensors | mark, file)
    back = read_adapter(file).modules
    assert {matrix.dtype for pair in back.values() for matrix in (pair.down, pair.up)} == {torch.float32}
    for name, pair in back.items():
        assert torch.equal(pair.down, exact[name].down.float()) and torch.equal(pair.up, exact[name].up.float())
    assert inspect_adapter(file).loads and inspect_adapter(file).dtypes == ["float32"]


def test_a_scale_beside_other_weights_is_foreign(file):
    tensors, _ = eight_bit(pairs(layers=("to_q",), components=("unet",)), torch.float8_e4m3fn, "weight_scale")
    plain = {key: tensor.half() if tensor.dtype.itemsize == 1 else tensor for key, tensor in tensors.items()}
    save_file(plain, file)
    with pytest.raises(UnsupportedAdapterError, match=r"16 of 40 tensors are not"):
        read_adapter(file)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float16_holds_every_8_bit_float(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(every.half().float().nan_to_num(), every.float().nan_to_num())


def test_an_up_matrix_with_a_kernel_is_refused():
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 3, 1, 1),
        "unet.conv_in.lora_B.weight": torch.ones(4, 2, 3, 3),
    }
    with pytest.raises(InvalidAdapterError, match="do not fit"):
        decode(tensors, {})
