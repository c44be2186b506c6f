"""Train a vision transformer: to tell classes apart, or without labels as a masked autoencoder.

    accelerate launch training/train_vit.py
    accelerate launch training/train_vit.py --objective mae --data FOLDER

The first learns to read handwritten digits, in a few minutes on a laptop's CPU. `--data` takes a folder of images, one
subfolder a class, or of idx files (the MNIST format); a .csv, .jsonl or .parquet file; or a data set's name on the Hub.
`--model` takes a name of the zoo, or a checkpoint to go on from at any `--image_size`: ours or stock, a ViT or for its
encoder a masked autoencoder. `--recipe training/recipes/NAME.yaml` repeats a published run; `--help` lists all options.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from accelerate.utils import gather_object

import hf_models
from training.hub.results import finish
from training.images.augment import Augmentation
from training.images.batches import ImageBatches, SelectedRows, channel_statistics, choose_labelled
from training.images.read import ImageData, read_images
from training.images.stream import ROWS_PER_SHARD
from training.images.validation import ClassValidation, ReconstructionValidation
from training.models import create_image_model, is_checkpoint, starting_config
from training.processors import create_image_processor, normalisation_of
from training.run.arguments import RunArguments, one_line, option, user_errors, with_defaults
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
}
MODELS = {"classify": "vit-mini-patch2-8", "mae": "vit-mae-mini-patch4-28"}  # where none is given
# Options that `Augmentation` takes as they are.
AUGMENTATION = ("translate", "flip", "rand_augment_ops", "rand_augment_magnitude", "color_jitter", "erasing", "mixup")
AUGMENTATION += ("cutmix", "mix_probability", "label_smoothing")


@dataclass
class ViTArguments(with_defaults(RunArguments, **QUICKSTART)):
    objective: Literal["classify", "mae"] = option("classify", "mae: reconstruct masked patches", "this script")
    config: str | None = option(None, "fields to change in it: 'hidden_size=192,pooling=mean'", "model")
    image_size: int | None = option(None, "pixels of a side; None: the model's", "model")
    num_channels: int | None = option(None, "1 grey, 3 colour (a stream); None: as the checkpoint or data", "model")
    drop_path: float | None = option(None, "probability to leave the last block out (stochastic depth)", "model")

    validation_data: str | None = option(
        None, "other images to validate on: their part for that, or else all of them", "images"
    )
    validation_fraction: float = option(0.1, "part of the data to hold out where none is for validation", "images")
    labelled_fraction: float = option(1.0, "part of each class's labels to use; mae: to probe with", "images")
    image_column: str = option("image", "column of the image", "images")
    label_column: str = option("label", "column of the label", "images")
    label_names: str | None = option(None, "classes in the order of their ids: 'cat,dog'", "images")
    streaming: bool = option(False, "read a Hub data set as it arrives instead of downloading it first", "images")
    max_bad_images: float = option(0.01, "part of the images that may be unreadable", "images")
    num_workers: int = option(2, "processes of each trainer that decode image files", "images")
    eval_batch_size: int = option(256, "images of an evaluation batch", "images")

    crop_scale: float | None = option(0.8, "least part of the area that a random crop keeps; None: no crop", "changes")
    crop_ratio: float = option(1.2, "a random crop's longer side, as a multiple of the shorter, at most", "changes")
    translate: int = option(0, "pixels to shift by, at most", "changes")
    flip: float = option(0.0, "probability of a mirror image", "changes")
    rand_augment_ops: int = option(0, "operations of RandAugment on an image", "changes")
    rand_augment_magnitude: float = option(9.0, "their magnitude, to 10", "changes")
    color_jitter: float = option(0.0, "how far brightness, contrast and saturation change", "changes")
    erasing: float = option(0.0, "probability to erase a rectangle", "changes")
    mixup: float = option(0.0, "alpha of mixing two images; 0: never", "changes")
    cutmix: float = option(0.0, "alpha of exchanging a rectangle of two images; 0: never", "changes")
    mix_probability: float = option(1.0, "part of the images to mix", "changes")
    label_smoothing: float = option(0.0, "part of each label to spread over all classes", "changes")

    def __post_init__(self):
        super().__post_init__()
        self.model = self.model or MODELS[self.objective]
        for name, least in {"eval_batch_size": 1, "num_workers": 0, "crop_ratio": 1}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.streaming and self.global_batch_size > ROWS_PER_SHARD:  # processes would wait for a shard not begun
            raise ValueError(f"global_batch_size of a stream is at most {ROWS_PER_SHARD}, not {self.global_batch_size}")
        if not 0 < self.labelled_fraction <= 1:
            raise ValueError(f"labelled_fraction must be above 0 and at most 1, not {self.labelled_fraction}")
        for name in ("mixup", "cutmix", "label_smoothing"):
            if self.objective == "mae" and getattr(self, name):
                raise ValueError(f"{name} changes labels, which --objective mae does not use: leave it at 0")

    @property
    def augmentation(self) -> dict[str, Any]:
        """What `Augmentation` takes besides sizes."""
        crop = None if self.crop_scale is None else (self.crop_scale, 1.0)
        options = {name: getattr(self, name) for name in AUGMENTATION}
        return {"crop_scale": crop, "crop_ratio": (1 / self.crop_ratio, self.crop_ratio), **options}


def read_data(args: ViTArguments, num_channels: int | None) -> ImageData:
    """The images that `--data` names, those for an autoencoder with labels only if there are any."""
    names = ("validation_data", "validation_fraction", "image_column", "label_column", "streaming", "max_bad_images")
    options = {name: getattr(args, name) for name in (*names, "num_workers", "seed")} | {"num_channels": num_channels}
    if args.label_names is not None:
        options["label_names"] = [name.strip() for name in args.label_names.split(",")]
    try:
        return read_images(args.data, **options)
    except ValueError as error:
        if args.objective == "classify":
            raise
        images = read_images(args.data, labelled=False, **options)
        images.notes.append(f"without labels, so features will not be probed ({one_line(error)})")
        return images


def main():
    with open_run(ViTArguments) as (args, accelerator):
        with user_errors():
            is_mae = args.objective == "mae"
            model_class = hf_models.ZooViTMAEForPreTraining if is_mae else hf_models.ZooViTForImageClassification
            start = starting_config(args.model, model_class)
            images = read_data(args, args.num_channels or (start.num_channels if is_checkpoint(args.model) else None))
            rows, names = images.train, None if is_mae else images.label_names
            fields = {"image_size": args.image_size, "drop_path": args.drop_path, "num_channels": images.num_channels}
            fields = {name: value for name, value in fields.items() if value is not None}
            model = create_image_model(args.model, model_class, accelerator.device, args.config, names, **fields)
            config = model.config
            size = tuple(side * config.patch_size for side in config.grid_size)
            scale = normalisation_of(args.model, config.num_channels)
            mean, std = scale or channel_statistics(images.validation if args.streaming else rows, size)
            augmentation = Augmentation(
                seed=args.seed,
                global_batch_size=args.global_batch_size,
                image_size=size,
                num_labels=names and len(names),
                mean=mean,
                std=std,
                **args.augmentation,
            )
            labelled = None if args.streaming or rows.labels is None else rows
            if args.labelled_fraction < 1:
                if labelled is None:
                    raise ValueError("labelled_fraction chooses among all labels, which are not known: leave it at 1")
                labelled = SelectedRows(rows, choose_labelled(rows.labels, args.labelled_fraction, args.seed))
            held_out = (accelerator, images.validation, images.label_names, augmentation, args.eval_batch_size)
            if is_mae:
                num_patches = math.prod(config.grid_size)
                num_masked = num_patches - config.num_visible(num_patches)
                data = ImageBatches(rows, augmentation, args.max_steps, num_masked, num_patches)
                validation = ReconstructionValidation(*held_out, num_masked, num_patches, labelled)
            else:
                data = ImageBatches(rows if labelled is None else labelled, augmentation, args.max_steps)
                validation = ClassValidation(*held_out)
            positions, *_ = micro_batches(args, accelerator.process_index, accelerator.num_processes)
            data.batch(0, positions)  # raises ValueError now if pairs are parted or the images are bad
            accelerator.print(
                f"{type(model).__name__} with {model.num_parameters():,} parameters; "
                f"{'a stream of' if args.streaming else f'{len(data.rows):,}'} images of {size[0]}x{size[1]} pixels to "
                f"train on and {len(images.validation):,} to validate on, from {images.source}"
            )
            for note in images.notes:
                accelerator.print(f"note: {note}")
            identity = identify(
                args,
                model,
                images.fingerprint,
                objective=args.objective,
                start=args.model,
                labelled_fraction=args.labelled_fraction,
                mean=mean,
                std=std,
                **args.augmentation,
            )
        model, results = train(
            args,
            accelerator,
            model,
            data,
            validation,
            identity,
            unit="images",
            monitor=("eval_loss" if is_mae else "eval_accuracy") if args.patience else None,
            augment=data.augment,
        )
        measured, pictures = validation.look_closer(model, results)
        found = [f"{name} {value:.4f}" for name, value in measured.items() if isinstance(value, float)]
        reports = [line for one in (rows, images.validation) for line in one.report(gather_object)]
        accelerator.print("\n".join([*reports, *found]))
        finish(
            args,
            accelerator,
            model,
            create_image_processor(size, mean, std),
            {**results, **measured},
            task="image-reconstruction" if is_mae else "image-classification",
            data={"source": images.source, "fingerprint": images.fingerprint, "licence": images.license},
            pictures=pictures,
        )


if __name__ == "__main__":
    main()
