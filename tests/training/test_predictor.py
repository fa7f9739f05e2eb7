"""What the denoiser is asked, against a denoiser that can be written out in a line."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from support.toy_family import SHAPE, ToyFamily, texts, toy_batches, toy_predictor

from t2i_spo_plugin.training.objectives.base import Inputs
from t2i_spo_plugin.training.predictor import Passes, Predictor, StoredErrors


@pytest.fixture
def family():
    return ToyFamily()


@pytest.fixture
def batch(family, tmp_path):
    return toy_batches(tmp_path, family).at(0, range(3))


def sides(family, batch, adapter=True):
    """Predictions `[S, B, C, h, w]`, written out."""
    text = batch.text["text"]
    each = zip(batch.latents, batch.noise, batch.index, strict=True)
    return torch.stack([family.expected(*side, text, adapter) for side in each])


def squared(predictions, target):
    return ((predictions - target) ** 2).mean((2, 3, 4))


def inputs(count, seed=0):
    noisy = torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed))
    prompts = [""] * count
    return Inputs(noisy, torch.full((count,), 9 - seed), {"text": texts(prompts)})


def test_model_and_reference_predict_with_the_adapter_on_and_off(family, batch):
    predictions, outputs = toy_predictor(family).train(batch)
    on, off = sides(family, batch), sides(family, batch, adapter=False)
    assert outputs == [] and not torch.allclose(on, off)
    torch.testing.assert_close(predictions.model, on)
    torch.testing.assert_close(predictions.reference, off)
    assert torch.equal(predictions.target, batch.noise)
    torch.testing.assert_close(predictions.errors, squared(on, batch.noise))
    torch.testing.assert_close(predictions.reference_errors, squared(off, batch.noise))
    assert predictions.errors.requires_grad
    assert not predictions.reference.requires_grad and not predictions.reference_errors.requires_grad


def test_further_samples_are_predicted_in_the_same_call_and_handed_back_one_by_one(family, batch):
    extra = [inputs(2), inputs(1, seed=3)]
    predictions, outputs = toy_predictor(family).train(batch, extra)
    torch.testing.assert_close(predictions.model, sides(family, batch))
    torch.testing.assert_close(predictions.reference, sides(family, batch, adapter=False))
    for asked, given in zip(extra, outputs, strict=True):
        place = asked.noisy, asked.index, asked.text["text"]
        torch.testing.assert_close(given.model, family.expected_of(*place))
        torch.testing.assert_close(given.reference, family.expected_of(*place, adapter=False))
        assert given.model.requires_grad and not given.reference.requires_grad


def test_the_reference_is_not_asked_where_nobody_needs_it(family, batch):
    predictor = toy_predictor(family)
    predictions, (output,) = predictor.train(batch, [inputs(2)], reference=False)
    assert predictions.reference is None and predictions.reference_errors is None and output.reference is None
    assert (predictor.passes.forward, predictor.passes.backward) == (2 * 3 + 2, 2 * 3 + 2)


def test_passes_count_samples_of_model_and_reference(family, batch):
    predictor = toy_predictor(family)
    predictor.train(batch, [inputs(2)])
    assert (predictor.passes.forward, predictor.passes.backward) == (2 * (2 * 3 + 2), 2 * 3 + 2)
    predictor.evaluate(batch)
    assert (predictor.passes.forward, predictor.passes.backward) == (2 * (2 * 3 + 2) + 2 * 2 * 3, 2 * 3 + 2)
    assert predictor.passes.total == sum((predictor.passes.forward, predictor.passes.backward))
    assert Passes().total == 0


def test_evaluation_predicts_the_same_without_a_gradient(family, batch):
    predictor = toy_predictor(family)
    evaluated, (trained, _) = predictor.evaluate(batch), predictor.train(batch)
    for name in ("model", "reference", "target", "errors", "reference_errors"):
        values = getattr(evaluated, name)
        torch.testing.assert_close(values, getattr(trained, name).detach())
        assert not values.requires_grad


def test_the_adapter_is_on_again_when_the_reference_fails(family, batch):
    predictor = toy_predictor(family)

    def fail(*args):
        raise RuntimeError("out of memory")

    handle = family.module.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        predictor.train(batch)
    handle.remove()
    torch.testing.assert_close(predictor.evaluate(batch).model, sides(family, batch).detach())


def test_everything_with_a_gradient_goes_through_the_wrapper_and_all_else_through_the_bare_denoiser(family, batch):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args):
            self.calls += 1
            return self.inner(*args)

    wrapper, entered = Wrapper(family.module), []

    @contextmanager
    def context():
        entered.append(True)
        yield

    predictor = Predictor(family, wrapper, 8, context)
    predictor.train(batch)
    predictor.evaluate(batch)
    assert wrapper.calls == 1 and len(entered) == 4


def test_stored_errors_of_the_reference_are_computed_once(family, batch):
    predictor, stored = toy_predictor(family), StoredErrors(examples=4, draws=1, sides=2)
    assert stored.get(batch) is None
    first, _ = predictor.train(batch, stored=stored)
    asked = predictor.passes.forward
    again, _ = predictor.train(batch, stored=stored)
    assert predictor.passes.forward - asked == 2 * 3 and again.reference is None
    torch.testing.assert_close(again.reference_errors, squared(sides(family, batch, False), batch.noise).detach())
    assert torch.equal(first.reference_errors, again.reference_errors)


def test_stored_errors_are_of_their_example_and_draw(family, tmp_path):
    batches = toy_batches(tmp_path, family, draws_per_pair=2)
    one, later = batches.at(0, [0, 1]), batches.at(1, [4, 5, 6, 7])
    stored = StoredErrors(examples=4, draws=2, sides=2)
    stored.put(one, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert stored.get(one).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert stored.get(batches.at(0, [1, 0])).tolist() == [[2.0, 1.0], [4.0, 3.0]]
    assert stored.get(later) is None, "the second draw of the same examples"
    assert stored.get(batches.at(0, [0, 1, 2])) is None, "one that is not known yet"
