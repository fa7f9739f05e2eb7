"""Publish an adapter on the Hugging Face Hub: build the folder, send it in one commit, fetch it again and compare."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from t2i_spo_plugin.adapters import Adapter, find_adapter_file, read_adapter
from t2i_spo_plugin.adapters.convert import convert_adapter
from t2i_spo_plugin.adapters.download import is_repo_id
from t2i_spo_plugin.adapters.layouts import default_layout
from t2i_spo_plugin.adapters.safetensors_file import read_header
from t2i_spo_plugin.errors import ConfigError, ImageError, IncompatibleAdapterError, InvalidAdapterError
from t2i_spo_plugin.files import folder_hash, sha256_of, write_bytes

from .card import CardFacts, model_card
from .privacy import encodable, own_name, private_part, without_folders
from .results import eval_result_yaml, read_results
from .upload import send_files


__all__ = ["Published", "PublishedFile", "publish_adapter"]

MAX_IMAGES = 12
LONGEST_SIDE = 1024
"""Pixels of a published image."""

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LICENSE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
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
    *,
    license: str = "",
    license_file: str | Path | None = None,
    license_name: str = "",
    base_model: str = "",
    title: str = "",
    summary: str = "",
    images: Sequence[tuple[str, str | Path]] = (),
    results: str | Path | None = None,
    system: str = "",
    dataset: str = "",
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
        repo_id: `user/repo`; it is made when it does not exist.
        license: of the adapter, as the Hub names licences (`apache-2.0`, `openrail++`, ... or `other`); by default
            what the adapter's header says.
        license_file: a text that is sent as LICENSE; needed when the licence is `other`.
        license_name: needed when the licence is `other`.
        base_model: Hub id of the model it was trained on.
        title: by default the header's.
        summary: what it is for, a few sentences.
        images: prompt and image file each; they are sent without metadata, at most 1024 pixels wide and high.
        results: the `summary.json` of an evaluation of this very file.
        system: its name in that evaluation, where it was measured at several strengths.
        dataset: Hub id of the prompts it was measured on; with it the results are also sent as `.eval_results`, which
            name a dataset by its id.
        private: make a new repository private; one that exists stays as it is.
        revision: the branch; made when it does not exist.
        message: of the commit.
        token: by default the one that `hf auth login` stored.
        dry_run: write the folder and send nothing; needs neither network nor token.
        out: folder to write, by default a temporary one; it may hold nothing but an earlier version of the same files.
        pipe: a pipeline of the base model; the adapter is then also loaded into it, and its effect compared.

    Raises:
        AdapterError: the adapter cannot be read, or `load_spo_lora` would refuse it.
        ConfigError: an option is missing or makes no sense, or private text would be sent.
        ImageError: an image cannot be read.
        HubError: the Hub cannot be reached or refuses, or what it holds afterwards is not what was sent. Run again
            then: what was already sent is not sent twice.
    """
    _check_ids(repo_id, base_model, dataset, license_name)
    found = adapter.validate() if isinstance(adapter, Adapter) else read_adapter(adapter)
    license = license or found.metadata.extra.get("modelspec.license", "")
    _check_license(license, license_name, license_file)
    found = _publishable(found, title, license_name if license == "other" else license)
    if len(images) > MAX_IMAGES:
        raise ConfigError(f"a card shows at most {MAX_IMAGES} images, got {len(images)}")
    measured = None
    if results is None and (system or dataset):
        raise ConfigError("system and dataset say what results are of; name the results too")
    if results is not None:
        if isinstance(adapter, Adapter):
            raise ConfigError("results belong to a file: publish the adapter file that was measured")
        # A folder may have been measured by its own name or by its file's.
        measured = read_results(results, {folder_hash(adapter), folder_hash(find_adapter_file(adapter))}, system)
    texts = {"title": found.metadata.title, "summary": summary, **found.metadata.extra}
    texts |= {f"prompt {number + 1}": prompt for number, (prompt, _) in enumerate(images)}
    texts |= {number.key: measured.text_of(number) for number in measured.measured} if measured is not None else {}
    secrets = _secrets(token)
    _check_texts(texts, secrets, public=(repo_id, base_model, dataset))
    name = f"{repo_id.partition('/')[2]}.safetensors"
    image_files = [f"images/{number}.jpg" for number in range(len(images))]
    names = [name, _CARD, *image_files]
    names += [_LICENSE_FILE] if license_file is not None else []
    names += [_EVAL_RESULTS] if measured is not None and dataset else []
    with ExitStack() as stack:
        kept = Path(out) if out is not None else None
        folder = kept if kept is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _check_alone(folder, names)
        for image, (_, path) in zip(image_files, images, strict=True):
            write_bytes(folder / image, _image(Path(path)))
        written = convert_adapter(found, folder / name, default_layout(found.metadata.base_architecture))
        metadata = CardFacts(
            repo_id=repo_id,
            base_model=base_model,
            license=license,
            license_name=license_name,
            summary=summary,
            file=name,
            size=written.stat().st_size,
            sha256=sha256_of(written),
            images=[(prompt, image) for image, (prompt, _) in zip(image_files, images, strict=True)],
            dataset=dataset,
        )
        card = model_card(found, metadata, measured)
        write_bytes(folder / _CARD, card.encode("utf-8"))
        if license_file is not None:
            write_bytes(folder / _LICENSE_FILE, Path(license_file).read_bytes())
        if measured is not None and dataset:
            write_bytes(folder / _EVAL_RESULTS, eval_result_yaml(measured, dataset).encode("utf-8"))
        _check_files(folder, names, secrets)
        _check_file(written, found, pipe)
        files = [
            PublishedFile(path, (folder / path).stat().st_size, sha256_of(folder / path)) for path in sorted(names)
        ]
        draft = Published(repo_id, tuple(files), card, folder=kept)
        if dry_run:
            return draft
        commit, url = send_files(
            repo_id,
            folder,
            {file.path: file.sha256 for file in files},
            private=private,
            revision=revision,
            message=message or f"Publish {name}",
            token=token,
            check=lambda fetched: _check_file(fetched, found, pipe),
        )
        return replace(draft, commit=commit, url=url)


def _check_ids(repo_id: str, base_model: str, dataset: str, license_name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not base_model:
        raise ConfigError(
            "name the model that the adapter was trained on by its Hub id (base_model, such as user/repo)"
        )
    for what, value in (("repo_id", repo_id), ("base_model", base_model), ("dataset", dataset)):
        if not is_repo_id(value) and (value or what != "dataset"):
            raise ConfigError(f"{what} must be a Hub id such as user/repo, got {value!r}")
        try:
            validate_repo_id(value or "user/repo")
        except HFValidationError as error:
            raise ConfigError(f"{what} is no Hub id: {error}") from error
    if license_name and not _LICENSE_NAME.fullmatch(license_name):
        raise ConfigError(f"license_name must be one word of letters, digits, dots and dashes, got {license_name!r}")


def _check_license(license: str, license_name: str, license_file: str | Path | None) -> None:
    if not license:
        raise ConfigError("say under which licence the adapter is published (license, such as apache-2.0)")
    if not _LICENSE.fullmatch(license.replace("+", "")):
        raise ConfigError(f"license must be a name the Hub knows, such as apache-2.0, got {license!r}")
    if license == "other" and not (license_name and license_file):
        raise ConfigError("a licence of one's own (other) needs license_name and license_file")
    if license_file is not None and not Path(license_file).is_file():
        raise ConfigError(f"there is no licence file {license_file}")


def _publishable(adapter: Adapter, title: str, license: str) -> Adapter:
    """The adapter without absolute paths in its metadata; refused when loading it would be."""
    if not adapter.metadata.base_architecture:
        raise InvalidAdapterError(
            "the adapter does not say which architecture it was made for, so that loading could not check it; write "
            "it anew with spo convert --architecture"
        )
    if all(name.startswith("text_encoder") for name in adapter.modules):
        raise InvalidAdapterError("it changes text encoders only, and nothing that draws: load_spo_lora refuses it")
    extra = {key: without_folders(encodable(value)) for key, value in adapter.metadata.extra.items()}
    extra["modelspec.license"] = license
    metadata = replace(
        adapter.metadata, title=without_folders(encodable(title or adapter.metadata.title)), extra=extra
    )
    return replace(adapter, metadata=metadata)


def _image(path: Path) -> bytes:
    """The image as JPEG, upright, bounded, and without any metadata."""
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} is no image that can be read: {error}") from error
    upright.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    bare = Image.frombytes("RGB", upright.size, upright.tobytes())
    stream = io.BytesIO()
    bare.save(stream, format="JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def _secrets(token: str | None) -> list[str]:
    from huggingface_hub import get_token

    return [secret for secret in (token, get_token()) if secret]


def _check_texts(texts: Mapping[str, str], secrets: Sequence[str], public: Sequence[str]) -> None:
    """Look into every text of the author, the header and the results, before it is escaped."""
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


def _check_file(path: Path, wanted: Adapter, pipe: Any) -> None:
    """Raise unless the file, and the pipeline it is loaded into when there is one, change what `wanted` does."""
    _check_same(wanted, read_adapter(path), path.name)
    if pipe is not None:
        _check_in(pipe, path, wanted)


def _check_same(wanted: Adapter, found: Adapter, what: str) -> None:
    """Raise unless both adapters change the same modules by the same amounts."""
    have = {name.replace(".", "_"): pair for name, pair in found.modules.items()}
    for name, pair in wanted.modules.items():
        other = have.pop(name.replace(".", "_"), None)
        delta = pair.delta()
        if other is None or float((other.delta() - delta).norm()) > _SAME * float(delta.norm()):
            raise IncompatibleAdapterError(f"{what} does not change {name} as the adapter does")
    if have:
        raise IncompatibleAdapterError(f"{what} changes {next(iter(have))}, which the adapter does not")


def _check_in(pipe: Any, path: Path, wanted: Adapter) -> None:
    from t2i_spo_plugin.pipelines.loading import adapter_of, load_spo_lora, unload_spo_lora

    name = "spo_published"
    load_spo_lora(pipe, path, adapter_name=name)
    try:
        _check_same(wanted, adapter_of(pipe, name), f"{path.name} in the pipeline")
    finally:
        unload_spo_lora(pipe, name)
