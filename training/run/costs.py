"""What a run costs: time by the clock, time of the processors, and energy where the machine counts it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from training.run.processes import sum_over_processes

POWERCAP = Path("/sys/class/powercap")  # where Linux shows the energy counters (RAPL) of Intel and AMD


@dataclass
class EnergyCounter:
    """How far a counter in joules has risen since this object was made.

    The counter falls to 0 whenever it reaches `limit`.
    """

    read: Callable[[], float]
    limit: float = math.inf
    joules: float = 0.0
    last: float = field(init=False)

    def __post_init__(self):
        self.last = self.read()

    def update(self):
        """Reads the counter. It reaches its limit within minutes, and has to be read more often than that."""
        now = self.read()
        self.joules += now - self.last if now >= self.last else now - self.last + self.limit
        self.last = now


class Costs:
    """Counts what a run has cost, including its earlier parts. `progress`, which every checkpoint contains, has

    seconds: time by the clock.
    processor_seconds: time of all processes and of those that they started, such as the decoders of images; None if an
        earlier part of the run did not count it.
    joules: energy of the "CPU" (the whole processors of every machine, whatever else ran there) and of the "GPU"s; None
        if it was not counted all the time.
    """

    def __init__(self, accelerator: Accelerator, progress: dict):
        self.accelerator, self.earlier = accelerator, dict(progress)
        self.began, self.processor_began = time.perf_counter(), processor_seconds()
        self.counters = {"CPU": [], "GPU": []}
        if accelerator.is_local_main_process:
            self.counters["CPU"] = cpu_counters() or [None]
        if accelerator.device.type == "cuda":
            self.counters["GPU"] = [gpu_counter(accelerator.device)]

    def update(self):
        """Reads the counters; the loop calls it at every step."""
        for counters in self.counters.values():
            for place, counter in enumerate(counters):
                try:
                    if counter:
                        counter.update()
                except Exception:  # see `gpu_counter`
                    counters[place] = None

    def write(self, progress: dict):
        """Writes what the run has cost into `progress`. Every process has to call it."""
        self.update()
        spent = [processor_seconds() - self.processor_began]
        spent += [sum(math.nan if c is None else c.joules for c in counters) for counters in self.counters.values()]
        processors, *joules = sum_over_processes(self.accelerator, spent)
        progress["seconds"] = self.earlier["seconds"] + time.perf_counter() - self.began
        progress["processor_seconds"] = _add(self.earlier["processor_seconds"], processors)
        earlier = self.earlier["joules"]
        progress["joules"] = {name: _add(earlier[name], now) for name, now in zip(earlier, joules, strict=True)}


def _add(earlier: float | None, now: float) -> float | None:
    return None if earlier is None or math.isnan(now) else earlier + now


def processor_seconds() -> float:
    """Returns how long processors have worked for this process and its children, including those that have ended."""
    this = psutil.Process()
    own = this.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in this.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:  # it has just ended
            continue
        total += times.user + times.system
    return total


def cpu_counters(folder: Path = POWERCAP) -> list[EnergyCounter]:
    """Returns a counter for each processor of this machine; none if there are none, or only root may read them."""
    counters = []
    for zone in sorted(folder.glob("intel-rapl:?*")):
        try:
            if (zone / "name").read_text().startswith("package"):
                limit = int((zone / "max_energy_range_uj").read_text()) / 1e6
                counters.append(EnergyCounter(lambda file=zone / "energy_uj": int(file.read_text()) / 1e6, limit))
        except (OSError, ValueError):
            return []
    return counters


def gpu_counter(device: torch.device) -> EnergyCounter | None:
    """Returns the counter of a GPU; None if NVIDIA's library is missing or has no counter for it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
        return EnergyCounter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
    except Exception:  # whatever the library raises, a run must not end because of it
        return None


def measured_costs(progress: dict) -> dict:
    """Returns the costs as eval_results.json names them: seconds, and kilowatt hours of what was counted all the
    time."""
    energy = {name: round(joules / 3.6e6, 6) for name, joules in progress["joules"].items() if joules}
    times = {"wall_time_seconds": progress["seconds"], "processor_time_seconds": progress["processor_seconds"]}
    times = {name: round(value, 1) for name, value in times.items() if value is not None}
    return times | ({"energy_kwh": energy} if energy else {})
