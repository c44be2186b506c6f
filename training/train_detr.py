"""Train a DETR to find objects: where each of them is in an image, and what it is.

    accelerate launch training/train_detr.py
    accelerate launch training/train_detr.py --data FOLDER --model detr-small

The first command learns to find handwritten digits on canvases, in minutes on a laptop's CPU. `--data` takes a folder
in the layout of COCO, Pascal VOC or YOLO, a .json file of COCO, or a data set of the Hub with a column "objects".
`--model` takes a name of the zoo, or a checkpoint to go on from, ours or a stock DETR. `--backbone_weights` takes the
weights of a trained ResNet for a fresh model. `--recipe training/recipes/NAME.yaml` repeats a published run; `--help`
lists all options.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_models import ZooDetrConfig, ZooDetrForObjectDetection
from hf_models.resnet import load_backbone_weights
from training.detection.batches import DetectionBatches, DetectionTransform
from training.detection.read import DetectionData, read_detection
from training.detection.validation import DetectionValidation
from training.hub.finish import finish
from training.images.arguments import ImageArguments
from training.images.batches import channel_statistics
from training.images.validation import finish_measuring
from training.models import create_image_model, describe, starting_config
from training.processors import edges_of, normalisation_of
from training.run.arguments import is_checkpoint, option, user_errors, with_defaults
from training.run.folder import identify, open_run
from training.run.loop import train
from training.run.processes import micro_batches

QUICKSTART = {  # minutes on two CPU cores
    "model": "detr-mini",
    "max_steps": 1000,
    "global_batch_size": 16,
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "final_learning_rate": 0.0,
    "warmup_steps": 50,
    "max_grad_norm": 0.1,
    "ema_decay": 0.99,
    "eval_every": 250,
}
MOST_PIXELS = 512  # of the shorter side, if neither the options nor a checkpoint say how large images have to be
LONGER = 1333 / 800  # the longest side, as a multiple of the shorter one's pixels (Carion et al. 2020, appendix A.4)
# Options that `DetectionTransform` takes as they are.
CHANGES = ("scale_jitter", "crop", "crop_scale", "crop_visible", "flip", "color_jitter")


@dataclass
class DetrArguments(with_defaults(ImageArguments, **QUICKSTART)):
    config: str | None = option(None, "fields to change in it: 'num_queries=50,dilation=true'", "model")
    backbone_weights: str | None = option(
        None, "weights of a trained ResNet (stock, timm's or ours): a file, a folder or a Hub repository", "model"
    )
    backbone_learning_rate: float | None = option(
        None,
        "peak rate of the backbone; 0: it does not train; None: learning_rate, a tenth of it for trained weights",
        "optimization",
        at_least=0,
    )

    validation_split: Literal["val", "test"] | None = option(None, "part of the data to validate on", "images")
    objects_column: str = option("objects", "column of its boxes and their classes", "images")
    box_format: Literal["xywh", "xyxy"] = option(
        "xywh", "left and top of such a box, then width and height or right and bottom", "images"
    )
    shortest_edge: int | None = option(
        None,
        f"pixels of an image's shorter side; None: the checkpoint's, or as the images are, at most {MOST_PIXELS}",
        "images",
        at_least=1,
    )
    longest_edge: int | None = option(
        None,
        "most pixels of the longer side; None: 5/3 of shortest_edge, or if that is None too the checkpoint's",
        "images",
        at_least=1,
    )

    scale_jitter: float = option(0.0, "the shorter side loses up to this part of its pixels, by chance", "changes")
    crop: float = option(0.0, "probability of a random crop", "changes")
    crop_scale: float = option(0.3, "least part of the area that a crop keeps", "changes")
    crop_visible: float = option(0.25, "least part of a box that must be in a crop for it to stay a box", "changes")

    def __post_init__(self):
        super().__post_init__()
        if self.layer_decay != 1:
            raise ValueError("layer_decay is for one stack of layers, which a DETR is not: see backbone_learning_rate")

    @property
    def backbone_is_trained(self) -> bool:
        """Whether the backbone begins with weights that someone has trained."""
        return is_checkpoint(self.model) or self.backbone_weights is not None

    @property
    def backbone_rate(self) -> float:
        """The backbone's learning rate, as a multiple of `learning_rate`."""
        if self.backbone_learning_rate is None:
            return 0.1 if self.backbone_is_trained else 1.0
        return self.backbone_learning_rate / self.learning_rate


def read_data(args: DetrArguments, num_channels: int | None) -> DetectionData:
    """Returns the images that `--data` names, with their boxes."""
    options = {name: getattr(args, name) for name in ("validation_split", "objects_column", "box_format")}
    return read_detection(args.data, num_channels=num_channels, **options, **args.reading)


def is_stock(config: PreTrainedConfig) -> bool:
    return config.model_type in ZooDetrConfig.stock_model_types


def create_model(
    args: DetrArguments, start: PreTrainedConfig, images: DetectionData, device
) -> ZooDetrForObjectDetection:
    """Returns the model that `--model` names, for the classes of the data.

    Every decoder layer of a stock checkpoint is trained, as in the paper, unless `--config` sets `auxiliary_loss`.
    Published checkpoints have this option off, since it is not needed to detect.

    Args:
        start: the config that `--model` names.

    Raises:
        ValueError: the weights of the backbone do not fit, or the backbone cannot learn without trained weights and
            there are none.
    """
    # An image has many cells, and for many cells the fused kernel is faster on a CPU too.
    fields = {"num_channels": images.num_channels, "attn_implementation": "sdpa"}
    if is_stock(start):
        fields["auxiliary_loss"] = True
    model = create_image_model(args.model, ZooDetrForObjectDetection, device, args.config, images.label_names, **fields)
    config: ZooDetrConfig = model.config
    if args.backbone_weights is not None:
        if config.backbone is None:
            raise ValueError(f"backbone_weights are for a ResNet, which the backbone of {args.model} is not")
        load_backbone_weights(model.model.backbone, args.backbone_weights)
    elif not is_checkpoint(args.model) and config.backbone is not None and config.backbone_norm == "frozen_batch":
        raise ValueError(
            f"the backbone of {args.model} has frozen batch norms, which without trained weights normalise nothing: "
            "give backbone_weights, or to train from scratch --config backbone_norm=group"
        )
    if args.backbone_rate == 0:
        model.model.backbone.requires_grad_(False)
    return model


def choose_edges(args: DetrArguments, images: DetectionData) -> tuple[int | None, int | None]:
    """Returns `shortest_edge` and `longest_edge` of `DetectionTransform`, from options, checkpoint or data."""
    found = edges_of(args.model) if is_checkpoint(args.model) else None
    if args.shortest_edge is None and args.longest_edge is None:
        if found is not None:
            return found
        if args.data == "embedded":
            return None, None
    shortest = args.shortest_edge or (found and found[0])
    shortest = shortest or min(MOST_PIXELS, round(float(np.median(images.train.sizes.min(axis=1)))))
    return shortest, args.longest_edge or round(shortest * LONGER)


def choose_normalisation(args: DetrArguments, images: DetectionData) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each channel, as trained weights expect them, or of the data."""
    if found := normalisation_of(args.model, images.num_channels):
        return found
    if args.backbone_is_trained and images.num_channels == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return channel_statistics(images.train, (64, 64))


def create_transform(args: DetrArguments, images: DetectionData) -> DetectionTransform:
    """Returns the changes of the images and their boxes."""
    shortest_edge, longest_edge = choose_edges(args, images)
    mean, std = choose_normalisation(args, images)
    changes = {name: getattr(args, name) for name in CHANGES}
    changes |= {"shortest_edge": shortest_edge, "longest_edge": longest_edge, "mean": mean, "std": std}
    return DetectionTransform(seed=args.seed, global_batch_size=args.global_batch_size, **changes)


def summarise(args: DetrArguments, start: PreTrainedConfig, images: DetectionData, model, transform) -> str:
    """Returns what is trained on what, and what a user has to know about both."""
    edge = transform.shortest_edge
    size = "of their own size" if edge is None else f"with {edge} pixels on the shorter side"
    lines = [
        f"{describe(model)}; {len(images.train):,} images {size} and {images.train.count_boxes():,} boxes of "
        f"{len(images.label_names)} classes to train on, {len(images.validation):,} images to validate on, "
        f"from {images.source}"
    ]
    lines += [f"note: {note}" for note in images.notes]
    if is_stock(start) and model.config.auxiliary_loss and not start.auxiliary_loss:
        lines.append(
            f"note: auxiliary_loss is true, though false in {args.model}: every decoder layer is trained, as "
            "in the paper; --config auxiliary_loss=false trains the last one only"
        )
    return "\n".join(lines)


def main():
    with open_run(DetrArguments) as (args, accelerator):
        with user_errors():
            start = starting_config(args.model, ZooDetrForObjectDetection)
            images = read_data(args, args.num_channels or (start.num_channels if args.backbone_is_trained else None))
            model = create_model(args, start, images, accelerator.device)
            transform = create_transform(args, images)
            data = DetectionBatches(images.train, transform, args.max_steps, model.config)
            held_out = (accelerator, images.validation, images.label_names)
            validation = DetectionValidation(*held_out, transform, model.config, args.eval_batch_size)
            positions, *_ = micro_batches(args, accelerator.process_index, accelerator.num_processes)
            data.batch(0, positions)  # raises ValueError now if the images are bad
            accelerator.print(summarise(args, start, images, model, transform))
            names = (*CHANGES, "shortest_edge", "longest_edge", "mean", "std")
            identity = identify(
                args,
                model,
                images.fingerprint,
                start=args.model,
                backbone_weights=args.backbone_weights,
                backbone_rate=args.backbone_rate,
                **{name: getattr(transform, name) for name in names},
            )
        options = {"unit": "images", "monitor": "eval_map" if args.patience else None, "augment": data.augment}
        if args.backbone_rate:
            options["rate_scales"] = {"model.backbone": args.backbone_rate}
        model, results = train(args, accelerator, model, data, validation, identity, **options)
        results, pictures = finish_measuring(accelerator, validation, model, results, images.train)
        processor, task = validation.processor, "object-detection"
        finish(args, accelerator, model, processor, results, task=task, data=images, pictures=pictures)


if __name__ == "__main__":
    main()
