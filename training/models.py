"""The model that `--model` names: a fresh one of the zoo, or a checkpoint to start from."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BaseImageProcessor,
    DetrImageProcessorPil,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)
from transformers.image_utils import PILImageResampling

from hf_models import ZooViTForImageClassification
from hf_models.zoo import check_fields, create_config, create_model, find_entry
from training.run.arguments import is_checkpoint, parse_fields
from training.run.processes import fastest_attention

# What in the body of a model there is one of for each class.
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
    """A checkpoint, or a fresh model of the zoo.

    Args:
        config: fields to change, as `--config` takes them.
        fields: more fields of the config.
        from_data: fields of a fresh model.
        new_head: whether a head of another size than the checkpoint's, and what else there is one of for each class,
            begins anew, or is refused.
    """
    given = parse_fields(config)
    check_fields(model_class.config_class, given)
    fields = {"attn_implementation": fastest_attention(device.type), **fields, **given}
    if not is_checkpoint(name):
        return create_model(name, model_class, **{**from_data, **fields})
    model, info = model_class.from_pretrained(
        name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **fields
    )
    for key, *_ in sorted(info["mismatched_keys"]):  # these would begin anew
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
    """A fresh model of the zoo that fits the tokenizer, or a checkpoint of the same family, ours or stock, to go on
    from.

    Args:
        num_tokens: the most tokens of a row.
        config: fields to change in the config, as `--config` takes them.
        new_head: a head of another size than the checkpoint's begins anew.
        length_option: the option that `num_tokens` comes from, for an error.
        **fields: more fields of the config.

    Raises:
        ValueError: the zoo has no such name, the config no such field, or the checkpoint has another vocabulary, other
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
    """Whether the checkpoint has the same vocabulary; true if it has none to compare with."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint).get_vocab() == tokenizer.get_vocab()
    except (OSError, ValueError):
        return True


# What a checkpoint's config calls the models that one of images can start from.
IMAGE_MODELS = {
    "zoo_vit": ["zoo_vit", "vit", "zoo_vit_mae", "vit_mae"],
    "zoo_vit_mae": ["zoo_vit_mae", "vit_mae"],
    "zoo_detr": ["zoo_detr", "detr"],
}
ZOO_NAMES = {"zoo_vit": "vit-*", "zoo_vit_mae": "vit-mae-*", "zoo_detr": "detr-*"}


def starting_config(name: str, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config of the checkpoint, or of the size of the zoo, that a model of images starts from.

    Raises ValueError if there is none of that name, or it is of another family.
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
    """A fresh model of the zoo for images, or a checkpoint to go on from: of the same family, or for a classifier the
    encoder of a masked autoencoder, ours or stock.

    Args:
        config: fields to change in the config, as `--config` takes them.
        label_names: the classes; a head of another size than the checkpoint's begins anew.
        **fields: more fields of the config. With another `image_size` than a checkpoint's, its positions are
            interpolated.

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
    """Turns off dropout and gradients in the block, and makes the model able to return attention maps."""
    was_training, backend = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")  # the backend that forms the maps
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(backend)
        model.train(was_training)


def read_image_processor(name: str) -> dict:
    """What the checkpoint's image processor was saved with; nothing if there is none."""
    if not is_checkpoint(name):
        return {}
    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        return {}


def normalisation_of(name: str, num_channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel that the checkpoint's image processor has; None if it has none."""
    if not (processor := read_image_processor(name)):
        return None
    values = (processor.get(field, 0.5) for field in ("image_mean", "image_std"))  # 0.5: the default of a stock ViT
    return tuple(value if isinstance(value, list) else [value] * num_channels for value in values)


def edges_of(name: str) -> tuple[int | None, int | None] | None:
    """The pixels that the image processor of a detector's checkpoint gives the shorter side, and the most of the longer
    one; both None where images keep their size. None if there is no processor, or it makes all images one size."""
    processor = read_image_processor(name)
    if not processor.get("do_resize", True):
        return None, None
    size = processor.get("size")
    if isinstance(size, int):  # in older files
        return size, processor.get("max_size")
    return (size["shortest_edge"], size.get("longest_edge")) if size and "shortest_edge" in size else None


def create_image_processor(size: tuple[int, int], mean: list[float], std: list[float]) -> BaseImageProcessor:
    """What a pipeline prepares images with as the evaluation does: the shorter side resized to fit, the middle cut
    out, every channel normalised. Where `size` is no square, no stock processor can cut: images of another shape are
    stretched, so give a pipeline such as have it."""
    height, width = size
    frame = {"height": height, "width": width}
    is_square, is_grey = height == width, len(mean) == 1
    return ViTImageProcessorPil(  # saved under the name that serves torchvision too
        do_convert_rgb=len(mean) == 3,
        size={"shortest_edge": height} if is_square else frame,
        do_center_crop=is_square,
        crop_size=frame,
        resample=PILImageResampling.BICUBIC,
        image_mean=mean[0] if is_grey else mean,  # a number: a pipeline makes a grey image three equal channels first
        image_std=std[0] if is_grey else std,
    )


def create_detection_processor(
    shortest_edge: int | None, longest_edge: int | None, mean: list[float], std: list[float]
) -> DetrImageProcessorPil:
    """What a pipeline prepares images with as the evaluation of a DETR does, and what makes boxes of its answers: the
    shorter side is resized to `shortest_edge` pixels, or to fewer where the longer one would else have more than
    `longest_edge`; every channel is normalised. None: as it is, or without such a limit."""
    is_grey = len(mean) == 1
    return DetrImageProcessorPil(
        do_convert_rgb=len(mean) == 3,
        do_resize=shortest_edge is not None,
        size={"shortest_edge": shortest_edge or 800, "longest_edge": longest_edge or 10**6},
        resample=PILImageResampling.BICUBIC,
        image_mean=mean[0] if is_grey else mean,  # a number, as in `create_image_processor`
        image_std=std[0] if is_grey else std,
    )
