"""The process under test: a train script, with a fault that strikes at a place named by the test.

    python tests/faults/trainer.py [--script train_gpt] [--fault ACTION:PLACE:N[@RANK]] ... [options of the script]
    python tests/faults/trainer.py --serve

The fault strikes before the N-th call (from 1) of a place in PLACES, on one rank or on all. With `--serve` the
imports are made once, and every line of JSON on stdin forks a process that trains: {"argv", "env", "folder"} is
answered by its id, {"wait": id} by its exit status.
"""

import errno
import faulthandler
import functools
import importlib
import inspect
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import constants

from hf_models import ZooGPTForCausalLM
from training import train_gpt
from training.data import shards
from training.data.documents import Corpus, Documents
from training.hub import finish
from training.run import checkpoint, log, loop, processes
from training.text import stream
from training.text import tokens as text

PLACES = {
    "step": (loop, "accumulate_gradients"),
    "update": (loop.EMA, "update"),  # the weights have moved, their average has not
    "file": (checkpoint, "_write_tensors"),  # three of them in a checkpoint: weights, optimizer, average
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "rotation": (checkpoint.Checkpoints, "_rotate"),
    "evaluation": (train_gpt, "take_turns"),
    "log": (log.MetricsLog, "_write"),
    "curves": (finish, "curves"),  # near the end of the final export
    "forward": (ZooGPTForCausalLM, "forward"),
    "clip": (Accelerator, "clip_grad_norm_"),
    "shard": (shards, "write_atomic"),
}


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def orphan():
    launcher = os.getppid()
    os.kill(launcher, signal.SIGKILL)
    while os.getppid() == launcher:
        time.sleep(0.01)


ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "orphan": orphan,
    "full": full_disk,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "nan": lambda: None,  # acts on the result
}


def arm(fault: str):
    """Replaces the place's function by one that counts its calls."""
    fault, _, rank = fault.partition("@")
    if rank and os.environ.get("RANK", "0") != rank:
        return
    action, place, number = fault.split(":")
    owner, name = PLACES[place]
    function, calls = getattr(owner, name), 0

    def struck(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == int(number):
            ACTIONS[action]()
        result = function(*arguments, **options)
        if action == "nan" and calls == int(number):
            if place == "clip":
                return result * torch.nan
            result.loss = result.loss * torch.nan
        return result

    setattr(owner, name, struck)


def record_rows(path: str):
    """Appends to the file which rows of the training data this process took a gradient of."""
    rows = text.TokenRows.rows

    def recorded(self, first, count):
        if any(frame.function == "accumulate_gradients" for frame in inspect.stack(0)):
            with open(path, "a") as file:
                file.write("".join(f"{row}\n" for row in range(first, first + count)))
        return rows(self, first, count)

    text.TokenRows.rows = recorded


def stream_lines(path: str):
    """Makes the training text a stream of its lines, in shards of few rows."""

    def corpus(*_, **__):
        lines = [line for line in Path(path).read_text().splitlines() if line]
        held_out = lines[-20:]
        return Corpus(
            Documents.of(lambda: iter(lines[:-20])),
            Documents.of(lambda: iter(held_out)),
            fingerprint=f"lines of {path}",
            source="a stream",
            streamed=True,
        )

    train_gpt.read_documents = corpus
    initialise = stream.StreamedTokens.__init__
    stream.StreamedTokens.__init__ = lambda *args, **options: initialise(*args, **{**options, "rows_per_shard": 16})


def cache(folder: str):
    """Keeps tokens elsewhere than in the cache of all tests."""
    constants.HF_HOME = folder


def compile_with(backend: str):
    """A faster compiler for --compile."""
    torch.compile = functools.partial(torch.compile, backend=backend)


def best_at(step: str):
    """Makes the evaluation after this step the best one for whoever monitors the loss."""
    compare = loop.compare_with_best

    def compared(best: dict, at: int, results: dict):
        compare(best, at, {**results, "eval_loss": abs(at - int(step))})

    loop.compare_with_best = compared


HOOKS = {
    "--fault": arm,
    "--best_at": best_at,
    "--record": record_rows,
    "--stream": stream_lines,
    "--cache": cache,
    "--compile_with": compile_with,
}


def main(argv: list[str]):
    script = "train_gpt"
    while argv and argv[0] in {"--script", *HOOKS}:
        name, value, *argv = argv
        if name == "--script":
            script = value
        else:
            HOOKS[name](value)
    sys.argv = [f"training/{script}.py", *argv]
    importlib.import_module(f"training.{script}").main()


def serve():
    scripts = ("train_bert", "finetune_bert", "train_vit", "train_detr")
    for module in (*(f"training.{script}" for script in scripts), "sklearn.linear_model", "faster_coco_eval"):
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(wait(request["wait"], request["seconds"]), flush=True)
        elif (child := os.fork()) == 0:
            run_in_child(**request)
        else:
            print(child, flush=True)


def wait(child: int, seconds: float) -> int:
    """The exit status of the child; it is stopped with SIGABRT, which prints where it hangs, after these seconds."""
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.02)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)
            deadline += 10
    return ended[1]


def run_in_child(argv: list[str], env: dict[str, str], folder: str):
    """Trains, and ends this process with the exit code that the interpreter would end with."""
    os.setsid()
    for descriptor, name in enumerate(["/dev/null", f"{folder}/stdout", f"{folder}/stderr"]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    os.environ.update(env)
    processes.LAUNCHER = os.getppid()
    faulthandler.enable()
    code = 0
    try:
        main(argv)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main(sys.argv[1:])
