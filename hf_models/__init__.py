"""hf_models: a Hugging Face-compatible model zoo in which the transformer is written once.

Importing the package registers every family with transformers' Auto classes.
"""

import transformers

from .base import ZOO_VERSION as __version__
from .bert import (
    ZooBertConfig,
    ZooBertForMaskedLM,
    ZooBertForPreTraining,
    ZooBertForQuestionAnswering,
    ZooBertForSequenceClassification,
    ZooBertForTokenClassification,
    ZooBertModel,
)
from .gpt import ZooGPTConfig, ZooGPTForCausalLM, ZooGPTForSequenceClassification, ZooGPTModel
from .zoo import create_config, create_model, list_models

for config_class in (ZooGPTConfig, ZooBertConfig):
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, name in config_class.family_auto_map.items():
        if auto_class != "AutoConfig":
            model_class = globals()[name.split(".")[1]]
            getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)

__all__ = [
    "ZooBertConfig",
    "ZooBertForMaskedLM",
    "ZooBertForPreTraining",
    "ZooBertForQuestionAnswering",
    "ZooBertForSequenceClassification",
    "ZooBertForTokenClassification",
    "ZooBertModel",
    "ZooGPTConfig",
    "ZooGPTForCausalLM",
    "ZooGPTForSequenceClassification",
    "ZooGPTModel",
    "__version__",
    "create_config",
    "create_model",
    "list_models",
]
