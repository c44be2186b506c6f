"""Masked accuracy after the same time on the same text in the same order: ours beside transformers' BERT.

    python tests/benchmarks/bert_pretraining.py --data FOLDER --minutes 30

Both have the same layers, width and vocabulary, and see the same sequences with the same masks. Ours trains as the
recipe `bert-prose.yaml` does; theirs is `BertForPreTraining` (sdpa, post-norm, learned positions) with fused AdamW on
padded batches. Each has the matrix products of its own library's training. The two take steps in turn in one process,
each by its own clock (the time of the processor, divided by the number of threads), so that nothing else on the machine
favours one; learning rates rise and fall with the part of the time that is used up.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
import transformers
from gpt import default_matmul

import hf_models
from training.data.documents import read_documents
from training.run.arguments import parse_arguments
from training.run.optim import create_optimizers, learning_rate_factor
from training.run.processes import fastest_attention, speed_up_cpu_matmul
from training.text.masking import MaskedRows, masked_evaluation_rows
from training.text.tokenizer import make_tokenizer
from training.text.tokens import IGNORED_LABEL, tokenize_documents
from training.train_bert import BertArguments, count_correct

RECIPE = Path(__file__).parents[2] / "training/recipes/bert-prose.yaml"


def unpack(batch: dict[str, torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The sequences of packed rows, one a row, padded to the longest: what a stock BERT takes."""
    begins = batch["position_ids"].flatten() == 0
    number = begins.cumsum(0) - 1  # of the sequence that a token belongs to
    place = batch["position_ids"].flatten()
    shape = (int(number[-1]) + 1, int(place.max()) + 1)
    padded = {}
    for name, filler in {"input_ids": pad_token_id, "token_type_ids": 0, "labels": IGNORED_LABEL}.items():
        padded[name] = torch.full(shape, filler)
        padded[name][number, place] = batch[name].flatten()
    padded["attention_mask"] = (padded["input_ids"] != pad_token_id).long()
    if "next_sentence_label" in batch:
        pairs, first = batch["next_sentence_label"], batch["sequence_positions"]
        first = first + torch.arange(len(first))[:, None] * batch["input_ids"].shape[1]
        is_pair = pairs != IGNORED_LABEL
        padded["next_sentence_label"] = torch.full(shape[:1], IGNORED_LABEL)
        padded["next_sentence_label"][number[first[is_pair]]] = pairs[is_pair]
    is_real = padded["attention_mask"].any(1)  # the tail of a row is no sequence
    return {name: tensor[is_real] for name, tensor in padded.items()}


class Contender:
    """One of the two: a model, how its library multiplies, how it is given a batch, and the time it has used."""

    def __init__(self, name, model, set_up, optimizers, prepare, rows, args, budget: float):
        self.name, self.model, self.set_up = name, model.train(), set_up
        self.optimizers, self.prepare, self.rows = optimizers, prepare, rows
        self.args, self.budget, self.seconds, self.step, self.tokens = args, budget, 0.0, 0, 0

    def take_step(self):
        batch = self.rows.rows(self.step * self.args.global_batch_size, self.args.global_batch_size)
        batch = self.prepare(batch)
        self.set_up()
        started = time.process_time()
        factor = learning_rate_factor(
            int(1e4 * self.seconds / self.budget), schedule="linear", max_steps=10_000, warmup_steps=200, final=0.0
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.seconds += (time.process_time() - started) / torch.get_num_threads()
        self.step += 1
        self.tokens += int((batch["labels"] != IGNORED_LABEL).sum())

    @torch.no_grad()
    def measure(self, batches) -> tuple[float, float]:
        """Loss and accuracy of the masked tokens."""
        self.model.eval()
        nll = num_masked = num_correct = 0
        for batch in batches:
            batch = self.prepare(batch)
            labels = batch["labels"]
            inputs = ("input_ids", "token_type_ids", "attention_mask", "position_ids")
            scores = self.model(**{name: batch[name] for name in inputs if name in batch}).prediction_logits
            counted = labels != IGNORED_LABEL
            found = count_correct(scores[counted], labels[counted])
            nll, num_masked, num_correct = nll + found[0], num_masked + found[1], num_correct + found[2]
        self.model.train()
        return nll / num_masked, num_correct / num_masked


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a text file, or a folder of them")
    parser.add_argument("--minutes", type=float, default=30.0, help="time that each of the two trains")
    parser.add_argument("--stock_learning_rate", type=float, default=5e-4)
    parser.add_argument("--learning_rate", type=float, help="ours; by default the recipe's")
    parser.add_argument("--only", choices=["ours", "stock"], help="run one of the two")
    options = parser.parse_args()
    args = parse_arguments(BertArguments, ["--recipe", str(RECIPE), "--output_dir", "unused"])
    torch.manual_seed(args.seed)

    corpus = read_documents(options.data)
    tokenizer = make_tokenizer(args.tokenizer, corpus, args.vocab_size, context_length=args.row_length, masked=True)
    cache = tokenize_documents(corpus, tokenizer)
    rows = MaskedRows(cache.tokens("train"), tokenizer, args.row_length, args.seed, next_sentence=args.next_sentence)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": args.row_length}
    ours = hf_models.create_model(args.model, **sizes, attn_implementation=fastest_attention("cpu"))
    config = ours.config
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(
            **sizes,
            **{name: getattr(config, name) for name in same},
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    rates = {"learning_rate": options.learning_rate or args.learning_rate, "weight_decay": args.weight_decay}
    optimizers = create_optimizers(ours, optimizer=args.optimizer, betas=(args.beta1, args.beta2), **rates)
    rates = {"learning_rate": options.stock_learning_rate, "weight_decay": 0.01}  # Devlin et al. 2019, appendix A.2
    stock_optimizers = create_optimizers(theirs, optimizer="adamw", betas=(0.9, 0.999), **rates)
    budget = 60 * options.minutes

    def to_padded(batch):
        return unpack(batch, tokenizer.pad_token_id)

    contenders = [
        Contender("ours", ours, speed_up_cpu_matmul, optimizers, lambda batch: batch, rows, args, budget),
        Contender("stock", theirs, default_matmul, stock_optimizers, to_padded, rows, args, budget),
    ]
    contenders = [one for one in contenders if options.only in (None, one.name)]
    print(
        f"{rows.num_rows:,} rows of {args.row_length} tokens in an epoch, {len(tokenizer):,} tokens in the vocabulary"
    )
    print(*(f"{one.name}: {one.model.num_parameters():,} parameters" for one in contenders), sep="\n", flush=True)

    for part in range(1, 7):
        while (one := min(contenders, key=lambda one: one.seconds)).seconds < budget * part / 6:
            one.take_step()
        print(f"{'':8s}{'minutes':>8s}{'steps':>8s}{'rows/s':>8s}{'loss':>8s}{'accuracy':>10s}")
        for one in contenders:
            batches = masked_evaluation_rows(
                cache.tokens("validation"), tokenizer, args.row_length, 32, next_sentence=args.next_sentence
            )
            loss, accuracy = one.measure(islice(batches, None if part == 6 else 20))  # the last one is of all the text
            speed = one.step * args.global_batch_size / one.seconds
            numbers = f"{one.seconds / 60:8.1f}{one.step:8d}{speed:8.1f}{loss:8.3f}{accuracy:10.4f}"
            print(f"{one.name:8s}{numbers}", flush=True)


if __name__ == "__main__":
    main()
