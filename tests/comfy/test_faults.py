"""Faults, planted where a user meets them: each ends in a sentence, and what follows is as if it had not been."""

from __future__ import annotations

import pickle
import shutil

import comfy.model_management
import comfy.utils
import nodes
import pytest
import torch
from miniature import UNET_FAMILIES, pipeline
from running import GraphError, check_nothing_is_left_behind, node, score_images, text_to_image
from safetensors.torch import load, load_file, save, save_file
from support.pipelines import random_adapter

from t2i_spo_plugin import sticker, write_adapter


pytestmark = pytest.mark.comfy

SPO = "sticker demo: spo (bundled)"
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
OTHER = {"sd1": "sdxl", "sdxl": "sd1"}
TEXT_ENCODERS = ("unet", "text_encoder", "text_encoder_2")


def draw(family, file="", strength=1.0, seed=0, steps=4, size=(64, 64), batch=2, **steering):
    """The stock graph with the adapter `file` on model and text encoder, and with that steering instead on the model.

    Node 1 loads the base, node 8 the adapter; node 5 gives the latents, node 6 the images.
    """
    graph = text_to_image(family, seed)
    graph["4"] = node("EmptyLatentImage", width=size[0], height=size[1], batch_size=batch)
    sampler = graph["5"]["inputs"]
    sampler["steps"] = steps
    if not file:
        return graph
    graph["8"] = node("SPO_LoadAdapter", model=["1", 0], clip=["1", 1], adapter=file, strength=strength)
    sampler["model"] = ["8", 0]
    for text in ("2", "3"):
        graph[text]["inputs"]["clip"] = ["8", 1]
    if steering:
        graph["9"] = node("SPO_Steering", model=["1", 0], adapter=["8", 2], **steering)
        sampler["model"] = ["9", 0]
    return graph


WINDOW = {"mode": "window", "score": "norm of the change", "start": 0.0, "end": 1.0}
GATED = {**WINDOW, "mode": "adapter gate", "threshold": 0.0, "until": 0.5}
WAYS = ({}, WINDOW, GATED)


def write(family, folder, components=("unet",)):
    """A random adapter for `family` there, and its name."""
    name = f"{'-'.join((family, *components))}.safetensors"
    write_adapter(random_adapter(pipeline(family), components=components), folder / name)
    return name


def write_both(family, folder):
    """One for the UNet alone, which every way of using it takes, and one for the text encoders too."""
    return write(family, folder), write(family, folder, TEXT_ENCODERS)


# --- adapters


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_an_adapter_for_another_base_is_refused_and_both_are_named(run_graph, loras, family):
    before = run_graph(draw(family), image=["6", 0])["image"]
    both = f"made for {ARCHITECTURES[OTHER[family]]}, this model is {ARCHITECTURES[family]}"
    with pytest.raises(GraphError, match=f"SPO_LoadAdapter: .*IncompatibleAdapterError: .*{both}"):
        run_graph(draw(family, write(OTHER[family], loras)))
    assert torch.equal(run_graph(draw(family), image=["6", 0])["image"], before)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_an_adapter_that_does_not_say_its_base_is_known_by_its_shapes(run_graph, loras, family):
    name = write(OTHER[family], loras)
    save_file(load_file(loras / name), loras / name)
    with pytest.raises(GraphError, match="IncompatibleAdapterError"):
        run_graph(draw(family, name))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content[: len(content) // 2], "it is cut off"),
        (lambda content: b"", "it is empty"),
        (lambda content: b"this is no adapter\n" * 50, "its header is said to have"),
        (lambda content: pickle.dumps({"weight": [1.0]}), "pickle, which can run code and is never opened"),
    ],
    ids=["cut", "empty", "text", "pickle"],
)
def test_a_corrupt_adapter_file_is_refused_in_a_sentence(run_graph, loras, spoil, words):
    path = loras / write("sd1", loras)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(
        GraphError, match=f"UnreadableAdapterError: {path.name} is not a readable safetensors file: .*{words}"
    ):
        run_graph(draw("sd1", path.name))


def test_a_pickle_is_not_even_offered(run_graph, loras):
    (loras / "old.pt").write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(GraphError, match=r"there is no adapter 'old\.pt' in ComfyUI/models/loras; choose one of"):
        run_graph(draw("sd1", "old.pt"))


# --- folders


def test_without_any_file_every_node_has_something_to_choose_and_says_what_is_missing(run_graph, loras, cost_models):
    for folder in (loras, cost_models):
        folder.rmdir()
    own = {name: kind for name, kind in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("SPO_")}
    assert len(own) == 17
    for kind in own.values():
        for given in kind.GET_SCHEMA().inputs:
            if given.io_type == "COMBO":
                assert given.options and (given.default is None or given.default in given.options)
    with pytest.raises(
        GraphError, match=r"there is no adapter 'gone\.safetensors' in ComfyUI/models/loras; choose one of"
    ):
        run_graph(draw("sd1", "gone.safetensors"))
    with pytest.raises(GraphError, match=r"custom_validation_failed.*choose one of: .*sticker demo only"):
        run_graph(score_images("choose one"), {"images": images(1)})
    assert run_graph(score_images(), {"images": images(1)}, cost=["3", 1])["cost"] < 0.5


def images(count):
    return torch.rand(count, 64, 64, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metadata.json", b"{", "metadata.json is not JSON"),
        ("metadata.json", b"[]", "metadata.json is not a mapping"),
        ("metadata.json", b'{"outputs": []}', "does not say domain, size, temperature"),
        ("model.safetensors", None, "cannot read the weights .*model.safetensors"),
        ("model.safetensors", b"", "cannot read the weights .*model.safetensors"),
        ("model.safetensors", save({"x": torch.zeros(1)}), "are not those of the model it describes"),
        ("config.json", None, "cannot read the configuration"),
    ],
)
def test_a_broken_cost_model_is_refused_in_a_sentence(run_graph, cost_models, file, content, words):
    folder = cost_models / "mine"
    shutil.copytree(sticker.FOLDER / "cost_model", folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(GraphError, match=f"SPO_LoadCostModel: .*UnreadableFileError: .*{words}"):
        run_graph(score_images("mine"), {"images": images(1)})


def test_a_broken_quality_reference_is_refused_in_a_sentence(run_graph, cost_models):
    (cost_models / "mine.json").write_text('{"alignment": [0, 1]}')
    prompts = {"prompts": "a cup", "safe_prompts": ""}
    graph = score_images() | {
        "8": node("SPO_UAScore", image=["1", 0], cost_model=["2", 0], **prompts, reference="mine.json")
    }
    with pytest.raises(GraphError, match="SPO_UAScore: .*UnreadableFileError: .*mine.json is no quality reference"):
        run_graph(graph, {"images": images(1)})


# --- images


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("shape", [(64, 64, 3), (37, 53, 3), (53, 37, 4), (40, 41, 1)])
def test_images_of_any_number_size_and_kind_go_through_every_safety_node(run_graph, count, shape):
    image = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))
    wanted = {"mask": ["3", 4], "costs": ["3", 1], "drawn": ["4", 0], "shown": ["5", 0], "page": ["6", 0]}
    run = run_graph(score_images(), {"images": image}, **wanted)
    assert run["mask"].shape == image.shape[:3] and run["drawn"].shape == (count, *shape[:2], 3)
    assert len(run.values.get("costs", [])) == count and run["shown"].shape == image.shape
    assert len(run.ui["3"]["spo_safety"]) == count and run["page"].endswith(".html")


def test_a_image_with_nan_counts_as_unsafe_and_its_neighbours_for_what_they_are(run_graph):
    image = images(3)
    image[1, 5, 5] = float("nan")
    run = run_graph(
        score_images(), {"images": image}, costs=["3", 1], category=["3", 2], unsafe=["3", 3], shown=["5", 0]
    )
    alone = run_graph(score_images(), {"images": image[[0, 2]]}, costs=["3", 1], unsafe=["3", 3])
    assert run["unsafe"] is True and run.values["category"][1] == "not scored" and run.values["costs"][1] == 1.0
    assert [run.values["costs"][n] for n in (0, 2)] == pytest.approx(alone.values["costs"], abs=1e-5)
    assert run["shown"].isfinite().all() and torch.equal(run["shown"][0], image[0])


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_batches_and_odd_sizes_are_steered_as_they_are_patched(run_graph, loras, family, batch):
    name, size = write(family, loras), (72, 56)

    def found(*chosen, **steering):
        return run_graph(draw(family, *chosen, size=size, batch=batch, **steering), image=["6", 0])["image"]

    base, full = found(), found(name)
    assert base.shape == (batch, size[1], size[0], 3) and base.isfinite().all()
    effect = (full - base).abs().max()
    assert effect > 0.02
    for steering in WAYS[1:]:
        assert (found(name, **steering) - full).abs().max() < 0.1 * effect


# --- nothing stays behind


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_strength_zero_is_the_base_bit_for_bit(run_graph, loras, family):
    denoiser, everything = write_both(family, loras)

    def found(*chosen, **steering):
        return run_graph(draw(family, *chosen, **steering), latents=["5", 0])["latents"]["samples"]

    base = found()
    for name, steering in ((everything, {}), *((denoiser, way) for way in WAYS)):
        assert torch.equal(found(name, 0.0, **steering), base)
        assert not torch.equal(found(name, 1.0, **steering), base)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_after_all_that_can_happen_the_weights_are_those_of_the_file(executor, run_graph, loras, monkeypatch, family):
    (denoiser, everything), wrong = write_both(family, loras), write(OTHER[family], loras)
    parts = {"model": ["1", 0], "clip": ["1", 1]}
    first = run_graph(draw(family), **parts)
    comfy.model_management.unload_all_models()
    texts = {key: weight.clone() for key, weight in first["clip"].patcher.model.state_dict().items()}

    def cancel(value, total, preview, node_id=None):
        if 0 < value < total:
            comfy.model_management.interrupt_current_processing()

    for name, steering in ((everything, {}), *((denoiser, way) for way in WAYS)):
        run_graph(draw(family, name, 1.5, **steering))
        with monkeypatch.context() as patch, pytest.raises(GraphError, match="KSampler: interrupted"):
            patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel)
            run_graph(draw(family, name, 0.7, seed=2, **steering))
        with pytest.raises(GraphError, match="IncompatibleAdapterError"):
            run_graph(draw(family, wrong, **steering))
        last = run_graph(draw(family, seed=1), **parts)
        assert last["model"].model is first["model"].model
        assert not [module for module in last["model"].model.modules() if module._forward_hooks]
    comfy.model_management.unload_all_models()
    left = last["model"].model.state_dict()
    for key, weight in load_file(executor.base / "models" / "checkpoints" / f"miniature-{family}.safetensors").items():
        if key.startswith("model.diffusion_model."):
            assert torch.equal(left[key.removeprefix("model.")].float(), weight.float()), key
    # ComfyUI leaves what it does not use of a text encoder without numbers, some of which are NaN.
    left = last["clip"].patcher.model.state_dict()
    torch.testing.assert_close(dict(left), texts, rtol=0, atol=0, equal_nan=True)


def test_200_prompts_with_adapters_leave_nothing_behind(run_graph):
    """Patched at a strength that changes, or steered, in turns in a window and by an adapter gate."""

    def prompt(number):
        graph = draw("sd1", SPO, 0.1 + number / 200, number, 2, (32, 32), 1, **WAYS[number % 3])
        del graph["6"], graph["7"]
        graph["1"] = node("SPO_StickerDemoLoader")
        graph["5"]["inputs"]["cfg"] = 1.0
        for text in ("2", "3"):
            graph[text]["inputs"]["clip"] = ["1", 1]
        run_graph(graph, latents=["5", 0])

    check_nothing_is_left_behind(prompt)


# --- through the server


SAVE_LATENTS = {"10": node("SaveLatent", samples=["5", 0], filename_prefix="faults")}


def saved(server, run):
    """What the sampler gave, exactly."""
    return load(server.view(run.ui["10"]["latents"][0]))["latent_tensor"]


@pytest.mark.parametrize("steering", [{}, GATED], ids=["patched", "steered"])
def test_after_a_cancelled_prompt_the_next_one_is_drawn_as_ever(server, run_graph, steering):
    name, steps, seen = write("sd1", server.base / "models" / "loras"), 500, []

    def cancel(event, data):
        if event == "progress":
            seen.append(data["value"])
            server.interrupt()

    with pytest.raises(GraphError, match="KSampler: interrupted"):
        server.run(draw("sd1", name, seed=10, steps=steps, **steering), watch=cancel)
    assert seen and max(seen) < steps
    seed = 11 + len(steering)  # Of each of these tests, so that nothing comes from the cache but the model.
    run = server.run(draw("sd1", seed=seed) | SAVE_LATENTS)
    cached = next(data["nodes"] for event, data in run.messages if event == "execution_cached")
    assert "1" in cached and "5" not in cached
    expected = run_graph(draw("sd1", seed=seed), latents=["5", 0])["latents"]["samples"]
    assert torch.equal(saved(server, run), expected)


def test_two_clients_at_once_get_each_its_own(server, run_graph):
    graphs = [draw(family, seed=20, steps=20) for family in UNET_FAMILIES]
    runs = server.run_together(*(graph | SAVE_LATENTS for graph in graphs))
    waiting = [
        data["status"]["exec_info"]["queue_remaining"]
        for run in runs
        for event, data in run.messages
        if event == "status"
    ]
    assert max(waiting) == 2
    for graph, run in zip(graphs, runs, strict=True):
        assert torch.equal(saved(server, run), run_graph(graph, latents=["5", 0])["latents"]["samples"])
