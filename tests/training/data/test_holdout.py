import hashlib

import numpy as np
import pytest

from training.data.holdout import hold_out, key_of

KEYS = [key_of(hashlib.sha256(b"%d" % number).digest()) for number in range(100)]


@pytest.mark.parametrize("fraction, count", [(0.1, 10), (0.004, 1), (0.255, 26), (0.999, 100)])
def test_the_smallest_keys_are_held_out_and_at_least_one(fraction, count):
    expected = sorted(KEYS)[:count]
    assert sorted(np.array(KEYS, np.uint64)[hold_out(KEYS, fraction)].tolist()) == expected


def test_neither_order_nor_duplicates_matter():
    held_out = hold_out(KEYS, 0.2)
    assert hold_out(KEYS[::-1], 0.2).tolist() == held_out[::-1].tolist()
    twice = hold_out(KEYS + KEYS, 0.2)
    assert twice[:100].tolist() == twice[100:].tolist() == held_out.tolist()


def test_a_key_is_the_first_eight_bytes_of_a_digest():
    assert key_of(bytes(range(32))) == 0x0001020304050607
