"""hf_models: a Hugging Face-compatible model zoo in which the transformer is written once.

Importing the package registers every family with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .base import ZOO_VERSION as __version__
from .gpt import ZooGPTConfig, ZooGPTForCausalLM, ZooGPTForSequenceClassification, ZooGPTModel
from .zoo import create_config, create_model, list_models

AutoConfig.register("zoo_gpt", ZooGPTConfig, exist_ok=True)
AutoModel.register(ZooGPTConfig, ZooGPTModel, exist_ok=True)
AutoModelForCausalLM.register(ZooGPTConfig, ZooGPTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(ZooGPTConfig, ZooGPTForSequenceClassification, exist_ok=True)

__all__ = [
    "ZooGPTConfig",
    "ZooGPTForCausalLM",
    "ZooGPTForSequenceClassification",
    "ZooGPTModel",
    "__version__",
    "create_config",
    "create_model",
    "list_models",
]
