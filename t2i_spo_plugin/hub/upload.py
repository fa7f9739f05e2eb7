"""Send files to the Hub in one commit, fetch that commit again, and say in one sentence what went wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from t2i_spo_plugin.errors import HubError, SPOError
from t2i_spo_plugin.files import sha256_of


__all__ = ["send_files"]


def send_files(
    repo_id: str,
    folder: Path,
    hashes: Mapping[str, str],
    *,
    private: bool,
    revision: str,
    message: str,
    token: str | None,
    check: Callable[[Path], None],
) -> tuple[str, str]:
    """Send the files named in `hashes`, and nothing else, and fetch them again; returns the commit and its address.

    Args:
        repo_id: made when it does not exist.
        folder: where the files are.
        hashes: sha256 by path in the folder and in the repository.
        private: make a new repository private.
        revision: the branch; made when it does not exist.
        message: of the commit.
        token: None is the stored one.
        check: called with each safetensors file that was fetched.

    Raises:
        HubError: the Hub cannot be reached or refuses, the repository changed in the meantime, it holds another
            adapter, or what was fetched is not what was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

    api = HfApi(token=token)
    with _explained(repo_id, "no commit was confirmed"):
        api.whoami()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        present = {sibling.rfilename for sibling in head.siblings or ()} - set(hashes)
        others = sorted(name for name in present if "/" not in name and name.endswith(".safetensors"))
        if others:
            raise HubError(
                f"{repo_id} already holds {', '.join(others)}: beside it the new file could not be loaded without "
                "naming it; publish to another repository, or delete that file first"
            )
        operations = [CommitOperationAdd(name, str(folder / name)) for name in hashes]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha
        ).oid
    made = f"the commit {commit} was made, but could not be checked"
    with _explained(repo_id, made), tempfile.TemporaryDirectory() as cache:
        for name, digest in hashes.items():
            fetched = Path(hf_hub_download(repo_id, name, revision=commit, cache_dir=cache, token=token))
            if sha256_of(fetched) != digest:
                raise HubError(f"{name} of the commit {commit} is not what was sent; do not use it")
            if name.endswith(".safetensors"):
                check(fetched)
    return commit, f"{api.endpoint}/{repo_id}/commit/{commit}"


@contextmanager
def _explained(repo: str, state: str) -> Iterator[None]:
    """Turn what the client library raises into one sentence; `state` says how far things got."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except SPOError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{_reason(error, repo)} ({state})") from error


def _reason(error: BaseException, repo: str) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    # The upload wraps what went wrong.
    chain = [error]
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
    first = next((line for line in str(chain[0]).splitlines() if line.strip()), type(chain[0]).__name__)
    if status is None and not isinstance(error, ValueError):
        return f"the connection to the Hub broke off: {first}; run again, what was sent already is not sent twice"
    return f"the Hub refuses {repo}: {first}"
