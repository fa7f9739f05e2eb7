"""What the trainers of a base write, loads: every layout on every base, with the change of every weight exact."""

import copy

import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_lumina2_lora_to_diffusers,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from support.pipelines import fresh, random_adapter
from support.transformers import ARCHITECTURES, base_pipeline

from t2i_spo_plugin.adapters import Adapter, ComfyBase, LoraPair, fit_adapter, read_adapter, write_adapter
from t2i_spo_plugin.adapters.architecture import weight_shapes
from t2i_spo_plugin.adapters.extract import extract_adapter
from t2i_spo_plugin.adapters.inspection import inspect_adapter
from t2i_spo_plugin.adapters.layouts import decode
from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.pipelines.architecture import lora_components
from t2i_spo_plugin.pipelines.loaded import strengths_of
from t2i_spo_plugin.pipelines.loading import (
    adapter_metadata,
    adapter_of,
    load_spo_lora,
    set_spo_strength,
    unload_spo_lora,
)


RANK, ALPHA = 4, 3.0
DOTTED = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
SPELLINGS = {
    "ai-toolkit": ("diffusion_model.", ".", DOTTED, False),
    "ai-toolkit in PEFT's names": ("base_model.model.diffusion_model.", ".", DOTTED, False),
    "ComfyUI with alpha": ("diffusion_model.", ".", KOHYA, True),
    "musubi and sd-scripts": ("lora_unet_", "_", KOHYA, True),
    "LyCORIS": ("lycoris_", "_", KOHYA, True),
    "OneTrainer, flat": ("lora_transformer_", "_", KOHYA, True),
    "bare": ("", ".", DOTTED, False),
    "bare, with PEFT's adapter name": ("", ".", ("lora_A.default.weight", "lora_B.default.weight"), False),
}
IN_DIFFUSERS_NAMES = SPELLINGS | {
    "diffusers, SimpleTuner": ("transformer.", ".", DOTTED, False),
    "OneTrainer, dotted": ("transformer.", ".", KOHYA, True),
}


def block(name, targets):
    """`name` in block 1, and what it is in diffusers."""
    return {name.replace("#", "1"): [target.replace("#", "1") for target in targets.split()]}


def joint(image, text, qkv, out):
    """The attention of double blocks: image and text side by side."""
    names = "transformer_blocks.#.attn."
    return (
        block(f"{image}{qkv}", f"{names}to_q {names}to_k {names}to_v")
        | block(f"{text}{qkv}", f"{names}add_q_proj {names}add_k_proj {names}add_v_proj")
        | block(f"{image}{out}", f"{names}to_out.0")
    )


FLUX = joint("double_blocks.#.img_attn.", "double_blocks.#.txt_attn.", "qkv", "proj")
SINGLE = "single_transformer_blocks.#"
FLUX_1 = (
    FLUX
    | block("double_blocks.#.img_mlp.0", "transformer_blocks.#.ff.net.0.proj")
    | block("double_blocks.#.txt_mlp.2", "transformer_blocks.#.ff_context.net.2")
    | block("single_blocks.#.linear1", f"{SINGLE}.attn.to_q {SINGLE}.attn.to_k {SINGLE}.attn.to_v {SINGLE}.proj_mlp")
    | block("single_blocks.#.linear2", f"{SINGLE}.proj_out")
)
REFINED = (
    block("layers.#.{0}.qkv", "layers.#.{1}.to_q layers.#.{1}.to_k layers.#.{1}.to_v")
    | block("layers.#.{0}.out", "layers.#.{1}.to_out.0")
    | {"noise_refiner.0.{0}.out": ["noise_refiner.0.{1}.to_out.0"]}
)


def refined(inside):
    return {name.format("attention"): [one.format("", inside) for one in found] for name, found in REFINED.items()}


ORIGINAL = {
    "flux-1-dev": {name.replace(".1.", ".0."): [t.replace(".1.", ".0.") for t in ts] for name, ts in FLUX_1.items()},
    "chroma": FLUX_1
    | {"distilled_guidance_layer.layers.0.in_layer": ["distilled_guidance_layer.layers.0.linear_1"]}
    | {"txt_in": ["context_embedder"]},
    "flux-2": FLUX
    | block("double_blocks.#.img_mlp.0", "transformer_blocks.#.ff.linear_in")
    | block("double_blocks.#.txt_mlp.2", "transformer_blocks.#.ff_context.linear_out")
    | block("single_blocks.#.linear1", f"{SINGLE}.attn.to_qkv_mlp_proj")
    | block("single_blocks.#.linear2", f"{SINGLE}.attn.to_out")
    | {"single_stream_modulation.lin": ["single_stream_modulation.linear"], "img_in": ["x_embedder"]}
    | {"time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"]},
    "stable-diffusion-3": {
        name.replace(".1.", ".0."): [target.replace("blocks.1", "blocks.0") for target in targets]
        for name, targets in (
            joint("joint_blocks.#.x_block.attn.", "joint_blocks.#.context_block.attn.", "qkv", "proj")
            | block("joint_blocks.#.x_block.mlp.fc1", "transformer_blocks.#.ff.net.0.proj")
            | block("joint_blocks.#.context_block.mlp.fc2", "transformer_blocks.#.ff_context.net.2")
        ).items()
    }
    | {"joint_blocks.0.context_block.adaLN_modulation.1": ["transformer_blocks.0.norm1_context.linear"]}
    | {"y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"]},
    "zimage": refined("attention")
    | {"layers.1.feed_forward.w2": ["layers.1.feed_forward.w2"]}
    | {"layers.1.adaLN_modulation.0": ["layers.1.adaLN_modulation.0"]}
    | {"final_layer.linear": ["all_final_layer.2-1.linear"]},
    "lumina2": refined("attn")
    | {"layers.1.feed_forward.w2": ["layers.1.feed_forward.linear_2"]}
    | {"layers.1.adaLN_modulation.1": ["layers.1.norm1.linear"]}
    | {"cap_embedder.1": ["time_caption_embed.caption_embedder.1"]},
    "krea2": {
        "blocks.1.attn.wq": ["transformer_blocks.1.attn.to_q"],
        "blocks.1.attn.wk": ["transformer_blocks.1.attn.to_k"],
        "blocks.1.attn.wo": ["transformer_blocks.1.attn.to_out.0"],
        "blocks.1.attn.gate": ["transformer_blocks.1.attn.to_gate"],
        "blocks.1.mlp.gate": ["transformer_blocks.1.ff.gate"],
        "txtfusion.refiner_blocks.0.mlp.down": ["text_fusion.refiner_blocks.0.ff.down"],
        "txtmlp.3": ["txt_in.linear_2"],
        "last.linear": ["final_layer.linear"],
    },
    "cosmos": {
        "blocks.1.self_attn.q_proj": ["transformer_blocks.1.attn1.to_q"],
        "blocks.1.cross_attn.output_proj": ["transformer_blocks.1.attn2.to_out.0"],
        "blocks.1.adaln_modulation_mlp.2": ["transformer_blocks.1.norm3.linear_2"],
        "blocks.1.mlp.layer1": ["transformer_blocks.1.ff.net.0.proj"],
        "final_layer.adaln_modulation.1": ["norm_out.linear_1"],
        "llm_adapter.blocks.0.self_attn.o_proj": ["text_conditioner:blocks.0.self_attn.o_proj"],
        "llm_adapter.blocks.0.mlp.2": ["text_conditioner:blocks.0.mlp.2"],
    },
    "wan": {
        "blocks.1.self_attn.q": ["blocks.1.attn1.to_q"],
        "blocks.1.cross_attn.o": ["blocks.1.attn2.to_out.0"],
        "blocks.1.ffn.0": ["blocks.1.ffn.net.0.proj"],
        "blocks.1.ffn.2": ["blocks.1.ffn.net.2"],
        "time_embedding.2": ["condition_embedder.time_embedder.linear_2"],
        "time_projection.1": ["condition_embedder.time_proj"],
        "head.head": ["proj_out"],
    },
    "ltxvideo": {
        "transformer_blocks.1.attn1.to_q": ["transformer_blocks.1.attn1.to_q"],
        "adaln_single.emb.timestep_embedder.linear_2": ["time_embed.emb.timestep_embedder.linear_2"],
        "patchify_proj": ["proj_in"],
    },
}
"""By architecture: modules as the model's own code names them, and the layers of diffusers they are, side by side."""


def shapes_of(pipe):
    """The weight shapes of linear layers by full name."""
    return {
        f"{component}.{path}": shape
        for component, model in lora_components(pipe).items()
        if not component.startswith("text_encoder")
        for path, shape in weight_shapes(model).items()
        if len(shape) == 2
    }


def full(name):
    return name.replace(":", ".", 1) if ":" in name else f"transformer.{name}"


def random_file(modules, shapes, spelling):
    """The tensors of a file of `modules` (name: layers of diffusers), and the change of every layer."""
    prefix, dot, (down_name, up_name), has_alpha = spelling
    generator = torch.Generator().manual_seed(0)
    tensors, changes = {}, {}
    for name, targets in modules.items():
        sizes = [shapes[full(target)][0] for target in targets]
        down = torch.randn(RANK, shapes[full(targets[0])][1], generator=generator) * 0.3
        up = torch.randn(sum(sizes), RANK, generator=generator) * 0.3
        key = prefix + name.replace(".", dot)
        tensors |= {f"{key}.{down_name}": down, f"{key}.{up_name}": up}
        if has_alpha:
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        whole = (ALPHA / RANK if has_alpha else 1.0) * up @ down
        changes |= dict(zip(map(full, targets), whole.split(sizes), strict=True))
    return tensors, changes


def changes_of(pipe):
    """What the one adapter on `pipe` changes, by full name."""
    found = {}
    for component, model in lora_components(pipe).items():
        for path, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                found[f"{component}.{path}"] = layer.get_delta_weight(layer.active_adapters[0])
    return found


def assert_same(found, expected, what):
    assert found.keys() == expected.keys(), (what, found.keys() ^ expected.keys())
    for name, change in expected.items():
        assert torch.allclose(found[name], change, rtol=1e-4, atol=1e-5), (what, name)


def assert_read(pipe, tensors, changes, path, architecture, what):
    save_file(tensors, path)
    assert load_spo_lora(pipe, path).modules == len(changes)
    assert_same(changes_of(pipe), changes, what)
    unload_spo_lora(pipe)
    inspection = inspect_adapter(path)
    assert inspection.loads and inspection.modules == len(changes), what
    assert architecture in inspection.architectures_by_keys, (what, inspection.architectures_by_keys)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_module_is_read_by_diffusers_names_in_every_layout(architecture, tmp_path):
    pipe = base_pipeline(architecture)
    shapes = shapes_of(pipe)
    modules = {name.removeprefix("transformer."): [name.removeprefix("transformer.")] for name in shapes}
    modules = {name: target for name, target in modules.items() if not name.startswith("text_conditioner.")}
    for what, spelling in IN_DIFFUSERS_NAMES.items():
        tensors, changes = random_file(modules, shapes, spelling)
        assert_read(pipe, tensors, changes, tmp_path / "a.safetensors", architecture, what)


@pytest.mark.parametrize("architecture", ORIGINAL)
def test_the_names_of_the_models_own_code_are_read_in_every_layout(architecture, tmp_path):
    pipe = base_pipeline(architecture)
    for what, spelling in SPELLINGS.items():
        tensors, changes = random_file(ORIGINAL[architecture], shapes_of(pipe), spelling)
        assert_read(pipe, tensors, changes, tmp_path / "a.safetensors", architecture, what)


def own_names(architecture, shapes):
    return {name.removeprefix("transformer."): [name.removeprefix("transformer.")] for name in shapes}


def original_names(architecture, shapes):
    return ORIGINAL[architecture]


IN_DIFFUSERS = [
    *((base, own_names, spelling) for base in ("zimage", "qwen-image") for spelling in list(SPELLINGS)[::2][:2]),
    *((base, own_names, "musubi and sd-scripts") for base in ("zimage", "qwen-image")),
    *((base, own_names, "ai-toolkit") for base in ("hi-dream-image", "ernie-image", "ltxvideo")),
    *((base, original_names, "ai-toolkit") for base in ("flux-2", "krea2", "wan", "cosmos")),
    ("krea2", original_names, "ai-toolkit in PEFT's names"),
]


@pytest.mark.parametrize(("architecture", "names", "spelling"), IN_DIFFUSERS)
def test_diffusers_own_reader_gives_the_same_changes(architecture, names, spelling, tmp_path):
    pipe = base_pipeline(architecture)
    shapes = shapes_of(pipe)
    tensors, _ = random_file(names(architecture, shapes), shapes, SPELLINGS[spelling])
    save_file(tensors, tmp_path / "a.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    modules = read_adapter(tmp_path / "a.safetensors", architecture=architecture).modules
    assert_same({name: pair.delta() for name, pair in modules.items()}, changes_of(pipe), spelling)


@pytest.mark.parametrize("architecture", ["wan", "ltxvideo", "cosmos"])
def test_a_comfyui_model_is_patched_by_the_own_codes_names(architecture):
    pipe = base_pipeline(architecture)
    shapes = shapes_of(pipe)
    targets = {full(targets[0]): name for name, targets in ORIGINAL[architecture].items()}
    modules = {name: LoraPair(torch.ones(2, shapes[name][1]), torch.ones(shapes[name][0], 2), 2.0) for name in targets}
    keys = {f"diffusion_model.{name}": f"diffusion_model.{name}.weight" for name in targets.values()}
    weights = {f"diffusion_model.{theirs}.weight": shapes[name] for name, theirs in targets.items()}
    fit = fit_adapter(Adapter(modules, adapter_metadata(pipe)), ComfyBase(architecture, "", keys, weights, False))
    assert fit.places == {name: f"diffusion_model.{theirs}.weight" for name, theirs in targets.items()}


@pytest.mark.parametrize("architecture", ["wan", "ltxvideo", "cosmos"])
def test_what_we_write_has_the_own_names_that_comfyui_knows_and_diffusers_reads_it(architecture, tmp_path):
    pipe = base_pipeline(architecture)
    layers = ("to_q", "to_out.0", "net.2", "mlp.2", "linear_2")
    adapter = random_adapter(pipe, alpha=ALPHA, components=("transformer", "text_conditioner"), layers=layers)
    if architecture == "ltxvideo":
        adapter.modules.pop("transformer.time_embed.emb.timestep_embedder.linear_2")
    path = write_adapter(adapter, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        names = {key.partition(".lora_")[0].removeprefix("diffusion_model.") for key in file.keys()}  # noqa: SIM118
    originals = {full(targets[0]): name for name, targets in ORIGINAL[architecture].items()}
    shared = originals.keys() & adapter.modules.keys()
    assert len(names) == len(adapter.modules) and shared and {originals[name] for name in shared} <= names
    expected = {name: pair.delta() for name, pair in adapter.modules.items()}
    load_spo_lora(pipe, path)
    assert_same(changes_of(pipe), expected, "ours")
    unload_spo_lora(pipe)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert_same(changes_of(pipe), expected, "diffusers")


def test_both_transformers_of_wan_stay_in_one_native_file(tmp_path):
    pipe = base_pipeline("wan")
    modules = random_adapter(pipe).modules
    both = modules | {name.replace("transformer.", "transformer_2."): pair for name, pair in modules.items()}
    path = write_adapter(Adapter(both, adapter_metadata(pipe)), tmp_path / "a.safetensors")
    assert read_adapter(path).modules.keys() == both.keys()


@pytest.mark.upstream
def test_diffusers_puts_nothing_of_such_a_file_into_the_second_transformer(tmp_path):
    pipe = base_pipeline("wan")
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    both = random_adapter(pipe, components=("transformer", "transformer_2"))
    path = write_adapter(both, tmp_path / "a.safetensors")
    assert {name.partition(".")[0] for name in both.modules} == {"transformer", "transformer_2"}
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert {name.partition(".")[0] for name in changes_of(pipe)} == {"transformer"}
    fresh_pipe = base_pipeline("wan")
    fresh_pipe.register_modules(transformer_2=copy.deepcopy(fresh_pipe.transformer))
    load_spo_lora(fresh_pipe, path)
    assert_same(changes_of(fresh_pipe), {name: pair.delta() for name, pair in both.modules.items()}, "ours")


@pytest.mark.parametrize(
    "architecture", ["zimage", "qwen-image", "flux-2", "chroma", "krea2", "hi-dream-image", "ernie-image"]
)
def test_diffusers_reads_what_we_write_for_the_bases_of_2026(architecture, tmp_path):
    pipe = base_pipeline(architecture)
    adapter = random_adapter(pipe, alpha=ALPHA)
    path = write_adapter(adapter, tmp_path / "a.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert_same(changes_of(pipe), {name: pair.delta() for name, pair in adapter.modules.items()}, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_is_saved_switched_to_0_taken_off_and_extracted_again(architecture, tmp_path):
    pipe = base_pipeline(architecture)
    adapter = random_adapter(pipe, alpha=ALPHA)
    expected = {name: pair.delta() for name, pair in adapter.modules.items()}
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    load_spo_lora(pipe, write_adapter(adapter, tmp_path / "a.safetensors"))
    saved = adapter_of(pipe, "spo").modules
    assert_same({name: pair.delta() for name, pair in saved.items()}, expected, "saved")
    set_spo_strength(pipe, 0.0)
    assert all(not active for active in strengths_of(lora_components(pipe), "spo").values())
    unload_spo_lora(pipe)
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    pipe.transformer.save_pretrained(tmp_path / "base")
    changed = {f"{name.removeprefix('transformer.')}.weight": change for name, change in expected.items()}
    pipe.transformer.load_state_dict({key: weight + changed.get(key, 0.0) for key, weight in before.items()})
    pipe.transformer.save_pretrained(tmp_path / "tuned")
    pipe.transformer.load_state_dict(before)
    files = tmp_path / "base", tmp_path / "tuned"
    extracted = extract_adapter(*files, rank=RANK, component="transformer", architecture=architecture).adapter
    load_spo_lora(pipe, extracted)
    assert changes_of(pipe).keys() == expected.keys()
    for name, change in changes_of(pipe).items():
        assert torch.allclose(change, expected[name], atol=1e-3), name


CHECKPOINTS = {
    "flux-2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "zimage": "convert_z_image_transformer_checkpoint_to_diffusers",
    "krea2": "convert_krea2_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "ltxvideo": "convert_ltx_transformer_checkpoint_to_diffusers",
}


@pytest.mark.parametrize("architecture", CHECKPOINTS)
def test_a_change_goes_where_diffusers_puts_the_weight_of_the_original_checkpoint(architecture):
    convert = getattr(single_file_utils, CHECKPOINTS[architecture], None)
    if convert is None:
        pytest.skip(f"this diffusers has no {CHECKPOINTS[architecture]}")
    modules = dict(ORIGINAL[architecture])
    if architecture == "flux-2":
        modules["final_layer.adaLN_modulation.1"] = ["norm_out.linear"]
    tensors, _ = random_file(modules, shapes_of(base_pipeline(architecture)), SPELLINGS["ai-toolkit"])
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    whole = {
        f"{name.removeprefix('diffusion_model.')}.weight": tensors[f"{name}.lora_B.weight"]
        @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }
    expected = {f"transformer.{key.removesuffix('.weight')}": weight for key, weight in convert(whole).items()}
    found = decode(tensors, {}, architecture=architecture)
    assert_same({name: pair.delta() for name, pair in found.items()}, expected, architecture)


def test_lumina_of_full_size_is_read_as_diffusers_reads_it():
    width, keys, inner = 2304, 768, 9216
    sizes = {"attention.qkv": (width + 2 * keys, width), "attention.out": (width, width)}
    sizes |= {"feed_forward.w1": (inner, width), "feed_forward.w2": (width, inner), "feed_forward.w3": (inner, width)}
    sizes |= {"adaLN_modulation.1": (4 * width, 1024)}
    tensors = {}
    for name, (rows, columns) in sizes.items():
        key = f"diffusion_model.layers.0.{name}"
        tensors |= {f"{key}.lora_A.weight": torch.randn(2, columns), f"{key}.lora_B.weight": torch.randn(rows, 2)}
    theirs = _convert_non_diffusers_lumina2_lora_to_diffusers(dict(tensors))
    ours = decode(tensors, {})
    assert {f"{name}.lora_A.weight" for name in ours} == {key for key in theirs if "lora_A" in key}
    for name, pair in ours.items():
        assert torch.equal(pair.up, theirs[f"{name}.lora_B.weight"]), name
        assert torch.equal(pair.down, theirs[f"{name}.lora_A.weight"]), name


def test_a_file_of_musubi_for_wan_is_read_as_diffusers_reads_it():
    layers = [f"{kind}_attn_{name}" for kind in ("self", "cross") for name in "qkvo"] + ["ffn_0", "ffn_2"]
    tensors = {}
    for layer in layers:
        key = f"lora_unet_blocks_0_{layer}"
        tensors |= {f"{key}.lora_down.weight": torch.randn(4, 8), f"{key}.lora_up.weight": torch.randn(8, 4)}
        tensors[f"{key}.alpha"] = torch.tensor(3.0)
    theirs = _convert_musubi_wan_lora_to_diffusers(dict(tensors))
    ours = decode(tensors, {})
    assert {f"{name}.lora_A.weight" for name in ours} == {key for key in theirs if "lora_A" in key}
    for name, pair in ours.items():
        expected = theirs[f"{name}.lora_B.weight"] @ theirs[f"{name}.lora_A.weight"]
        assert torch.allclose(pair.delta(), expected, atol=1e-5), name


@pytest.mark.parametrize("architecture", ["flux-1-dev", "chroma", "qwen-image", "lumina2", "flux-2"])
def test_projections_that_a_trainer_fused_are_parted(architecture, tmp_path):
    pipe = base_pipeline(architecture)
    attention = "layers.0.attn" if architecture == "lumina2" else "transformer_blocks.0.attn"
    modules = {f"{attention}.to_qkv": [f"{attention}.{name}" for name in ("to_q", "to_k", "to_v")]}
    if architecture != "lumina2":
        added = [f"{attention}.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
        modules[f"{attention}.to_added_qkv"] = added
    for what in ("diffusers, SimpleTuner", "LyCORIS", "ai-toolkit", "bare"):
        tensors, changes = random_file(modules, shapes_of(pipe), IN_DIFFUSERS_NAMES[what])
        assert_read(pipe, tensors, changes, tmp_path / "a.safetensors", architecture, what)


def test_what_save_lora_adapter_writes_is_read_with_its_alpha(tmp_path):
    for pipe, layers in ((base_pipeline("zimage"), ["to_q", "w1"]), (fresh("sd1"), ["to_q", "conv1"])):
        model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        config = {"r": 4, "lora_alpha": 6, "alpha_pattern": {layers[1]: 2}, "init_lora_weights": False}
        model.add_adapter(LoraConfig(target_modules=layers, **config))
        expected = changes_of(pipe)
        model.save_lora_adapter(tmp_path / type(pipe).__name__)
        modules = read_adapter(tmp_path / type(pipe).__name__).modules
        assert_same({name: pair.delta() for name, pair in modules.items()}, expected, type(pipe).__name__)


@pytest.mark.parametrize(("made_for", "put_into"), [("flux-1-dev", "flux-2"), ("flux-2", "flux-1-dev")])
def test_one_flux_is_not_taken_for_the_other(made_for, put_into, tmp_path):
    tensors, _ = random_file(ORIGINAL[made_for], shapes_of(base_pipeline(made_for)), SPELLINGS["ai-toolkit"])
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="another base|lacks"):
        load_spo_lora(base_pipeline(put_into), tmp_path / "a.safetensors")
    assert made_for in inspect_adapter(tmp_path / "a.safetensors").architectures_by_keys
    assert put_into not in inspect_adapter(tmp_path / "a.safetensors").architectures_by_keys


IDEOGRAM = {
    "layers.1.attention.qkv": [f"layers.1.attention.{name}" for name in ("to_q", "to_k", "to_v")],
    "layers.1.attention.o": ["layers.1.attention.to_out.0"],
    "layers.1.feed_forward.w2": ["layers.1.feed_forward.w2"],
    "layers.1.adaln_modulation": ["layers.1.adaln_modulation"],
}


@pytest.mark.parametrize("spelling", ["ai-toolkit", "ComfyUI with alpha"])
def test_names_that_only_the_pipelines_own_reader_knows_are_read_by_it(spelling, tmp_path):
    pipe = base_pipeline("ideogram4")
    for modules in (IDEOGRAM, {name: IDEOGRAM[name] for name in ("layers.1.attention.qkv",)}):
        tensors, changes = random_file(modules, shapes_of(pipe), SPELLINGS[spelling])
        save_file(tensors, tmp_path / "a.safetensors")
        assert load_spo_lora(pipe, tmp_path / "a.safetensors").modules == len(changes)
        assert_same(changes_of(pipe), changes, spelling)
        unload_spo_lora(pipe)


def test_what_the_pipelines_own_reader_leaves_out_is_refused(tmp_path):
    pipe = base_pipeline("ideogram4")
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    tensors, _ = random_file(IDEOGRAM, shapes_of(pipe), SPELLINGS["ai-toolkit"])
    tensors |= {f"diffusion_model.layers.1.other.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="names no module of a model whose own names are known"):
        load_spo_lora(pipe, tmp_path / "a.safetensors")
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
