"""hf_models: a Hugging Face-compatible model zoo in which the transformer is written once.

Importing the package registers every family with transformers' Auto classes.
"""

import contextlib

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

with contextlib.suppress(ImportError):  # Pillow may be missing, because models of text do not need it
    # `transformers.AutoImageProcessor` of 5.17 needs torchvision, but the class in this module does not.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .image_processing import ZooDetrImageProcessor, ZooViTImageProcessor

    for config_class, processor_class in (
        (ZooViTConfig, ZooViTImageProcessor),
        (ZooViTMAEConfig, ZooViTImageProcessor),
        (ZooDetrConfig, ZooDetrImageProcessor),
    ):
        # transformers takes the second if torchvision is installed; it shall be the same.
        processor_classes: dict[str, type] = {"pil": processor_class, "torchvision": processor_class}
        AutoImageProcessor.register(config_class, image_processor_classes=processor_classes, exist_ok=True)
    __all__ += ["ZooDetrImageProcessor", "ZooViTImageProcessor"]
