"""What the Hub's client library raises, as one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from t2i_spo_plugin.errors import HubError, SPOError


__all__ = ["reading_from_hub", "sending_to_hub"]


@contextmanager
def reading_from_hub(
    repo: str, subfolder: str | None = None, revision: str | None = None, raises: type[SPOError] = HubError
) -> Iterator[None]:
    """Turn errors of the client library inside the block into one `raises`.

    Args:
        repo: `user/repo`.
        subfolder: of the repository.
        revision: that was asked for.
        raises: the error.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except SPOError:
        raise
    except (HTTPError, HFValidationError, OSError) as error:
        raise raises(_reading_message(error, repo, subfolder, revision)) from error


@contextmanager
def sending_to_hub(repo: str, state: str) -> Iterator[None]:
    """Turn errors of the client library inside the block into a `HubError`; `state` says how far things got."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except SPOError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{_sending_message(error, repo)} ({state})") from error


def _reading_message(error: Exception, repo: str, subfolder: str | None, revision: str | None) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError):
        where = f"{repo}/{subfolder}" if subfolder else repo
        return (
            f"{where} is not in the local cache and the Hub cannot be reached (no network, or offline mode); download "
            "it once while online, or pass a file"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is gated: accept its terms on its page on the Hub, then log in (hf auth login) or pass token=... "
            "of an account that did"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no file or folder {repo}, and the Hub has no such repository, or it is private: check the "
            "name, and log in (hf auth login) or pass token=... if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision}; pass a branch, tag or commit that its page on the Hub lists"
    if isinstance(error, EntryNotFoundError):
        return f"{repo} does not hold that file; check weight_name and subfolder against its page on the Hub"
    return f"there is no file or folder {repo}, and the Hub answers: {_first_line(error)}"


def _sending_message(error: Exception, repo: str) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    # The upload wraps what went wrong.
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for part in chain:
        if isinstance(part, LocalTokenNotFoundError):
            return "no token: log in (hf auth login) or pass token=..., with the right to write"
        if isinstance(part, OfflineModeIsEnabled):
            return "offline mode is on (HF_HUB_OFFLINE); switch it off to publish, or use a dry run"
        if isinstance(part, GatedRepoError):
            return f"{repo} is gated and this account has no access; accept its terms on its page first"
        if isinstance(part, EntryNotFoundError) and not isinstance(part, LocalEntryNotFoundError):
            return f"a file that was sent is not in {repo}; does its .gitignore leave it out?"
    responses = [getattr(part, "response", None) for part in chain]
    status = next((response.status_code for response in responses if response is not None), None)
    match status:
        case 401:
            return "the Hub does not know this token: log in again (hf auth login) or pass another one"
        case 403:
            return f"this token may not write to {repo}: pass one with the right to write, of an account that may"
        case 404:
            return f"{repo} or the revision does not exist, or this token cannot see it"
        case 409 | 412:
            return f"{repo} was changed by someone else in the meantime; look at it, then run again"
    if status is None and not isinstance(error, ValueError):
        return (
            f"the connection to the Hub broke off: {_first_line(error)}; run again, what was sent already is not sent "
            "twice"
        )
    return f"the Hub refuses {repo}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
