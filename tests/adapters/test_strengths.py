"""What a strength may be."""

import pytest

from t2i_spo_plugin.adapters.strengths import check_strength
from t2i_spo_plugin.errors import ConfigError


@pytest.mark.parametrize("strength", [-0.1, -1, float("nan"), float("inf"), True, "1", None])
def test_a_strength_must_be_a_number_of_at_least_0(strength):
    with pytest.raises(ConfigError, match="strength must be"):
        check_strength(strength)


@pytest.mark.parametrize("strength", [0, 0.0, 1, 2.5])
def test_a_strength_of_at_least_0_is_accepted(strength):
    assert check_strength(strength) == strength and isinstance(check_strength(strength), float)
