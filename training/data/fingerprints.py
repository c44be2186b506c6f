"""Fingerprints: what identifies a data set, a tokenizer, or the two together, in the name of a cache or of a run."""

import hashlib
import json
from collections.abc import Iterable


def fingerprint_of(*parts: object) -> str:
    """The sha256, in hex, of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def digest_of(contents: Iterable[bytes]) -> str:
    """The sha256, in hex, of contents laid end to end."""
    total = hashlib.sha256()
    for content in contents:
        total.update(content)
    return total.hexdigest()
