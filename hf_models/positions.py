"""Positions of tokens: sinusoidal, learned and rotary, in one dimension and in two.

B  batch    T  tokens    P  places of a grid    D  hidden size    H  size of one head
"""

from functools import partial

import torch
from torch import Tensor, nn


def encode_positions(
    config, embed_positions: nn.Embedding | None, embeddings: Tensor, position_ids: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Applies the positions of a text model, which `config.position_embedding_type` chooses.

    Args:
        config: a `TextConfig`.
        embed_positions: the table of learned positions, or None.
        embeddings: (B, T, D).
        position_ids: (B, T) or (1, T).

    Returns:
        The embeddings (B, T, D) with learned or sinusoidal positions added; and the rotations that attention applies,
        or None without rotary positions.
    """
    if config.position_embedding_type == "rotary":
        return embeddings, rotary_angles(position_ids, config.head_dim, config.rope_theta, embeddings.dtype)
    if embed_positions is not None:
        return embeddings + embed_positions(position_ids), None
    return embeddings + sinusoidal_encoding(position_ids, config.hidden_size).to(embeddings.dtype), None


def sinusoidal_encoding(positions: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """PE(p, 2i) = sin(p / temperature^(2i/dim)), PE(p, 2i+1) = cos(same) (Vaswani et al. 2017, section 3.5).

    Args:
        positions: (...), of any real dtype: token numbers, or coordinates.
        dim: even size of the encoding.

    Returns:
        (..., dim), float32.

    Raises:
        ValueError: `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"a sinusoidal encoding needs an even size, not {dim}")
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions.to(torch.float32)[..., None] / temperature**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def sinusoidal_encoding_2d(rows: Tensor, columns: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Encodes the row in one half of the encoding and the column in the other (Carion et al. 2020, appendix A.4).

    Args:
        rows, columns: (...), the vertical and the horizontal coordinate of each place.
        dim: size of the encoding, a multiple of four.

    Returns:
        (..., dim), float32.

    Raises:
        ValueError: `dim` is not a multiple of four.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sinusoidal encoding needs a size divisible by four, not {dim}")
    encode = partial(sinusoidal_encoding, dim=dim // 2, temperature=temperature)
    return torch.cat((encode(rows), encode(columns)), dim=-1)


class LearnedPositions2D(nn.Module):
    """Learned vectors of half the size for each column and each row, joined in this order for each place of a grid (the
    learned variant of Carion et al. 2020)."""

    def __init__(self, num_rows: int, num_columns: int, dim: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"learned two-dimensional positions need an even size, not {dim}")
        self.column_embeddings = nn.Embedding(num_columns, dim // 2)
        self.row_embeddings = nn.Embedding(num_rows, dim // 2)

    def forward(self, height: int, width: int):
        """Returns the encodings (height, width, D) of the top left part of the grid."""
        columns = self.column_embeddings.weight[:width].expand(height, -1, -1)
        rows = self.row_embeddings.weight[:height, None].expand(-1, width, -1)
        return torch.cat((columns, rows), dim=-1)


def rotary_angles(
    position_ids: Tensor, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The rotations of rotary position embedding (Su et al. 2021, equation 15).

    At position p the pair i of a head is rotated by p theta^(-2i/H), so that the product of a query and a key depends
    only on the distance of their tokens.

    Args:
        position_ids: (B, T).
        head_dim: even size H of one head.

    Returns:
        Cosines and sines, (B, 1, T, H / 2) each.

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim, not {head_dim}")
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids.to(torch.float32)[:, None, :, None] / theta**exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_angles_2d(
    rows: Tensor, columns: Tensor, head_dim: int, theta: float = 100.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Rotations for places in a plane: the row rotates the first half of the pairs, the column the other half (Heo et
    al. 2024, "Rotary position embedding for vision transformer", section 3.2, axial frequencies).

    Args:
        rows, columns: (P,), the coordinates of each place.
        head_dim: size H of one head, a multiple of four.

    Returns:
        Cosines and sines, (1, 1, P, H / 2) each.

    Raises:
        ValueError: `head_dim` is not a multiple of four.
    """
    if head_dim % 4:
        raise ValueError(f"two-dimensional rotary positions need a head_dim divisible by four, not {head_dim}")
    parts = [rotary_angles(axis[None], head_dim // 2, theta, dtype) for axis in (rows, columns)]
    cosines, sines = zip(*parts, strict=True)
    return torch.cat(cosines, dim=-1), torch.cat(sines, dim=-1)


def apply_rotary(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates each pair of the states (B, N, T, H); as in GPT-NeoX a pair is (i, i + H/2), not two neighbours."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
