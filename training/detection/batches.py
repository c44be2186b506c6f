"""Batches of images with boxes: changed at random, padded to one size, decoded ahead of time.

    transform = DetectionTransform(seed=0, global_batch_size=16, mean=[0.5], std=[0.25], shortest_edge=480, flip=0.5)
    data = DetectionBatches(rows, transform, max_steps=1000, config=model.config)
    inputs = data.augment(data.batch(step=0, positions=range(0, 8)))

Augmentation depends only on seed, step and position in the global batch, and images are padded to the largest size in
the global batch, so that micro-batches, processes and resuming change nothing.

Dimensions: B images, C channels, H and W of the batch, h and w of an image in it, n boxes, G groups for denoising.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_models.matching import count_items
from training.data.prefetch import Prefetcher
from training.detection.read import DetectionRows
from training.images.augment import jitter_colours, rectangles
from training.run.arguments import bounded, check_bounds
from training.run.seeds import generator

STREAMS = {"scale": 1, "image": 2, "noise": 3}  # a number for each kind of draw
NUM_CROPS = 8  # the first of these with a box in it is taken
CROP_RATIO = 3 / 4  # smallest width / height of a crop, as a multiple of the image's


@dataclass(kw_only=True)
class DetectionTransform:
    """Resizes images and changes them at random; with the defaults, half of them are mirrored and nothing else changes.

    Args:
        mean, std: of each channel, as fractions of 255; the result is (pixels / 255 - mean) / std.
        shortest_edge, longest_edge: an image's shorter side gets `shortest_edge` pixels; if the longer side would then
            have more than `longest_edge`, it gets `longest_edge` (as the processor of stock DETR). None: images keep
            their size.
        scale_jitter: the shorter side is from (1 - scale_jitter) to 1 times `shortest_edge`, the same for all images of
            a step, so that little is padded; 0.4 gives the paper's 480 to 800.
        crop: probability of a random crop, which keeps part of an image's area and a width / height within 4/3 of its
            own. The crop is made before resizing, so that it enlarges objects. Boxes are cut at its border.
        crop_scale: smallest part of the area that a crop keeps.
        crop_visible: boxes of which a crop shows less than this part are left out. No crop leaves out all boxes.
        flip: probability of a mirror image.
        color_jitter: brightness, contrast and saturation, in this order, are each multiplied by 1 - x to 1 + x.
        pad_to: H and W are multiples of this.

    Raises:
        ValueError: an option is out of its range.
    """

    seed: int
    global_batch_size: int
    mean: list[float]
    std: list[float]
    shortest_edge: int | None = bounded(800, at_least=1)
    longest_edge: int | None = bounded(1333, at_least=1)
    scale_jitter: float = bounded(0.0, at_least=0, below=1)
    crop: float = bounded(0.0, at_least=0, at_most=1)
    crop_scale: float = bounded(0.3, above=0, at_most=1)
    crop_visible: float = bounded(0.25, at_least=0, at_most=1)
    flip: float = bounded(0.5, at_least=0, at_most=1)
    color_jitter: float = bounded(0.0, at_least=0, at_most=1)
    pad_to: int = bounded(1, at_least=1)

    def __post_init__(self):
        check_bounds(self)
        if self.shortest_edge and self.longest_edge and self.longest_edge < self.shortest_edge:
            raise ValueError(f"longest_edge must be at least shortest_edge, {self.shortest_edge}")
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean and std must be as many numbers, and std above 0: not {self.mean}, {self.std}")
        self._mean, self._std = (torch.tensor(values)[:, None, None] * 255 for values in (self.mean, self.std))

    def draw_scale(self, step: int) -> float:
        """Draws the factor of `shortest_edge` in this step."""
        uniform = generator(self.seed, step, STREAMS["scale"]).random()
        return 1 - self.scale_jitter * uniform

    def draw(self, step: int, position: int) -> np.ndarray:
        """Draws the uniform numbers for all other changes of an image.

        Their count is always the same, so that no option changes the numbers of another.
        """
        return generator(self.seed, step, position, STREAMS["image"]).random(5 + 4 * NUM_CROPS)

    def size(self, height: float, width: float, scale: float = 1.0) -> tuple[int, int]:
        """Height and width, at least one pixel each, to which an image or a part of one is resized."""
        if self.shortest_edge is None:
            return max(1, round(height * scale)), max(1, round(width * scale))
        short, long = min(height, width), max(height, width)
        edge = wanted = max(1, round(self.shortest_edge * scale))
        if self.longest_edge is not None and long / short * edge > self.longest_edge * scale:
            wanted = self.longest_edge * scale * short / long
            edge = round(wanted)
        other = max(1, int(long if edge == short else wanted * long / short))
        edge = max(1, edge)
        return (edge, other) if height <= width else (other, edge)

    def plan(self, rows: DetectionRows, index: int, uniforms: np.ndarray | None, scale: float = 1.0) -> "ImagePlan":
        """Plans the changes of an image; without random numbers it is only resized."""
        height, width = rows.sizes[index].tolist()
        corners, classes = rows.boxes(index), rows.classes(index)
        box, is_mirrored, colour = np.array([0.0, 0.0, 1.0, 1.0]), False, np.ones(3)
        if uniforms is not None:
            mirrors, crops, *colour = uniforms[:5]
            is_mirrored = bool(mirrors < self.flip)
            colour = 1 + self.color_jitter * (2 * np.array(colour) - 1)
            if crops < self.crop:
                for crop in self._crops(uniforms[5:].reshape(4, NUM_CROPS)):
                    cut, kept = self._cut(corners, crop)
                    if kept.any() or not len(corners):
                        box, corners, classes = crop, cut[kept], classes[kept]
                        break
        if is_mirrored:
            corners = corners.copy()
            corners[:, [0, 2]] = 1 - corners[:, [2, 0]]
        return ImagePlan(box, self.size(height * box[3], width * box[2], scale), is_mirrored, colour, corners, classes)

    def _crops(self, uniforms: np.ndarray) -> np.ndarray:
        """Left, top, width and height (NUM_CROPS, 4) of possible crops, as fractions."""
        return rectangles(uniforms, (self.crop_scale, 1), (CROP_RATIO, 1 / CROP_RATIO), 1.0).T

    def _cut(self, corners: np.ndarray, crop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts boxes at the border of a crop.

        Returns:
            The boxes (n, 4) as fractions of the crop, and which of them (n,) show enough to be kept.
        """
        inside = (corners - crop[[0, 1, 0, 1]]) / crop[[2, 3, 2, 3]]
        cut = inside.clip(0, 1)
        area, visible = ((box[:, 2:] - box[:, :2]).clip(0).prod(1) for box in (inside, cut))
        return cut, visible > np.maximum(self.crop_visible * area * (1 - 1e-9), 0)

    def load(
        self, rows: DetectionRows, indices: np.ndarray, uniforms: list[np.ndarray] | None, scale=1.0, smallest=(1, 1)
    ) -> tuple[np.ndarray, list["ImagePlan"], dict[str, Any]]:
        """Loads images into a batch.

        Args:
            uniforms: the random numbers of each image, from `draw`; None: images are only resized.
            scale: the factor of `shortest_edge`, from `draw_scale`.
            smallest: least height and width of the batch.

        Returns:
            The numbers of the images that were loaded, the plan of each, and the batch; see `DetectionBatches.batch`.
        """
        plans: list[ImagePlan] = [None] * len(indices)

        def view(position: int, index: int):
            plans[position] = self.plan(rows, index, None if uniforms is None else uniforms[position], scale)
            return plans[position].box, plans[position].size

        images, used = rows.load(indices, view)
        sizes = np.array([image.shape[1:] for image in images])
        height, width = (-(-np.maximum(sizes.max(0), smallest) // self.pad_to) * self.pad_to).tolist()
        pixels = torch.zeros(len(images), images[0].shape[0], height, width, dtype=torch.uint8)
        mask = torch.zeros(len(images), height, width, dtype=torch.bool)
        for number, (image, (h, w)) in enumerate(zip(images, sizes.tolist(), strict=True)):
            pixels[number, :, :h, :w] = image.flip(2) if plans[number].is_mirrored else image
            mask[number, :h, :w] = True
        names = [rows.source.name(index) for index in used.tolist()]
        labels = [plan.label() | {"image_id": name} for plan, name in zip(plans, names, strict=True)]
        return used, plans, {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}

    def normalize(self, pixels: Tensor, mask: Tensor, colour: Tensor | None = None) -> Tensor:
        """Normalises a batch, and changes its colours.

        Args:
            pixels: uint8 (B, C, H, W), 0 in the padding.
            mask: (B, H, W), False in the padding.
            colour: (B, 3), the factors of brightness, contrast and saturation.

        Returns:
            float32 (B, C, H, W), exactly 0 in the padding.
        """
        images = pixels.float()
        if colour is not None:
            images = jitter_colours(images, colour, mask.sum((1, 2), dtype=torch.int32)[:, None, None, None])
        if self._mean.device != pixels.device:
            self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return ((images - self._mean) / self._std).masked_fill(~mask[:, None], 0.0)


@dataclass
class ImagePlan:
    """The changes of an image, and its boxes after them."""

    box: np.ndarray  # the part that is cut out: left, top, width, height as fractions of the image
    size: tuple[int, int]  # height and width to which that part is resized
    is_mirrored: bool
    colour: np.ndarray  # factors of brightness, contrast and saturation
    corners: np.ndarray  # (n, 4), left, top, right, bottom as fractions of the part that was cut out
    classes: np.ndarray  # (n,)

    def label(self) -> dict[str, Tensor]:
        low, high = self.corners[:, :2], self.corners[:, 2:]
        boxes = np.concatenate([(low + high) / 2, high - low], axis=1)
        return {"class_labels": torch.from_numpy(self.classes), "boxes": torch.from_numpy(boxes).float()}


class DetectionBatches:
    """Training images as the loop asks for them, every epoch in a new order.

    Order and random numbers depend only on the seed and the position in the training.

    Args:
        max_steps: the number of steps; nothing is decoded ahead for later ones.
        config: the model's, which says what the loss counts and how many groups of noise it takes.
    """

    def __init__(self, rows: DetectionRows, transform: DetectionTransform, max_steps: int, config):
        self.rows, self.transform, self.max_steps, self.config = rows, transform, max_steps, config
        self.ahead = Prefetcher()

    def batch(self, step: int, positions: range) -> dict[str, Any]:
        """Loads the images at these positions of the global batch.

        Returns:
            pixel_values: uint8 (B, C, H, W), zero in the padding.
            pixel_mask: bool (B, H, W), False in the padding.
            labels: for each image class_labels (n,) int64; boxes (n, 4) float32, centre x and y, width and height as
                fractions of the image; image_id; and noise (G, n, 5) if the model denoises.
            colour: (B, 3), if colours are changed.
        """
        batch = self.ahead.take((step, positions), self._load, step, positions)
        if step + 1 < self.max_steps:
            self.ahead.begin((step + 1, positions), self._load, step + 1, positions)
        return batch

    def _load(self, step: int, positions: range) -> dict[str, Any]:
        rows, transform = self.rows, self.transform
        drawn = rows.global_batch(step, transform.global_batch_size, transform.seed)
        scale = transform.draw_scale(step)
        # The size comes from the images that are drawn, even if some of them turn out to be bad and are replaced.
        uniforms = [transform.draw(step, position) for position in range(len(drawn))]
        sizes = [
            transform.plan(rows, index, numbers, scale).size for index, numbers in zip(drawn, uniforms, strict=True)
        ]
        mine = drawn[positions.start : positions.stop]
        _, plans, batch = transform.load(
            rows, mine, uniforms[positions.start : positions.stop], scale, np.max(sizes, 0)
        )
        if self.config.num_denoising_groups:
            for position, label in zip(positions, batch["labels"], strict=True):
                shape = (self.config.num_denoising_groups, len(label["boxes"]), 5)
                random = generator(transform.seed, step, position, STREAMS["noise"])
                label["noise"] = torch.from_numpy(random.random(shape, dtype=np.float32))
        if transform.color_jitter:
            batch["colour"] = torch.from_numpy(np.stack([plan.colour for plan in plans])).float()
        return batch

    def augment(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turns a batch on the device into the model's inputs."""
        mask = batch["pixel_mask"]
        images = self.transform.normalize(batch["pixel_values"], mask, batch.get("colour"))
        return {"pixel_values": images, "pixel_mask": mask, "labels": batch["labels"]}

    def num_items(self, batch) -> dict[str, float]:
        return count_items(batch["labels"], self.config)

    def num_units(self, batch) -> int:
        return len(batch["pixel_values"])

    def external_files(self) -> dict:
        return {}


def evaluation_batches(
    rows: DetectionRows, transform: DetectionTransform, parts: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Loads images that are only resized, while the next batch is decoded in the background.

    Args:
        parts: for each batch the numbers of its images.

    Yields:
        The numbers of the images that were loaded, and the batch (see `DetectionBatches.batch`). A number that differs
        from the one asked for is that of an image that replaces a bad one; the caller leaves it out.
    """

    parts = list(parts)

    def load(number: int):
        used, _, batch = transform.load(rows, parts[number], None)
        return used, batch

    ahead = Prefetcher()
    for number in range(len(parts)):
        batch = ahead.take(number, load, number)
        if number + 1 < len(parts):
            ahead.begin(number + 1, load, number + 1)
        yield batch
