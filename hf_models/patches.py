"""From images to tokens: patches, a convolutional stem, the tokens before the patches, and positions.

    B  batch    C  channels    P  patches    D  hidden size
    T  tokens (class token, registers, patches)

`config` is a `ZooViTConfig` (see `vit.py`).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .positions import LearnedPositions2D, rotary_angles_2d, sinusoidal_encoding_2d


def check_channels(images: Tensor, num_channels: int) -> None:
    """Raises a `ValueError` unless images are (B, num_channels, H, W); a model of grey images also takes colour."""
    if images.ndim != 4 or images.shape[1] not in (num_channels, 3 if num_channels == 1 else num_channels):
        raise ValueError(
            f"pixel_values of shape {tuple(images.shape)}, but num_channels is {num_channels}, so it must be "
            f"(batch, {num_channels}, height, width): convert the images, or set num_channels"
        )


def fit_channels(images: Tensor, num_channels: int) -> Tensor:
    """Returns the images (B, num_channels, H, W): a model of one channel gets the luminance of colour images (ITU-R
    BT.601)."""
    if num_channels != 1 or images.shape[1] != 3:
        return images
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device)
    return torch.einsum("bchw,c->bhw", images, weights)[:, None]


class StemConvolution(nn.Conv2d):
    """A 3 x 3 convolution without a bias, because a norm follows."""

    def __init__(self, num_inputs: int, num_channels: int, stride: int = 1):
        super().__init__(num_inputs, num_channels, kernel_size=3, stride=stride, padding=1, bias=False)

    def initialise(self, config):
        init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015


class StemStage(nn.Module):
    """A convolution that halves the resolution, and a residual block (He et al. 2016). Group norms keep the images of a
    batch independent of each other (Wu and He 2018), as in the paper's hybrids."""

    def __init__(self, num_inputs: int, num_channels: int):
        super().__init__()
        groups = max(1, math.gcd(num_channels // 2, 32))  # of at least two channels
        self.reduce = StemConvolution(num_inputs, num_channels, stride=2)
        self.reduce_norm = nn.GroupNorm(groups, num_channels)
        self.conv1 = StemConvolution(num_channels, num_channels)
        self.norm1 = nn.GroupNorm(groups, num_channels)
        self.conv2 = StemConvolution(num_channels, num_channels)
        self.norm2 = nn.GroupNorm(groups, num_channels)

    def forward(self, images):
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        images = F.relu(self.reduce_norm(self.reduce(images)))
        branch = F.relu(self.norm1(self.conv1(images)))
        return F.relu(images + self.norm2(self.conv2(branch)))


class PatchEmbedding(nn.Module):
    """From images to one vector per patch, through the convolutional stem if there is one."""

    def __init__(self, config):
        super().__init__()
        widths = [config.num_channels, *config.stem_channels]
        self.stem = nn.Sequential(*(StemStage(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)))
        remaining = config.patch_size // 2 ** len(config.stem_channels)
        self.projection = nn.Conv2d(widths[-1], config.hidden_size, kernel_size=remaining, stride=remaining)

    def forward(self, pixel_values):
        """(B, C, H, W) -> (B, P, D)."""
        patches = self.projection(self.stem(pixel_values.to(self.projection.weight.dtype)))  # (B, D, rows, columns)
        return patches.flatten(2).transpose(1, 2)


class ClassAndRegisterTokens(nn.Module):
    """The tokens before the patches: the class token, if `pooling` uses one, and registers."""

    def __init__(self, config):
        super().__init__()
        shapes = {"cls": (1, int(config.pooling != "mean")), "registers": (1, config.num_register_tokens)}
        for name, shape in shapes.items():
            token = nn.Parameter(torch.empty(*shape, config.hidden_size)) if shape[1] else None
            self.register_parameter(name, token)

    def initialise(self, config):
        for token in self.parameters():
            init.trunc_normal_(token, std=config.initializer_range)

    def forward(self, patches, class_position=0):
        """(B, P, D) -> (B, T, D)."""
        prefix = [] if self.cls is None else [self.cls + class_position]
        prefix += [] if self.registers is None else [self.registers]
        return torch.cat([*(token.expand(patches.shape[0], -1, -1) for token in prefix), patches], dim=1)


class PatchPositions(nn.Module):
    """The positions of the patches of a grid. For images of another size than `config.image_size` they are interpolated
    (section 3.2)."""

    weight: nn.Parameter | None

    def __init__(self, config):
        super().__init__()
        self.kind, self.grid_size, self.counted = config.position_embedding_type, config.grid_size, config.position_grid
        self.dim, self.head_dim, self.theta = config.hidden_size, config.head_dim, config.rope_theta
        self.has_class_token = config.pooling != "mean"
        rows, columns = self.grid_size
        learned = nn.Parameter(torch.empty(1, self.has_class_token + rows * columns, self.dim))
        self.register_parameter("weight", learned if self.kind == "learned" else None)
        self.halves = None
        if self.kind == "learned_2d":
            counted_rows, counted_columns = self.counted
            self.halves = LearnedPositions2D(counted_rows, counted_columns, self.dim)

    def initialise(self, config):
        if self.weight is not None:
            init.trunc_normal_(self.weight, std=config.initializer_range)

    def class_vector(self):
        """Returns the class token's position (1, 1, D), which only learned positions have, as in stock; otherwise 0."""
        return 0 if self.weight is None or not self.has_class_token else self.weight[:, :1]

    def vectors(self, height: int, width: int, dtype: torch.dtype, device):
        """Returns the vectors to add to the patches of a grid, (1, height x width, D); 0 for rotary positions."""
        if self.kind == "rotary":
            return 0
        if self.weight is not None:
            return resize_positions(self.weight[:, int(self.has_class_token) :], self.grid_size, (height, width))
        if self.halves is not None:
            return resize_positions(self.halves(*self.counted).flatten(0, 1)[None], self.counted, (height, width))
        rows, columns = self.coordinates(height, width, device)
        return sinusoidal_encoding_2d(rows, columns, self.dim)[None].to(dtype)

    def rotations(self, height: int, width: int, num_prefix_tokens: int, dtype: torch.dtype, device):
        """Returns cosines and sines (1, 1, T, head_dim / 2), or None; tokens before the patches are not rotated."""
        if self.kind != "rotary":
            return None
        rows, columns = self.coordinates(height, width, device)
        cosines, sines = rotary_angles_2d(rows, columns, self.head_dim, self.theta, dtype)
        prefix = (0, 0, num_prefix_tokens, 0)
        return F.pad(cosines, prefix, value=1.0), F.pad(sines, prefix)

    def coordinates(self, height: int, width: int, device):
        """Returns row and column (P,) of every patch, in the units of `config.position_grid`."""
        axes = [
            (torch.arange(number, device=device) + 0.5) * (counted / number) - 0.5
            for number, counted in zip((height, width), self.counted, strict=True)
        ]
        return [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]


def resize_positions(grid: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Interpolates vectors (1, rows x columns, D) from an old grid (rows, columns) to a new one."""
    if tuple(old) == tuple(new):
        return grid
    planes = grid.unflatten(1, tuple(old)).permute(0, 3, 1, 2).float()  # (1, D, rows, columns)
    planes = F.interpolate(planes, size=tuple(new), mode="bicubic", align_corners=False)
    return planes.permute(0, 2, 3, 1).flatten(1, 2).to(grid.dtype)
