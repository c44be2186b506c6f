"""What `python -m training.publish RUN_DIR --code_only` replaces, in a folder and on the Hub, and what it leaves."""

import contextlib
import json
import shutil
import threading
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hf_models import ZooDetrForObjectDetection, ZooGPTForCausalLM, __version__, load_verified
from hf_models.verify import check_checksums, write_checksums
from tests.families import DETR_OPTIONS, every_family
from tests.finished_run import write_run
from tests.hub_server import Fault
from tests.old_code import EARLIER_VERSION, FORMER, age
from training.hub import renewal
from training.hub.card import write_card
from training.hub.publish import main, push, replace_code
from training.hub.renewal import renew

ALWAYS = {"gpt.py", "base.py", "config.json", "README.md", "SHA256SUMS"}  # what differs in an aged run


@pytest.fixture
def new(tmp_path, make_model):
    """A finished run."""
    run = write_run(tmp_path / "gpt")
    make_model(ZooGPTForCausalLM).save_pretrained(run)
    return finished(run)


@pytest.fixture
def old(new):
    """The same one, as an earlier version would have left it, with a file of a person."""
    age(new)
    (new / "mine.py").write_text("from .gpt import ZooGPTModel\n")
    return finished(new)


def finished(run):
    write_checksums(run)
    write_card(run)
    return run


def edit(repo_id="me/gpt", **files):
    """A commit by a person, on the Hub's page."""
    operations = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    HfApi().create_commit(repo_id, operations, commit_message="Edited")


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def differing(before: dict, after: dict) -> set:
    return {name for name in {**before, **after} if before.get(name) != after.get(name)}


def refused(*arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        replace_code(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_config(run, **fields):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **fields}))


def auto_map_of(run) -> dict:
    return json.loads((run / "config.json").read_text())["auto_map"]


# ---- a folder ----


@every_family
def test_a_checkpoint_of_the_current_code_is_as_it_shall_be(family, make_model, tmp_path):
    for number, model_class in enumerate(family.auto_classes):
        make_model(model_class).save_pretrained(tmp_path / str(number))
        write_checksums(tmp_path / str(number))
        assert renew(tmp_path / str(number)).lines(tmp_path / str(number)) == []


@every_family
def test_the_code_is_what_save_pretrained_writes(family, make_model, tmp_path):
    make_model(family.main_class).save_pretrained(tmp_path)
    write_checksums(tmp_path)
    expected = contents(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.unlink() if path.name == "losses.py" else path.write_text("import torch\n")
    replace_code(tmp_path)
    assert contents(tmp_path) == expected


def test_a_folder_has_the_current_code_and_what_depends_on_it(old, make_model, tmp_path):
    before = contents(old)
    replace_code(old)
    after = contents(old)
    make_model(ZooGPTForCausalLM).save_pretrained(tmp_path / "saved")
    saved = contents(tmp_path / "saved")
    for name in {name for name in saved if name.endswith(".py")} | {"config.json"}:
        assert after[name] == saved[name]
    assert differing(before, after) == ALWAYS | FORMER.keys() and not FORMER.keys() & after.keys()
    assert "mine.py" in check_checksums(old)
    assert load_verified(old).config.zoo_version == __version__


def test_the_card_names_the_version_of_the_code_and_keeps_the_words_of_people(old):
    card = (old / "README.md").read_text()
    assert f"It is the code of hf_models {EARLIER_VERSION}.\n" in card
    (old / "README.md").write_text(card.replace("*To be written", "Not for poems. *To be written"))
    replace_code(old)
    renewed = (old / "README.md").read_text()
    assert f"It is the code of hf_models {__version__}.\n" in renewed and "Not for poems." in renewed
    assert f'model="{old}"' in renewed


def test_the_weights_are_not_read(old, tmp_path):
    sums = (old / "SHA256SUMS").read_text()
    (old / "model.safetensors").unlink()
    (old / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    replace_code(old)
    line = next(line for line in sums.splitlines() if line.endswith("  model.safetensors"))
    assert line in (old / "SHA256SUMS").read_text().splitlines()


def test_a_second_time_there_is_nothing_to_do(old, capsys):
    replace_code(old)
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    capsys.readouterr()
    replace_code(old)
    assert capsys.readouterr().out == f"{old} has the current code already, of hf_models {__version__}\n"
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before


def test_a_dry_run_says_what_would_change_and_changes_nothing(old, capsys):
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    replace_code(old, dry_run=True)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"would change {old}:"
    assert {tuple(line.split()) for line in lines} == {("write", name) for name in ALWAYS} | {
        ("delete", name) for name in FORMER
    }
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before


def test_what_is_not_there_is_not_made(make_model, tmp_path):
    """Of a checkpoint that `save_pretrained` wrote, without sums and card."""
    make_model(ZooGPTForCausalLM).save_pretrained(tmp_path)
    expected = contents(tmp_path)
    age(tmp_path)
    replace_code(tmp_path)
    assert contents(tmp_path) == expected


def test_a_card_that_is_all_a_persons_stays(old):
    (old / "README.md").write_text("# Mine\n\n```python\nprint()\n```\n")
    replace_code(old)
    assert (old / "README.md").read_text() == "# Mine\n\n```python\nprint()\n```\n"


def test_code_that_somebody_added_stays_with_all_that_it_needs(old):
    (old / "mine.py").write_text("from .earlier import spoil\nfrom .base import ZOO_VERSION\n")
    (old / "theirs.py").write_text("from .helper import Helper\n")
    (old / "helper.py").write_text("")
    foreign = {"AutoModelForTokenClassification": "theirs.Theirs", "AutoTokenizer": ["tokens.Slow", None]}
    foreign |= {"AutoModelForSeq2SeqLM": "gpt.ZooGPTForCausalLM"}
    (old / "gpt.py").write_text((old / "gpt.py").read_text() + "from .helper import Helper\n")
    change_config(old, auto_map={**auto_map_of(old), **foreign, "AutoModelForMaskedLM": "gpt.ZooGPTThatWas"})
    write_checksums(old)
    replace_code(old)
    assert {"mine.py", "theirs.py", "helper.py", *FORMER} <= set(check_checksums(old))
    assert auto_map_of(old) == {**renewal.FAMILIES["zoo_gpt"].family_auto_map, **foreign}


def test_code_that_the_sums_do_not_list_stays(old):
    (old / "unlisted.py").write_text("")
    (old / "gpt.py").write_text((old / "gpt.py").read_text() + "from .unlisted import anything\n")
    replace_code(old)
    assert (old / "unlisted.py").exists() and not (old / "earlier.py").exists()


def test_a_config_does_not_lead_out_of_the_folder(old, tmp_path):
    (tmp_path / "outside.py").write_text("")
    places = [f"{tmp_path}/outside.X", "../outside.X", "you/gpt--outside.X"]
    for place in places:
        change_config(old, auto_map={"AutoConfig": place, "AutoModel": "gpt.ZooGPTModel"})
        (old / "SHA256SUMS").unlink(missing_ok=True)
        replace_code(old)
        assert (tmp_path / "outside.py").exists()
        assert auto_map_of(old) == renewal.FAMILIES["zoo_gpt"].family_auto_map


def test_the_backbone_of_a_detector_is_renewed_with_it(make_model, tmp_path):
    make_model(ZooDetrForObjectDetection, **DETR_OPTIONS["vit"]).save_pretrained(tmp_path)
    expected = contents(tmp_path)
    backbone = json.loads(expected["config.json"])["backbone_config"]
    change_config(tmp_path, backbone_config={**backbone, "zoo_version": EARLIER_VERSION, "auto_map": {}})
    replace_code(tmp_path)
    assert contents(tmp_path) == expected


def test_interrupted_anywhere_and_repeated_it_ends_as_one_that_was_not(old, monkeypatch, tmp_path):
    """An interruption comes before each write and each deletion in turn."""
    (old / "README.md").unlink()  # which has the folder's name in it
    shutil.copytree(old, tmp_path / "uninterrupted")
    replace_code(tmp_path / "uninterrupted")
    expected, number, is_done = contents(tmp_path / "uninterrupted"), 0, False
    while not is_done:
        folder, left = shutil.copytree(old, tmp_path / f"interrupted-{number}"), iter(range(number))

        def interruptible(action, left=left):
            return lambda *arguments, **options: (
                action(*arguments, **options) if next(left, None) is not None else stop()
            )

        with monkeypatch.context() as patch, contextlib.suppress(InterruptedError):
            patch.setattr(renewal, "write_atomic", interruptible(renewal.write_atomic))
            patch.setattr(Path, "unlink", interruptible(Path.unlink))
            replace_code(folder)
            is_done = True
        replace_code(folder)
        assert contents(folder) == expected, number
        number += 1
    assert number > len(ALWAYS)


def stop():
    raise InterruptedError


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: (run / "config.json").unlink(), "no config.json in "),
        (lambda run: (run / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: model_type is None, not one of zoo_gpt, "),
        (lambda run: change_config(run, model_type="gpt2"), "config.json: model_type is 'gpt2', not one of zoo_gpt, "),
        (lambda run: change_config(run, model_type=["zoo_gpt"]), "model_type is ['zoo_gpt'], not one of"),
        (lambda run: change_config(run, architectures=["MyGPT"]), "architectures is ['MyGPT'], which is none of"),
        (lambda run: change_config(run, auto_map="gpt.ZooGPT"), "auto_map is 'gpt.ZooGPT', which maps nothing"),
        (lambda run: (run / "SHA256SUMS").write_text("abc\n"), "SHA256SUMS, line 1: not a sha256"),
        (lambda run: (run / "eval_results.json").write_text("{"), "eval_results.json is not JSON"),
    ],
    ids=["no config", "torn", "a list", "a stock model", "no name", "a person's class", "no map", "sums", "results"],
)
def test_a_folder_that_is_no_checkpoint_of_ours_is_refused_in_one_line(old, hub, capsys, change, said):
    push(old, "me/gpt")
    change(old)
    before = contents(old)
    message = refused(old)
    assert said in message and str(old) in message and contents(old) == before
    with pytest.raises(SystemExit):
        main([str(old), "--repo", "me/gpt", "--code_only"])
    assert said in capsys.readouterr().err and len(hub.repository("me/gpt").log()) == 2
    if (old / "config.json").exists():
        edit(**{name: (old / name).read_text() for name in ("config.json", "SHA256SUMS", "eval_results.json")})
        message = refused("me/gpt")
        assert said in message and "me/gpt/" in message and "/tmp" not in message


def test_a_run_that_is_still_written_is_refused(old, monkeypatch):
    def busy(*args):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = contents(old)
    monkeypatch.setattr("fcntl.lockf", busy)
    assert f"RUN_DIR {old} is being written by" in refused(old)
    assert contents(old) == before


# ---- the Hub ----


def test_the_repository_is_changed_in_one_commit_that_leaves_the_weights_alone(old, hub):
    push(old, "me/gpt")
    repository = hub.repository("me/gpt")
    before, weights = repository.files(), repository.read_commit("main")["files"]["model.safetensors"]
    hub.requests.clear()
    replace_code(old, "me/gpt")
    after = repository.files()
    titles = [commit["title"] for commit in repository.log()]
    assert titles == [f"Replace the code by that of hf_models {__version__}", "Publish gpt", "initial commit"]
    assert differing(before, after) == ALWAYS | FORMER.keys() and not FORMER.keys() & after.keys()
    assert repository.read_commit("main")["files"]["model.safetensors"] == weights
    assert not [
        one for one in hub.requests if one.method == "PUT" or "safetensors" in one.path or "storage" in one.path
    ]
    assert f"It is the code of hf_models {__version__}." in after["README.md"].decode()
    assert after == {
        **{name: content for name, content in contents(old).items() if name in after},
        **{".gitattributes": after[".gitattributes"]},
    }
    assert load_verified("me/gpt").config.zoo_version == __version__


def test_the_run_then_has_nothing_to_push(old, hub):
    push(old, "me/gpt")
    replace_code(old, "me/gpt")
    before = contents(old)
    push(old, "me/gpt")
    assert len(hub.repository("me/gpt").log()) == 3 and contents(old) == before


def test_of_a_repository_alone_nothing_is_needed_here(old, hub, tmp_path, monkeypatch):
    push(old, "me/gpt")
    card = hub.repository("me/gpt").files()["README.md"].decode()
    words = card.replace("*To be written", "Not for poems. *To be written")
    edit(**{"README.md": words, "app.py": "import gradio", "demo/app.py": "", "LICENSE.txt": "mine"})
    before = hub.repository("me/gpt").files()
    monkeypatch.chdir(tmp_path)
    main(["me/gpt", "--code_only"])
    after = hub.repository("me/gpt").files()
    assert differing(before, after) == ALWAYS | FORMER.keys()
    assert b"Not for poems." in after["README.md"] and b'model="me/gpt"' in after["README.md"]
    assert load_verified("me/gpt").num_parameters() > 0
    push(old, "me/gpt")  # of the old run, whose words were changed on the Hub
    assert b"Not for poems." in hub.repository("me/gpt").files()["README.md"]


def test_a_second_time_there_is_no_commit(old, hub, capsys):
    push(old, "me/gpt")
    replace_code(old, "me/gpt")
    hub.requests.clear()
    capsys.readouterr()
    replace_code("me/gpt")
    replace_code(old, "me/gpt")
    said = f"{hub.endpoint}/me/gpt has the current code already, of hf_models {__version__}\n"
    assert capsys.readouterr().out.count(said) == 2
    assert len(hub.repository("me/gpt").log()) == 3 and {one.method for one in hub.requests} == {"GET"}
    assert sum(one.sent for one in hub.requests) < 50_000


def test_a_dry_run_shows_what_would_become_of_the_repository(old, hub, capsys):
    push(old, "me/gpt")
    before = contents(old)
    capsys.readouterr()
    hub.requests.clear()
    main([str(old), "--repo", "me/gpt", "--code_only", "--dry-run"])
    shown = [tuple(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {words[-1] for words in shown if words[0] == "send"} == ALWAYS
    assert {words[-1] for words in shown if words[:1] == ("delete",)} == set(FORMER)
    assert ("unchanged", f"{(old / 'layers.py').stat().st_size:,}", "layers.py") in shown
    assert not [words for words in shown if "safetensors" in words[-1]]
    assert contents(old) == before and len(hub.repository("me/gpt").log()) == 2
    assert {one.method for one in hub.requests} == {"GET"}


def test_a_repository_with_other_weights_than_the_folder_keeps_its_own_results(old, hub, make_model):
    push(old, "me/gpt")
    published = hub.repository("me/gpt").files()
    results = json.loads((old / "eval_results.json").read_text())
    (old / "eval_results.json").write_text(json.dumps({**results, "eval_bits_per_byte": 1.11}))
    make_model(ZooGPTForCausalLM, hidden_size=64).save_pretrained(old)
    write_checksums(old)
    replace_code(old, "me/gpt")
    after = hub.repository("me/gpt").files()
    assert (
        b"| bits per byte | 2.29 |" in after["README.md"] and b"| bits per byte | 1.11 |" in contents(old)["README.md"]
    )
    assert json.loads(after["config.json"])["hidden_size"] == json.loads(published["config.json"])["hidden_size"] == 32
    assert load_verified("me/gpt").config.hidden_size == 32 and load_verified(old).config.hidden_size == 64


def test_a_repository_without_sums_and_card_is_given_code_alone(make_model, hub, tmp_path):
    make_model(ZooGPTForCausalLM).save_pretrained(tmp_path / "gpt")
    expected = contents(tmp_path / "gpt")
    age(tmp_path / "gpt")
    HfApi().create_repo("me/gpt")
    HfApi().upload_folder(repo_id="me/gpt", folder_path=tmp_path / "gpt")
    replace_code("me/gpt")
    files = hub.repository("me/gpt").files()
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == expected


def test_a_branch_is_changed_alone_and_a_tag_names_the_commit(old, hub):
    push(old, "me/gpt")
    push(old, "me/gpt", branch="step-3")
    main(["me/gpt", "--code_only", "--branch", "step-3", "--tag", "renewed"])
    repository = hub.repository("me/gpt")
    assert "earlier.py" in repository.files("main") and "earlier.py" not in repository.files("step-3")
    assert repository.tags == {"renewed": repository.resolve("step-3")}
    assert b'model="me/gpt", revision="step-3"' in repository.files("step-3")["README.md"]
    assert "the Hub has no such user, repository or branch" in refused("me/gpt", branch="step-4")
    assert "me/gpt is public" in refused("me/gpt", private=True)


def test_a_commit_of_somebody_else_in_between_is_taken_in(old, hub, monkeypatch):
    push(old, "me/gpt")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.append(fault := Fault("delay", path="/commit/", seconds=1))
    thread = threading.Thread(target=replace_code, args=("me/gpt",))
    thread.start()
    assert fault.reached.wait(10)
    card = hub.repository("me/gpt").files()["README.md"].decode()
    edit(**{"README.md": card.replace("*To be written", "Not for poems. *To be written"), "theirs.txt": "words"})
    thread.join()
    repository = hub.repository("me/gpt")
    files = repository.files()
    assert len(repository.log()) == 4 and "theirs.txt" in files and "earlier.py" not in files
    assert b"Not for poems." in files["README.md"] and __version__.encode() in files["README.md"]


# ---- the command line ----


def test_without_repo_the_code_is_replaced_where_a_push_would_send_it(old, hub, capsys):
    push(old, "me/gpt")
    repository = hub.repository("me/gpt")
    before = repository.files()
    main([str(old), "--code_only", "--dry-run"])
    assert "would publish to " in capsys.readouterr().out and repository.files() == before
    main([str(old), "--code_only"])
    assert f"changed {old}:" in (printed := capsys.readouterr().out) and "only the folder" not in printed
    assert repository.log()[0]["title"] == f"Replace the code by that of hf_models {__version__}"
    assert differing(before, repository.files()) == ALWAYS | FORMER.keys()


def test_without_a_repository_or_a_login_only_the_folder_changes_and_it_says_so(old, hub, capsys, monkeypatch):
    folders = [shutil.copytree(old, old.with_name(name)) for name in ("logged-out", "offline", "no name of a repo")]
    main([str(old), "--code_only"])
    said = "only the folder is changed: your login has no repository gpt on the Hub; --repo names"
    assert said in (printed := capsys.readouterr().out) and f"changed {old}:" in printed
    assert not [request for request in hub.requests if request.method != "GET"]
    main([str(folders[2]), "--code_only"])
    assert "your login has no repository no name of a repo on the Hub" in capsys.readouterr().out
    hub.requests.clear()
    monkeypatch.setattr("training.hub.publish.is_offline_mode", lambda: True)
    main([str(folders[1]), "--code_only"])
    assert "only the folder is changed: HF_HUB_OFFLINE is set" in capsys.readouterr().out
    monkeypatch.setattr("training.hub.publish.get_token", lambda: None)
    main([str(folders[0]), "--code_only"])
    assert "only the folder is changed: nobody is logged in" in (printed := capsys.readouterr().out)
    assert f"changed {folders[0]}:" in printed and not hub.requests


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "--step", "3"], "--code_only takes no --step: name its branch, --branch step-3"),
        (["RUN", "--branch", "next"], "are about a repository: say which one with --repo"),
        (["me/gpt", "--repo", "me/gpt"], "me/gpt is not a folder; for the repository alone, give me/gpt in its place"),
        (
            ["runs/gtp"],
            "cannot replace the code of runs/gtp on the Hub (there is no such folder here): the Hub has no ",
        ),
        (["RUN/nothing"], "(there is no such folder here): Repo id must be"),
    ],
)
def test_a_wrong_command_is_one_line_and_changes_nothing(old, hub, capsys, words, said):
    before = contents(old)
    with pytest.raises(SystemExit) as caught:
        main(["--code_only", *(word.replace("RUN", str(old)) for word in words)])
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and said in printed and len(printed.splitlines()) == 1
    assert contents(old) == before and not (old / "nothing").exists()


def test_a_command_that_may_be_repeated_is_named(old, hub, monkeypatch):
    push(old, "me/gpt")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.append(Fault("fail", times=99, status=503))
    assert refused("me/gpt").endswith("; `python -m training.publish me/gpt --code_only` goes on where it stopped")
    repeated = f"; `python -m training.publish {old} --repo=me/gpt --code_only --dry-run` asks again"
    assert refused(old, "me/gpt", dry_run=True).endswith(repeated)
