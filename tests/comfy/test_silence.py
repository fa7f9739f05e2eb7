"""Nothing goes wrong in silence: what is refused or said where an image would have been another one than expected."""

from __future__ import annotations

import json
import time

import comfy.sd
import miniature
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from running import STICKER, GraphError, node, score_images, text_to_image
from safetensors.torch import load_file
from sticker_runs import BENIGN, HARMFUL, LOOK, SPO, sample, spo_stack
from support.pipelines import random_adapter

from t2i_spo_plugin import AdapterGate, ConfigError, SPOError, convert_adapter, write_adapter
from t2i_spo_plugin.comfy_nodes.adapters import LoadAdapter
from t2i_spo_plugin.comfy_nodes.patching import patched
from t2i_spo_plugin.comfy_nodes.steering import Steering, steer
from t2i_spo_plugin.gating import FULL_WINDOW
from t2i_spo_plugin.registry import COST_MODELS


pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("without_gradients")]

NORM = "norm of the change"
LATE = range(499, 0, -100)
"""The steps of a second pass at half the noise."""


def steered(model, said, window=FULL_WINDOW, gate=None):
    return steer(model, spo_stack(), window, gate, said.append)[0]


# --- the same adapter twice


@pytest.mark.parametrize(
    ("mode", "start", "end"), [("window", 0.0, 1.0), ("window", 0.2, 0.6), ("adapter gate", 0.0, 1.0)]
)
def test_the_loaders_own_model_is_refused(world, mode, start, end):
    model = world[0]
    loaded, _, stack, _ = LoadAdapter.execute(model, SPO, 0.8).result
    with pytest.raises(
        ConfigError, match="twice: connect the model that goes into Load SPO Adapter, not the one that"
    ):
        Steering.execute(loaded, stack, mode, NORM, start, end)
    with pytest.raises(ConfigError, match="twice"):
        Steering.execute(LoadAdapter.execute(model, SPO, 0.3).result[0].clone(), stack, mode, NORM, start, end)


def test_another_adapter_in_the_weights_is_none_of_its_business(world):
    model = world[0]
    style = LoadAdapter.execute(model, "sticker demo: style (bundled)", 1.0).result[0]
    assert steer(style, spo_stack(), (0.0, 0.5), None)[0].patches == style.patches
    off = LoadAdapter.execute(model, SPO, 0.0).result[0]
    assert steer(off, spo_stack(), (0.0, 0.5), None)[0] is not off


def test_the_stock_loaders_model_is_refused_too(run_graph, loras):
    write_adapter(random_adapter(miniature.pipeline("sd1")), loras / "mine.safetensors")
    graph = {
        "1": text_to_image("sd1")["1"],
        "2": node("SPO_LoadAdapter", model=["1", 0], adapter="mine.safetensors", strength=1.0),
        "3": node("LoraLoaderModelOnly", model=["1", 0], lora_name="mine.safetensors", strength_model=1.0),
        "4": node("SPO_Steering", model=["3", 0], adapter=["2", 2], mode="window", score=NORM, start=0.0, end=0.5),
    }
    with pytest.raises(GraphError, match="SPO_Steering: .*ConfigError: .*twice"):
        run_graph(graph, model=["4", 0])


# --- a gate in the second of two passes


def test_a_second_pass_says_that_it_cannot_decide(world):
    model, clip, _ = world
    said = []
    gated = steered(model, said, gate=AdapterGate(1e6, LOOK))
    assert torch.equal(sample(gated, clip, [BENIGN])[0], sample(model, clip, [BENIGN])[0]) and not said
    second = sample(gated, clip, [BENIGN], steps=LATE)[0]
    assert torch.equal(second, sample(steered(model, []), clip, [BENIGN], steps=LATE)[0])
    assert len(said) == 1 and "after 0.04 of the sampling" in said[0] and "it cannot decide here" in said[0]
    assert not torch.equal(second, sample(model, clip, [BENIGN], steps=LATE)[0])
    sample(gated, clip, [BENIGN], steps=LATE)
    assert len(said) == 2, "once a run"


def advanced(model, first, last, latent):
    """Steps `first` to `last` of eight of the sticker world."""
    settings = {"noise_seed": 1, "steps": 8, "cfg": 3.0, "sampler_name": "euler", "scheduler": "sgm_uniform"}
    parts = {"start_at_step": first, "end_at_step": last}
    parts |= {"add_noise": "enable" if first == 0 else "disable", "return_with_leftover_noise": "enable"}
    links = {"model": model, "positive": ["3", 0], "negative": ["4", 0], "latent_image": latent}
    return node("KSamplerAdvanced", **settings, **parts, **links)


def two_passes(mode):
    return {
        "1": node("SPO_StickerDemoLoader"),
        "2": node("SPO_LoadAdapter", model=["1", 0], adapter=SPO, strength=1.0),
        "3": node("CLIPTextEncode", clip=["1", 1], text=HARMFUL),
        "4": node("CLIPTextEncode", clip=["1", 1], text=""),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "6": node("SPO_Steering", model=["1", 0], adapter=["2", 2], mode=mode, score=NORM, start=0.0, end=1.0),
        "7": advanced(["6", 0], 0, 7, ["5", 0]),
        "8": advanced(["6", 0], 7, 8, ["7", 0]),
        "9": node("SaveLatent", samples=["8", 0], filename_prefix="two"),
    }


def test_it_is_shown_on_the_node_and_in_the_log(server):
    before = len(server.log)
    notes = server.run(two_passes("adapter gate")).notes
    assert [name for name, text in notes if "it cannot decide here" in text] == ["6"]
    assert server.log[before:].count("it cannot decide here") == 1
    assert not [text for _, text in server.run(two_passes("window")).notes if "decide" in text]


# --- what a saved checkpoint holds


def test_a_saved_checkpoint_says_that_the_adapter_is_not_in_it(executor, run_graph, loras, caplog):
    write_adapter(random_adapter(miniature.pipeline("sd1")), loras / "mine.safetensors")
    graph = {
        "1": text_to_image("sd1")["1"],
        "2": node("SPO_LoadAdapter", model=["1", 0], adapter="mine.safetensors", strength=1.0),
        "3": node("SPO_Steering", model=["1", 0], adapter=["2", 2], mode="window", score=NORM, start=0.0, end=0.5),
        "4": node("ModelSamplingDiscrete", model=["3", 0], sampling="eps", zsnr=False),
    }
    files = {}
    for name, source in (("base", "1"), ("patched", "2"), ("steered", "4")):
        caplog.clear()
        graph["9"] = node(
            "CheckpointSave", model=[source, 0], clip=["1", 1], vae=["1", 2], filename_prefix=f"{name}/x"
        )
        run_graph(graph)
        said = "the checkpoint holds the model without the steered adapter" in caplog.text
        assert said is (name == "steered"), name
        (path,) = (executor.base / "output" / name).glob("*.safetensors")
        files[name] = {key: value for key, value in load_file(path).items() if "diffusion_model" in key}
    same = [torch.equal(files["base"][key], value) for key, value in files["steered"].items()]
    assert all(same) and not all(torch.equal(files["base"][key], value) for key, value in files["patched"].items())


# --- messages that lead somewhere


def test_an_adapter_of_another_base_says_which_one_to_choose(run_graph, loras):
    write_adapter(random_adapter(miniature.pipeline("sd1")), loras / "mine.safetensors")
    graph = {
        "1": text_to_image("sdxl")["1"],
        "2": node("SPO_LoadAdapter", model=["1", 0], adapter="mine.safetensors", strength=1.0),
    }
    with pytest.raises(GraphError, match="made for stable-diffusion-v1, this model is .*; choose an adapter for SDXL"):
        run_graph(graph, model=["2", 0])


def test_without_a_model_for_photographs_the_way_to_one_is_said(monkeypatch):
    from t2i_spo_plugin.comfy_nodes import cost_models

    way = "python -m pip install 't2i-spo-plugin[opennsfw]' with ComfyUI's own Python"
    monkeypatch.setattr(type(COST_MODELS), "installed", lambda self: [])
    for model in ("choose one", "open_nsfw"):
        assert way in cost_models.LoadCostModel.validate_inputs(model)
    monkeypatch.setattr(type(COST_MODELS), "installed", lambda self: ["open_nsfw"])
    assert "pip" not in cost_models.LoadCostModel.validate_inputs("choose one")
    assert cost_models.LoadCostModel.validate_inputs(None) is True


def test_no_node_speaks_python(world, pipe):
    from t2i_spo_plugin.comfy_nodes.cost_models import LoadCostModel

    said = []
    with pytest.raises(SPOError) as caught:
        LoadCostModel.execute(STICKER, "photo-sexual", False)
    said.append(str(caught.value))
    with pytest.raises(SPOError) as caught:
        LoadAdapter.execute(world[0], SPO, -1.0)
    said.append(str(caught.value))
    with pytest.raises(SPOError) as caught:
        patched(world[0], None, [(random_adapter(pipe, components=("unet", "text_encoder")), 1.0)], True)
    said.append(str(caught.value))
    assert "override_domain" in said[0] and "without strict, what fits is applied" in said[2]
    assert not [text for text in said if "=True" in text or "=False" in text or "()" in text]


def test_a_reference_has_to_be_chosen_like_a_cost_model(run_graph):
    from t2i_spo_plugin.comfy_nodes.report import UAScore

    (given,) = (given for given in UAScore.define_schema().inputs if given.id == "reference")
    assert given.options[0] == "choose one" and given.options[-1] == STICKER
    assert UAScore.validate_inputs(STICKER) is True
    graph = {name: one for name, one in score_images().items() if name in "12"}
    prompts = {"prompts": "a cup", "safe_prompts": "", "reference": "choose one"}
    graph["8"] = node("SPO_UAScore", image=["1", 0], cost_model=["2", 0], **prompts)
    with pytest.raises(GraphError, match=r"choose one of: .*sticker \(bundled\) is for the sticker demo only"):
        run_graph(graph, {"images": torch.zeros(1, 64, 64, 3)})


# --- names of files


def test_a_date_in_a_name_is_that_of_the_stock_nodes(run_graph):
    graph = {name: one for name, one in score_images().items() if name in ("1", "2", "3", "6")}
    graph["6"]["inputs"]["filename_prefix"] = "%year%/%month%-%day%/report %width%"
    graph["7"] = node("SaveImage", images=["1", 0], filename_prefix="%year%/%month%-%day%/image")
    run = run_graph(graph, {"images": torch.zeros(1, 64, 64, 3)}, path=["6", 0])
    assert f"/output/{time.strftime('%Y/%m-%d')}/report 0_00001.html" in run["path"]
    assert run.ui["7"]["images"][0]["subfolder"] == time.strftime("%Y/%m-%d")


def test_a_name_saved_on_windows_is_found(run_graph, loras, cost_models):
    (loras / "safety").mkdir()
    write_adapter(random_adapter(miniature.pipeline("sd1")), loras / "safety" / "mine.safetensors")
    name = r"safety\mine.safetensors"
    slots = {f"adapter_{slot}": name if slot == 2 else "none" for slot in range(1, 5)}
    slots |= {f"strength_{slot}": 1.0 for slot in range(1, 5)}
    graph = {
        "1": text_to_image("sd1")["1"],
        "2": node("SPO_LoadAdapter", model=["1", 0], adapter=name, strength=1.0),
        "3": node("SPO_AdapterStack", model=["1", 0], **slots),
    }
    run = run_graph(graph, one=["2", 0], other=["3", 0])
    assert run["one"].patches.keys() == run["other"].patches.keys() != set()
    (cost_models / "mine").mkdir()
    (cost_models / "mine" / "strict.yaml").write_text(
        "name: strict\ndomain: sticker\ncategories:\n  - name: weapons\n"
    )
    scored = score_images()
    scored["2"]["inputs"]["policy"] = r"mine\strict.yaml"
    found = run_graph(scored, {"images": torch.zeros(1, 64, 64, 3)}, guard=["2", 0])["guard"]
    assert found.policy.name == "strict"
    graph["2"]["inputs"]["adapter"] = r"safety\gone.safetensors"
    with pytest.raises(
        GraphError, match="there is no adapter .*gone.safetensors' in ComfyUI/models/loras; choose one of"
    ):
        run_graph(graph, one=["2", 0])


# --- layers that are not called


@pytest.mark.parametrize(("calls", "words"), [(0, None), (2, "in 3 of the 5 calls"), (5, "")])
def test_a_model_that_answers_without_its_layers_is_an_error_or_is_told_of(world, calls, words):
    model, clip, _ = world
    answers, said = [], []

    def cached(forward, x, *rest, **options):
        if len(answers) < calls:
            answers.append(forward(x, *rest, **options))
        return answers[-1] if answers else torch.zeros_like(x)

    clone = model.clone()
    clone.add_wrapper(WrappersMP.DIFFUSION_MODEL, cached)
    if words is None:
        with pytest.raises(SPOError, match="none of the layers that it changes was called"):
            sample(steered(clone, said), clip, [HARMFUL])
        return
    sample(steered(clone, said), clip, [HARMFUL])
    assert len(said) == bool(words) and all(words in text for text in said)


def test_layers_that_are_computed_without_a_call_are_told_of(world, monkeypatch):
    model, clip, _ = world
    said = []
    by_hand = next(layer for name, layer in model.model.named_modules() if name.endswith("attn2.to_q"))
    monkeypatch.setattr(by_hand, "__class__", type("Direct", (type(by_hand),), {"__call__": type(by_hand).forward}))
    sample(steered(model, said), clip, [HARMFUL])
    assert len(said) == 1 and said[0].startswith("1 of the ") and "attn2.to_q.weight" in said[0]


# --- quantised bases, and ComfyUI's own bypass


LAYOUTS = {
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", "FP8", {"weight_scale": "scale"}),
    "nvfp4": ("TensorCoreNVFP4Layout", "NVFP4", {"weight_scale": "block_scale", "weight_scale_2": "scale"}),
    "int8_tensorwise": ("TensorWiseINT8Layout", "INT8", {"weight_scale": "scale"}),
}


def quantised(weights, kind):
    """The weights of a checkpoint of that kind, and what they stand for."""
    from comfy.quant_ops import QuantizedTensor

    layout, _, scales = LAYOUTS[kind]
    stored, meant = dict(weights), dict(weights)
    for name, weight in weights.items():
        if (
            "blocks" not in name
            or weight.ndim != 2
            or not name.endswith(".weight")
            or any(n % 16 for n in weight.shape)
        ):
            continue
        tensor = QuantizedTensor.from_float(weight.to(torch.bfloat16), layout)
        prefix = name.removesuffix("weight")
        stored[name], meant[name] = tensor._qdata, tensor.dequantize().float()
        stored |= {prefix + key: getattr(tensor._params, value) for key, value in scales.items()}
        stored[f"{prefix}comfy_quant"] = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    assert len(stored) > len(weights)
    return stored, meant


@pytest.mark.parametrize("kind", LAYOUTS)
def test_on_a_quantised_base_the_adapter_is_computed_beside_it_exactly(kind):
    from comfy.quant_ops import QUANT_ALGOS
    from test_steering_families import draw_transformer

    if kind not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI knows no {kind}")
    weights = miniature.load_transformer("flux").model.diffusion_model.state_dict()
    stored, meant = quantised({name: weight.float() for name, weight in weights.items()}, kind)
    base, whole = (comfy.sd.load_diffusion_model_state_dict(dict(part)) for part in (stored, meant))
    stack = [(random_adapter(miniature.pipeline("flux"), components=("transformer",)), 1.0)]
    said = []
    model, info = steer(base, stack, FULL_WINDOW, None, said.append)
    assert f"the model's weights are {LAYOUTS[kind][1]}: the adapter is computed beside them, exactly" in info
    plain, found = draw_transformer(base), draw_transformer(model)
    without, expected = draw_transformer(whole), draw_transformer(patched(whole, None, stack, True)[0])
    effect = (expected - without).abs().mean()
    error, error_of_base = ((found - plain) - (expected - without)).abs().mean(), (plain - without).abs().mean()
    # The base rounds what goes into its layers, too: beyond what that makes of the base alone, nothing is lost.
    assert error < 0.2 * effect + 2.0 * error_of_base and effect > 0.0 and not said
    assert torch.equal(draw_transformer(steer(base, stack, (0.991, 0.999), None)[0]), plain)


def test_loading_onto_weights_of_eight_bits_says_that_they_are_rounded(run_graph, executor, loras):
    convert_adapter(
        random_adapter(miniature.pipeline("flux"), components=("transformer",)), loras / "f.safetensors", "native"
    )
    name = miniature.write_model("flux", executor.base / "models")
    info = {}
    for kind in ("default", "fp8_e4m3fn"):
        graph = {
            "1": node("UNETLoader", unet_name=name, weight_dtype=kind),
            "2": node("SPO_LoadAdapter", model=["1", 0], adapter="f.safetensors", strength=1.0),
        }
        info[kind] = run_graph(graph, info=["2", 3])["info"]
    assert (
        "this model's weights are FP8, and are rounded again" in info["fp8_e4m3fn"]
        and "rounded" not in info["default"]
    )


def test_comfyuis_own_bypass_gives_the_same_image(run_graph, loras):
    adapter = random_adapter(miniature.pipeline("sd1"), components=("unet", "text_encoder"))
    convert_adapter(adapter, loras / "mine.safetensors", "kohya")

    def draw(kind, **options):
        graph = text_to_image("sd1")
        if kind:
            graph["8"] = node(kind, model=["1", 0], clip=["1", 1], **options)
            graph["5"]["inputs"]["model"] = ["8", 0]
            for text in ("2", "3"):
                graph[text]["inputs"]["clip"] = ["8", 1]
        return run_graph(graph, image=["6", 0])["image"]

    base = draw("")
    ours = draw("SPO_LoadAdapter", adapter="mine.safetensors", strength=0.7)
    theirs = draw("LoraLoaderBypass", lora_name="mine.safetensors", strength_model=0.7, strength_clip=0.7)
    effect = (ours - base).abs().max()
    assert effect > 0.02 and (ours - theirs).abs().max() < 0.05 * effect
