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

LAUNCHER = os.getppid()  # read at the start, so that its end is noticed whenever it comes
IS_LAUNCHED = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by `accelerate launch` for its children

# Were DDP the last owner of a gloo group, it would join the group's threads while it holds Python's lock, which they
# may be waiting for, and the process would hang at its end. So another reference is kept here.
process_groups: list[dist.ProcessGroup] = []


def create_accelerator(args: RunArguments) -> Accelerator:
    """The processes and devices that `accelerate launch` configured.

    Raises:
        ValueError: a configuration under which the promises of `training.run.loop` cannot hold, or a global batch that
            does not divide.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(
                f"{name.lower()} of accelerate owns optimizer, checkpoint or data, so a run could not resume exactly: "
                "use FSDP2, as in training/launch/fsdp2.yaml"
            )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several processes would each train alone
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
    """Leaves what the whole model is given in float32. FSDP2's mixed precision rounds all that a module is given to
    bfloat16: right for the activations of a block, wrong for boxes and for what the loss is divided by."""
    state = model._get_fsdp_state()  # there is no public way for one module
    state._mp_policy = replace(state._mp_policy, cast_forward_inputs=False)


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
    """Lets oneDNN do float32 matrix products, which on CPUs with AVX-512 is twice as fast as the default library; with
    AVX2 alone it is slower by a tenth, and left out.

    Where the CPU has bfloat16 matrix units the same setting would round to bfloat16, so it is kept only if a product
    stays as exact as before. Returns whether it was kept.
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
    """To train with: on CPUs with AVX-512 the plain products are up to 1.6x as fast as the fused kernel, and on those
    with AVX2 up to 5 % slower."""
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "eager" if device == "cpu" and has_avx512 else "sdpa"


def is_local_main_process() -> bool:
    """Returns whether this is the first process of its machine; for code that has no `Accelerator`."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


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


def take_turns(accelerator: Accelerator, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """This process's share of evaluation batches, every n-th, each with whether it counts. A process without a batch in
    the last turn runs another's, which does not count: under FSDP all must run."""
    batches, rank = iter(batches), accelerator.process_index
    while turn := list(islice(batches, accelerator.num_processes)):
        yield turn[min(rank, len(turn) - 1)], rank < len(turn)


def sum_over_processes(accelerator: Accelerator, values: list) -> list[float]:
    """Each value summed over all processes, as Python numbers."""
    if accelerator.num_processes > 1:
        values = [torch.as_tensor(value, dtype=torch.float64, device=accelerator.device) for value in values]
        values = reduce(torch.stack(values), reduction="sum").tolist()
    return [float(value) for value in values]


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
