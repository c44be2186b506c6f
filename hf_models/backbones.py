"""The backbone of a detector: a ResNet of ours or any `AutoBackbone`, and what a stock config calls it.

`config` is a `ZooDetrConfig` (see `detr.py`).
"""

from typing import Any

from torch import nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig

from .resnet import RESNETS, FrozenBatchNorm, ResNet, find_resnet, stock_resnet_fields


def make_backbone(config, own: dict[str, type[nn.Module]]) -> nn.Module:
    """The convolutional network, or the `AutoBackbone`, with batch norms frozen: they may not depend on a batch.

    own: the backbones of this package, by `model_type`.

    Raises a `ValueError` for a backbone with batch norms that compute something else besides.
    """
    if config.backbone_config is None:
        backbone = ResNet(config.backbone, config.num_channels, config.backbone_norm, config.dilation)
        if config.backbone_norm == "frozen_batch":
            backbone.freeze_start()
        return backbone
    if config.backbone_config.model_type in own:
        return own[config.backbone_config.model_type](config.backbone_config)
    backbone = AutoBackbone.from_config(config.backbone_config)
    for name, module in list(backbone.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            if type(module).forward is not nn.BatchNorm2d.forward:
                raise ValueError(
                    f"backbone_config: {name} of {type(backbone).__name__} is a {type(module).__name__}, which does "
                    "more than batch norm and cannot be frozen: choose a backbone with BatchNorm2d or other norms"
                )
            backbone.set_submodule(name, FrozenBatchNorm(module.num_features, module.eps))
    return backbone


def num_features(backbone) -> int:
    """Channels of its last feature map."""
    return backbone.num_channels_out if isinstance(backbone, ResNet) else backbone.channels[-1]


def make_backbone_config(values: dict, own: dict[str, type[PreTrainedConfig]]) -> PreTrainedConfig:
    """The config that was saved as `backbone_config`; `own` has those of this package's backbones."""
    values = dict(values)
    model_type = values.pop("model_type")
    if model_type in own:
        return own[model_type](**values)
    return AutoConfig.for_model(model_type, **values)


def read_stock_backbone(stock: dict) -> dict:
    """Which of our backbones a stock config means: `backbone_config` describes it, or `backbone` names one of timm's.

    Raises a `ValueError` for one that is not in `RESNETS`: its weights have no place here.
    """
    found = stock.get("backbone_config") or {}
    found = found if isinstance(found, dict) else found.to_dict()
    kind, name, dilation = found.get("model_type"), stock.get("backbone"), bool(stock.get("dilation"))
    if kind == "timm_backbone":
        name, dilation = found.get("backbone"), dilation or found.get("output_stride") == 16
    elif kind == "resnet":
        name = find_resnet(found)
    elif kind is not None:
        name = kind
    if name not in RESNETS:
        raise ValueError(f"a stock DETR with the backbone {name!r} cannot be loaded, only with {', '.join(RESNETS)}")
    return {"backbone": name, "backbone_config": None, "dilation": dilation}


def stock_backbone_config(config) -> PreTrainedConfig:
    """The config of the same ResNet in transformers, or with dilation in timm; raises a `ValueError` without timm."""
    from transformers import ResNetConfig, TimmBackboneConfig
    from transformers.utils import is_timm_available

    if config.dilation:
        if not is_timm_available():
            raise ValueError("a stock DETR with dilation=True has a backbone of timm: install timm")
        options: dict[str, Any] = {  # not all of them are fields
            "backbone": config.backbone,
            "num_channels": config.num_channels,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [1, 2, 3, 4],
            "output_stride": 16,
        }
        return TimmBackboneConfig(**options)
    return ResNetConfig(num_channels=config.num_channels, **stock_resnet_fields(config.backbone))
