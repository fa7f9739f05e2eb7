"""Send files to the Hub in one commit, fetch that commit again, and say in one sentence what went wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from t2i_spo_plugin.adapters.hub_errors import sending_to_hub
from t2i_spo_plugin.errors import HubError
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
        repo_id: created when it does not exist.
        folder: where the files are.
        hashes: sha256 by path in the folder and in the repository.
        private: make a new repository private.
        revision: the branch; created when it does not exist.
        message: of the commit.
        token: None is the stored one.
        check: called with each safetensors file that was fetched.

    Raises:
        HubError: the Hub cannot be reached or refuses, the repository changed in the meantime, it holds another
            adapter, or what was fetched is not what was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

    api = HfApi(token=token)
    with sending_to_hub(repo_id, "no commit was confirmed"):
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
    unchecked = f"the commit {commit} was made, but could not be checked"
    with sending_to_hub(repo_id, unchecked), tempfile.TemporaryDirectory() as cache:
        for name, digest in hashes.items():
            fetched = Path(hf_hub_download(repo_id, name, revision=commit, cache_dir=cache, token=token))
            if sha256_of(fetched) != digest:
                raise HubError(f"{name} of the commit {commit} is not what was sent; do not use it")
            if name.endswith(".safetensors"):
                check(fetched)
    return commit, f"{api.endpoint}/{repo_id}/commit/{commit}"
