"""The whole batch first, then one by one: what fails is told from what does not."""

import pytest

from t2i_spo_plugin.batching import isolate_failures


class Halving:
    """Halves even numbers, has no result for zero, and fails on odd ones."""

    def __init__(self):
        self.calls = []

    def __call__(self, numbers):
        self.calls.append(list(numbers))
        odd = [number for number in numbers if number % 2]
        if odd:
            raise ValueError(f"{odd} cannot be halved")
        return ["nothing to halve" if number == 0 else number // 2 for number in numbers]


def test_a_batch_in_order_is_called_once():
    halve = Halving()
    assert isolate_failures(halve, [2, 0, 8]) == [1, "nothing to halve", 4]
    assert halve.calls == [[2, 0, 8]]


def test_an_item_that_fails_spoils_no_other_and_keeps_its_own_reason():
    results = isolate_failures(Halving(), [2, 3, 0, 5, 8], "the halving failed: ")
    assert results == [
        1,
        "the halving failed: ValueError: [3] cannot be halved",
        "nothing to halve",
        "the halving failed: ValueError: [5] cannot be halved",
        4,
    ]


def test_no_item_means_no_call():
    halve = Halving()
    assert isolate_failures(halve, []) == [] and halve.calls == []


def test_a_wrong_number_of_results_is_a_failure():
    assert isolate_failures(lambda items: items[:1], [1, 2]) == [1, 2]
    assert isolate_failures(lambda items: [], [1, 2]) == ["ValueError: 0 results for 1 items"] * 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_ends_the_run(interruption):
    def stop(items):
        raise interruption

    with pytest.raises(interruption):
        isolate_failures(stop, [1, 2])
