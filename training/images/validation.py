"""What is measured of a model of images on those held out, as it trains and, more closely, at the end."""

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
    """The held-out images in batches, of which every process takes every n-th."""

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
        """For each batch of this process: its images' places, their normalised pixels on the device, and whether it
        counts (see `take_turns`)."""
        places = np.arange(len(self.rows))
        batches = [places[first : first + self.batch_size] for first in range(0, len(places), self.batch_size)]
        mine = list(take_turns(self.accelerator, batches))
        for number, (chosen, counts) in enumerate(mine):
            pixels = self.rows.images(chosen, size=self.size).to(self.accelerator.device)
            for upcoming, _ in mine[number + 1 : number + 2]:
                self.rows.prefetch(upcoming, size=self.size)
            yield chosen, self.augmentation.normalize(pixels), counts

    def pixels(self, count: int) -> Tensor:
        """The first of them, (B, C, H, W) uint8, as the model sees them."""
        return self.rows.images(np.arange(min(count, len(self.rows))), size=self.size)

    def example(self) -> Image.Image:
        """One to try the model with."""
        return Image.fromarray(self.pixels(1)[0].permute(1, 2, 0).squeeze(2).numpy())


class ClassValidation(ImageValidation):
    """Loss and accuracies, and at the end those of each class."""

    latest: dict[str, Any] | None = None  # what `measure` found last, in this process

    def measure(self, model) -> dict[str, Any]:
        self.latest = self.results(model)
        return {f"eval_{name}": self.latest[name] for name in ("loss", "accuracy", "top5_accuracy")}

    @torch.no_grad()
    def results(self, model) -> dict[str, Any]:
        """Everything that `ImageClassification` computes."""
        found = []
        for places, pixel_values, counts in self.batches():
            logits = model(pixel_values).logits.float()
            labels = torch.from_numpy(self.rows.labels[places]).to(logits.device)
            losses = F.cross_entropy(logits, labels, reduction="none")
            ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
            if counts:
                found.append([column.tolist() for column in (labels, logits.argmax(1), ranks, losses)])
        metric = load_metric(ImageClassification)
        for labels, predictions, ranks, losses in gather_object(found):
            metric.add_batch(references=labels, predictions=predictions, ranks=ranks, losses=losses)
        return metric.compute(num_labels=len(self.label_names))

    def look_closer(self, model, results: dict[str, Any]) -> tuple[dict[str, Any], dict]:
        """Each class's accuracy, and the run's pictures. results: what `measure` found of this model."""
        is_latest = self.latest is not None and self.latest["loss"] == results["eval_loss"]
        latest = self.latest if is_latest else self.results(model)
        measured = dict(zip(self.label_names, latest["per_class_accuracy"], strict=True))
        measured = {name: None if math.isnan(accuracy) else accuracy for name, accuracy in measured.items()}
        confusion = confusion_matrix(latest["confusion_matrix"], self.label_names)
        pictures = {"confusion_matrix.png": confusion, "example.png": self.example()}
        return {"eval_per_class_accuracy": measured}, pictures


class ReconstructionValidation(ImageValidation):
    """The loss of a masked autoencoder, each image masked in the same way every time; at the end what its features are
    good for, and reconstructions.

    Args:
        num_masked, num_patches: of each image.
        labelled: training images whose labels may be used for that; None: there are none.
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
        for places, pixel_values, counts in self.batches():
            noise = self.noise[places].to(pixel_values.device)
            loss = float(model(pixel_values, noise=noise, num_items_in_batch=1).loss)
            sums += [loss] if counts else []
        return {"eval_loss": math.fsum(gather_object(sums)) / (len(self.rows) * self.num_masked)}

    def look_closer(self, model, results: dict[str, Any]) -> tuple[dict[str, Any], dict]:
        """Accuracies of the nearest neighbours and of a linear classifier by the encoder's features, and the run's
        pictures; on the main process, which gets a model of its own for that, whole and in float32."""
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
    """A model of the main process's own, not split and in float32, with this one's weights; None on the others. Every
    process calls it."""
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
