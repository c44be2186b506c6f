"""BERT against transformers on this machine: a step of masked-token training, and its memory.

    python tests/benchmarks/bert.py step                  # texts of different lengths, as they come; --full_length
    python tests/benchmarks/bert.py memory

Both get the same padded batches with the same masks, from the stock collator, and begin with the same weights. The
lengths are those of sentence pairs of `--data` (pieces of words of up to five letters, and punctuation marks; [CLS]
and two [SEP]; cut to the longest length); the tokens are random, which changes no time. Timings alternate between the
two, A B A B, and compare medians. Dropout is off in both.
"""

import argparse
import gc
import inspect
import itertools
import re

import torch
from gpt import compare_memory, default_matmul, describe, interleaved
from tokenizers import Tokenizer, models
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

import hf_models
from training.data.documents import read_documents
from training.run.processes import fastest_attention, speed_up_cpu_matmul

SHAPES = {  # layers, width, vocabulary, batch, longest
    "bert-base": (12, 768, 30522, 16, 128),
    "bert-base-512": (12, 768, 30522, 16, 512),
    "bert-mini": (4, 256, 30522, 16, 128),
    "tiny": (2, 64, 1000, 4, 32),  # to try this script
}


def build(shape, device):
    layers, width, vocab, _, longest = SHAPES[shape]
    return hf_models.create_model(
        "bert-base",
        hf_models.ZooBertForMaskedLM,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=max(1, width // 64),
        vocab_size=vocab,
        max_position_embeddings=max(512, longest),
        attn_implementation=fastest_attention(device),
    ).to(device)


def build_stock(shape, device):
    with torch.device("meta"):
        stock_class, config = build(shape, "meta").stock_class_and_config()
    config._attn_implementation = "sdpa"
    return stock_class(config).to(device)


def pair_lengths(data, longest):
    """The numbers of tokens of sentence pairs, one after the other, for ever."""
    corpus = read_documents(data)
    sentences = (re.split(r"(?<=[.!?])\s+|\n\s*\n", text) for text in itertools.cycle(corpus.train))
    counts = (len(re.findall(r"\w{1,5}|[^\w\s]", sentence)) for text in sentences for sentence in text)
    counts = (count for count in counts if count > 2)
    return (min(first + second + 3, longest) for first, second in zip(counts, counts, strict=False))


def make_batches(shape, data, full_length, count=8):
    """Padded batches from the stock collator, 15 % of the tokens masked; ours takes the places of the masks too."""
    _, _, vocab, batch_size, longest = SHAPES[shape]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: number for number, word in enumerate([*special, *map(str, range(5, vocab))])}
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), **names)
    collator = DataCollatorForLanguageModeling(tokenizer)
    torch.manual_seed(0)
    lengths = itertools.repeat(longest) if full_length else pair_lengths(data, longest)
    batches = []
    for _ in range(count):
        rows = [torch.randint(5, vocab, (length,)) for length in itertools.islice(lengths, batch_size)]
        batch = dict(collator([{"input_ids": row} for row in rows]))
        scored = [row.nonzero().squeeze(1) for row in batch["labels"] != -100]
        batches.append(batch | {"masked_positions": pad_sequence(scored, batch_first=True, padding_value=-1)})
    return batches


def training_step(model, batches, device, bf16=False):
    """A function that does one whole step, on another batch each time: forward, loss, backward, optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    known = batches[0].keys() & inspect.signature(model.forward).parameters.keys()
    taken = itertools.cycle([{name: batch[name].to(device) for name in known} for batch in batches])
    model.train()

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(**next(taken)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def benchmark_step(args):
    print(f"training step on {describe(args.device)}; milliseconds, and ours relative to each row")
    for shape in args.shapes:
        batches = make_batches(shape, args.data, args.full_length)
        real = sum(int(batch["attention_mask"].sum()) for batch in batches) / len(batches)
        fill = real / (sum(batch["input_ids"].numel() for batch in batches) / len(batches))
        print(f"{shape}: {real:,.0f} tokens a batch, {fill:.2f} of the padded batch, longest {SHAPES[shape][-1]}")
        for setting in args.settings:
            models = {"hf_models": build(shape, args.device), "transformers": build_stock(shape, args.device)}
            models["transformers"].load_state_dict(models["hf_models"].to_stock().state_dict())
            before = {"hf_models": speed_up_cpu_matmul, "transformers": speed_up_cpu_matmul}
            if setting == "as it comes":
                before["transformers"] = default_matmul
            steps, first_losses = {}, {}
            for name, model in models.items():
                before[name]()
                step = training_step(model, batches, args.device, setting == "bf16")
                first_losses[name] = step()
                steps[name] = (before[name], step)
            torch.testing.assert_close(*first_losses.values(), rtol=2e-2, atol=0)
            seconds = interleaved(steps, args.rounds, args.device)
            for name, value in seconds.items():
                ratio, speed = value / seconds["hf_models"], real / value
                print(
                    f"{shape:<14} {setting:<13} {name:<13} {value * 1e3:9.1f} ms {speed:10,.0f} tokens/s {ratio:6.2f}x",
                    flush=True,
                )
            del models, model, steps, step
            gc.collect()


def benchmark_memory(args):
    for shape in args.shapes:
        batches = make_batches(shape, args.data, args.full_length)
        builders = {"hf_models": build, "transformers": build_stock}
        compare_memory(shape, builders, lambda model, batches=batches: training_step(model, batches, "cpu"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "memory"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["bert-base"])
    parser.add_argument("--settings", nargs="+", default=["as it comes", "same matmul", "bf16"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--data", default="embedded", help="texts whose sentence pairs give the lengths")
    parser.add_argument("--full_length", action="store_true", help="every text as long as the longest")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    globals()[f"benchmark_{args.what}"](args)


if __name__ == "__main__":
    main()
