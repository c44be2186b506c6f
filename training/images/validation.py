"""The measures of an image model on held-out images, during the training and in more detail at its end."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_models import ZooViTMAEForPreTraining
from training.figures import confusion_matrix
from training.images.augment import Augmentation
from training.images.features import features, knn_accuracy, linear_probe_accuracy
from training.images.pictures import reconstructions
from training.images.rows import ImageRows
from training.metrics import ImageClassification, load_metric
from training.run.checkpoint import gather_training_state
from training.run.processes import take_turns


class ImageValidation:
    """The held-out images in batches that are shared among the processes.

    Args:
        augmentation: that of the training, whose size and normalisation are used.
        batch_size: images of a batch.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: ImageRows,
        label_names: list[str],
        augmentation: Augmentation,
        batch_size: int,
    ):
        if not len(rows):
            raise ValueError("there is no image to validate on: raise validation_fraction or give validation_data")
        self.accelerator, self.rows, self.label_names = accelerator, rows, label_names
        self.augmentation, self.batch_size = augmentation, batch_size
        self.size = (augmentation.height, augmentation.width)

    def batches(self) -> Iterator[tuple[np.ndarray, Tensor, bool]]:
        """Yields for each batch of this process its images' numbers, their normalised pixels on the device, and
        whether it counts (see `take_turns`)."""
        indices = np.arange(len(self.rows))
        batches = [indices[first : first + self.batch_size] for first in range(0, len(indices), self.batch_size)]
        mine = list(take_turns(self.accelerator, batches))
        for number, (chosen, counts) in enumerate(mine):
            pixels = self.rows.images(chosen, size=self.size).to(self.accelerator.device)
            for upcoming, _ in mine[number + 1 : number + 2]:
                self.rows.prefetch(upcoming, size=self.size)
            yield chosen, self.augmentation.normalize(pixels), counts

    def pixels(self, count: int) -> Tensor:
        """The first `count` images, (B, C, H, W) uint8, as the model sees them."""
        return self.rows.images(np.arange(min(count, len(self.rows))), size=self.size)

    def example(self) -> Image.Image:
        """An image to try the model with."""
        return Image.fromarray(self.pixels(1)[0].permute(1, 2, 0).squeeze(2).numpy())


class ClassValidation(ImageValidation):
    """Measures loss and accuracies, and at the end the accuracy of each class."""

    latest: dict[str, Any] | None = None  # the last results of `measure` in this process

    def measure(self, model) -> dict[str, Any]:
        self.latest = self.results(model)
        return {f"eval_{name}": self.latest[name] for name in ("loss", "accuracy", "top5_accuracy")}

    @torch.no_grad()
    def results(self, model) -> dict[str, Any]:
        """Computes all measures of `ImageClassification`."""
        found = []
        for indices, pixel_values, counts in self.batches():
            logits = model(pixel_values).logits.float()
            labels = torch.from_numpy(self.rows.labels[indices]).to(logits.device)
            losses = F.cross_entropy(logits, labels, reduction="none")
            ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
            if counts:
                found.append([column.tolist() for column in (labels, logits.argmax(1), ranks, losses)])
        metric = load_metric(ImageClassification)
        for labels, predictions, ranks, losses in gather_object(found):
            metric.add_batch(references=labels, predictions=predictions, ranks=ranks, losses=losses)
        return metric.compute(num_labels=len(self.label_names))

    def look_closer(self, model, results: dict[str, Any]) -> tuple[dict[str, Any], dict]:
        """Computes each class's accuracy and draws the run's pictures.

        results: what `measure` returned for this model.
        """
        is_latest = self.latest is not None and self.latest["loss"] == results["eval_loss"]
        latest = self.latest if is_latest else self.results(model)
        measured = dict(zip(self.label_names, latest["per_class_accuracy"], strict=True))
        measured = {name: None if math.isnan(accuracy) else accuracy for name, accuracy in measured.items()}
        confusion = confusion_matrix(latest["confusion_matrix"], self.label_names)
        pictures = {"confusion_matrix.png": confusion, "example.png": self.example()}
        return {"eval_per_class_accuracy": measured}, pictures


class ReconstructionValidation(ImageValidation):
    """Measures the loss of a masked autoencoder; at the end also its features, and draws reconstructions.

    Each image is masked in the same way every time.

    Args:
        num_masked, num_patches: masked and all patches of each image.
        labelled: training images with labels to measure the features with; None: features are not measured.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: ImageRows,
        label_names: list[str],
        augmentation: Augmentation,
        batch_size: int,
        num_masked: int,
        num_patches: int,
        labelled: ImageRows | None,
    ):
        super().__init__(accelerator, rows, label_names, augmentation, batch_size)
        noise = np.random.default_rng(0).random((len(rows), num_patches), dtype=np.float32)
        self.noise, self.num_masked, self.labelled = torch.from_numpy(noise), num_masked, labelled

    @torch.no_grad()
    def measure(self, model) -> dict[str, Any]:
        sums = []
        for indices, pixel_values, counts in self.batches():
            noise = self.noise[indices].to(pixel_values.device)
            loss = float(model(pixel_values, noise=noise, num_items_in_batch=1).loss)
            sums += [loss] if counts else []
        return {"eval_loss": math.fsum(gather_object(sums)) / (len(self.rows) * self.num_masked)}

    def look_closer(self, model, results: dict[str, Any]) -> tuple[dict[str, Any], dict]:
        """Measures nearest neighbours and a linear classifier on the encoder's features, and draws the run's pictures.

        The main process does this, with a whole copy of the model in float32.
        """
        whole = whole_copy(self.accelerator, model, ZooViTMAEForPreTraining)
        if whole is None:
            return {}, {}
        measured, changes = {}, self.augmentation
        if self.labelled is not None:
            found = []
            for rows in (self.labelled, self.rows):
                found += [features(whole, rows, changes.normalize, self.size, None, self.batch_size), rows.labels]
            measured = {
                "eval_knn_accuracy": knn_accuracy(*found),
                "eval_linear_probe_accuracy": linear_probe_accuracy(*found),
            }
        drawn = self.pixels(8)
        pixel_values = changes.normalize(drawn.to(self.accelerator.device)).cpu()
        picture = reconstructions(whole, pixel_values, self.noise[: len(drawn)], changes.mean, changes.std)
        return measured, {"reconstructions.png": picture, "example.png": self.example()}


def whole_copy(
    accelerator: Accelerator, model: nn.Module, model_class: type[PreTrainedModel]
) -> PreTrainedModel | None:
    """Copies a model that may be split over processes. Every process calls this.

    Returns:
        On the main process the whole model in float32, on the others None.
    """
    tensors, _ = gather_training_state(model, [])
    if not accelerator.is_main_process:
        return None
    whole = model_class(accelerator.unwrap_model(model, keep_torch_compile=False).config)
    whole.load_state_dict(tensors["model"])
    return whole.to(accelerator.device).eval()


def finish_measuring(
    accelerator: Accelerator, validation, model: nn.Module, results: dict[str, Any], train_rows
) -> tuple[dict[str, Any], dict]:
    """Looks closer at the trained model, and prints what that finds and which images were converted or skipped.

    Args:
        validation: of images or of boxes, with the held-out `rows`.
        results: what was measured during the training.
        train_rows: the images that were trained on.

    Returns:
        All that was measured, and pictures by the names of their files.
    """
    measured, pictures = validation.look_closer(model, results)
    found = [f"{name} {value:.4f}" for name, value in measured.items() if isinstance(value, float)]
    reports = [line for rows in (train_rows, validation.rows) for line in rows.report(gather_object)]
    accelerator.print("\n".join([*reports, *found]))
    return {**results, **measured}, pictures
