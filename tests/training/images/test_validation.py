from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training.images import validation as image_validation
from training.images.augment import Augmentation
from training.images.rows import ArrayRows
from training.images.validation import ClassValidation


class Reader(torch.nn.Module):
    """Tells the class that is written into the first pixel, and gets every fourth wrong."""

    def forward(self, pixel_values):
        classes = (pixel_values[:, 0, 0, 0] * 255).round().long()
        wrong = classes % 4 == 3
        return SimpleNamespace(logits=torch.eye(8)[classes - wrong.long()] * 5)


@pytest.mark.parametrize("num_processes", [1, 3])
def test_every_image_is_measured_once_whatever_the_batches_and_processes(num_processes, monkeypatch):
    labels = np.arange(40) % 8
    pixels = np.broadcast_to(labels[:, None, None, None], (40, 1, 4, 4)).astype(np.uint8)
    rows = ArrayRows(pixels, labels, num_channels=1)
    augmentation = Augmentation(seed=1, global_batch_size=8, image_size=4, mean=[0.0], std=[1.0])
    found = []
    monkeypatch.setattr(image_validation, "gather_object", lambda mine: found.extend(mine) or found)
    for rank in range(num_processes):  # the last one sees what all of them found
        accelerator = SimpleNamespace(process_index=rank, num_processes=num_processes, device=torch.device("cpu"))
        validation = ClassValidation(accelerator, rows, [*"abcdefgh"], augmentation, batch_size=9)
        results = validation.measure(Reader())
    assert results["eval_accuracy"] == 0.75 and results["eval_top5_accuracy"] == 1
    measured, pictures = validation.look_closer(None, results)
    assert measured["eval_per_class_accuracy"] == {**dict.fromkeys("abcefg", 1.0), "d": 0.0, "h": 0.0}
    assert set(pictures) == {"confusion_matrix.png", "example.png"}
