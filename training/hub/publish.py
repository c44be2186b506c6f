"""Publishes a finished run on the Hub, in one commit that is safe to repeat.

    python -m training.publish runs/gpt-embedded --repo user/name
    python -m training.publish runs/gpt-embedded --code_only    only replace the code by the current one, here and there
    python -m training.publish user/name --code_only            the same, only there

A push compares the run with the repository and sends what differs. The same commit deletes what an earlier push sent
and the run no longer has.
"""

import argparse
import contextlib
import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # of the HTTP client that huggingface_hub uses, whichever it is
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from hf_models.base import ZOO_VERSION
from hf_models.verify import SUMS, checksums, is_listed
from training.hub.card import EVAL_RESULTS, PICTURES, card_files
from training.hub.card_edits import is_foreign, sections
from training.hub.commits import Commit, Plan, refuse_token
from training.hub.errors import explain, is_passing, persist, without_token
from training.hub.renewal import PACKAGE, renew
from training.hub.snapshots import WEIGHTS, export_step
from training.hub.snippets import EXAMPLE
from training.run.arguments import one_line, user_errors
from training.run.folder import RunLock, text_of, write_atomic

# What is published besides the checkpoint, whose files SHA256SUMS lists. The other files of a run (checkpoints/ with
# the state of the optimizer, locks, logs of trackers) are not published.
MEASURED = ["eval_results.json", "metrics.jsonl", *PICTURES]


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
    """Publishes a checkpoint with its code, processor, card, metrics and pictures, in one commit.

    What the repository holds already is not sent again; if nothing differs, there is no commit.

    Args:
        repo_id: "user/name"; the repository is made if there is none. Without "user/" it belongs to the user of the
            login, which is from `hf auth login` or HF_TOKEN.
        private: make the repository private, and refuse a public one.
        branch: the branch to commit to; it is made from `main` if there is none. None: `main`, or `step-N` for a step.
        tag: a name for the commit.
        step: publish the weights of `checkpoints/step-N`, see `training.hub.snapshots`; None: the weights of the end.
        dry_run: only print what would be done; nothing is written, neither on the Hub nor here.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: it cannot be published; the message says in one line why, and what to do.
    """
    options = {"--branch": branch, "--tag": tag, "--step": step, "--private": private, "--dry-run": dry_run}

    def publish() -> str:
        folder = Path(output_dir)
        with contextlib.ExitStack() as stack:
            if step is not None:
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="publish-"))
                names = [name for name in published_files(folder) if name not in MEASURED]
                run, folder = folder, Path(temporary, folder.resolve().name)
                export_step(run, step, names, folder)
            to_branch = branch or ("main" if step is None else f"step-{step}")
            return _Push(folder, repo_id, private, to_branch, tag).run(dry_run)

    what = f"publish {output_dir} to {repo_id}"
    return _in_one_line(publish, what, repo_id, output_dir, {"--repo": repo_id, **options})


def replace_code(
    run: str | Path,
    repo_id: str | None = None,
    private: bool = False,
    *,
    branch: str | None = None,
    tag: str | None = None,
    dry_run: bool = False,
):
    """Replaces the code of a checkpoint by the current code.

    What depends on the code changes with it: auto_map and version in the config, the sums and the card. The weights are
    not read, sent or fetched, and the words of people in the card stay.

    Args:
        run: a folder that a run or `save_pretrained` left; or "user/name", a repository of the Hub.
        repo_id: a repository, "user/name", whose code is replaced too, in one commit. Its weights may differ from those
            of the folder. None: only the folder is changed.
        private, branch, tag: as in `push`. The branch has to exist.
        dry_run: only print what would be done; nothing is written, neither on the Hub nor here.

    Raises:
        ValueError: it cannot be done; the message says in one line why, and what to do.
    """
    folder, options = Path(run), {"--branch": branch, "--tag": tag, "--private": private}
    options = {"--repo": repo_id, "--code_only": True, **options, "--dry-run": dry_run}
    if folder.is_dir():
        if repo_id is None and (branch or tag or private):
            raise ValueError("--branch, --tag and --private are about a repository: say which one with --repo")
        _replace_code_here(folder, dry_run)
        if repo_id is None:
            return
        what = f"replace the code of {repo_id}"
    elif repo_id is None:
        repo_id, what = str(run), f"replace the code of {run} on the Hub (there is no such folder here)"
    else:
        raise ValueError(f"{run} is not a folder; for the repository alone, give {repo_id} in its place")

    def publish():
        _CodePush(repo_id, private, branch or "main", tag).run(dry_run)

    _in_one_line(publish, what, repo_id, run, options)


def find_repository(folder: Path) -> str | None:
    """Returns the repository that `python -m training.publish FOLDER` would publish to: the login's user, and the name
    of the folder. None, after saying why, if there is no such repository or nobody is logged in.

    Raises:
        ValueError: the folder holds no checkpoint of this package, or the Hub does not answer.
    """
    renew(folder)  # before the Hub is asked
    if get_token() is None:
        reason = "nobody is logged in"
    elif is_offline_mode():
        reason = "HF_HUB_OFFLINE is set"
    else:
        name = folder.resolve().name

        def find() -> str | None:
            repo_id = f"{persist(HfApi().whoami)['name']}/{name}"
            try:
                return repo_id if persist(lambda: HfApi().repo_exists(repo_id)) else None
            except HFValidationError:  # the Hub allows no such name
                return None

        what = f"look for a repository {name} on the Hub"
        options = {"--code_only": True, "--dry-run": True}
        if repo_id := _in_one_line(find, what, name, folder, options):
            return repo_id
        reason = f"your login has no repository {name} on the Hub"
    print(f"only the folder is changed: {reason}; --repo names a repository whose code is to be replaced", flush=True)
    return None


def _replace_code_here(folder: Path, dry_run: bool):
    lines = renew(folder).lines(folder)
    if not lines:
        print(f"{folder} has the current code already, of hf_models {ZOO_VERSION}", flush=True)
    elif dry_run:
        print(f"would change {folder}:", *lines, sep="\n", flush=True)
    else:
        with RunLock(folder, "RUN_DIR"):  # a training that still writes it is named
            renew(folder).apply(folder)
        print(f"changed {folder}:", *lines, sep="\n", flush=True)


def _in_one_line(action: Callable, what: str, repo_id: str, run_dir: str | Path, options: dict):
    """Calls `action`, and turns whatever goes wrong into a ValueError of one line.

    The line says what cannot be done and why. If repeating may help, it also says which command to repeat.

    Args:
        what: what `action` does, for the message.
        run_dir, options: words of the command, by the options that take them.
    """
    try:
        return action()
    except (ValueError, OSError, RuntimeError, HTTPError) as error:
        reason = explain(error, repo_id)
        if is_passing(error):
            given = {flag: value for flag, value in options.items() if value is not None and value is not False}
            words = [flag if value is True else f"{flag}={value}" for flag, value in given.items()]
            repeated = "asks again" if options["--dry-run"] else "goes on where it stopped"
            reason += f"; `python -m training.publish {shlex.join([str(run_dir), *words])}` {repeated}"
    # It is raised outside of the handler, since a traceback would also show the client's message.
    raise ValueError(without_token(f"cannot {what}: {reason}"))


def published_files(folder: Path) -> list[str]:
    """Returns the names of the files in a run's folder that are published.

    Raises:
        ValueError: the folder is not a finished run, or a file is a symbolic link, whose target may not belong to the
            run.
    """
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
    """Returns the sha256 of each file that a SHA256SUMS lists, by name."""
    lines = (line.partition("  ") for line in (text or "").split("\n"))
    return {name: sha256 for sha256, _, name in lines if name}


def _check_weights(folder: Path, sums: dict[str, str]):
    """Raises ValueError if the weights are not those that the run's own SHA256SUMS lists. That file was written with
    the results, so it tells which weights were measured."""
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


class _Push(Commit):
    """The commit that makes a repository hold a run."""

    def __init__(self, folder: Path, repo_id: str, private: bool, branch: str, tag: str | None):
        super().__init__(repo_id, private, branch, tag)
        self.folder, self.title = folder, f"Publish {folder.resolve().name}"
        self.files = {name: CommitOperationAdd(name, folder / name) for name in published_files(folder)}
        sums = checksums(folder)
        _check_weights(folder, _read_sums(sums))
        for name, sha256 in _read_sums(sums).items():  # so that comparison and client do not hash a file again
            self.files[name].upload_info.sha256 = bytes.fromhex(sha256)
        self.files[SUMS] = CommitOperationAdd(SUMS, sums.encode())
        self.sums, self.readme = sums, None  # what the folder gets at the end
        refuse_token([*self.files.values(), *self.card(None)])  # errors of the run come before errors of the Hub

    def run(self, dry_run: bool) -> str:
        url = super().run(dry_run)
        if not dry_run:
            try:
                self.write_back()
            except OSError as error:
                print(f"{one_line(error)}: {self.folder} stays without the card and the sums of {url}", flush=True)
        return url

    def write_back(self):
        """Writes the published card and sums into the folder. This must not happen before the commit, since the card
        lists which versions were published."""
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

    def attempt(self) -> Plan:
        self.api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
        if self.branch != "main":
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
        return super().attempt()

    def foresee(self) -> Plan:
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
        """Compares the run with the repository at `revision`, file by file."""
        head, there = self.look(revision)
        files = [*self.files.values(), *self.card(self.fetch("README.md", there, head))]
        plan = self.plan(head, there, files)
        plan.delete = self.left_over({file.path_in_repo for file in files}, there, head)
        return plan

    def card(self, theirs: str | None) -> list[CommitOperationAdd]:
        """Returns README.md, with what people wrote here and on the Hub, and `.eval_results`. README.md is left out if
        a person wrote the whole one on the Hub."""
        revision = None if self.branch == "main" else self.branch
        self.own = text_of(self.folder / "README.md")  # read before the card is made, to notice later changes
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
        """Returns the files that an earlier push sent and this run does not have: weights, results, and what the
        SHA256SUMS on the Hub lists. All other files belong to people."""
        others = [name for name in there if name not in names and (_is_published(name) or name == EVAL_RESULTS)]
        if not others:
            return []
        ours = {*MEASURED, EXAMPLE, EVAL_RESULTS, *_read_sums(self.fetch(SUMS, there, revision))}
        return [name for name in others if name in ours or WEIGHTS.fullmatch(name)]


class _CodePush(Commit):
    """The commit that gives a repository the current code, whatever checkpoint it holds."""

    title = f"Replace the code by that of hf_models {ZOO_VERSION}"
    folder = PACKAGE

    def attempt(self) -> Plan:
        plan = super().attempt()
        print(f"{self.url} has the current code{'' if plan.changes else ' already'}, of hf_models {ZOO_VERSION}")
        return plan

    def compare(self, revision: str) -> Plan:
        """Compares the current code with the repository at `revision`. It fetches what `renew` reads; of pictures,
        `renew` reads only the names."""
        head, there = self.look(revision)
        code = [name for name in there if name.endswith(".py") and "/" not in name]
        with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
            for name in ["config.json", SUMS, "README.md", "eval_results.json", *code]:
                if (text := self.fetch(name, there, head)) is not None:
                    Path(temporary, name).write_bytes(text.encode())
            for name in PICTURES:
                if name in there:
                    Path(temporary, name).touch()
            try:
                renewal = renew(Path(temporary))
            except ValueError as error:
                raise ValueError(str(error).replace(temporary, self.repo_id)) from None
        plan = self.plan(head, there, [CommitOperationAdd(name, content) for name, content in renewal.files.items()])
        plan.delete = renewal.delete
        return plan


# ------------------------------------------------------------------------------------------------ the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message.partition(" '")[0].rstrip(":"))  # without the value, which may be a secret


def main(argv: list[str] | None = None):
    """`python -m training.publish`: see --help."""
    parser = _Parser(
        prog="python -m training.publish",
        description="Publish a finished run on the Hugging Face Hub, in one commit. The login is that of "
        "`hf auth login`, or HF_TOKEN. The same command again sends only what has changed, and goes on where an "
        "interrupted one stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="output folder of a finished run; with --code_only also a USER/NAME"
    )
    parser.add_argument("--repo", metavar="USER/NAME", help="default: the login's user, and the name of the folder")
    parser.add_argument("--private", action="store_true", help="make a private repository, and refuse a public one")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be sent and deleted")
    parser.add_argument("--branch", metavar="NAME", help="commit to this branch; default: main, or step-N with --step")
    parser.add_argument("--tag", metavar="NAME", help="give the commit this name")
    parser.add_argument("--step", metavar="N", type=int, help="publish the weights of checkpoints/step-N, not the last")
    parser.add_argument(
        "--code_only",
        "--code-only",
        action="store_true",
        help="replace the code of a checkpoint by the current one, with the sums and the card, but leave the weights "
        "alone: in the folder RUN_DIR and in its repository, if there is one; or only in the repository RUN_DIR",
    )
    with user_errors(), contextlib.ExitStack() as stack:
        args, unknown = parser.parse_known_args(argv)
        if unknown:  # the message does not repeat a value, which may be a secret
            what = f"unknown option {unknown[0].split('=')[0]}" if unknown[0].startswith("-") else "give one RUN_DIR"
            raise ValueError(f"{what}; see `python -m training.publish --help`")
        if args.code_only:
            if args.step is not None:
                raise ValueError(f"--code_only takes no --step: name its branch, --branch step-{args.step}")
            options = {"branch": args.branch, "tag": args.tag, "dry_run": args.dry_run}
            is_folder = Path(args.run_dir).is_dir()
            repo = find_repository(Path(args.run_dir)) if is_folder and args.repo is None else args.repo
            replace_code(args.run_dir, repo, args.private, **options)
            return
        published_files(folder := Path(args.run_dir))  # otherwise the lock would make a folder of a mistyped name
        if not args.dry_run and os.access(folder, os.W_OK):  # a folder that nobody can write needs no lock
            stack.enter_context(RunLock(folder, "RUN_DIR"))  # a training that still writes it is named
        options = {"branch": args.branch, "tag": args.tag, "step": args.step, "dry_run": args.dry_run}
        url = push(folder, args.repo or folder.resolve().name, args.private, **options)
        if not args.dry_run:
            print(f"published to {url}")


if __name__ == "__main__":
    main()
