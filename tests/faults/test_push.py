"""A push that is interrupted anywhere and repeated ends as one that was not; nothing that it says holds the token."""

import dataclasses
import multiprocessing
import shutil
import sys
import threading
import time
import traceback

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import logging

from hf_models import load_verified
from hf_models.verify import write_checksums
from tests.faults.processes import MODEL, files
from tests.finished_run import PUBLISHED, write_run
from tests.hub_server import Fault
from training import train_gpt
from training.hub import errors as hub_errors
from training.hub import finish
from training.hub.publish import push, replace_code

WHERE = {"repo_id": "me/gpt", "branch": "next", "tag": "v1"}  # with a branch and a tag, for all the requests there are


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "gpt")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def once(monkeypatch):
    """A command that gives up at once: what is interrupted is repeated by a second command."""
    monkeypatch.setattr(hub_errors, "WAITS", [])


class Pushes:
    """The same push, each time to an empty Hub."""

    def __init__(self, hub, run):
        self.hub, self.run = hub, run
        push(run, **WHERE)
        self.expected, self.local = self.result(), files(run)
        self.requests = [(request.method, request.path) for request in hub.requests]

    def result(self) -> dict:
        """Of every commit what there is to read in it, and where the tag is."""
        repository = self.hub.repository("me/gpt")
        log = repository.log("next")
        return {
            "titles": [commit["title"] for commit in log],
            "commits": [repository.files(commit["id"]) for commit in log],
            "branches": sorted(repository.branches),
            "main": repository.files("main"),
            "tags": {name: log[0]["id"] == commit for name, commit in repository.tags.items()},
        }

    def begin_again(self):
        shutil.rmtree(self.hub.repository("me/gpt").folder, ignore_errors=True)
        for name in ("README.md", "SHA256SUMS"):
            (self.run / name).unlink(missing_ok=True)
        self.hub.faults.clear()
        self.hub.requests.clear()


@pytest.fixture
def pushes(hub, run):
    return Pushes(hub, run)


@pytest.mark.parametrize("action", ["drop", "drop_after", "fail"])
def test_each_request_is_interrupted_once_in_turn_and_the_command_still_ends_well(pushes, action):
    assert len(pushes.requests) >= 15
    for number, request in enumerate(pushes.requests):
        pushes.begin_again()
        pushes.hub.faults.append(fault := Fault(action, request=number))
        push(pushes.run, **WHERE)
        assert fault.reached.is_set() and pushes.result() == pushes.expected, request
        assert files(pushes.run) == pushes.local, request


@pytest.mark.parametrize("action", ["drop_after", "fail"])
def test_each_request_fails_in_turn_until_the_command_gives_up_and_its_repetition_ends_well(pushes, once, action):
    for number, (method, path) in enumerate(pushes.requests):
        pushes.begin_again()
        pushes.hub.faults.append(Fault(action, method=method, path=pattern(path), times=99))
        error = None
        try:
            push(pushes.run, **WHERE)
        except ValueError as caught:
            error = caught
        assert error is not None and str(error).endswith("goes on where it stopped"), (number, method, path)
        pushes.hub.faults.clear()
        push(pushes.run, **WHERE)
        assert pushes.result() == pushes.expected, (number, method, path)
        assert files(pushes.run) == pushes.local, (number, method, path)


@pytest.mark.parametrize("action", ["drop", "drop_after", "fail"])
def test_each_request_that_replaces_code_is_interrupted_once_and_the_command_still_ends_well(hub, run, action):
    def publish_and_replace(*faults):
        shutil.rmtree(hub.repository("me/gpt").folder, ignore_errors=True)
        push(run, "me/gpt")
        hub.requests.clear()
        hub.faults.extend(faults)
        replace_code("me/gpt", tag="v1")
        repository = hub.repository("me/gpt")
        assert list(repository.tags.values()) == [repository.resolve("main")]
        return [repository.files(commit["id"]) for commit in repository.log()]

    expected = publish_and_replace()
    requests = [(request.method, request.path) for request in hub.requests]
    assert len(expected) == 3 and len(requests) >= 10
    for number, request in enumerate(requests):
        fault = Fault(action, request=number)
        assert publish_and_replace(fault) == expected and fault.reached.is_set(), request


def pattern(path: str) -> str:
    """The requests of this kind: a commit's id differs from push to push."""
    parts = [part if len(part) != 40 else "[0-9a-f]{40}" for part in path.partition("?")[0].split("/")]
    return "/".join(parts) + r"($|\?)"


INTERRUPTIONS = {
    "the commit's answer is lost": Fault("drop_after", path="/commit/"),
    "nobody says how to send the weights": Fault("fail", path="/preupload/", times=99),
    "the weights break off": Fault("drop", path="/storage/", times=99),
    "the card cannot be fetched": Fault("drop", path="/resolve/", times=99),
}


@pytest.mark.parametrize("fault", INTERRUPTIONS.values(), ids=INTERRUPTIONS.keys())
def test_onto_shards_and_what_people_wrote_it_ends_as_one_that_was_not_interrupted(hub, run, once, fault):
    earlier = write_run(run.with_name("earlier"), seed=1)
    (earlier / "model.safetensors").unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for name in [*shards, "old.py"]:
        (earlier / name).write_text(name)
    write_checksums(earlier)
    push(earlier, "me/gpt")
    card = (earlier / "README.md").read_text().replace("*To be written", "Not for poems. *To be written")
    edits = {"README.md": card, "app.py": "theirs"}
    operations = [CommitOperationAdd(name, text.encode()) for name, text in edits.items()]
    HfApi().create_commit("me/gpt", operations, commit_message="Edited")

    hub.faults.append(dataclasses.replace(fault, reached=threading.Event()))
    with pytest.raises(ValueError, match="goes on where it stopped$"):
        push(run, "me/gpt")
    hub.faults.clear()
    push(run, "me/gpt")
    repository = hub.repository("me/gpt")
    published = repository.files()
    assert [commit["title"] for commit in repository.log()][:2] == ["Publish gpt", "Edited"]
    assert sorted(published) == sorted([".gitattributes", "README.md", "SHA256SUMS", "app.py", *PUBLISHED])
    assert b"Not for poems." in published["README.md"] and published["app.py"] == b"theirs"
    assert all((run / name).read_bytes() == published[name] for name in published if (run / name).exists())


PLACES = {  # and for how long, in seconds, the Hub thinks about what the killed process had asked for
    "while the branch is made": ("/branch/", 0.1),
    "while the weights are sent": ("/storage/", 0.1),
    "while the commit is made": ("/commit/", 0.1),
    "while the commit is made, which the Hub does after the second one": ("/commit/", 1.0),
    "while the tag is made": ("/tag/", 0.1),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_and_repeated_it_ends_as_one_that_was_not(pushes, place):
    path, seconds = PLACES[place]
    pushes.begin_again()
    pushes.hub.faults.append(fault := Fault("delay", path=path, seconds=seconds))
    process = multiprocessing.get_context("fork").Process(target=lambda: push(pushes.run, **WHERE))
    process.start()
    assert fault.reached.wait(20)
    process.kill()
    process.join()
    push(pushes.run, **WHERE)
    threading.Event().wait(seconds)  # until the Hub has done what the dead one wanted too
    assert pushes.result() == pushes.expected
    assert files(pushes.run) == pushes.local


# ---- the token ----


@pytest.fixture
def everything_said(monkeypatch, capfd, caplog):
    """All that was printed and logged, with the client as talkative as it gets."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_DEBUG", True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_debug()
    logging.enable_propagation()
    caplog.set_level("DEBUG")
    yield lambda: "".join(capfd.readouterr()) + caplog.text
    logging.set_verbosity(verbosity)
    logging.disable_propagation()


def train(folder, monkeypatch, *flags, **options):
    """A training of two steps, that publishes its result."""
    text = folder.with_name("text.txt")
    text.write_text("\n".join(f"{number} zebras folded {number + 1} maps." for number in range(200)))
    options = {"data": text, "tokenizer": "char", "context_length": 16, "sample_tokens": 8, **options}
    options = {"config": ",".join(f"{name}={value}" for name, value in MODEL.items()), "max_steps": 2, **options}
    options = {"global_batch_size": 4, "mixed_precision": "no", "report_to": "tensorboard", **options}
    words = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", f"--output_dir={folder}", "--push_to_hub", *flags, *words])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train_gpt.main()


def test_a_training_publishes_its_result_and_the_token_is_nowhere(hub, tmp_path, monkeypatch, everything_said):
    monkeypatch.setattr(finish, "MAX_SHARD_SIZE", "20KB")
    with pytest.raises(SystemExit) as refused:
        train(tmp_path / "run", monkeypatch, hub_model_id="you/gpt")
    said = everything_said()
    assert refused.value.code == 2 and "error: cannot publish" in said and "not write to it, but to me at most" in said
    train(tmp_path / "run", monkeypatch, "--hub_private", hub_model_id="me/gpt")
    assert hub.repository("me/gpt").private
    published = hub.repository("me/gpt").files()
    assert sum(name.endswith(".safetensors") for name in published) > 1 and "model.safetensors" not in published
    assert load_verified("me/gpt").num_parameters() == load_verified(tmp_path / "run").num_parameters()
    said += everything_said()
    assert "authorization: <TOKEN>" in said and f"published to {hub.endpoint}/me/gpt" in said
    assert "canary" not in said
    left = files(tmp_path / "run")
    assert any("tfevents" in name for name in left) and "run.json" in left
    for name, content in {**left, **published}.items():
        assert b"canary" not in content, name


def test_the_token_is_in_no_log_and_no_traceback_of_an_interrupted_push(pushes, once, everything_said):
    for number, (method, path) in enumerate(pushes.requests):
        pushes.begin_again()
        action, status = ("drop", "drop_after", "fail")[number % 3], (401, 403, 429, 500)[number // 3 % 4]
        pushes.hub.faults.append(Fault(action, method=method, path=pattern(path), times=99, status=status))
        try:
            push(pushes.run, **WHERE)
        except ValueError:
            assert "canary" not in traceback.format_exc()
    said = everything_said()
    assert "authorization: <TOKEN>" in said and "canary" not in said
