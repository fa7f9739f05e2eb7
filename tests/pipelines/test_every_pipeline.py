"""What holds in every pipeline, however it counts its steps and orders its batch: windows and the adapter gate."""

import ast
import inspect
import textwrap

import diffusers
import pytest
import torch
from support.guided_pipelines import CASES, build, call
from support.long_tail import embeddings
from support.pipelines import denoiser, random_adapter

from t2i_spo_plugin.errors import PipelineError
from t2i_spo_plugin.gating import AdapterGate, Schedule
from t2i_spo_plugin.pipelines.mixin import enable_spo


FIRST_STEP = AdapterGate(1e9, until=0.1)


@pytest.fixture(params=CASES)
def tiny(request):
    """A tiny pipeline that is enabled, and the options of a call."""
    pipe, options = build(request.param)
    return enable_spo(pipe), options


def strengths_by_step(pipe, options):
    """The strength in force in each of four steps."""
    seen = []
    handle = denoiser(pipe).register_forward_pre_hook(lambda *_: seen.append(pipe.spo_adapters()["spo"].strength))
    call(pipe, options)
    handle.remove()
    calls = len(seen) // 4
    assert len(seen) == 4 * calls and all(
        seen[i * calls] == seen[i * calls + j] for i in range(4) for j in range(calls)
    )
    return seen[::calls]


@pytest.mark.parametrize(("window", "expected"), [((0.0, 0.25), [1, 0, 0, 0]), ((0.25, 0.75), [0, 1, 1, 0])])
def test_a_window_counts_steps(tiny, window, expected):
    pipe, options = tiny
    pipe.load_spo_lora(random_adapter(pipe), window=window)
    assert strengths_by_step(pipe, options) == expected


def gate_scores(pipe, options, **more):
    return call(pipe, options, **more).gate_report.scores


def other(options, prefix=""):
    """The prompt, or the negative one (`prefix`), exchanged for another."""
    if "prompt" in options:
        return {f"{prefix}prompt": ["a red house", "two dogs"]}
    name = next(key for key in options if key.startswith(f"{prefix}prompt_embeds"))
    given = options[name]
    in_pieces = isinstance(given[0], list)
    exchanged = embeddings((given[0][0] if in_pieces else given[0]).shape[-1], seed=7)
    if isinstance(given, torch.Tensor):
        return {name: exchanged}
    return {name: [[one] for one in exchanged] if in_pieces else list(exchanged)}


def test_the_gate_scores_the_prompt_and_not_the_negative_prompt(tiny):
    pipe, options = tiny
    pipe.load_spo_lora(random_adapter(pipe), steering=FIRST_STEP)
    scores = gate_scores(pipe, options)
    assert torch.isfinite(scores).all() and scores[0] != scores[1]
    assert torch.allclose(gate_scores(pipe, options, **other(options, "negative_")), scores, rtol=1e-4)
    assert not torch.allclose(gate_scores(pipe, options, **other(options)), scores, rtol=1e-3)


def test_each_image_of_a_batch_is_gated_by_its_own_prompt(tiny):
    pipe, options = tiny
    pipe.load_spo_lora(random_adapter(pipe), steering=FIRST_STEP)
    scores = gate_scores(pipe, options)
    base = call(pipe, options)[0]
    pipe.unload_spo_lora()
    pipe.load_spo_lora(random_adapter(pipe))
    constant = call(pipe, options)[0]
    pipe.unload_spo_lora()
    pipe.load_spo_lora(random_adapter(pipe), steering=AdapterGate(float(scores.mean()), until=0.1))
    out = call(pipe, options)
    assert out.gate_report.gated_on == (scores >= scores.mean()).tolist()
    # Perturbed guidance gives layers a part of the batch only; there the whole batch gets the adapter.
    whole = "PAG" in type(pipe).__name__
    for number, gated_on in enumerate(out.gate_report.gated_on):
        gated_on = gated_on or whole
        assert torch.allclose(out[0][number], (constant if gated_on else base)[number], atol=1e-4)


def test_a_batch_whose_order_cannot_be_told_is_refused(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.7, steering=FIRST_STEP)

    def double(unet, args, kwargs):
        return args, kwargs | {"encoder_hidden_states": 2 * kwargs["encoder_hidden_states"]}

    handle = sd1.unet.register_forward_pre_hook(double, with_kwargs=True)
    with pytest.raises(PipelineError, match="cannot tell which rows of StableDiffusionPipeline's batch"):
        sd1("a street", num_inference_steps=2, height=16, width=16)
    handle.remove()
    assert sd1.spo_adapters()["spo"].strength == pytest.approx(0.7)
    assert "encode_prompt" not in vars(sd1) and not sd1.unet._forward_hooks


@pytest.mark.slow
@pytest.mark.upstream
def test_every_pipeline_encodes_the_prompt_before_the_negative_prompt():
    seen = 0
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        # A pipeline whose libraries are missing has no such attributes.
        encode = vars(kind).get("encode_prompt") if isinstance(kind, type) else None
        if encode is None or not getattr(kind, "_lora_loadable_modules", None):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(encode)))):
            if isinstance(node, ast.Return) and node.value is not None:
                first = node.value.elts[0] if isinstance(node.value, ast.Tuple) else node.value
                assert "negative" not in ast.unparse(first), name
                seen += 1
    assert seen > 100


CACHES = {
    "FirstBlockCache": {"threshold": 0.1},
    "PyramidAttentionBroadcast": {
        "spatial_attention_block_skip_range": 2,
        "current_timestep_callback": lambda: 500,
        "spatial_attention_block_identifiers": ["transformer_blocks"],
    },
    "TaylorSeerCache": {},
    "MagCache": {"num_inference_steps": 4, "mag_ratios": [1.0] * 4},
}


@pytest.mark.parametrize("cache", CACHES)
def test_what_changes_strength_between_steps_is_refused_beside_a_step_cache(cache):
    config = getattr(diffusers, f"{cache}Config", None)
    if config is None:
        pytest.skip("this diffusers has no such cache")
    pipe, options = build("qwen_image")
    enable_spo(pipe).load_spo_lora(random_adapter(pipe))
    pipe.transformer.enable_cache(config(**CACHES[cache]))
    call(pipe, options)
    for steered in (
        {"window": (0.0, 0.5)},
        {"steering": Schedule([(0.0, 1.0), (1.0, 0.0)])},
        {"steering": FIRST_STEP},
    ):
        pipe.unload_spo_lora()
        pipe.load_spo_lora(random_adapter(pipe), **steered)
        with pytest.raises(PipelineError, match=r"pipe\.transformer\.disable_cache\(\)"):
            call(pipe, options)
    pipe.transformer.disable_cache()
    assert call(pipe, options).gate_report.gated_on == [False, False]
