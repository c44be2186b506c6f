"""Files that survive a crash: written beside their place, forced to disk, renamed."""

import hashlib
import os
import uuid
from pathlib import Path

TEMPORARY = ".tmp-"  # whatever begins so was left by a dead process and may go


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Write `path` so that a reader, or a crash at any moment, sees the old content or the new one, never a part."""
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
    return path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:12]}")


def write_durably(path: Path, data: str | bytes) -> None:
    with open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_of(path: Path) -> str | None:
    """What is in a file of text; None where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else None


def file_record(path: Path) -> dict:
    """Size in bytes and sha256 of a file, as a manifest lists it."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
