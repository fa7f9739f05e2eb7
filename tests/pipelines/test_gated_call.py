"""The adapter gate in pipelines: which images get the adapter, bit for bit, and that everything is put back."""

import pickle

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from support.pipelines import SIZE, TWO_FAMILIES, base_image, denoiser, draw, images, random_adapter

from t2i_spo_plugin.errors import ConfigError, PipelineError
from t2i_spo_plugin.gating import AdapterGate, GateNetwork
from t2i_spo_plugin.pipelines.gated_call import images_in_call
from t2i_spo_plugin.pipelines.mixin import enable_spo


PROMPTS = ["a sunny street", "a knife on a table", "a sunny street"]
NEVER, ALWAYS = AdapterGate(1e9, until=0.3), AdapterGate(-1.0, until=0.3)


def gated(pipe, gate, prompts=None, **options):
    """The output and its images, generated with an adapter gate; the adapter is taken off again."""
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), steering=gate)
    out = draw(pipe, prompts or PROMPTS, num_inference_steps=4, **options)
    pipe.unload_spo_lora()
    return out, torch.from_numpy(out.images)


def plain(pipe, adapter=None, **options):
    if adapter is not None:
        enable_spo(pipe).load_spo_lora(adapter)
    drawn = images(pipe, prompt=PROMPTS, num_inference_steps=4, **options)
    if adapter is not None:
        pipe.unload_spo_lora()
    return drawn


class Scripted(GateNetwork):
    """A gate network whose scores are given, one list a step."""

    def __init__(self, *steps):
        super().__init__(channels=4)
        self.steps = list(steps)

    def score(self, without, with_adapter):
        return torch.tensor(self.steps.pop(0))


class Folding(torch.nn.Module):
    """Puts rows into one another before its layer, as models of frames do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.fixture
def expected(family, pipe):
    """Base images, images with the adapter, and a threshold that divides the prompts."""
    base, constant = plain(pipe), plain(pipe, random_adapter(pipe))
    scores = gated(pipe, NEVER)[0].gate_report.scores
    first_step = gated(pipe, AdapterGate(1e9, until=0.1))[0].gate_report.scores
    return base, constant, scores, float(first_step[:2].mean())


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_images_below_the_threshold_are_the_base_models_own(pipe, expected):
    out, drawn = gated(pipe, NEVER)
    assert torch.equal(drawn, expected[0])
    assert out.gate_report.gated_on == [False, False, False]
    assert torch.isfinite(out.gate_report.scores).all() and (out.gate_report.scores > 0).all()


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_images_above_the_threshold_are_those_of_constant_strength(pipe, expected):
    out, drawn = gated(pipe, ALWAYS)
    assert torch.equal(drawn, expected[1])
    assert out.gate_report.gated_on == [True, True, True]


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_images_of_one_batch_are_gated_one_by_one(pipe, expected):
    base, constant, _, threshold = expected
    out, drawn = gated(pipe, AdapterGate(threshold, until=0.1))
    assert len(set(out.gate_report.gated_on[:2])) == 2, "the threshold should divide the two prompts"
    for number, with_adapter in enumerate(out.gate_report.gated_on):
        assert torch.equal(drawn[number], (constant if with_adapter else base)[number])


def test_a_gated_call_gives_the_same_image_again(sd1):
    assert torch.equal(gated(sd1, NEVER)[1], gated(sd1, NEVER)[1])


def test_several_images_a_prompt_are_gated_one_by_one(sd1):
    out, drawn = gated(sd1, NEVER, ["a street"], num_images_per_prompt=2)
    assert len(out.gate_report.gated_on) == len(drawn) == 2
    assert out.gate_report.scores[0] != out.gate_report.scores[1]


def test_a_gated_call_without_guidance_is_the_base_models_own(sd1):
    base = plain(sd1, guidance_scale=1.0)
    assert torch.equal(gated(sd1, NEVER, guidance_scale=1.0)[1], base)


def test_another_adapter_stays_on_beside_a_gated_one(sd1):
    style = random_adapter(sd1, seed=9, layers=("to_k",))
    enable_spo(sd1).load_spo_lora(style, adapter_name="style", strength=0.5)
    base = plain(sd1)
    sd1.load_spo_lora(random_adapter(sd1), steering=NEVER)
    assert torch.equal(plain(sd1), base)
    assert {name: adapter.strength for name, adapter in sd1.spo_adapters().items()} == {"style": 0.5, "spo": 1.0}


def test_a_gated_call_puts_everything_back(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.7, steering=NEVER)
    before = {name: parameter.requires_grad for name, parameter in sd1.unet.named_parameters()}
    draw(sd1, PROMPTS, num_inference_steps=4)
    assert sd1.spo_adapters()["spo"].strength == pytest.approx(0.7)
    assert {name: parameter.requires_grad for name, parameter in sd1.unet.named_parameters()} == before
    assert not sd1.unet._forward_hooks and not sd1.unet._forward_pre_hooks


def test_an_error_in_a_gated_call_puts_everything_back(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.7, steering=NEVER)

    def failing(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(sd1, PROMPTS, callback_on_step_end=failing)
    assert sd1.spo_adapters()["spo"].strength == pytest.approx(0.7)
    assert not sd1.unet._forward_hooks and not sd1.unet._forward_pre_hooks
    assert sd1.get_active_adapters() == ["spo"]


def test_a_gate_network_that_fails_leaves_the_pipeline_as_it_was(sd1):
    gate = AdapterGate(0.0, network=GateNetwork(channels=5))
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), steering=gate)
    with pytest.raises(ConfigError, match="made for predictions with 5 channels, these have 4"):
        draw(sd1, PROMPTS)
    assert not sd1.unet._forward_hooks
    sd1.unload_spo_lora()
    assert torch.equal(images(sd1), base_image("sd1"))


def test_an_image_whose_score_is_nan_is_generated_with_the_adapter_and_the_others_are_the_base_models_own(sd1):
    base, constant = plain(sd1), plain(sd1, random_adapter(sd1))
    out, drawn = gated(sd1, AdapterGate(0.0, until=0.1, network=Scripted([-1.0, float("nan"), -1.0])))
    assert out.gate_report.gated_on == [False, True, False]
    assert torch.equal(drawn[1], constant[1]) and not torch.equal(drawn[1], base[1])
    assert torch.equal(drawn[[0, 2]], base[[0, 2]])


def test_an_image_whose_score_is_exactly_the_threshold_is_generated_with_the_adapter(sd1):
    base, constant = plain(sd1), plain(sd1, random_adapter(sd1))
    scores = gated(sd1, AdapterGate(1e9, until=0.1))[0].gate_report.scores
    out, drawn = gated(sd1, AdapterGate(float(scores[1]), until=0.1))
    assert out.gate_report.gated_on == (scores >= scores[1]).tolist() and out.gate_report.gated_on[1]
    for number, with_adapter in enumerate(out.gate_report.gated_on):
        assert torch.equal(drawn[number], (constant if with_adapter else base)[number])


def test_an_image_gated_on_in_one_step_has_the_adapter_in_every_later_one(sd1):
    first, nothing = [-1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]
    constant = plain(sd1, random_adapter(sd1))
    out, drawn = gated(sd1, AdapterGate(0.0, until=1.0, network=Scripted(first, nothing, nothing, nothing)))
    assert out.gate_report.gated_on == [False, True, False]
    assert torch.equal(drawn[1], constant[1])


@pytest.mark.parametrize(("until", "second_runs"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_the_denoiser_runs_twice_in_the_steps_of_the_decision_window_alone(sd1, until, second_runs):
    calls = []
    handle = denoiser(sd1).register_forward_hook(lambda *_: calls.append(1))
    gated(sd1, AdapterGate(1e9, until=until))
    handle.remove()
    assert len(calls) == 4 + second_runs


def test_layers_that_fold_images_give_the_adapter_to_the_whole_batch(sd1):
    scores = gated(sd1, AdapterGate(1e9, until=0.1))[0].gate_report.scores
    constant = plain(sd1, random_adapter(sd1))
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), steering=AdapterGate(float(scores[:2].mean()), until=0.1))
    attention = next(
        module for module in sd1.unet.modules() if "spo" in getattr(getattr(module, "to_q", 0), "lora_A", {})
    )
    attention.to_q = Folding(attention.to_q)
    out = draw(sd1, PROMPTS, num_inference_steps=4)
    assert any(out.gate_report.gated_on) and not all(out.gate_report.gated_on)
    assert torch.allclose(torch.from_numpy(out.images), constant, atol=1e-4)


def test_a_call_that_begins_after_the_decision_window_uses_the_adapter(sd1):
    pipe = enable_spo(StableDiffusionImg2ImgPipeline.from_pipe(sd1))
    pipe.set_progress_bar_config(disable=True)
    options = {"image": torch.rand(1, 3, SIZE, SIZE), "strength": 0.5, "num_inference_steps": 4, "output_type": "np"}
    pipe.load_spo_lora(random_adapter(pipe))
    constant = pipe("a street", generator=torch.Generator().manual_seed(0), **options).images
    pipe.unload_spo_lora()
    pipe.load_spo_lora(random_adapter(pipe), steering=NEVER)
    with pytest.warns(UserWarning, match="begins at progress 0.50, after the adapter gate's decision window"):
        out = pipe("a street", generator=torch.Generator().manual_seed(0), **options)
    assert out.gate_report.gated_on == [True] and (out.images == constant).all()


def test_a_gate_report_survives_pickle(sd1):
    out, _ = gated(sd1, NEVER)
    again = pickle.loads(pickle.dumps(out))
    assert again.gate_report.gated_on == out.gate_report.gated_on
    assert torch.equal(again.gate_report.scores, out.gate_report.scores)


def test_an_output_without_adapter_gate_has_no_gate_report(sd1):
    assert draw(enable_spo(sd1)).gate_report is None


def test_two_adapter_gates_are_refused(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), steering=NEVER)
    sd1.load_spo_lora(random_adapter(sd1, seed=1), adapter_name="second", steering=NEVER)
    with pytest.raises(PipelineError, match="only one adapter .* these are: spo, second"):
        draw(sd1)
    assert not sd1.unet._forward_hooks


def test_a_compiled_denoiser_is_refused_with_the_cure(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), steering=NEVER)
    sd1.unet.compile(backend="eager")
    with pytest.raises(PipelineError, match=r"compile_repeated_blocks\(\)"):
        draw(sd1)


def test_images_in_call_counts_prompts_and_images_a_prompt():
    assert images_in_call({"prompt": "a"}) == 1
    assert images_in_call({"prompt": ["a", "b"], "num_images_per_prompt": 3}) == 6
    assert images_in_call({"prompt": None, "prompt_embeds": torch.zeros(2, 3, 4), "num_images_per_prompt": 2}) == 4
    assert images_in_call({"prompt": None, "latents": torch.zeros(5, 4, 2, 2)}) == 5
