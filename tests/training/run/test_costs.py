"""What a run has cost is measured, summed over all its parts, and left out where a machine does not count it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from training.run.costs import Costs, EnergyCounter, cpu_counters, gpu_counter, measured_costs, processor_seconds

NOTHING = {"seconds": 0.0, "processor_seconds": 0.0, "joules": {"CPU": 0.0, "GPU": 0.0}}


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """RAPL's folder for two processors, one with a part that counts a second time what the whole does."""
    for zone, name in {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "package-1"}.items():
        folder = tmp_path / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("100000000\n")
        (folder / "energy_uj").write_text("90000000\n")
    monkeypatch.setattr(cpu_counters, "__defaults__", (tmp_path,))
    return tmp_path


def test_a_counter_that_begins_again_loses_nothing():
    values = iter([90.0, 95.0, 5.0, 15.0])
    counter = EnergyCounter(lambda: next(values), limit=100.0)
    for _ in range(3):
        counter.update()
    assert counter.joules == pytest.approx(25.0)


def test_whole_processors_are_counted_and_parts_of_a_run_add_up(powercap):
    progress = dict(NOTHING)
    for _ in range(2):
        run = Costs(Accelerator(cpu=True), progress)
        for zone in ("intel-rapl:0", "intel-rapl:1"):
            counter = powercap / zone / "energy_uj"
            counter.write_text(str((int(counter.read_text()) + 18_000_000) % 100_000_000))  # first past the limit
        run.write(progress)
    assert progress["joules"] == {"CPU": pytest.approx(72.0), "GPU": 0.0}
    assert measured_costs(progress)["energy_kwh"] == {"CPU": pytest.approx(2e-5)}


def test_energy_that_was_not_counted_all_the_time_is_left_out(powercap):
    progress = dict(NOTHING)
    Costs(Accelerator(cpu=True), progress).write(progress)
    (powercap / "intel-rapl:1" / "energy_uj").unlink()  # as on a machine that lets nobody read it
    Costs(Accelerator(cpu=True), progress).write(progress)
    assert progress["joules"]["CPU"] is None
    assert "energy_kwh" not in measured_costs(progress)
    assert set(measured_costs(progress)) == {"wall_time_seconds", "processor_time_seconds"}


def test_a_counter_that_fails_later_is_left_out_and_the_run_goes_on(powercap):
    progress = dict(NOTHING)
    run = Costs(Accelerator(cpu=True), progress)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("")
    run.update()
    run.write(progress)
    assert progress["joules"]["CPU"] is None


def test_a_gpus_energy_is_read_by_its_name(monkeypatch):
    """In millijoules; without NVIDIA's library or such a GPU there is no counter."""
    energy = iter([5000, 7500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={b"GPU-1234": "handle"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(energy),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    counter = gpu_counter(torch.device("cuda", 0))
    counter.update()
    assert counter.joules == 2.5
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="other"))
    assert gpu_counter(torch.device("cuda", 0)) is None


def test_costs_that_an_earlier_version_did_not_count_are_left_out():
    progress = {"seconds": 60.0, "processor_seconds": None, "joules": {"CPU": None, "GPU": None}}
    Costs(Accelerator(cpu=True), progress).write(progress)
    assert set(measured_costs(progress)) == {"wall_time_seconds"}


def test_the_work_of_child_processes_is_counted():
    before = processor_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert processor_seconds() - before > 0.05
