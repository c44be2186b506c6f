"""What a push leaves on the Hub, what it leaves alone there, and what it says when it cannot.

Large files go to the server of these tests through LFS. Of Xet, through which the Hub takes them where hf_xet is
installed, only what becomes of its errors is tested.
"""

import contextlib
import json
import logging
import os
import threading
import time
import traceback

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_models import ZooGPTForCausalLM
from hf_models.verify import check_checksums, write_checksums
from tests.finished_run import CHECKPOINT, PUBLISHED, write_run
from tests.hub_server import Fault
from training.hub import errors as hub_errors
from training.hub import publish
from training.hub import snapshots as steps
from training.hub.publish import main, push
from training.run.checkpoint import Checkpoints

ON_HUB = sorted([".gitattributes", "README.md", "SHA256SUMS", *PUBLISHED])


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "gpt")


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """The seconds that were to be waited between two tries; nobody waits for them."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def edit(repo_id="me/gpt", **files):
    """A commit by a person, on the Hub's page."""
    operations = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    HfApi().create_commit(repo_id, operations, commit_message="Edited")


def refused(run, repo_id="me/gpt", **options) -> str:
    with pytest.raises(ValueError) as caught:
        push(run, repo_id, **options)
    return str(caught.value)


def local(run) -> dict:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- what is published ----


def test_a_push_is_one_commit_of_the_checkpoint_without_the_runs_state(run, hub):
    assert push(run, "me/gpt") == f"{hub.endpoint}/me/gpt"
    repository = hub.repository("me/gpt")
    files = repository.files()
    assert sorted(files) == ON_HUB
    assert [commit["title"] for commit in repository.log()] == ["Publish gpt", "initial commit"]
    for name in PUBLISHED:
        assert files[name] == (run / name).read_bytes()
    assert b'model="me/gpt"' in files["README.md"]


def test_the_folder_then_has_the_card_and_the_sums_that_were_published(run, hub):
    push(run, "me/gpt")
    files = hub.repository("me/gpt").files()
    for name in ("README.md", "SHA256SUMS"):
        assert (run / name).read_bytes() == files[name]
    assert check_checksums(run) == CHECKPOINT


def test_an_unchanged_run_is_no_commit_and_next_to_no_bytes(run, hub):
    weights = {"weight": torch.zeros(2_000_000)}
    save_file(weights, run / "model.safetensors")
    write_checksums(run)
    push(run, "me/gpt")
    hub.requests.clear()
    push(run, "me/gpt")
    assert len(hub.repository("me/gpt").log()) == 2
    assert sum(request.received for request in hub.requests) < 3000
    assert [request.method for request in hub.requests] == ["POST", "GET", "GET"]  # create, head, tree


def test_only_what_has_changed_is_sent(run, hub):
    push(run, "me/gpt")
    (run / "gpt.py").write_text("changed = True")
    hub.requests.clear()
    push(run, "me/gpt")
    assert not [request for request in hub.requests if request.method == "PUT"]
    repository = hub.repository("me/gpt")
    files, before = repository.files(), repository.files(repository.log()[1]["id"])
    assert {name for name in files if files[name] != before[name]} == {"gpt.py", "SHA256SUMS"}


def test_each_file_is_hashed_once(run, hub, monkeypatch):
    hashed = []
    compute = huggingface_hub.lfs.sha_fileobj
    monkeypatch.setattr(huggingface_hub.lfs, "sha_fileobj", lambda file: hashed.append(file.name) or compute(file))
    push(run, "me/gpt")
    assert str(run / "model.safetensors") not in hashed  # but for SHA256SUMS


def test_what_an_earlier_push_left_goes_in_the_same_commit_and_a_persons_files_stay(run, hub):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    earlier = write_run(run.with_name("earlier"))
    (earlier / "model.safetensors").unlink()
    for name in [*shards, "old.py", "detections.png", "vocab.txt"]:
        (earlier / name).write_text(name)
    write_checksums(earlier)
    push(earlier, "me/gpt")
    theirs = ["app.py", "notes.txt", "adapter.safetensors", "demo/app.py", ".eval_results/theirs.yaml", "my.json"]
    edit(**{name: name for name in theirs})
    push(run, "me/gpt")
    repository = hub.repository("me/gpt")
    assert sorted(repository.files()) == sorted([*ON_HUB, *theirs])
    assert len(repository.log()) == 4


def test_weights_of_somebody_else_that_would_be_loaded_instead_are_deleted(run, hub):
    HfApi().create_repo("me/gpt")
    edit(**{"model.safetensors.index.json": "{}", "notes.txt": "mine"})
    push(run, "me/gpt")
    assert sorted(hub.repository("me/gpt").files()) == sorted([*ON_HUB, "notes.txt"])


def test_a_link_is_refused_and_a_run_without_config_or_results(run, hub, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (run / "link.txt").symlink_to(tmp_path / "secret")
    assert "link.txt is a symbolic link: put the file itself there" in refused(run)
    (run / "link.txt").unlink()
    (run / "eval_results.json").unlink()
    assert "eval_results.json does not exist" in refused(run)
    (run / "config.json").unlink()
    assert "no config.json" in refused(run)
    assert not hub.repository("me/gpt").exists


def test_a_token_in_a_file_is_not_published(run, hub):
    (run / "merges.txt").write_text("a b\nhf_canary_of_me\n")
    assert "merges.txt contains your token" in refused(run)
    (run / "merges.txt").write_text(f"a b\nhf_{'aB3' * 11}z\n")  # of another login, or one that is no longer used
    message = refused(run)
    assert "merges.txt contains a token of the Hub" in message and "aB3" not in message
    assert not hub.repository("me/gpt").exists
    (run / "merges.txt").write_text(f"a b\nhf_{'aB3' * 12}z\n")  # longer than any
    push(run, "me/gpt")


SHARD, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda run: (run / "model.safetensors").write_bytes(b"half of it"), "model.safetensors"),
        (lambda run: (run / "model.safetensors").unlink(), "model.safetensors"),
        (lambda run: (run / SHARD).write_bytes(b"of an export that was interrupted"), SHARD),
        (lambda run: (run / INDEX).write_text("{}"), INDEX),
    ],
    ids=["damaged", "gone", "another shard", "another index"],
)
def test_weights_that_are_not_those_that_were_measured_are_refused(run, hub, change, named):
    change(run)
    assert f"{run / named} is not what SHA256SUMS lists" in refused(run)
    assert not hub.repository("me/gpt").exists
    write_checksums(run)  # whoever says that they are right
    push(run, "me/gpt")


def test_a_run_without_sums_is_given_them(run, hub):
    (run / "SHA256SUMS").unlink()
    push(run, "me/gpt")
    assert check_checksums(run) == CHECKPOINT


# ---- what people write ----


def test_words_written_on_the_hub_survive_and_come_back(run, hub):
    push(run, "me/gpt")
    card = (run / "README.md").read_text()
    begin, end = card.index("*To be written"), card.index("<!-- end by hand -->")
    edit(**{"README.md": card[:begin] + "Not for poems.\n" + card[end:]})
    (run / "eval_results.json").write_text((run / "eval_results.json").read_text().replace("2.29", "2.25"))
    push(run, "me/gpt")
    card = hub.repository("me/gpt").files()["README.md"].decode()
    assert "Not for poems." in card and "| bits per byte | 2.25 |" in card
    assert (run / "README.md").read_text() == card
    (run / "README.md").write_text(card.replace("Not for poems.", "Not for prose."))
    push(run, "me/gpt")
    assert b"Not for prose." in hub.repository("me/gpt").files()["README.md"]


def test_a_readme_that_is_all_a_persons_is_not_overwritten(run, hub, capsys):
    HfApi().create_repo("me/gpt")
    edit(**{"README.md": "# Mine\n"})
    push(run, "me/gpt")
    assert hub.repository("me/gpt").files()["README.md"] == b"# Mine\n"
    assert "README.md of me/gpt was written by hand, and stays as it is" in capsys.readouterr().out
    hub.requests.clear()
    push(run, "me/gpt")
    assert not [request for request in hub.requests if "/commit/" in request.path]


def test_a_readme_without_marks_is_published_unless_words_on_the_hub_would_go(run, hub):
    push(run, "me/gpt")
    card = (run / "README.md").read_text()
    (run / "README.md").write_text("# Mine\n")
    push(run, "me/gpt")
    assert hub.repository("me/gpt").files()["README.md"] == b"# Mine\n"
    edit(**{"README.md": card.replace("*To be written", "*Written")})
    assert "would overwrite what was written by hand on the Hub" in refused(run)


def test_words_that_are_typed_while_it_is_sent_stay(run, hub, monkeypatch, capsys):
    commit = HfApi.create_commit

    def slow(*args, **options):
        (run / "README.md").write_text((run / "README.md").read_text().replace("*To be written", "Typed. *To be"))
        return commit(*args, **options)

    push(run, "me/gpt")
    (run / "gpt.py").write_text("changed = True")
    (run / "eval_results.json").write_text((run / "eval_results.json").read_text().replace("2.29", "2.25"))
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", slow)
        push(run, "me/gpt")
    assert "README.md was changed while it was published, and stays as it is" in capsys.readouterr().out
    assert "Typed." in (run / "README.md").read_text()
    push(run, "me/gpt")
    published = hub.repository("me/gpt").files()["README.md"]
    assert b"Typed." in published and b"2.25" in published and (run / "README.md").read_bytes() == published


def test_a_run_that_cannot_be_written_is_published_as_it_lies_there(run, hub, monkeypatch, capsys):
    def refuse(path, text):
        raise OSError(30, "Read-only file system", str(path))

    (run / "gpt.py").write_text("changed = True")
    (run / ".lock").unlink()
    before = local(run)
    monkeypatch.setattr(publish, "write_atomic", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    main([str(run), "--repo", "me/gpt"])
    assert f"SHA256SUMS: Read-only file system: {run} stays without the card" in capsys.readouterr().out
    assert local(run) == before
    assert sorted(hub.repository("me/gpt").files()) == ON_HUB


# ---- where it goes ----


def test_a_private_push_makes_a_private_repository_and_refuses_a_public_one(run, hub):
    push(run, "me/gpt", private=True)
    assert hub.repository("me/gpt").private
    push(run, "me/gpt")  # which does not make it public
    assert hub.repository("me/gpt").private
    push(run, "me/open")
    assert "me/open is public: make it private in its settings" in refused(run, "me/open", private=True)


def test_a_branch_is_made_from_main_and_a_tag_names_the_commit(run, hub):
    push(run, "me/gpt", tag="first")
    assert push(write_run(run, seed=1), "me/gpt", branch="next", tag="v/2") == f"{hub.endpoint}/me/gpt/tree/next"
    repository = hub.repository("me/gpt")
    assert repository.tags == {"first": repository.resolve("main"), "v/2": repository.resolve("next")}
    assert repository.read_commit("next")["parent"] == repository.resolve("main")
    assert b'model="me/gpt", revision="next"' in repository.files("next")["README.md"]
    push(run, "me/gpt", branch="next", tag="v/2")
    assert len(repository.log("next")) == 3


def test_a_tag_of_another_commit_is_refused_before_anything_is_sent(run, hub):
    push(run, "me/gpt", tag="v1")
    hub.requests.clear()
    assert "the tag v1 names another commit already: choose another --tag" in refused(write_run(run, 1), tag="v1")
    assert not [request for request in hub.requests if request.method == "PUT" or "/commit/" in request.path]


def test_a_name_without_a_user_is_the_logins(run, hub):
    assert push(run, "gpt") == f"{hub.endpoint}/me/gpt"


def test_a_dry_run_shows_what_would_be_done_and_does_nothing(run, hub, capsys):
    push(run, "me/gpt", dry_run=True)
    assert "9 files to send (0.0 MB), 0 unchanged, 0 to delete" in capsys.readouterr().out
    assert not hub.repository("me/gpt").exists
    push(run, "me/gpt")
    write_run(run, seed=1)
    (run / "merges.txt").unlink()
    before, log = local(run), hub.repository("me/gpt").log()
    hub.requests.clear()
    capsys.readouterr()
    push(run, "me/gpt", dry_run=True, branch="next")
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert ["send", "8,104", "model.safetensors"] in shown
    assert ["unchanged", str((run / "gpt.py").stat().st_size), "gpt.py"] in shown
    assert ["delete", "merges.txt"] in shown
    assert local(run) == before and hub.repository("me/gpt").log() == log
    assert {request.method for request in hub.requests} == {"GET"}


def test_after_a_dry_run_that_failed_the_command_that_is_named_is_a_dry_run(run, hub):
    hub.faults.append(Fault("fail", times=99, status=503))
    message = refused(run, dry_run=True)
    assert message.endswith(f"; `python -m training.publish {run} --repo=me/gpt --dry-run` asks again")


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"token": None}, "the Hub needs a login: `hf auth login`, or HF_TOKEN"),
        ({"token": "hf_canary_of_nobody"}, "the Hub does not know this login: `hf auth login`, or HF_TOKEN"),
        ({"token": "hf_canary_of_a_reader"}, "the Hub does not allow it to this login; if its token may only read, "),
        ({"status": 403, "path": "/commit/"}, "if its token may only read, `hf auth login` with another (403: "),
        ({"repo_id": "you/gpt"}, "this login may not write to it, but to me at most: give a --repo of these"),
        ({"repo_id": "me/not/a/name"}, "Repo id must be"),
        ({"repo_id": "me/--"}, "Repo id must"),
        ({"status": 404}, "the Hub has no such user, repository or branch for this login: look at its name (404"),
        ({"status": 409, "path": "/commit/"}, "somebody else is writing to it (409"),
        ({"status": 413, "path": "/commit/"}, "the Hub refused it (413"),
        ({"status": 429, "retry_after": 7}, "the Hub asks for fewer requests: wait 7 s (429"),
        ({"status": 429, "retry_after": 3600}, "the Hub asks for fewer requests: wait 3600 s (429"),
        ({"status": 500}, "the Hub is out of order (500"),
        ({"status": 503, "path": "/storage/"}, "the Hub is out of order (503"),
        ({"offline": True}, "HF_HUB_OFFLINE is set: unset it to publish"),
        ({"stopped": True}, "does not answer ("),
    ],
    ids=lambda value: "-".join(f"{key}-{name}" for key, name in value.items()) if isinstance(value, dict) else "",
)
def test_what_goes_wrong_is_one_line_that_says_what_to_do(run, hub, monkeypatch, caplog, capfd, trouble, said):
    hub.add_user("reader", "hf_canary_of_a_reader", role="read")
    if "token" in trouble:
        monkeypatch.setenv("HF_TOKEN", trouble["token"] or "")
    if "status" in trouble:
        hub.faults.append(fault_of(trouble))
    if "offline" in trouble:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if "stopped" in trouble:
        hub.stop()
    repo_id = trouble.get("repo_id", "reader/gpt" if "reader" in str(trouble.get("token")) else "me/gpt")
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(huggingface_hub.constants, "HF_DEBUG", True)
    try:
        push(run, repo_id)
    except ValueError as error:
        message, trace = str(error), traceback.format_exc()
    assert message.startswith(f"cannot publish {run} to {repo_id}: ") and said in message and "\n" not in message
    printed = capfd.readouterr()
    assert "canary" not in message + trace + caplog.text + printed.out + printed.err
    goes_on = f"; `python -m training.publish {run} --repo={repo_id}` goes on where it stopped"
    assert message.endswith(goes_on) == (trouble.get("status") in (409, 429, 500, 503) or "stopped" in trouble)


@pytest.mark.parametrize("repo_id", ["me/gpt", "you/gpt"])
def test_what_the_hub_says_of_a_push_that_it_does_not_allow_is_repeated(run, hub, repo_id):
    hub.faults.append(Fault("fail", path="repos/create", status=403))
    assert refused(run, repo_id).endswith("(403: This request was told to fail)")


def xets(name: str, kind: type) -> type:
    """The client's own class, or one like it where it is not installed."""
    with contextlib.suppress(ImportError):
        import hf_xet

        return getattr(hf_xet, name, kind)
    return type(name, (kind,), {})


def http_status(number: str) -> ConnectionError:
    """As Xet's client says it."""
    where = "domain: https://huggingface.co/api/models/me/gpt/xet-write-token/main"
    kind = "client" if number < "5" else "server"
    return ConnectionError(f"Network error: Request error: HTTP status {kind} error ({number}), {where}")


@pytest.mark.parametrize(
    ("error", "passes", "said"),
    [
        (ConnectionError("Network error: connection reset"), True, "does not answer (Network error: connection reset)"),
        (TimeoutError("timed out"), True, "does not answer (timed out)"),
        (http_status("500 Internal Server Error"), True, "the Hub is out of order (500: "),
        (http_status("429 Too Many Requests"), True, "the Hub asks for fewer requests: wait 300 s (429: "),
        (http_status("401 Unauthorized"), False, "the Hub does not know this login: `hf auth login`"),
        (http_status("403 Forbidden"), False, "the Hub does not allow it to this login"),
        (http_status("404 Not Found"), False, "the Hub has no such user, repository or branch for this login"),
        (xets("XetAuthenticationError", PermissionError)("expired"), False, "the Hub does not know this login"),
        (xets("XetObjectNotFoundError", FileNotFoundError)("no xorb"), False, "the Hub has no such user, repository"),
        (RuntimeError("Data processing error"), True, "Data processing error"),
        (json.JSONDecodeError("Expecting value", "", 0), True, "answered with half of it (Expecting value"),
        (PermissionError(13, "Permission denied", "model.safetensors"), False, "model.safetensors: Permission denied"),
        (FileNotFoundError(2, "No such file", "model.safetensors"), False, "model.safetensors: No such file"),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}"[:60] if isinstance(value, Exception) else "",
)
def test_an_error_of_xets_client_is_one_of_the_hub(run, hub, monkeypatch, slept, error, passes, said):
    def break_off(*args, **options):
        raise error

    monkeypatch.setattr(HfApi, "create_commit", break_off)
    message = refused(run)
    assert said in message and "\n" not in message
    assert message.endswith("goes on where it stopped") == passes and (len(slept) == len(hub_errors.WAITS)) == passes


def fault_of(trouble: dict) -> Fault:
    path = trouble.get("path", "repos/create")
    return Fault("fail", path=path, times=99, status=trouble["status"], retry_after=trouble.get("retry_after"))


def test_it_waits_as_long_as_the_hub_asks_and_tries_again(run, hub, slept, capsys):
    hub.faults.append(Fault("fail", path="repos/create", status=429, retry_after=7))
    hub.faults.append(Fault("fail", path="/commit/", status=503))
    push(run, "me/gpt")
    assert slept == [7, 4]
    assert "(503: " in capsys.readouterr().out
    assert len(hub.repository("me/gpt").log()) == 2


def test_a_file_that_the_repository_ignores_is_named(run, hub):
    HfApi().create_repo("me/gpt")
    edit(**{".gitignore": "merges.txt\n"})
    message = refused(run)
    assert "the repository did not take merges.txt: is there a .gitignore in it?" in message


def test_two_pushes_at_once_leave_one_run_whole(run, hub):
    """The second one comes between the comparison of the first one and its commit."""
    push(run, "me/gpt")
    first, second = write_run(run.with_name("first"), seed=1), write_run(run.with_name("second"), seed=2)
    (first / "only_first.py").write_text("")
    (second / "only_second.py").write_text("")
    hub.faults.append(fault := Fault("delay", path="/commit/", seconds=1))
    thread = threading.Thread(target=push, args=(first, "me/gpt"))
    thread.start()
    assert fault.reached.wait(10)
    push(second, "me/gpt")
    thread.join()
    repository = hub.repository("me/gpt")
    for revision, expected in zip(repository.log()[:2], (first, second), strict=True):
        files = repository.files(revision["id"])
        names = {path.name for path in expected.iterdir() if path.suffix == ".py"}
        assert {name for name in files if name.endswith(".py")} == names
        assert files["model.safetensors"] == (expected / "model.safetensors").read_bytes()


# ---- the command line ----


def test_the_command_publishes_under_the_name_of_the_folder(run, hub, capsys):
    main([str(run)])
    assert capsys.readouterr().out.endswith(f"published to {hub.endpoint}/me/gpt\n")
    main([str(run), "--repo", "me/other", "--private", "--tag", "v1", "--branch", "next"])
    assert hub.repository("me/other").private and list(hub.repository("me/other").tags) == ["v1"]
    main([str(run), "--repo", "me/third", "--dry-run"])
    assert not hub.repository("me/third").exists


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "--token", "hf_canary"], "unknown option --token; see"),
        (["RUN", "--token=hf_canary"], "unknown option --token; see"),
        (["--token", "hf_canary", "RUN"], "unknown option --token; see"),
        (["RUN", "hf_canary"], "give one RUN_DIR"),
        (["RUN", "--step", "hf_canary"], "argument --step: invalid int value"),
        (["RUN", "--private=hf_canary"], "argument --private: ignored explicit argument"),
        ([], "required: RUN_DIR"),
        (["RUN/nothing"], "no config.json"),
        (["RUN", "--step", "7"], "step-000007: manifest.json is missing; the checkpoints that there are: step-000005"),
    ],
)
def test_a_wrong_command_is_one_line_and_a_token_is_not_repeated(run, hub, capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        main([word.replace("RUN", str(run)) for word in words])
    printed = capsys.readouterr()
    assert caught.value.code == 2 and said in printed.err and len(printed.err.splitlines()) == 1
    assert "canary" not in printed.err + printed.out
    assert not (run / "nothing").exists()


def test_a_run_that_is_still_written_is_refused_in_the_words_of_this_command(run, hub, capsys, monkeypatch):
    def busy(*args):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("fcntl.lockf", busy)
    with pytest.raises(SystemExit):
        main([str(run), "--repo", "me/gpt"])
    said = capsys.readouterr().err
    assert f"RUN_DIR {run} is being written by" in said and "or choose another RUN_DIR" in said
    assert "output_dir" not in said and not hub.repository("me/gpt").exists


# ---- a step ----


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_is_published_with_its_averaged_weights_and_only_its_measurements(run, hub, make_model, tied, tmp_path):
    last = make_model(ZooGPTForCausalLM, tie_word_embeddings=tied)
    last.save_pretrained(run)
    model, averaged = (make_model(ZooGPTForCausalLM, tie_word_embeddings=tied) for _ in range(2))
    progress = {"seconds": 60.0, "processor_seconds": 90.0, "joules": {"CPU": 0.0, "GPU": 0.0}}
    ema = {name: parameter.detach() for name, parameter in averaged.named_parameters()}
    tensors = {"model": model.state_dict(), "ema": ema, "optimizer": {"moment": torch.ones(3)}}
    (run / "checkpoints/step-000005/optimizer.safetensors").unlink()
    (run / "checkpoints/step-000005").rmdir()
    Checkpoints(run / "checkpoints").save(3, tensors, {"progress": progress, "max_steps": 5})
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    lines[2:2] = [{"step": 3, "eval_loss": 0.75, "sample": "Third."}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')  # torn
    main([str(run), "--repo", "me/gpt", "--step", "3"])

    repository = hub.repository("me/gpt")
    files = repository.files("step-3")
    assert list(repository.files("main")) == [".gitattributes"]
    assert [name for name in files if name not in ON_HUB and not name.endswith((".py", ".json"))] == []
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    published = load_file(tmp_path / "model.safetensors")
    assert published.keys() == load_file(run / "model.safetensors").keys()
    assert all(torch.equal(tensor, ema[name]) for name, tensor in published.items())
    results = json.loads(files["eval_results.json"])
    assert (results["eval_loss"], results["sample"], results["wall_time_seconds"]) == (0.75, "Third.", 60.0)
    assert "eval_bits_per_byte" not in results and results["parameters"] == 1234567
    assert len(files["metrics.jsonl"].splitlines()) == 4
    assert b"| loss | 0.75 |" in files["README.md"]


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ((steps, "load_model"), RuntimeError("size mismatch for lm_head.weight")),
        ((ZooGPTForCausalLM, "save_pretrained"), SafetensorError("Error while serializing: No space left on device")),
    ],
    ids=["another model", "a full disk"],
)
def test_a_step_that_cannot_be_exported_is_one_line_and_no_matter_of_the_hub(
    run, hub, make_model, monkeypatch, slept, place, error
):
    model = make_model(ZooGPTForCausalLM)
    model.save_pretrained(run)
    Checkpoints(run / "checkpoints").save(3, {"model": model.state_dict()}, {})

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(*place, fail)
    message = refused(run, step=3)
    assert "step-000003" in message and message.endswith(str(error)) and not slept
    assert not hub.repository("me/gpt").exists
