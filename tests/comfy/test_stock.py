"""The harness itself: what the stock nodes make of the miniature models, in this process and through the server."""

from __future__ import annotations

import pytest
import torch
from miniature import UNET_FAMILIES
from running import GraphError, text_to_image


pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_the_executor_draws_with_a_miniature_checkpoint(run_graph, family):
    run = run_graph(text_to_image(family), image=["6", 0])
    assert run["image"].shape == (2, 64, 64, 3)
    assert run["image"].isfinite().all() and run["image"].std() > 0.01
    assert len(run.ui["7"]["images"]) == 2
    again = run_graph(text_to_image(family), image=["6", 0])
    other = run_graph(text_to_image(family, seed=1), image=["6", 0])
    assert torch.equal(run["image"], again["image"])
    assert not torch.equal(run["image"], other["image"])


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
    # ComfyUI leaves some out that follow each other quickly.
    assert steps == sorted(steps) and steps[-1] == 4


def test_the_server_knows_the_core_nodes(server):
    known = server.get("/object_info")
    assert {"LoraLoader", "KSampler", "TestRecord"} <= known.keys()
