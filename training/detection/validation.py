"""The measures of a DETR on held-out images, during the training and in more detail at its end."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from PIL import Image
from torch import Tensor

from hf_models import ZooDetrForObjectDetection
from hf_models.matching import count_items
from training import figures
from training.detection.batches import DetectionTransform, evaluation_batches
from training.detection.pictures import decoder_attention, keep, pixels_of, stack_slots
from training.detection.read import DetectionRows
from training.images.validation import whole_copy
from training.metrics import CocoDetection, load_metric
from training.processors import create_detection_processor
from training.run.processes import on_main_process, take_turns

NUM_DRAWN = 6  # images


class DetectionValidation:
    """Measures loss and COCO's average precision over the held-out images, and at the end the precision of each class.

    Only images that are resized to the same size share a batch, so that none is padded. With padding, what a
    convolution sees at the border of an image would depend on the batch, and a pipeline would find other boxes.

    Args:
        transform: that of the training, whose sizes and normalisation are used.
        config: the model's.
        batch_size: the most images of a batch.

    `processor` is the image processor that belongs to the model.
    """

    latest: dict[str, Any] | None = None  # the last results of `measure` in this process

    def __init__(
        self,
        accelerator: Accelerator,
        rows: DetectionRows,
        label_names: list[str],
        transform: DetectionTransform,
        config,
        batch_size: int,
    ):
        if not rows.count_boxes():
            raise ValueError("no image to validate on has a box: raise validation_fraction or give validation_data")
        self.accelerator, self.rows, self.label_names = accelerator, rows, label_names
        self.transform, self.batch_size = replace(transform, pad_to=1), batch_size
        self.processor = create_detection_processor(
            transform.shortest_edge, transform.longest_edge, transform.mean, transform.std
        )
        self.num_items = count_items([{"class_labels": rows.classes(index)} for index in range(len(rows))], config)

    def parts(self) -> list[np.ndarray]:
        """The numbers of the images in batches: at most `batch_size` images of one size."""
        sizes = np.array([self.transform.size(*size) for size in self.rows.sizes.tolist()])
        kinds = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
        alike = [np.flatnonzero(kinds == kind) for kind in range(kinds.max() + 1)]
        size = self.batch_size
        return [indices[first : first + size] for indices in alike for first in range(0, len(indices), size)]

    def batches(self) -> Iterator[tuple[np.ndarray, Tensor, list[dict], bool]]:
        """Yields for each batch of this process its images' numbers, their normalised pixels and labels on the device,
        and whether it counts (see `take_turns`). Bad images are left out."""
        mine = list(take_turns(self.accelerator, self.parts()))
        loaded = evaluation_batches(self.rows, self.transform, [part for part, _ in mine])
        for (part, counts), (used, batch) in zip(mine, loaded, strict=True):
            sound = np.flatnonzero(used == part)
            if not len(sound):  # all are bad: the images that replace them are run but do not count
                sound, counts = np.arange(len(part)), False
            height, width = self.transform.size(*self.rows.sizes[part[0]].tolist())
            pixels, mask = (batch[name][sound, ..., :height, :width] for name in ("pixel_values", "pixel_mask"))
            inputs = pixels, mask, [batch["labels"][position] for position in sound]
            pixels, mask, labels = send_to_device(inputs, self.accelerator.device)
            yield part[sound], self.transform.normalize(pixels, mask), labels, counts

    def measure(self, model) -> dict[str, Any]:
        """Computes `eval_loss` and COCO's measures (`eval_map`, `eval_map_50`, ...) of all sizes that have boxes."""
        self.latest = self.results(model)
        return {
            f"eval_{name}": value
            for name, value in self.latest.items()
            if isinstance(value, float) and value != -1  # -1: there is no box of this size
        }

    @torch.no_grad()
    def results(self, model) -> dict[str, Any]:
        """Computes the loss, all measures of `CocoDetection`, and `found`.

        `found` has for the number of each image the answers `scores` (Q,), `labels` (Q,) and `boxes` (Q, 4), left, top,
        right and bottom as fractions of the image.
        """
        losses, found = [], []
        for indices, pixel_values, labels, counts in self.batches():
            outputs = model(pixel_values, labels=labels, num_items_in_batch=self.num_items)
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            if counts:
                losses.append(float(outputs.loss))
                answers = self.processor.post_process_object_detection(outputs, threshold=-1)  # all of them
                answers = [{name: values.cpu().numpy() for name, values in answer.items()} for answer in answers]
                found += zip(indices.tolist(), answers, strict=True)
        loss, found = math.fsum(gather_object(losses)), dict(sorted(gather_object(found)))
        return {"loss": loss, **on_main_process(self.accelerator, lambda: self.score(found)), "found": found}

    def score(self, found: dict[int, dict]) -> dict[str, float | list]:
        """Computes COCO's measures of the answers for each image."""
        metric = load_metric(CocoDetection)
        for index, answer in found.items():
            height, width = self.rows.sizes[index]
            truth = self.rows.truth(index)
            metric.add(
                image_ids=index,
                boxes=answer["boxes"] * [width, height, width, height],
                scores=answer["scores"],
                labels=answer["labels"],
                true_boxes=truth["boxes"],
                true_labels=truth["labels"],
                true_areas=truth["areas"],
                crowd=truth["iscrowd"],
            )
        return metric.compute(num_labels=len(self.label_names))

    def look_closer(self, model, results: dict[str, Any]) -> tuple[dict[str, Any], dict]:
        """Computes the average precision of each class, and draws the run's pictures on the main process.

        results: what `measure` returned for this model.
        """
        is_latest = self.latest is not None and self.latest["loss"] == results["eval_loss"]
        latest = self.latest if is_latest else self.results(model)
        measured = dict(zip(self.label_names, latest["per_class_map"], strict=True))
        measured = {name: None if precision == -1 else precision for name, precision in measured.items()}
        whole = whole_copy(self.accelerator, model, ZooDetrForObjectDetection)
        pictures = {} if whole is None else self.pictures(whole, latest["found"])
        return {"eval_per_class_map": measured}, pictures

    def pictures(self, model: ZooDetrForObjectDetection, found: dict[int, dict]) -> dict[str, Any]:
        """Draws boxes found and true, where each query looks, and what the decoder looks at for each box.

        Returns:
            The pictures, and an image to try the model with, by the name of their file.
        """
        indices = list(found)[:NUM_DRAWN]
        images = self.images(indices)
        true = [{"boxes": self.rows.boxes(index), "labels": self.rows.classes(index)} for index in indices]
        pixels = [pixels_of(image) for image in images]
        shown = [keep(found[index], 0.5) for index in indices]
        example = next(
            (image for image, objects in zip(images, true, strict=True) if len(objects["labels"])), images[0]
        )
        slots = stack_slots([answer["boxes"] for answer in found.values()])
        return {
            "detections.png": figures.detections(pixels, shown, self.label_names, true),
            "query_slots.png": figures.query_slots(slots),
            "decoder_attention.png": decoder_attention(model, self.processor, example),
            "example.png": example,
        }

    def images(self, indices: list[int]) -> list[Image.Image]:
        """Loads these images in their own size."""
        sizes = self.rows.sizes.tolist()
        loaded, _ = self.rows.load(np.array(indices), lambda _, index: ((0, 0, 1, 1), sizes[index]))
        return [Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()) for pixels in loaded]
