"""Which part of the data is held out for validation where the data has no such part."""

from collections.abc import Iterable

import numpy as np


def key_of(digest: bytes) -> int:
    """The key of an example, a 64-bit number, from the sha256 of its content."""
    return int.from_bytes(digest[:8], "big")


def hold_out(keys: Iterable[int], fraction: float) -> np.ndarray:
    """Says for each example whether it is held out: the examples with the smallest keys are, and at least one.

    Keys come from the content, so neither the order of the examples nor duplicates matter: equal examples are held out
    together. All are held out if all are equal; the caller refuses that or trains on them.

    Args:
        keys: (N,), from `key_of`.
        fraction: the part of the examples to hold out.

    Returns:
        (N,) bool.
    """
    keys = np.asarray(keys, np.uint64)
    return keys <= np.sort(keys)[max(1, round(fraction * len(keys))) - 1]
