"""Keeps the part of a stream that has arrived in files, from which all processes and a resumed run read the same."""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from pathlib import Path

from training.run.folder import write_atomic
from training.run.processes import is_local_main_process


class ShardFolder(ABC):
    """The shards of a stream, written to a folder as they arrive.

    A shard never changes. The JSON file beside it is written last: it says that the shard is complete, and holds what a
    resumed run needs. Only the local main process writes, and keeps one shard ahead; the other processes wait for the
    file. A shard must have at least as many rows as the global batch, or a process could wait for a shard that is
    never written.

    A subclass defines `make_shard`, `take_in` and `forget`, and calls this `__init__` last, because it already takes in
    the shards in the folder.

    Args:
        timeout: seconds to wait for a shard.
    """

    def __init__(self, folder: Path, timeout: float = 600.0):
        self.folder, self.timeout, self.is_writer = folder, timeout, is_local_main_process()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found: list[dict] = []  # the content of each shard's JSON file
        self.ends: list[int] = []  # rows up to the end of each shard
        while self._find():
            pass

    @abstractmethod
    def make_shard(self) -> tuple[bytes, dict]:
        """Makes the next shard: its content, and what its JSON file says: `is_last`, and whatever else is needed."""

    @abstractmethod
    def take_in(self, shard: int) -> int:
        """Takes in a shard that is on disk, the last of `found`, and returns its number of rows."""

    @abstractmethod
    def forget(self) -> None:
        """Closes the stream, because another process wrote a shard and the stream is now behind it."""

    @property
    def has_ended(self) -> bool:
        """Whether the last shard is on disk."""
        return bool(self.found) and self.found[-1]["is_last"]

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.bin"

    def shard_of(self, row: int) -> tuple[int, int]:
        """Finds the shard of a row, and the number of the shard's first row."""
        shard = bisect_right(self.ends, row)
        return shard, self.ends[shard - 1] if shard else 0

    def external_files(self) -> dict[str, dict]:
        """Size in bytes and sha256 of every shard so far, by path, for a checkpoint's manifest."""
        return {str(self.path(k)): {name: s[name] for name in ("size", "sha256")} for k, s in enumerate(self.found)}

    def provide(self, num_rows: int) -> None:
        """Waits for the shards of the first `num_rows` rows; the writer writes them and one more."""
        deadline = time.monotonic() + self.timeout
        while not self.has_ended and len(self.ends) <= bisect_left(self.ends, num_rows) + self.is_writer:
            if self._find():
                deadline = time.monotonic() + self.timeout
            elif self.is_writer:
                self.write_shard()
            elif time.monotonic() > deadline:
                path = self.path(len(self.found))
                raise TimeoutError(f"{path} did not appear in {self.timeout:.0f} s: has the main process stopped?")
            else:
                time.sleep(0.1)

    def write_shard(self) -> None:
        """Makes and writes the next shard."""
        content, notes = self.make_shard()
        entry = {**notes, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path = self.path(len(self.found))
        write_atomic(path, content)
        write_atomic(path.with_suffix(".json"), json.dumps(entry))  # last: it says that the shard is complete
        self._add(entry)

    def _find(self) -> bool:
        """Takes in the next shard if it is on disk and complete. Returns whether it was."""
        if self.has_ended:
            return False
        path = self.path(len(self.found))
        try:
            entry = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if path.stat().st_size != entry["size"]:
                return False
        except (OSError, ValueError):
            return False
        self._add(entry)
        self.forget()
        return True

    def _add(self, entry: dict) -> None:
        self.found.append(entry)
        self.ends.append((self.ends[-1] if self.ends else 0) + self.take_in(len(self.found) - 1))
