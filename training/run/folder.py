"""The output folder of a run: its files survive a crash, one process writes it, and it stays the run that it is.

output_dir/.lock       held by the one process that writes the run
output_dir/run.json    what the run is: model, data, seed, ...
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from torch import nn

from training.run.arguments import RunArguments, one_line, parse_arguments, print_error, user_errors
from training.run.processes import create_accelerator, on_main_process

# ---- files that survive a crash: written beside their place, forced to disk, renamed ----

TEMPORARY = ".tmp-"  # how names of unfinished files begin; a dead process may have left them, and they can be removed


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part, after a crash too."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_beside(path: Path) -> Path:
    """Returns a new name in the same folder for what will become `path`."""
    return path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:12]}")


def write_durably(path: Path, data: str | bytes) -> None:
    """Writes a file and forces it to disk."""
    with open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_of(path: Path) -> str | None:
    """Returns the text of a file; None if there is no such file."""
    return path.read_text(encoding="utf-8") if path.exists() else None


def file_record(path: Path) -> dict:
    """Returns size in bytes and sha256 of a file, as a manifest lists it."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# ---- one process writes, and the folder stays the run that it is ----

Arguments = TypeVar("Arguments", bound=RunArguments)


@contextlib.contextmanager
def open_run(arguments_class: type[Arguments]) -> Iterator[tuple[Arguments, Accelerator]]:
    """Reads the command line, connects the processes, and holds the output folder for this run alone.

    With `--restart`, an earlier run in the folder is first moved aside. An error that the user has to mend ends the
    script with one line: a wrong option here, a full disk anywhere in the block.
    """
    with contextlib.ExitStack() as held:

        def take_folder():
            if args.restart and (aside := move_aside(args.output_dir)):
                print(f"moved the earlier run to {aside}", flush=True)
            held.enter_context(RunLock(args.output_dir))

        with user_errors():
            args = parse_arguments(arguments_class)
            accelerator = create_accelerator(args)
            on_main_process(accelerator, take_folder)
        try:
            yield args, accelerator
        except OSError as error:
            print_error(one_line(error))
            raise SystemExit(2) from None


class RunLock:
    """A context manager in which this process alone writes the run in `output_dir`. The folder is made if need be.

    It is a POSIX record lock: the kernel frees it when its holder dies, even by kill -9, and forked data workers do not
    inherit it. Closing any other descriptor of the file in the same process would free it too, so nothing else opens
    the file.

    Args:
        option: what the user called the folder by, for messages.

    Raises:
        ValueError: another process holds the lock, and the message names it; or the folder cannot be written.
    """

    _held: set[Path] = set()

    def __init__(self, output_dir: Path | str, option: str = "--output_dir"):
        self.output_dir, self.option = Path(output_dir).resolve(), option

    def __enter__(self) -> "RunLock":
        # The kernel grants a process its own lock a second time, and closing that one would free both.
        assert self.output_dir not in self._held, f"this process already holds the lock of {self.output_dir}"
        path = self.output_dir / ".lock"
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)
        except OSError as error:
            reason = f"{self.option} {self.output_dir} cannot be written ({error.strerror})"
            raise ValueError(f"{reason}; choose another {self.option}") from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock, --restart in another process may have moved the folder, and this file with it.
            if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().decode(errors="replace") or "another process"
            self._file.close()
            raise ValueError(
                f"{self.option} {self.output_dir} is being written by {holder} ({error.strerror}); wait for it or stop "
                f"it, or choose another {self.option}"
            ) from error
        with contextlib.suppress(OSError):  # on a full disk the lock is held all the same, without a name in it
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._held.add(self.output_dir)
        return self

    def __exit__(self, *_) -> None:
        self._held.discard(self.output_dir)
        self._file.truncate(0)  # the file stays: unlinking it would let two processes each hold "the" lock
        self._file.close()


def identify(args: RunArguments, model: nn.Module, fingerprint: str, **more: Any) -> dict:
    """Returns what makes a run this run, as JSON: a resumed run has to agree in all of it.

    `max_steps` is part of it only where the learning rate of earlier steps depends on it: a constant schedule may
    grow until its cooldown begins (see `training.run.resume.newest_checkpoint`).

    Args:
        fingerprint: of the training data.
        more: what else the script's results depend on.
    """
    fields = ["seed", "global_batch_size", "optimizer", "learning_rate", "matrix_learning_rate", "weight_decay"]
    fields += ["beta1", "beta2", "schedule", "warmup_steps", "cooldown_steps", "final_learning_rate"]
    fields += ["max_grad_norm", "layer_decay", "ema_decay"]
    if args.schedule != "constant":
        fields.append("max_steps")
    config = model.config.to_dict()
    for key in ("transformers_version", "_name_or_path", "auto_map", "architectures", "zoo_version"):
        config.pop(key, None)
    return {"data": fingerprint, "model": config, **{name: getattr(args, name) for name in fields}, **more}


def check_identity(output_dir: Path | str, identity: dict) -> None:
    """Writes into `output_dir` which run it holds, or makes sure that it holds this run already.

    Args:
        identity: from `identify`.

    Raises:
        ValueError: the folder holds another run, and the message names each field that differs; or it holds files that
            are not a run's.
    """
    path = Path(output_dir) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _holds_run(path.parent):
        write_atomic(path, json.dumps(identity, indent=1))
        return
    try:
        there = _flatten(json.loads(path.read_bytes()))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged; --restart moves this run aside and starts again") from error
    here = _flatten(json.loads(json.dumps(identity)))  # through JSON: a tuple is a list
    if "mixed_precision" in here:  # earlier versions did not write it
        there.setdefault("mixed_precision", here["mixed_precision"])
    differences = [
        f"{field}: this run has {here.get(field, 'nothing')}, --output_dir holds {there.get(field, 'nothing')}"
        for field in {**here, **there}
        if field not in here or field not in there or here[field] != there[field]
    ]
    if differences:
        raise ValueError(
            f"--output_dir {output_dir} holds another run ({'; '.join(differences)}); repeat that run's command, "
            "choose another --output_dir, or give --restart to move the old run aside"
        )


def move_aside(output_dir: Path | str) -> Path | None:
    """Renames the folder of a run to NAME.old-1, or the next free number, for --restart. Nothing is deleted.

    It takes the run's lock itself, so the caller must not hold it.

    Returns:
        The new path; None if there was no run.

    Raises:
        ValueError: a live process writes the run, or the folder holds files that are not a run's.
    """
    folder = Path(output_dir).resolve()  # if it is a symbolic link, its target is moved
    if not folder.is_dir() or not _holds_run(folder):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    with RunLock(folder):
        try:
            os.rename(folder, aside)
        except OSError as error:
            raise ValueError(
                f"--restart: {folder} cannot be moved aside ({error.strerror}); choose another --output_dir"
            ) from error
    fsync(folder.parent)
    return aside


def _holds_run(folder: Path) -> bool:
    """Returns whether the folder holds a run. A lock and unfinished files do not count. Raises ValueError if there are
    other files and no run."""
    names = {name for name in os.listdir(folder) if name != ".lock" and not name.startswith(TEMPORARY)}
    if names and "run.json" not in names:
        raise ValueError(
            f"--output_dir {folder} holds files that are not a run of this script ({min(names)}, ...); choose "
            "another --output_dir"
        )
    return bool(names)


def _flatten(nested: dict, prefix: str = "") -> dict:
    """Returns {"model.layers": 2} from {"model": {"layers": 2}}."""
    flat = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
