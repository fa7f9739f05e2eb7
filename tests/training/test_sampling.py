"""Which example is drawn when, with which random numbers, and the learning rate's course."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from support.pairs import train_config

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.training.data.batches import Sampling
from t2i_spo_plugin.training.sampling import (
    Order,
    draw,
    few_index,
    generator,
    learning_rate_factor,
    spread_index,
    uniform_index,
)


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


def test_a_place_has_the_seed_that_earlier_runs_gave_it():
    """Recorded once: a run that is resumed by a later version must draw as it began."""
    assert generator(0, "sample", 0, 3).initial_seed() == 4974930464837049813
    assert generator(0, "x").initial_seed() == 4581555091939458794


def test_an_example_draws_timestep_chances_noise_and_that_of_the_autoencoder_in_this_order():
    one = draw(generator(0, "sample", 3, 1), (2, 4, 4), (100, 900), 0.5, True)
    place = generator(0, "sample", 3, 1)
    assert one.index == int(torch.randint(100, 900, (1,), generator=place))
    dropped, mirrored = (torch.rand(2, generator=place) < 0.5).tolist()
    assert (one.drop_caption, one.mirror) == (dropped, mirrored)
    assert torch.equal(one.noise, torch.randn((2, 4, 4), generator=place))
    assert torch.equal(one.posterior, torch.randn((2, 2, 4, 4), generator=place))


def test_captions_are_dropped_and_images_mirrored_at_their_rates_and_apart():
    draws = [draw(generator(0, "sample", n, 0), (1, 1, 1), (0, 10), 0.3, True) for n in range(2000)]
    dropped, mirrored = ([getattr(one, name) for one in draws] for name in ("drop_caption", "mirror"))
    assert abs(sum(dropped) - 600) < 40 and abs(sum(mirrored) - 1000) < 60
    assert {*zip(dropped, mirrored, strict=True)} == {(False, False), (False, True), (True, False), (True, True)}
    plain = [draw(generator(0, "sample", n, 0), (1, 1, 1), (0, 10)) for n in range(40)]
    assert not any(one.drop_caption or one.mirror for one in plain)


@pytest.mark.parametrize(("images", "rows"), [((), 2), ((1,), 2), ((2,), 2), ((3,), 3)])
def test_each_image_has_noise_of_the_autoencoder(images, rows):
    one = draw(generator(0, "sample", 0, 0), (2, 3, 4), (0, 10), 0.0, False, *images)
    assert one.posterior.shape == (rows, 2, 3, 4) and one.noise.shape == (2, 3, 4)
    assert len({float(part[0, 0, 0]) for part in (*one.posterior, one.noise)}) == rows + 1


def test_benign_positions_are_spread_evenly():
    benign = torch.tensor([True, True, False, False, False])
    order = Order(benign, seed=0, share=0.25)
    kinds = [bool(benign[order.at(position)[0]]) for position in range(40)]
    assert kinds == [False, False, False, True] * 10
    third = [bool(benign[Order(benign, seed=0, share=0.75).at(position)[0]]) for position in range(4)]
    assert sum(third) == 3


def test_each_kind_is_walked_through_by_itself():
    benign = torch.tensor([True, True, False, False, False])
    order = Order(benign, seed=0, share=0.5)
    drawn = [order.at(position) for position in range(24)]
    for kind, size in ((True, 2), (False, 3)):
        stream = [(number, epoch) for number, epoch in drawn if bool(benign[number]) == kind]
        for start in range(0, 12, size):
            part = stream[start : start + size]
            assert {epoch for _, epoch in part} == {start // size} and len({number for number, _ in part}) == size


def test_permutations_differ_by_epoch_and_seed():
    benign = torch.zeros(12, dtype=torch.bool)
    walks = [
        tuple(Order(benign, seed=seed).at(12 * epoch + n)[0] for n in range(12)) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(walks)) == 4 and all(sorted(walk) == list(range(12)) for walk in walks)


def test_a_share_of_none_or_all_needs_no_example_of_the_other_kind():
    none, every = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    assert len({Order(none, seed=0, share=0.0).at(position)[0] for position in range(3)}) == 3
    assert len({Order(every, seed=0, share=1.0).at(position)[0] for position in range(3)}) == 3
    for benign, share in ((none, 1.0), (every, 0.0), (every, 0.5), (none[:0], None)):
        with pytest.raises(ValueError, match="does not occur"):
            Order(benign, seed=0, share=share)


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_follows_its_closed_form(warmup):
    steps = warmup + 40
    assert [learning_rate_factor(step, steps, warmup, "linear") for step in range(warmup)] == [
        (step + 1) / 4 for step in range(warmup)
    ]
    for done in (0, 1, 9, 20, 30, 39):
        factors = {name: learning_rate_factor(warmup + done, steps, warmup, name) for name in ("linear", "cosine")}
        assert factors["linear"] == pytest.approx(1.0 - done / 40)
        assert factors["cosine"] == pytest.approx(math.cos(0.5 * math.pi * done / 40) ** 2)
        assert learning_rate_factor(warmup + done, steps, warmup, "constant") == 1.0


def test_a_run_of_nothing_but_its_warm_up_ends_at_the_full_rate():
    assert learning_rate_factor(4, 4, 4, "linear") == learning_rate_factor(4, 4, 4, "cosine") == 1.0


def indices(sample, count: int = 4000, low: int = 100, high: int = 900) -> torch.Tensor:
    place = torch.Generator().manual_seed(0)
    return torch.tensor([sample(low, high, place) for _ in range(count)])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("normal", [False, True])
def test_timesteps_are_spread_as_the_quantiles_of_their_distribution_say(normal, shift):
    drawn = indices(spread_index(normal, shift)).double()
    assert drawn.min() >= 100 and drawn.max() < 900
    for share in (0.1, 0.5, 0.9):
        u = torch.tensor(share, dtype=torch.float64)
        u = torch.special.ndtri(u).sigmoid() if normal else u
        expected = 100 + 800 * shift * u / (1 + (shift - 1) * u)
        assert abs(float(drawn.quantile(share) - expected)) < 25


def test_the_last_index_is_never_passed():
    assert spread_index(False, 1e9)(0, 10, torch.Generator().manual_seed(0)) == 9


def test_a_few_timesteps_come_equally_often():
    counts = indices(few_index((3, 801, 548))).bincount()
    assert set(counts.nonzero()[:, 0].tolist()) == {3, 548, 801}
    assert counts[[3, 548, 801]].min() > 0.3 * 4000


def test_a_run_draws_from_the_distribution_that_it_is_asked_for():
    family = SimpleNamespace(sample_index=uniform_index)
    assert Sampling(0, (0, 1000)).sample_index(family) is uniform_index
    few = Sampling(0, (0, 1000), timesteps="uniform", timestep_values=(7,)).sample_index(family)
    assert set(indices(few, 20).tolist()) == {7}
    for name, normal in (("uniform", False), ("logit-normal", True)):
        made = Sampling(0, (0, 1000), timesteps=name, timestep_shift=2.0).sample_index(family)
        assert torch.equal(indices(made, 50), indices(spread_index(normal, 2.0), 50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_shift": 2.0}, "timestep_shift needs a distribution"),
        ({"timesteps": "normal"}, "timesteps must be one of family, uniform, logit-normal"),
        ({"timesteps": "uniform", "timestep_shift": 0.0}, "timestep_shift must be above 0"),
        ({"t_min": 10, "timestep_values": [3]}, "timestep_values"),
        ({"t_max": 10, "timestep_values": [10]}, "timestep_values"),
    ],
)
def test_distributions_that_mean_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_config(tmp_path, pairs="p.parquet", **options)
