"""Errors of the Hub: which of them are worth another try, and what to tell the user."""

import contextlib
import json
import re
import time
from collections.abc import Callable

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HTTPError,  # of the HTTP client that huggingface_hub uses, whichever it is
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import get_token

from training.run.arguments import one_line

WAITS = [1, 4, 16]  # seconds before another try
LONGEST_WAIT = 600  # seconds; the Hub counts requests over half of that
PASSING = [408, 409, 412, 429, *range(500, 600)]  # statuses that pass; 409 and 412 mean another writer


def persist(action: Callable):
    """Calls `action` and returns its result; after an error that may pass, it tries a few more times."""
    for number, wait in enumerate([*WAITS, None]):
        try:
            return action()
        except (ValueError, OSError, RuntimeError, HTTPError) as error:
            if wait is None or not is_passing(error) or (asked := _asked_to_wait(error)) > LONGEST_WAIT:
                raise
            wait, reason = max(wait, asked), without_token(explain(error))
        print(f"{reason}; trying again in {wait} s ({number + 1} of {len(WAITS)})", flush=True)
        time.sleep(wait)


def _http_error(error: BaseException | None) -> HTTPError | None:
    """Returns the HTTP error behind an error, since the client wraps the one that ended an upload."""
    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status of an error, None if it has none.

    The client of Xet, which sends large files if it is installed, raises Python's own classes and has the number only
    in the message. Its errors name no file, unlike errors of the file system.
    """
    if cause := _http_error(error):
        return getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(error, PermissionError | FileNotFoundError) and error.filename is None:
        return 401 if isinstance(error, PermissionError) else 404
    said = isinstance(error, ConnectionError) and re.search(r"HTTP status \w+ error \((\d{3})\b", str(error))
    return int(said[1]) if said else None


def is_passing(error: Exception) -> bool:
    """Returns whether another try may succeed: after no answer, half an answer, too many requests, another writer, or
    an error of the Hub itself. A RuntimeError comes from the client: errors of the run are ValueErrors or name a
    file."""
    if status := _status(error):
        return status in PASSING
    classes = HTTPError | RuntimeError | ConnectionError | TimeoutError | json.JSONDecodeError
    return isinstance(_http_error(error) or error, classes) and not isinstance(error, OfflineModeIsEnabled)


def _asked_to_wait(error: Exception) -> int:
    """Returns how many seconds the Hub asks to wait; 0 if it does not say."""
    headers = getattr(getattr(_http_error(error), "response", None), "headers", {})
    reset = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    after = headers.get("retry-after", "").strip()
    return int(after) if after.isdigit() else int(reset[1]) if reset else 0


def explain(error: Exception, repo_id: str = "") -> str:
    """Returns on one line what went wrong and what to do."""
    cause, status = _http_error(error) or error, _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to publish"
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return f"the Hub {'does not know this login' if get_token() else 'needs a login'}: `hf auth login`, or HF_TOKEN"
    said = " ".join((getattr(cause, "server_message", None) or one_line(cause)).split())
    if status is None and isinstance(cause, HTTPError | ConnectionError | TimeoutError):
        return f"{HfApi().endpoint} does not answer ({said})"
    if isinstance(error, json.JSONDecodeError):
        return f"{HfApi().endpoint} answered with half of it ({said})"
    if status is None:
        return said
    if status == 403:
        return f"{_who_may_not(repo_id)} (403: {said})"
    reasons = {
        404: "the Hub has no such user, repository or branch for this login: look at its name",
        409: "somebody else is writing to it",
        412: "somebody else is writing to it",
        429: f"the Hub asks for fewer requests: wait {_asked_to_wait(error) or 300} s",
    }
    meaning = reasons.get(status, "the Hub is out of order" if status >= 500 else "the Hub refused it")
    return f"{meaning} ({status}: {said})"


def _who_may_not(repo_id: str) -> str:
    """Returns what a refused login lacks: the right name, or what the Hub says."""
    with contextlib.suppress(ValueError, OSError, HTTPError, KeyError):
        me = HfApi().whoami()
        names = [me["name"], *(organisation["name"] for organisation in me.get("orgs", []))]
        if "/" in repo_id and repo_id.split("/")[0] not in names:
            may = f"this login may not write to it, but to {', '.join(names)} at most"
            return f"{may}: give a --repo of these, or a token that may write to it: `hf auth login`"
    return "the Hub does not allow it to this login; if its token may only read, `hf auth login` with another"


def without_token(text: str) -> str:
    """Returns the text with the token of the login replaced."""
    return text.replace(get_token() or "\0", "<token>")
