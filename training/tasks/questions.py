"""Extractive question answering as a task: SQuAD's questions, windows over long contexts, answers in words.

T tokens of a window, W windows of a question
"""

import textwrap

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_models.question_answering import best_answers, question_windows
from training.data.tables import Table
from training.metrics import QuestionAnswering, load_metric
from training.tasks.task import Columns, Task, as_text, chunks, text_column


class QuestionTask(Task):
    """Finds the span of a context that answers a question (Rajpurkar et al. 2016, and 2018 for unanswerable ones).

    Args:
        unanswerable: whether a question may have no answer, as in SQuAD v2.
        stride: tokens that two neighbouring windows over a long context share; None: a third of a window.
        max_answer_tokens: the longest answer that is looked for.
        null_threshold: "no answer" is the answer if it scores above the best span by more than this; None: 0 where a
            question may have no answer.
    """

    head = "QuestionAnswering"
    pipeline = "question-answering"
    monitor = "eval_f1"

    def __init__(
        self,
        train: Table,
        validation: Table | None,
        columns: Columns,
        *,
        unanswerable: bool = False,
        stride: int | None = None,
        max_answer_tokens: int = 30,
        null_threshold: float | None = None,
        **options,
    ):
        self.unanswerable, self.stride, self.max_answer_tokens = unanswerable, stride, max_answer_tokens
        if null_threshold is not None and not unanswerable:
            raise ValueError("null_threshold: every question of this data has an answer; or give --unanswerable")
        self.null_threshold = (null_threshold or 0.0) if unanswerable else None
        super().__init__(train, validation, columns, **options)
        self.train = [example for example in self.train if example.get("start", 0) is not None]
        if not self.train:
            raise ValueError(f"{train.parts[0][0]}: no question is left to train on")

    def examples(self, table, split="training"):
        fields = {
            "question": text_column(table, self.columns.text, "text_column"),
            "context": text_column(table, self.columns.pair, "pair_column"),
            "answers": table.column(self.columns.label, "label_column"),
        }
        examples, misplaced = [], []
        for row, values in enumerate(zip(*fields.values(), strict=True)):
            example, where = dict(zip(fields, values, strict=True)), table.where(row)
            example["answers"] = read_answers(example["answers"], self.columns.label, where)
            if not example["answers"] and not self.unanswerable:
                raise ValueError(f"{where}: the question has no answer; give --unanswerable for data like SQuAD v2")
            if example["answers"]:
                example["start"], example["end"] = find_answer(example["context"], example["answers"])
                if example["start"] is None:
                    misplaced.append(f"{example['answers'][0][0]!r} ({where})")
            examples.append(example)
        named = ", ".join(misplaced[:3]) + (", ..." if len(misplaced) > 3 else "")
        outcome = "and not trained on" if split == "training" else "where the model looks for them"
        self.note(len(misplaced), examples, f"answers are not in their context, {outcome}: {named}", split)
        return examples

    def key(self, example):
        return example["context"]

    def texts(self, example):
        return [example["question"], example["context"]]

    def rows(self, examples, tokenizer, max_length, split="training"):
        """Makes one row for each window. Its `example` is the index of the question.

        The answer in a window that does not hold all of it is the window's first token, [CLS] (Devlin et al. 2019,
        section 4.3).
        """
        rows, num_before = [], 0
        stride = max_length // 3 if self.stride is None else self.stride
        for chunk in chunks(examples):
            questions, contexts = ([example[name] for example in chunk] for name in ("question", "context"))
            for window in question_windows(tokenizer, questions, contexts, max_tokens=max_length, stride=stride):
                number = window.pop("question")
                row = {name: values.numpy().astype(np.int32) for name, values in window.items()}
                start, end = answer_tokens(row["offsets"], chunk[number])
                rows.append({**row, "start_positions": start, "end_positions": end, "example": num_before + number})
            num_before += len(chunk)
        return rows

    def predictions(self, outputs, batch):
        logits = torch.stack((outputs.start_logits, outputs.end_logits), -1).float().cpu()  # (B, T, 2)
        lengths = batch["attention_mask"].sum(1).tolist()
        return [row[:length].numpy() for row, length in zip(logits, lengths, strict=True)]

    def answers(self, examples, rows, predictions):
        windows: list[list[int]] = [[] for _ in examples]
        for number, row in enumerate(rows):
            windows[row["example"]].append(number)
        answers = []
        for example, numbers in zip(examples, windows, strict=True):
            logits = pad_sequence([torch.from_numpy(predictions[number]) for number in numbers], True)  # (W, T, 2)
            best = best_answers(
                *logits.unbind(-1),
                pad_sequence([torch.from_numpy(rows[number]["offsets"]).long() for number in numbers], True),
                example["context"],
                max_answer_tokens=self.max_answer_tokens,
                null_threshold=self.null_threshold,
            )
            answers.append(best[0].text)
        return answers

    def reference(self, example):
        return example["answers"][0][0] if example["answers"] else ""

    def measure(self, examples, answers):
        references = [[text for text, _ in example["answers"]] for example in examples]
        return load_metric(QuestionAnswering).compute(predictions=answers, references=references)

    def show(self, example, answer):
        reference = self.reference(example) or "no answer"
        return f"{textwrap.shorten(example['question'], 200)}\n  -> {answer or 'no answer'} (labelled {reference})"


def read_answers(value, column: str, where: str) -> list[tuple[str, int | None]]:
    """Reads answers in any form that SQuAD's come in.

    Args:
        value: {"text": [...], "answer_start": [...]}, a list of {"text", "answer_start"}, or one text.

    Returns:
        Each answer without spaces around it, and the character of the context that it begins at.
    """
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    elif isinstance(value, str | None):
        value = [{"text": value or ""}]
    if not isinstance(value, list) or not all(isinstance(answer, dict) and "text" in answer for answer in value):
        raise ValueError(f'{where}: {column!r} must be {{"text": [...], "answer_start": [...]}}, not {value!r}')
    answers = [(as_text(answer["text"], column, where), answer.get("answer_start")) for answer in value]
    stripped = []
    for text, start in answers:
        if not isinstance(start, int | None):
            raise ValueError(f"{where}: answer_start in {column!r} must be a whole number, not {start!r}")
        if start is not None:
            start += len(text) - len(text.lstrip())
        stripped.append((text.strip(), start))
    return [(text, start) for text, start in stripped if text]


def find_answer(context: str, answers: list[tuple[str, int | None]]) -> tuple[int, int] | tuple[None, None]:
    """Finds the first answer that is in the context.

    Returns:
        The characters at which it begins and ends: where the data says, or if that is wrong where it occurs first.
        (None, None) if no answer is in the context.
    """
    for text, start in answers:
        if start is None or start < 0 or context[start : start + len(text)] != text:
            start = context.find(text)
        if start >= 0:
            return start, start + len(text)
    return None, None


def answer_tokens(offsets: np.ndarray, example: dict) -> tuple[int, int]:
    """Finds the first and the last token of an answer in a window; (0, 0) if the window does not hold all of it.

    Args:
        offsets: (T, 2), the characters at which each token begins and ends.
    """
    if example.get("start") is None:
        return 0, 0
    start, end = example["start"], example["end"]
    firsts, lasts = offsets.T
    is_context = lasts > firsts
    tokens = np.flatnonzero(is_context & (lasts > start) & (firsts < end))
    if len(tokens) == 0 or firsts[is_context][0] > start or lasts[is_context][-1] < end:
        return 0, 0
    return int(tokens[0]), int(tokens[-1])
