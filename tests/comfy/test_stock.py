"""The harness itself: what the stock nodes make of the miniature models, in this process and through the server."""

from __future__ import annotations

import pytest
import torch
from miniature import UNET_FAMILIES
from running import GraphError


pytestmark = pytest.mark.comfy


def text_to_image(family: str, seed: int = 0) -> dict:
    """The stock graph, 64 by 64 pixels in four steps; node 6 gives the picture."""
    name = f"miniature-{family}.safetensors"
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a sunny street", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": 4,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_the_executor_draws_with_a_miniature_checkpoint(run_graph, family):
    run = run_graph(text_to_image(family), picture=["6", 0])
    assert run["picture"].shape == (2, 64, 64, 3)
    assert run["picture"].isfinite().all() and run["picture"].std() > 0.01
    assert len(run.ui["7"]["images"]) == 2
    again = run_graph(text_to_image(family), picture=["6", 0])
    other = run_graph(text_to_image(family, seed=1), picture=["6", 0])
    assert torch.equal(run["picture"], again["picture"])
    assert not torch.equal(run["picture"], other["picture"])


def test_a_graph_that_cannot_run_says_why(run_graph):
    prompt = text_to_image("sd1")
    prompt["1"]["inputs"]["ckpt_name"] = "absent.safetensors"
    with pytest.raises(GraphError, match=r"absent\.safetensors"):
        run_graph(prompt)
    prompt = text_to_image("sd1")
    prompt["2"]["inputs"]["clip"] = ["1", 2]
    with pytest.raises(GraphError, match="CLIP"):
        run_graph(prompt)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_the_server_draws_and_reports_its_progress(server, family):
    run = server.run(text_to_image(family))
    assert len(run.ui["7"]["images"]) == 2
    steps = [data["value"] for event, data in run.messages if event == "progress"]
    assert steps == [1, 2, 3, 4]


def test_the_server_knows_the_core_nodes(server):
    known = server.get("/object_info")
    assert {"LoraLoader", "KSampler", "TestRecord"} <= known.keys()
