"""Publish an adapter on the Hugging Face Hub: build the folder, send it in one commit, fetch it again and compare."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_spo_plugin.adapters import Adapter, find_adapter_file, read_adapter
from t2i_spo_plugin.adapters.convert import convert_adapter
from t2i_spo_plugin.adapters.layouts import default_layout
from t2i_spo_plugin.adapters.safetensors_file import read_header
from t2i_spo_plugin.errors import ConfigError, IncompatibleAdapterError, InvalidAdapterError
from t2i_spo_plugin.files import folder_hash, sha256_of, user_path, write_bytes
from t2i_spo_plugin.images import open_image

from .card import CardFiles, model_card
from .card_info import ModelCardInfo, check_repo_id
from .privacy import encodable, own_name, private_part, without_folders
from .results import Results, eval_result_yaml, read_results
from .upload import send_files


__all__ = ["Published", "PublishedFile", "publish_adapter"]

LONGEST_SIDE = 1024
"""Pixels of a published image."""

_CARD = "README.md"
_LICENSE_FILE = "LICENSE"
_EVAL_RESULTS = ".eval_results/t2i_spo_plugin.yaml"
_SAME = 1e-2
"""Largest relative difference of a module's change after loading; rounding to 16 bits stays well below it."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of the repository: its path there, its bytes and their hash."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Published:
    """What was sent, or would be; `str()` prints it.

    Attributes:
        repo_id: on the Hub.
        files: everything that was sent, sorted.
        card: the text of the model card.
        commit: id of the verified commit; empty after a dry run.
        url: of that commit.
        folder: where the files lie on this machine; None when they were in a temporary folder.
    """

    repo_id: str
    files: tuple[PublishedFile, ...]
    card: str
    commit: str = ""
    url: str = ""
    folder: Path | None = None

    def __str__(self) -> str:
        lines = [f"{file.sha256}  {file.size:>12,}  {file.path}" for file in self.files]
        if self.commit:
            return "\n".join([*lines, f"published and read back: {self.url}"])
        where = f"; the files are in {self.folder}" if self.folder is not None else ""
        return "\n".join([*lines, f"nothing was sent to {self.repo_id}{where}"])


def publish_adapter(
    adapter: Adapter | str | Path,
    repo_id: str,
    card: ModelCardInfo,
    *,
    private: bool = False,
    revision: str = "main",
    message: str = "",
    token: str | None = None,
    dry_run: bool = False,
    out: str | Path | None = None,
    pipe: Any = None,
) -> Published:
    """Write an adapter's repository, send it in one commit, fetch that commit again and compare.

    The adapter is written anew, in the layout that diffusers and ComfyUI both read, with a model card beside it. Equal
    input gives equal bytes. Absolute paths in what its header says are reduced to their last part; a token, or the
    name of this machine or account, anywhere in what would be sent is refused.

    Args:
        adapter: a file, a folder with one, or an adapter in memory.
        repo_id: `user/repo`; it is created when it does not exist.
        card: the base model, the licence, and what else the model card says.
        private: make a new repository private; one that exists stays as it is.
        revision: the branch; created when it does not exist.
        message: of the commit.
        token: by default the one that `hf auth login` stored.
        dry_run: write the folder and send nothing; needs neither network nor token.
        out: folder to write, by default a temporary one; it may hold nothing but an earlier version of the same files.
        pipe: a pipeline of the base model; the adapter is then also loaded into it, and its effect compared.

    Raises:
        AdapterError: the adapter cannot be read, or `load_spo_lora` would refuse it.
        ConfigError: an option is missing or out of range, or private text would be sent.
        ImageError: an image cannot be read.
        HubError: the Hub cannot be reached or refuses, or what it holds afterwards is not what was sent. Run again
            then: what was already sent is not sent twice.
    """
    check_repo_id("repo_id", repo_id)
    original = adapter.validate() if isinstance(adapter, Adapter) else read_adapter(adapter)
    card = card.with_license(original.metadata.extra.get("modelspec.license", ""))
    published = _publishable(original, card)
    results = _results(adapter, card)
    secrets = _secrets(token)
    _check_texts(published, card, results, secrets, public=(repo_id, card.base_model, card.dataset))
    with ExitStack() as stack:
        folder = user_path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = _file_names(repo_id, card)
        _check_alone(folder, names)
        text = _write_files(folder, names, published, repo_id, card, results)
        _check_files(folder, names, secrets)
        _check_file(folder / names[0], published, pipe)
        files = [
            PublishedFile(path, (folder / path).stat().st_size, sha256_of(folder / path)) for path in sorted(names)
        ]
        draft = Published(repo_id, tuple(files), text, folder=None if out is None else folder)
        if dry_run:
            return draft
        commit, url = send_files(
            repo_id,
            folder,
            {file.path: file.sha256 for file in files},
            private=private,
            revision=revision,
            message=message or f"Publish {names[0]}",
            token=token,
            check=lambda fetched: _check_file(fetched, published, pipe),
        )
        return replace(draft, commit=commit, url=url)


def _results(adapter: Adapter | str | Path, card: ModelCardInfo) -> Results | None:
    """What the author's `summary.json` says of this adapter; None without one."""
    if card.results is None:
        return None
    if isinstance(adapter, Adapter):
        raise ConfigError("results belong to a file: publish the adapter file that was measured")
    # A folder may have been measured by its own name or by its file's.
    hashes = {folder_hash(adapter), folder_hash(find_adapter_file(adapter))}
    return read_results(card.results, hashes, card.system)


def _file_names(repo_id: str, card: ModelCardInfo) -> list[str]:
    """The files of the repository, the adapter's first."""
    names = [f"{repo_id.partition('/')[2]}.safetensors", _CARD, *_image_names(card)]
    names += [_LICENSE_FILE] if card.license_file is not None else []
    return names + ([_EVAL_RESULTS] if card.dataset else [])


def _image_names(card: ModelCardInfo) -> list[str]:
    return [f"images/{number}.jpg" for number in range(len(card.images))]


def _write_files(
    folder: Path, names: Sequence[str], adapter: Adapter, repo_id: str, card: ModelCardInfo, results: Results | None
) -> str:
    """Write all of the repository's files, and return the model card's text."""
    images = _image_names(card)
    for name, (_, path) in zip(images, card.images, strict=True):
        write_bytes(folder / name, _image(Path(path)))
    written = convert_adapter(adapter, folder / names[0], default_layout(adapter.metadata.base_architecture))
    files = CardFiles(repo_id, names[0], written.stat().st_size, sha256_of(written), images)
    text = model_card(adapter, card, files, results)
    write_bytes(folder / _CARD, text.encode("utf-8"))
    if card.license_file is not None:
        write_bytes(folder / _LICENSE_FILE, Path(card.license_file).read_bytes())
    if results is not None and card.dataset:
        write_bytes(folder / _EVAL_RESULTS, eval_result_yaml(results, card.dataset).encode("utf-8"))
    return text


def _publishable(adapter: Adapter, card: ModelCardInfo) -> Adapter:
    """The adapter without absolute paths in its metadata; refused when loading it would be."""
    if not adapter.metadata.base_architecture:
        raise InvalidAdapterError(
            "the adapter does not say which architecture it was made for, so that loading could not check it; write "
            "it anew with spo convert --architecture"
        )
    if all(name.startswith("text_encoder") for name in adapter.modules):
        raise InvalidAdapterError("it changes text encoders only, and no denoiser: load_spo_lora refuses it")
    extra = {key: without_folders(encodable(value)) for key, value in adapter.metadata.extra.items()}
    extra["modelspec.license"] = card.license_in_words
    title = without_folders(encodable(card.title or adapter.metadata.title))
    return replace(adapter, metadata=replace(adapter.metadata, title=title, extra=extra))


def _image(path: Path) -> bytes:
    """The image as JPEG, upright, bounded, and without any metadata."""
    upright = open_image(path)
    upright.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    bare = Image.frombytes("RGB", upright.size, upright.tobytes())
    stream = io.BytesIO()
    bare.save(stream, format="JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def _secrets(token: str | None) -> list[str]:
    from huggingface_hub import get_token

    return [secret for secret in (token, get_token()) if secret]


def _check_texts(
    adapter: Adapter, card: ModelCardInfo, results: Results | None, secrets: Sequence[str], public: Sequence[str]
) -> None:
    """Look into every text of the author, the header and the results, before it is escaped."""
    texts = {"title": adapter.metadata.title, "summary": card.summary, **adapter.metadata.extra}
    texts |= {f"prompt {number + 1}": prompt for number, (prompt, _) in enumerate(card.images)}
    texts |= {number.key: results.text_of(number) for number in results.measurements} if results is not None else {}
    for where, text in texts.items():
        _refuse(where, private_part(f"{where} {text}", secrets) or own_name(f"{where} {text}", public))


def _check_files(folder: Path, names: Sequence[str], secrets: Sequence[str]) -> None:
    """Look into every text that would be sent, as it would be sent; LICENSE is the author's own."""
    for name in names:
        path = folder / name
        if path.suffix == ".safetensors":
            for key, value in read_header(path).metadata.items():
                _refuse(f"{key} in the header of {name}", private_part(f"{key} {value}", secrets))
        elif path.suffix in (".md", ".yaml"):
            _refuse(name, private_part(path.read_text(encoding="utf-8"), secrets))


def _refuse(where: str, what: str) -> None:
    if what:
        raise ConfigError(f"{where} would publish {what}; take it out and try again")


def _check_alone(folder: Path, names: Sequence[str]) -> None:
    present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    others = sorted(set(present) - set(names))
    if others:
        raise ConfigError(f"{folder} holds {others[0]}, which would not be sent; name an empty folder")


def _check_file(path: Path, adapter: Adapter, pipe: Any) -> None:
    """Raise unless the file, and the pipeline it is loaded into when there is one, change what `adapter` does."""
    _check_same(adapter, read_adapter(path), path.name)
    if pipe is not None:
        _check_in(pipe, path, adapter)


def _check_same(adapter: Adapter, other: Adapter, what: str) -> None:
    """Raise unless both adapters change the same modules by the same amounts."""
    others = {name.replace(".", "_"): pair for name, pair in other.modules.items()}
    for name, pair in adapter.modules.items():
        same = others.pop(name.replace(".", "_"), None)
        delta = pair.delta()
        if same is None or float((same.delta() - delta).norm()) > _SAME * float(delta.norm()):
            raise IncompatibleAdapterError(f"{what} does not change {name} as the adapter does")
    if others:
        raise IncompatibleAdapterError(f"{what} changes {next(iter(others))}, which the adapter does not")


def _check_in(pipe: Any, path: Path, adapter: Adapter) -> None:
    from t2i_spo_plugin.pipelines.loading import adapter_of, load_spo_lora, unload_spo_lora

    name = "spo_published"
    load_spo_lora(pipe, path, adapter_name=name)
    try:
        _check_same(adapter, adapter_of(pipe, name), f"{path.name} in the pipeline")
    finally:
        unload_spo_lora(pipe, name)
