"""The one training loop: steps, accumulation, logging, evaluation, checkpoints, resume.

A train script prepares a model and its data inside `open_run`, and hands both to `train`. What the loop promises:

- The global batch is the unit. Sample (step, position) is the same however many processes and micro-batches share the
  work, and the loss of a step is one sum over the global batch, divided by what was counted before the first forward.
- Nothing random survives a step. Data is a function of (seed, step), dropout of (seed, step, rank, micro-batch): to
  resume is to load a checkpoint and set the step.
- A killed run, started again with the same command, ends with the same weights, bit for bit.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from training.arguments import RunArguments, one_line, print_error, user_errors
from training.checkpoint import (
    Checkpoint,
    Checkpoints,
    gather_training_state,
    restore_training_state,
)
from training.optim import EMA, create_optimizers, learning_rate_factor
from training.results import MetricsLog
from training.run_folder import RunLock, check_identity, move_aside

LAUNCHER = os.getppid()  # read at the start, so that its end is noticed whenever it comes
IS_LAUNCHED = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by `accelerate launch` for its children

# Were DDP the last owner of a gloo group, it would join the group's threads while it holds Python's lock, which they
# may be waiting for, and the process would hang at its end. So another reference is kept here.
process_groups: list[dist.ProcessGroup] = []


class TrainingData(Protocol):
    """What the loop asks of a train script's data."""

    def batch(self, step: int, positions: range) -> dict[str, Tensor]:
        """The model's inputs for these positions of the global batch of this step, on the CPU."""

    def num_items(self, batch: dict[str, Tensor]) -> int:
        """How many terms the summed loss of this batch has: tokens for a language model."""

    def external_files(self) -> dict[str, dict]:
        """Files outside the checkpoint that resuming needs: path -> size and sha256."""


# ---------------------------------------------------------------------------------------------------- beginning


@contextlib.contextmanager
def open_run(args: RunArguments):
    """The accelerator, and the output folder held for this run alone; with `--restart` an earlier run in it is first
    moved aside. What the user has to mend ends the script with one line: a wrong option here, a full disk anywhere."""
    with contextlib.ExitStack() as held:

        def take_folder():
            if args.restart and (aside := move_aside(args.output_dir)):
                print(f"moved the earlier run to {aside}", flush=True)
            held.enter_context(RunLock(args.output_dir))

        with user_errors():
            accelerator = create_accelerator(args)
            on_main_process(accelerator, take_folder)
        try:
            yield accelerator
        except OSError as error:
            print_error(one_line(error))
            raise SystemExit(2) from None


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Calls `action` on the main process, and gives every process what it returns.

    Raises:
        ValueError: `action` raised ValueError or OSError; on every process, so that all of them stop.
    """
    result = error = None
    if accelerator.is_main_process:
        try:
            result = action()
        except (ValueError, OSError) as caught:
            error = one_line(caught)
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise ValueError(error)
    return result


def create_accelerator(args: RunArguments) -> Accelerator:
    """The processes and devices that `accelerate launch` configured.

    Raises:
        ValueError: a configuration under which the promises above cannot hold, or a global batch that does not divide.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(
                f"{name.lower()} of accelerate owns optimizer, checkpoint or data, so a run could not resume exactly: "
                "use FSDP2, as in training/accelerate/fsdp2.yaml"
            )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    accelerator.wait_for_everyone()  # none is still connecting when another one refuses
    if dist.is_initialized():
        process_groups.append(dist.group.WORLD)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate takes FSDP up on accelerators only and would train with DDP here, without a word.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the launcher's environment says
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported: set fsdp_version: 2, as in training/accelerate/fsdp2.yaml")
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # accelerate's own policy would also round the loss and the sum of gradients to bfloat16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision {accelerator.mixed_precision!r} is not supported: use 'bf16' or 'no'")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("leave gradient_accumulation_steps of accelerate at 1: --micro_batch_size decides that here")
    micro_batches(args, accelerator.process_index, accelerator.num_processes)
    if accelerator.device.type == "cpu":
        use_all_cores()
        speed_up_cpu_matmul()
    torch.manual_seed(args.seed)
    return accelerator


def micro_batches(args: RunArguments, rank: int, num_processes: int) -> list[range]:
    """The positions of the global batch that this process works on, one range per forward pass.

    Raises:
        ValueError: the global batch does not divide by the processes, or a process's share by the micro-batch.
    """
    share, rest = divmod(args.global_batch_size, num_processes)
    if rest:
        raise ValueError(f"global_batch_size {args.global_batch_size} does not divide by {num_processes} processes")
    micro = args.micro_batch_size or share
    if share % micro:
        raise ValueError(
            f"each of {num_processes} processes has {share} samples of the global batch, which does not divide by "
            f"micro_batch_size {micro}"
        )
    first = rank * share
    return [range(start, start + micro) for start in range(first, first + share, micro)]


def use_all_cores():
    """Divides the cores among this machine's processes. `accelerate launch` gives each process a single thread unless
    `--num_cpu_threads_per_process` says otherwise; another number is left alone."""
    if os.environ.get("OMP_NUM_THREADS") == "1" and IS_LAUNCHED:
        cores = psutil.cpu_count(logical=False) or os.cpu_count()
        if hasattr(os, "sched_getaffinity"):
            cores = min(cores, len(os.sched_getaffinity(0)))  # of those this job may use
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def speed_up_cpu_matmul() -> bool:
    """Lets oneDNN do float32 matrix products, which on some CPUs is twice as fast as the default library.

    Where the CPU has bfloat16 matrix units the same setting would round to bfloat16, so it is kept only if a product
    stays as exact as before. Returns whether it was kept.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    exact = left.double() @ right.double()
    matmul.fp32_precision = "bf16"
    if not (is_exact := bool((left @ right - exact).abs().max() < 1e-3)):
        matmul.fp32_precision = before
    return is_exact


def seed_from(*numbers: int) -> int:
    """A seed that depends on all the numbers, the same on every machine."""
    numbers = (len(numbers), *numbers)  # or (1, 2) and (1, 2, 0) would be one
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def identify(args: RunArguments, model: nn.Module, fingerprint: str, **more: Any) -> dict:
    """What makes a run this run: a resumed one has to agree in all of it.

    `max_steps` is part of it only where the learning rate of earlier steps depends on it: a constant schedule may
    grow until its cooldown begins (see `newest_checkpoint`).
    """
    fields = ["seed", "global_batch_size", "optimizer", "learning_rate", "matrix_learning_rate", "weight_decay"]
    fields += ["beta1", "beta2", "schedule", "warmup_steps", "cooldown_steps", "final_learning_rate"]
    fields += ["max_grad_norm", "ema_decay"]
    if args.schedule != "constant":
        fields.append("max_steps")
    config = model.config.to_dict()
    for key in ("transformers_version", "_name_or_path", "auto_map", "architectures", "zoo_version"):
        config.pop(key, None)
    return {"data": fingerprint, "model": config, **{name: getattr(args, name) for name in fields}, **more}


# ------------------------------------------------------------------------------------------------------- the loop


class StopRequest:
    """Whether to save and stop: after SIGTERM or Ctrl-C, or when the launcher that started this process is gone.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self.reason: str | None = None
        self._launcher = LAUNCHER if IS_LAUNCHED else None
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        self.reason = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self):
        if self.reason is None and self._launcher not in (None, os.getppid()):
            self.reason = "the end of its launcher"
        return self.reason is not None

    def close(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def train(
    args: RunArguments,
    accelerator: Accelerator,
    model: nn.Module,
    data: TrainingData,
    evaluate: Callable[[nn.Module], dict[str, Any]],
    identity: dict,
    *,
    unit: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains until `args.max_steps`, from the newest sound checkpoint in the output folder if there is one.

    Args:
        evaluate: from the prepared model, on every process, to the measured values (`eval_loss`, ...).
        identity: from `identify`.
        unit: what `data.num_items` counts, for the throughput: "tokens".

    Returns:
        The model, with averaged weights where there is a moving average, and the last evaluation's values.

    Raises:
        SystemExit: the folder holds another run or only damaged checkpoints (code 2, nothing written), the run was
            asked to stop (code 0, saved), or a loss is not finite (code 3).
    """
    output_dir = Path(args.output_dir)
    stop = StopRequest()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizers = create_optimizers(
        model,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.beta1, args.beta2),
        matrix_learning_rate=args.matrix_learning_rate,
    )
    model, *optimizers = accelerator.prepare(model, *optimizers)
    forward = torch.compile(model) if args.compile else model
    ema = EMA(model, args.ema_decay) if args.ema_decay else None
    checkpoints = Checkpoints(output_dir / "checkpoints", keep=args.keep_checkpoints)
    with user_errors():
        on_main_process(accelerator, lambda: check_identity(output_dir, identity))
        progress = resume(accelerator, args, checkpoints, model, optimizers, ema)
    began = time.perf_counter() - progress["seconds"]
    log = MetricsLog(accelerator, args, output_dir, progress)
    shares = micro_batches(args, accelerator.process_index, accelerator.num_processes)

    def measure() -> dict[str, Any]:
        torch.manual_seed(seed_from(args.seed, progress["step"]))
        model.eval()
        results = evaluate(model)
        model.train()
        return results

    def save():
        progress["seconds"] = time.perf_counter() - began
        tensors, state = gather_training_state(model, [optimizer.optimizer for optimizer in optimizers])
        tensors |= {"ema": ema.state_dict()} if ema else {}
        state |= {"progress": progress, "max_steps": args.max_steps}
        with user_errors():  # or the full disk of one process would leave the others waiting
            step, files = progress["step"], data.external_files()
            on_main_process(accelerator, lambda: checkpoints.save(step, tensors, state, files))

    if isinstance(model, DistributedDataParallel):
        settle_buckets(accelerator, model, data.batch(progress["step"], shares[0]))
    results: dict[str, Any] = {}
    model.train()
    for step in range(progress["step"], args.max_steps):
        started = time.perf_counter()
        learning_rate = set_learning_rate(args, optimizers, step)
        losses, num_items = accumulate_gradients(args, accelerator, model, forward, data, step, shares)
        loss, stops = sum_over_processes(accelerator, [sum(torch.stack(losses).tolist()), bool(stop)])
        if not math.isfinite(loss):
            refuse_non_finite(accelerator, args, step, shares, losses)
        gradient_norm = None
        if args.max_grad_norm:
            norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            gradient_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            if not math.isfinite(gradient_norm):
                refuse_non_finite(accelerator, args, step, shares, losses)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if ema:
            ema.update(step)

        progress["step"] = step + 1
        log.add(loss, num_items, time.perf_counter() - started)
        is_end = progress["step"] == args.max_steps
        if is_end or progress["step"] % args.log_every == 0:
            log.write_training(learning_rate, gradient_norm, unit)
        if is_end or (args.eval_every and progress["step"] % args.eval_every == 0):
            with ema.swap() if ema else contextlib.nullcontext():
                results = measure()
            log.write_evaluation(results)
        if stops or is_end or (args.save_every and progress["step"] % args.save_every == 0):
            save()
        if stops:
            log.close()
            accelerator.print(
                f"stopped by {stop.reason or 'another process'} after step {progress['step']}; "
                "the same command goes on from there"
            )
            accelerator.end_training()
            raise SystemExit(0)

    log.close()
    stop.close()
    if ema:
        ema.move_into_model()
    if not results:  # the run was complete before: measure again, nothing is trained
        results = measure()
    model.eval()
    results["wall_time_seconds"] = round(progress["seconds"], 1)
    return model, results


def set_learning_rate(args: RunArguments, optimizers: list[torch.optim.Optimizer], step: int) -> float:
    """Sets every group's learning rate for this step, and returns that of a group with the run's `learning_rate`."""
    factor = learning_rate_factor(
        step,
        schedule=args.schedule,
        max_steps=args.max_steps,
        warmup_steps=args.warmup_steps,
        cooldown_steps=args.cooldown_steps,
        final=args.final_learning_rate,
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
    return args.learning_rate * factor


def accumulate_gradients(
    args, accelerator, model, forward, data: TrainingData, step: int, shares: list[range]
) -> tuple[list[Tensor], float]:
    """The gradient of the whole global batch, by one forward and backward pass for each of this process's shares.

    Returns each pass's part of the loss, and how many items the global batch has.
    """
    batches = [data.batch(step, positions) for positions in shares]
    num_items = sum_over_processes(accelerator, [sum(data.num_items(batch) for batch in batches)])[0]
    divisor = torch.tensor(num_items, dtype=torch.float32, device=accelerator.device)  # compiled once; a number is not
    losses = []
    for number, batch in enumerate(batches):
        torch.manual_seed(seed_from(args.seed, step, accelerator.process_index, number))
        is_last = number == len(batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            loss = forward(**batch, num_items_in_batch=divisor, use_cache=False).loss
            # Processes average their gradients, and the loss is a sum over the global batch.
            accelerator.backward(loss * accelerator.num_processes)
        losses.append(loss.detach())
    return losses, num_items


def settle_buckets(accelerator: Accelerator, model: DistributedDataParallel, batch: dict[str, Tensor]):
    """A backward pass for nothing, before the first step. After its first one DDP lays the gradients out anew, and
    among more than two processes their place decides the order of additions: without this, the first step after a
    resume would differ from the same step of an uninterrupted run in the last bits."""
    batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
    accelerator.backward(model.eval()(**batch, num_items_in_batch=1, use_cache=False).loss * 0)
    model.zero_grad()


def sum_over_processes(accelerator: Accelerator, values: list) -> list[float]:
    """Each value summed over all processes, as Python numbers."""
    if accelerator.num_processes > 1:
        values = [torch.as_tensor(value, dtype=torch.float64, device=accelerator.device) for value in values]
        values = reduce(torch.stack(values), reduction="sum").tolist()
    return [float(value) for value in values]


def refuse_non_finite(accelerator, args, step, shares, losses):
    """Ends every process, naming the step, and the samples if it is their loss that is infinite or not a number."""
    bad = [positions for positions, loss in zip(shares, losses, strict=True) if not math.isfinite(loss)]
    bad = gather_object([f"{positions.start}..{positions.stop - 1}" for positions in bad])
    what = f"loss of step {step + 1} is not finite, from positions {', '.join(bad)} of its global batch"
    if not bad:
        what = f"gradient of step {step + 1} is not finite, though the loss is, for its global batch"
    if accelerator.is_main_process:
        print_error(
            f"the {what} (samples {step * args.global_batch_size} and on); the weights were not updated and nothing "
            "was saved. Lower --learning_rate or look at these samples"
        )
    accelerator.end_training()
    raise SystemExit(3)


def resume(accelerator, args, checkpoints: Checkpoints, model, optimizers, ema: EMA | None) -> dict[str, Any]:
    """Loads the newest sound checkpoint on every process; returns the progress that it holds, or a fresh one."""
    checkpoint = on_main_process(accelerator, lambda: newest_checkpoint(args, checkpoints))
    if checkpoint is None:
        return {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "num_items": 0.0, "num_steps": 0, "interval_seconds": 0.0}
    restore_training_state(model, [optimizer.optimizer for optimizer in optimizers], checkpoint)
    if ema:
        ema.load_state_dict(on_main_process(accelerator, lambda: checkpoint.tensors("ema")))
    return checkpoint.state["progress"]


def newest_checkpoint(args: RunArguments, checkpoints: Checkpoints) -> Checkpoint | None:
    """The newest sound checkpoint, after saying which were passed over; None if there is none at all.

    Raises:
        ValueError: there are checkpoints but all are damaged, or `max_steps` is not one this run can still have.
    """
    path, skipped = checkpoints.newest_verified()
    for line in skipped:
        print(f"skipped {line}", flush=True)
    if path is None:
        return None
    checkpoint = checkpoints.load(path)
    planned = checkpoint.state["max_steps"]
    if checkpoint.step > args.max_steps:
        raise ValueError(f"{path} is already behind max_steps {args.max_steps}: give at least {checkpoint.step}")
    cooldown_begins = min(planned, args.max_steps) - args.cooldown_steps
    if args.max_steps != planned and args.cooldown_steps and checkpoint.step > cooldown_begins:
        raise ValueError(
            f"{path} is in the cooldown before step {planned}, so max_steps cannot become {args.max_steps}: repeat the "
            f"run with {planned}, or remove the checkpoints after step {cooldown_begins} to go on from before it"
        )
    print(f"resuming from {path}", flush=True)
    return checkpoint
