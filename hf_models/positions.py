"""Where a token is: sinusoidal, learned and rotary positions, in one dimension and in two.

B  batch    T  tokens    P  places of a grid    D  hidden size    H  size of one head
"""

from functools import partial

import torch
from torch import nn


def encode_positions(config, embed_positions: nn.Embedding | None, embeddings, position_ids):
    """Tells a model of text where its tokens are.

    Args:
        config: a `TextConfig`; its `position_embedding_type` chooses the kind of positions.
        embed_positions: the table of learned positions, where there are such.
        embeddings: (B, T, D).
        position_ids: (B, T) or (1, T).

    Returns:
        The embeddings with the positions' vectors added, and the rotations for attention; None where there are none.
    """
    if config.position_embedding_type == "rotary":
        return embeddings, rotary_angles(position_ids, config.head_dim, config.rope_theta, embeddings.dtype)
    if embed_positions is not None:
        return embeddings + embed_positions(position_ids), None
    return embeddings + sinusoidal_encoding(position_ids, config.hidden_size).to(embeddings.dtype), None


def sinusoidal_encoding(positions, dim: int, temperature: float = 10000.0):
    """PE(p, 2i) = sin(p / temperature^(2i/dim)), PE(p, 2i+1) = cos(same) (Vaswani et al. 2017, section 3.5).

    Args:
        positions: (...), of any real kind: token numbers, or coordinates.
        dim: even size of the encoding.

    Returns:
        (..., dim), float32.
    """
    if dim % 2:
        raise ValueError(f"a sinusoidal encoding needs an even size, not {dim}")
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions.to(torch.float32)[..., None] / temperature**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def sinusoidal_encoding_2d(rows, columns, dim: int, temperature: float = 10000.0):
    """Half of the encoding tells the row, the other half the column (Carion et al. 2020, appendix A.4).

    Args:
        rows, columns: (...), the vertical and the horizontal coordinate of each place.
        dim: size of the encoding, a multiple of four.

    Returns:
        (..., dim), float32.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sinusoidal encoding needs a size divisible by four, not {dim}")
    encode = partial(sinusoidal_encoding, dim=dim // 2, temperature=temperature)
    return torch.cat((encode(rows), encode(columns)), dim=-1)


class LearnedPositions2D(nn.Module):
    """A learned vector for each column and each row, half the size each: places in one row or in one column share a
    half (Carion et al. 2020's learned variant, the column first as there)."""

    def __init__(self, num_rows: int, num_columns: int, dim: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"learned two-dimensional positions need an even size, not {dim}")
        self.column_embeddings = nn.Embedding(num_columns, dim // 2)
        self.row_embeddings = nn.Embedding(num_rows, dim // 2)

    def forward(self, height: int, width: int):
        """The encodings (height, width, D) of the top left part of the grid."""
        columns = self.column_embeddings.weight[:width].expand(height, -1, -1)
        rows = self.row_embeddings.weight[:height, None].expand(-1, width, -1)
        return torch.cat((columns, rows), dim=-1)


def rotary_angles(position_ids, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32):
    """The rotations of rotary position embedding (Su et al. 2021, equation 15): pair i of a head turns by
    p theta^(-2i/H), so that a product of query and key depends on the distance of their tokens alone.

    Returns:
        Cosines and sines, (B, 1, T, H / 2) each. Nothing is stored, so there is nothing to restore or to move.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim, not {head_dim}")
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids.to(torch.float32)[:, None, :, None] / theta**exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_angles_2d(rows, columns, head_dim: int, theta: float = 100.0, dtype: torch.dtype = torch.float32):
    """Rotations for places in a plane: the first half of the pairs turns by the row, the other by the column (Heo et
    al. 2024, "Rotary position embedding for vision transformer", section 3.2, axial frequencies).

    Args:
        rows, columns: (P,), the coordinates of each place.
        head_dim: a multiple of four.

    Returns:
        Cosines and sines, (1, 1, P, H / 2) each.
    """
    if head_dim % 4:
        raise ValueError(f"two-dimensional rotary positions need a head_dim divisible by four, not {head_dim}")
    parts = [rotary_angles(places[None], head_dim // 2, theta, dtype) for places in (rows, columns)]
    cosines, sines = zip(*parts, strict=True)
    return torch.cat(cosines, dim=-1), torch.cat(sines, dim=-1)


def apply_rotary(states, cosines, sines):
    """Turns each pair of (B, N, T, H) states; as in GPT-NeoX a pair is (i, i + H/2), not two neighbours."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
