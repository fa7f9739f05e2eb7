"""An adapter file from the Hub or from its local cache, by repository id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from t2i_spo_plugin.errors import UnreadableAdapterError

from .hub_errors import reading_from_hub
from .io import choose_adapter_file, refuse_pickle


__all__ = ["download_adapter", "download_folder", "is_repo_id"]

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_PEFT_CONFIG = "adapter_config.json"


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form `user/repo` of a Hub id, and not that of an adapter file's path."""
    return bool(_REPO_ID.fullmatch(text)) and not text.endswith(".safetensors")


def download_adapter(repo: str, weight_name: str | None = None, subfolder: str | None = None, **options: Any) -> Path:
    """The path of an adapter file of the repository `repo`, downloaded unless it is in the local cache.

    Offline (`HF_HUB_OFFLINE=1`, `local_files_only=True`, or no network) the file is found in the cache, without a
    name too.

    Args:
        repo: `user/repo`.
        weight_name: the file; by default the only safetensors file of the folder.
        subfolder: of the repository.
        options: `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`, as huggingface_hub has them.

    Raises:
        UnreadableAdapterError: there is no such repository, revision or file, it is gated, it is a pickle, the folder
            holds several adapters, or the Hub cannot be reached and the cache has no adapter.
    """
    from huggingface_hub import hf_hub_download

    where = f"{repo}/{subfolder}" if subfolder else repo
    if weight_name is not None:
        refuse_pickle(weight_name)
    with reading_from_hub(repo, subfolder, options.get("revision"), raises=UnreadableAdapterError):
        names = _names(repo, subfolder, options)
        name = weight_name or choose_adapter_file(names, where, cure="pass one of them as weight_name")
        if _PEFT_CONFIG in names:
            hf_hub_download(repo, _PEFT_CONFIG, subfolder=subfolder, **options)
        return Path(hf_hub_download(repo, name, subfolder=subfolder, **options))


def download_folder(repo: str, local_files_only: bool = False) -> Path:
    """The folder of a repository's safetensors, JSON and text files, downloaded unless they are in the local cache.

    Args:
        repo: `user/repo`.
        local_files_only: take what is in the cache, and ask nobody.

    Raises:
        HubError: there is no such repository, it is gated, or the Hub cannot be reached and the cache lacks it.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt"]
    with reading_from_hub(repo):
        return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=local_files_only))


def _names(repo: str, subfolder: str | None, options: dict[str, Any]) -> list[str]:
    """The names of the files in a folder of the repository: as the Hub lists them, or of those in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    unreachable: Exception | None = None
    if not options.get("local_files_only"):
        try:
            api = HfApi(token=options.get("token"))
            paths = api.list_repo_files(repo, revision=options.get("revision"))
            return [Path(path).name for path in paths if Path(path).parent == Path(subfolder or ".")]
        except (HTTPError, OSError) as error:
            unreachable = error
    where = {name: options[name] for name in ("cache_dir", "revision") if name in options}
    try:
        # Nothing is allowed, so that a cache with only some of the repository's files is taken as it is.
        snapshot = Path(snapshot_download(repo, allow_patterns=[], local_files_only=True, **where))
        folder = snapshot / subfolder if subfolder else snapshot
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if not any(name.endswith(".safetensors") for name in names):
            raise LocalEntryNotFoundError("no adapter in the cache")
    except LocalEntryNotFoundError as error:
        if unreachable is not None and getattr(unreachable, "response", None) is not None:
            raise unreachable from error
        raise
    return names
