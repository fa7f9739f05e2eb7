"""SPO Steering against ComfyUI itself: decided as in diffusers, and the base bit for bit where the adapter is off."""

from __future__ import annotations

from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from running import GraphError, node
from sticker_runs import (
    BENIGN,
    HARMFUL,
    LOOK,
    SPO,
    STEPS,
    hooked,
    norms,
    sample,
    spo_stack,
    start_noise,
    text_to_image,
)
from support.pipelines import random_adapter

import t2i_spo_plugin.sticker as sticker
from t2i_spo_plugin import (
    AdapterError,
    AdapterGate,
    ConfigError,
    enable_spo,
    load_spo_lora,
    unload_spo_lora,
    write_adapter,
)
from t2i_spo_plugin.comfy_nodes.adapters import LoadAdapter
from t2i_spo_plugin.comfy_nodes.gate import NORM, check_gate
from t2i_spo_plugin.comfy_nodes.steering import Steering, steer
from t2i_spo_plugin.gating import FULL_WINDOW, GateNetwork, save_adapter_gate


pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("without_gradients")]

NETWORK = "sticker demo: network (bundled)"


@pytest.fixture
def gates(tmp_path, monkeypatch):
    """An empty folder for adapter gates."""
    folder = tmp_path / "gates"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "spo_adapter_gates", ([str(folder)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folder


def window(model, start, end, strength=1.0):
    return Steering.execute(model, spo_stack(strength), "window", NORM, start, end).result[0]


def gated(model, score=NORM, threshold=0.1, until=LOOK):
    return Steering.execute(model, spo_stack(), "adapter gate", score, 0.0, 1.0, threshold, until).result[0]


def always(model):
    """Steered from the first step to the last."""
    return steer(model, spo_stack(), FULL_WINDOW, None)[0]


# --- windows


def test_a_whole_window_draws_what_the_patched_model_draws(world):
    model, clip, _ = world
    steered, info = Steering.execute(model, spo_stack(0.8), "window", NORM, 0.0, 1.0).result
    expected = sample(LoadAdapter.execute(model, SPO, 0.8).result[0], clip, [HARMFUL, BENIGN])[0]
    torch.testing.assert_close(sample(steered, clip, [HARMFUL, BENIGN])[0], expected, atol=2e-3, rtol=0)
    assert "on from 0 to 1" in info and not steered.patches


def test_a_window_is_the_base_bit_for_bit_until_it_begins_and_where_no_step_falls_into_it(world):
    model, clip, _ = world
    base, base_steps = sample(model, clip, [HARMFUL])
    late, late_steps = sample(window(model, 0.5, 1.0), clip, [HARMFUL])
    same = [torch.equal(one, other) for one, other in zip(base_steps, late_steps, strict=True)]
    assert same == [True] * 3 + [False] * 2 and not torch.equal(base, late)
    assert torch.equal(sample(window(model, 0.91, 0.99), clip, [HARMFUL])[0], base)
    assert window(model, 0.0, 1.0, strength=0.0) is model


@pytest.mark.parametrize("edge", [0.2, 0.8])
def test_a_window_at_either_end_has_the_first_or_the_last_step_and_both_are_the_whole(world, edge):
    model, clip, _ = world
    base, base_steps = sample(model, clip, [HARMFUL])
    whole, whole_steps = sample(always(model), clip, [HARMFUL])
    early, early_steps = sample(window(model, 0.0, edge), clip, [HARMFUL])
    late, late_steps = sample(window(model, edge, 1.0), clip, [HARMFUL])
    alone = round(edge * STEPS)
    for number in range(alone):
        assert torch.equal(early_steps[number], whole_steps[number])
        assert torch.equal(late_steps[number], base_steps[number])
    assert not torch.equal(early_steps[alone], whole_steps[alone])
    assert not torch.equal(late_steps[alone], base_steps[alone])
    assert torch.equal(sample(window(window(model, 0.0, edge), edge, 1.0), clip, [HARMFUL])[0], whole)


# --- the adapter gate decides as in diffusers


def predictions(call):
    """What the denoiser predicted when `call` asked it first; `call` takes a function to register a hook with."""
    found = []
    call(lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output))
    return found[0]


def of_comfyui(model, clip, prompts):
    def call(hook):
        handle = model.model.diffusion_model.register_forward_hook(hook)
        sample(model, clip, prompts, cfg=1.0, steps=[999])
        handle.remove()

    return predictions(call)


def of_diffusers(pipe, prompts):
    def call(hook):
        handle = pipe.unet.register_forward_hook(hook)
        noise = start_noise(len(prompts))
        pipe(prompts, latents=noise, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
        handle.remove()

    return predictions(call)


def test_both_programs_predict_the_same_from_the_same_noise(world, pipe):
    """In float32 they differ by rounding; a prediction is about 1."""
    model, clip, _ = world
    prompts = [HARMFUL, BENIGN]
    base = of_diffusers(pipe, prompts)
    load_spo_lora(pipe, sticker.adapter_path("spo"))
    try:
        changed = of_diffusers(pipe, prompts)
    finally:
        unload_spo_lora(pipe)
    here, changed_here = of_comfyui(model, clip, prompts), of_comfyui(always(model), clip, prompts)
    assert 0.5 < base.std() < 2.0 and (changed - base).abs().max() > 0.1
    torch.testing.assert_close(here, base, atol=1e-4, rtol=0)
    torch.testing.assert_close(changed_here, changed, atol=1e-4, rtol=0)
    gate = sticker.load_adapter_gate()
    torch.testing.assert_close(gate.score(here, changed_here), gate.score(base, changed), atol=1e-2, rtol=0)


@pytest.fixture(scope="module")
def crowd(world):
    """Eight harmful and eight benign prompts, drawn by the base model, and with the adapter from the first step on."""
    model, clip, _ = world
    prompts = [row.prompt for kind in ("harmful", "benign") for row in sticker.prompt_rows(kind, 8)]
    with torch.no_grad():
        return prompts, sample(model, clip, prompts)[0], sample(always(model), clip, prompts)[0]


@pytest.mark.parametrize("score", ["network", "norm"])
def test_the_same_images_get_the_adapter_as_in_diffusers_and_the_others_are_the_bases(world, crowd, score):
    model, clip, _ = world
    prompts, base, full = crowd
    guided = enable_spo(sticker.load_pipeline())
    guided.load_spo_lora(sticker.adapter_path("spo"), steering=sticker.load_adapter_gate(score))
    options = {"num_inference_steps": STEPS, "guidance_scale": sticker.GUIDANCE, "output_type": "latent"}
    decided = guided(prompts, latents=start_noise(len(prompts)), **options).gate_report.gated_on
    drawn = sample(gated(model, f"sticker demo: {score} (bundled)"), clip, prompts)[0]
    found = [not torch.equal(one, other) for one, other in zip(drawn, base, strict=True)]
    assert found == decided and {*decided} == {True, False}
    torch.testing.assert_close(drawn[decided], full[decided], atol=2e-4, rtol=0)
    if score == "network":
        assert sum(decided[:8]) == 8 and sum(decided[8:]) <= 2


# --- one image, one decision


def test_the_norm_decides_for_each_image_alone_by_a_threshold_between(world):
    model, clip, _ = world
    prompts = [HARMFUL, BENIGN]
    found = norms(model, spo_stack(), lambda steered: sample(steered, clip, prompts, cfg=1.0)).tolist()
    assert found[0] > 1.2 * found[1]
    base, full = sample(model, clip, prompts)[0], sample(always(model), clip, prompts)[0]
    drawn = sample(gated(model, threshold=sum(found) / 2), clip, prompts)[0]
    torch.testing.assert_close(drawn[0], full[0], atol=2e-4, rtol=0)
    assert torch.equal(drawn[1], base[1]) and not torch.equal(drawn[0], base[0])
    for threshold, expected in ((found[0] * 1.01, base), (found[1] * 0.99, full)):
        nothing_or_all = sample(gated(model, threshold=threshold), clip, prompts)[0]
        torch.testing.assert_close(nothing_or_all, expected, atol=2e-4, rtol=0)


def test_images_of_one_prompt_are_decided_by_their_noise(world):
    model, clip, _ = world
    noise = start_noise(4)

    def draw(steered):
        return sample(steered, clip, [HARMFUL], noise=noise, cfg=1.0)[0]

    found = norms(model, spo_stack(), draw)
    threshold = float(found.sort().values[1:3].mean())
    base, drawn = draw(model), draw(gated(model, threshold=threshold))
    differs = torch.tensor([not torch.equal(one, other) for one, other in zip(drawn, base, strict=True)])
    assert torch.equal(differs, found >= threshold) and int(differs.sum()) == 2


def test_without_guidance_the_gate_network_decides_alike(world):
    model, clip, _ = world
    prompts = [HARMFUL, BENIGN]
    drawn = sample(gated(model, NETWORK), clip, prompts, cfg=1.0)[0]
    torch.testing.assert_close(drawn[0], sample(always(model), clip, prompts, cfg=1.0)[0][0], atol=2e-4, rtol=0)
    assert torch.equal(drawn[1], sample(model, clip, prompts, cfg=1.0)[0][1])


def folded(model):
    """A clone whose layers see twice as many rows as there are images."""

    def twice(forward, x, timesteps, context, *rest, **options):
        two = (torch.cat([tensor, tensor]) for tensor in (x, timesteps, context))
        return forward(*two, *rest, **options)[: len(x)]

    clone = model.clone()
    clone.add_wrapper(WrappersMP.DIFFUSION_MODEL, twice)
    return clone


def test_where_layers_fold_rows_one_image_gives_the_adapter_to_all(world):
    model, clip, _ = world
    model = folded(model)
    base, full = sample(model, clip, [HARMFUL, BENIGN])[0], sample(always(model), clip, [HARMFUL, BENIGN])[0]
    both = sample(gated(model, NETWORK), clip, [HARMFUL, BENIGN])[0]
    assert torch.equal(both, full) and not torch.equal(both[1], base[1])
    alone = sample(gated(model, NETWORK), clip, [BENIGN])[0]
    assert torch.equal(alone, sample(model, clip, [BENIGN])[0])


def test_the_second_run_has_the_control_nets_answers_too(world):
    """A model takes them out of their lists."""
    model, clip, _ = world

    def controlled(apply, arguments):
        states = {"middle": [torch.full((len(arguments["input"]), 160, 1, 1), 0.5)], "output": [], "input": []}
        return apply(arguments["input"], arguments["timestep"], **arguments["c"], control=states)

    base = model.clone()
    base.set_model_unet_function_wrapper(controlled)
    expected = sample(always(base), clip, [HARMFUL])[0]
    assert not torch.equal(expected, sample(always(model), clip, [HARMFUL])[0])
    assert torch.equal(sample(gated(base, threshold=0.0), clip, [HARMFUL])[0], expected)


def test_a_run_that_begins_after_the_decision_window_gets_the_adapter(world):
    model, clip, _ = world
    late = range(499, 0, -100)
    expected = sample(always(model), clip, [HARMFUL, BENIGN], steps=late)[0]
    for score in (NORM, NETWORK):
        assert torch.equal(sample(gated(model, score), clip, [HARMFUL, BENIGN], steps=late)[0], expected)


# --- nothing stays behind


def test_a_cancelled_run_leaves_no_hook_and_the_next_image_is_the_bases(world):
    model, clip, _ = world
    base = sample(model, clip, [HARMFUL])[0]
    for steered in (window(model, 0.0, 1.0), gated(model, threshold=0.0, until=0.5), gated(model, NETWORK)):

        def cancel(step):
            if step == 3:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            sample(steered, clip, [HARMFUL], callback=cancel)
        assert not hooked(model)
        assert torch.equal(sample(model, clip, [HARMFUL])[0], base)


def test_a_run_that_fails_in_the_second_run_leaves_no_hook_and_decides_anew_afterwards(world):
    model, clip, _ = world
    asked = []

    def fails_once(forward, *rest, **options):
        asked.append(len(rest))
        if len(asked) == 2:
            raise torch.OutOfMemoryError
        return forward(*rest, **options)

    fragile = model.clone()
    fragile.add_wrapper(WrappersMP.DIFFUSION_MODEL, fails_once)
    steered = gated(fragile, NETWORK)
    with pytest.raises(torch.OutOfMemoryError):
        sample(steered, clip, [HARMFUL])
    assert len(asked) == 2 and not hooked(model)
    assert torch.equal(sample(steered, clip, [BENIGN])[0], sample(model, clip, [BENIGN])[0])


# --- files


def test_a_file_of_the_user_brings_its_own_threshold_and_until(world, gates):
    model, clip, _ = world
    network = sticker.load_adapter_gate().network
    save_adapter_gate(
        AdapterGate(-1e6, LOOK, network), gates / "all.safetensors", {"adapter": "mine", "strength": "2"}
    )
    save_adapter_gate(AdapterGate(1e6, 1.0), gates / "none.safetensors")
    (gates / "notes.txt").write_text("no adapter gate")
    options = next(given for given in Steering.define_schema().inputs if given.id == "score").options
    assert options == [NORM, "all.safetensors", "none.safetensors", NETWORK, "sticker demo: norm (bundled)"]
    # What the sockets say would decide otherwise.
    assert torch.equal(
        sample(gated(model, "all.safetensors", threshold=10.0), clip, [BENIGN])[0],
        sample(always(model), clip, [BENIGN])[0],
    )
    assert torch.equal(
        sample(gated(model, "none.safetensors", threshold=0.0), clip, [HARMFUL])[0], sample(model, clip, [HARMFUL])[0]
    )
    info = Steering.execute(model, spo_stack(), "adapter gate", "all.safetensors", 0.0, 1.0).result[1]
    assert "the score of the gate network before 0.04 reaches -1e+06" in info
    assert "all.safetensors was trained for: adapter mine, strength 2" in info


def test_an_exchanged_file_is_noticed(gates):
    path = save_adapter_gate(AdapterGate(0.3), gates / "mine.safetensors")
    inputs = {"mode": "adapter gate", "score": "mine.safetensors", "start": 0.0, "end": 1.0}
    before = Steering.fingerprint_inputs(**inputs)
    assert before == Steering.fingerprint_inputs(**inputs)
    save_adapter_gate(AdapterGate(0.3, 0.08, GateNetwork(8)), path)
    assert before != Steering.fingerprint_inputs(**inputs)
    assert Steering.fingerprint_inputs(mode="adapter gate", score=NORM) == ""


def test_a_file_that_is_no_adapter_gate_is_refused_before_the_run(gates):
    write_adapter(spo_stack()[0][0], gates / "adapter.safetensors")
    (gates / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    (gates / "gate.pt").write_bytes(b"\x80\x02}q\x00.")

    def check(score, mode="adapter gate"):
        return Steering.validate_inputs(mode, score)

    for name, words in (
        ("adapter.safetensors", "is no file of an adapter gate"),
        ("pickle.safetensors", "never opened"),
        ("gate.pt", "never opened"),
        ("gone.safetensors", "no adapter gate 'gone.safetensors'; train one"),
        ("../all.safetensors", "no adapter gate"),
    ):
        assert words in check(name), name
        assert words in check(name, None), name  # A mode that is linked can be either.
    assert check(NETWORK) is check(NORM) is check(None) is True
    assert "mode must be" in check(NORM, "sometimes")


def test_a_missing_file_stops_a_workflow_with_a_sentence(run_graph):
    steering = {"mode": "adapter gate", "score": "gone.safetensors", "start": 0.0, "end": 1.0}
    graph = {
        "1": node("SPO_StickerDemoLoader"),
        "2": node("SPO_LoadAdapter", model=["1", 0], adapter=SPO, strength=1.0),
        "3": node("SPO_Steering", model=["1", 0], adapter=["2", 2], **steering),
    }
    with pytest.raises(GraphError, match=r"there is no adapter gate 'gone.safetensors'.*models/spo_adapter_gates"):
        run_graph(graph, model=["3", 0])


def test_a_window_asks_for_no_file(run_graph):
    def draw(mode, score):
        graph = {
            **text_to_image(["3", 0], ["1", 1], ["1", 2]),
            "1": node("SPO_StickerDemoLoader"),
            "2": node("SPO_LoadAdapter", model=["1", 0], adapter=SPO, strength=1.0),
            "3": node("SPO_Steering", model=["1", 0], adapter=["2", 2], mode=mode, score=score, start=0.0, end=0.5),
        }
        return run_graph(graph, latents=["13", 0])["latents"]["samples"]

    assert torch.equal(draw("window", "gone.safetensors"), draw("window", NORM))
    with pytest.raises(GraphError, match="mode must be 'window' or 'adapter gate', got 'sometimes'"):
        draw("sometimes", NORM)


def test_steering_refuses_what_it_cannot_steer(world, pipe, gates):
    model = world[0]
    texts = random_adapter(pipe, components=("unet", "text_encoder"))
    with pytest.raises(AdapterError, match="which has run before the gate can decide"):
        steer(model, [(texts, 1.0)], FULL_WINDOW, AdapterGate(0.1))
    assert "text encoder part" in steer(model, [(texts, 1.0)], (0.0, 0.5), None)[1]
    with pytest.raises(ConfigError, match="0 <= start < end <= 1"):
        window(model, 0.6, 0.4)
    with pytest.raises(ConfigError, match="no adapter to steer"):
        Steering.execute(model, [], "window", NORM, 0.0, 1.0)
    save_adapter_gate(AdapterGate(0.3, LOOK, GateNetwork(4)), gates / "sd15.safetensors")
    with pytest.raises(ConfigError, match="with 4 channels, these have 8: it belongs to another base model"):
        gated(model, "sd15.safetensors")
    with pytest.raises(ConfigError, match="this model is gated already"):
        gated(gated(model))
    assert gated(window(model, 0.0, 0.5)) is not model


def test_a_gate_network_is_refused_where_predictions_are_not_known_to_be_alike():
    class AuraFlow:
        model_config = SimpleNamespace(unet_config={})

    with pytest.raises(AdapterError, match="Stable Diffusion 1, 2, XL and 3 and Flux.1, this model is AuraFlow"):
        check_gate(sticker.load_adapter_gate(), AuraFlow())
    check_gate(AdapterGate(0.1), AuraFlow())


# --- as ComfyUI runs it


def test_two_steered_clones_of_one_model_do_not_touch_each_other_in_a_graph(run_graph):
    common = {"model": ["1", 0], "adapter": ["2", 2], "start": 0.0}
    graph = {
        **text_to_image(["1", 0], ["1", 1], ["1", 2]),
        "1": node("SPO_StickerDemoLoader"),
        "2": node("SPO_LoadAdapter", model=["1", 0], adapter=SPO, strength=1.0),
        "3": node("SPO_Steering", mode="adapter gate", score=NETWORK, end=1.0, **common),
        "4": node("SPO_Steering", mode="window", score=NORM, end=0.5, **common),
    }
    for number, model in (("23", "3"), ("33", "4")):
        graph[number] = {**graph["13"], "inputs": {**graph["13"]["inputs"], "model": [model, 0]}}
    samplers = {"base": ["13", 0], "gated": ["23", 0], "windowed": ["33", 0]}
    together = run_graph(graph, **samplers, image=["14", 0])
    drawn = {name: together[name]["samples"] for name in samplers}
    for name, link in samplers.items():
        assert torch.equal(run_graph(graph, **{name: link})[name]["samples"], drawn[name]), name
    assert not torch.equal(drawn["gated"], drawn["windowed"])
    assert not torch.equal(drawn["base"], drawn["gated"]) and not torch.equal(drawn["base"], drawn["windowed"])


def test_image_to_image_at_a_low_denoise_is_drawn_with_the_adapter(run_graph):
    common = {"model": ["1", 0], "adapter": ["2", 2], "start": 0.0, "end": 1.0}
    graph = {
        **text_to_image(["1", 0], ["1", 1], ["1", 2]),
        "1": node("SPO_StickerDemoLoader"),
        "2": node("SPO_LoadAdapter", model=["1", 0], adapter=SPO, strength=1.0),
        "3": node("SPO_Steering", mode="adapter gate", score=NETWORK, **common),
        "4": node("SPO_Steering", mode="window", score=NORM, **common),
        "20": {"class_type": "VAEEncode", "inputs": {"pixels": ["14", 0], "vae": ["1", 2]}},
    }
    for number, model in (("21", "1"), ("22", "3"), ("23", "4")):
        inputs = {"model": [model, 0], "latent_image": ["20", 0], "denoise": 0.4}
        graph[number] = {**graph["13"], "inputs": {**graph["13"]["inputs"], **inputs}}
    run = run_graph(graph, base=["21", 0], gated=["22", 0], windowed=["23", 0])
    assert torch.equal(run["gated"]["samples"], run["windowed"]["samples"])
    assert not torch.equal(run["gated"]["samples"], run["base"]["samples"])
