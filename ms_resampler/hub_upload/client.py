"""The Hub's client, with retries for transient failures and one clear sentence for every error."""

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_session, utils
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm.auto import tqdm

from .secrets import redact, redacted

Result = TypeVar("Result")
WAITS = (1, 2, 4)  # seconds before each retry
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9]|[-_.](?=[A-Za-z0-9]))*")

SENTENCES = {
    401: "The Hub does not accept the token (it is invalid or has expired): log in again with `hf auth login`.",
    402: "The Hub asks for a payment before it makes {name}.",
    403: "The token in use may not {act} {name}: ask its owner for the right, or log in as somebody who has it.",
    404: "The Hub knows no {name}, or the token in use may not see it.",
    409: "The Hub reports a conflict in {name}; run the command again.",
    412: "{name} has changed while this was running, and nothing was published: run the command again.",
    413: "The Hub finds a file too large: give --max-shard-size 5GB.",
    429: "The Hub asks to slow down: run the command again in some minutes.",
    507: "The Hub has no room left for {name}: free some of its storage.",
}


def check_repository_name(name: str) -> None:
    """Raises ValueError unless the name has the form "ORG/NAME"."""
    parts = name.split("/")
    if len(parts) != 2 or not all(NAME.fullmatch(part) and len(part) <= 96 for part in parts):
        raise ValueError(
            f"{name!r} is not a repository name: give ORG/NAME, both of letters, digits and single - _ . between them."
        )


@contextmanager
def hub_errors(name: str, act: str = "write to") -> Iterator[None]:
    """Turns any error of the client about a repository into a ValueError of one sentence, without secrets.

    `act` is the operation on the repository: "write to" or "read".
    """
    with redacted():
        try:
            yield
        except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, RuntimeError, OSError) as error:
            known = sentence(error, name, act)
            if known is None:
                raise
            close_progress_bars()
            raise ValueError(redact(known)) from None  # the chained error would print signed URLs


def close_progress_bars() -> None:
    """Closes the progress bars that a failed transfer has left open."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def sentence(error: BaseException | None, name: str, act: str) -> str | None:
    """The message for an error of the Hub, the network or the disk; None for any other."""
    if error is None:
        return None
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no Hub token on this computer: log in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids every request to the Hub: unset it."
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such revision."
    if isinstance(error, GatedRepoError):
        return f"{name} requires that you accept its terms: accept them on its page, and log in."
    if isinstance(error, RepositoryNotFoundError):
        return SENTENCES[404].format(name=name)
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return status_sentence(error, name, act)
    if isinstance(error, httpx2.HTTPError):
        return f"The Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}): check the network."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full: make room, or set TMPDIR and HF_HOME to a place that has some."
    if isinstance(error, RuntimeError | LocalEntryNotFoundError):  # the client wraps the cause of a failed transfer
        failed = f"The {'download' if act == 'read' else 'upload'} failed: {error}" if is_transfer(error) else None
        return sentence(error.__cause__, name, act) or failed
    return None


def is_transfer(error: BaseException) -> bool:
    """Whether an error without a cause comes from the client: hf_xet's errors have no class of their own."""
    return isinstance(error, LocalEntryNotFoundError) or "Error while uploading" in str(error) or "xet" in str(error)


def status_sentence(error: HfHubHTTPError, name: str, act: str) -> str:
    """The meaning of a response of the Hub; its own message if none is defined here."""
    status = error.response.status_code
    if status in SENTENCES:
        return SENTENCES[status].format(name=name, act=act)
    if status >= 500:
        return f"The Hub reports an internal error ({status}), after several tries: try again later."
    told = error.server_message or str(error).strip().partition("\n")[0]
    return f"The Hub refuses ({status}): {told}"


def is_transient(error: BaseException | None) -> bool:
    """Whether the same request may succeed soon; the client wraps the cause of a failed download."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code in (408, 500, 502, 503, 504)
    return isinstance(error, httpx2.TransportError) or (error is not None and is_transient(error.__cause__))


def patiently(call: Callable[..., Result], *args: object, **kwargs: object) -> Result:
    """Calls an idempotent function, and retries after each transient failure."""
    for wait in WAITS:
        try:
            return call(*args, **kwargs)
        except (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError, RuntimeError) as error:
            if not is_transient(error):
                raise
            time.sleep(wait)
    return call(*args, **kwargs)


@contextmanager
def large_file_transfer(api: HfApi, name: str, kind: str = "model") -> Iterator[None]:
    """Uses xet if the server supports it, else LFS; the client does not fall back by itself."""
    before = constants.HF_HUB_DISABLE_XET
    if not before:
        headers = utils.build_hf_headers(token=api.token)  # type: ignore[attr-defined]
        address = f"{api.endpoint}/api/{kind}s/{name}/xet-write-token/main"
        answer = patiently(get_session().get, address, headers=headers)
        constants.HF_HUB_DISABLE_XET = answer.status_code not in (200, 401, 403)
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
