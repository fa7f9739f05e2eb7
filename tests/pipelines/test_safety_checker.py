"""The guard where pipelines have a place for one: as a safety checker, and as a block of a modular pipeline."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.cost_models import ColourCost, colour_policy
from support.pipelines import SIZE, STEPS, draw, fresh

from t2i_spo_plugin import SPOSafetyChecker, enable_spo
from t2i_spo_plugin.errors import DomainError, PipelineError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.images import to_tensor


PROMPTS = ["a sunny street", "a red car", "two dogs"]


class Extractor:
    """What the pipeline makes the checker's `clip_input` with; ours does not look at it."""

    def __call__(self, images, return_tensors):
        from transformers import BatchFeature

        return BatchFeature({"pixel_values": torch.zeros(len(images), 3, 4, 4)})


@pytest.fixture(scope="module")
def plain():
    """What the pipeline draws without a checker, as numpy; and a level of red between two of the images."""
    images = draw(fresh("sd1"), PROMPTS).images
    reds = sorted(image[..., 0].mean() for image in images)
    return images, float(reds[1] + reds[2]) / 2


def guard_at(level, block="black"):
    return Guard(ColourCost(gain=50.0, level=level), Policy("red", "photo", (Category("red"),)), block=block)


def checked(checker):
    pipe = fresh("sd1")
    pipe.register_modules(safety_checker=checker, feature_extractor=Extractor())
    return pipe


def as_tensor(images):
    return to_tensor(images if not isinstance(images, torch.Tensor) else images)


@pytest.mark.parametrize("block", ["none", "black", "blur"])
@pytest.mark.parametrize("form", ["np", "pt", "pil"])
def test_the_checker_flags_what_is_unsafe_and_leaves_the_others_bit_for_bit(plain, form, block):
    images, level = plain
    before = as_tensor(draw(fresh("sd1"), PROMPTS, output_type=form).images)
    checker = SPOSafetyChecker(guard_at(level, block))
    out = draw(checked(checker), PROMPTS, output_type=form)
    after = as_tensor(out.images)
    expected = [bool(image[..., 0].mean() > level) for image in images]
    assert sum(expected) == 1 and out.nsfw_content_detected == expected
    for number, unsafe in enumerate(expected):
        if not unsafe or block == "none":
            assert torch.equal(after[number], before[number])
        elif block == "black":
            assert not after[number].any()
        else:
            assert after[number].diff(dim=-1).abs().mean() < 0.7 * before[number].diff(dim=-1).abs().mean()
            assert abs(float(after[number].mean() - before[number].mean())) < 0.1
    assert checker.last_report.flagged == expected
    if block != "none":  # overlays do not bring back what was blocked
        shown = as_tensor(checker.last_report.images)[expected.index(True)]
        assert not torch.equal(shown, before[expected.index(True)].to(shown))


def test_an_image_that_is_not_scored_counts_as_unsafe_for_the_checker():
    checker = SPOSafetyChecker(guard_at(2.0))
    images = torch.zeros(2, 3, 8, 8)
    images[1] = float("nan")
    made, unsafe = checker(images=images, clip_input=None)
    assert unsafe == [False, True]
    assert torch.equal(made[0], images[0]) and not made[1].any()
    assert math.isnan(checker.last_report.costs[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_checker_keeps_the_type_of_the_images(dtype):
    images = torch.linspace(-1.2, 1.2, 2 * 3 * 64).reshape(2, 3, 8, 8).to(dtype)
    kept = images.clone()
    made, unsafe = SPOSafetyChecker(guard_at(0.5))(images)
    assert unsafe == [False, True] and made.dtype == dtype
    assert torch.equal(images, kept) and torch.equal(made[0], images[0]) and not made[1].any()


def test_the_checker_takes_numpy_images_in_zero_to_one():
    images = np.stack([np.full((8, 8, 3), 0.2), np.full((8, 8, 3), 0.9)]).astype(np.float32)
    made, unsafe = SPOSafetyChecker(guard_at(0.5))(images)
    assert unsafe == [False, True] and made.dtype == images.dtype
    assert np.array_equal(made[0], images[0]) and not made[1].any()


def test_the_checker_does_not_see_latents(plain):
    checker = SPOSafetyChecker(guard_at(-1.0))
    out = draw(checked(checker), PROMPTS, output_type="latent")
    assert out.nsfw_content_detected is None and checker.last_report is None


def test_a_checker_of_another_domain_is_refused():
    with pytest.raises(DomainError, match="'photo'"):
        SPOSafetyChecker(Guard(ColourCost("sticker"), colour_policy("sticker")))
    SPOSafetyChecker(Guard(ColourCost("sticker"), colour_policy("sticker")), domain="sticker")


def test_a_saved_pipeline_comes_back_without_the_checker_and_draws_the_same(plain, tmp_path):
    images, level = plain
    pipe = checked(SPOSafetyChecker(guard_at(level)))
    pipe.register_modules(feature_extractor=None)
    pipe.save_pretrained(tmp_path)
    assert '"safety_checker": [\n    null,\n    null\n  ]' in (tmp_path / "model_index.json").read_text()
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.safety_checker is None
    assert np.array_equal(draw(again, PROMPTS).images, images)


def test_the_checker_goes_where_the_pipeline_goes(plain):
    images, level = plain
    pipe = checked(SPOSafetyChecker(guard_at(level)))
    pipe.to("cpu")
    assert pipe.components["safety_checker"].guard.block == "black"
    copied = draw(copy.deepcopy(pipe), PROMPTS)
    assert copied.nsfw_content_detected == draw(enable_spo(pipe), PROMPTS).nsfw_content_detected
    assert sum(copied.nsfw_content_detected) == 1


def modular_sdxl(*blocks):
    """A tiny modular SDXL pipeline, with `blocks` after its last one."""
    from diffusers import StableDiffusionXLAutoBlocks

    made = StableDiffusionXLAutoBlocks().get_workflow("text2image")
    for number, block in enumerate(blocks):
        made.sub_blocks.insert(f"guard {number}", block, len(made.sub_blocks))
    pipe = made.init_pipeline()
    parts = fresh("sdxl").components
    pipe.update_components(**{name: parts[name] for name in pipe.components if parts.get(name) is not None})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, output_type="np"):
    return pipe(
        prompt=PROMPTS[0],
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        output_type=output_type,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.fixture
def block_class():
    pytest.importorskip("diffusers.modular_pipelines")
    from t2i_spo_plugin.pipelines.modular import SPOGuardBlock

    return SPOGuardBlock


@pytest.mark.parametrize("form", ["np", "pt", "pil"])
def test_a_block_scores_what_a_modular_pipeline_draws(block_class, form):
    before = as_tensor(run(modular_sdxl(), form).get("images"))
    for level, unsafe in ((-1.0, True), (2.0, False)):
        guard = guard_at(level)
        state = run(modular_sdxl(block_class(guard)), form)
        after = as_tensor(state.get("images"))
        expected = guard(before)
        assert torch.equal(state.get("safety_costs"), expected.costs)
        assert state.get("unsafe_content_detected") == [unsafe]
        assert state.get("category_costs") == expected.category_costs
        assert state.get("safety_report").overlays()[0].size == (SIZE, SIZE)
        assert not after.any() if unsafe else torch.equal(after, before)


def test_a_block_does_not_score_latents_and_says_so(block_class):
    with pytest.warns(UserWarning, match="scored nothing"):
        state = run(modular_sdxl(block_class(guard_at(-1.0))), "latent")
    assert state.get("safety_report") is None and state.get("unsafe_content_detected") is None


def test_a_block_refuses_a_foreign_domain(block_class):
    guard = Guard(ColourCost("sticker"), colour_policy("sticker"))
    with pytest.raises(DomainError, match="'sticker'"):
        run(modular_sdxl(block_class(guard)))


def test_copies_of_a_block_share_its_guard_and_none_can_be_saved(block_class, tmp_path):
    block = block_class(guard_at(0.5))
    assert copy.deepcopy(block).guard is block.guard
    with pytest.raises(PipelineError, match="insert it after loading"):
        block.save_pretrained(tmp_path)


def test_enabling_a_modular_pipeline_points_to_the_block(block_class):
    with pytest.raises(PipelineError, match=block_class.__name__):
        enable_spo(modular_sdxl(), guard=guard_at(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_spo(modular_sdxl())
