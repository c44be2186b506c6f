"""The one training loop: steps, accumulation, logging, checkpoints, evaluation, resume.

A train script prepares a model, its data and its validation inside `open_run`, and hands them to `train`. The loop
promises:

- The global batch is the unit. Sample (step, position) is the same however many processes and micro-batches share the
  work, and the loss of a step is one sum over the global batch, divided by what was counted before the first forward.
- Nothing random survives a step. Data is a function of (seed, step), dropout of (seed, step, rank, micro-batch), so a
  run resumes by loading a checkpoint and setting the step.
- A step is saved before it is evaluated. A run that is stopped during an evaluation loses nothing: the same command
  loads that step and evaluates it.
- A killed run, started again with the same command, ends with the same weights, bit for bit.
"""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from training.run.arguments import RunArguments, one_line, print_error, user_errors
from training.run.checkpoint import Checkpoints, gather_training_state
from training.run.costs import Costs, measured_costs
from training.run.folder import check_identity
from training.run.log import MetricsLog
from training.run.optim import EMA, create_optimizers, set_learning_rate
from training.run.processes import (
    StopRequest,
    keep_inputs,
    micro_batches,
    on_main_process,
    sum_over_processes,
)
from training.run.resume import compare_with_best, resume, return_to_best
from training.run.seeds import seed_from


class TrainingData(Protocol):
    """What the loop asks of a train script's data."""

    def batch(self, step: int, positions: range) -> dict[str, Any]:
        """Returns the model's inputs for these positions of the global batch of this step, on the CPU: tensors, or
        lists and dicts of tensors."""

    def num_items(self, batch: dict[str, Any]) -> float | dict[str, float]:
        """Returns this batch's part of what the summed loss is divided by, such as the scored tokens of a language
        model. A dict where the loss has several terms, each with a divisor of its own."""

    def num_units(self, batch: dict[str, Any]) -> int:
        """Returns what the throughput counts: tokens without padding, images, examples."""

    def external_files(self) -> dict[str, dict]:
        """Returns size and sha256, by path, of the files outside a checkpoint that resuming from it needs."""


class Validation(Protocol):
    """What the loop asks of a train script's validation."""

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Returns the measured values (`eval_loss`, ...) of the prepared model, which is in evaluation mode. Every
        process calls it; the values of the first process count."""


# ------------------------------------------------------------------------------------------------------- the loop


def train(
    args: RunArguments,
    accelerator: Accelerator,
    model: nn.Module,
    data: TrainingData,
    validation: Validation,
    identity: dict,
    *,
    unit: str,
    row_length: int | None = None,
    monitor: str | None = None,
    augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    after_step: Callable[[nn.Module, int], None] | None = None,
    rate_scales: dict[str, float] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains until `args.max_steps`, from the newest sound checkpoint in the output folder if there is one.

    Args:
        identity: from `training.run.folder.identify`.
        unit: what `data.num_units` counts, in the plural: "tokens" are logged as `tokens_per_second`.
        row_length: how many units a sample has room for; the used part is logged as `fill`.
        monitor: the measured value that says which evaluation was the best. If its name ends in "loss",
            "perplexity" or "error" less is better, otherwise more. The checkpoint of the best evaluation is kept,
            and after `args.patience` evaluations in a row without a better one the training ends.
        augment: turns a batch of `data`, once it is on the device, into the model's inputs. It draws nothing: random
            numbers are in the batch.
        after_step: called on every process with the prepared model and the step (from 0) when the optimizers have
            moved the weights, before the moving average takes them in and before anything is saved or measured. What
            it changes in the model (a teacher's weights, say) must depend on the weights and the step alone.
        rate_scales: factors of the learning rate of modules, by their names in the bare model.

    Returns:
        The model, with averaged weights where there is a moving average, and the values measured with these weights.
        Without `monitor` these are the last weights, with it those of the best evaluation, whose step is `best_step`.

    Raises:
        SystemExit: the folder holds another run or only damaged checkpoints (code 2, nothing written), the run was
            asked to stop (code 0, saved), or a loss is not finite (code 3).
    """
    output_dir = Path(args.output_dir)
    identity = {**identity, "mixed_precision": accelerator.mixed_precision}  # the launcher may have set it
    stop = StopRequest()
    if args.gradient_checkpointing:
        # transformers 5.24 renamed the method.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    optimizers = create_optimizers(
        model,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.beta1, args.beta2),
        matrix_learning_rate=args.matrix_learning_rate,
        layer_decay=args.layer_decay,
        rate_scales=rate_scales,
    )
    model, *optimizers = accelerator.prepare(model, *optimizers)
    if accelerator.is_fsdp2:
        keep_inputs(model)
    forward = torch.compile(model) if args.compile else model
    ema = EMA(model, args.ema_decay) if args.ema_decay else None
    checkpoints = Checkpoints(output_dir / "checkpoints", keep=args.keep_checkpoints)
    with user_errors():
        if args.patience and monitor is None:
            raise ValueError("patience waits for a better evaluation, which this script does not define: leave it at 0")
        on_main_process(accelerator, lambda: check_identity(output_dir, identity))
        progress = resume(accelerator, args, checkpoints, model, optimizers, ema, monitor)
        log = MetricsLog(accelerator, args, output_dir, progress, unit, row_length)
    best = progress["best"]
    costs = Costs(accelerator, progress)
    shares = micro_batches(args, accelerator.process_index, accelerator.num_processes)
    results: dict[str, Any] = {}

    def has_ended() -> bool:
        return progress["step"] == args.max_steps or 0 < args.patience <= best["num_worse"]

    def is_evaluated(step: int) -> bool:
        return step == args.max_steps or (args.eval_every > 0 and step % args.eval_every == 0)

    def save():
        costs.write(progress)
        tensors, state = gather_training_state(model, [optimizer.optimizer for optimizer in optimizers])
        tensors |= {"ema": ema.state_dict()} if ema else {}
        state |= {"progress": progress, "max_steps": args.max_steps}
        with user_errors():  # otherwise the full disk of one process would leave the others waiting
            step, files = progress["step"], data.external_files()
            on_main_process(accelerator, lambda: checkpoints.save(step, tensors, state, files, best["step"]))

    def measure() -> dict[str, Any]:
        torch.manual_seed(seed_from(args.seed, progress["step"]))
        model.eval()
        measured = validation.measure(model)
        model.train()
        return on_main_process(accelerator, lambda: measured)  # all processes have to decide the same

    def evaluate():
        """Measures the step that was saved last, and compares it with the best one."""
        nonlocal results
        with ema.swap() if ema else contextlib.nullcontext():
            results = measure()
        progress["evaluated_step"] = progress["step"]
        log.write_evaluation(results)
        if monitor:
            compare_with_best(best, progress["step"], results)
        if has_ended():
            costs.write(progress)
            if progress["num_steps"]:  # out of patience: the steps since the last line
                log.write_training()
        end_if_asked(*sum_over_processes(accelerator, [bool(stop)]))

    def end_if_asked(num_asked: float):
        """Ends the run, whose last step is saved, if any process was asked to stop."""
        if num_asked:
            log.close()
            accelerator.print(
                f"stopped by {stop.reason or 'another process'} after step {progress['step']}; "
                "the same command goes on from there"
            )
            accelerator.end_training()
            raise SystemExit(0)

    model.train()
    if isinstance(model, DistributedDataParallel):
        settle_buckets(accelerator, model, data, data.batch(progress["step"], shares[0]), augment)
    if is_evaluated(progress["step"]) and progress["evaluated_step"] != progress["step"]:
        evaluate()  # the run ended between the save of this step and its evaluation
    while not has_ended():
        started, step = time.perf_counter(), progress["step"]
        learning_rate = set_learning_rate(args, optimizers, step)
        losses, num_units = accumulate_gradients(args, accelerator, model, forward, data, step, shares, augment)
        loss, num_asked = sum_over_processes(accelerator, [sum(torch.stack(losses).tolist()), bool(stop)])
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
        if after_step:
            after_step(model, step)
        if ema:
            ema.update(step)

        progress["step"] = step + 1
        costs.update()
        log.add(loss, num_units, time.perf_counter() - started, learning_rate, gradient_norm)
        if has_ended() or progress["step"] % args.log_every == 0:
            log.write_training()
        is_saved = args.save_every > 0 and progress["step"] % args.save_every == 0
        if num_asked or is_saved or is_evaluated(progress["step"]):
            save()
        end_if_asked(num_asked)
        if is_evaluated(progress["step"]):
            evaluate()

    log.close()
    stop.close()
    if monitor:
        results = return_to_best(accelerator, args, checkpoints, progress, model, ema) or results
    if ema:
        ema.move_into_model()
    if not results:  # an earlier version evaluated before it saved: measure again, nothing is trained
        results = measure()
    model.eval()
    return model, {**results, **measured_costs(progress)}


def accumulate_gradients(
    args, accelerator, model, forward, data: TrainingData, step: int, shares: list[range], augment=None
) -> tuple[list[Tensor], float]:
    """Computes the gradient of the whole global batch, by a forward and a backward pass for each share of this process.

    Returns:
        The part of the loss of each pass, and the number of units in the global batch.
    """
    batches = [data.batch(step, positions) for positions in shares]
    num_items, num_units = count(accelerator, data, batches)
    losses = []
    for number, batch in enumerate(batches):
        torch.manual_seed(seed_from(args.seed, step, accelerator.process_index, number))
        is_last = number == len(batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            batch = move(batch, accelerator.device, augment)
            try:
                loss = forward(**batch, num_items_in_batch=num_items).loss
            except ValueError as error:  # a detector refuses a box that is not finite, and names the image
                where = f"positions {shares[number].start}..{shares[number].stop - 1} of its global batch"
                print_error(f"step {step + 1}, {where}: {one_line(error)}; nothing was saved")
                raise SystemExit(3) from error
            # The loss is a sum over the global batch, but processes average their gradients.
            accelerator.backward(loss * accelerator.num_processes)
        losses.append(loss.detach())
    return losses, num_units


def move(batch: dict[str, Any], device: torch.device, augment=None) -> dict[str, Any]:
    """Returns the batch on the device, as the model takes it. Its values are tensors, or lists and dicts of tensors."""
    batch = send_to_device(batch, device, non_blocking=True)
    return augment(batch) if augment else batch


def count(
    accelerator: Accelerator, data: TrainingData, batches: list[dict[str, Any]]
) -> tuple[Tensor | dict[str, Tensor], float]:
    """Counts what the batches of all processes contain.

    Returns:
        What to divide the loss by, or each of its terms if there are several, and the number of units. A term for which
        nothing was counted is 0, and is divided by 1.
    """
    counts = [data.num_items(batch) for batch in batches]
    terms = [items if isinstance(items, dict) else {"loss": items} for items in counts]
    sums = [sum(items[name] for items in terms) for name in terms[0]]
    *sums, num_units = sum_over_processes(accelerator, [*sums, sum(data.num_units(batch) for batch in batches)])
    # They are tensors, since a compiled model would be compiled again for every new number.
    divisors = [torch.tensor(total or 1.0, dtype=torch.float32, device=accelerator.device) for total in sums]
    named = dict(zip(terms[0], divisors, strict=True))
    return named if isinstance(counts[0], dict) else named["loss"], num_units


def settle_buckets(
    accelerator: Accelerator, model: DistributedDataParallel, data: TrainingData, batch: dict, augment=None
):
    """Does a backward pass whose gradient is thrown away, before the first step.

    After its first backward pass DDP arranges the gradients in memory anew, and with more than two processes the
    arrangement decides the order of additions. Without this pass, the first step after a resume would differ in the
    last bits from the same step of an uninterrupted run.
    """
    num_items, _ = count(accelerator, data, [batch])
    batch = move(batch, accelerator.device, augment)
    accelerator.backward(model(**batch, num_items_in_batch=num_items).loss * 0)
    model.zero_grad()


def refuse_non_finite(accelerator, args, step, shares, losses):
    """Ends every process. The message names the step, and the samples whose loss is infinite or not a number."""
    bad = [positions for positions, loss in zip(shares, losses, strict=True) if not math.isfinite(loss)]
    bad = gather_object([f"{positions.start}..{positions.stop - 1}" for positions in bad])
    what = f"loss of step {step + 1} is not finite, from positions {', '.join(bad)} of its global batch"
    if not bad:
        what = f"gradient of step {step + 1} is not finite, though the loss is, for its global batch"
    if accelerator.is_main_process:
        print_error(
            f"the {what} (samples {step * args.global_batch_size} and on); the weights were not updated and nothing "
            "was saved. Look at these samples, or lower --learning_rate in another --output_dir or with --restart"
        )
    accelerator.end_training()
    raise SystemExit(3)
