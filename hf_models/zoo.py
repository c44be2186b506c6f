"""The zoo: all named sizes with their papers, and the functions that list and build them.

>>> from hf_models import create_model, list_models
>>> list_models("gpt2*")
['gpt2-large', 'gpt2-medium', 'gpt2-small', 'gpt2-xl']
>>> model = create_model("gpt2-small", num_hidden_layers=6)
"""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from fnmatch import fnmatch
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin

from .base import ZooConfig
from .bert import ZooBertConfig, ZooBertForPreTraining
from .detr import ZooDetrConfig, ZooDetrForObjectDetection
from .gpt import ZooGPTConfig, ZooGPTForCausalLM
from .mae import ZooViTMAEConfig, ZooViTMAEForPreTraining
from .vit import ZooViTConfig, ZooViTForImageClassification


class ZooEntry(NamedTuple):
    """A named size: the class that it builds by default, its config class and fields, and its paper."""

    model_class: type[PreTrainedModel]
    config_class: type[ZooConfig]
    options: dict
    paper: str


def _gpt(paper: str, layers: int, hidden: int, heads: int, **options) -> ZooEntry:
    options = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, **options}
    return ZooEntry(ZooGPTForCausalLM, ZooGPTConfig, options, paper)


def _gpt3(layers: int, hidden: int, heads: int, head_dim: int) -> ZooEntry:
    # Every layer has dense attention; the paper alternates it with a sparse pattern that it does not publish.
    paper = "Brown et al. 2020, table 2.1"
    return _gpt(paper, layers, hidden, heads, head_dim=head_dim, max_position_embeddings=2048)


def _bert(paper: str, layers: int, hidden: int, **options) -> ZooEntry:
    options = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64, **options}
    return ZooEntry(ZooBertForPreTraining, ZooBertConfig, options, paper)


def _vit(paper: str, layers: int, hidden: int, heads: int, patch: int, size: int, **options) -> ZooEntry:
    options = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, **options}
    return ZooEntry(
        ZooViTForImageClassification, ZooViTConfig, {"patch_size": patch, "image_size": size, **options}, paper
    )


def _mae(layers: int, hidden: int, heads: int, patch: int, size: int, **options) -> ZooEntry:
    # Fixed positions, as in the paper's appendix A.1.
    vit = _vit(MAE, layers, hidden, heads, patch, size, position_embedding_type="sinusoidal", **options)
    return ZooEntry(ZooViTMAEForPreTraining, ZooViTMAEConfig, vit.options, vit.paper)


def _detr(paper: str, backbone: str, **options) -> ZooEntry:
    return ZooEntry(ZooDetrForObjectDetection, ZooDetrConfig, {"backbone": backbone, **options}, paper)


# The options with which small models learned fastest in our experiments.
MODERN = {
    "position_embedding_type": "rotary",
    "norm": "rmsnorm",
    "qk_norm": True,
    "hidden_act": "relu2",
    "residual_init": "zero",
    "use_bias": False,
}

# nanoGPT's two character models (github.com/karpathy/nanoGPT, config/train_shakespeare_char.py and README).
NANO = {"vocab_size": 66, "use_bias": False, "hidden_act": "gelu"}

GPT1 = "Radford et al. 2018"
GPT2 = "Radford et al. 2019"
BERT = "Devlin et al. 2019"
VIT = "Dosovitskiy et al. 2021"
DEIT = "Touvron et al. 2021"
MAE = "He et al. 2022"
DETR = "Carion et al. 2020"
SMALL_DETR = "this package; parts: Liu et al. 2022, Li et al. 2022, Gao et al. 2021, Zhu et al. 2021"
COMPACT = "Turc et al. 2019"
SMALL = "this package; parts: Su et al. 2021, Henry et al. 2020, So et al. 2021"

# Layers, width, heads.
VIT_SIZES = {
    "tiny": (DEIT, 12, 192, 3),
    "small": (DEIT, 12, 384, 6),
    "base": (VIT, 12, 768, 12),
    "large": (VIT, 24, 1024, 16),
    "huge": (VIT, 32, 1280, 16),
}
# The options with which models of small grey images learned fastest: positions that are as large as the vectors of the
# patches from the first step on.
STRONG_POSITIONS = {
    "num_channels": 1,
    "pooling": "mean",
    "position_embedding_type": "sinusoidal",
    "initializer_range": 0.06,
    "residual_init": "scaled",
    "use_bias": False,
}
# With these options a detector learns in minutes, from a few hundred images; `ZooDetrConfig` names their papers.
QUICK = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "hidden_dropout": 0.0,
    "backbone_norm": "group",
    "classification_loss": "varifocal",
    "class_cost": 2,
    "class_loss_coefficient": 2,
    "anchor_queries": True,
    "spatial_prior": True,
    "query_selection": True,
    "num_denoising_groups": 5,
}
# The decoder of masked autoencoders for small images.
LIGHT = {"decoder_hidden_size": 128, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}

ZOO: dict[str, ZooEntry] = {
    "gpt1": _gpt(
        GPT1, 12, 768, 12, vocab_size=40478, max_position_embeddings=512, norm_position="post", residual_init="normal"
    ),
    "gpt2-small": _gpt(GPT2, 12, 768, 12),
    "gpt2-medium": _gpt(GPT2, 24, 1024, 16),
    "gpt2-large": _gpt(GPT2, 36, 1280, 20),
    "gpt2-xl": _gpt(GPT2, 48, 1600, 25),
    "gpt3-small": _gpt3(12, 768, 12, 64),
    "gpt3-medium": _gpt3(24, 1024, 16, 64),
    "gpt3-large": _gpt3(24, 1536, 16, 96),
    "gpt3-xl": _gpt3(24, 2048, 24, 128),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
    "gpt3-13b": _gpt3(40, 5120, 40, 128),  # the table's 5140 is not 40 heads of 128
    "gpt3-175b": _gpt3(96, 12288, 96, 128),
    "bert-tiny": _bert(COMPACT, 2, 128),
    "bert-mini": _bert(COMPACT, 4, 256),
    "bert-small": _bert(COMPACT, 4, 512),
    "bert-medium": _bert(COMPACT, 8, 512),
    "bert-base": _bert(BERT, 12, 768),
    "bert-large": _bert(BERT, 24, 1024),
    "bert-modern-mini": _bert(SMALL, 4, 256, vocab_size=8192, norm_position="pre", **MODERN),
    **{
        f"vit-{name}-patch{patch}-224": _vit(*size, patch, 224)
        for name, size in VIT_SIZES.items()
        for patch in (14, 16, 32)
    },
    "vit-mini-patch2-8": _vit(VIT, 4, 128, 4, 2, 8, **STRONG_POSITIONS),
    "vit-mini-patch4-28": _vit(VIT, 6, 128, 4, 4, 28, num_channels=1),
    "vit-mini-patch4-32": _vit(VIT, 12, 192, 3, 4, 32),
    "vit-mini-patch8-64": _vit(VIT, 12, 192, 3, 8, 64),
    "vit-hybrid-mini-patch8-32": _vit(VIT, 4, 128, 4, 8, 32, stem_channels=[32, 64, 128], **STRONG_POSITIONS),
    "vit-hybrid-small-patch8-32": _vit(VIT, 4, 192, 6, 8, 32, stem_channels=[64, 128, 256], **STRONG_POSITIONS),
    "vit-mae-base-patch16-224": _mae(12, 768, 12, 16, 224),
    "vit-mae-large-patch16-224": _mae(24, 1024, 16, 16, 224),
    "vit-mae-huge-patch14-224": _mae(32, 1280, 16, 14, 224),
    "vit-mae-mini-patch4-28": _mae(6, 128, 4, 4, 28, num_channels=1, **LIGHT),
    "vit-mae-mini-patch4-32": _mae(12, 192, 3, 4, 32, **LIGHT),
    "detr-resnet-50": _detr(DETR, "resnet50"),
    "detr-resnet-50-dc5": _detr(DETR, "resnet50", dilation=True),
    "detr-resnet-101": _detr(DETR, "resnet101"),
    "detr-resnet-101-dc5": _detr(DETR, "resnet101", dilation=True),
    "detr-mini": _detr(SMALL_DETR, "resnet-mini", num_queries=30, num_channels=1, **QUICK),
    "detr-small": _detr(SMALL_DETR, "resnet-small", num_queries=60, **QUICK),
    "gpt-char-nanogpt": _gpt("Karpathy 2022, nanoGPT", 4, 128, 4, max_position_embeddings=64, **NANO),
    "gpt-char-nanogpt-gpu": _gpt("Karpathy 2022, nanoGPT", 6, 384, 6, max_position_embeddings=256, **NANO),
    "gpt-char": _gpt(SMALL, 4, 128, 4, vocab_size=66, max_position_embeddings=64, **MODERN),
    "gpt-tiny": _gpt(SMALL, 4, 128, 4, vocab_size=4096, max_position_embeddings=256, **MODERN),
    "gpt-mini": _gpt(SMALL, 6, 256, 4, vocab_size=8192, max_position_embeddings=512, **MODERN),
    "gpt-small": _gpt(SMALL, 6, 384, 6, vocab_size=16384, max_position_embeddings=512, **MODERN),
}


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names in the zoo that match a shell pattern, sorted."""
    return sorted(name for name in ZOO if fnmatch(name, pattern))


def find_entry(name: str) -> ZooEntry:
    """Returns the entry with this name; raises a `ValueError` with the nearest names if there is none."""
    if name not in ZOO:
        nearest = difflib.get_close_matches(name, ZOO, n=3) or sorted(ZOO)
        raise ValueError(f"no model named {name!r} in the zoo; did you mean {' or '.join(nearest)}?")
    return ZOO[name]


def check_fields(config_class: type[PreTrainedConfig], names: Iterable[str]):
    """Raises a `ValueError` with the nearest field for a name that is not a field of the config."""
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    known = {name for name in known if not name.startswith("_")} | {"num_labels", "attn_implementation"}
    if issubclass(config_class, BackboneConfigMixin):
        known |= {"out_features", "out_indices"}
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{config_class.__name__} has no field {name!r}{hint}")


def create_config(name: str, **overrides) -> PreTrainedConfig:
    """Makes the config of a named size.

    Args:
        name: one of `list_models()`.
        **overrides: config fields to change.

    Raises:
        ValueError: the zoo has no such name, or the config has no such field.
    """
    entry = find_entry(name)
    check_fields(entry.config_class, overrides)
    return entry.config_class(**{**entry.options, **overrides})


def create_model(name: str, model_class: type[PreTrainedModel] | None = None, **overrides) -> PreTrainedModel:
    """Makes a model of a named size, with initial weights.

    Args:
        name: one of `list_models()`.
        model_class: another class of the same family, such as `ZooGPTForSequenceClassification`.
        **overrides: config fields to change.

    Raises:
        ValueError: as `create_config`.
    """
    return (model_class or find_entry(name).model_class)(create_config(name, **overrides))


def count_parameters(name: str) -> int:
    """Counts the parameters of a named size, on a model without memory; a tied matrix counts once."""
    with torch.device("meta"):
        return create_model(name).num_parameters()
