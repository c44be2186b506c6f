"""The tasks that classify or score: texts, pairs of texts, tagged words."""

import math
import textwrap

import numpy as np

from training.metrics import Classification, Entities, Regression, entities, load_metric
from training.tasks.task import (
    Task,
    as_label,
    as_text,
    chunks,
    list_column,
    text_column,
    token_arrays,
)
from training.text.tokens import IGNORED_LABEL


class TextTask(Task):
    """Classifies a text or a pair of texts."""

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
    """Predicts a number from a text or a pair of texts."""

    monitor = "eval_pearson"

    def name_labels(self, train, given):
        self.label_names = [self.columns.label]  # the name of the one output

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
    """Gives each word a tag, such as an entity's IOB tag or a part of speech.

    The model reads the words as one text with spaces between them, as the pipeline will. Its answer for a word is its
    answer at the word's first token. A word that is cut off or has no token of its own gets the answer "O".
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
                    tokens = map(encoding.char_to_token, range(first_character, first_character + len(word)))
                    token = next((token for token in tokens if token is not None), None)
                    if token is not None and labels[token] == IGNORED_LABEL:
                        labels[token] = ids[example["tags"][index]]
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
