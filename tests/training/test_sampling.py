"""Which example is drawn when, with which random numbers, and the learning rate's course."""

from __future__ import annotations

import pytest
import torch

from t2i_spo_plugin.training.sampling import Order, draw, generator, learning_rate_factor


def test_order_visits_every_pair_once_an_epoch_and_keeps_the_share():
    benign = torch.tensor([True, False, False, False, False])
    order = Order(benign, seed=0)
    assert sorted(order.at(position)[0] for position in range(5)) == list(range(5))
    assert {order.at(position)[1] for position in range(5, 10)} == {1}
    mixed = [Order(benign, seed=0, share=0.5).at(position) for position in range(8)]
    assert sum(pair == 0 for pair, _ in mixed) == 4
    assert sorted(pair for pair, _ in mixed if pair) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="benign_share"):
        Order(torch.zeros(3, dtype=torch.bool), seed=0, share=0.5)


def test_generators_differ_by_place_and_not_by_history():
    draws = {tuple(torch.rand(2, generator=generator(0, "sample", step, 3)).tolist()) for step in range(50)}
    assert len(draws) == 50
    assert torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "a")))


def test_learning_rate_schedules():
    assert [learning_rate_factor(step, 10, 4, "constant") for step in (0, 3, 9)] == [0.25, 1.0, 1.0]
    assert learning_rate_factor(7, 10, 4, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(7, 10, 4, "cosine") == pytest.approx(0.5)


def test_draws_of_an_example_do_not_depend_on_its_options_or_images():
    draws = [
        draw(generator(0, "sample", 3, 1), (2, 4, 4), (0, 1000), dropout, flip, images)
        for dropout, flip, images in ((0.0, False, 2), (1.0, True, 1), (0.5, True, 2))
    ]
    for one in draws[1:]:
        assert one.index == draws[0].index and torch.equal(one.noise, draws[0].noise)
        assert torch.equal(one.posterior[0], draws[0].posterior[0])
    assert draws[1].drop_caption and not draws[0].mirror


def test_indices_stay_in_their_range_and_reach_its_ends():
    indices = {draw(generator(0, "sample", n, 0), (1, 1, 1), (10, 14)).index for n in range(80)}
    assert indices == {10, 11, 12, 13}
