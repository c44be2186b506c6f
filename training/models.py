"""Creates or loads the model that `--model` names: a new one of the zoo, or a checkpoint to start from."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_models import ZooViTForImageClassification
from hf_models.zoo import check_fields, create_config, create_model, find_entry
from training.run.arguments import is_checkpoint, parse_fields
from training.run.processes import fastest_attention

# Parameters outside the head whose size depends on the number of classes.
PER_CLASS = re.compile(r"\.(label_embed|proposal_class_head)\.")


def load_or_create(
    name: str,
    model_class: type[PreTrainedModel],
    device: torch.device,
    config: str | None,
    fields: dict,
    from_data: dict,
    new_head: bool,
) -> PreTrainedModel:
    """Loads a checkpoint, or creates a new model of the zoo.

    Args:
        config: fields to change in the config, as `--config` takes them.
        fields: more fields of the config.
        from_data: fields of a new model only.
        new_head: whether a head of another size than the checkpoint's, and other parameters whose size depends on the
            classes, are initialised anew; otherwise they are refused.
    """
    given = parse_fields(config)
    check_fields(model_class.config_class, given)
    fields = {"attn_implementation": fastest_attention(device.type), **fields, **given}
    if not is_checkpoint(name):
        return create_model(name, model_class, **{**from_data, **fields})
    model, info = model_class.from_pretrained(
        name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **fields
    )
    for key, *_ in sorted(info["mismatched_keys"]):  # transformers initialises these anew
        if not new_head or (key.startswith(f"{model.base_model_prefix}.") and not PER_CLASS.search(key)):
            raise ValueError(f"config: {key} of {name} has another size; leave its size unchanged")
    return model


def create_text_model(
    name: str,
    model_class: type[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    num_tokens: int,
    device: torch.device,
    config: str | None = None,
    new_head: bool = False,
    length_option: str = "num_tokens",
    **fields,
) -> PreTrainedModel:
    """Creates a model of the zoo that fits the tokenizer, or loads a checkpoint of the same family, ours or stock.

    Args:
        num_tokens: the most tokens of a row.
        config: fields to change in the config, as `--config` takes them.
        new_head: whether a head of another size than the checkpoint's is initialised anew.
        length_option: the option that `num_tokens` comes from, for error messages.
        **fields: more fields of the config.

    Raises:
        ValueError: the zoo has no such model, the config no such field, or the checkpoint has another vocabulary, other
            sizes or fewer positions.
    """
    from_data = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": num_tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = load_or_create(name, model_class, device, config, fields, from_data, new_head)
    size = model.config.vocab_size
    if is_checkpoint(name) and (len(tokenizer) > size or not is_own_tokenizer(tokenizer, name)):
        raise ValueError(
            f"the tokenizer, of {len(tokenizer)} tokens, is not the one {name} was trained with, of {size}: "
            f"give --tokenizer {name}"
        )
    if num_tokens > model.config.max_position_embeddings:
        raise ValueError(
            f"{length_option} {num_tokens} is more than the {model.config.max_position_embeddings} positions of "
            f"{name}: give at most {model.config.max_position_embeddings}"
        )
    return model


def is_own_tokenizer(tokenizer: PreTrainedTokenizerFast, checkpoint: str) -> bool:
    """Whether the checkpoint has the same vocabulary, or no tokenizer to compare with."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint).get_vocab() == tokenizer.get_vocab()
    except (OSError, ValueError):
        return True


# The model types of the checkpoints that each image model can start from.
IMAGE_MODELS = {
    "zoo_vit": ["zoo_vit", "vit", "zoo_vit_mae", "vit_mae"],
    "zoo_vit_mae": ["zoo_vit_mae", "vit_mae"],
    "zoo_detr": ["zoo_detr", "detr"],
}
ZOO_NAMES = {"zoo_vit": "vit-*", "zoo_vit_mae": "vit-mae-*", "zoo_detr": "detr-*"}


def starting_config(name: str, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """Loads the config of the checkpoint, or of the model of the zoo, that an image model starts from.

    Raises:
        ValueError: there is none of that name, or it is of another family.
    """
    family = model_class.config_class.model_type
    if not is_checkpoint(name):
        if find_entry(name).config_class is not model_class.config_class:
            raise ValueError(
                f"--model {name} is no {model_class.__name__}: `python -m hf_models` lists them, {ZOO_NAMES[family]}"
            )
        return create_config(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name} is no checkpoint that loads: {error}") from error
    if config.model_type not in IMAGE_MODELS[family]:
        known = ", ".join(IMAGE_MODELS[family])
        raise ValueError(f"--model {name} is a {config.model_type!r}; a {model_class.__name__} starts from {known}")
    return config


def create_image_model(
    name: str,
    model_class: type[PreTrainedModel],
    device: torch.device,
    config: str | None = None,
    label_names: list[str] | None = None,
    **fields,
) -> PreTrainedModel:
    """Creates a model of the zoo for images, or loads a checkpoint, ours or stock.

    The checkpoint is of the same family; a classifier can also start from a masked autoencoder's encoder.

    Args:
        config: fields to change in the config, as `--config` takes them.
        label_names: the classes; a head of another size than the checkpoint's is initialised anew.
        **fields: more fields of the config. If `image_size` is not the checkpoint's, positions are interpolated.

    Raises:
        ValueError: there is no such model, the config no such field, or the checkpoint other sizes.
    """
    starting_config(name, model_class)
    if label_names is not None:
        fields["id2label"] = dict(enumerate(label_names))
        fields["label2id"] = {label: number for number, label in enumerate(label_names)}
        if model_class is ZooViTForImageClassification:
            fields["problem_type"] = "single_label_classification"
    return load_or_create(name, model_class, device, config, fields, {}, new_head=label_names is not None)


def describe(model: PreTrainedModel) -> str:
    """Returns the model's class and size in words."""
    return f"{type(model).__name__} with {model.num_parameters():,} parameters"


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In the block the model runs without dropout and gradients, and can return attention maps."""
    was_training, backend = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")  # the backend that forms the maps
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(backend)
        model.train(was_training)
