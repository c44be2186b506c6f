"""The options of the scripts that train on images."""

from dataclasses import dataclass
from typing import Any

from training.run.arguments import RunArguments, option, split_names


@dataclass
class ImageArguments(RunArguments):
    """The options that all scripts for images share. What reads or changes the images checks options without bounds."""

    num_channels: int | None = option(None, "1 grey, 3 colour; None: as the checkpoint or the data has it", "model")

    validation_data: str | None = option(
        None, "other images to validate on: their part for that, or else all of them", "images"
    )
    validation_fraction: float = option(0.1, "part of the data to hold out where none is for validation", "images")
    image_column: str = option("image", "column of the image", "images")
    label_names: str | None = option(None, "classes in the order of their ids: 'cat,dog'", "images")
    max_bad_images: float = option(0.01, "part of the images that may be missing or unreadable", "images")
    num_workers: int = option(2, "processes of each trainer that decode image files", "images", at_least=0)
    eval_batch_size: int = option(16, "images of an evaluation batch", "images", at_least=1)

    flip: float = option(0.0, "probability of a mirror image", "changes")
    color_jitter: float = option(0.0, "how far brightness, contrast and saturation change", "changes")

    @property
    def reading(self) -> dict[str, Any]:
        """What a reader of images takes besides the data."""
        names = ("validation_data", "validation_fraction", "image_column", "max_bad_images", "num_workers", "seed")
        return {name: getattr(self, name) for name in names} | {"label_names": split_names(self.label_names)}
