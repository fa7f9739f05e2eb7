"""Windows and strength schedules."""

import pytest

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.gating import Schedule
from t2i_spo_plugin.gating.schedule import check_window, in_window


def test_a_schedule_goes_straight_between_its_points_and_keeps_its_ends():
    schedule = Schedule([(0.2, 0.5), (0.6, 1.5)])
    assert [schedule.factor(p) for p in (0.0, 0.2, 0.4, 0.6, 0.9)] == pytest.approx([0.5, 0.5, 1.0, 1.5, 1.5])


@pytest.mark.parametrize(
    "points", [[], [(0.5, 1.0), (0.5, 0.0)], [(0.0, -1.0)], [(0.0, float("nan"))], [(1.2, 1.0)], 3]
)
def test_a_schedule_out_of_range_is_refused(points):
    with pytest.raises(ConfigError):
        Schedule(points)


@pytest.mark.parametrize("steps", [3, 7, 25, 30, 50])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 2), (2, 3)])
def test_windows_that_share_a_boundary_share_no_step_and_leave_none_out(steps, start, end):
    parts = [(start / 3, end / 3) for start, end in ((0, 1), (1, 2), (2, 3))]
    for step in range(steps):
        assert sum(in_window(step / steps, part) for part in parts) == 1
    inside = [step for step in range(steps) if in_window(step / steps, (start / 3, end / 3))]
    assert inside == [step for step in range(steps) if start * steps <= 3 * step < end * steps]


def test_a_boundary_with_a_rounding_error_is_still_that_of_its_step():
    assert 0.1 + 0.2 != 3 / 10
    assert not in_window(3 / 10, (0.0, 0.1 + 0.2)) and in_window(3 / 10, (0.1 + 0.2, 1.0))
    assert not in_window(1 - 0.7, (0.0, 0.3)) and in_window(1 - 0.9, (0.1, 0.3))


@pytest.mark.parametrize(
    "window", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.0,), "ab", (0.6, 0.4), (float("nan"), 1.0)]
)
def test_a_window_out_of_range_is_refused(window):
    with pytest.raises(ConfigError):
        check_window(window)


def test_a_schedule_may_use_the_whole_range_and_a_factor_of_zero():
    schedule = Schedule([(0.0, 0.0), (1.0, 2.0)])
    assert [schedule.factor(progress) for progress in (0.0, 0.25, 1.0)] == [0.0, 0.5, 2.0]
    assert Schedule([(0.5, 3)]).points == ((0.5, 3.0),)


@pytest.mark.parametrize(
    "points", [[(0.6, 1.0), (0.4, 1.0)], [(-0.1, 1.0)], [(0.1, 1.0), (0.5, float("inf"))], [(0.1, 1.0, 2.0)]]
)
def test_points_that_make_no_line_are_refused(points):
    with pytest.raises(ConfigError):
        Schedule(points)


def test_a_window_comes_back_as_two_floats():
    assert check_window((0, 1)) == (0.0, 1.0) and check_window([0.25, 0.5]) == (0.25, 0.5)


def test_a_window_begins_with_its_start_and_ends_before_its_end():
    window = (0.2, 0.6)
    assert [in_window(progress, window) for progress in (0.19, 0.2, 0.4, 0.59, 0.6, 0.61)] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_schedule_of_many_points_goes_from_each_to_the_next_and_stays_at_the_last():
    schedule = Schedule([(0.0, 1.0), (0.5, 1.0), (0.8, 0.0), (0.9, 2.0)])
    values = [schedule.factor(progress) for progress in (0.25, 0.5, 0.65, 0.85, 0.9, 1.0)]
    assert values == pytest.approx([1.0, 1.0, 0.5, 1.0, 2.0, 2.0])
