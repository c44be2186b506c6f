"""Fine-tune a pre-trained model on a task with labels.

    accelerate launch training/finetune_bert.py --task pair --data mrpc --model google-bert/bert-base-uncased

tells paraphrases apart. `--task` is one of

    classify    a text and its class: sentiment, topic
    pair        two texts and their class: paraphrase, entailment
    regress     one or two texts and a number: similarity
    tag         words and a tag for each: entities
    qa          a question and the part of a context that answers it

`--data` takes a .csv, .tsv, .json, .jsonl or .parquet file, or a folder of these; a name of GLUE (cola, sst2, mrpc,
stsb, qqp, mnli, mnli-mm, qnli, rte, wnli), squad, squad_v2 or conll2003; or any other data set of the Hub. The default
is docstrings of the standard library, to classify by their package. `--model` takes a BERT, ours or stock; for the
first three tasks also a GPT, ours or GPT-2; or a name of the zoo, to start from fresh weights.
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal

from training.hub.finish import finish
from training.models import describe
from training.run.arguments import RunArguments, option, split_names, user_errors, with_defaults
from training.run.folder import identify, open_run
from training.run.loop import train
from training.tasks.batches import TaskBatches, weigh_classes
from training.tasks.models import create_task_model, create_tokenizer
from training.tasks.read import read_task
from training.tasks.task import Task
from training.tasks.validation import TaskValidation
from training.text.tokenizer import tokenizer_fingerprint

USUAL = {  # Devlin et al. 2019, appendix A.3
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
    max_answer_tokens: int = option(30, "qa: longest answer that is looked for", "task", at_least=1)
    null_threshold: float | None = option(
        None, "qa: how far 'no answer' has to score above the best span to be the answer; None: 0", "task"
    )
    # As Devlin et al. warm up (run_classifier.py, warmup_proportion).
    warmup_steps: int | None = option(
        None, "steps of linear warm-up; None: a tenth of all steps", "optimization", at_least=0
    )
    epochs: float | None = option(None, "passes over the training data, in place of max_steps", "task", above=0)
    monitor: str | None = option(
        None, "measure that decides which weights are best; None: the data set's or the task's usual one", "task"
    )
    config: str | None = option(None, "fields to change in it: 'hidden_dropout=0.1,attention_dropout=0.1'", "model")
    tokenizer: str | None = option(
        None, "an existing one, or 'wordpiece' or 'bpe' from the data; None: the checkpoint's", "model"
    )
    vocab_size: int = option(8192, "most tokens of a tokenizer made from the data", "model")
    max_length: int | None = option(None, "longest text in tokens, or window of qa; None: 128, for qa 384", "model")
    eval_batch_size: int = option(32, "rows of an evaluation batch", "model", at_least=1)

    def __post_init__(self):
        max_steps = self.max_steps
        if self.epochs is not None:
            self.max_steps = sys.maxsize  # no warm-up or cooldown is too long yet; plan_steps finds the number
        super().__post_init__()
        self.max_steps = max_steps
        if self.task is None:
            raise ValueError("say what to learn: --task classify, pair, regress, tag or qa")
        if self.max_length is None:
            self.max_length = 384 if self.task == "qa" else 128
        if self.max_length < (least := 24 if self.task == "qa" else 8):
            raise ValueError(f"max_length must be at least {least}, not {self.max_length}")
        for name in ("class_weights", "label_names"):
            if getattr(self, name) is not None and self.task in ("regress", "qa"):
                raise ValueError(f"{name}: --task {self.task} has no classes")
        if self.pair_column is not None and self.task in ("classify", "tag"):
            raise ValueError(f"pair_column: --task {self.task} reads one text; for two there is --task pair")
        for name in ("unanswerable", "stride", "max_answer_tokens", "null_threshold"):
            if self.task != "qa" and getattr(self, name) != getattr(FineTuningArguments, name):
                raise ValueError(f"{name} belongs to --task qa, not to {self.task}")
        if self.stride is not None and not 0 <= self.stride <= self.max_length // 2:
            raise ValueError(f"stride must lie between 0 and half of max_length {self.max_length}, not {self.stride}")
        if self.null_threshold is not None and not self.null_threshold > -math.inf:
            raise ValueError(f"null_threshold must be a number or infinity, not {self.null_threshold}")

    @property
    def question_options(self) -> dict[str, Any]:
        """Options of qa, which no other task has."""
        names = ("stride", "max_answer_tokens", "null_threshold") if self.task == "qa" else ()
        return {name: getattr(self, name) for name in names}


def plan_steps(args: FineTuningArguments, num_rows: int) -> FineTuningArguments:
    """Returns the arguments with the number of steps, and of warm-up steps, for this many training rows."""
    steps = args.max_steps
    if args.epochs is not None:
        steps = math.ceil(args.epochs * num_rows / args.global_batch_size)
    warmup = steps // 10 if args.warmup_steps is None else args.warmup_steps
    if warmup >= steps:
        raise ValueError(f"warmup_steps is {warmup}, but there are only {steps} steps: give fewer")
    return replace(args, max_steps=steps, warmup_steps=warmup, epochs=None)


def choose_monitor(args: FineTuningArguments, task: Task) -> str:
    """Returns the measured value that decides which evaluation is the best.

    Raises:
        ValueError: `args.monitor` is not measured; the message names what is.
    """
    if args.monitor is None:
        return task.monitor
    measured = task.measure(task.validation, [task.reference(example) for example in task.validation])
    if args.monitor.removeprefix("eval_") not in {"loss", *measured}:
        raise ValueError(f"monitor {args.monitor!r} is not measured here, only loss, {', '.join(measured)}")
    return f"eval_{args.monitor.removeprefix('eval_')}"


def read_data(args: FineTuningArguments) -> Task:
    """Returns the task that `--task` and `--data` name, with its examples."""
    names = ("validation_data", "text_column", "pair_column", "label_column", "validation_fraction", "unanswerable")
    options = {name: getattr(args, name) for name in names} | args.question_options
    return read_task(args.task, args.data, label_names=split_names(args.label_names), **options)


def main():
    with open_run(FineTuningArguments) as (args, accelerator):
        with user_errors():
            task = read_data(args)
            monitor = choose_monitor(args, task)
            tokenizer = create_tokenizer(args.model, args.tokenizer, task, args.vocab_size, args.max_length)
            rows = task.rows(task.train, tokenizer, args.max_length)
            args = plan_steps(args, len(rows))
            class_weights = weigh_classes(args.class_weights, task.label_names, rows)
            model = create_task_model(
                args.model, task, tokenizer, args.max_length, accelerator.device, args.config, class_weights
            )
            # In qa, padding tokens compete to be the answer, so the length must not depend on who shares the batch.
            length = args.max_length if args.task == "qa" else None
            data = TaskBatches(rows, args.seed, args.global_batch_size, tokenizer.pad_token_id, length, class_weights)
            held_out = task.rows(task.validation, tokenizer, args.max_length, "validation")
            validation = TaskValidation(accelerator, task, held_out, data, args.eval_batch_size)
            accelerator.print(
                f"{describe(model)}; {len(rows):,} rows to train on and {len(held_out):,} to validate on, "
                f"from {task.source}",
                *(f"note: {note}" for note in task.notes),
                sep="\n",
            )
            identity = identify(
                args,
                model,
                task.fingerprint,
                task=args.task,
                start=args.model,
                tokenizer=tokenizer_fingerprint(tokenizer),
                max_length=args.max_length,
                monitor=monitor,
                **args.question_options,
            )
        model, results = train(args, accelerator, model, data, validation, identity, unit="examples", monitor=monitor)
        finish(args, accelerator, model, tokenizer, results, task=task.pipeline, data=task)


if __name__ == "__main__":
    main()
