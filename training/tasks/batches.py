"""Batches of labelled rows in the order of the training.

B rows of a batch, T tokens of its longest row
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.run.seeds import generator, seed_from
from training.text.tokens import IGNORED_LABEL

# The parts of a row that a model is given, and what each is padded with; input_ids are padded with the tokenizer's
# padding token, and single numbers are not padded.
FILLERS = {"input_ids": None, "token_type_ids": 0, "labels": IGNORED_LABEL, "start_positions": 0, "end_positions": 0}


def collate(rows: list[dict], pad_token_id: int, length: int | None = None) -> dict[str, Tensor]:
    """Pads rows on the right and stacks them to tensors (B, T), with the `attention_mask` of what is no padding.

    Args:
        length: T; None: the length of the longest row.
    """
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


class TaskBatches:
    """Training rows as the loop asks for them. Every epoch has a new order, which depends on seed and epoch only.

    Args:
        length: the length of every batch in tokens; None: the length of its longest row.
        class_weights: how much each class counts in the loss; None: all the same.
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
        epoch, index = divmod(sample, len(self.rows))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, generator(seed_from(self.seed, epoch)).permutation(len(self.rows))
        return self.rows[self.order[index]]

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        return collate(rows, self.pad_token_id, self.length)

    def batch(self, step, positions):
        first = step * self.global_batch_size
        return self.collate([self.row(first + position) for position in positions])

    def num_items(self, batch):
        """Counts what the loss is divided by: labels, or the weights of their classes, or windows of questions."""
        if "labels" not in batch:
            return len(batch["input_ids"])
        if batch["labels"].is_floating_point():
            return len(batch["labels"])  # of a regression, where -100 is a number like any other
        labels = batch["labels"][batch["labels"] != IGNORED_LABEL]
        return len(labels) if self.class_weights is None else float(self.class_weights[labels].sum())

    def num_units(self, batch):
        return len(batch["input_ids"])

    def external_files(self):
        return {}


def weigh_classes(spelled: str | None, label_names: list[str], rows: list[dict]) -> list[float] | None:
    """Reads how much each class counts.

    Args:
        spelled: numbers like "1,4"; or "balanced": each class counts in inverse proportion to its share of the labels,
            so that a label counts 1 on average, and a class without a label counts 1.

    Raises:
        ValueError: `spelled` is neither "balanced" nor one positive number for each class.
    """
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
