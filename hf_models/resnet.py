"""ResNet: a convolutional backbone whose blocks learn what to add to their input (He et al. 2016).

branch(x) = norm(W_2 relu(norm(W_1 x)))
block(x)  = relu(x + branch(x))

    B  batch    C  channels    H, W  height and width of the image or of a feature map
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import initialization as init
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.utils import cached_file

HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class ResNetShape(NamedTuple):
    """The sizes of a ResNet.

    Args:
        block: `basic`, two convolutions of 3 x 3; or `bottleneck`, one of 3 x 3 at a quarter of the width between two
            of 1 x 1.
        depths: number of blocks in each stage. Every stage but the first halves the resolution.
        widths: output channels of each stage.
        stem: `pool`, a 7 x 7 convolution with stride 2 and a maximum over 3 x 3 with stride 2; or `convolution`, one of
            3 x 3 with stride 2.
        stem_width: output channels of the stem.
    """

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: Literal["pool", "convolution"] = "pool"
    stem_width: int = 64

    @property
    def stride(self) -> int:
        """Height and width in pixels of the image that one cell of the last feature map stands for."""
        return (4 if self.stem == "pool" else 2) * 2 ** (len(self.depths) - 1)


RESNETS = {
    # He et al. 2016, table 1; but a bottleneck's 3 x 3 convolution has the stride, as in all published weights.
    "resnet18": ResNetShape("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ResNetShape("basic", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": ResNetShape("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    "resnet101": ResNetShape("bottleneck", (3, 4, 23, 3), (256, 512, 1024, 2048)),
    # For training from scratch on small images.
    "resnet-mini": ResNetShape("basic", (1, 1, 1), (16, 64, 128), "convolution", 16),
    "resnet-small": ResNetShape("basic", (1, 1, 1, 1), (16, 64, 128, 192), "convolution", 16),
    # For tests: built like the published ones, but tiny.
    "resnet-nano": ResNetShape("basic", (1, 1), (8, 16), "pool", 8),
}


class FrozenBatchNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy 2015) with constant statistics and factors: one factor and one summand per channel,
    which the convolution before it merges into its own weights."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, num_channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_channels))
        initialise_resnet(self)

    def scale_and_shift(self):
        """Returns scale (C,) and shift (C,), float32, such that norm(x) = scale * x + shift."""
        scale = self.weight.float() * (self.running_var.float() + self.eps).rsqrt()
        return scale, self.bias.float() - self.running_mean.float() * scale

    def forward(self, images):
        """(B, C, H, W) -> (B, C, H, W); only backbones from elsewhere call this."""
        scale, shift = (values[:, None, None].to(images.dtype) for values in self.scale_and_shift())
        return images * scale + shift


class ResNetGroupNorm(nn.GroupNorm):
    """A group norm (Wu and He 2018) of at most 32 groups of at least two channels. It normalises each image by itself.

    Args:
        ends_branch: whether the norm is the last of a residual branch. Such a norm starts at zero, so that its block
            starts as the identity (Goyal et al. 2017, section 5.1).
    """

    def __init__(self, num_channels: int, ends_branch: bool):
        self.ends_branch = ends_branch
        super().__init__(max(1, math.gcd(num_channels // 2, 32)), num_channels)

    def reset_parameters(self):
        initialise_resnet(self)


class ResNetConvolution(nn.Conv2d):
    """A convolution without a bias, which also applies the norm that follows it."""

    def __init__(self, num_inputs: int, num_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1):
        padding = dilation * (kernel_size // 2)
        super().__init__(num_inputs, num_channels, kernel_size, stride, padding, dilation, bias=False)

    def forward(self, images, norm):  # type: ignore[override]  # it takes the norm, too
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if not isinstance(norm, FrozenBatchNorm):
            return norm(super().forward(images))
        scale, shift = norm.scale_and_shift()  # merging them into the weights saves a pass over the feature map
        weight = (self.weight * scale[:, None, None, None]).to(images.dtype)
        return F.conv2d(images, weight, shift.to(images.dtype), self.stride, self.padding, self.dilation)


class ResNetBlock(nn.Module):
    """A residual block.

    Args:
        kind: `block` of `ResNetShape`.
        norm: as in `ResNet`.
        first_dilation, dilation: dilation of the first and of the second 3 x 3 convolution.
    """

    def __init__(self, kind, num_inputs, num_channels, norm, stride=1, first_dilation=1, dilation=1):
        super().__init__()
        inner = num_channels // 4
        sizes = {  # inputs, channels, kernel size, stride, dilation
            "basic": [
                (num_inputs, num_channels, 3, stride, first_dilation),
                (num_channels, num_channels, 3, 1, dilation),
            ],
            "bottleneck": [
                (num_inputs, inner, 1, 1, 1),
                (inner, inner, 3, stride, first_dilation),
                (inner, num_channels, 1, 1, 1),
            ],
        }[kind]
        self.num_convolutions = len(sizes)
        for number, size in enumerate(sizes, start=1):
            self.add_module(f"conv{number}", ResNetConvolution(*size))
            self.add_module(f"norm{number}", make_image_norm(norm, size[1], ends_branch=number == len(sizes)))
        self.shortcut = None
        if stride != 1 or num_inputs != num_channels:
            self.shortcut = ConvolutionAndNorm(num_inputs, num_channels, 1, stride, norm)

    def forward(self, images):
        branch = images
        for number in range(1, self.num_convolutions + 1):
            if number > 1:
                branch = F.relu(branch, inplace=True)
            branch = getattr(self, f"conv{number}")(branch, getattr(self, f"norm{number}"))
        branch += images if self.shortcut is None else self.shortcut(images)
        return F.relu(branch, inplace=True)


class ConvolutionAndNorm(nn.Module):
    """The convolution of the stem, or of a shortcut that changes resolution or width."""

    def __init__(self, num_inputs, num_channels, kernel_size, stride, norm):
        super().__init__()
        self.conv = ResNetConvolution(num_inputs, num_channels, kernel_size, stride)
        self.norm = make_image_norm(norm, num_channels)

    def forward(self, images):
        return self.conv(images, self.norm)


class ResNet(nn.Module):
    """From images to the feature map of the last stage.

    Args:
        name: one of `RESNETS`.
        num_channels: channels of an image.
        norm: `frozen_batch` for weights that were trained with batch norm; `group` for training from scratch.
        dilation: whether the last stage dilates its convolutions instead of halving the resolution (Yu and Koltun 2016;
            "DC5" of Carion et al. 2020).

    Attributes:
        num_channels_out: channels of the feature map.
        stride: height and width in pixels of the image that one cell of the feature map stands for.
    """

    def __init__(
        self,
        name: str,
        num_channels: int = 3,
        norm: Literal["frozen_batch", "group"] = "frozen_batch",
        dilation: bool = False,
    ):
        super().__init__()
        shape = RESNETS[name]
        self.pools, self.norm_kind = shape.stem == "pool", norm
        self.num_channels_out = shape.widths[-1]
        self.stride = shape.stride // (2 if dilation else 1)
        self.stem = ConvolutionAndNorm(num_channels, shape.stem_width, 7 if self.pools else 3, 2, norm)
        self.stages = nn.ModuleList()
        num_inputs = shape.stem_width
        for number, (depth, width) in enumerate(zip(shape.depths, shape.widths, strict=True)):
            dilates = dilation and number == len(shape.depths) - 1
            # The first block's input still has the resolution of the stage before, so its first convolution is not
            # dilated.
            first = {"stride": 1 if number == 0 or dilates else 2, "dilation": 1 + dilates}
            others = {"first_dilation": 1 + dilates, "dilation": 1 + dilates}
            blocks = [ResNetBlock(shape.block, num_inputs, width, norm, **first)]
            blocks += [ResNetBlock(shape.block, width, width, norm, **others) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*blocks))
            num_inputs = width

    def freeze_start(self):
        """Stops training the stem and the first stage, as DETR's published code does."""
        self.stem.requires_grad_(False)
        self.stages[0].requires_grad_(False)

    def forward(self, pixel_values):
        """(B, C, H, W) -> (B, num_channels_out, ceil(H / stride), ceil(W / stride))."""
        images = pixel_values.to(self.stem.conv.weight.dtype)
        # Channels last is the faster layout, with two exceptions: CUDA's group norm copies it back, and training on a
        # CPU is faster only with AVX-512 and a frozen norm.
        is_frozen = self.norm_kind == "frozen_batch"
        is_faster = {"cpu": not self.training or (is_frozen and HAS_AVX512), "cuda": is_frozen}
        if is_faster.get(images.device.type):
            images = images.contiguous(memory_format=torch.channels_last)
        images = F.relu(self.stem(images), inplace=True)
        if self.pools:
            images = F.max_pool2d(images, kernel_size=3, stride=2, padding=1)
        for stage in self.stages:
            images = stage(images)
        return images


def make_image_norm(norm: str, num_channels: int, ends_branch: bool = False) -> nn.Module:
    """Makes the norm after a convolution; arguments as in `ResNet` and `ResNetGroupNorm`."""
    return FrozenBatchNorm(num_channels) if norm == "frozen_batch" else ResNetGroupNorm(num_channels, ends_branch)


@torch.no_grad()
def initialise_resnet(module: nn.Module):
    """Initialises a module if it is one of this file's (He et al. 2015); for `_init_weights` of a model."""
    if isinstance(module, ResNetConvolution):
        init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, FrozenBatchNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
        init.zeros_(module.running_mean)
        init.ones_(module.running_var)
    elif isinstance(module, ResNetGroupNorm):
        init.constant_(module.weight, 0.0 if module.ends_branch else 1.0)
        init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------- stock weights


def timm_renamings(ours: str, stock: list[str]) -> list[WeightRenaming]:
    """Returns renamings from the key names of timm and torchvision to ours, and back.

    Args:
        ours: the start of our names, a regular expression.
        stock: the possible starts of the other names; renaming back uses the first.
    """
    return [
        *_at_the_start(ours, stock, {r"conv1\.": r"stem\.conv\.", r"bn1\.": r"stem\.norm\."}),
        *_at_the_start(ours, stock, {rf"layer{number + 1}\.": rf"stages\.{number}\." for number in range(4)}),
        *_renamings({rf"(?<=\d)\.bn{number}\.": rf"(?<=\d)\.norm{number}\." for number in (1, 2, 3)}),
        *_renamings({r"\.downsample\.0\.": r"\.shortcut\.conv\.", r"\.downsample\.1\.": r"\.shortcut\.norm\."}),
    ]


def stock_renamings(ours: str, stock: list[str]) -> list[WeightRenaming]:
    """Returns renamings from the key names of transformers' ResNet to ours, and back.

    Arguments are those of `timm_renamings`. If both are used, timm's must come first: renaming back uses the last.
    """
    start = {
        r"embedder\.embedder\.convolution\.": r"stem\.conv\.",
        r"embedder\.embedder\.normalization\.": r"stem\.norm\.",
        r"encoder\.stages\.(\d+)\.layers\.": r"stages\.\1\.",
    }
    inside = {
        rf"(?<=\d)\.layer\.{number - 1}\.{theirs}\.": rf"(?<=\d)\.{name}{number}\."
        for number in (1, 2, 3)
        for theirs, name in (("convolution", "conv"), ("normalization", "norm"))
    }
    shortcut = {
        r"\.shortcut\.convolution\.": r"\.shortcut\.conv\.",
        r"\.shortcut\.normalization\.": r"\.shortcut\.norm\.",
    }
    return [*_at_the_start(ours, stock, start), *_renamings(inside), *_renamings(shortcut)]


def _at_the_start(ours: str, stock: list[str], names: dict[str, str]) -> list[WeightRenaming]:
    return [WeightRenaming([start + old for start in stock], ours + new) for old, new in names.items()]


def _renamings(names: dict[str, str]) -> list[WeightRenaming]:
    return [WeightRenaming(old, new) for old, new in names.items()]


def rename(key: str, renamings: Sequence[WeightTransform]) -> str:
    """Applies the renamings to a key, one after the other."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def stock_resnet_fields(name: str) -> dict:
    """Returns the fields of `ResNetConfig` for one of `RESNETS`; raises a `ValueError` if there is no equal."""
    shape = RESNETS[name]
    if shape.stem != "pool":
        raise ValueError(f"ResNetConfig has no backbone={name!r}: its stem is always the one with pooling")
    return {
        "layer_type": shape.block,
        "depths": list(shape.depths),
        "hidden_sizes": list(shape.widths),
        "embedding_size": shape.stem_width,
        "out_features": [f"stage{len(shape.depths)}"],
    }


def find_resnet(fields: dict) -> str:
    """Returns the name in `RESNETS` that a stock `ResNetConfig`, as a dict, describes; raises a `ValueError` if none
    does."""
    defaults = stock_resnet_fields("resnet50") | {
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    wanted = {option: fields.get(option, value) for option, value in defaults.items()}
    wanted |= {option: list(value) for option, value in wanted.items() if isinstance(value, tuple)}
    last_stage = f"stage{len(wanted['depths'])}"
    wanted["out_features"] = (fields.get("out_features") or [last_stage])[-1:]  # a detector uses only the last one
    for name, shape in RESNETS.items():
        if shape.stem == "pool" and wanted == defaults | stock_resnet_fields(name):
            return name
    raise ValueError(f"no ResNet of this package has {wanted}; it has {', '.join(RESNETS)}")


def load_backbone_weights(resnet: ResNet, source: str | Path | dict[str, torch.Tensor]):
    """Loads the weights of a trained ResNet into `resnet`, without those of its classifier.

    Args:
        source: a dict of key names and tensors; or a file of them, by safetensors or by `torch.save`; or a folder or
            Hub repository with such a file. The names may be transformers', timm's, torchvision's or ours, and those
            of a ResNet alone, a classifier or a DETR.

    Raises:
        ValueError: there is no such file, or names or shapes in it do not fit; the message names them.
    """
    weights = dict(source) if isinstance(source, dict) else _read_weights(source)
    source = "the given weights" if isinstance(source, dict) else source
    starts = ["^", r"^resnet\.", r"^model\.backbone\.model\.", r"^model\.backbone\.conv_encoder\.model\."]
    renamings = timm_renamings("^", starts) + stock_renamings("^", starts)
    renamed = {}
    for key, tensor in weights.items():
        key = re.sub(r"^(model\.)?backbone\.(?=stem\.|stages\.)", "", rename(key, renamings))
        if key.startswith(("stem.", "stages.")) and not key.endswith(".num_batches_tracked"):
            renamed[key] = tensor
    own = resnet.state_dict()
    problems = [f"{key} is missing" for key in own if key not in renamed]
    problems += [f"{key} has no place" for key in renamed if key not in own]
    problems += [
        f"{key} is {tuple(renamed[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in renamed and renamed[key].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        hint = ""
        if resnet.norm_kind == "group" and any(key.endswith(".running_mean") for key in renamed):
            hint = "; these weights were trained with batch norm: set backbone_norm='frozen_batch'"
        raise ValueError(
            f"{source} does not fit the backbone: {'; '.join(problems[:3])}{more}{hint}. Choose the `backbone` that "
            "these weights belong to"
        )
    resnet.load_state_dict(renamed)


def _read_weights(source: str | Path) -> dict[str, torch.Tensor]:
    path = Path(source)
    if not path.is_file():
        names = ("model.safetensors", "pytorch_model.bin")
        try:
            found = [cached_file(str(source), name, _raise_exceptions_for_missing_entries=False) for name in names]
        except OSError as error:
            raise ValueError(f"{source} is not a file, folder or repository that can be read: {error}") from error
        there = [Path(name) for name in found if name is not None]
        if not there:
            raise ValueError(f"{source} has neither {' nor '.join(names)}: name a file of weights")
        path = there[0]
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} holds more than tensors, or is damaged; convert it to safetensors") from error
    for name in ("state_dict", "model"):  # where training scripts of timm and torchvision put the weights
        if isinstance(weights, dict) and isinstance(weights.get(name), dict):
            weights = weights[name]
    return {key: value for key, value in weights.items() if isinstance(value, torch.Tensor)}
