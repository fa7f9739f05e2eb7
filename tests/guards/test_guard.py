import math

import numpy as np
import pytest
import torch
from PIL import Image
from support.cost_models import ColourCost, NaNCost, colour_policy

from t2i_spo_plugin.cost.base import CostBatch
from t2i_spo_plugin.errors import ConfigError, DomainError, NotScoredError, PolicyError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.images import to_tensor


RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (90, 90, 90)


class FailingCost(ColourCost):
    """Fails on every batch that holds an image as dark as night."""

    def __call__(self, images):
        if bool((to_tensor(images).flatten(1).amax(1) < 0.05).any()):
            raise RuntimeError("cannot see in the dark")
        return super().__call__(images)


@pytest.fixture
def guard():
    return Guard(ColourCost(), colour_policy())


def plain(colour, size=(16, 12)):
    return Image.new("RGB", size, colour)


def test_costs_follow_policy_and_temperature(guard):
    report = guard([plain(RED), plain(BLUE), plain(GREY)])
    red = 1 / (1 + math.exp(-4.0))
    assert report.category_costs[0]["red"] == pytest.approx(0.5 + 0.5 * (red - 0.4) / 0.6, abs=1e-5)
    assert set(report.category_costs[0]) == {"red", "blue"}
    assert report.costs.tolist() == pytest.approx([max(costs.values()) for costs in report.category_costs])
    assert report.flagged == [True, True, False]
    assert report.reasons == [None, None, None]


def test_the_answer_of_a_guard_does_not_depend_on_batch_or_form(guard):
    images = [plain(RED), plain(GREY)]
    together = guard(images)
    for number, image in enumerate(images):
        assert torch.equal(guard(image).costs, together.costs[number : number + 1])
    for form in (np.stack([np.asarray(image) for image in images]), to_tensor(images)):
        assert torch.equal(guard(form).costs, together.costs)


@pytest.mark.parametrize("model", [FailingCost, NaNCost])
def test_an_image_that_cannot_be_scored_is_not_safe_and_spoils_no_other(model):
    guard = Guard(model(), colour_policy())
    report = guard([plain(RED), plain((0, 0, 0)), plain(GREY)])
    assert report.flagged == [True, None, False]
    assert math.isnan(report.costs[1]) and report.category_costs[1] == {}
    assert report.reasons[0] is None and "cost model" in report.reasons[1]
    assert torch.equal(report.costs[0], guard(plain(RED)).costs[0])
    with pytest.raises(NotScoredError, match="image 1"):
        report.overlays()


def test_an_image_that_cannot_be_read_is_not_safe(guard):
    batch = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), float("nan"))])
    report = guard(batch)
    assert report.flagged == [False, None]
    assert "NaN" in report.reasons[1]


def test_a_truncated_file_is_not_safe(guard, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    report = guard([Image.open(path), plain(GREY)])
    assert report.flagged == [None, False]
    assert "decoded" in report.reasons[0]


def test_a_model_that_answers_in_the_wrong_shape_scores_nothing():
    class Wrong(ColourCost):
        def __call__(self, images):
            return CostBatch(torch.zeros(1, 2), torch.zeros(1, 2, 4, 4))

    report = Guard(Wrong(), colour_policy())(plain(RED))
    assert report.flagged == [None]
    assert "expected (1, 3)" in report.reasons[0]


def test_a_guard_of_another_domain_needs_an_override():
    with pytest.raises(DomainError, match="with override_domain it is used"):
        Guard(ColourCost("sticker"), colour_policy("photo"))
    guard = Guard(ColourCost("photo"), colour_policy("photo"))
    with pytest.raises(DomainError, match="'sticker'"):
        guard(plain(RED), domain="sticker")
    assert guard(plain(RED), domain="photo").flagged == [True]
    overridden = Guard(ColourCost("photo"), colour_policy("photo"), override_domain=True)
    assert overridden(plain(RED), domain="sticker").flagged == [True]


def test_the_policy_must_be_one_the_model_knows():
    with pytest.raises(PolicyError, match="violet"):
        Guard(ColourCost(), Policy("p", "photo", (Category("violet"),)))
    with pytest.raises(ConfigError, match="block"):
        Guard(ColourCost(), colour_policy(), block="censor")


def test_a_guard_changes_no_image_unless_asked(guard):
    originals = [plain(RED), plain(GREY)]
    before = [np.asarray(image).copy() for image in originals]
    images, report = guard.apply_block(originals, guard(originals))
    assert images is originals
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(originals, before, strict=True))


@pytest.mark.parametrize("block", ["black", "blur"])
@pytest.mark.parametrize("form", ["pil", "uint8", "float", "tensor"])
def test_a_blocked_image_keeps_its_form_and_its_neighbours(block, form):
    guard = Guard(FailingCost(), colour_policy(), block=block)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    noise[..., 0] = 255
    stack = np.stack([noise, np.full_like(noise, 90), np.full_like(noise, 5)])
    images = {
        "pil": [Image.fromarray(image) for image in stack],
        "uint8": stack,
        "float": stack.astype(np.float32) / 255,
        "tensor": torch.from_numpy(stack).permute(0, 3, 1, 2).half() / 255,
    }[form]
    before = to_tensor(images).clone()
    report = guard(images)
    assert report.flagged == [True, False, None]
    blocked, blocked_report = guard.apply_block(images, report)
    assert type(blocked) is type(images) and getattr(blocked, "dtype", None) == getattr(images, "dtype", None)
    after = to_tensor(blocked)
    assert torch.equal(after[1], before[1])
    assert torch.equal(to_tensor(images), before)
    if block == "black":
        assert not after[0].any() and not after[2].any()
    else:
        assert after[0].diff(dim=-1).abs().mean() < 0.2 * before[0].diff(dim=-1).abs().mean()
    assert torch.equal(to_tensor(blocked_report.images), after)


def test_a_guard_is_known_by_its_model_and_its_policy():
    one, same = Guard(ColourCost(), colour_policy()).identity, Guard(ColourCost(), colour_policy()).identity
    other = Guard(ColourCost(), Policy("p", "photo", (Category("red"),))).identity
    assert one == same and set(one) == {"cost_model", "policy"}
    assert other["cost_model"] == one["cost_model"] and other["policy"] != one["policy"]


def test_a_guard_blocks_nothing_and_overrides_nothing_unless_it_is_told_to():
    guard = Guard(ColourCost(), colour_policy())
    assert (guard.block, guard.override_domain, guard.name) == ("none", False, "")
    image = [plain(RED)]
    assert guard.apply_block(image, guard(image))[0] is image
    blocking = Guard(ColourCost(), colour_policy(), block="black", name="colour/1")
    safe = [plain(GREY)]
    report = blocking(safe)
    assert blocking.apply_block(safe, report) == (safe, report) and report.cost_model == "colour/1"


@pytest.mark.parametrize("form", ["array", "tensor", "image", "tuple"])
def test_a_single_blocked_image_comes_back_as_it_came(form):
    guard = Guard(ColourCost(), colour_policy(), block="black")
    array = np.asarray(plain(RED))
    image = {
        "array": array,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "image": plain(RED),
        "tuple": (plain(RED),),
    }[form]
    blocked, report = guard.apply_block(image, guard(image))
    assert isinstance(blocked, list if form == "tuple" else type(image))
    assert getattr(blocked, "shape", None) == getattr(image, "shape", None) and len(report.images) == 1
    assert not to_tensor(blocked).any()


def test_more_images_than_are_scored_at_once_are_all_scored_in_order():
    calls = []

    class Counting(ColourCost):
        def __call__(self, images):
            calls.append(len(images))
            return super().__call__(images)

    images = [plain((level, 0, 0), (4, 4)) for level in range(100, 230)]
    report = Guard(Counting(), colour_policy())(images)
    assert sum(calls) == 130 and max(calls) <= 64
    assert report.costs.tolist() == sorted(report.costs.tolist()) and report.costs[0] < report.costs[-1]


def test_what_a_guard_scores_carries_no_gradient():
    class Learning(ColourCost):
        def __call__(self, images):
            assert not torch.is_grad_enabled()
            return super().__call__(images)

    assert Guard(Learning(), colour_policy())(plain(RED)).reasons == [None]
