"""The trainings that the fault tests share."""

from pathlib import Path

import pytest

from tests.faults.processes import Trainers


@pytest.fixture(scope="session")
def trainers(tmp_path_factory):
    trainers = Trainers(tmp_path_factory.mktemp("trainers"))
    yield trainers
    trainers.server.kill()
    trainers.server.wait()


@pytest.fixture(scope="session")
def uninterrupted(trainers, tmp_path_factory):
    """The folder of a run that nothing disturbed, by its script and dropout."""
    folders = {}

    def folder(dropout: float = 0.0, script: str = "train_gpt") -> Path:
        if (script, dropout) not in folders:
            folders[script, dropout] = tmp_path_factory.mktemp("uninterrupted") / "run"
            trainers.run(folders[script, dropout], script=script, dropout=dropout)
        return folders[script, dropout]

    return folder


@pytest.fixture(scope="session")
def stopped(trainers, tmp_path_factory):
    """A run that was asked to stop at step 18; its checkpoints are of step 12 and 18."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    trainers.run(folder, "--fault", "terminate:step:18")
    return folder
