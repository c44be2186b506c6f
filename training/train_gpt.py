"""Train a GPT on text.

    accelerate launch training/train_gpt.py

trains on the documentation that ships with Python, in a few minutes on a laptop's CPU; the README shows what it prints
and leaves. `--data` takes a .txt, .jsonl or .parquet file, a folder of these, or the name of a data set on the Hub.
`--recipe training/recipes/NAME.yaml` repeats a published run; `--help` lists every option.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

import hf_models
from training.data.documents import Corpus, read_documents
from training.hub.finish import finish
from training.metrics import LanguageModeling, load_metric
from training.models import create_text_model, describe
from training.run.arguments import option, user_errors, with_defaults
from training.run.folder import identify, open_run
from training.run.loop import train
from training.run.processes import on_main_process, take_turns
from training.text.arguments import TextArguments
from training.text.stream import StreamedTokens
from training.text.tokenizer import make_tokenizer, separator_id, tokenizer_fingerprint
from training.text.tokens import IGNORED_LABEL, TokenCache, TokenRows, evaluation_rows, tokenize_documents

QUICKSTART = {  # a few minutes on two CPU cores
    "model": "gpt-tiny",
    "max_steps": 500,
    "global_batch_size": 16,
    "optimizer": "muon",
    "learning_rate": 4e-3,
    "final_learning_rate": 0.0,
    "warmup_steps": 50,
    "eval_every": 100,
}


@dataclass
class GPTArguments(with_defaults(TextArguments, **QUICKSTART)):
    context_length: int = option(128, "tokens of a row", "text", at_least=2)
    within_document: bool = option(False, "keep attention within each document", "text")
    prompt: str | None = option(None, "begin the sample of text with this; None: with held-out text", "text")
    sample_tokens: int = option(120, "tokens of the sample", "text", at_least=1)


class GPTData:
    """Rows of tokens as the loop asks for them."""

    def __init__(self, rows: TokenRows | StreamedTokens, global_batch_size: int):
        self.rows, self.global_batch_size = rows, global_batch_size

    def batch(self, step, positions):
        return self.rows.rows(step * self.global_batch_size + positions.start, len(positions))

    def num_items(self, batch):
        return int((batch["shift_labels"] != IGNORED_LABEL).sum())

    def num_units(self, batch):
        return batch["input_ids"].numel()  # rows are full

    def external_files(self):
        return self.rows.external_files() if isinstance(self.rows, StreamedTokens) else {}


class Validation:
    """The loss over the whole held-out text, and a sample of what the model writes."""

    def __init__(self, args: GPTArguments, accelerator, tokenizer, cache: TokenCache):
        self.args, self.accelerator, self.tokenizer = args, accelerator, tokenizer
        self.separator = separator_id(tokenizer) if args.within_document else None
        self.tokens, self.num_bytes = cache.tokens("validation"), cache.num_bytes("validation")
        self.metric = load_metric(LanguageModeling)
        next(evaluation_rows(self.tokens, args.context_length, 1))  # raises ValueError now if there is too little text

    @torch.no_grad()
    def measure(self, model) -> dict[str, Any]:
        """Returns loss, perplexity, bits per byte, speed and a sample; every process takes every n-th batch."""
        started = time.perf_counter()
        batches = evaluation_rows(self.tokens, self.args.context_length, self.args.eval_batch_size, self.separator)
        sums = []
        for batch, counts in take_turns(self.accelerator, batches):
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            nll = model(**batch, num_items_in_batch=1, use_cache=False, return_logits=False).loss
            if counts:
                sums.append((float(nll), int((batch["shift_labels"] != IGNORED_LABEL).sum())))
        sums = gather_object(sums)
        for index, (nll, num_tokens) in enumerate(sums):
            self.metric.add(nll_sum=nll, num_tokens=num_tokens, num_bytes=self.num_bytes if index == 0 else 0)
        results = {f"eval_{name}": value for name, value in self.metric.compute().items()}
        seconds = time.perf_counter() - started
        results["eval_tokens_per_second"] = round(sum(num_tokens for _, num_tokens in sums) / seconds, 1)
        return {**results, "sample": self.sample(model)}

    def sample(self, model) -> str:
        """Returns a continuation of the prompt, or of the first held-out words."""
        if self.args.prompt is None:
            ids = torch.as_tensor(self.tokens[:16].astype("int64"))[None]
        else:
            ids = self.tokenizer(self.args.prompt, return_tensors="pt")["input_ids"]
        ids = ids[:, : self.args.context_length // 2].to(self.accelerator.device)
        output = self.accelerator.unwrap_model(model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(self.args.sample_tokens, self.args.context_length - ids.shape[1]),
            do_sample=True,
            temperature=0.8,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.decode(output[0], skip_special_tokens=True)


def make_rows(args: GPTArguments, accelerator, corpus: Corpus, tokenizer, cache: TokenCache):
    """Returns the training rows: of a stream as they arrive, otherwise of the cache."""
    separator = separator_id(tokenizer) if args.within_document else None
    if not corpus.streamed:
        return TokenRows(cache.tokens("train"), args.context_length, args.seed, separator)
    size = max(8192, args.global_batch_size)
    rows = StreamedTokens(corpus, tokenizer, args.context_length, args.seed, separator, rows_per_shard=size)
    on_main_process(accelerator, lambda: rows.rows(0, 1))  # raises ValueError now if the text is too short
    return rows


def main():
    with open_run(GPTArguments) as (args, accelerator):
        with user_errors():
            length = args.context_length
            corpus = read_documents(args.data, **args.reading)
            tokenizer = make_tokenizer(args.tokenizer, corpus, args.vocab_size, context_length=length)
            cache = tokenize_documents(corpus, tokenizer)
            data = GPTData(make_rows(args, accelerator, corpus, tokenizer, cache), args.global_batch_size)
            validation = Validation(args, accelerator, tokenizer, cache)
            model_class, device = hf_models.ZooGPTForCausalLM, accelerator.device
            model = create_text_model(
                args.model, model_class, tokenizer, length, device, args.config, length_option="context_length"
            )
            vocabulary = f"{len(tokenizer):,} tokens in the vocabulary"
            accelerator.print(f"{describe(model)}, {vocabulary}, text from {corpus.source}")
            identity = identify(
                args,
                model,
                corpus.fingerprint,
                start=args.model,
                tokenizer=tokenizer_fingerprint(tokenizer),
                context_length=length,
                within_document=args.within_document,
            )
        monitor = "eval_loss" if args.patience else None  # without patience the last weights are the result
        model, results = train(args, accelerator, model, data, validation, identity, unit="tokens", monitor=monitor)
        finish(args, accelerator, model, tokenizer, results, task="text-generation", data=corpus)


if __name__ == "__main__":
    main()
