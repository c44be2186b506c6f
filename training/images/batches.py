"""Batches of training images with the random numbers that augmentation needs, decoded ahead of time."""

import numpy as np
import torch
from torch import Tensor

from training.images.augment import Augmentation
from training.images.rows import ArrayRows, ImageRows, central_box
from training.run.seeds import generator, seed_from

MASKS, LABELS = 1, 2  # purposes of a seed, besides the order of the images and the draws of `Augmentation`


class ImageBatches:
    """Training images as the loop asks for them, every epoch in a new order.

    Order and random numbers depend only on the seed and the position in the training.

    Args:
        max_steps: the number of steps; nothing is decoded ahead for later ones.
        num_masked, num_patches: masked and all patches of each image, for a masked autoencoder. 0: batches have labels.
    """

    def __init__(
        self, rows: ImageRows, augmentation: Augmentation, max_steps: int, num_masked: int = 0, num_patches: int = 0
    ):
        self.rows, self.augmentation, self.max_steps = rows, augmentation, max_steps
        self.num_masked, self.num_patches = num_masked, num_patches
        self.seed, self.global_batch_size = augmentation.seed, augmentation.global_batch_size
        self.size = (augmentation.height, augmentation.width)

    def plan(self, step: int, positions: range) -> tuple[np.ndarray, dict[str, Tensor], Tensor | None]:
        """Says which images are at these positions of a step, their random numbers, and the boxes to cut out."""
        indices = self.rows.draw(step * self.global_batch_size + positions.start, len(positions), self.seed)
        draws = self.augmentation.draw(step, positions)
        aspects = self.rows.aspects(indices) if "crop" in draws else 1.0
        return indices, draws, self.augmentation.boxes(draws, aspects)

    def batch(self, step, positions):
        indices, draws, boxes = self.plan(step, positions)
        batch = {"pixel_values": self.rows.images(indices, boxes, self.size), **draws}
        if self.num_masked:
            noise = generator(seed_from(self.seed, MASKS, step))
            noise = noise.random((self.global_batch_size, self.num_patches), dtype=np.float32)
            batch["noise"] = torch.from_numpy(noise[positions.start : positions.stop])
        else:
            batch["labels"] = torch.from_numpy(self.rows.labels[indices])
        if step + 1 < self.max_steps:
            indices, _, boxes = self.plan(step + 1, positions)
            self.rows.prefetch(indices, boxes, self.size)
        return batch

    def augment(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turns a batch on the device into the model's inputs."""
        inputs = {name: batch.pop(name) for name in ("noise", "labels") if name in batch}
        inputs["pixel_values"], labels = self.augmentation(batch.pop("pixel_values"), inputs.get("labels"), batch)
        return inputs if labels is None else {**inputs, "labels": labels}

    def num_items(self, batch):
        """Counts what the loss is divided by: images, or masked patches."""
        return len(batch["pixel_values"]) * (self.num_masked or 1)

    def num_units(self, batch):
        return len(batch["pixel_values"])

    def external_files(self):
        return self.rows.external_files()


class SelectedRows(ImageRows):
    """Some of the images of other rows.

    Args:
        chosen: (N,), the numbers of the images in `rows`.
    """

    def __init__(self, rows: ImageRows, chosen: np.ndarray):
        super().__init__(None if rows.labels is None else rows.labels[chosen])
        self.rows, self.chosen = rows.among(chosen), chosen

    def __len__(self):
        return len(self.chosen)

    def _load(self, indices, boxes, size):
        return self.rows.images(self.chosen[indices], boxes, size)

    def aspects(self, indices):
        return self.rows.aspects(self.chosen[indices])

    def report(self, gather=list):
        return self.rows.report(gather)


def choose_labelled(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Chooses a part of each class's images, at least one of each class.

    With the same seed, a smaller part lies within every larger one.

    Returns:
        The numbers of the images, ascending.
    """
    order = generator(seed_from(seed, LABELS)).permutation(len(labels))
    by_class = [order[labels[order] == label] for label in np.unique(labels)]
    return np.sort(np.concatenate([members[: max(1, round(fraction * len(members)))] for members in by_class]))


def channel_statistics(rows: ImageRows, size: tuple[int, int], count: int = 1024) -> tuple[list[float], list[float]]:
    """Measures mean and standard deviation of each channel, as fractions of 255, over `count` evenly spread images."""
    indices = np.unique(np.linspace(0, len(rows) - 1, count).astype(int))
    boxes = None
    if isinstance(rows, ArrayRows) and rows.pixels.shape[2:] != size:  # resized as in training
        boxes = central_box(rows.pixels.shape[2:], size).repeat(len(indices), 0)
    pixels = rows.images(indices, boxes, size=size).double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    return [round(value, 4) for value in mean.tolist()], [max(round(value, 4), 1e-3) for value in std.tolist()]
