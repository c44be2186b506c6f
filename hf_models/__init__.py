"""hf_models: a Hugging Face-compatible model zoo in which the transformer is written once.

Importing the package registers every family with transformers' Auto classes.
"""

import contextlib

import transformers
from transformers.utils import is_torchvision_available

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
from .detr import ZooDetrConfig, ZooDetrForObjectDetection, ZooDetrModel
from .gpt import ZooGPTConfig, ZooGPTForCausalLM, ZooGPTForSequenceClassification, ZooGPTModel
from .mae import ZooViTMAEConfig, ZooViTMAEForPreTraining, ZooViTMAEModel
from .verify import load_verified
from .vit import ZooViTBackbone, ZooViTConfig, ZooViTForImageClassification, ZooViTModel
from .zoo import create_config, create_model, list_models

for config_class in (ZooGPTConfig, ZooBertConfig, ZooViTConfig, ZooViTMAEConfig, ZooDetrConfig):
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, name in config_class.family_auto_map.items():
        if auto_class != "AutoConfig":
            model_class = globals()[name.split(".")[1]]
            getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)

with contextlib.suppress(ImportError):  # the oldest supported transformers needs torchvision for image processors
    for kind, *config_classes in (("ViT", ZooViTConfig, ZooViTMAEConfig), ("Detr", ZooDetrConfig)):
        image_processors = {"pil": getattr(transformers, f"{kind}ImageProcessorPil")}
        if is_torchvision_available():
            image_processors["torchvision"] = getattr(transformers, f"{kind}ImageProcessor")
        for config_class in config_classes:
            transformers.AutoImageProcessor.register(
                config_class, image_processor_classes=image_processors, exist_ok=True
            )

__all__ = [
    "ZooBertConfig",
    "ZooBertForMaskedLM",
    "ZooBertForPreTraining",
    "ZooBertForQuestionAnswering",
    "ZooBertForSequenceClassification",
    "ZooBertForTokenClassification",
    "ZooBertModel",
    "ZooDetrConfig",
    "ZooDetrForObjectDetection",
    "ZooDetrModel",
    "ZooGPTConfig",
    "ZooGPTForCausalLM",
    "ZooGPTForSequenceClassification",
    "ZooGPTModel",
    "ZooViTBackbone",
    "ZooViTConfig",
    "ZooViTForImageClassification",
    "ZooViTMAEConfig",
    "ZooViTMAEForPreTraining",
    "ZooViTMAEModel",
    "ZooViTModel",
    "__version__",
    "create_config",
    "create_model",
    "list_models",
    "load_verified",
]
