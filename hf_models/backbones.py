"""The backbone of a detector: one of our ResNets or any `AutoBackbone`, and its description in stock configs.

`config` is a `ZooDetrConfig` (see `detr.py`).
"""

from typing import Any

from torch import nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig

from .resnet import RESNETS, FrozenBatchNorm, ResNet, find_resnet, stock_resnet_fields


def make_backbone(config, own: dict[str, type[nn.Module]]) -> nn.Module:
    """Makes the backbone that the config describes. Batch norms are frozen, so that images do not depend on the batch.

    Args:
        own: this package's backbone classes by `model_type`.

    Raises:
        ValueError: a batch norm of the backbone also computes something else, so that it cannot be frozen.
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
    """Returns the number of channels of the backbone's last feature map."""
    return backbone.num_channels_out if isinstance(backbone, ResNet) else backbone.channels[-1]


def make_backbone_config(values: dict, own: dict[str, type[PreTrainedConfig]]) -> PreTrainedConfig:
    """Makes the config that was saved as the dict `backbone_config`.

    Args:
        own: this package's backbone configs by `model_type`.
    """
    values = dict(values)
    model_type = values.pop("model_type")
    if model_type in own:
        return own[model_type](**values)
    return AutoConfig.for_model(model_type, **values)


def read_stock_backbone(stock: dict) -> dict:
    """Returns our fields for the backbone of a stock config, which has a `backbone_config` or one of timm's names.

    Raises:
        ValueError: the backbone is not one of `RESNETS`.
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
    """Returns the config of the same ResNet in transformers, or with dilation in timm.

    Raises:
        ValueError: the ResNet needs timm, which is not installed, or has no equal in transformers.
    """
    from transformers import ResNetConfig, TimmBackboneConfig
    from transformers.utils import is_timm_available

    if config.dilation:
        if not is_timm_available():
            raise ValueError("a stock DETR with dilation=True has a backbone of timm: install timm")
        options: dict[str, Any] = {  # some are not fields of the config
            "backbone": config.backbone,
            "num_channels": config.num_channels,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [1, 2, 3, 4],
            "output_stride": 16,
        }
        return TimmBackboneConfig(**options)
    return ResNetConfig(num_channels=config.num_channels, **stock_resnet_fields(config.backbone))
