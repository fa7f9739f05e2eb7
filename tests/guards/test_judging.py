"""Images are judged by cost and quality together, each on its own."""

import math

import pytest
import torch
from support.cost_models import RedSquareCost
from support.eval_world import POLICY, ColourQuality, SquarePipeline

from t2i_spo_plugin.errors import DomainError
from t2i_spo_plugin.guards import Guard, counterparts, judge_images
from t2i_spo_plugin.images import to_pil


GUARD = Guard(RedSquareCost(), POLICY)
PROMPTS = ["a red square", "a green square", "a blue square"]


def squares():
    pipe = SquarePipeline()
    made = [pipe.draw(prompt, torch.Generator().manual_seed(number)) for number, prompt in enumerate(PROMPTS)]
    return [to_pil(torch.from_numpy(image).permute(2, 0, 1))[0] for image in made]


def judged(quality_model=None, safe_prompts=((), (), ()), **options):
    return judge_images(squares(), PROMPTS, safe_prompts, GUARD, quality_model or ColourQuality(), **options)


def test_a_judgement_holds_cost_and_quality():
    red, green, _ = judged()
    assert red.cost > 0.5 > green.cost and red.category == "red" and red.category_costs["red"] == red.cost
    assert red.quality == 1.0 and red.alignment == red.realism > 0.1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_judgement_does_not_depend_on_the_batch(batch_size):
    assert judged(batch_size=batch_size) == judged()


def test_a_safe_prompt_counts_instead_of_the_prompt():
    asked_for_red, asked_for_blue = (judged(safe_prompts=(safe, (), ()))[0] for safe in ((), ("a blue square",)))
    assert asked_for_red.quality == 1.0 and asked_for_blue.quality == 0.0


def test_unknown_safe_prompts_leave_realism_alone():
    known, unknown = (judged(safe_prompts=(safe, (), ()))[0] for safe in (("a blue square",), None))
    assert known.quality == 0.0 and known.alignment == 0.0
    assert unknown.quality == 1.0 and unknown.alignment is None and unknown.realism == known.realism


@pytest.mark.parametrize(("value", "said"), [(math.nan, "gave nan"), (1.5, "gave 1.5"), (-0.5, "gave -0.5")])
def test_a_quality_that_is_no_share_is_no_judgement(value, said):
    class Broken(ColourQuality):
        def quality(self, images, prompts, safe_completions=None):
            batch = super().quality(images, prompts, safe_completions)
            batch.q[["green" in prompt for prompt in prompts]] = value
            return batch

    first, second, third = judged(Broken())
    assert said in second and (first, third) == (judged()[0], judged()[2])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_quality_scale_are_judgements(value):
    class Decided(ColourQuality):
        def quality(self, images, prompts, safe_completions=None):
            batch = super().quality(images, prompts, safe_completions)
            batch.q[:] = value
            return batch

    assert [one.quality for one in judged(Decided())] == [value] * 3


def test_an_image_that_a_model_fails_on_spoils_no_other():
    class Picky(ColourQuality):
        def quality(self, images, prompts, safe_completions=None):
            if any("green" in prompt for prompt in prompts):
                raise ValueError("no green")
            return super().quality(images, prompts, safe_completions)

    first, second, third = judged(Picky())
    assert second == "the quality model failed: ValueError: no green" and (first, third) == (judged()[0], judged()[2])


def test_the_guards_reason_comes_before_that_of_quality():
    class Silent(RedSquareCost):
        def __call__(self, images):
            batch = super().__call__(images)
            batch.logits[:] = math.nan
            return batch

    reasons = judge_images(squares(), PROMPTS, [()] * 3, Guard(Silent(), POLICY), ColourQuality())
    assert all("NaN" in reason for reason in reasons)


def test_images_of_a_foreign_domain_are_refused():
    with pytest.raises(DomainError, match="the cost model was made for"):
        judged(domain="photo")
    assert judged(domain="squares") == judged()


@pytest.mark.parametrize(
    ("known", "said"), [("sticker", "was made for the domain 'sticker'"), ("", "states no domain")]
)
def test_a_quality_model_of_a_foreign_domain_is_refused_unless_it_is_overridden(known, said):
    class Foreign(ColourQuality):
        domain = known

    with pytest.raises(DomainError, match=f"the quality model {said}, not for 'squares'"):
        judged(Foreign(), domain="squares")
    guard = Guard(RedSquareCost(), POLICY, override_domain=True)
    assert judge_images(squares(), PROMPTS, [()] * 3, guard, Foreign(), "squares") == judged()


def test_a_harmful_prompt_without_a_counterpart_is_not_shown_to_the_quality_model():
    class Asked(ColourQuality):
        def quality(self, images, prompts, safe_completions=None):
            assert not any("red" in prompt for prompt in prompts), prompts
            return super().quality(images, [prompt or "a red" for prompt in prompts], safe_completions)

    assert judged(Asked(), safe_prompts=(None, (), ()))[0].quality == 1.0


def test_counterparts_are_those_of_harmful_prompts():
    assert counterparts(True, ["a", "b"]) == ("a", "b") and counterparts(True, ()) is None
    assert counterparts(False, ()) == () == counterparts(False, ["a"])
