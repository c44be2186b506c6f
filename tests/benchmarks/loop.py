"""What `training/run/loop.py` adds to a bare training step: it may be 3 % at most.

    python tests/benchmarks/loop.py [--rounds 5]

Blocks of steps through the loop alternate with blocks of the same model, data and optimizer in ten plain lines. In
the loop a step's time is taken from one request for data to the next, so everything in between counts.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch

import hf_models
from training.run.arguments import RunArguments
from training.run.loop import train
from training.run.optim import create_optimizers
from training.run.processes import create_accelerator

BATCH, TOKENS, STEPS = 16, 256, 8


class RandomTokens:
    """The same rows for both; notes when it was asked."""

    def __init__(self, vocab_size):
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(vocab_size, (BATCH, TOKENS + 1), generator=generator)
        self.asked = []

    def batch(self, step, positions):
        self.asked.append(time.perf_counter())
        return {"input_ids": self.rows[:, :-1], "shift_labels": self.rows[:, 1:].contiguous()}

    def num_items(self, batch):
        return batch["shift_labels"].numel()

    num_units = num_items

    def external_files(self):
        return {}


class NoValidation:
    def measure(self, model):
        return {}


def in_the_loop(accelerator, data):
    """Seconds of each step but the first through `train`."""
    with tempfile.TemporaryDirectory() as folder:
        args = RunArguments(
            output_dir=str(Path(folder, "run")),
            max_steps=STEPS + 1,
            global_batch_size=BATCH,
            eval_every=0,
            save_every=0,
        )
        data.asked.clear()
        with contextlib.redirect_stderr(io.StringIO()):
            train(args, accelerator, hf_models.create_model("gpt-mini"), data, NoValidation(), {}, unit="tokens")
    return [end - start for start, end in zip(data.asked[1:], data.asked[2:], strict=False)]


def bare(data):
    """The same steps in a plain loop."""
    model = hf_models.create_model("gpt-mini").train()
    (optimizer,) = create_optimizers(model, optimizer="adamw", learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.99))
    data.asked.clear()
    for _ in range(STEPS + 1):
        batch = data.batch(0, range(BATCH))
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [end - start for start, end in zip(data.asked[1:], data.asked[2:], strict=False)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    accelerator = create_accelerator(RunArguments(output_dir="unused", global_batch_size=BATCH))
    data = RandomTokens(hf_models.create_config("gpt-mini").vocab_size)
    looped, plain, ratios = [], [], []
    for _ in range(args.rounds):
        looped.append(statistics.median(in_the_loop(accelerator, data)))
        plain.append(statistics.median(bare(data)))
        ratios.append(looped[-1] / plain[-1])
        print(f"loop {looped[-1] * 1e3:8.1f} ms   bare {plain[-1] * 1e3:8.1f} ms   {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
