"""Intervals against closed forms: Wilson's quadratic, and bootstraps so small that their distribution is known."""

import numpy as np
import pytest

from t2i_spo_plugin.errors import ConfigError, NotScoredError
from t2i_spo_plugin.metrics import Interval, bootstrap_mean, bootstrap_ratio, percent, wilson
from t2i_spo_plugin.metrics.intervals import percentile_interval, resampled_mean


TWO = ("a", "b")
"""Two prompts: a resample holds only the first in 1/4 of the cases, both in 1/2, only the second in 1/4."""


@pytest.mark.parametrize("z", [1.0, 1.96, 3.0])
@pytest.mark.parametrize(("successes", "n"), [(1, 2), (3, 10), (5, 10), (81, 263), (499, 500), (1, 500)])
def test_wilson_ends_are_the_proportions_z_standard_errors_away(successes, n, z):
    low, high = wilson(successes, n, z)
    assert 0.0 < low < successes / n < high < 1.0
    for end in (low, high):
        assert (successes / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, rel=1e-9)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_matches_published_values(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


# Of these, rounding alone would miss the edge for 6 and 11.
@pytest.mark.parametrize("n", [1, 3, 6, 10, 11, 49, 500])
def test_wilson_of_none_or_all_ends_exactly_at_the_edge(n):
    none, every = wilson(0, n), wilson(n, n)
    assert none.low == 0.0 and every.high == 1.0
    assert none.high == pytest.approx(1.96**2 / (n + 1.96**2)) and every.low == pytest.approx(1.0 - none.high)


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (1, 0)])
def test_wilson_refuses_more_successes_than_trials(successes, n):
    with pytest.raises(ConfigError, match=f"got {successes} of {n}"):
        wilson(successes, n)


def test_an_interval_holds_its_ends():
    interval = Interval(0.25, 0.75)
    assert not any(interval.excludes(value) for value in (0.25, 0.5, 0.75))
    assert interval.excludes(0.2499) and interval.excludes(0.7501)


def test_a_rate_is_printed_in_percent():
    assert percent(0.1234, Interval(0.1, 0.15)) == "12.3 % [10.0, 15.0]"


@pytest.mark.parametrize(("level", "ends"), [(0.5, (25.0, 75.0)), (0.9, (5.0, 95.0)), (0.95, (2.5, 97.5))])
def test_percentile_interval_leaves_equal_shares_on_both_sides(level, ends):
    assert percentile_interval(np.arange(101.0), level) == pytest.approx(ends)


def test_percentile_interval_takes_95_percent_by_default():
    assert percentile_interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 1.04])
def test_percentile_interval_refuses_a_level_that_is_no_share(level):
    with pytest.raises(ConfigError, match="strictly between 0 and 1"):
        percentile_interval(np.arange(101.0), level)


def test_bootstrap_of_a_mean_over_two_prompts_has_its_three_known_values():
    assert bootstrap_mean([0.2, 0.8], TWO) == pytest.approx((0.2, 0.8))
    assert bootstrap_mean([0.2, 0.8], TWO, level=0.4) == pytest.approx((0.5, 0.5))
    means = resampled_mean(np.array([0.2, 0.8]), TWO, 40_000, np.random.default_rng(0))
    values, counts = np.unique(means.round(9), return_counts=True)
    assert values == pytest.approx([0.2, 0.5, 0.8]) and counts / 40_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_bootstrap_keeps_the_images_of_a_prompt_together_and_weighs_every_image():
    values, prompts = [0.0, 0.3, 0.6, 1.0], ("a", "b", "a", "a")  # of a: 0, 0.6, 1
    means = resampled_mean(np.array(values), prompts, 2000, np.random.default_rng(0))
    assert set(means.round(6)) == {round(1.6 / 3, 6), 0.3, round(1.9 / 4, 6)}


def test_bootstrap_of_equal_values_is_a_point():
    assert bootstrap_mean([0.25] * 8, list("aabbccdd")) == (0.25, 0.25)


def test_bootstrap_is_seeded_and_documented_defaults_hold():
    values, prompts = np.random.default_rng(1).uniform(size=50), [str(number) for number in range(50)]
    assert bootstrap_mean(values, prompts) == bootstrap_mean(values, prompts, resamples=2000, seed=0, level=0.95)
    assert bootstrap_mean(values, prompts, seed=1) != bootstrap_mean(values, prompts)
    below = values + 1.0
    assert bootstrap_ratio(values, below, prompts) == bootstrap_ratio(values, below, prompts, 2000, 0, 0.95)
    assert bootstrap_ratio(values, below, prompts, seed=1) != bootstrap_ratio(values, below, prompts)


def test_bootstrap_needs_one_resample():
    low, high = bootstrap_mean([0.2, 0.8], TWO, resamples=1)
    assert low == high
    with pytest.raises(ConfigError, match="resamples must be at least 1, got 0"):
        bootstrap_mean([0.2, 0.8], TWO, resamples=0)


def test_bootstrap_of_a_ratio_has_its_three_known_values():
    above, below = [1.0, 6.0], [2.0, 4.0]
    assert bootstrap_ratio(above, below, TWO) == pytest.approx((0.5, 1.5))
    assert bootstrap_ratio(above, below, TWO, level=0.4) == pytest.approx((7 / 6, 7 / 6))


def test_bootstrap_of_a_ratio_leaves_out_resamples_without_a_denominator():
    # Only b: 3 / 0, left out. Only a: 0.2 / 0.4; both: 3.2 / 0.4.
    assert bootstrap_ratio([0.2, 3.0], [0.4, 0.0], TWO) == pytest.approx((0.5, 8.0))
    assert bootstrap_ratio([0.2, 3.0], [0.4, 0.0], TWO, level=0.2) == pytest.approx((8.0, 8.0))


def test_bootstrap_of_a_ratio_refuses_a_denominator_of_0():
    with pytest.raises(NotScoredError, match="relative to one that is 0"):
        bootstrap_ratio([1.0, 0.0], [0.0, 0.0], TWO)
    # A denominator of one image in all is small, but not 0.
    assert bootstrap_ratio([1.0, 0.0], [1.0, 0.0], TWO) == (1.0, 1.0)


def test_bootstrap_of_a_ratio_holds_the_ratio():
    random = np.random.default_rng(0)
    base = (random.uniform(size=400) < 0.9).astype(float)
    system = base * (random.uniform(size=400) < 0.95)
    low, high = bootstrap_ratio(system, base, [str(i) for i in range(400)])
    assert low < system.sum() / base.sum() < high <= 1.0


def test_bootstrap_does_not_depend_on_the_order_of_rows():
    random = np.random.default_rng(0)
    above, below, prompts = random.uniform(size=90), random.uniform(size=90), [str(i % 31) for i in range(90)]
    order = random.permutation(90)
    turned = above[order], below[order], [prompts[i] for i in order]
    assert bootstrap_mean(above, prompts) == bootstrap_mean(turned[0], turned[2])
    assert bootstrap_ratio(above, below, prompts) == bootstrap_ratio(*turned)
