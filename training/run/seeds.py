"""Random streams: every draw of a training is a function of numbers such as (seed, purpose, step, position).

No generator lives longer than what it is made for, so a run resumes without any random state, and every process draws
the same numbers for the same sample.
"""

import numpy as np


def seed_from(*numbers: int) -> int:
    """Returns a seed for a generator that takes one number, such as torch's.

    It depends on all the numbers and on how many there are, and is the same on every machine.
    """
    numbers = (len(numbers), *numbers)  # otherwise (1, 2) and (1, 2, 0) would give one seed
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def generator(*numbers: int) -> np.random.Generator:
    """Returns numpy's generator for these numbers.

    numpy gives (1, 2) and (1, 2, 0) the same stream, so one caller always gives the same count of numbers.
    """
    return np.random.default_rng(numbers)


def uniform_rows(rows: range, width: int, *numbers: int) -> np.ndarray:
    """Returns some rows of an endless table of uniform numbers, without drawing the rows before them.

    Args:
        rows: the numbers of the rows, such as positions of a global batch.
        width: how many numbers a row has.
        numbers: what the table depends on, as in `generator`.

    Returns:
        (rows, width) numbers from 0 to 1. A row is the same whatever other rows are drawn with it.
    """
    bits = np.random.PCG64(numbers)
    bits.advance(rows.start * width)  # each number takes one step of the generator
    return np.random.Generator(bits).random((len(rows), width))
