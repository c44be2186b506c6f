"""What batches of text cost on the CPU: rows of tokens for GPT, and masked rows for BERT.

    python tests/benchmarks/text_rows.py [--batches 200]

A training step of the smallest models takes tens of milliseconds, so a batch should take a few at most. The last lines
are the time until the first row of an epoch of about a hundred thousand.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from gpt import describe
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from training.text.masking import MaskedRows
from training.text.tokenizer import BERT_TOKENS
from training.text.tokens import TokenRows

VOCABULARY = 60_000


def make_tokenizer():
    words = [*BERT_TOKENS.values(), *(f"w{n}" for n in range(len(BERT_TOKENS), VOCABULARY))]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=BERT_TOKENS["unk_token"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **BERT_TOKENS)


def documents(num_tokens, separator):
    """Random tokens in documents of about 200."""
    random = np.random.default_rng(0)
    text = random.integers(10, VOCABULARY, num_tokens).astype(np.uint16)
    text[random.integers(0, num_tokens, num_tokens // 217)] = separator
    return text


def seconds_of(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200)
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    print(f"on {describe('cpu')}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.bin")
        documents(10**6, tokenizer.sep_token_id).tofile(path)
        text = np.memmap(path, np.uint16, mode="r")
        readers = {"12 rows of 64 tokens": (TokenRows(text, context_length=64, seed=0), 12)}
        for next_sentence in (False, True):
            kind = "in pairs of sentences" if next_sentence else "of one text"
            rows = MaskedRows(np.array(text), tokenizer, 128, 0, next_sentence=next_sentence)
            readers[f"32 masked rows of 128, {kind}"] = (rows, 32)
        for name, (rows, size) in readers.items():
            seconds = [seconds_of(lambda n=n, r=rows, s=size: r.rows(n * s, s)) for n in range(args.batches)]
            print(f"{name:<50} {statistics.median(seconds) * 1e3:8.2f} ms")
    text = documents(13_000_000, tokenizer.sep_token_id)
    for next_sentence in (False, True):
        seconds = seconds_of(lambda n=next_sentence: MaskedRows(text, tokenizer, 128, 0, next_sentence=n).rows(0, 1))
        kind = "in pairs of sentences" if next_sentence else "of one text"
        print(f"{'an epoch of 13 million tokens, ' + kind:<50} {seconds * 1e3:8.0f} ms")


if __name__ == "__main__":
    main()
