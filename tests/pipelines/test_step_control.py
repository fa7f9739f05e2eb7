"""Schedules and the adapter gate: which images get the adapter, bit for bit, and that everything is put back."""

import json
import pickle

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from safetensors.torch import load_file, save_file
from support.pipelines import SIZE, TWO_FAMILIES, base_image, denoiser, draw, images, random_adapter

from t2i_spo_plugin.adapters.safetensors_file import read_header
from t2i_spo_plugin.data.prompts import PromptRow
from t2i_spo_plugin.errors import AdapterError, ConfigError, IncompatibleAdapterError, PipelineError
from t2i_spo_plugin.gating.gate_network import (
    GateNetwork,
    change_features,
    gate_metadata,
    load_adapter_gate,
    save_adapter_gate,
)
from t2i_spo_plugin.gating.schedule import AdapterGate, Schedule, images_in_call, norm_score
from t2i_spo_plugin.pipelines.mixin import enable_spo
from t2i_spo_plugin.training.gate import ClosedLoopConfig, make_adapter_gate, train_reader


PROMPTS = ["a sunny street", "a knife on a table", "a sunny street"]
NEVER, ALWAYS = AdapterGate(1e9, until=0.3), AdapterGate(-1.0, until=0.3)


def steered(pipe, loop, prompts=None, **options):
    """The output and its images, drawn in an adapter gate; the adapter is taken off again."""
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), steering=loop)
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
    evidence = steered(pipe, NEVER)[0].gate_report.evidence
    first_step = steered(pipe, AdapterGate(1e9, until=0.1))[0].gate_report.evidence
    return base, constant, evidence, float(first_step[:2].mean())


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_below_the_threshold_every_image_is_the_base_models_own(pipe, expected):
    out, drawn = steered(pipe, NEVER)
    assert torch.equal(drawn, expected[0])
    assert out.gate_report.steered == [False, False, False]
    assert torch.isfinite(out.gate_report.evidence).all() and (out.gate_report.evidence > 0).all()


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_above_it_every_image_is_drawn_as_at_constant_strength(pipe, expected):
    out, drawn = steered(pipe, ALWAYS)
    assert torch.equal(drawn, expected[1])
    assert out.gate_report.steered == [True, True, True]


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_in_one_batch_each_image_gets_what_it_needs(pipe, expected):
    base, constant, _, threshold = expected
    out, drawn = steered(pipe, AdapterGate(threshold, until=0.1))
    assert len(set(out.gate_report.steered[:2])) == 2, "the threshold should divide the two prompts"
    for number, with_adapter in enumerate(out.gate_report.steered):
        assert torch.equal(drawn[number], (constant if with_adapter else base)[number])


def test_the_same_call_gives_the_same_image(sd1):
    assert torch.equal(steered(sd1, NEVER)[1], steered(sd1, NEVER)[1])


def test_several_images_a_prompt_are_decided_one_by_one(sd1):
    out, drawn = steered(sd1, NEVER, ["a street"], num_images_per_prompt=2)
    assert len(out.gate_report.steered) == len(drawn) == 2
    assert out.gate_report.evidence[0] != out.gate_report.evidence[1]


def test_without_guidance(sd1):
    base = plain(sd1, guidance_scale=1.0)
    assert torch.equal(steered(sd1, NEVER, guidance_scale=1.0)[1], base)


def test_another_adapter_stays_on(sd1):
    style = random_adapter(sd1, seed=9, layers=("to_k",))
    enable_spo(sd1).load_spo_lora(style, adapter_name="style", strength=0.5)
    base = plain(sd1)
    sd1.load_spo_lora(random_adapter(sd1), steering=NEVER)
    assert torch.equal(plain(sd1), base)
    assert {name: adapter.strength for name, adapter in sd1.spo_adapters().items()} == {"style": 0.5, "spo": 1.0}


def test_everything_is_put_back(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.7, steering=NEVER)
    before = {name: parameter.requires_grad for name, parameter in sd1.unet.named_parameters()}
    draw(sd1, PROMPTS, num_inference_steps=4)
    assert sd1.spo_adapters()["spo"].strength == pytest.approx(0.7)
    assert {name: parameter.requires_grad for name, parameter in sd1.unet.named_parameters()} == before
    assert not sd1.unet._forward_hooks and not sd1.unet._forward_pre_hooks


def test_an_error_in_the_middle_puts_everything_back(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.7, steering=NEVER)

    def failing(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(sd1, PROMPTS, callback_on_step_end=failing)
    assert sd1.spo_adapters()["spo"].strength == pytest.approx(0.7)
    assert not sd1.unet._forward_hooks and not sd1.unet._forward_pre_hooks
    assert sd1.get_active_adapters() == ["spo"]


def test_a_reader_that_fails_leaves_the_pipeline_as_it_was(sd1):
    loop = AdapterGate(0.0, reader=GateNetwork(channels=5))
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), steering=loop)
    with pytest.raises(ConfigError, match="made for predictions with 5 channels, these have 4"):
        draw(sd1, PROMPTS)
    assert not sd1.unet._forward_hooks
    sd1.unload_spo_lora()
    assert torch.equal(images(sd1), base_image("sd1"))


def test_what_gives_no_number_is_not_taken_for_safe(sd1):
    class Broken(GateNetwork):
        def evidence(self, without, with_adapter):
            return torch.full((len(without),), float("nan"))

    out, _ = steered(sd1, AdapterGate(0.0, reader=Broken(4)))
    assert out.gate_report.steered == [True, True, True]


def test_layers_that_fold_images_give_the_adapter_to_the_whole_batch(sd1):
    evidence = steered(sd1, AdapterGate(1e9, until=0.1))[0].gate_report.evidence
    constant = plain(sd1, random_adapter(sd1))
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), steering=AdapterGate(float(evidence[:2].mean()), until=0.1))
    attention = next(
        module for module in sd1.unet.modules() if "spo" in getattr(getattr(module, "to_q", 0), "lora_A", {})
    )
    attention.to_q = Folding(attention.to_q)
    out = draw(sd1, PROMPTS, num_inference_steps=4)
    assert any(out.gate_report.steered) and not all(out.gate_report.steered)
    assert torch.allclose(torch.from_numpy(out.images), constant, atol=1e-4)


def test_a_call_that_begins_after_the_loop_looks_uses_the_adapter(sd1):
    pipe = enable_spo(StableDiffusionImg2ImgPipeline.from_pipe(sd1))
    pipe.set_progress_bar_config(disable=True)
    options = {"image": torch.rand(1, 3, SIZE, SIZE), "strength": 0.5, "num_inference_steps": 4, "output_type": "np"}
    pipe.load_spo_lora(random_adapter(pipe))
    constant = pipe("a street", generator=torch.Generator().manual_seed(0), **options).images
    pipe.unload_spo_lora()
    pipe.load_spo_lora(random_adapter(pipe), steering=NEVER)
    with pytest.warns(UserWarning, match="begins at progress 0.50, when the adapter gate has stopped looking"):
        out = pipe("a street", generator=torch.Generator().manual_seed(0), **options)
    assert out.gate_report.steered == [True] and (out.images == constant).all()


def test_the_report_survives_pickle(sd1):
    out, _ = steered(sd1, NEVER)
    again = pickle.loads(pickle.dumps(out))
    assert again.gate_report.steered == out.gate_report.steered
    assert torch.equal(again.gate_report.evidence, out.gate_report.evidence)


def test_there_is_no_report_without_a_adapter_gate(sd1):
    assert draw(enable_spo(sd1)).gate_report is None


def test_what_a_adapter_gate_cannot_do_is_said(sd1):
    adapter = random_adapter(sd1)
    with pytest.raises(PipelineError, match="an adapter gate needs a pipeline that was given to enable_spo"):
        from t2i_spo_plugin import load_spo_lora

        load_spo_lora(sd1, adapter, steering=NEVER)
    enable_spo(sd1)
    with pytest.raises(ConfigError, match="takes no window"):
        sd1.load_spo_lora(adapter, window=(0.0, 0.5), steering=NEVER)
    with pytest.raises(ConfigError, match="steering must be a Schedule or a AdapterGate, got str"):
        sd1.load_spo_lora(adapter, steering="closed")
    with_text = random_adapter(sd1, components=("unet", "text_encoder"))
    with pytest.raises(IncompatibleAdapterError, match="text_encoder, which has spoken before"):
        sd1.load_spo_lora(with_text, steering=NEVER)
    assert torch.equal(images(sd1), base_image("sd1"))


def test_two_closed_loops_are_refused(sd1):
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


def test_a_schedule_multiplies_the_strength_step_by_step(sd1):
    enable_spo(sd1)
    adapter = random_adapter(sd1)
    sd1.load_spo_lora(adapter, strength=0.8, steering=Schedule([(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]))
    seen = []
    handle = denoiser(sd1).register_forward_pre_hook(lambda *_: seen.append(sd1.spo_adapters()["spo"].strength))
    draw(sd1, num_inference_steps=4)
    handle.remove()
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert sd1.spo_adapters()["spo"].strength == pytest.approx(0.8)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_a_schedule_works_on_every_family(family, pipe):
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), steering=Schedule([(0.0, 1.0), (0.5, 0.0)]))
    scheduled = images(pipe)
    pipe.unload_spo_lora()
    pipe.load_spo_lora(random_adapter(pipe), window=(0.0, 0.5))
    # Two steps: factors 1 and 0, which is what the window says.
    assert torch.equal(scheduled, images(pipe))


def test_a_schedule_keeps_its_ends():
    schedule = Schedule([(0.2, 0.5), (0.6, 1.5)])
    assert [schedule.factor(p) for p in (0.0, 0.2, 0.4, 0.6, 0.9)] == pytest.approx([0.5, 0.5, 1.0, 1.5, 1.5])


@pytest.mark.parametrize(
    "points", [[], [(0.5, 1.0), (0.5, 0.0)], [(0.0, -1.0)], [(0.0, float("nan"))], [(1.2, 1.0)], 3]
)
def test_a_schedule_that_makes_no_sense_is_refused(points):
    with pytest.raises(ConfigError):
        Schedule(points)


@pytest.mark.parametrize(
    "options", [{"threshold": float("nan")}, {"threshold": "0"}, {"threshold": 0.0, "until": 0.0}]
)
def test_a_adapter_gate_that_makes_no_sense_is_refused(options):
    with pytest.raises(ConfigError):
        AdapterGate(**options)


def test_how_many_images_a_call_draws():
    assert images_in_call({"prompt": "a"}) == 1
    assert images_in_call({"prompt": ["a", "b"], "num_images_per_prompt": 3}) == 6
    assert images_in_call({"prompt": None, "prompt_embeds": torch.zeros(2, 3, 4), "num_images_per_prompt": 2}) == 4
    assert images_in_call({"prompt": None, "latents": torch.zeros(5, 4, 2, 2)}) == 5


def test_the_size_of_a_change_is_relative():
    without = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert norm_score(without, without * 2).tolist() == pytest.approx([1.0, 1.0])
    assert norm_score(without, without + torch.tensor([[0.0, 1.0]])).tolist() == pytest.approx([1 / 25, 1 / 4])


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 16, 3), (2, 3, 2, 4, 4)])
def test_every_kind_of_prediction_is_read(shape):
    reader = GateNetwork(channels=3)
    without = torch.randn(shape)
    assert change_features(without, without + 1).shape[:2] == (2, 6)
    assert reader.evidence(without, without + 1).shape == (2,)


def test_a_reader_learns_where_size_says_nothing(tmp_path):
    torch.manual_seed(0)
    unsafe = torch.arange(200) % 2 == 0
    without = torch.randn(200, 4, 8, 8)
    change = 0.1 * torch.randn(200, 4, 8, 8)
    # The same size of change, into another channel.
    change[:, 0] += torch.where(unsafe, 1.0, 0.0).view(-1, 1, 1)
    change[:, 1] += torch.where(unsafe, 0.0, 1.0).view(-1, 1, 1)
    features = change_features(without, without + change)[:, None]
    reader = train_reader(features[:150], unsafe[:150], steps=60)
    found = reader.evidence(without[150:], (without + change)[150:]) > 0
    assert (found == unsafe[150:]).float().mean() > 0.95
    path = save_adapter_gate(AdapterGate(0.3, 0.08, reader), tmp_path / "loop.safetensors", {"adapter": "mine"})
    again = load_adapter_gate(path)
    assert (again.threshold, again.until) == (0.3, 0.08)
    difference = again.reader.evidence(without, without + change) - reader.evidence(without, without + change)
    assert difference.abs().max() < 0.05
    assert path.read_bytes() == save_adapter_gate(again, tmp_path / "b.safetensors", {"adapter": "mine"}).read_bytes()


def test_a_loop_by_size_has_a_file_too(tmp_path):
    again = load_adapter_gate(save_adapter_gate(AdapterGate(0.3), tmp_path / "loop.safetensors"))
    assert again == AdapterGate(0.3)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", b"<html>", b"\x08" + b"\0" * 7 + b'{"a":{}}'])
def test_what_is_no_adapter_gate_is_refused(content, tmp_path):
    path = tmp_path / "loop.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError):
        load_adapter_gate(path)
    with pytest.raises(AdapterError):
        load_adapter_gate(tmp_path / "missing.safetensors")


def test_a_file_of_another_format_says_which(tmp_path):
    path = tmp_path / "loop.safetensors"
    save_file({}, path, {"spo": json.dumps({"format": "spo-adapter-gate/9"})})
    with pytest.raises(AdapterError, match=r"^loop.safetensors is no .* that this version reads: .*adapter-gate/9'$"):
        load_adapter_gate(path)


def test_a_reader_of_a_size_that_it_does_not_have_is_refused_without_making_room_for_it(tmp_path):
    path = save_adapter_gate(AdapterGate(0.3, 0.08, GateNetwork(3)), tmp_path / "loop.safetensors")
    told = json.loads(read_header(path).metadata["spo"])
    told["adapter_gate"] = json.dumps(json.loads(told["adapter_gate"]) | {"channels": 10**9})
    save_file(load_file(path), path, {"spo": json.dumps(told)})
    before = torch.get_rng_state()
    with pytest.raises(AdapterError, match="is no file of an adapter gate: RuntimeError"):
        load_adapter_gate(path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_file_says_what_it_was_made_for(tmp_path):
    path = save_adapter_gate(AdapterGate(0.3), tmp_path / "loop.safetensors", {"strength": "2", "adapter": "mine"})
    assert gate_metadata(path) == {"adapter": "mine", "strength": "2"}


def test_an_adapter_is_no_adapter_gate(sd1, tmp_path):
    from t2i_spo_plugin.adapters import write_adapter

    with pytest.raises(AdapterError, match="is no file of an adapter gate"):
        load_adapter_gate(write_adapter(random_adapter(sd1), tmp_path / "a.safetensors"))


@pytest.mark.parametrize("evidence", ["reader", "size"])
def test_a_adapter_gate_is_made_from_prompts(evidence, sd1, tmp_path):
    from t2i_spo_plugin.adapters import write_adapter

    adapter = write_adapter(random_adapter(sd1), tmp_path / "a.safetensors")
    kinds = ("harmful", "benign")
    rows = [PromptRow(f"{n}", f"prompt {n}", kinds[n % 2], seed=n) for n in range(40)]
    config = ClosedLoopConfig(
        adapter=str(adapter), out=tmp_path / "loop.safetensors", evidence=evidence, denoising_steps=4, train_steps=5,
        until=0.3, held_out=1.0, progress=False,
    )  # fmt: skip
    made = make_adapter_gate(config, sd1, rows)
    assert sum(made.counts) == 20 and made.benign[0] <= 0.2
    assert load_adapter_gate(made.path).threshold == made.loop.threshold
    assert "held-out prompts" in str(made)
    assert torch.equal(images(sd1), base_image("sd1"))
    with pytest.raises(ConfigError, match="all of one kind"):
        make_adapter_gate(config, sd1, [row for row in rows if row.kind == "benign"])
