"""What the tests that hold for every family go through: tiny configs that take every option to each of its values,
every class, and inputs and labels for it."""

from typing import NamedTuple

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.auto_factory import _BaseAutoBackboneClass

import hf_models
from hf_models.zoo import MODERN, QUICK

BLOCKS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
TINY_TEXT = {**BLOCKS, "vocab_size": 64, "max_position_embeddings": 64}
TINY_VIT = {**BLOCKS, "image_size": 16, "patch_size": 4, "num_labels": 3}
TINY_MAE = {
    **TINY_VIT,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}

TINY_DETR = {
    **BLOCKS,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "intermediate_size": 64,
    "num_queries": 5,
    "num_labels": 3,
    "backbone": "resnet-nano",
}

GROUPED = {
    "position_embedding_type": "rotary",
    "rope_theta": 500.0,
    "hidden_act": "swiglu",
    "norm": "rmsnorm",
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SINUSOIDAL = {"position_embedding_type": "sinusoidal", "hidden_act": "relu"}

# Together they take every option of ZooGPTConfig to each of its values.
GPT_OPTIONS = {
    "gpt1": {"norm_position": "post", "hidden_act": "gelu"},
    "gpt2": {},
    "sinusoidal": {**SINUSOIDAL, "tie_word_embeddings": False},
    "modern": MODERN,
    "grouped": {**GROUPED, "tie_word_embeddings": False},
    "multi_query": {"num_key_value_heads": 1, "hidden_act": "silu", "residual_init": "normal", "use_bias": False},
}

# The same for ZooBertConfig.
BERT_OPTIONS = {
    "bert": {},
    "pre_norm": {"norm_position": "pre", "hidden_act": "silu", "residual_init": "scaled"},
    "sinusoidal": {**SINUSOIDAL, "tie_word_embeddings": False},
    "modern": {**MODERN, "norm_position": "pre"},
    "grouped": {**GROUPED, "tie_word_embeddings": False},
}

# And for ZooViTConfig and ZooViTMAEConfig.
VIT_OPTIONS = {
    "vit": {},
    "sinusoidal": {**SINUSOIDAL, "pooling": "mean", "norm_position": "post"},
    "halves": {
        "position_embedding_type": "learned_2d",
        "pooling": "both",
        "layer_scale": 0.1,
        "qkv_bias": False,
        "residual_init": "scaled",
    },
    "modern": {**MODERN, "pooling": "mean", "num_register_tokens": 2},
    "stem": {**GROUPED, "stem_channels": [8], "num_register_tokens": 1},
}
MAE_OPTIONS = {
    "mae": {},
    "modern": {**VIT_OPTIONS["modern"], "layer_scale": 0.1, "mask_ratio": 0.5, "norm_pix_loss": False},
}

# And for ZooDetrConfig.
ANCHORS = {
    "anchor_queries": True,
    "classification_loss": "focal",
    "num_denoising_groups": 2,
    "norm_position": "pre",
}
DETR_OPTIONS = {
    "detr": {},
    "learned": {"position_embedding_type": "learned", "dilation": True, "auxiliary_loss": False, "hidden_act": "gelu"},
    "anchors": {**ANCHORS, "norm": "rmsnorm", "qk_norm": True, "residual_init": "zero"},
    "quick": {name: value for name, value in QUICK.items() if name not in TINY_DETR} | {"num_denoising_groups": 2},
    "vit": {"backbone": None, "backbone_config": {"model_type": "zoo_vit", **TINY_VIT}},
}


class Family(NamedTuple):
    main_class: type  # goes through all the options; the other classes through the first
    sizes: dict
    options: dict[str, dict]
    auto_classes: dict[type, type]

    @property
    def of_text(self) -> bool:
        return self.main_class.main_input_name == "input_ids"


FAMILIES = {  # by `model_type`, without "zoo_"
    "gpt": Family(
        hf_models.ZooGPTForCausalLM,
        TINY_TEXT,
        GPT_OPTIONS,
        {
            hf_models.ZooGPTModel: AutoModel,
            hf_models.ZooGPTForCausalLM: AutoModelForCausalLM,
            hf_models.ZooGPTForSequenceClassification: AutoModelForSequenceClassification,
        },
    ),
    "bert": Family(
        hf_models.ZooBertForMaskedLM,
        TINY_TEXT,
        BERT_OPTIONS,
        {
            hf_models.ZooBertModel: AutoModel,
            hf_models.ZooBertForPreTraining: AutoModelForPreTraining,
            hf_models.ZooBertForMaskedLM: AutoModelForMaskedLM,
            hf_models.ZooBertForSequenceClassification: AutoModelForSequenceClassification,
            hf_models.ZooBertForTokenClassification: AutoModelForTokenClassification,
            hf_models.ZooBertForQuestionAnswering: AutoModelForQuestionAnswering,
        },
    ),
    "vit": Family(
        hf_models.ZooViTForImageClassification,
        TINY_VIT,
        VIT_OPTIONS,
        {
            hf_models.ZooViTModel: AutoModel,
            hf_models.ZooViTForImageClassification: AutoModelForImageClassification,
            hf_models.ZooViTBackbone: AutoBackbone,
        },
    ),
    "vit_mae": Family(
        hf_models.ZooViTMAEForPreTraining,
        TINY_MAE,
        MAE_OPTIONS,
        {
            hf_models.ZooViTMAEModel: AutoModel,
            hf_models.ZooViTMAEForPreTraining: AutoModelForPreTraining,
        },
    ),
    "detr": Family(
        hf_models.ZooDetrForObjectDetection,
        TINY_DETR,
        DETR_OPTIONS,
        {
            hf_models.ZooDetrModel: AutoModel,
            hf_models.ZooDetrForObjectDetection: AutoModelForObjectDetection,
        },
    ),
}
TEXT_FAMILIES = {name: family for name, family in FAMILIES.items() if family.of_text}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
every_family_of_text = pytest.mark.parametrize("family", TEXT_FAMILIES.values(), ids=TEXT_FAMILIES.keys())
ONE_STACK = {name: family for name, family in FAMILIES.items() if name != "detr"}  # which has an encoder and a decoder
every_family_of_one_stack = pytest.mark.parametrize("family", ONE_STACK.values(), ids=ONE_STACK.keys())


def family_of(model_class) -> Family:
    return FAMILIES[model_class.config_class.model_type.removeprefix("zoo_")]


def rotary(family: Family) -> dict:
    """The field for rotary positions, where the family has them."""
    return {} if family is FAMILIES["detr"] else {"position_embedding_type": "rotary"}


class Case(NamedTuple):
    """A class and the config fields that it is tried with."""

    model_class: type
    fields: dict


def _cases():
    for family in FAMILIES.values():
        for option, fields in family.options.items():
            yield f"{family.main_class.__name__}-{option}", Case(family.main_class, fields)
        for model_class in family.auto_classes:
            if model_class is not family.main_class:
                fields = {"pad_token_id": 0} if family.of_text else {}
                if "Classification" in model_class.__name__:
                    fields["num_labels"] = 3
                yield model_class.__name__, Case(model_class, fields)


CASES = dict(_cases())
MAIN_CASES = {name: case for name, case in CASES.items() if case.model_class is family_of(case.model_class).main_class}
CASES_OF_ONE_STACK = {name: case for name, case in CASES.items() if family_of(case.model_class) in ONE_STACK.values()}
CASES_OF_TEXT = {name: case for name, case in CASES.items() if family_of(case.model_class).of_text}
WITH_A_HEAD = {
    name: case for name, case in CASES.items() if not case.model_class.__name__.endswith(("Model", "Backbone"))
}

# For what takes seconds a case, such as compilers and processes: every class with a head or with outputs of its own,
# and main classes with every kind of block, norm, position and attention, each in one family at least. The classes
# that end in "Model" are part of those.
KINDS_OF_BLOCK = {
    "gpt": ("gpt1", "grouped"),  # post-norm; RMSNorm, rotary positions, a gate, fewer key heads, an untied head
    "bert": ("bert", "modern"),  # post-norm and segments; pre-norm, RMSNorm, normalised queries and keys
    "vit": ("sinusoidal", "halves", "stem"),  # also every kind of pooling, LayerScale, positions in two dimensions
    "vit_mae": ("mae", "modern"),
    "detr": ("detr", "learned", "quick"),  # cross-attention; with boxes as queries, priors and denoising
}
EACH_BLOCK_ONCE = {
    name: case
    for name, case in CASES.items()
    if not case.model_class.__name__.endswith("Model")
    and (
        name not in MAIN_CASES
        or name.rpartition("-")[2] in KINDS_OF_BLOCK[case.model_class.config_class.model_type.removeprefix("zoo_")]
    )
}
ONE_GRAPH = {  # DETR's loss needs a host
    name: case for name, case in EACH_BLOCK_ONCE.items() if name in WITH_A_HEAD and name in CASES_OF_ONE_STACK
}
ONE_OF_EACH_CLASS = {case.model_class: name for name, case in reversed(CASES.items())}


def inputs_for(model_class):
    """What a call of the class gets: three rows of twelve tokens, none of them padding; or three images, and for a
    masked autoencoder what decides which of their patches are masked."""
    if family_of(model_class).of_text:
        return {"input_ids": torch.randint(1, TINY_TEXT["vocab_size"], (3, 12))}
    if model_class.config_class.model_type == "zoo_detr":
        return {"pixel_values": torch.randn(3, 3, 24, 32)}
    images = {"pixel_values": torch.randn(3, 3, 16, 16)}
    return images | ({"noise": torch.rand(3, 16)} if model_class.config_class.model_type == "zoo_vit_mae" else {})


def labels_for(model_class, inputs):
    """What a training step of the class gets beside its inputs."""
    name = model_class.__name__
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        return {"labels": torch.tensor([0, 2, 1])}
    if name.endswith("ForObjectDetection"):  # two objects, none, and one; `noise` is for those that denoise
        centres, sides = torch.tensor([[0.3, 0.4], [0.6, 0.5], [0.4, 0.7]]), torch.tensor([0.3, 0.2])
        boxes, classes = torch.cat((centres, sides.expand(3, 2)), dim=1), torch.tensor([0, 2, 1])
        return {
            "labels": [
                {"class_labels": classes[here], "boxes": boxes[here], "noise": torch.rand(2, len(classes[here]), 5)}
                for here in (slice(0, 2), slice(0), slice(2, 3))
            ]
        }
    if not family_of(model_class).of_text:
        return {}
    tokens = inputs["input_ids"]
    if name.endswith("ForCausalLM"):
        return {"labels": tokens}
    if name.endswith("ForTokenClassification"):
        return {"labels": torch.where(tokens % 5 == 0, -100, tokens % 3)}
    if name.endswith("ForQuestionAnswering"):
        return {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([5, 0, 4])}
    labels = torch.full_like(tokens, -100)
    masked_positions = torch.tensor([[1, 4, 10], [2, 8, -1], [0, -1, -1]])
    for row, positions in enumerate(masked_positions):
        positions = positions[positions >= 0]
        labels[row, positions] = tokens[row, positions]
    masked = {"labels": labels, "masked_positions": masked_positions}
    if name.endswith("ForPreTraining"):
        masked["next_sentence_label"] = torch.tensor([0, 1, 1])
    return masked


def open_with(auto_class, folder):
    """`auto_class.from_pretrained`; without the question of `AutoBackbone`'s whether the Hub has a repository of that
    name, on which transformers fails for every folder."""
    opener = super(_BaseAutoBackboneClass, AutoBackbone) if auto_class is AutoBackbone else auto_class
    return opener.from_pretrained(folder)


def tensors(outputs):
    """The tensors among a model's outputs, by name; a backbone's maps one by one."""
    found = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    maps = enumerate(outputs.get("feature_maps") or ())
    return found | {f"feature_maps.{number}": one for number, one in maps}


def attentions(outputs):
    """The attention maps among a model's outputs, of every stack."""
    names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    return [one for name in names for one in outputs.get(name) or ()]


def gradients(model):
    """Takes every parameter's gradient out of the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def checkpoint_activations(model, use_reentrant: bool):
    """Makes a model compute its activations again in the backward pass; before transformers 5.23 by another name."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
