"""What is measured of a DETR on images held out, as it trains and, more closely, at the end."""

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
from training.models import create_detection_processor
from training.run.processes import on_main_process, take_turns

NUM_DRAWN = 6  # images


class DetectionValidation:
    """Loss and COCO's average precision over the held-out images, and at the end those of each class.

    Only images that are resized to the same size share a batch, so that none is padded: what a convolution sees at the
    border of an image, and so the boxes found, would else depend on the batch. A pipeline finds the same ones.

    Args:
        transform: of the training images, of which only the sizes and the normalisation count here.
        config: the model's.
        batch_size: the most images of a batch.

    `processor` is the image processor that belongs to the model.
    """

    latest: dict[str, Any] | None = None  # what `measure` found last, in this process

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
        self.num_items = count_items([{"class_labels": rows.classes(place)} for place in range(len(rows))], config)

    def parts(self) -> list[np.ndarray]:
        """The places of the images, those of one size and at most `batch_size` of them together."""
        sizes = np.array([self.transform.size(*size) for size in self.rows.sizes.tolist()])
        kinds = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
        alike = [np.flatnonzero(kinds == kind) for kind in range(kinds.max() + 1)]
        size = self.batch_size
        return [places[first : first + size] for places in alike for first in range(0, len(places), size)]

    def batches(self) -> Iterator[tuple[np.ndarray, Tensor, list[dict], bool]]:
        """For each batch of this process: its images' places, their normalised pixels and their labels on the device,
        and whether it counts (see `take_turns`). Bad images are left out."""
        mine = list(take_turns(self.accelerator, self.parts()))
        loaded = evaluation_batches(self.rows, self.transform, [part for part, _ in mine])
        for (part, counts), (used, batch) in zip(mine, loaded, strict=True):
            sound = np.flatnonzero(used == part)
            if not len(sound):  # others are in their place: they run and do not count
                sound, counts = np.arange(len(part)), False
            height, width = self.transform.size(*self.rows.sizes[part[0]].tolist())
            pixels, mask = (batch[name][sound, ..., :height, :width] for name in ("pixel_values", "pixel_mask"))
            inputs = pixels, mask, [batch["labels"][place] for place in sound]
            pixels, mask, labels = send_to_device(inputs, self.accelerator.device)
            yield part[sound], self.transform.normalize(pixels, mask), labels, counts

    def measure(self, model) -> dict[str, Any]:
        """`eval_loss` and COCO's measures, of those that there are boxes for: `eval_map`, `eval_map_50`, ..."""
        self.latest = self.results(model)
        return {
            f"eval_{name}": value
            for name, value in self.latest.items()
            if isinstance(value, float) and value != -1  # of no box of this size
        }

    @torch.no_grad()
    def results(self, model) -> dict[str, Any]:
        """The loss, everything that `CocoDetection` computes, and `found`: by place what was found in each image,
        `scores` (Q,), `labels` (Q,) and `boxes` (Q, 4), left, top, right and bottom as parts of the image."""
        losses, found = [], []
        for places, pixel_values, labels, counts in self.batches():
            outputs = model(pixel_values, labels=labels, num_items_in_batch=self.num_items)
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            if counts:
                losses.append(float(outputs.loss))
                answers = self.processor.post_process_object_detection(outputs, threshold=-1)  # all of them
                answers = [{name: values.cpu().numpy() for name, values in answer.items()} for answer in answers]
                found += zip(places.tolist(), answers, strict=True)
        loss, found = math.fsum(gather_object(losses)), dict(sorted(gather_object(found)))
        return {"loss": loss, **on_main_process(self.accelerator, lambda: self.score(found)), "found": found}

    def score(self, found: dict[int, dict]) -> dict[str, float | list]:
        """COCO's measures of what was found in each image."""
        metric = load_metric(CocoDetection)
        for place, answer in found.items():
            height, width = self.rows.sizes[place]
            truth = self.rows.truth(place)
            metric.add(
                image_ids=place,
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
        """The average precision of each class, and the run's pictures, on the main process. results: what `measure`
        found of this model."""
        is_latest = self.latest is not None and self.latest["loss"] == results["eval_loss"]
        latest = self.latest if is_latest else self.results(model)
        measured = dict(zip(self.label_names, latest["per_class_map"], strict=True))
        measured = {name: None if precision == -1 else precision for name, precision in measured.items()}
        whole = whole_copy(self.accelerator, model, ZooDetrForObjectDetection)
        pictures = {} if whole is None else self.pictures(whole, latest["found"])
        return {"eval_per_class_map": measured}, pictures

    def pictures(self, model: ZooDetrForObjectDetection, found: dict[int, dict]) -> dict[str, Any]:
        """By the name of the file: what is found beside what is true, where each query looks, what a decoder looks at
        for each box, and an image to try the model with."""
        places = list(found)[:NUM_DRAWN]
        images = self.images(places)
        true = [{"boxes": self.rows.boxes(place), "labels": self.rows.classes(place)} for place in places]
        pixels = [pixels_of(image) for image in images]
        shown = [keep(found[place], 0.5) for place in places]
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

    def images(self, places: list[int]) -> list[Image.Image]:
        """These images in their own size."""
        sizes = self.rows.sizes.tolist()
        loaded, _ = self.rows.load(np.array(places), lambda _, index: ((0, 0, 1, 1), sizes[index]))
        return [Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()) for pixels in loaded]
