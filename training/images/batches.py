"""Images as the loop asks for them: batches with what is random about each image, decoded ahead of time."""

import numpy as np
import torch
from torch import Tensor

from training.images.augment import Augmentation
from training.images.rows import ImageRows
from training.run.seeds import generator, seed_from

MASKS, LABELS = 1, 2  # what a seed is for, besides the order of the images and what `Augmentation` draws


class ImageBatches:
    """Training images, every epoch in a new order, and the random numbers of each: functions of the seed and the place
    in the training.

    Args:
        max_steps: nothing is decoded ahead for steps behind the last one.
        num_masked, num_patches: of each image for a masked autoencoder; without them batches have labels.
    """

    def __init__(
        self, rows: ImageRows, augmentation: Augmentation, max_steps: int, num_masked: int = 0, num_patches: int = 0
    ):
        self.rows, self.augmentation, self.max_steps = rows, augmentation, max_steps
        self.num_masked, self.num_patches = num_masked, num_patches
        self.seed, self.global_batch_size = augmentation.seed, augmentation.global_batch_size
        self.size = (augmentation.height, augmentation.width)

    def plan(self, step: int, positions: range) -> tuple[np.ndarray, dict[str, Tensor], Tensor | None]:
        """Which images are at these positions of this step, their random numbers, and what is cut out of them."""
        places = self.rows.draw(step * self.global_batch_size + positions.start, len(positions), self.seed)
        draws = self.augmentation.draw(step, positions)
        aspects = self.rows.aspects(places) if "crop" in draws else 1.0
        return places, draws, self.augmentation.boxes(draws, aspects)

    def batch(self, step, positions):
        places, draws, boxes = self.plan(step, positions)
        batch = {"pixel_values": self.rows.images(places, boxes, self.size), **draws}
        if self.num_masked:
            noise = generator(seed_from(self.seed, MASKS, step))
            noise = noise.random((self.global_batch_size, self.num_patches), dtype=np.float32)
            batch["noise"] = torch.from_numpy(noise[positions.start : positions.stop])
        else:
            batch["labels"] = torch.from_numpy(self.rows.labels[places])
        if step + 1 < self.max_steps:
            places, _, boxes = self.plan(step + 1, positions)
            self.rows.prefetch(places, boxes, self.size)
        return batch

    def augment(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's inputs, from a batch on the device."""
        inputs = {name: batch.pop(name) for name in ("noise", "labels") if name in batch}
        inputs["pixel_values"], labels = self.augmentation(batch.pop("pixel_values"), inputs.get("labels"), batch)
        return inputs if labels is None else {**inputs, "labels": labels}

    def num_items(self, batch):
        """Images, or masked patches."""
        return len(batch["pixel_values"]) * (self.num_masked or 1)

    def num_units(self, batch):
        return len(batch["pixel_values"])

    def external_files(self):
        return self.rows.external_files()


class SelectedRows(ImageRows):
    """Some images of others, those at `places`."""

    def __init__(self, rows: ImageRows, places: np.ndarray):
        super().__init__(None if rows.labels is None else rows.labels[places])
        self.rows, self.places = rows.among(places), places

    def __len__(self):
        return len(self.places)

    def _load(self, indices, boxes, size):
        return self.rows.images(self.places[indices], boxes, size)

    def aspects(self, indices):
        return self.rows.aspects(self.places[indices])

    def report(self, gather=list):
        return self.rows.report(gather)


def choose_labelled(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The places of this part of each class's images, at least one of each, in ascending order. Of one seed, a smaller
    part lies within every larger one."""
    order = generator(seed_from(seed, LABELS)).permutation(len(labels))
    by_class = [order[labels[order] == label] for label in np.unique(labels)]
    return np.sort(np.concatenate([places[: max(1, round(fraction * len(places)))] for places in by_class]))


def channel_statistics(rows: ImageRows, size: tuple[int, int], count: int = 1024) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, as fractions of 255, over `count` images from all of the data."""
    places = np.unique(np.linspace(0, len(rows) - 1, count).astype(int))
    pixels = rows.images(places, size=size).double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    return [round(value, 4) for value in mean.tolist()], [max(round(value, 4), 1e-3) for value in std.tolist()]
