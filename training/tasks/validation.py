"""The measures of a fine-tuned model over the whole validation part, and a few answers to read."""

import math
from itertools import chain
from typing import Any

import torch
from accelerate.utils import gather_object

from training.run.processes import on_main_process, take_turns
from training.tasks.batches import TaskBatches
from training.tasks.task import Task


class TaskValidation:
    """Measures a model on the validation part of a task.

    Args:
        rows: the rows of `task.validation`.
        data: the training batches, which pad and count rows in the same way.
        batch_size: rows of a batch.
    """

    def __init__(self, accelerator, task: Task, rows: list[dict], data: TaskBatches, batch_size: int):
        self.accelerator, self.task, self.rows, self.data = accelerator, task, rows, data
        self.batch_size = batch_size
        self.order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))  # little padding

    @torch.no_grad()
    def measure(self, model) -> dict[str, Any]:
        """Computes the loss and the task's measures over all rows, with batches shared among the processes."""
        device, size = self.accelerator.device, self.batch_size
        batches = (self.order[first : first + size] for first in range(0, len(self.order), size))
        found = []
        for numbers, counts in take_turns(self.accelerator, batches):
            batch = self.data.collate([self.rows[number] for number in numbers])
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            outputs = model(**inputs, num_items_in_batch=1)
            if counts:
                predictions = self.task.predictions(outputs, batch)
                found.append((float(outputs.loss), self.data.num_items(batch), numbers, predictions))
        found = gather_object(found)
        return on_main_process(self.accelerator, lambda: self.results(found))

    def results(self, found: list[tuple]) -> dict[str, Any]:
        """Computes the measures from what every batch gave: its loss, its normaliser, its rows and predictions."""
        losses, num_items, numbers, predictions = zip(*found, strict=True)
        predicted = dict(zip(chain(*numbers), chain(*predictions), strict=True))
        examples = self.task.validation
        answers = self.task.answers(examples, self.rows, [predicted[number] for number in range(len(self.rows))])
        measures = {"loss": math.fsum(losses) / (sum(num_items) or 1), **self.task.measure(examples, answers)}
        sample = [self.task.show(example, answer) for example, answer in zip(examples, answers, strict=True)][:3]
        return {**{f"eval_{name}": value for name, value in measures.items()}, "sample": "\n".join(sample)}
