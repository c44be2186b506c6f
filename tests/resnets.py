"""Stock ResNets for tests: tiny ones, with dilation, and with timm's and torchvision's names for their tensors."""

import re

import torch
from torch import nn

from hf_models.resnet import ResNetShape

TINY_RESNETS = {
    "basic": ResNetShape("basic", (2, 1, 1, 2), (8, 16, 24, 32), "pool", 16),
    "bottleneck": ResNetShape("bottleneck", (1, 2, 1, 2), (16, 32, 48, 64), "pool", 8),
}


@torch.no_grad()
def randomise_norms(model):
    """Gives the batch norms of a model, frozen or not, something to do. Returns the model."""
    for module in model.modules():
        if hasattr(module, "running_mean"):
            for tensor in (module.weight, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.normal_(std=0.2)
    return model


def dilate_last_stage(stock):
    """What torchvision's `replace_stride_with_dilation` and timm's `output_stride` do to the last stage."""
    for number, block in enumerate(stock.encoder.stages[-1].layers):
        convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        three_by_three = [convolution for convolution in convolutions if convolution.kernel_size == (3, 3)]
        for convolution in convolutions:
            convolution.stride = (1, 1)
        for place, convolution in enumerate(three_by_three):
            dilation = 1 if number == place == 0 else 2  # what the first one sees is not spread out yet
            convolution.dilation = convolution.padding = (dilation, dilation)
    return stock


TIMM_NAMES = {  # of transformers (a regular expression) -> of timm
    r"embedder\.embedder\.convolution": "conv1",
    r"embedder\.embedder\.normalization": "bn1",
    r"encoder\.stages\.0\.layers": "layer1",
    r"encoder\.stages\.1\.layers": "layer2",
    r"encoder\.stages\.2\.layers": "layer3",
    r"encoder\.stages\.3\.layers": "layer4",
    r"\.layer\.0\.convolution": ".conv1",
    r"\.layer\.0\.normalization": ".bn1",
    r"\.layer\.1\.convolution": ".conv2",
    r"\.layer\.1\.normalization": ".bn2",
    r"\.layer\.2\.convolution": ".conv3",
    r"\.layer\.2\.normalization": ".bn3",
    r"\.shortcut\.convolution": ".downsample.0",
    r"\.shortcut\.normalization": ".downsample.1",
}


def to_timm_names(weights: dict) -> dict:
    """The same tensors as timm would save them."""
    renamed = {}
    for name, tensor in weights.items():
        for theirs, timms in TIMM_NAMES.items():
            name = re.sub(theirs, timms, name)
        renamed[name] = tensor
    return renamed
