"""The end of a run: its output folder becomes a checkpoint that loads anywhere, with results, curves and a card."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL.Image import Image
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_models.verify import write_checksums
from training.figures import curves
from training.hub.card import public_name, public_path, write_card
from training.hub.publish import push
from training.hub.snapshots import MAX_SHARD_SIZE, WEIGHTS
from training.hub.snippets import snippet
from training.run.arguments import RunArguments, is_checkpoint, one_line, recipe_fingerprint, user_errors
from training.run.checkpoint import gather_training_state
from training.run.folder import write_atomic


class DataSource(Protocol):
    """Where training data is from: what a card says about it."""

    source: str
    fingerprint: str
    license: str | None


def finish(
    args: RunArguments,
    accelerator: Accelerator,
    model: nn.Module,
    processor,
    results: dict[str, Any],
    *,
    task: str,
    data: DataSource,
    pictures: dict[str, Figure | Image] | None = None,
):
    """Makes the output folder a checkpoint that loads anywhere: weights, code, processor, card, curves, results.

    Every process calls it. With `--push_to_hub` the main process also publishes the folder.

    Args:
        processor: the tokenizer or image processor.
        results: what was measured.
        task: a name of `training.hub.snippets.USES`, mostly the pipeline that the model is for.
        data: the training data, or another object that says where it is from.
        pictures: pictures besides the curves, by the names of their files; see `card.PICTURES`.
    """
    output_dir = Path(args.output_dir)
    tensors, _ = gather_training_state(model, [])
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    # FSDP2 puts a class of its own in place of the model's, and its code would be saved as the model's.
    bare.__class__ = next(kind for kind in type(bare).__mro__ if not issubclass(kind, FSDPModule))
    if accelerator.is_main_process:
        staging = output_dir / ".export"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            bare.save_pretrained(staging, state_dict=tensors["model"], max_shard_size=MAX_SHARD_SIZE)
        except SafetensorError as error:  # this is how safetensors reports a full disk
            raise OSError(f"writing the weights to {staging} failed: {one_line(error)}") from error
        processor.save_pretrained(staging)
        (output_dir / "eval_results.json").unlink(missing_ok=True)  # it does not describe the new weights
        for path in output_dir.iterdir():
            if WEIGHTS.fullmatch(path.name) and not (staging / path.name).exists():  # the shards of an earlier export
                path.unlink()
        for path in sorted(staging.iterdir()):
            if path.is_dir():  # such as a tokenizer's templates; os.replace does not replace a folder
                shutil.rmtree(output_dir / path.name, ignore_errors=True)
            os.replace(path, output_dir / path.name)
        staging.rmdir()
        code = snippet(args.output_dir, task)
        origins = [args.model, getattr(args, "backbone_weights", None)]
        measured = {
            **results,
            "family": type(bare).__name__,
            "parameters": bare.num_parameters(),
            "task": task,
            "model": None if is_checkpoint(args.model) else args.model,
            "started_from": [public_name(name) for name in origins if name and is_checkpoint(name)],
            "command": launch_command(args, accelerator),
            "recipe": args.recipe and public_path(args.recipe),
            "recipe_fingerprint": args.recipe and recipe_fingerprint(args.recipe),
            "data": {
                "source": args.data_name or data.source,
                "fingerprint": data.fingerprint,
                "licence": args.data_license or data.license,
            },
            "hardware": describe_hardware(accelerator),
            "versions": versions(),
        }
        write_atomic(output_dir / "eval_results.json", json.dumps(measured, indent=1, ensure_ascii=False) + "\n")
        for name, picture in {"curves.png": curves(output_dir / "metrics.jsonl"), **(pictures or {})}.items():
            save = picture.savefig if isinstance(picture, Figure) else picture.save
            save(output_dir / name)
        write_checksums(output_dir)
        write_card(output_dir)
        print(f"\nThe model is in {output_dir}. To use it:\n\n{code}", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:  # no other process has to wait for the upload
        with user_errors():
            print(f"published to {push(output_dir, args.hub_model_id, args.hub_private)}", flush=True)


def launch_command(args: RunArguments, accelerator: Accelerator) -> str:
    """Returns the command of this run without paths of this machine. It spells out what a configuration file told
    `accelerate launch`."""
    words = ["accelerate", "launch", "--num_processes", str(accelerator.num_processes)]
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        words.append("--cpu")
    if accelerator.is_fsdp2:
        words += ["--use_fsdp", "--fsdp_version", "2"]
    if args.mixed_precision is None and accelerator.mixed_precision != "no":
        words += ["--mixed_precision", accelerator.mixed_precision]
    return shlex.join([*words, *(public_path(word) for word in without_one_time_options(sys.argv))])


def without_one_time_options(words: list[str]) -> list[str]:
    """Returns the words of a command without the options that publish or begin again, which nobody wants to repeat."""
    kept, is_value = [], False
    for word in words:
        name = word.split("=")[0]
        is_option = name in ("--restart", "--push_to_hub", "--hub_private", "--hub_model_id")
        if not is_option and not (is_value and not word.startswith("--")):
            kept.append(word)
        is_value = is_option and "=" not in word
    return kept


def describe_hardware(accelerator: Accelerator) -> str:
    """Returns the number of processes and the device of each."""
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        number = torch.get_num_threads()
        device = f"{processor_name()}, {number} thread{'s' * (number > 1)}"
    return f"{accelerator.num_processes} x {device}"


def processor_name() -> str:
    """Returns the name of the CPU as the system knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Returns the versions of everything that a measured number may depend on."""
    import accelerate
    import transformers

    import hf_models

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "hf_models": hf_models.__version__,
    }
