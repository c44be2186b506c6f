"""The processes and devices of a run: what `accelerate launch` started, and how the processes agree."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import broadcast_object_list, reduce
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from training.run.arguments import RunArguments, one_line

Batch = TypeVar("Batch")

LAUNCHER = os.getppid()  # read at the start, so that the end of the launcher is noticed whenever it comes
IS_LAUNCHED = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by `accelerate launch` for its children

# Keeps process groups alive. If DDP were the last owner of a gloo group, it would join the group's threads while it
# holds Python's lock; the threads may wait for that lock, and the process would hang at its end.
process_groups: list[dist.ProcessGroup] = []


def create_accelerator(args: RunArguments) -> Accelerator:
    """Returns the processes and devices that `accelerate launch` configured.

    Raises:
        ValueError: the promises of `training.run.loop` cannot hold under this configuration, or the global batch does
            not divide by the processes.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(
                f"{name.lower()} of accelerate owns optimizer, checkpoint or data, so a run could not resume exactly: "
                "use FSDP2, as in training/launch/fsdp2.yaml"
            )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise several processes would each train alone
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    accelerator.wait_for_everyone()  # so that no process is still connecting when another one refuses
    if dist.is_initialized():
        process_groups.append(dist.group.WORLD)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # On CPUs, accelerate would train with DDP instead of FSDP and not say so.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # it reads the launcher's environment
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported: set fsdp_version: 2, as in training/launch/fsdp2.yaml")
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


def keep_inputs(model: FSDPModule):
    """Keeps the inputs of the whole model in float32.

    FSDP2's mixed precision rounds all inputs of a module to bfloat16. That is right for the activations of a block, but
    wrong for boxes and for what the loss is divided by.
    """
    state = model._get_fsdp_state()  # there is no public way to change this for one module
    state._mp_policy = replace(state._mp_policy, cast_forward_inputs=False)


def micro_batches(args: RunArguments, rank: int, num_processes: int) -> list[range]:
    """Returns the positions of the global batch that this process works on, one range for each forward pass.

    Raises:
        ValueError: the global batch does not divide by the processes, or a process's share does not divide by the
            micro-batch.
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
    """Divides the cores among the processes of this machine.

    `accelerate launch` gives each process one thread unless `--num_cpu_threads_per_process` says otherwise; a number
    other than 1 is kept.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and IS_LAUNCHED:
        cores = psutil.cpu_count(logical=False) or os.cpu_count()
        if hasattr(os, "sched_getaffinity"):
            cores = min(cores, len(os.sched_getaffinity(0)))  # the cores that this job may use
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def speed_up_cpu_matmul() -> bool:
    """Lets oneDNN compute float32 matrix products, if that is faster and as exact.

    On CPUs with AVX-512, oneDNN is twice as fast as the default library; with AVX2 alone it is a tenth slower. On CPUs
    with matrix units for bfloat16 the same setting would round to bfloat16, so a product is compared first.

    Returns:
        Whether oneDNN is used.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    exact = left.double() @ right.double()
    matmul.fp32_precision = "bf16"
    if not (is_exact := bool((left @ right - exact).abs().max() < 1e-3)):
        matmul.fp32_precision = before
    return is_exact


def fastest_attention(device: str) -> str:
    """Returns the attention backend that trains fastest. On CPUs with AVX-512 plain matrix products are up to 1.6 times
    as fast as the fused kernel; on CPUs with AVX2 they are up to 5 % slower."""
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "eager" if device == "cpu" and has_avx512 else "sdpa"


def is_local_main_process() -> bool:
    """Returns whether this is the first process of its machine; for code that has no `Accelerator`."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Calls `action` on the main process, and returns its result on every process.

    Raises:
        ValueError: `action` raised ValueError or OSError. Every process raises it, so that all of them stop.
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


def take_turns(accelerator: Accelerator, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Yields every n-th of the evaluation batches, where n is the number of processes, and whether the batch counts.

    If the last turn has too few batches, a process gets the batch of another one, which does not count: under FSDP all
    processes have to run.
    """
    batches, rank = iter(batches), accelerator.process_index
    while turn := list(islice(batches, accelerator.num_processes)):
        yield turn[min(rank, len(turn) - 1)], rank < len(turn)


def sum_over_processes(accelerator: Accelerator, values: list) -> list[float]:
    """Returns the sum of each value over all processes, as Python numbers."""
    if accelerator.num_processes > 1:
        values = [torch.as_tensor(value, dtype=torch.float64, device=accelerator.device) for value in values]
        values = reduce(torch.stack(values), reduction="sum").tolist()
    return [float(value) for value in values]


class StopRequest:
    """Is true when the run has to save and stop: after SIGTERM or Ctrl-C, or when the launcher of this process is gone.

    A second Ctrl-C interrupts at once. `reason` says in words why to stop.
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
        """Restores the handlers of the signals."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
