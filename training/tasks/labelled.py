"""Rows with labels: batches of them in the order of training, the measures over those that validate."""

import math
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.run.processes import on_main_process, take_turns
from training.run.seeds import generator, seed_from
from training.tasks.classification import Task
from training.text.tokens import IGNORED_LABEL

# What a model is given of a row, and what fills it up to the longest row of the batch; the tokenizer's padding token
# for input_ids. Numbers in place of arrays are not padded.
FILLERS = {"input_ids": None, "token_type_ids": 0, "labels": IGNORED_LABEL, "start_positions": 0, "end_positions": 0}


def collate(rows: list[dict], pad_token_id: int, length: int | None = None) -> dict[str, Tensor]:
    """The tensors of a batch (B, T): the rows on the left, padding on the right, and the mask that tells them apart.
    T is `length`, by default that of the longest row."""
    batch = {}
    for name in FILLERS:
        if name not in rows[0]:
            continue
        values = [torch.as_tensor(row[name]) for row in rows]
        if values[0].ndim == 0:
            batch[name] = torch.stack(values)
        else:
            filler = pad_token_id if name == "input_ids" else FILLERS[name]
            padded = pad_sequence([value.long() for value in values], True, filler)
            batch[name] = padded if length is None else F.pad(padded, (0, length - padded.shape[1]), value=filler)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


class LabelledRows:
    """The training rows: every epoch in a new order, a function of seed and epoch.

    Args:
        length: of a batch in tokens; None: that of its longest row.
        class_weights: how much each class counts.
    """

    def __init__(
        self,
        rows: list[dict],
        seed: int,
        global_batch_size: int,
        pad_token_id: int,
        length: int | None = None,
        class_weights: list[float] | None = None,
    ):
        self.rows = [{name: row[name] for name in row.keys() & FILLERS.keys()} for row in rows]
        self.seed, self.global_batch_size = seed, global_batch_size
        self.pad_token_id, self.length = pad_token_id, length
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.epoch, self.order = -1, None

    def row(self, sample: int) -> dict:
        epoch, place = divmod(sample, len(self.rows))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, generator(seed_from(self.seed, epoch)).permutation(len(self.rows))
        return self.rows[self.order[place]]

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        return collate(rows, self.pad_token_id, self.length)

    def batch(self, step, positions):
        first = step * self.global_batch_size
        return self.collate([self.row(first + position) for position in positions])

    def num_items(self, batch):
        """Labels, or the sum of their classes' weights; for question answering windows."""
        if "labels" not in batch:
            return len(batch["input_ids"])
        if batch["labels"].is_floating_point():
            return len(batch["labels"])  # -100 is a number like any other
        labels = batch["labels"][batch["labels"] != IGNORED_LABEL]
        return len(labels) if self.class_weights is None else float(self.class_weights[labels].sum())

    def num_units(self, batch):
        return len(batch["input_ids"])

    def external_files(self):
        return {}


class Validation:
    """The task's measures over the whole validation part, and a few answers to read."""

    def __init__(self, accelerator, task: Task, rows: list[dict], data: LabelledRows, batch_size: int):
        self.accelerator, self.task, self.rows, self.data = accelerator, task, rows, data
        self.batch_size = batch_size
        self.order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))  # little padding

    @torch.no_grad()
    def measure(self, model) -> dict[str, Any]:
        """Every process takes every n-th batch; the measures are computed once, over all rows together."""
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
        """The measures, from the loss, its normaliser, the rows and the predictions of every batch."""
        losses, num_items, numbers, predictions = zip(*found, strict=True)
        predicted = dict(zip(chain(*numbers), chain(*predictions), strict=True))
        examples = self.task.validation
        answers = self.task.answers(examples, self.rows, [predicted[number] for number in range(len(self.rows))])
        measures = {"loss": math.fsum(losses) / (sum(num_items) or 1), **self.task.measure(examples, answers)}
        sample = [self.task.show(example, answer) for example, answer in zip(examples, answers, strict=True)][:3]
        return {**{f"eval_{name}": value for name, value in measures.items()}, "sample": "\n".join(sample)}


def weigh_classes(spelled: str | None, label_names: list[str], rows: list[dict]) -> list[float] | None:
    """How much each class counts, from numbers like "1,4"; "balanced": in inverse proportion to its share of the
    labels, so that the labels count 1 on average. A class without a label counts 1 too."""
    if spelled is None:
        return None
    if spelled != "balanced":
        try:
            weights = [float(weight) for weight in spelled.split(",")]
        except ValueError:
            weights = []
        if len(weights) != len(label_names) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"class_weights must be 'balanced' or {len(label_names)} positive numbers, for "
                f"{', '.join(label_names)}; not {spelled!r}"
            )
        return weights
    labels = np.concatenate([np.atleast_1d(row["labels"]) for row in rows])
    counts = np.bincount(labels[labels != IGNORED_LABEL], minlength=len(label_names))
    is_there = counts > 0
    return np.where(is_there, counts.sum() / (is_there.sum() * counts.clip(min=1)), 1.0).tolist()
