"""What the tests that hold for every family go through: tiny configs that take every option to each of its values,
every class, and labels for it."""

from typing import NamedTuple

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import hf_models
from hf_models.zoo import MODERN

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}

GROUPED = {
    "position_embedding_type": "rotary",
    "rope_theta": 500.0,
    "hidden_act": "swiglu",
    "norm": "rmsnorm",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}

# Together they take every option of ZooGPTConfig to each of its values.
GPT_OPTIONS = {
    "gpt1": {"norm_position": "post", "hidden_act": "gelu"},
    "gpt2": {},
    "sinusoidal": {"position_embedding_type": "sinusoidal", "hidden_act": "relu", "tie_word_embeddings": False},
    "modern": MODERN,
    "grouped": GROUPED,
    "multi_query": {"num_key_value_heads": 1, "hidden_act": "silu", "residual_init": "normal", "use_bias": False},
}

# The same for ZooBertConfig.
BERT_OPTIONS = {
    "bert": {},
    "pre_norm": {"norm_position": "pre", "hidden_act": "silu", "residual_init": "scaled"},
    "sinusoidal": {"position_embedding_type": "sinusoidal", "hidden_act": "relu", "tie_word_embeddings": False},
    "modern": {**MODERN, "norm_position": "pre"},
    "grouped": GROUPED,
}


class Family(NamedTuple):
    language_model: type  # goes through all the options; the other classes through the first
    options: dict[str, dict]
    auto_classes: dict[type, type]


FAMILIES = {
    "gpt": Family(
        hf_models.ZooGPTForCausalLM,
        GPT_OPTIONS,
        {
            hf_models.ZooGPTModel: AutoModel,
            hf_models.ZooGPTForCausalLM: AutoModelForCausalLM,
            hf_models.ZooGPTForSequenceClassification: AutoModelForSequenceClassification,
        },
    ),
    "bert": Family(
        hf_models.ZooBertForMaskedLM,
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
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


class Case(NamedTuple):
    """A class and the config fields that it is tried with."""

    model_class: type
    fields: dict


def _cases():
    for family in FAMILIES.values():
        for option, fields in family.options.items():
            yield f"{family.language_model.__name__}-{option}", Case(family.language_model, fields)
        for model_class in family.auto_classes:
            if model_class is not family.language_model:
                fields = {"num_labels": 3} if "Classification" in model_class.__name__ else {}
                yield model_class.__name__, Case(model_class, {"pad_token_id": 0, **fields})


CASES = dict(_cases())
WITH_A_HEAD = {name: case for name, case in CASES.items() if not case.model_class.__name__.endswith("Model")}


def labels_for(model_class, tokens):
    """What a training step of the class gets beside its inputs; `tokens` are three rows of twelve."""
    name = model_class.__name__
    if name.endswith("ForCausalLM"):
        return {"labels": tokens}
    if name.endswith("ForSequenceClassification"):
        return {"labels": torch.tensor([0, 2, 1])}
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


def tensors(outputs):
    """The tensors among a model's outputs, by name."""
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def gradients(model):
    """Takes every parameter's gradient out of the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
