"""Intervals of proportions and means: Wilson, and the bootstrap over prompts. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from t2i_spo_plugin.errors import ConfigError, NotScoredError


Z_95 = 1.96

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """Lower and upper end of an interval."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside."""
        return not self.low <= value <= self.high


def wilson(successes: float, n: float, z: float = Z_95) -> Interval:
    """Wilson score interval of a proportion, `z = 1.96` for 95 %; (0, 1) when there is nothing to count.

    Both may be fractions, see `effective_number`.

    Raises:
        ConfigError: `successes` is not within [0, n].
    """
    if not 0 <= successes <= n:
        raise ConfigError(f"expected 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    p, zz = successes / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    spread = z / (1 + zz / n) * np.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, float(centre - spread))
    high = 1.0 if successes == n else min(1.0, float(centre + spread))
    return Interval(low, high)


def effective_number(outcomes: ArrayLike, prompts: Sequence[str]) -> float:
    """How many independent images the `outcomes` `[N]` (0 or 1) are worth, when a prompt may have several of them.

    `p (1 - p) / V` with `V` the variance of the mean `p` over prompts (Korn and Graubard, 1998), within the number of
    prompts and N. Where all outcomes agree it is the number of prompts: nothing then says how much seeds differ.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    counts, sums = _per_prompt(np.ones(len(values)), prompts), _per_prompt(values, prompts)
    n, m = len(values), len(counts)
    if m in (0, 1, n):
        return float(m)
    p = values.mean()
    variance = m / (m - 1) * float(((sums - p * counts) ** 2).sum()) / n**2
    spread = float(p * (1 - p))
    if spread == 0.0:
        return float(m)
    return float(np.clip(spread / variance, m, n)) if variance > 0.0 else float(n)


def bootstrap_mean(
    values: ArrayLike, prompts: Sequence[str], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of a mean, resampling prompts."""
    array = np.asarray(values, dtype=np.float64)
    return percentile_interval(resampled_mean(array, prompts, resamples, np.random.default_rng(seed)), level)


def bootstrap_ratio(
    above: ArrayLike,
    below: ArrayLike,
    prompts: Sequence[str],
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of `sum(above) / sum(below)`, both `[N]` per image, resampling the prompts they share.

    Raises:
        NotScoredError: `below` sums to 0.
    """
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    if below.sum() == 0:
        raise NotScoredError("a rate relative to one that is 0 has no meaning")
    draws = _prompt_draws(prompts, resamples, np.random.default_rng(seed))
    sums = draws @ _per_prompt(above, prompts), draws @ _per_prompt(below, prompts)
    positive = sums[1] > 0
    return percentile_interval(sums[0][positive] / sums[1][positive], level)


def percentile_interval(values: Floats, level: float = 0.95) -> Interval:
    """The central `level` of `values`."""
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level must lie strictly between 0 and 1, got {level}")
    low, high = np.quantile(values, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(low), float(high))


def percent(rate: float, interval: Interval) -> str:
    """`12.3 % [10.0, 15.0]`."""
    return f"{100 * rate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _prompt_draws(prompts: Sequence[str], resamples: int, random: np.random.Generator) -> NDArray[np.float64]:
    """How often each distinct prompt (in alphabetical order) is drawn, `[resamples, P]`."""
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1, got {resamples}")
    n = len(set(prompts))
    return random.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


def _per_prompt(values: Floats, prompts: Sequence[str]) -> Floats:
    position = {prompt: number for number, prompt in enumerate(sorted(set(prompts)))}
    places = np.array([position[prompt] for prompt in prompts])
    # By prompt and value, so that the order of rows changes nothing, not even the last bit.
    order = np.lexsort((values, places))
    return np.bincount(places[order], weights=values[order], minlength=len(position)).astype(np.float64)


def resampled_mean(
    values: Floats, prompts: Sequence[str], resamples: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Means of `values [N]` over prompts drawn with replacement, `[resamples]`; images of a prompt go together."""
    draws = _prompt_draws(prompts, resamples, random)
    counts = _per_prompt(np.ones(len(values)), prompts)
    return (draws @ _per_prompt(values, prompts)) / (draws @ counts)
