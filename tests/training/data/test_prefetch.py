import threading

import pytest

from training.data.prefetch import MAX_WAITING, Prefetcher


def test_a_call_that_has_begun_is_not_made_again():
    ahead, calls = Prefetcher(), []

    def call(value):
        calls.append((value, threading.current_thread() is threading.main_thread()))
        return value + 1

    ahead.begin("key", call, 1)
    ahead.begin("key", call, 1)
    assert ahead.take("key", call, 1) == 2 and calls == [(1, False)]
    assert ahead.take("key", call, 1) == 2 and calls == [(1, False), (1, True)]


def test_results_that_nobody_takes_are_dropped_the_oldest_first():
    ahead, calls = Prefetcher(), []
    for number in range(3 * MAX_WAITING):
        ahead.begin(number, int, number)
    assert ahead.take(3 * MAX_WAITING - 1, calls.append, 0) == 3 * MAX_WAITING - 1 and not calls
    ahead.take(0, calls.append, 0)
    assert calls == [0]


def test_an_error_is_raised_where_the_result_is_taken():
    ahead = Prefetcher()
    ahead.begin("key", int, "no number")
    with pytest.raises(ValueError, match="no number"):
        ahead.take("key", int, "1")
