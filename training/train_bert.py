"""Pre-train a BERT on masked tokens and sentence pairs.

    accelerate launch training/train_bert.py

trains on the documentation that ships with Python, in about a quarter of an hour of processor time. `--data` takes a
.txt, .jsonl or .parquet file, a folder of these, or the name of a data set on the Hub. `--recipe
training/recipes/NAME.yaml` repeats a published run; `--help` lists every option. Rows are packed without padding, and
only masked tokens are scored.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

import hf_models
from training.data.documents import Corpus, read_documents
from training.hub.finish import finish
from training.metrics import MaskedLanguageModeling, load_metric
from training.models import create_text_model, describe
from training.run.arguments import option, user_errors, with_defaults
from training.run.folder import identify, open_run
from training.run.loop import train
from training.run.processes import on_main_process, take_turns
from training.text.arguments import TextArguments
from training.text.masking import MaskedRows, masked_evaluation_rows
from training.text.stream import StreamedTokens
from training.text.tokenizer import make_tokenizer, tokenizer_fingerprint
from training.text.tokens import IGNORED_LABEL, TokenCache, tokenize_documents
from training.text.validation import count_correct, guess_words, pseudo_perplexity

QUICKSTART = {  # 13 minutes of processor time
    "model": "bert-modern-mini",
    "tokenizer": "wordpiece",
    "vocab_size": 8192,
    "max_steps": 500,
    "global_batch_size": 16,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "final_learning_rate": 0.0,
    "warmup_steps": 50,
    "eval_every": 100,
}


@dataclass
class BertArguments(with_defaults(TextArguments, **QUICKSTART)):
    row_length: int = option(128, "tokens of a row", "text", at_least=16)
    next_sentence: bool = option(True, "also tell whether the second half of a sequence follows the first", "text")
    mask_probability: float = option(0.15, "part of the tokens to predict", "text", above=0, below=1)
    whole_words: bool = option(False, "mask all pieces of a word together", "text")
    scored_rows: int = option(
        4, "rows' worth of held-out tokens to mask one by one, for the pseudo-perplexity", "text", at_least=1
    )

    @property
    def masking(self) -> dict[str, Any]:
        """What `MaskedRows` takes besides the text, the tokenizer and the length of a row."""
        return {name: getattr(self, name) for name in ("next_sentence", "mask_probability", "whole_words")}


class BertData:
    """Packed rows of masked tokens as the loop asks for them."""

    def __init__(self, rows: MaskedRows | StreamedTokens, global_batch_size: int, pad_token_id: int):
        self.rows, self.global_batch_size, self.pad_token_id = rows, global_batch_size, pad_token_id

    def batch(self, step, positions):
        return self.rows.rows(step * self.global_batch_size + positions.start, len(positions))

    def num_items(self, batch):
        masked = int((batch["labels"] != IGNORED_LABEL).sum())
        if "next_sentence_label" not in batch:
            return masked
        return {"masked_lm": masked, "next_sentence": int((batch["next_sentence_label"] != IGNORED_LABEL).sum())}

    def num_units(self, batch):
        return int((batch["input_ids"] != self.pad_token_id).sum())

    def external_files(self):
        return self.rows.external_files() if isinstance(self.rows, StreamedTokens) else {}


class Validation:
    """The losses and accuracies over the whole held-out text, and at the end a closer look."""

    def __init__(self, args: BertArguments, accelerator, tokenizer, cache: TokenCache):
        self.args, self.accelerator, self.tokenizer = args, accelerator, tokenizer
        self.tokens = cache.tokens("validation")
        self.metric = load_metric(MaskedLanguageModeling)
        if not any((batch["labels"] != IGNORED_LABEL).any() for batch in self.batches()):
            raise ValueError("the validation text has no token to mask, only unknown ones: give more text")

    def batches(self):
        size, batch_size = self.args.row_length, self.args.eval_batch_size
        return masked_evaluation_rows(self.tokens, self.tokenizer, size, batch_size, **self.args.masking)

    @torch.no_grad()
    def measure(self, model) -> dict[str, Any]:
        """Returns losses and accuracies; every process takes every n-th batch."""
        sums = []
        for batch, counts in take_turns(self.accelerator, self.batches()):
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            labels, pairs = batch.pop("labels"), batch.pop("next_sentence_label", None)
            places = batch.pop("masked_positions")
            outputs = model(**batch, logits_to_keep=places)
            labels = labels.gather(1, places.clamp(min=0)).where(places >= 0, IGNORED_LABEL)
            found = count_correct(outputs[0], labels)
            found += (0.0, 0, 0) if pairs is None else count_correct(outputs.seq_relationship_logits, pairs)
            if counts:
                sums.append(found)
        for found in gather_object(sums):
            names = ("masked_nll_sum", "num_masked", "num_masked_correct", "pair_nll_sum", "num_pairs")
            self.metric.add(**dict(zip((*names, "num_pairs_correct"), found, strict=True)))
        return {f"eval_{name}": value for name, value in self.metric.compute().items()}

    def look_closer(self, model) -> dict[str, Any]:
        """Returns the pseudo-perplexity, and ten masked sentences with the model's guesses."""
        text, size = (model, self.tokenizer, self.tokens), self.args.row_length
        perplexity = pseudo_perplexity(*text, size, self.args.scored_rows * size, self.args.eval_batch_size)
        return {"eval_pseudo_perplexity": perplexity, "sample": guess_words(*text, size)}


def make_rows(args: BertArguments, accelerator, corpus: Corpus, tokenizer, cache: TokenCache):
    """Returns the training rows: of a stream as they arrive, otherwise of the cache."""

    def mask(tokens, *seed):
        return MaskedRows(tokens, tokenizer, args.row_length, seed, **args.masking)

    if not corpus.streamed:
        return mask(cache.tokens("train"), args.seed)
    rows = StreamedTokens(
        corpus,
        tokenizer,
        args.row_length,
        args.seed,
        rows_of=lambda tokens, shard: mask(tokens[:-1], args.seed, shard),  # the last token begins the next shard
        rows_per_shard=max(8192, args.global_batch_size),
    )
    on_main_process(accelerator, lambda: rows.rows(0, 1))  # raises ValueError now if the text is too short
    return rows


def main():
    with open_run(BertArguments) as (args, accelerator):
        with user_errors():
            size = args.row_length
            corpus = read_documents(args.data, **args.reading)
            tokenizer = make_tokenizer(args.tokenizer, corpus, args.vocab_size, context_length=size, masked=True)
            cache = tokenize_documents(corpus, tokenizer)
            rows = make_rows(args, accelerator, corpus, tokenizer, cache)
            data = BertData(rows, args.global_batch_size, tokenizer.pad_token_id)
            validation = Validation(args, accelerator, tokenizer, cache)
            model_class = hf_models.ZooBertForPreTraining if args.next_sentence else hf_models.ZooBertForMaskedLM
            model = create_text_model(
                args.model, model_class, tokenizer, size, accelerator.device, args.config, length_option="row_length"
            )
            vocabulary = f"{len(tokenizer):,} tokens in the vocabulary"
            accelerator.print(f"{describe(model)}, {vocabulary}, text from {corpus.source}")
            identity = identify(
                args,
                model,
                corpus.fingerprint,
                start=args.model,
                tokenizer=tokenizer_fingerprint(tokenizer),
                row_length=size,
                **args.masking,
            )
        options = {"unit": "tokens", "row_length": size, "monitor": "eval_loss" if args.patience else None}
        model, results = train(args, accelerator, model, data, validation, identity, **options)
        results |= validation.look_closer(model)
        accelerator.print(f"pseudo-perplexity {results['eval_pseudo_perplexity']:.2f}\n{results['sample']}")
        finish(args, accelerator, model, tokenizer, results, task="fill-mask", data=corpus)


if __name__ == "__main__":
    main()
