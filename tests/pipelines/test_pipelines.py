"""Pipelines of other kinds: two denoisers, v-prediction, modular, and every class that diffusers has."""

import inspect
import itertools

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    ModularPipeline,
    StableDiffusionXLAutoBlocks,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from support.pipelines import SIZE, draw, fresh, images, random_adapter, t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, UMT5Config, UMT5EncoderModel

from t2i_spo_plugin.adapters import read_adapter, write_adapter
from t2i_spo_plugin.errors import IncompatibleAdapterError, PipelineError
from t2i_spo_plugin.gating import AdapterGate, GateNetwork
from t2i_spo_plugin.pipelines.architecture import architecture_of, prediction_type_of
from t2i_spo_plugin.pipelines.loading import spo_adapters
from t2i_spo_plugin.pipelines.lora_layers import strengths_in_force
from t2i_spo_plugin.pipelines.mixin import SPOLoraLoaderMixin, enable_spo, spo_pipeline_class


# Two denoisers


@pytest.fixture
def wan():
    """A tiny Wan 2.2 pipeline: `transformer` draws the first half of the steps, `transformer_2` the second."""

    def transformer():
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ).eval()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = t5_tokenizer()
        config = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
        pipe = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(config).eval(),
            vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            transformer=transformer(),
            transformer_2=transformer(),
            boundary_ratio=0.5,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe):
    options = {"num_frames": 1, "max_sequence_length": 16, "num_inference_steps": 4}
    return torch.from_numpy(draw(pipe, **options).frames)


def test_an_adapter_of_two_denoisers_changes_both(wan, tmp_path):
    base = frames(wan)
    both = ("transformer", "transformer_2")
    path = write_adapter(random_adapter(wan, components=both), tmp_path / "a.safetensors")
    assert {name.partition(".")[0] for name in read_adapter(path).modules} == set(both)
    record = enable_spo(wan).load_spo_lora(path)
    assert record.components == both and architecture_of(wan) == "wan"
    drawn = frames(wan)
    only = {}
    for name in both:
        wan.set_spo_strength({other: float(other == name) for other in both})
        assert set(strengths_in_force(getattr(wan, name), "spo").values()) == {1.0}
        only[name] = frames(wan)
    different = [base, drawn, *only.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(different, 2))
    wan.set_spo_strength(0.0)
    assert torch.equal(frames(wan), base)
    wan.unload_spo_lora()
    assert torch.equal(frames(wan), base)


def test_a_window_spans_two_denoisers(wan):
    enable_spo(wan).load_spo_lora(random_adapter(wan, components=("transformer_2",)))
    second = frames(wan)
    wan.unload_spo_lora()
    wan.load_spo_lora(random_adapter(wan, components=("transformer", "transformer_2")), window=(0.0, 0.25))
    early = frames(wan)
    wan.unload_spo_lora()
    assert not torch.equal(early, second) and not torch.equal(early, frames(wan))


def test_an_adapter_gate_works_over_two_denoisers(wan):
    both = random_adapter(wan, components=("transformer", "transformer_2"))
    options = {"num_frames": 1, "max_sequence_length": 16, "num_inference_steps": 4}
    prompts = ["a sunny street", "a knife on a table"]

    def film(threshold, adapter=both):
        enable_spo(wan).load_spo_lora(adapter, steering=AdapterGate(threshold, until=0.2))
        out = draw(wan, prompts, **options)
        wan.unload_spo_lora()
        return out.gate_report, torch.from_numpy(out.frames)

    base = torch.from_numpy(draw(wan, prompts, **options).frames)
    report, drawn = film(1e9)
    assert report.gated_on == [False, False] and torch.equal(drawn, base)
    report, drawn = film(float(report.scores.mean()))
    assert sorted(report.gated_on) == [False, True] and not torch.equal(drawn, base)
    # An adapter of the later denoiser alone is never scored, and so always on.
    report, _ = film(1e9, random_adapter(wan, components=("transformer_2",)))
    assert report.gated_on == [True, True]


def test_where_guidance_takes_two_calls_the_prompts_own_is_scored(wan):
    scored, outputs = [], []

    class Recorder(GateNetwork):
        def score(self, without, with_adapter):
            scored.append(without)
            return torch.full((len(without),), -1.0)

    handle = wan.transformer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    gate = AdapterGate(0.0, until=0.25, network=Recorder(16))
    enable_spo(wan).load_spo_lora(random_adapter(wan, components=("transformer",)), steering=gate)
    draw(wan, num_frames=1, max_sequence_length=16, num_inference_steps=4)
    handle.remove()
    assert len(scored) == 1 and torch.equal(scored[0], outputs[0])


# Stable Diffusion 2


@pytest.fixture
def sd2():
    """A tiny pipeline of the second Stable Diffusion: a wider text encoder, and velocities instead of noise."""
    pipe = fresh("sd1", prediction_type="v_prediction")
    text = pipe.text_encoder.config.to_dict() | {"hidden_size": 1024, "num_hidden_layers": 1}
    unet = dict(pipe.unet.config) | {"cross_attention_dim": 1024, "use_linear_projection": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.register_modules(
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)).eval(),
            unet=UNet2DConditionModel.from_config(unet).eval(),
        )
    return pipe


def test_stable_diffusion_2_takes_adapters_for_its_own_prediction_type(sd1, sd2, tmp_path):
    assert (architecture_of(sd2), prediction_type_of(sd2)) == ("stable-diffusion-v2", "v_prediction")
    base = images(sd2)
    path = write_adapter(random_adapter(sd2), tmp_path / "a.safetensors")
    enable_spo(sd2).load_spo_lora(path, strength=0.5)
    assert not torch.equal(images(sd2), base)
    sd2.unload_spo_lora()
    assert torch.equal(images(sd2), base)
    with pytest.raises(IncompatibleAdapterError, match="was made for stable-diffusion-v2"):
        enable_spo(sd1).load_spo_lora(path)
    of_sd1 = write_adapter(random_adapter(sd1), tmp_path / "b.safetensors")
    with pytest.raises(IncompatibleAdapterError, match="predicts epsilon, this one predicts v_prediction"):
        enable_spo(fresh("sd1", prediction_type="v_prediction")).load_spo_lora(of_sd1)


# Modular


@pytest.fixture
def modular():
    """A tiny modular pipeline with the models of the tiny SDXL pipeline."""
    base = fresh("sdxl")
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    names = set(pipe.components) | {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    pipe.update_components(**{name: part for name, part in base.components.items() if name in names and part})
    return pipe


def modular_image(pipe):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "np", "output": "images"}
    return torch.from_numpy(pipe(prompt="a sunny street", generator=generator, **options))


def test_a_modular_pipeline_loads_scales_and_unloads_adapters(modular):
    assert isinstance(modular, ModularPipeline)
    base = modular_image(modular)
    assert enable_spo(modular) is modular
    modular.load_spo_lora(random_adapter(modular), strength={"unet.mid_block": 0.5})
    drawn = modular_image(modular)
    assert not torch.equal(drawn, base)
    assert modular.spo_adapters()["spo"].blocks == {"unet.mid_block": 0.5}
    with pytest.raises(PipelineError, match="a window needs a pipeline that .* calls callback_on_step_end"):
        modular.load_spo_lora(random_adapter(modular), adapter_name="windowed", window=(0.0, 0.5))
    modular.load_spo_lora(random_adapter(modular, seed=3), hotswap=True)
    assert not torch.equal(modular_image(modular), drawn)
    modular.unload_spo_lora()
    assert spo_adapters(modular) == {} and torch.equal(modular_image(modular), base)


# Every class of diffusers


def pipeline_classes():
    found = {}
    for name in dir(diffusers):
        if "Pipeline" in name and not name.endswith(("Output", "Mixin", "Blocks", "Legacy")):
            kind = getattr(diffusers, name)
            if inspect.isclass(kind) and not getattr(kind, "_backends", None):
                found[name] = kind
    return found


def test_every_pipeline_that_can_load_a_lora_gets_a_twin_and_every_other_a_type_error():
    twins = {}
    for name, base in pipeline_classes().items():
        if getattr(base, "_lora_loadable_modules", None):
            twin = twins[name] = spo_pipeline_class(base)
            assert issubclass(twin, (SPOLoraLoaderMixin, base)) and twin is not base, name
            assert (twin.__name__, twin.__module__) == (base.__name__, base.__module__), name
            assert twin._lora_loadable_modules == base._lora_loadable_modules, name
        else:
            with pytest.raises(PipelineError, match="cannot load a LoRA"):
                spo_pipeline_class(base)
    able = [kind for kind in pipeline_classes().values() if hasattr(kind, "load_lora_weights")]
    assert len(twins) == len(able) > 100
    assert len(pipeline_classes()) - len(twins) > 50
