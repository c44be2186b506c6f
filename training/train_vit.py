"""Train a vision transformer: to tell classes apart, or without labels as a masked autoencoder.

    accelerate launch training/train_vit.py
    accelerate launch training/train_vit.py --objective mae --data FOLDER

The first command learns to read handwritten digits, in a few minutes on a laptop's CPU. `--data` takes a folder of
images with a subfolder for each class, a folder of idx files (the MNIST format), a .csv, .jsonl or .parquet file, or
the name of a data set on the Hub. `--model` takes a name of the zoo, or a checkpoint to go on from at any
`--image_size`: a ViT, or a masked autoencoder for its encoder, ours or stock. `--recipe training/recipes/NAME.yaml`
repeats a published run; `--help` lists all options.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

import hf_models
from training.hub.finish import finish
from training.images.arguments import ImageArguments
from training.images.augment import Augmentation
from training.images.batches import ImageBatches, SelectedRows, channel_statistics, choose_labelled
from training.images.read import ImageData, read_images
from training.images.rows import ImageRows
from training.images.stream import ROWS_PER_SHARD
from training.images.validation import ClassValidation, ReconstructionValidation, finish_measuring
from training.models import create_image_model, describe, starting_config
from training.processors import create_image_processor, normalisation_of
from training.run.arguments import is_checkpoint, one_line, option, user_errors, with_defaults
from training.run.folder import identify, open_run
from training.run.loop import train
from training.run.processes import micro_batches

QUICKSTART = {  # under three minutes on two CPU cores
    "max_steps": 500,
    "global_batch_size": 64,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "final_learning_rate": 0.0,
    "warmup_steps": 30,
    "ema_decay": 0.99,
    "eval_every": 100,
    "eval_batch_size": 256,
}
MODELS = {"classify": "vit-mini-patch2-8", "mae": "vit-mae-mini-patch4-28"}  # the defaults of --model
# Options that `Augmentation` takes as they are.
AUGMENTATION = ("translate", "flip", "rand_augment_ops", "rand_augment_magnitude", "color_jitter", "erasing", "mixup")
AUGMENTATION += ("cutmix", "mix_probability", "label_smoothing")


@dataclass
class ViTArguments(with_defaults(ImageArguments, **QUICKSTART)):
    objective: Literal["classify", "mae"] = option("classify", "mae: reconstruct masked patches", "this script")
    config: str | None = option(None, "fields to change in it: 'hidden_size=192,pooling=mean'", "model")
    image_size: int | None = option(None, "pixels of a side; None: the model's", "model")
    num_channels: int | None = option(
        None, "1 grey, 3 colour; None: as the checkpoint or the data has it, 3 in a stream", "model"
    )
    drop_path: float | None = option(None, "probability to leave the last block out (stochastic depth)", "model")

    labelled_fraction: float = option(
        1.0, "part of each class's labels to use; mae: to probe with", "images", above=0, at_most=1
    )
    label_column: str = option("label", "column of the label", "images")
    streaming: bool = option(False, "read a Hub data set as it arrives instead of downloading it first", "images")

    crop_scale: float | None = option(0.8, "least part of the area that a random crop keeps; None: no crop", "changes")
    crop_ratio: float = option(
        1.2, "a random crop's longer side, as a multiple of the shorter, at most", "changes", at_least=1
    )
    translate: int = option(0, "pixels to shift by, at most", "changes")
    rand_augment_ops: int = option(0, "operations of RandAugment on an image", "changes")
    rand_augment_magnitude: float = option(9.0, "their magnitude, to 10", "changes")
    erasing: float = option(0.0, "probability to erase a rectangle", "changes")
    mixup: float = option(0.0, "alpha of mixing two images; 0: never", "changes")
    cutmix: float = option(0.0, "alpha of exchanging a rectangle of two images; 0: never", "changes")
    mix_probability: float = option(1.0, "part of the images to mix", "changes")
    label_smoothing: float = option(0.0, "part of each label to spread over all classes", "changes")

    def __post_init__(self):
        super().__post_init__()
        self.model = self.model or MODELS[self.objective]
        if self.streaming and self.global_batch_size > ROWS_PER_SHARD:  # or processes wait for a shard not yet begun
            raise ValueError(f"global_batch_size of a stream is at most {ROWS_PER_SHARD}, not {self.global_batch_size}")
        for name in ("mixup", "cutmix", "label_smoothing"):
            if self.is_mae and getattr(self, name):
                raise ValueError(f"{name} changes labels, which --objective mae does not use: leave it at 0")

    @property
    def is_mae(self) -> bool:
        """Whether a masked autoencoder is trained, which needs no labels."""
        return self.objective == "mae"

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class of the model."""
        return hf_models.ZooViTMAEForPreTraining if self.is_mae else hf_models.ZooViTForImageClassification

    @property
    def monitor(self) -> str | None:
        """The measure that says which evaluation was the best; without patience the last weights are the result."""
        return ("eval_loss" if self.is_mae else "eval_accuracy") if self.patience else None

    @property
    def augmentation(self) -> dict[str, Any]:
        """What `Augmentation` takes besides sizes."""
        crop = None if self.crop_scale is None else (self.crop_scale, 1.0)
        options = {name: getattr(self, name) for name in AUGMENTATION}
        return {"crop_scale": crop, "crop_ratio": (1 / self.crop_ratio, self.crop_ratio), **options}


def read_data(args: ViTArguments, num_channels: int | None) -> ImageData:
    """Returns the images that `--data` names; for an autoencoder, with labels only if there are any."""
    options = {"label_column": args.label_column, "streaming": args.streaming, "num_channels": num_channels}
    options |= args.reading
    try:
        return read_images(args.data, **options)
    except ValueError as error:
        if not args.is_mae:
            raise
        images = read_images(args.data, labelled=False, **options)
        images.notes.append(f"without labels, so features will not be probed ({one_line(error)})")
        return images


def create_model(args: ViTArguments, images: ImageData, device) -> PreTrainedModel:
    """Returns the model that `--model` names for these images."""
    fields = {"image_size": args.image_size, "drop_path": args.drop_path, "num_channels": images.num_channels}
    fields = {name: value for name, value in fields.items() if value is not None}
    label_names = None if args.is_mae else images.label_names
    return create_image_model(args.model, args.model_class, device, args.config, label_names, **fields)


def create_augmentation(args: ViTArguments, images: ImageData, config: PreTrainedConfig) -> Augmentation:
    """Returns the changes of the images, normalised as trained weights expect, or by the statistics of the data."""
    size = tuple(side * config.patch_size for side in config.grid_size)
    statistics = normalisation_of(args.model, config.num_channels)
    mean, std = statistics or channel_statistics(images.validation if args.streaming else images.train, size)
    return Augmentation(
        seed=args.seed,
        global_batch_size=args.global_batch_size,
        image_size=size,
        num_labels=None if args.is_mae or images.label_names is None else len(images.label_names),
        mean=mean,
        std=std,
        **args.augmentation,
    )


def choose_labelled_rows(args: ViTArguments, images: ImageData) -> ImageRows | None:
    """Returns the training images whose labels may be used; None if no label is known."""
    labelled = None if args.streaming or images.train.labels is None else images.train
    if args.labelled_fraction < 1:
        if labelled is None:
            raise ValueError("labelled_fraction chooses among all labels, which are not known: leave it at 1")
        labelled = SelectedRows(labelled, choose_labelled(labelled.labels, args.labelled_fraction, args.seed))
    return labelled


def create_data(
    args: ViTArguments, accelerator, images: ImageData, augmentation: Augmentation, config: PreTrainedConfig
) -> tuple[ImageBatches, ClassValidation | ReconstructionValidation]:
    """Returns the training images in batches, and the validation of what is learned from them."""
    labelled = choose_labelled_rows(args, images)
    held_out = (accelerator, images.validation, images.label_names, augmentation, args.eval_batch_size)
    if not args.is_mae:
        rows = images.train if labelled is None else labelled
        return ImageBatches(rows, augmentation, args.max_steps), ClassValidation(*held_out)
    num_patches = math.prod(config.grid_size)
    num_masked = num_patches - config.num_visible(num_patches)
    data = ImageBatches(images.train, augmentation, args.max_steps, num_masked, num_patches)
    return data, ReconstructionValidation(*held_out, num_masked, num_patches, labelled)


def main():
    with open_run(ViTArguments) as (args, accelerator):
        with user_errors():
            start = starting_config(args.model, args.model_class)
            images = read_data(args, args.num_channels or (start.num_channels if is_checkpoint(args.model) else None))
            model = create_model(args, images, accelerator.device)
            changes = create_augmentation(args, images, model.config)
            data, validation = create_data(args, accelerator, images, changes, model.config)
            positions, *_ = micro_batches(args, accelerator.process_index, accelerator.num_processes)
            data.batch(0, positions)  # raises ValueError now if pairs are parted or the images are bad
            number = "a stream of" if args.streaming else f"{len(data.rows):,}"
            accelerator.print(
                f"{describe(model)}; {number} images of {changes.height}x{changes.width} pixels to train on and "
                f"{len(images.validation):,} to validate on, from {images.source}",
                *(f"note: {note}" for note in images.notes),
                sep="\n",
            )
            normalisation = {"mean": changes.mean, "std": changes.std}
            names = {"objective": args.objective, "start": args.model, "labelled_fraction": args.labelled_fraction}
            identity = identify(args, model, images.fingerprint, **names, **normalisation, **args.augmentation)
        options = {"unit": "images", "monitor": args.monitor, "augment": data.augment}
        model, results = train(args, accelerator, model, data, validation, identity, **options)
        results, pictures = finish_measuring(accelerator, validation, model, results, images.train)
        processor = create_image_processor((changes.height, changes.width), changes.mean, changes.std)
        task = "image-reconstruction" if args.is_mae else "image-classification"
        finish(args, accelerator, model, processor, results, task=task, data=images, pictures=pictures)


if __name__ == "__main__":
    main()
