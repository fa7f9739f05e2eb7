"""What one training step adds up, recomputed from the denoiser's own predictions.

A hook on the denoiser keeps what each call predicts and the gradient that comes back to it. From these and from the
noise (a pure function of seed, step and position) loss and gradient are written out here once more, in plain torch,
and must be those that the trainer logged and back-propagated. Nothing of the step's own code is called.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.pairs import is_harmful, pair_table, train_config
from support.pipelines import SIZE, tiny_pipeline
from torch import Tensor
from torch.nn.functional import logsigmoid

from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.training import train
from t2i_spo_plugin.training.sampling import Order, draw, generator, learning_rate_factor
from t2i_spo_plugin.training.step import TrainingStep


PAIRS, BATCH, STEPS, BETA = 6, 3, 4, 500.0
LATENT = (4, SIZE // 2, SIZE // 2)
MARGIN = 0.9 - 0.1
"""Loser's minus winner's cost of the harmful rows; times lambda it is the margin of mode `relabel+margin`."""


@dataclass
class Call:
    """One call of the denoiser: samples `[N, C, h, w]`, the predictions for them, and the gradient that came back."""

    noisy: Tensor
    timesteps: Tensor
    prediction: Tensor
    trained: bool

    @property
    def gradient(self) -> Tensor:
        assert self.prediction.grad is not None
        return self.prediction.grad


@dataclass
class Observed:
    """A run of `STEPS` steps of `BATCH` pairs: calls in order, and the logged curve."""

    calls: list[Call] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    folder: Path = Path()

    def step(self, number: int) -> tuple[Call, Call, list[Call]]:
        """Of optimiser step `number`: the call that is trained, the reference's, and those of the augmentations."""
        each = len(self.calls) // STEPS
        part = self.calls[number * each : (number + 1) * each]
        (trained,) = (call for call in part if call.trained)
        reference, *rest = (call for call in part if not call.trained)
        return trained, reference, rest


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return pair_table(tmp_path_factory.mktemp("pairs") / "pairs.parquet", PAIRS)


@pytest.fixture
def observe(pairs, tmp_path):
    """Train with `options` and keep what the denoiser was asked and answered."""

    def run(**options: Any) -> Observed:
        pipe, seen = tiny_pipeline("sd1"), Observed(folder=tmp_path / "run")

        def keep(module, args, output):
            prediction = output[0]
            if prediction.requires_grad:
                prediction.retain_grad()
            seen.calls.append(Call(args[0].detach(), args[1], prediction, prediction.requires_grad))

        pipe.unet.register_forward_hook(keep)
        defaults = {"pairs": str(pairs), "steps": STEPS, "batch_size": BATCH, "resume": False}
        train(train_config(tmp_path, **(defaults | options)), pipe)
        seen.curve = json.loads((tmp_path / "run" / "report.json").read_text())["curve"]
        return seen

    return run


def noise_of(step: int) -> Tensor:
    """The noise that step `step` draws for its pairs, `[B, C, h, w]`: for a model that predicts it, the target."""
    places = range(step * BATCH, (step + 1) * BATCH)
    return torch.stack([draw(generator(0, "sample", step, place), LATENT, (0, 1000)).noise for place in places])


def benign_of(step: int) -> Tensor:
    """`[B]`, whether each pair of the step stands under a benign prompt."""
    order = Order(torch.tensor([not is_harmful(number) for number in range(PAIRS)]), seed=0)
    return torch.tensor([not is_harmful(order.at(place)[0]) for place in range(step * BATCH, (step + 1) * BATCH)])


def error(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction - target) ** 2).mean((1, 2, 3))


def logits(trained: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """`-beta / 2 * [(l_w - l_l) - (ref_w - ref_l)]` of `[2 B, ...]`, winners first."""
    winner, loser = error(trained[:BATCH], target), error(trained[BATCH : 2 * BATCH], target)
    ref_w, ref_l = error(reference[:BATCH], target), error(reference[BATCH : 2 * BATCH], target)
    return -0.5 * BETA * ((winner - loser) - (ref_w - ref_l))


def check(seen: Observed, expected: Any) -> None:
    """Loss and gradient of every step are those of `expected(step, prediction, reference, target, augmented)`."""
    for number in range(STEPS):
        trained, reference, augmented = seen.step(number)
        prediction = trained.prediction.detach().requires_grad_()
        loss = expected(number, prediction, reference.prediction, noise_of(number), augmented)
        loss.backward()
        assert seen.curve[number]["loss"] == pytest.approx(loss.item(), rel=1e-5), f"step {number}"
        torch.testing.assert_close(trained.gradient, prediction.grad, rtol=1e-3, atol=1e-6)


def dpo(number, prediction, reference, target, augmented) -> Tensor:
    return -logsigmoid(logits(prediction, reference, target)).mean()


PLAIN = {"objective": {"name": "dpo", "beta": BETA, "safe_pairs": "quality"}}
STEEP = {"objective": {"name": "dpo", "beta": 1e6, "safe_pairs": "quality"}}


def spo(**options: Any) -> dict[str, Any]:
    return {"objective": {"name": "spo", "beta": BETA, **options}}


def test_plain_dpo_is_the_preference_loss_and_nothing_else(observe):
    seen = observe(**PLAIN)
    check(seen, dpo)
    # The model has left its reference, or nothing above would tell one term from another.
    assert max(abs(entry["loss"] - math.log(2.0)) for entry in seen.curve) > 0.05


def test_sft_term_adds_its_weight_times_the_winners_error(observe):
    def expected(number, prediction, reference, target, augmented):
        return dpo(number, prediction, reference, target, augmented) + 3.0 * error(prediction[:BATCH], target).mean()

    check(observe(**PLAIN, terms={"sft": {"weight": 3.0}}), expected)


def test_prior_preservation_holds_benign_pairs_and_leaves_harmful_ones_alone(observe):
    def expected(number, prediction, reference, target, augmented):
        both = benign_of(number).repeat(2)
        apart = error(prediction, reference.detach())
        return dpo(number, prediction, reference, target, augmented) + 40.0 * (apart * both).mean()

    seen = observe(**PLAIN, terms={"prior_preservation": {"weight": 40.0}})
    check(seen, expected)
    assert {bool(kind) for number in range(STEPS) for kind in benign_of(number)} == {True, False}
    trained, reference, _ = seen.step(STEPS - 1)
    alone = trained.prediction.detach().requires_grad_()
    dpo(STEPS - 1, alone, reference.prediction, noise_of(STEPS - 1), []).backward()
    moved = (trained.gradient - alone.grad).abs().amax((1, 2, 3)) > 1e-6
    assert torch.equal(moved, benign_of(STEPS - 1).repeat(2))


def test_output_preservation_sees_pure_noise_at_the_last_timestep_and_no_pair(observe):
    def expected(number, prediction, reference, target, augmented):
        apart = error(prediction[2 * BATCH :], reference[2 * BATCH :].detach())
        return dpo(number, prediction, reference, target, augmented) + 40.0 * apart.mean()

    seen = observe(**PLAIN, terms={"output_preservation": {"weight": 40.0, "batch_size": 2}})
    check(seen, expected)
    trained, _, _ = seen.step(STEPS - 1)
    assert len(trained.noisy) == 2 * BATCH + 2 and trained.timesteps[2 * BATCH :].tolist() == [999, 999]
    assert trained.gradient[2 * BATCH :].abs().amax() > 0
    alone = observe(**PLAIN).step(0)[0]
    torch.testing.assert_close(seen.step(0)[0].gradient[: 2 * BATCH], alone.gradient)


@pytest.mark.parametrize("per_pair", [True, False])
def test_loser_guard_scales_the_losers_gradient_and_not_the_loss(observe, per_pair):
    mu = 0.6
    seen = observe(**PLAIN, terms={"loser_guard": {"mu": mu, "per_pair": per_pair}})
    scales = []
    for number in range(STEPS):
        trained, reference, _ = seen.step(number)
        target = noise_of(number)
        prediction = trained.prediction.detach().requires_grad_()
        loss = dpo(number, prediction, reference.prediction, target, [])
        loss.backward()
        assert seen.curve[number]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        g_w, g_l = (prediction.detach()[:BATCH] - target).flatten(1), (prediction.detach()[BATCH:] - target).flatten(1)
        square, inner = (g_w * g_w).sum(1), (g_w * g_l).sum(1)
        if not per_pair:
            square, inner = square.sum().expand(BATCH), inner.sum().expand(BATCH)
        scale = torch.where(inner > 0, ((1 - mu) * square / inner).clamp(0.0, 1.0), torch.ones(BATCH))
        scales.append(scale)
        assert prediction.grad is not None
        torch.testing.assert_close(trained.gradient[:BATCH], prediction.grad[:BATCH], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            trained.gradient[BATCH:], scale[:, None, None, None] * prediction.grad[BATCH:], rtol=1e-3, atol=1e-6
        )
    assert torch.stack(scales).amin() < 0.9, "the guard must have had something to do"


@pytest.mark.parametrize("lambda_", [0.0, 2.0])
def test_margin_is_lambda_times_the_cost_gap_where_safe_beats_unsafe(observe, lambda_):
    def expected(number, prediction, reference, target, augmented):
        margin = lambda_ * MARGIN * (~benign_of(number)).float()
        return -logsigmoid(logits(prediction, reference, target) - margin).mean()

    check(observe(**spo(**{"lambda": lambda_}, mode="relabel+margin")), expected)


@pytest.mark.parametrize(("kind", "over"), [("additive", "mean"), ("focal", "max")])
def test_focusing_weighs_each_pair_by_its_difficulty_over_the_augmentations(observe, kind, over):
    eta, momentum = 2.0, 0.5

    def raw(d: Tensor) -> Tensor:
        return 1.0 + eta * d if kind == "additive" else d**eta

    mean = float(raw(torch.tensor(0.5)))

    def expected(number, prediction, reference, target, augmented):
        nonlocal mean
        model, base = augmented
        # The flipped pair keeps the noise of the plain one.
        plain, flipped = logits(prediction, reference, target), logits(model.prediction, base.prediction, target)
        each = torch.stack((torch.sigmoid(-plain.detach()), torch.sigmoid(-flipped)))
        weight = raw(each.mean(0) if over == "mean" else each.amax(0))
        loss = (weight / mean * -logsigmoid(plain)).mean()
        mean = momentum * mean + (1.0 - momentum) * float(weight.mean())
        return loss

    options = {"eta": eta, "focusing": kind, "focusing_momentum": momentum, "reduction": over}
    seen = observe(**spo(**{"lambda": 0.0}, augmentations=["flip"], **options))
    check(seen, expected)
    assert abs(mean - float(raw(torch.tensor(0.5)))) > 1e-3


def test_augmentations_carry_no_gradient(observe):
    seen = observe(**spo(eta=1.0, augmentations=["flip", "shift", "noise"]))
    for number in range(STEPS):
        _, _, augmented = seen.step(number)
        assert len(augmented) == 2 * 3 and not any(call.prediction.requires_grad for call in augmented)


def test_terms_add_up(observe):
    def expected(number, prediction, reference, target, augmented):
        pairs = slice(0, 2 * BATCH)
        apart = error(prediction, reference.detach())
        return (
            dpo(number, prediction, reference, target, augmented)
            + 0.5 * error(prediction[:BATCH], target).mean()
            + 20.0 * apart[2 * BATCH :].mean()
            + 30.0 * (apart[pairs] * benign_of(number).repeat(2)).mean()
        )

    terms = {
        "sft": {"weight": 0.5},
        "output_preservation": {"weight": 20.0},
        "prior_preservation": {"weight": 30.0},
    }
    check(observe(**PLAIN, terms=terms), expected)


def first_moment(folder: Path) -> Tensor:
    """The gradient of the first step as AdamW received it: after one step its first moment is a tenth of it."""
    (path,) = (folder / "checkpoints").glob("step-*")
    state = load_file(path / "optimizer.safetensors")
    return torch.cat([value.flatten() for key, value in sorted(state.items()) if key.endswith("/exp_avg")]) / 0.1


def test_a_huge_gradient_is_clipped_to_max_grad_norm(observe):
    huge = {**STEEP, "steps": 1, "checkpoint_every": 1}
    free = first_moment(observe(**huge, max_grad_norm=1e9).folder)
    clipped = first_moment(observe(**huge, max_grad_norm=0.5).folder)
    assert free.norm() > 100.0
    assert clipped.norm() == pytest.approx(0.5, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-6)


def test_a_clipped_gradient_moves_the_weights_by_the_clipped_amount(observe):
    # AdamW's first step is lr * g / (|g| + 1e-8): only a gradient near 1e-8 shows its size in the weights.
    seen = observe(**STEEP, steps=1, checkpoint_every=1, max_grad_norm=1e-8)
    gradient = first_moment(seen.folder)
    expected = 1e-2 * (gradient / (gradient.abs() + 1e-8)).norm()
    adapter = read_adapter(seen.folder / "adapter.safetensors")
    # The matrices that begin at 0 are all that move: the others' gradient passes through them and is 0 as well.
    moved = torch.cat([pair.up.flatten() for pair in adapter.modules.values()])
    assert moved.norm() == pytest.approx(float(expected), rel=1e-3)
    assert float(expected) < 0.1 * 1e-2 * math.sqrt(len(moved)), "an unclipped step moves every weight by 1e-2"


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_follow_their_closed_form_off_the_midpoint(warmup):
    steps = warmup + 40
    for done in (0, 1, 9, 10, 30, 39):
        share = done / 40
        factors = {name: learning_rate_factor(warmup + done, steps, warmup, name) for name in ("linear", "cosine")}
        assert factors["linear"] == pytest.approx(1.0 - share)
        assert factors["cosine"] == pytest.approx(math.cos(0.5 * math.pi * share) ** 2)
        assert learning_rate_factor(warmup + done, steps, warmup, "constant") == 1.0
    assert [learning_rate_factor(step, steps, 4, "cosine") for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_a_run_logs_the_scheduled_rate_and_steps_by_it(observe):
    seen = observe(**PLAIN, schedule="cosine", learning_rate=1e-2)
    rates = [entry["learning_rate"] for entry in seen.curve]
    assert rates == pytest.approx([1e-2 * math.cos(0.5 * math.pi * n / STEPS) ** 2 for n in range(STEPS)])
    # The first step moves each weight that begins at 0 by the rate.
    warm = observe(**STEEP, warmup=4, schedule="cosine", learning_rate=1e-2, steps=1)
    adapter = read_adapter(warm.folder / "adapter.safetensors")
    largest = max(float(pair.up.abs().max()) for pair in adapter.modules.values())
    assert largest == pytest.approx(0.25e-2, rel=1e-3)


class _Half:
    """A toy objective over a toy predictor: two examples whose statistic is 1 and 3."""

    needs: frozenset[str] = frozenset()
    logged = ("each",)

    def at(self, step, positions):
        return None

    def train(self, batch, inputs, reference, stored):
        return None, []

    def loss(self, batch, predictions, context):
        weight = torch.tensor(0.5, requires_grad=True)
        return weight * 4.0, {"each": torch.tensor([1.0, 3.0]) * weight * 2.0}


def test_what_a_step_logs_are_means_over_the_batch_without_a_gradient():
    toy = _Half()
    loss, means = TrainingStep(toy, {}, toy, toy)(0, range(2))
    assert means.tolist() == [2.0, 2.0] and not means.requires_grad and loss.requires_grad
