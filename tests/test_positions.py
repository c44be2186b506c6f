"""Every formula of positions.py against the same formula written plainly, in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from hf_models.positions import (
    LearnedPositions2D,
    apply_rotary,
    rotary_angles,
    rotary_angles_2d,
    sinusoidal_encoding,
    sinusoidal_encoding_2d,
)
from tests.formulas import SINGLE, rotate, states


def test_sinusoidal_encoding_is_the_formula():
    encoding = sinusoidal_encoding(torch.arange(50), 12, temperature=1000.0)
    for position in range(50):
        for i in range(6):
            angle = position / 1000.0 ** (2 * i / 12)
            assert encoding[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert encoding[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_two_dimensional_sinusoidal_encoding_tells_the_row_then_the_column():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.linspace(0, 2 * math.pi, 5), indexing="ij")
    encoding = sinusoidal_encoding_2d(rows, columns, 16)
    assert encoding.shape == (4, 5, 16)
    for row in range(4):
        for column in range(5):
            assert_close(encoding[row, column, :8], sinusoidal_encoding(rows[row, column], 8))
            assert_close(encoding[row, column, 8:], sinusoidal_encoding(columns[row, column], 8))


def test_learned_two_dimensional_positions_share_halves_along_rows_and_columns(randomise):
    positions = randomise(LearnedPositions2D(6, 7, 8))
    encoding = positions(4, 5)
    assert encoding.shape == (4, 5, 8)
    for row in range(4):
        for column in range(5):
            assert torch.equal(encoding[row, column, :4], positions.column_embeddings.weight[column])
            assert torch.equal(encoding[row, column, 4:], positions.row_embeddings.weight[row])


def test_rotary_is_a_rotation_of_each_pair():
    x, positions = states(2, 3, 9, 8), torch.stack((torch.arange(9), torch.arange(9) * 5))
    rotated = apply_rotary(x, *rotary_angles(positions, 8, 50.0, torch.float64))
    assert_close(rotated, rotate(x, positions[:, None], 50.0), **SINGLE)
    assert_close(rotated.norm(dim=-1), x.norm(dim=-1), **SINGLE)


def test_two_dimensional_rotary_turns_half_of_the_pairs_by_the_row_and_half_by_the_column():
    """Heo et al. 2024, section 3.2: of the pairs (i, i + H/2), the first half by row theta^(-4i/H), the second by
    column theta^(-4i/H)."""
    rows, columns = torch.rand(9, dtype=torch.float64) * 10, torch.rand(9, dtype=torch.float64) * 10
    x = states(2, 3, 9, 16)
    turned = apply_rotary(x, *rotary_angles_2d(rows, columns, 16, 100.0, torch.float64))
    pairs = torch.complex(x[..., :8], x[..., 8:])
    for i in range(8):
        place, step = (rows, i) if i < 4 else (columns, i - 4)
        angle = place * 100.0 ** (-4 * step / 16)
        expected = pairs[..., i] * torch.exp(1j * angle)
        assert_close(turned[..., i], expected.real, **SINGLE)
        assert_close(turned[..., i + 8], expected.imag, **SINGLE)


def test_rotary_scores_depend_on_the_distance_alone():
    query, key = states(1, 1, 1, 16), states(1, 1, 1, 16)

    def score(query_position, key_position):
        def turn(x, p):
            return apply_rotary(x, *rotary_angles(torch.tensor([[p]]), 16, dtype=torch.float64))

        return (turn(query, query_position) * turn(key, key_position)).sum()

    assert_close(score(7, 3), score(107, 103), **SINGLE)
    assert_close(score(0, 40), score(25, 65), **SINGLE)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@pytest.mark.parametrize(
    "call",
    [
        lambda: sinusoidal_encoding(torch.arange(3), 7),
        lambda: sinusoidal_encoding_2d(torch.arange(3), torch.arange(3), 6),
        lambda: LearnedPositions2D(3, 3, 7),
        lambda: rotary_angles(torch.arange(3)[None], 7),
        lambda: rotary_angles_2d(torch.arange(3), torch.arange(3), 6),
    ],
)
def test_positions_refuse_sizes_that_do_not_divide(call):
    with pytest.raises(ValueError, match="[67]"):
        call()
