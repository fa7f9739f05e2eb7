import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from diffusers.callbacks import PipelineCallback
from peft import LoraConfig
from support import guided_pipelines
from support.cost_models import ColourCost, colour_policy
from support.pipelines import SIZE, base_image, draw, fresh, images, random_adapter

from t2i_spo_plugin.errors import AdapterError, ConfigError, DomainError, NotScoredError, PipelineError
from t2i_spo_plugin.gating.schedule import in_window
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.pipelines.mixin import SPOLoraLoaderMixin, enable_spo, spo_pipeline_class
from t2i_spo_plugin.pipelines.step_control import first_progress


@pytest.fixture
def guard():
    return Guard(ColourCost(gain=50.0), colour_policy())


def strengths(pipe, **options):
    """The strength in force in every step of a call, as the layers have it."""
    seen = [pipe.spo_adapters()["spo"].strength]
    layer = next(module for module in pipe.unet.modules() if "spo" in getattr(module, "lora_A", {}))
    forward = layer.forward

    def watched(*args, **kwargs):
        seen.append(pipe.spo_adapters()["spo"].strength)
        return forward(*args, **kwargs)

    layer.forward = watched
    try:
        draw(pipe, **options)
    finally:
        del layer.forward
    return seen[1:]


# The twin class


def test_an_enabled_pipeline_is_what_it_was(family, pipe):
    base, signature = type(pipe), inspect.signature(pipe.__call__)
    assert enable_spo(pipe) is pipe
    assert isinstance(pipe, base) and isinstance(pipe, SPOLoraLoaderMixin)
    assert type(pipe).__mro__[1:3] == (SPOLoraLoaderMixin, base)
    assert (type(pipe).__name__, type(pipe).__module__) == (base.__name__, base.__module__)
    assert inspect.signature(pipe.__call__) == signature
    assert type(pipe) is spo_pipeline_class(base) is spo_pipeline_class(type(pipe))
    assert enable_spo(pipe) is pipe and type(pipe) is spo_pipeline_class(base)
    assert torch.equal(images(pipe), base_image(family))


def test_an_enabled_pipeline_survives_copying_and_pickling(family, pipe):
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), strength=0.5)
    copies = [copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))]
    drawn = images(pipe)
    assert not torch.equal(drawn, base_image(family))
    for other in copies:
        assert type(other) is type(pipe)
        assert torch.equal(images(other), drawn)
        other.unload_spo_lora()
        assert torch.equal(images(other), base_image(family))
    assert torch.equal(images(pipe), drawn)


def test_a_saved_enabled_pipeline_loads_without_this_package(family, pipe, tmp_path):
    base = type(pipe)
    enable_spo(pipe).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == base.__name__
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(plain) is base
    plain.set_progress_bar_config(disable=True)
    assert torch.allclose(images(plain), base_image(family), atol=1e-4)


def test_the_twin_is_a_class_of_its_own_right(sd1, tmp_path):
    sd1.save_pretrained(tmp_path)
    twin = spo_pipeline_class(StableDiffusionPipeline)
    assert type(twin.from_pretrained(tmp_path)) is twin
    assert type(twin.from_pipe(sd1)) is twin


def test_other_pipelines_are_made_from_an_enabled_one(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1))
    drawn = images(sd1)
    assert type(StableDiffusionPipeline.from_pipe(sd1)) is StableDiffusionPipeline
    plain = AutoPipelineForText2Image.from_pipe(sd1)
    assert type(plain) is StableDiffusionPipeline
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(images(plain), drawn)
    assert enable_spo(plain).spo_adapters().keys() == {"spo"}


def test_enabling_a_pipeline_that_cannot_load_a_lora_is_a_type_error(sd1):
    unet = UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    with pytest.raises(TypeError, match="DDPMPipeline cannot load a LoRA"):
        enable_spo(DDPMPipeline(unet, DDIMScheduler()))
    with pytest.raises(PipelineError, match="cannot load a LoRA"):
        spo_pipeline_class(DDPMPipeline)
    with pytest.raises(ConfigError, match="must be a Guard"):
        enable_spo(sd1, guard=ColourCost())
    assert type(sd1) is StableDiffusionPipeline


def test_saving_with_a_foreign_lora_is_left_to_upstream(sd1, tmp_path):
    sd1.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    plain = StableDiffusionPipeline(**sd1.components, requires_safety_checker=False)
    plain.save_pretrained(tmp_path / "plain")
    enable_spo(sd1).save_pretrained(tmp_path / "enabled")
    files = {
        name: sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if path.is_file())
        for name in ("plain", "enabled")
    }
    assert files["plain"] == files["enabled"]


def test_saving_with_an_adapter_attached_is_refused(sd1, tmp_path):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1))
    with pytest.raises(AdapterError, match="spo in unet"):
        sd1.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    sd1.unload_spo_lora()
    sd1.save_pretrained(tmp_path / "folder")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(images(again), base_image("sd1"), atol=1e-4)


# Outputs


def test_an_output_without_a_guard_has_nothing_added(pipe):
    tuple_before = draw(pipe, return_dict=False)
    output_class = type(draw(pipe))
    out = draw(enable_spo(pipe))
    assert isinstance(out, output_class)
    assert out.safety_costs is None and out.unsafe_content_detected is None and out.category_costs is None
    assert len(out.to_tuple()) == len([part for part in tuple_before if part is not None])
    after = draw(pipe, return_dict=False)
    assert len(after) == len(tuple_before) and np.array_equal(after[0], tuple_before[0])
    with pytest.raises(NotScoredError, match="no guard"):
        out.overlays()


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_guard_scores_the_images_of_the_pipeline(family, pipe, guard, output_type):
    prompts = ["a sunny street", "a dark wood"]
    plain = draw(pipe, prompts, output_type=output_type).images
    out = draw(enable_spo(pipe, guard), prompts, output_type=output_type)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(out.images, plain, strict=True))
    expected = guard(plain)
    assert torch.equal(out.safety_costs, expected.costs) and out.safety_costs.shape == (2,)
    assert out.unsafe_content_detected == expected.flagged
    assert out.category_costs == expected.category_costs
    assert [overlay.size for overlay in out.overlays()] == [(SIZE, SIZE)] * 2
    assert [region.dtype for region in out.overlays(kind="mask")] == [np.bool_] * 2
    assert len(out.overlays(kind="boxes")) == 2
    assert pipe.last_safety_report is out.safety_report


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_tuple_has_the_length_of_diffusers_and_the_report_stays_on_the_pipeline(family, pipe, guard, output_type):
    options = {"prompt": ["a sunny street", "a dark wood"], "output_type": output_type, "return_dict": False}
    plain = draw(pipe, **options)
    enable_spo(pipe, guard)
    assert pipe.last_safety_report is None
    guarded = draw(pipe, **options)
    assert type(guarded) is tuple and len(guarded) == len(plain)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(guarded[0], plain[0], strict=True))
    assert guarded[1:] == plain[1:]
    expected = guard(plain[0])
    assert torch.equal(pipe.last_safety_report.costs, expected.costs)
    assert pipe.last_safety_report.flagged == expected.flagged
    pipe.guard = None
    draw(pipe, **options)
    assert pipe.last_safety_report is None, "a report of another call would be taken for this one's"


def test_an_output_can_be_pickled(sd1, guard):
    out = draw(enable_spo(sd1, guard))
    back = pickle.loads(pickle.dumps(out))
    assert type(back) is type(out) and torch.equal(back.safety_costs, out.safety_costs)
    assert np.array_equal(np.asarray(back.overlays()[0]), np.asarray(out.overlays()[0]))


def test_latents_are_not_scored_and_the_output_says_so(sd1, guard):
    enable_spo(sd1, guard)
    with pytest.warns(UserWarning, match="latent"):
        out = draw(sd1, output_type="latent")
    assert out.safety_costs is None and out.unsafe_content_detected is None
    with pytest.raises(NotScoredError, match="latent"):
        out.overlays()
    with pytest.warns(UserWarning, match="latent"):
        assert len(draw(sd1, output_type="latent", return_dict=False)) == 2
    assert sd1.last_safety_report is None
    assert guard.cost_model.calls == 0


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("output_type", ["np", "pil", "pt"])
def test_videos_are_not_scored_and_come_as_they_are(guard, output_type, return_dict):
    pipe, options = guided_pipelines.build("wan")
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    options |= {"output_type": output_type, "return_dict": return_dict}
    plain = guided_pipelines.call(pipe, options)
    enable_spo(pipe, guard)
    with pytest.warns(UserWarning, match="WanPipeline returns no images, so the guard has scored nothing"):
        guarded = guided_pipelines.call(pipe, options)
    assert len(guarded) == len(plain) and np.array_equal(np.asarray(guarded[0][0]), np.asarray(plain[0][0]))
    assert guard.cost_model.calls == 0 and pipe.last_safety_report is None


def test_images_are_blocked_only_when_asked():
    red = Guard(ColourCost(gain=50.0), colour_policy(), block="black")
    pipe = enable_spo(fresh("sd1"), red)
    out = draw(pipe)
    assert out.unsafe_content_detected == [True]
    assert not out.images.any()
    assert not draw(pipe, return_dict=False)[0].any()
    with pytest.raises(ConfigError, match="could block"):
        draw(pipe, output_type="latent")
    pipe.guard = None
    assert torch.equal(images(pipe), base_image("sd1"))


def test_a_guard_of_another_domain_is_refused(sd1, guard):
    sd1.text_encoder.config.spo_domain = "sticker"
    with pytest.raises(DomainError, match="'sticker'"):
        enable_spo(sd1, guard)
    assert type(sd1) is StableDiffusionPipeline
    enable_spo(sd1, Guard(ColourCost(), colour_policy(), override_domain=True))
    assert draw(sd1).unsafe_content_detected is not None


def test_enabling_again_keeps_the_guard(sd1, guard):
    enable_spo(sd1, guard)
    assert enable_spo(sd1).guard is guard


# Windows


@pytest.mark.parametrize(
    ("window", "steps", "expected"),
    [
        ((0.0, 0.5), 4, [0.8, 0.8, 0.0, 0.0]),
        ((0.5, 1.0), 4, [0.0, 0.0, 0.8, 0.8]),
        ((0.2, 0.6), 5, [0.0, 0.8, 0.8, 0.0, 0.0]),
        ((0.0, 1.0), 3, [0.8, 0.8, 0.8]),
        ((0.3, 0.9), 1, [0.0]),
    ],
)
@pytest.mark.filterwarnings("ignore:no step began inside")
def test_an_adapter_is_on_in_the_steps_that_begin_in_its_window(window, steps, expected, sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.8, window=window)
    assert strengths(sd1, num_inference_steps=steps) == expected
    assert sd1.spo_adapters()["spo"].strength == 0.8


def test_a_window_works_where_the_scheduler_holds_timesteps_twice(sd1):
    sd1.scheduler = HeunDiscreteScheduler.from_config(sd1.scheduler.config)
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), window=(0.0, 0.5))
    seen = strengths(sd1, num_inference_steps=3)
    steps = len(sd1.scheduler.timesteps)
    assert seen == [1.0 if in_window(step / steps, (0.0, 0.5)) else 0.0 for step in range(steps)]
    assert 0.0 in seen and 1.0 in seen


def test_a_window_of_image_to_image_counts_from_the_progress_that_it_skips(sd1):
    pipe = enable_spo(StableDiffusionImg2ImgPipeline.from_pipe(sd1))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_spo_lora(random_adapter(pipe), window=(0.5, 0.8))
    seen = []
    layer = next(module for module in pipe.unet.modules() if "spo" in getattr(module, "lora_A", {}))
    layer.register_forward_pre_hook(lambda *_: seen.append(pipe.spo_adapters()["spo"].strength))
    pipe("a street", image=torch.rand(1, 3, SIZE, SIZE), strength=0.6, num_inference_steps=5, output_type="np")
    assert seen == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_a_window_works_on_every_family(family, pipe):
    enable_spo(pipe).load_spo_lora(random_adapter(pipe), window=(0.0, 0.5))
    windowed = images(pipe)
    pipe.unload_spo_lora()
    pipe.load_spo_lora(random_adapter(pipe))
    assert not torch.equal(windowed, base_image(family))
    assert not torch.equal(windowed, images(pipe))


def test_a_full_window_is_no_window(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), window=(0, 1))
    windowed = images(sd1)
    other = fresh("sd1")
    enable_spo(other).load_spo_lora(random_adapter(other))
    assert torch.equal(windowed, images(other))


def test_a_window_in_which_no_step_begins_warns(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), window=(0.6, 0.7))
    with pytest.warns(UserWarning, match="no step began inside the window of spo"):
        drawn = images(sd1)
    assert torch.equal(drawn, base_image("sd1"))


def test_the_users_own_step_callback_runs_beside_a_window(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), window=(0.0, 0.5))
    plain = images(sd1, num_inference_steps=4)
    seen = []

    def own(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return tensors

    inputs = ["latents", "prompt_embeds"]
    options = {"callback_on_step_end": own, "callback_on_step_end_tensor_inputs": inputs, "num_inference_steps": 4}
    assert torch.equal(images(sd1, **options), plain)
    assert seen == [(step, inputs) for step in range(4)]


def test_a_callback_object_gets_its_tensors_beside_a_window(sd1):
    class Halve(PipelineCallback):
        tensor_inputs = ["latents", "prompt_embeds"]

        def callback_fn(self, pipe, step, timestep, tensors):
            assert sorted(tensors) == self.tensor_inputs
            return {"latents": tensors["latents"] * 0.5}

    enable_spo(sd1)
    halved = images(sd1, callback_on_step_end=Halve())
    sd1.load_spo_lora(random_adapter(sd1, alpha=1e-6), window=(0.0, 0.5))
    assert torch.allclose(images(sd1, callback_on_step_end=Halve()), halved, atol=1e-4)
    assert not torch.allclose(images(sd1), halved, atol=1e-2)


def test_an_error_in_a_windowed_call_restores_the_strength(sd1):
    enable_spo(sd1).load_spo_lora(random_adapter(sd1), strength=0.7, window=(0.0, 0.5))

    def failing(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        draw(sd1, callback_on_step_end=failing, num_inference_steps=4)
    assert sd1.spo_adapters()["spo"].strength == 0.7
    assert sd1.get_active_adapters() == ["spo"]


def test_first_progress_follows_the_arguments_of_the_call(sd1):
    # A text-to-image pipeline counts no steps for these, as those of other packages may not.
    assert first_progress(sd1, {}) == 0.0
    assert first_progress(sd1, {"strength": 0.75}) == 0.25
    assert first_progress(sd1, {"strength": 0.75, "denoising_start": 0.8}) == 0.8
    assert in_window(5 / 25, (0.2, 0.4)) and not in_window(10 / 25, (0.2, 0.4))
