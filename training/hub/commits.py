"""One commit on a branch of a repository of the Hub, which is safe to repeat.

It remembers nothing. After an interruption or a lost answer it looks at the repository again and does what is left.
The commit names as its parent the commit that it was compared with, so that two writers never mix their changes.
"""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, get_token, hf_raise_for_status, validate_repo_id
from huggingface_hub.utils.sha import git_hash

from training.hub.errors import persist

TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{34}\b")  # the form of tokens that the Hub makes


@dataclass
class Plan:
    """What has to change in a repository."""

    head: str | None  # the commit that was compared; None: there is no such repository
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
        """Returns a line for each file: what happens to it, and its size in bytes."""
        shown = [("send", file) for file in self.send] + [("unchanged", file) for file in self.keep]
        lines = [(file.path_in_repo, what, f"{file.upload_info.size:,}") for what, file in shown]
        lines += [(name, "delete", "") for name in self.delete]
        return [f"  {what:9} {size:>14}  {name}" for name, what, size in sorted(lines)]


class Commit(ABC):
    """One commit on a branch of a repository, made safely. A subclass says in `compare` what the commit contains."""

    title: str
    folder: Path  # files in it need not be fetched if the repository has the same

    def __init__(self, repo_id: str, private: bool, branch: str, tag: str | None):
        self.private, self.branch, self.tag = private, branch, tag
        self.api = HfApi()
        self.repo_id = repo_id if "/" in repo_id else f"{persist(self.api.whoami)['name']}/{repo_id}"
        validate_repo_id(self.repo_id)
        self.url = f"{self.api.endpoint}/{self.repo_id}" + (f"/tree/{branch}" if branch != "main" else "")

    def run(self, dry_run: bool) -> str:
        """Makes the commit if anything differs, or only prints what it would do, and returns the URL."""
        if dry_run:
            plan = persist(self.foresee)
            print(f"would publish to {self.url}: {plan}", *plan.lines(), sep="\n")
        else:
            persist(self.attempt)
        return self.url

    def attempt(self) -> Plan:
        """Does everything from the beginning, and skips what an earlier attempt has done. Returns what was left to
        do."""
        plan = self.compare(self.branch)
        is_tagged, head = self.is_tagged(plan), plan.head
        if plan.changes:
            print(f"{self.repo_id}: {plan}", flush=True)
            head = self.commit(plan)
        if self.tag and not is_tagged:
            self.api.create_tag(self.repo_id, tag=self.tag, revision=head, exist_ok=True)
        return plan

    def foresee(self) -> Plan:
        """Returns what an attempt would do, and does nothing."""
        plan = self.compare(self.branch)
        self.is_tagged(plan)
        return plan

    @abstractmethod
    def compare(self, revision: str) -> Plan:
        """Returns what has to change in the repository at `revision`."""

    def look(self, revision: str) -> tuple[str, dict[str, RepoFile]]:
        """Returns the commit at `revision` and its files."""
        info = self.api.model_info(self.repo_id, revision=revision)
        if self.private and not info.private:
            raise ValueError(f"{self.repo_id} is public: make it private in its settings, or leave out --private")
        return info.sha, self.tree(info.sha)

    def plan(self, head: str, there: dict[str, RepoFile], files: list[CommitOperationAdd]) -> Plan:
        """Returns which of the files differ from those in the repository."""
        refuse_token(files)
        plan = Plan(head)
        for file in files:
            (plan.keep if is_same(file, there.get(file.path_in_repo)) else plan.send).append(file)
        return plan

    def commit(self, plan: Plan) -> str:
        """Makes the commit, checks that everything has arrived, and returns its id."""
        # The client marks in these objects what it has sent. The next attempt must not rely on that, so it gets copies.
        changes = [*map(copy.copy, plan.send), *map(CommitOperationDelete, plan.delete)]
        done = self.api.create_commit(
            self.repo_id, changes, commit_message=self.title, revision=self.branch, parent_commit=plan.head
        )
        there = self.tree(done.oid)
        lost = [file.path_in_repo for file in plan.send if not is_same(file, there.get(file.path_in_repo))]
        if lost:
            raise ValueError(f"the repository did not take {', '.join(lost)}: is there a .gitignore in it?")
        return done.oid

    def tree(self, revision: str) -> dict[str, RepoFile]:
        """Returns the files at `revision` by their paths."""
        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        return {file.path: file for file in tree if isinstance(file, RepoFile)}

    def fetch(self, name: str, there: dict[str, RepoFile], revision: str) -> str | None:
        """Returns the text of a small file of the repository, without fetching it if `folder` has the same file; None
        if there is no such file."""
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
        """Returns whether the tag names the right commit already. Raises ValueError if it names another one."""
        if self.tag is None:
            return False
        tags = {tag.name: tag.target_commit for tag in self.api.list_repo_refs(self.repo_id).tags}
        if self.tag in tags and (plan.changes or tags[self.tag] != plan.head):
            raise ValueError(f"the tag {self.tag} names another commit already: choose another --tag")
        return self.tag in tags


def is_same(file: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Returns whether the file in the repository has the same content."""
    if there is None or there.size != file.upload_info.size:
        return False
    if there.lfs:
        return there.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as content:
        return there.blob_id == git_hash(content.read())


def refuse_token(files: Iterable[CommitOperationAdd]):
    """Raises ValueError if a file that is about to be published contains the token of the login, or another token."""
    token = (get_token() or "").encode()
    for file in files:
        if file.upload_info.size < 100e6 and not file.path_in_repo.endswith(".safetensors"):
            with file.as_file() as content:
                text = content.read()
            if (token and token in text) or TOKEN.search(text):
                whose = "your token" if token and token in text else "a token of the Hub"
                raise ValueError(f"{file.path_in_repo} contains {whose}: take it out, and make a new one")
