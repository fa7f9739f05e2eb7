"""The loop of a run over the toy denoiser, against AdamW driven by hand."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support.pairs import train_config
from support.toy_family import ADAPTER, ToyFamily, toy_batches, toy_predictor

from t2i_spo_plugin.training.objectives.sft import SFT, SFTOptions
from t2i_spo_plugin.training.run import Callback, Run
from t2i_spo_plugin.training.step import TrainingStep


class Both(SFT):
    """The error of all images of a pair, the winner's logged; what `end_step` is given, kept."""

    logged = ("winner",)

    def __init__(self):
        super().__init__(SFTOptions())
        self.sums = []

    def loss(self, batch, predictions, context):
        return predictions.errors.mean(), {"winner": predictions.errors[0]}

    def end_step(self, sum_over_ranks):
        self.sums.append(sum_over_ranks(torch.tensor([1.0])).tolist())


class Ranks(SimpleNamespace):
    """An accelerator of one of several processes that all have the same numbers."""

    def __init__(self, processes=1, index=0):
        super().__init__(device=torch.device("cpu"), num_processes=processes, process_index=index)

    def reduce(self, total, how):
        assert how == "sum"
        return self.num_processes * total


@pytest.fixture
def make(tmp_path):
    """A run; `asked` gets the step and positions of every micro-batch."""

    def run(callbacks=(), accelerator=None, model=None, **options):
        family = ToyFamily()
        step = TrainingStep(Both(), {}, toy_batches(tmp_path, family), toy_predictor(family))
        if model is not None:
            step.predictor.model = model(family.module)
        config = train_config(tmp_path, pairs="pairs.parquet", **options)
        made = Run(config, accelerator or Ranks(), None, family, step, callbacks, {"unet": "m"}, {"judge": "v"})
        made.asked, at = [], step.batches.at

        def keep(number, positions):
            made.asked.append((number, list(positions)))
            return at(number, positions)

        step.batches.at = keep
        return made

    return run


def by_hand(run, rates, batch_size, clip, decay):
    """Weights after AdamW's steps at these rates, each on one batch of `batch_size`, and the mean errors."""
    family = ToyFamily()
    step = TrainingStep(Both(), {}, run.training_step.batches, toy_predictor(family))
    weights = [value for value in family.module.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1.0, weight_decay=decay)
    means = []
    for number, rate in enumerate(rates):
        batch = run.training_step.batches.at(number, range(number * batch_size, (number + 1) * batch_size))
        predictions, _ = step.predictor.train(batch)
        optimizer.zero_grad()
        predictions.errors.mean().backward()
        norm = torch.cat([value.grad.flatten() for value in weights]).norm()
        for value in weights:
            value.grad *= min(1.0, clip / float(norm))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        errors = predictions.errors.detach()
        means.append([float(errors.mean()), float(errors[0].mean())])
    return weights, means


class Log(Callback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, run):
        self.events.append(("begin", run.step))

    def on_step_end(self, run):
        self.events.append((run.step, run.learning_rate, run.statistics.tolist()))

    def on_train_end(self, run):
        self.events.append(("end", run.step))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_steps_are_adamws_on_the_whole_batch_however_it_is_cut(make, batch_size, accumulation):
    log = Log()
    run = make(
        [log],
        steps=4,
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        learning_rate=0.1,
        warmup=2,
        schedule="linear",
        weight_decay=0.3,
        max_grad_norm=0.5,
    )
    run.train()
    rates = [0.05, 0.1, 0.1, 0.05]
    weights, means = by_hand(run, rates, 4, clip=0.5, decay=0.3)
    trained = [value for value in run.family.module.parameters() if value.requires_grad]
    torch.testing.assert_close(trained, weights, rtol=1e-4, atol=1e-5)
    assert [event[0] for event in log.events] == ["begin", 1, 2, 3, 4, "end"]
    steps = log.events[1:-1]
    assert [rate for _, rate, _ in steps] == pytest.approx(rates)
    torch.testing.assert_close(torch.tensor([logged for _, _, logged in steps]), torch.tensor(means))
    assert all(value.grad is None for value in trained)
    assert run.training_step.objective.sums == [[1.0]] * 4


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_the_gradient_of_a_step_is_the_mean_over_its_examples(make, batch_size, accumulation):
    run = make(steps=1, batch_size=batch_size, gradient_accumulation=accumulation, max_grad_norm=1e9)
    weights = [value for value in run.family.module.parameters() if value.requires_grad]
    loss, _ = run.training_step(0, range(4))
    expected, seen = torch.autograd.grad(loss, weights), []
    run.optimizer.register_step_pre_hook(lambda *_: seen.extend(value.grad.clone() for value in weights))
    run.train()
    torch.testing.assert_close(tuple(seen), expected)


def test_ranks_and_micro_batches_take_turns_in_the_stream(make):
    asked = []
    for index in (0, 1):
        run = make(accelerator=Ranks(2, index), steps=2, batch_size=2, gradient_accumulation=3)
        run.train()
        asked.append(run.asked)
        assert run.training_step.objective.sums == [[2.0]] * 2
    assert [number for number, _ in asked[0]] == [0, 0, 0, 1, 1, 1]
    turns = [positions for pair in zip(*asked, strict=True) for _, positions in pair]
    assert sum(turns, []) == list(range(2 * 2 * 3 * 2)) and {len(turn) for turn in turns} == {2}


def test_gradients_are_exchanged_once_a_step(make):
    waits = []

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return self.inner(*args)

        @contextmanager
        def no_sync(self):
            waits.append(len(run.asked))
            yield

    run = make(model=Wrapper, steps=2, batch_size=1, gradient_accumulation=3)
    run.train()
    assert waits == [0, 1, 3, 4], "all micro-batches of a step but its last"


def test_a_run_ends_when_its_steps_are_done_or_its_budget_is_met(make):
    # A step of two pairs without a reference is four forward and four backward passes.
    for budget, steps in ((None, 5), (16, 2), (17, 3), (1, 1)):
        run = make(steps=5, batch_size=2, budget=budget)
        run.train()
        assert run.step == steps and run.finished
        assert run.passes == {"forward": 4 * steps, "backward": 4 * steps}
    run = make(accelerator=Ranks(2), steps=5, batch_size=2, budget=32)
    run.train()
    assert run.step == 2 and run.passes == {"forward": 16, "backward": 16}, "passes of all processes"


@pytest.mark.parametrize(("every", "due"), [(2, [2, 4, 5]), (1, [1, 2, 3, 4, 5]), (0, [5])])
def test_checkpoints_are_due_at_their_distance_and_at_the_end(make, every, due):
    class Due(Callback):
        def __init__(self):
            self.steps = []

        def on_step_end(self, run):
            self.steps += [run.step] * run.checkpoint_due

    callback = Due()
    make([callback], steps=5, checkpoint_every=every).train()
    assert callback.steps == due


def test_a_run_that_is_resumed_takes_the_steps_that_are_left(make):
    run = make(steps=5, batch_size=2)
    run.step, run.record.elapsed = 3, 1000.0
    assert 1000.0 <= run.seconds < 1060.0
    run.train()
    assert run.asked == [(3, [6, 7]), (4, [8, 9])]


def test_what_a_run_depends_on_is_known_by_content(make):
    run = make(steps=5)
    assert run.identity == {
        "options": run.config.trajectory(),
        "examples": run.training_step.batches.examples.digest(),
        "models": {"unet": "m"},
        "validation": {"judge": "v"},
    }
    assert (run.step, run.learning_rate, run.record.curve, run.record.best, run.record.elapsed) == (
        0,
        0.0,
        [],
        None,
        0.0,
    )


def test_the_weights_are_a_copy_of_the_adapter(make):
    run = make(steps=1)
    before = run.weights()
    kept = copy.deepcopy(before)
    run.train()
    after = run.weights()
    module = run.family.module.mix
    by_name = {"lora_A": module.lora_A[ADAPTER].weight, "lora_B": module.lora_B[ADAPTER].weight}
    assert {key.split(".")[-2] for key in after} == set(by_name)
    for key, value in after.items():
        assert torch.equal(value, by_name[key.split(".")[-2]]) and not value.requires_grad
        assert torch.equal(before[key], kept[key]) and not torch.equal(before[key], value)
    assert all(math.isfinite(float(value.sum())) for value in after.values())
