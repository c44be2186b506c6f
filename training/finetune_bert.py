"""Fine-tune a pre-trained model on a task with labels.

    accelerate launch training/finetune_bert.py --task pair --data mrpc --model google-bert/bert-base-uncased

tells paraphrases apart. `--task` is one of

    classify    a text and its class: sentiment, topic
    pair        two texts and their class: paraphrase, entailment
    regress     one or two texts and a number: similarity
    tag         words and a tag for each: entities
    qa          a question and the part of a context that answers it

`--data` takes GLUE's names (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli), squad, squad_v2, conll2003; a .csv,
.tsv, .json, .jsonl or .parquet file or a folder of them; or any data set of the Hub. `--model` takes a checkpoint of
ours or a stock BERT, for the first three tasks a GPT (ours or GPT-2) too, or a name of the zoo to start from nothing.
"""

import math
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object

from training.arguments import RunArguments, option, parse_arguments, user_errors, with_defaults
from training.classification import FILLERS, Task, collate
from training.loop import identify, open_run, seed_from, train
from training.processes import on_main_process
from training.results import finish
from training.task_models import create_task_model, create_tokenizer
from training.tasks import read_task
from training.text import IGNORED_LABEL
from training.tokenizer import tokenizer_fingerprint

USUAL = {  # Devlin et al. 2019, appendix A.3
    "data": "",
    "model": "google-bert/bert-base-uncased",
    "learning_rate": 5e-5,
    "schedule": "linear",
    "final_learning_rate": 0.0,
    "weight_decay": 0.01,
    "beta2": 0.999,
}


@dataclass
class FineTuningArguments(with_defaults(RunArguments, **USUAL)):
    task: Literal["classify", "pair", "regress", "tag", "qa"] | None = option(None, "what to learn", "task")
    validation_data: str | None = option(None, "a file to validate on, where `data` has no such part", "task")
    validation_fraction: float = option(0.1, "part of the data to hold out where none is for validation", "task")
    text_column: str | None = option(None, "column of the (first) text, of the words, of the question", "task")
    pair_column: str | None = option(None, "column of the second text, of the context", "task")
    label_column: str | None = option(None, "column of the label, of the tags, of the answers", "task")
    label_names: str | None = option(None, "classes in the order of their ids: 'negative,positive'", "task")
    class_weights: str | None = option(None, "'balanced', or how much each class counts: '1,4'", "task")
    unanswerable: bool = option(False, "qa: some questions have no answer, as in SQuAD v2", "task")
    stride: int | None = option(None, "qa: tokens that windows share; None: a third of max_length", "task")
    epochs: float | None = option(None, "passes over the training data, in place of max_steps", "task")
    monitor: str | None = option(
        None, "measure that decides which weights are best; None: the data set's or the task's usual one", "task"
    )
    config: str | None = option(None, "fields to change in it: 'hidden_dropout=0.1,attention_dropout=0.1'", "model")
    tokenizer: str | None = option(
        None, "an existing one, or 'wordpiece' or 'bpe' from the data; None: the checkpoint's", "model"
    )
    vocab_size: int = option(8192, "most tokens of a tokenizer made from the data", "model")
    max_length: int | None = option(None, "longest text in tokens, or window of qa; None: 128, for qa 384", "model")
    eval_batch_size: int = option(32, "rows of an evaluation batch", "model")

    def __post_init__(self):
        super().__post_init__()
        if self.task is None:
            raise ValueError("say what to learn: --task classify, pair, regress, tag or qa")
        if not self.data:
            raise ValueError("say what to learn from: --data mrpc, a file, a folder, or a data set of the Hub")
        if self.max_length is None:
            self.max_length = 384 if self.task == "qa" else 128
        for name, least in {"max_length": 8, "eval_batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be above 0, not {self.epochs}")
        if self.class_weights and self.task in ("regress", "qa"):
            raise ValueError(f"class_weights: --task {self.task} has no classes")


class LabelledRows:
    """The training rows as the loop asks for them: every epoch in a new order, a function of seed and epoch."""

    def __init__(self, rows: list[dict], args: FineTuningArguments, pad_token_id: int, class_weights=None):
        self.rows = [{name: row[name] for name in row.keys() & FILLERS.keys()} for row in rows]
        self.seed, self.global_batch_size, self.pad_token_id = args.seed, args.global_batch_size, pad_token_id
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)
        # An answer's places compete with the padding too, and the loss must not depend on who shares the micro-batch.
        self.length = args.max_length if args.task == "qa" else None
        self.epoch, self.order = -1, None

    def row(self, sample: int) -> dict:
        epoch, place = divmod(sample, len(self.rows))
        if epoch != self.epoch:
            generator = np.random.default_rng(seed_from(self.seed, epoch))
            self.epoch, self.order = epoch, generator.permutation(len(self.rows))
        return self.rows[self.order[place]]

    def batch(self, step, positions):
        first = step * self.global_batch_size
        return collate([self.row(first + position) for position in positions], self.pad_token_id, self.length)

    def num_items(self, batch):
        """Labels, or the sum of their classes' weights; for question answering windows."""
        if "labels" not in batch:
            return len(batch["input_ids"])
        labels = batch["labels"][batch["labels"] != IGNORED_LABEL]
        return len(labels) if self.class_weights is None else float(self.class_weights[labels].sum())

    def num_units(self, batch):
        return len(batch["input_ids"])

    def external_files(self):
        return {}


class Validation:
    """The task's measures over the whole validation part, and a few answers to read."""

    def __init__(self, args: FineTuningArguments, accelerator, task: Task, rows: list[dict], data: LabelledRows):
        self.args, self.accelerator, self.task, self.rows, self.data = args, accelerator, task, rows, data
        self.order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))  # little padding

    @torch.no_grad()
    def measure(self, model) -> dict[str, Any]:
        """Every process takes every n-th batch; the measures are computed once, over all rows together."""
        rank, device, size = self.accelerator.process_index, self.accelerator.device, self.args.eval_batch_size
        batches = (self.order[first : first + size] for first in range(0, len(self.order), size))
        found = []
        while turn := list(islice(batches, self.accelerator.num_processes)):
            # A process without a batch in the last turn runs another's and does not count it: under FSDP all must run.
            numbers = turn[min(rank, len(turn) - 1)]
            batch = collate([self.rows[number] for number in numbers], self.data.pad_token_id, self.data.length)
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            outputs = model(**inputs, num_items_in_batch=1)
            if rank < len(turn):
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


def weigh_classes(args: FineTuningArguments, task: Task, rows: list[dict]) -> list[float] | None:
    """How much each class counts; "balanced": in inverse proportion to its share of the labels, 1 on average."""
    if args.class_weights is None:
        return None
    if args.class_weights != "balanced":
        try:
            weights = [float(weight) for weight in args.class_weights.split(",")]
        except ValueError:
            weights = []
        if len(weights) != len(task.label_names) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"class_weights must be 'balanced' or {len(task.label_names)} positive numbers, for "
                f"{', '.join(task.label_names)}; not {args.class_weights!r}"
            )
        return weights
    labels = np.concatenate([np.atleast_1d(row["labels"]) for row in rows])
    counts = np.bincount(labels[labels != IGNORED_LABEL], minlength=len(task.label_names))
    return (counts.sum() / (len(counts) * counts.clip(min=1))).tolist()


def choose_monitor(args: FineTuningArguments, task: Task) -> str:
    """The value of an evaluation that decides; raises ValueError naming those there are if there is no such one."""
    if args.monitor is None:
        return task.monitor
    measured = task.measure(task.validation, [task.reference(example) for example in task.validation])
    if args.monitor.removeprefix("eval_") not in {"loss", *measured}:
        raise ValueError(f"monitor {args.monitor!r} is not measured here, only loss, {', '.join(measured)}")
    return f"eval_{args.monitor.removeprefix('eval_')}"


def main():
    with user_errors():
        args = parse_arguments(FineTuningArguments)
    with open_run(args) as accelerator:
        with user_errors():
            options = {"stride": args.stride} if args.task == "qa" else {}
            task = read_task(
                args.task,
                args.data,
                validation_data=args.validation_data,
                text_column=args.text_column,
                pair_column=args.pair_column,
                label_column=args.label_column,
                label_names=args.label_names.split(",") if args.label_names else None,
                validation_fraction=args.validation_fraction,
                unanswerable=args.unanswerable,
                **options,
            )
            monitor = choose_monitor(args, task)
            tokenizer = create_tokenizer(args.model, args.tokenizer, task, args.vocab_size, args.max_length)
            rows = task.rows(task.train, tokenizer, args.max_length)
            if args.epochs is not None:
                args = replace(args, max_steps=math.ceil(args.epochs * len(rows) / args.global_batch_size))
            class_weights = weigh_classes(args, task, rows)
            model = create_task_model(
                args.model, task, tokenizer, args.max_length, accelerator.device, args.config, class_weights
            )
            data = LabelledRows(rows, args, tokenizer.pad_token_id, class_weights)
            validation_rows = task.rows(task.validation, tokenizer, args.max_length)
            validation = Validation(args, accelerator, task, validation_rows, data)
            accelerator.print(
                f"{type(model).__name__} with {model.num_parameters():,} parameters; {len(rows):,} rows to train on "
                f"and {len(validation_rows):,} to validate on, from {task.source}"
            )
            for note in task.notes:
                accelerator.print(f"note: {note}")
            identity = identify(
                args,
                model,
                task.fingerprint,
                task=args.task,
                start=args.model,
                tokenizer=tokenizer_fingerprint(tokenizer),
                max_length=args.max_length,
                stride=args.stride,
                monitor=monitor,
            )
        model, results = train(
            args, accelerator, model, data, validation.measure, identity, unit="examples", monitor=monitor
        )
        source = {"source": task.source, "fingerprint": task.fingerprint, "licence": task.license}
        finish(args, accelerator, model, tokenizer, results, task=task.pipeline, data=source)


if __name__ == "__main__":
    main()
