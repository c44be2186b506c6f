"""How a run begins, from its newest sound checkpoint, and how it ends, with the weights of its best evaluation."""

import math
from typing import Any

from accelerate import Accelerator

from training.run.arguments import RunArguments, user_errors
from training.run.checkpoint import Checkpoint, Checkpoints, find_damage, restore_training_state
from training.run.optim import EMA
from training.run.processes import on_main_process


def resume(
    accelerator, args, checkpoints: Checkpoints, model, optimizers, ema: EMA | None, monitor: str | None
) -> dict[str, Any]:
    """Loads the newest sound checkpoint on every process.

    Returns:
        `progress`, what JSON holds of the state of a run: from the checkpoint, or fresh if there is none.
    """
    best = {"monitor": monitor, "step": None, "value": None, "results": {}, "num_worse": 0}
    progress = {"step": 0, "evaluated_step": 0, "best": best}
    progress |= {"seconds": 0.0, "processor_seconds": 0.0, "joules": {"CPU": 0.0, "GPU": 0.0}}  # see Costs
    progress |= {"loss_sum": 0.0, "num_units": 0.0, "num_steps": 0, "interval_seconds": 0.0}  # see MetricsLog
    progress |= {"learning_rate": None, "gradient_norm": None}
    if checkpoint := on_main_process(accelerator, lambda: newest_checkpoint(args, checkpoints)):
        restore(accelerator, checkpoint, model, [optimizer.optimizer for optimizer in optimizers], ema)
        # Earlier versions did not count these costs, and evaluated a step before they saved it.
        progress |= {"processor_seconds": None, "joules": {"CPU": None, "GPU": None}, "evaluated_step": checkpoint.step}
        progress |= checkpoint.state["progress"]
        if progress["best"]["monitor"] != monitor:  # the best by another measure says nothing about this one
            progress["best"] = best
        if progress["best"]["step"] not in (None, progress["step"]):
            forget_lost_best(accelerator, checkpoints, progress["best"])
    return progress


def restore(accelerator, checkpoint: Checkpoint, model, optimizers: list, ema: EMA | None):
    """Restores weights, moving average and optimizers, if any are given, from a checkpoint."""
    restore_training_state(model, optimizers, checkpoint)
    if ema:
        ema.load_state_dict(on_main_process(accelerator, lambda: checkpoint.tensors("ema")))


def newest_checkpoint(args: RunArguments, checkpoints: Checkpoints) -> Checkpoint | None:
    """Returns the newest sound checkpoint, and prints which damaged ones were skipped; None if there is none at all.

    Raises:
        ValueError: there are checkpoints but all are damaged, or the run can no longer end at `max_steps`.
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


# ---- the best evaluation ---------------------------------------------------------------------------------------------


def compare_with_best(best: dict[str, Any], step: int, results: dict[str, Any]):
    """Makes this evaluation the best one if it is better than the best so far, and otherwise counts it as no better.

    Args:
        best: `progress["best"]`, which every checkpoint contains: step, value and results of the best evaluation so
            far, and how many evaluations in a row have been no better since.
    """
    monitor = best["monitor"]
    with user_errors():
        if monitor not in results:
            raise ValueError(f"monitor: {monitor!r} is not measured, only {', '.join(results)}")
    value, sign = results[monitor], -1 if monitor.endswith(("loss", "perplexity", "error")) else 1
    if not math.isnan(value) and (best["step"] is None or sign * value > sign * best["value"]):
        best.update(step=step, value=value, results=results, num_worse=0)
    else:
        best["num_worse"] += 1


def forget_lost_best(accelerator: Accelerator, checkpoints: Checkpoints, best: dict[str, Any]):
    """Checks the best checkpoint. If it is damaged or gone, this is printed, the next evaluation counts as the best,
    and patience begins anew."""
    path = checkpoints.path(best["step"])
    if damage := on_main_process(accelerator, lambda: find_damage(path)):
        accelerator.print(f"lost the best weights so far, those of {path.name}: {damage}")
        best.update(step=None, value=None, results={}, num_worse=0)


def return_to_best(accelerator, args, checkpoints: Checkpoints, progress, model, ema: EMA | None) -> dict[str, Any]:
    """Gives the model and its average the weights of the best evaluation, and returns the results of that.

    If its checkpoint is damaged or gone, this is printed, the last weights stay, and nothing is returned.
    """
    best, step, monitor = progress["best"], progress["step"], progress["best"]["monitor"]
    if step < args.max_steps:
        accelerator.print(f"stopped early, after step {step}: {best['num_worse']} evaluations had no better {monitor}")
    if best["step"] not in (None, step):
        forget_lost_best(accelerator, checkpoints, best)
    if best["step"] is None:
        accelerator.print(f"the result has the last weights, those of step {step}: there are no best ones")
        return {}
    if best["step"] != step:
        checkpoint = on_main_process(accelerator, lambda: checkpoints.load(checkpoints.path(best["step"])))
        restore(accelerator, checkpoint, model, [], ema)
    accelerator.print(f"the result has the weights of step {best['step']}, the best by {monitor}: {best['value']:.4f}")
    return {**best["results"], "best_step": best["step"]}
