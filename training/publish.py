"""From a finished run to the Hub: one commit, which is safe to repeat.

    python -m training.publish runs/gpt-embedded --repo user/name

A push compares the run with the repository, sends what differs, and in the same commit deletes what an earlier push
left there and the run no longer has. It remembers nothing: whatever was interrupted, and whichever answer was lost, it
looks at the repository again and does what is left. The commit names the one that it was compared with as its parent,
so that two writers never mix.
"""

import argparse
import contextlib
import copy
import os
import re
import shlex
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.errors import (
    HTTPError,  # of the HTTP client that huggingface_hub uses, whichever it is
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, get_token, hf_raise_for_status, validate_repo_id
from huggingface_hub.utils.sha import git_hash

from hf_models.verify import SUMS, checksums, is_listed
from training.arguments import one_line, user_errors
from training.card import EVAL_RESULTS, PICTURES, card_files
from training.files import text_of, write_atomic
from training.hand_written import is_foreign, sections
from training.hub_errors import explain, is_passing, persist, without_token
from training.run_folder import RunLock
from training.snippets import EXAMPLE
from training.steps import WEIGHTS, export_step

# Beside the checkpoint, which is what SHA256SUMS lists. Whatever else a run leaves (checkpoints/ with the state of the
# optimizer, locks, logs of trackers) is not for others.
MEASURED = ["eval_results.json", "metrics.jsonl", *PICTURES]
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{34}\b")  # as the Hub makes them


def push(
    output_dir: str | Path,
    repo_id: str,
    private: bool = False,
    *,
    branch: str | None = None,
    tag: str | None = None,
    step: int | None = None,
    dry_run: bool = False,
) -> str:
    """Makes the repository hold the checkpoint with its code, processor, card, metrics and pictures, in one commit,
    and returns its URL. What it holds already is not sent again; if nothing differs there is no commit.

    Args:
        repo_id: "user/name", made if there is none; without a user it is that of the login, which is `hf auth
            login`'s or HF_TOKEN's.
        private: the repository is not to be public; one that is, is refused.
        branch: what to commit to, made from `main` if there is none. None: `main`; of a step, `step-N`.
        tag: a name for the commit.
        step: publish the weights of `checkpoints/step-N`, see `training.steps`; None: those of the end.
        dry_run: only print what would be done; nothing is written, neither there nor here.

    Raises:
        ValueError: in one line, why it cannot be published, and what to do.
    """
    folder, options = Path(output_dir), {"branch": branch, "tag": tag, "step": step}
    try:
        with contextlib.ExitStack() as stack:
            if step is not None:
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="publish-"))
                names = [name for name in published_files(folder) if name not in MEASURED]
                run, folder = folder, Path(temporary, folder.resolve().name)
                export_step(run, step, names, folder)
                branch = branch or f"step-{step}"
            return _Push(folder, repo_id, private, branch or "main", tag).run(dry_run)
    except (ValueError, OSError, RuntimeError, HTTPError) as error:
        reason = explain(error, repo_id)
        if is_passing(error):
            words = [f"--{name}={value}" for name, value in options.items() if value is not None]
            words = [str(output_dir), f"--repo={repo_id}", *words] + ["--private"] * private + ["--dry-run"] * dry_run
            what = "asks again" if dry_run else "goes on where it stopped"
            reason += f"; `python -m training.publish {shlex.join(words)}` {what}"
    # Outside of the handler: a traceback would show the client's words too.
    raise ValueError(without_token(f"cannot publish {output_dir} to {repo_id}: {reason}"))


def published_files(folder: Path) -> list[str]:
    """The names of what a run publishes as it lies there. Raises ValueError if it is not a finished run, or a file is a
    link: what it leads to may be no part of the run."""
    if not (folder / "config.json").exists():
        raise ValueError(f"no config.json in {folder}, so it is not a finished run")
    names = sorted(path.name for path in folder.iterdir() if path.is_symlink() or path.is_file())
    names = [name for name in names if _is_published(name)]
    for name in names:
        if (folder / name).is_symlink():
            raise ValueError(f"{folder / name} is a symbolic link: put the file itself there")
    return names


def _is_published(name: str) -> bool:
    return is_listed(name) or name == EXAMPLE or name in MEASURED


def _read_sums(text: str | None) -> dict[str, str]:
    """sha256 by name, of what SHA256SUMS lists."""
    lines = (line.partition("  ") for line in (text or "").split("\n"))
    return {name: sha256 for sha256, _, name in lines if name}


def _check_weights(folder: Path, sums: dict[str, str]):
    """Raises ValueError if the weights are not those that the run's own SHA256SUMS lists, which was written with the
    results."""
    if not (folder / SUMS).exists():
        return
    measured = _read_sums((folder / SUMS).read_text(encoding="utf-8"))
    for name in sorted(measured.keys() | sums.keys()):
        if WEIGHTS.fullmatch(name) and measured.get(name) != sums.get(name):
            raise ValueError(
                f"{folder / name} is not what {SUMS} lists: it was damaged or changed since it was measured; repeat "
                f"the run's command, or if it is as it should be, hf_models.verify.write_checksums({str(folder)!r})"
            )


# ------------------------------------------------------------------------------------------------------- one push


@dataclass
class Plan:
    """What makes a repository hold a run."""

    head: str | None  # the commit that it was compared with; None: there is no such repository
    send: list[CommitOperationAdd] = field(default_factory=list)
    keep: list[CommitOperationAdd] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)

    @property
    def changes(self) -> list:
        return [*self.send, *self.delete]

    def __str__(self) -> str:
        size, number = sum(file.upload_info.size for file in self.send), len(self.send)
        sent = f"{number} file{'s' * (number != 1)} to send ({size / 1e6:,.1f} MB)"
        return f"{sent}, {len(self.keep)} unchanged, {len(self.delete)} to delete"

    def lines(self) -> list[str]:
        """A line for each file: what becomes of it, and its size in bytes."""
        shown = [("send", file) for file in self.send] + [("unchanged", file) for file in self.keep]
        lines = [(file.path_in_repo, what, f"{file.upload_info.size:,}") for what, file in shown]
        lines += [(name, "delete", "") for name in self.delete]
        return [f"  {what:9} {size:>14}  {name}" for name, what, size in sorted(lines)]


class _Push:
    """One run, and the repository that is to hold it."""

    def __init__(self, folder: Path, repo_id: str, private: bool, branch: str, tag: str | None):
        self.folder, self.private, self.branch, self.tag = folder, private, branch, tag
        self.api = HfApi()
        self.repo_id = repo_id if "/" in repo_id else f"{persist(self.api.whoami)['name']}/{repo_id}"
        validate_repo_id(self.repo_id)
        self.files = {name: CommitOperationAdd(name, folder / name) for name in published_files(folder)}
        sums = checksums(folder)
        _check_weights(folder, _read_sums(sums))
        for name, sha256 in _read_sums(sums).items():  # for the comparison and for the client: each is hashed once
            self.files[name].upload_info.sha256 = bytes.fromhex(sha256)
        self.files[SUMS] = CommitOperationAdd(SUMS, sums.encode())
        self.sums, self.readme = sums, None  # what the folder is to have at the end
        _refuse_token([*self.files.values(), *self.card(None)])  # what is wrong with the run is said first

    def run(self, dry_run: bool) -> str:
        """The URL, once the repository holds the run."""
        url = f"{self.api.endpoint}/{self.repo_id}" + (f"/tree/{self.branch}" if self.branch != "main" else "")
        if dry_run:
            plan = persist(self.foresee)
            print(f"would publish to {url}: {plan}", *plan.lines(), sep="\n")
            return url
        persist(self.attempt)
        try:
            self.write_back()
        except OSError as error:
            print(f"{one_line(error)}: {self.folder} stays without the card and the sums of {url}", flush=True)
        return url

    def write_back(self):
        """Gives the folder what was published; not earlier: the card tells what was published from what is new."""
        if text_of(self.folder / SUMS) != self.sums:
            write_atomic(self.folder / SUMS, self.sums)
        readme = self.folder / "README.md"
        now = text_of(readme)
        if self.readme is None or now == self.readme:
            return
        if now == self.own:
            write_atomic(readme, self.readme)
        else:
            print(f"{readme} was changed while it was published, and stays as it is: publish again", flush=True)

    def attempt(self):
        """Everything from the beginning. Whatever an earlier attempt has done is found done."""
        self.api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
        if self.branch != "main":
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
        plan = self.compare(self.branch)
        is_tagged, head = self.is_tagged(plan), plan.head
        if plan.changes:
            print(f"{self.repo_id}: {plan}", flush=True)
            head = self.commit(plan)
        if self.tag and not is_tagged:
            self.api.create_tag(self.repo_id, tag=self.tag, revision=head, exist_ok=True)

    def foresee(self) -> Plan:
        """What an attempt would find, without making anything."""
        try:
            try:
                plan = self.compare(self.branch)
            except RevisionNotFoundError:
                plan = self.compare("main")
            self.is_tagged(plan)
            return plan
        except RepositoryNotFoundError:
            return Plan(None, send=[*self.files.values(), *self.card(None)])

    def compare(self, revision: str) -> Plan:
        """The run and the repository at `revision`, file by file."""
        info = self.api.model_info(self.repo_id, revision=revision)
        if self.private and not info.private:
            raise ValueError(f"{self.repo_id} is public: make it private in its settings, or leave out --private")
        there = self.tree(info.sha)
        files = [*self.files.values(), *self.card(self.fetch("README.md", there, info.sha))]
        _refuse_token(files)
        plan = Plan(info.sha)
        for file in files:
            (plan.keep if _is_same(file, there.get(file.path_in_repo)) else plan.send).append(file)
        plan.delete = self.left_over({file.path_in_repo for file in files}, there, info.sha)
        return plan

    def commit(self, plan: Plan) -> str:
        """The id of the commit, in which everything has arrived."""
        # Copies: the client marks what it has sent, which the next attempt is not to rely on.
        changes = [*map(copy.copy, plan.send), *map(CommitOperationDelete, plan.delete)]
        message = f"Publish {self.folder.resolve().name}"
        done = self.api.create_commit(
            self.repo_id, changes, commit_message=message, revision=self.branch, parent_commit=plan.head
        )
        there = self.tree(done.oid)
        lost = [file.path_in_repo for file in plan.send if not _is_same(file, there.get(file.path_in_repo))]
        if lost:
            raise ValueError(f"the repository did not take {', '.join(lost)}: is there a .gitignore in it?")
        return done.oid

    def tree(self, revision: str) -> dict[str, RepoFile]:
        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        return {file.path: file for file in tree if isinstance(file, RepoFile)}

    def card(self, theirs: str | None) -> list[CommitOperationAdd]:
        """README.md, with what a person wrote here and there, and `.eval_results`. Without README.md if the one that is
        there is a person's."""
        revision = None if self.branch == "main" else self.branch
        self.own = text_of(self.folder / "README.md")  # before it is read for the card
        texts = card_files(self.folder, source=self.repo_id, published=theirs, revision=revision)
        self.readme = ours = texts["README.md"]
        if theirs not in (None, ours):
            if is_foreign(theirs):
                print(f"README.md of {self.repo_id} was written by hand, and stays as it is", flush=True)
                del texts["README.md"]
                self.readme = None
            elif is_foreign(ours) and any(section.is_edited(None) for section in sections(theirs).values()):
                raise ValueError("README.md has no marks, and would overwrite what was written by hand on the Hub")
        return [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]

    def left_over(self, names: set[str], there: dict[str, RepoFile], revision: str) -> list[str]:
        """What an earlier push left and this run has not: weights, results, and what the SHA256SUMS there lists. All
        else is a person's."""
        others = [name for name in there if name not in names and (_is_published(name) or name == EVAL_RESULTS)]
        if not others:
            return []
        ours = {*MEASURED, EXAMPLE, EVAL_RESULTS, *_read_sums(self.fetch(SUMS, there, revision))}
        return [name for name in others if name in ours or WEIGHTS.fullmatch(name)]

    def fetch(self, name: str, there: dict[str, RepoFile], revision: str) -> str | None:
        """The text of a small file of the repository; from here if that is the same. None if there is none."""
        if name not in there:
            return None
        mine = self.folder / name
        if mine.exists() and git_hash(mine.read_bytes()) == there[name].blob_id:
            return mine.read_text(encoding="utf-8")
        response = get_session().get(hf_hub_url(self.repo_id, name, revision=revision), headers=build_hf_headers())
        hf_raise_for_status(response)
        if not there[name].lfs and git_hash(response.content) != there[name].blob_id:
            raise RuntimeError(f"{name} arrived damaged")
        return response.content.decode("utf-8")

    def is_tagged(self, plan: Plan) -> bool:
        """Whether the tag is where it shall be. Raises ValueError if it is elsewhere."""
        if self.tag is None:
            return False
        tags = {tag.name: tag.target_commit for tag in self.api.list_repo_refs(self.repo_id).tags}
        if self.tag in tags and (plan.changes or tags[self.tag] != plan.head):
            raise ValueError(f"the tag {self.tag} names another commit already: choose another --tag")
        return self.tag in tags


def _is_same(file: CommitOperationAdd, there: RepoFile | None) -> bool:
    if there is None or there.size != file.upload_info.size:
        return False
    if there.lfs:
        return there.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as content:
        return there.blob_id == git_hash(content.read())


def _refuse_token(files: Iterable[CommitOperationAdd]):
    """Raises ValueError if the login, or another token of the Hub, is in a file that is about to be everybody's."""
    token = (get_token() or "").encode()
    for file in files:
        if file.upload_info.size < 100e6 and not file.path_in_repo.endswith(".safetensors"):
            with file.as_file() as content:
                text = content.read()
            if (token and token in text) or TOKEN.search(text):
                whose = "your token" if token and token in text else "a token of the Hub"
                raise ValueError(f"{file.path_in_repo} contains {whose}: take it out, and make a new one")


# ------------------------------------------------------------------------------------------------ the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message.partition(" '")[0].rstrip(":"))  # the value that follows may be a secret


def main(argv: list[str] | None = None):
    """`python -m training.publish`: see --help."""
    parser = _Parser(
        prog="python -m training.publish",
        description="Publish a finished run on the Hugging Face Hub, in one commit. The login is that of "
        "`hf auth login`, or HF_TOKEN. The same command again sends only what has changed, and goes on where an "
        "interrupted one stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output folder of a finished run")
    parser.add_argument("--repo", metavar="USER/NAME", help="default: the login's user, and the name of the folder")
    parser.add_argument("--private", action="store_true", help="make a private repository, and refuse a public one")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be sent and deleted")
    parser.add_argument("--branch", metavar="NAME", help="commit to this branch; default: main, or step-N with --step")
    parser.add_argument("--tag", metavar="NAME", help="give the commit this name")
    parser.add_argument("--step", metavar="N", type=int, help="publish the weights of checkpoints/step-N, not the last")
    with user_errors(), contextlib.ExitStack() as stack:
        args, unknown = parser.parse_known_args(argv)
        if unknown:  # a value is not repeated: it may be a secret
            what = f"unknown option {unknown[0].split('=')[0]}" if unknown[0].startswith("-") else "give one RUN_DIR"
            raise ValueError(f"{what}; see `python -m training.publish --help`")
        published_files(folder := Path(args.run_dir))  # or the lock would make the folder of a mistyped name
        if not args.dry_run and os.access(folder, os.W_OK):  # what nobody can write needs no lock
            stack.enter_context(RunLock(folder, "RUN_DIR"))  # a training that still writes it is named
        options = {"branch": args.branch, "tag": args.tag, "step": args.step, "dry_run": args.dry_run}
        url = push(folder, args.repo or folder.resolve().name, args.private, **options)
        if not args.dry_run:
            print(f"published to {url}")


if __name__ == "__main__":
    main()
