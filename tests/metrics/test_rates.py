"""Shares of images whose prompts have several seeds: what they are worth, held against a simulation."""

import numpy as np
import pytest

from t2i_spo_plugin.metrics import Rate, effective_number, wilson


def test_images_of_their_own_prompts_are_worth_what_they_are():
    assert effective_number([1, 0, 0, 1], list("abcd")) == 4.0
    assert Rate.of([("a", True), ("b", False)]) == Rate(1, 2) and Rate.of([]) == Rate(0, 0)


def test_images_that_agree_within_each_prompt_are_worth_the_prompts():
    outcomes, prompts = np.repeat([1, 0, 0, 1, 0], 4), np.repeat(list("abcde"), 4)
    assert effective_number(outcomes, list(prompts)) == pytest.approx(5, abs=1.1)
    for same in (0, 1):
        assert effective_number([same] * 20, list(prompts)) == 5.0
    assert effective_number([1, 0, 1], ["a"] * 3) == 1.0


def test_images_that_differ_as_if_by_chance_are_worth_nearly_all():
    random = np.random.default_rng(0)
    prompts = [str(i // 4) for i in range(4000)]
    assert effective_number(random.random(4000) < 0.3, prompts) > 3400


def test_the_worth_is_the_spread_of_the_mean_over_many_samples():
    """The variance of the mean, found by drawing again and again, is that of so many independent images."""
    random = np.random.default_rng(1)

    def sample():
        return (random.random((200, 4)) < random.beta(0.5, 1.0, (200, 1))).astype(float)

    means = [sample().mean() for _ in range(3000)]
    p = float(np.mean(means))
    prompts = [str(i // 4) for i in range(800)]
    worth = float(np.mean([effective_number(sample().ravel(), prompts) for _ in range(200)]))
    assert worth == pytest.approx(p * (1 - p) / np.var(means), rel=0.1)
    assert 200 < worth < 600


def test_a_rate_of_several_seeds_has_the_wider_interval_and_keeps_its_counts():
    pairs = [(str(i), i < 10) for i in range(50) for _ in range(4)]
    rate = Rate.of(pairs)
    assert (rate.k, rate.n, rate.value) == (40, 200, 0.2) and rate.effective < 60
    plain = wilson(40, 200)
    assert rate.interval.low < plain.low and rate.interval.high > plain.high
    assert rate.to_dict()["effective_n"] == rate.effective and "effective_n" not in Rate(1, 2).to_dict()
    assert Rate.of_prompts(pairs) == Rate(10, 50)


def test_one_unsafe_image_among_the_seeds_makes_a_prompt_unsafe():
    assert Rate.of_prompts([("a", False), ("a", True), ("b", False), ("b", False)]) == Rate(1, 2)
