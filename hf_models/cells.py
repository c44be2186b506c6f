"""Positions in an image: the cells of a feature map, and boxes.

    B  batch    h, w  rows and columns of cells, S = h x w    Q  queries    N  attention heads    D  hidden size

A box is (centre x, centre y, width, height). All coordinates are fractions of the unpadded image. `config` is a
`ZooDetrConfig` (see `detr.py`).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .positions import LearnedPositions2D, sinusoidal_encoding, sinusoidal_encoding_2d

ANCHOR_TEMPERATURE = 20.0  # for the encodings of boxes and of the cells they attend to (Liu et al. 2022, section 4.3)
MAX_CELLS = 50  # rows and columns of learned positions, as in the published code


class Cells(NamedTuple):
    """The positions of the h x w cells of a batch's feature map."""

    is_image: Tensor | None  # (B, h, w), false on padding; None if there is no padding
    rows: Tensor  # (B, h), centres of the cells as fractions of the unpadded height
    columns: Tensor  # (B, w), as fractions of the unpadded width
    size: Tensor  # (B, 2), width and height of a cell, as such fractions


def locate_cells(pixel_mask: Tensor | None, pixel_values: Tensor, features: Tensor, stride: int | None) -> Cells:
    """Returns the positions of the cells of a feature map.

    Args:
        pixel_mask: (B, H, W), 1 on the image, 0 on padding at its right and bottom; or None.
        pixel_values, features: (B, C, H, W) and (B, C', h, w).
        stride: height and width of a cell in pixels. None: the cells divide the image evenly.

    Raises:
        ValueError: `pixel_mask` has another shape.
    """
    (batch, _, height, width), (h, w), device = pixel_values.shape, features.shape[2:], pixel_values.device
    heights, widths = (torch.full((batch, 1), float(side), device=device) for side in (height, width))
    is_image = None
    if pixel_mask is not None:
        if pixel_mask.shape != (batch, height, width):
            raise ValueError(
                f"pixel_mask has shape {tuple(pixel_mask.shape)}, but pixel_values {tuple(pixel_values.shape)}"
            )
        is_image = F.interpolate(pixel_mask[None].float(), size=(h, w))[0].bool()  # nearest
        heights, widths = pixel_mask[:, :, :1].sum(1).float(), pixel_mask[:, 0].sum(1, keepdim=True).float()
    size = torch.cat(((stride or width / w) / widths, (stride or height / h) / heights), dim=1)  # (B, 2)
    columns, rows = ((torch.arange(n, device=device) + 0.5) * size[:, i, None] for i, n in enumerate((w, h)))
    return Cells(is_image, rows, columns, size)


class CellPositions(nn.Module):
    """The position vectors that are added to the queries and keys of cells."""

    def __init__(self, config):
        super().__init__()
        self.dim, self.by_centres = config.hidden_size, config.anchor_queries
        is_learned = config.position_embedding_type == "learned"
        self.learned = LearnedPositions2D(MAX_CELLS, MAX_CELLS, self.dim) if is_learned else None

    def forward(self, cells: Cells):
        """(1 or B, S, D), float32."""
        h, w = cells.rows.shape[1], cells.columns.shape[1]
        if self.learned is not None:
            if max(h, w) > MAX_CELLS:
                raise ValueError(f"{h} x {w} cells, but learned positions have {MAX_CELLS}: resize the image")
            return self.learned(h, w).flatten(0, 1)[None]
        if self.by_centres:
            rows, columns = cells.rows[:, :, None].expand(-1, -1, w), cells.columns[:, None].expand(-1, h, -1)
            rows, columns = (axis.flatten(1) * 2 * math.pi for axis in (rows, columns))
            return sinusoidal_encoding_2d(rows, columns, self.dim, ANCHOR_TEMPERATURE)  # (B, S, D)
        # As in the paper (appendix A.4) cells are counted from one, and the last cell of the image is at 2 pi.
        is_image = torch.ones(1, h, w, device=cells.rows.device) if cells.is_image is None else cells.is_image.float()
        rows, columns = (
            (axis / (axis.narrow(number, -1, 1) + 1e-6) * 2 * math.pi).flatten(1)
            for number, axis in ((1, is_image.cumsum(1)), (2, is_image.cumsum(2)))
        )
        return sinusoidal_encoding_2d(rows, columns, self.dim)


class SpatialPrior(nn.Module):
    """A term for the scores of cross-attention that favours cells near a query's box: the logarithm of a Gaussian that
    each head centres at its own point in or near the box (Gao et al. 2021, equations 3 and 5; they predict centre and
    width from the query, here they follow from the box)."""

    def __init__(self, config):
        super().__init__()
        self.centres = nn.Parameter(torch.empty(config.num_attention_heads, 2))  # from the box centre, in box sizes
        self.sharpness = nn.Parameter(torch.empty(config.num_attention_heads))

    def initialise(self, config):
        angles = torch.arange(len(self.centres)) * (2 * math.pi / len(self.centres))
        init.copy_(self.centres, 0.4 * torch.stack((angles.cos(), angles.sin()), dim=1))  # on a ring
        init.constant_(self.sharpness, 2.0)

    def forward(self, boxes, cells: Cells):
        """Boxes (B, Q, 4) -> (B, N, Q, S)."""
        middle, size = boxes[:, None].split(2, dim=-1)  # (B, 1, Q, 2)
        size = size.clamp(min=0.02)
        focus = middle + self.centres[:, None] * size  # (B, N, Q, 2)
        terms = [
            -self.sharpness[:, None, None] * ((axis[:, None, None] - focus[..., i, None]) / size[..., i, None]).square()
            for i, axis in enumerate((cells.columns, cells.rows))
        ]
        return (terms[1][..., :, None] + terms[0][..., None, :]).flatten(-2)


def encode_boxes(boxes: Tensor, dim: int) -> Tensor:
    """Sines and cosines of the four numbers of boxes: (..., 4) -> (..., 4 dim) (Liu et al. 2022, equation 4)."""
    return sinusoidal_encoding(boxes * 2 * math.pi, dim, ANCHOR_TEMPERATURE).flatten(-2)


def correct(boxes: Tensor, corrections: Tensor) -> Tensor:
    """Moves boxes (..., 4) by fractions of their size, and scales their size (Girshick et al. 2014, appendix C).

    Unlike a sum before a sigmoid (Zhu et al. 2021), equal corrections have an equal effect wherever the box is.
    """
    middle, size = boxes.split(2, dim=-1)
    shift, growth = corrections.float().split(2, dim=-1)
    return torch.cat(((middle + shift * size).clamp(0, 1), (size * growth.clamp(-4, 4).exp()).clamp(1e-3, 1)), dim=-1)
