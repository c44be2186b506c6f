"""What every task of fine-tuning is made of, and the three that classify: texts, pairs of texts, tagged words.

rows = task.rows(task.train, tokenizer, max_length=128)  # {"input_ids": (T,), ..., "labels": ...} each
batch = collate(rows[:8], tokenizer.pad_token_id)  # tensors, padded to the longest row
predictions = task.predictions(model(**batch), batch)
answers = task.answers(task.train[:8], rows[:8], predictions)
task.measure(task.train[:8], answers)  # {"accuracy": ..., "f1": ...}
"""

import json
import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from training.data.documents import Corpus, Documents
from training.data.fingerprints import digest_of, fingerprint_of
from training.data.holdout import hold_out, key_of
from training.data.tables import Table
from training.metrics import Classification, Entities, Regression, entities, load_metric
from training.text.tokens import IGNORED_LABEL


class Columns(NamedTuple):
    """The names of the columns of a task, whatever they are called in its data."""

    text: str
    pair: str | None
    label: str


def chunks(examples: list, size: int = 1000) -> Iterator[list]:
    for first in range(0, len(examples), size):
        yield examples[first : first + size]


def token_arrays(encodings, number: int) -> dict[str, np.ndarray]:
    """Row `number` of what a tokenizer returned."""
    names = [name for name in ("input_ids", "token_type_ids") if name in encodings]
    return {name: np.array(encodings[name][number], np.int32) for name in names}


class Task(ABC):
    """What a task is made of: its examples, the rows a model reads of them, and the measures of its answers.

    A child gives the abstract methods and the names below. An example is a dict of plain values, labels by name;
    `notes` collects what a user should know about the data.
    """

    head: str  # of the model: "SequenceClassification"
    pipeline: str  # the key of `snippets.USES`
    monitor: str  # the measure that decides which weights are best
    label_names: list[str] | None  # the name of each class id

    def __init__(
        self,
        train: Table,
        validation: Table | None,
        columns: Columns,
        *,
        source: str,
        label_names: list[str] | None = None,
        validation_fraction: float = 0.1,
    ):
        self.columns, self.source, self.license = columns, source, train.license
        self.notes: list[str] = []
        self.name_labels(train, label_names)
        self.train = self.examples(train)
        if validation is not None:
            self.validation = self.examples(validation, "validation")
        else:
            self.train, self.validation = split_examples(self.train, self.key, validation_fraction, train.parts[0][0])
        self.fingerprint = fingerprint_of(
            type(self).__name__, self.label_names, *(_digest(split) for split in (self.train, self.validation))
        )

    def name_labels(self, train: Table, given: list[str] | None):
        """Sets `label_names`, before the first example is read; a task without classes has none."""
        self.label_names = None

    @abstractmethod
    def examples(self, table: Table, split: str = "training") -> list[dict]:
        """The table's rows as examples; notes name the split. Raises ValueError naming the file and the row that
        cannot be one."""

    def key(self, example: dict) -> Any:
        """What two examples must not share if one of them is held out: their text."""
        return {name: value for name, value in example.items() if name not in ("label", "tags")}

    @abstractmethod
    def texts(self, example: dict) -> list[str]:
        """The texts of an example, to make a tokenizer from."""

    @abstractmethod
    def rows(self, examples: list[dict], tokenizer, max_length: int, split: str = "training") -> list[dict]:
        """What a model reads: token ids of at most `max_length`, and their labels, as arrays and numbers. Notes name
        the split."""

    @abstractmethod
    def predictions(self, outputs, batch: dict[str, Tensor]) -> list:
        """What is to be kept of a model's outputs, for each row of the batch, on the CPU."""

    @abstractmethod
    def answers(self, examples: list[dict], rows: list[dict], predictions: list) -> list:
        """One answer for each example, in the form of its label, from the predictions for all rows."""

    @abstractmethod
    def reference(self, example: dict):
        """The right answer."""

    @abstractmethod
    def measure(self, examples: list[dict], answers: list) -> dict[str, float]:
        """The task's measures of the answers, by name."""

    @abstractmethod
    def show(self, example: dict, answer) -> str:
        """An example and the answer to it, to be read by a person."""

    def name_classes(self, train: Table, labels: Iterable, given: list[str] | None):
        """Sets the classes in the order of their ids: as given, or as the data set names them, or else all labels in
        sorted order (whole numbers by size). Names that do not come from the labels may stand for their numbers."""
        labels = {_spell(label) for label in labels} - {None}
        if given is not None and (len(given) < 2 or len(set(given)) < len(given) or "" in given):
            raise ValueError(f"label_names must be several different names, not {','.join(given)!r}")
        names = given or train.class_names.get(self.columns.label)
        by_number = {str(number): name for number, name in enumerate(names or [])}
        if names is None:
            names = sorted(labels, key=int if all(name.removeprefix("-").isdecimal() for name in labels) else None)
        if len(names) < 2:
            raise ValueError(
                f"{train.parts[0][0]}: column {self.columns.label!r} needs several different labels, not {names}"
            )
        by_name = {name: name for name in names}
        if not by_number.keys() & by_name.keys():
            self.class_of = by_number | by_name
        else:  # names like "1", "2", "3": one reading for the whole column; a Hub data set holds numbers
            is_name = given is not None and self.columns.label not in train.class_names and labels <= by_name.keys()
            self.class_of = by_name if is_name else by_number
        self.label_names = names

    def class_name(self, label, where: str) -> str:
        """The class that a label means, by its name or number."""
        if (name := _spell(label)) in self.class_of:
            return self.class_of[name]
        shown = ", ".join(self.label_names[:20]) + (", ..." if len(self.label_names) > 20 else "")
        raise ValueError(f"{where}: label {label!r} is none of the {len(self.label_names)} classes: {shown}")

    def corpus(self) -> Corpus:
        """All texts of the task, to make a tokenizer from."""

        def documents(examples: list[dict]) -> Documents:
            return Documents.of(lambda: (text for example in examples for text in self.texts(example)))

        return Corpus(documents(self.train), documents(self.validation), self.fingerprint, self.source, self.license)

    def note(self, count: int, of: list, what: str, split: str):
        if count:
            self.notes.append(f"{split}: {count} of {len(of)} {what}")


class TextTask(Task):
    """A text, or a pair of texts, and one of several classes."""

    head = "SequenceClassification"
    monitor = "eval_accuracy"

    @property
    def pipeline(self):
        return "text-pair-classification" if self.columns.pair else "text-classification"

    def name_labels(self, train, given):
        labels = enumerate(train.column(self.columns.label, "label_column"))
        self.name_classes(
            train, (as_label(label, self.columns.label, train.where(row)) for row, label in labels), given
        )

    def label(self, value, where: str) -> str | float:
        return self.class_name(value, where)

    def examples(self, table, split="training"):
        fields = {"text": text_column(table, self.columns.text, "text_column")}
        if self.columns.pair:
            fields["pair"] = text_column(table, self.columns.pair, "pair_column")
        labels = table.column(self.columns.label, "label_column")
        fields["label"] = [self.label(value, table.where(row)) for row, value in enumerate(labels)]
        return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]

    def texts(self, example):
        return [example[name] for name in ("text", "pair") if name in example]

    def rows(self, examples, tokenizer, max_length, split="training"):
        rows, num_cut = [], 0
        for chunk in chunks(examples):
            texts = ([example[name] for example in chunk] for name in ("text", "pair") if name in chunk[0])
            encodings = tokenizer(*texts, truncation=True, max_length=max_length)
            num_cut += sum(bool(encoding.overflowing) for encoding in encodings.encodings)
            for number, example in enumerate(chunk):
                rows.append({**token_arrays(encodings, number), "labels": self.target(example["label"])})
        self.note(sum(not any(self.texts(example)) for example in examples), examples, "texts are empty", split)
        self.note(num_cut, examples, f"texts were cut to {max_length} tokens", split)
        return rows

    def target(self, label):
        return self.label_names.index(label)

    def predictions(self, outputs, batch):
        return outputs.logits.argmax(-1).tolist()

    def answers(self, examples, rows, predictions):
        return [self.label_names[prediction] for prediction in predictions]

    def reference(self, example):
        return example["label"]

    def measure(self, examples, answers):
        ids = {name: number for number, name in enumerate(self.label_names)}
        return load_metric(Classification).compute(
            predictions=[ids[answer] for answer in answers],
            references=[ids[example["label"]] for example in examples],
            num_labels=len(ids),
        )

    def show(self, example, answer):
        texts = " | ".join(textwrap.shorten(text, 200) for text in self.texts(example))
        return f"{texts}\n  -> {answer} (labelled {example['label']})"


class RegressionTask(TextTask):
    """A text, or a pair of texts, and a number."""

    monitor = "eval_pearson"

    def name_labels(self, train, given):
        self.label_names = [self.columns.label]  # of the one output

    def label(self, value, where):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{where}: {self.columns.label!r} must be a finite number, not {value!r}")
        return number

    def target(self, label):
        return np.float32(label)

    def predictions(self, outputs, batch):
        return outputs.logits[:, 0].float().tolist()

    def answers(self, examples, rows, predictions):
        return predictions

    def measure(self, examples, answers):
        references = [example["label"] for example in examples]
        return load_metric(Regression).compute(predictions=answers, references=references)

    def show(self, example, answer):
        return super().show(example, f"{answer:.2f}")


class TaggingTask(Task):
    """Words, and a tag for each: entities in IOB tags, parts of speech.

    The model reads the words as one text with spaces between them, as the pipeline will, and its answer for a word is
    that at the word's first token. A word that is cut off or has no token of its own is answered "O".
    """

    head = "TokenClassification"
    pipeline = "token-classification"
    monitor = "eval_f1"

    def name_labels(self, train, given):
        column = self.columns.label
        rows = enumerate(list_column(train, column, "label_column"))
        self.name_classes(train, (as_label(tag, column, train.where(row)) for row, tags in rows for tag in tags), given)

    def examples(self, table, split="training"):
        all_words = list_column(table, self.columns.text, "text_column")
        all_tags = list_column(table, self.columns.label, "label_column")
        examples = []
        for row, (words, tags) in enumerate(zip(all_words, all_tags, strict=True)):
            where = table.where(row)
            if len(words) != len(tags):
                raise ValueError(f"{where}: {len(words)} words, but {len(tags)} tags")
            words = [as_text(word, self.columns.text, where) for word in words]
            examples.append({"words": words, "tags": [self.class_name(tag, where) for tag in tags]})
        return examples

    def texts(self, example):
        return [" ".join(example["words"])]

    def rows(self, examples, tokenizer, max_length, split="training"):
        ids = {name: number for number, name in enumerate(self.label_names)}
        rows, num_cut = [], 0
        for chunk in chunks(examples):
            texts = [" ".join(example["words"]) for example in chunk]
            encodings = tokenizer(texts, truncation=True, max_length=max_length)
            for number, example in enumerate(chunk):
                encoding = encodings.encodings[number]
                labels = np.full(len(encoding.ids), IGNORED_LABEL, np.int32)
                scored, first_character = [], 0
                for index, word in enumerate(example["words"]):
                    places = map(encoding.char_to_token, range(first_character, first_character + len(word)))
                    place = next((place for place in places if place is not None), None)
                    if place is not None and labels[place] == IGNORED_LABEL:
                        labels[place] = ids[example["tags"][index]]
                        scored.append(index)
                    first_character += len(word) + 1
                num_cut += bool(encoding.overflowing)
                rows.append({**token_arrays(encodings, number), "labels": labels, "words": scored})
        self.note(num_cut, examples, f"sentences were cut to {max_length} tokens; the words behind count as 'O'", split)
        return rows

    def predictions(self, outputs, batch):
        is_scored = batch["labels"] != IGNORED_LABEL
        return [tags[scored].tolist() for tags, scored in zip(outputs.logits.argmax(-1).cpu(), is_scored, strict=True)]

    def answers(self, examples, rows, predictions):
        answers = []
        for example, row, prediction in zip(examples, rows, predictions, strict=True):
            tags = ["O"] * len(example["words"])
            for word, tag in zip(row["words"], prediction, strict=True):
                tags[word] = self.label_names[tag]
            answers.append(tags)
        return answers

    def reference(self, example):
        return example["tags"]

    def measure(self, examples, answers):
        references = [example["tags"] for example in examples]
        return load_metric(Entities).compute(predictions=answers, references=references)

    def show(self, example, answer):
        def listed(tags: list[str]) -> str:
            found = sorted(entities(tags), key=lambda entity: entity[1])
            return ", ".join(f"{kind} {' '.join(example['words'][first:end])!r}" for kind, first, end in found)

        text = textwrap.shorten(" ".join(example["words"]), 200)
        return f"{text}\n  -> {listed(answer) or 'nothing'} (labelled {listed(example['tags']) or 'nothing'})"


# ------------------------------------------------------------------------------------------------ columns and labels


def text_column(table: Table, name: str, option: str) -> list[str]:
    return [as_text(value, name, table.where(row)) for row, value in enumerate(table.column(name, option))]


def list_column(table: Table, name: str, option: str) -> list[list]:
    values = table.column(name, option)
    for row, value in enumerate(values):
        if not isinstance(value, list):
            raise ValueError(f"{table.where(row)}: {name!r} must be a list, with one entry a word, not {value!r}")
    return values


def as_text(value, column: str, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} holds {type(value).__name__}, not text")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {column!r} is not valid Unicode ({error}); repair it") from error
    return value or ""


def as_label(value, column: str, where: str) -> str | float | None:
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {column!r} must hold single labels, a text or a number each, not {value!r}")
    return value


def _spell(label) -> str | None:
    """A label as text, 1.0 as "1"; None where there is none."""
    if label is None or label == "" or (isinstance(label, float) and math.isnan(label)):
        return None
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


# ------------------------------------------------------------------------------------------------------------ splits


def split_examples(
    examples: list[dict], key: Callable[[dict], Any], fraction: float, source: str
) -> tuple[list[dict], list[dict]]:
    """Examples to train on and to validate on: those whose keys have the smallest sha256, so that neither the order of
    the file nor duplicates matter. Raises ValueError if nothing would be left on one side."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, not {fraction}")
    is_held_out = hold_out([key_of(bytes.fromhex(_digest([key(example)]))) for example in examples], fraction)
    parts = [], []
    for example, chosen in zip(examples, is_held_out.tolist(), strict=True):
        parts[chosen].append(example)
    if not parts[0]:
        raise ValueError(f"{source}: too few different rows to hold any out; give --validation_data")
    return parts


def _digest(values: Iterable) -> str:
    return digest_of(json.dumps(value, sort_keys=True).encode() for value in values)
