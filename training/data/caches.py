"""Latents and text embeddings, computed once and stored in safetensors shards.

The autoencoder's posterior (mean and std) is stored, not a sample of it, so that training draws from it as if it
encoded every step; an autoencoder without a posterior (AutoencoderTiny) keeps its plain latents. Rows are keyed by the
image's content, folders by autoencoder and resolution: nothing stale can be read. Shards appear by atomic rename; a
killed build goes on where it was, and a shard that is cut is made again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from t2i_spo_plugin.errors import ImageError, SPOError, UnreadableFileError
from t2i_spo_plugin.files import atomic, remove_leftovers
from t2i_spo_plugin.images import open_image, to_tensor

from ..families import is_temporal, joined, padded


Rows = dict[str, Tensor]
MIRRORED = "/mirrored"
"""Suffix of the key of an image's mirror image."""


class SourceImage(NamedTuple):
    """An image that is trained on.

    Attributes:
        key: `content_key` of `data`.
        data: the content of its file.
        name: what a message calls it, such as its path.
    """

    key: str
    data: bytes
    name: str


class ShardStore:
    """Rows of named tensors under string keys, in a folder of safetensors shards.

    Shards up to `in_memory` bytes in all are read at once; larger stores are read row by row.
    """

    def __init__(self, folder: str | Path, in_memory: int = 2**31) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        self.in_memory = in_memory
        self.refresh()

    def refresh(self) -> None:
        """Look at the folder again, for shards that other processes wrote. One that is cut is removed.

        Raises:
            UnreadableFileError: a file is no shard of a cache.

        Warns:
            UserWarning: a shard was removed; its rows are missing.
        """
        self._files: list[Path] = []
        self._where: dict[str, tuple[int, int]] = {}
        self._loaded: dict[int, Rows] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                keys = _keys(file)
            except SafetensorError as error:
                warnings.warn(f"the cache {file} is cut or damaged ({error}); its rows are made again", stacklevel=2)
                file.unlink(missing_ok=True)
                continue
            self._where.update({key: (len(self._files), row) for row, key in enumerate(keys)})
            self._files.append(file)
        self._whole = sum(file.stat().st_size for file in self._files) <= self.in_memory

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that have no row, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._where]

    def append(self, keys: Sequence[str], rows: Mapping[str, Tensor]) -> None:
        """Write one shard: tensors `[len(keys), ...]` by name."""
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:24]
        file = self.folder / f"{name}.safetensors"
        content = {field: rows[field].detach().cpu().contiguous() for field in sorted(rows)}
        with atomic(file) as part:
            save_file(content, part, metadata={"keys": json.dumps(list(keys))})
        if file not in self._files:
            self._files.append(file)
        number = self._files.index(file)
        self._where.update({key: (number, row) for row, key in enumerate(keys)})

    def get(self, keys: Sequence[str]) -> Rows:
        """Tensors `[len(keys), ...]` by name; texts of several lengths are padded to the longest.

        Raises:
            KeyError: a key has no row.
        """
        rows = [self._row(*self._where[key]) for key in keys]
        return {name: padded([row[name] for row in rows]) for name in rows[0]}

    def _row(self, number: int, row: int) -> Rows:
        if self._whole:
            if number not in self._loaded:
                with safe_open(self._files[number], framework="pt") as shard:
                    self._loaded[number] = {name: shard.get_tensor(name) for name in shard.keys()}
            return {name: values[row] for name, values in self._loaded[number].items()}
        with safe_open(self._files[number], framework="pt") as shard:
            return {name: shard.get_slice(name)[row] for name in shard.keys()}


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as shard:
        metadata = shard.metadata() or {}
    if "keys" not in metadata:
        raise UnreadableFileError(f"{file} is no shard of a cache; move it elsewhere, or choose another cache_dir")
    keys: list[str] = json.loads(metadata["keys"])
    return keys


def content_key(data: bytes) -> str:
    """The key of an image: the hash of its file's bytes."""
    return hashlib.sha256(data).hexdigest()


def decode_square(data: bytes, resolution: int) -> Tensor:
    """An image file as `[1, 3, resolution, resolution]` in [0, 1]: the central square, resampled.

    Raises:
        ImageError: the bytes are no image that can be read.
    """
    image = open_image(data)
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return to_tensor(image.crop((left, top, left + edge, top + edge)), resolution)


@torch.no_grad()
def encode_latents(vae: Any, pixels: Tensor) -> Rows:
    """`mean` and `std` of the posterior, or `mean` alone, unscaled, float32, for `pixels [B, 3, H, W]` in [0, 1]."""
    parameter = next(vae.parameters())
    pixels = (pixels * 2.0 - 1.0).to(parameter.device, parameter.dtype)
    encoded = vae.encode(pixels.unsqueeze(2) if is_temporal(vae) else pixels)
    if hasattr(encoded, "latent_dist"):
        rows = {"mean": encoded.latent_dist.mean.float().cpu(), "std": encoded.latent_dist.std.float().cpu()}
        return {name: values.squeeze(2) for name, values in rows.items()} if is_temporal(vae) else rows
    return {"mean": encoded.latents.float().cpu()}


def posterior_sample(rows: Rows, noise: Tensor | None) -> Tensor:
    """Latents `[B, C, h, w]` from rows, unscaled: `mean + std * noise`; no noise, or no `std`, gives the mean."""
    if "std" in rows and noise is not None:
        return rows["mean"] + rows["std"] * noise
    return rows["mean"]


def build_latents(
    store: ShardStore,
    images: Iterable[SourceImage],
    vae: Any,
    resolution: int,
    batch_size: int = 16,
    mirrored: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Encode what is missing. `shard` is (rank, ranks): every rank takes its share; `refresh` the store afterwards.

    Raises:
        ImageError: an image cannot be read; the sentence names it.
        SPOError: the autoencoder gives NaN or Inf.
    """
    todo = (item for item in _unseen(store, images, mirrored, shard))
    bar = tqdm(desc="latents", unit="image", disable=not progress)
    for chunk in _chunks(todo, batch_size * 16):
        keys, parts = [], []
        for batch in (chunk[start : start + batch_size] for start in range(0, len(chunk), batch_size)):
            pixels = torch.cat([_decode_named(image, resolution) for image in batch])
            for suffix in ("", MIRRORED) if mirrored else ("",):
                keys += [image.key + suffix for image in batch]
                rows = encode_latents(vae, pixels.flip(-1) if suffix else pixels)
                _check_finite([image.name for image in batch], rows, vae)
                parts.append(rows)
            bar.update(len(batch))
        store.append(keys, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    bar.close()


def _check_finite(names: Sequence[str], rows: Rows, vae: Any) -> None:
    """Refuse latents with NaN or Inf: training on them would give NaN much later, and blame the learning rate."""
    for tensor, values in rows.items():
        finite = values.flatten(1).isfinite().all(1).tolist()
        bad = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
        if bad:
            model = f"{type(vae).__name__}, {next(vae.parameters()).dtype}"
            raise SPOError(
                f"the autoencoder ({model}) gives NaN or Inf as {tensor} of {len(bad)} of {len(names)} images, the "
                f"first is {bad[0]}; load it in float32, or take one that was repaired for half precision"
            )


def build_text(
    store: ShardStore,
    prompts: Iterable[str],
    encode: Callable[[list[str]], Rows],
    batch_size: int = 32,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Encode the prompts that are missing, keyed by their text; `shard` as in `build_latents`."""
    rank, ranks = shard
    # Shared out before anyone asks what is missing, for the other ranks write meanwhile.
    todo = store.missing(list(dict.fromkeys(prompts))[rank::ranks])
    bar = tqdm(total=len(todo), desc="text", unit="prompt", disable=not progress)
    for chunk in _chunks(todo, batch_size * 16):
        batches = [chunk[start : start + batch_size] for start in range(0, len(chunk), batch_size)]
        parts = [encode(batch) for batch in batches]
        store.append(chunk, {name: joined([part[name].cpu() for part in parts]) for name in parts[0]})
        bar.update(len(chunk))
    bar.close()


def _decode_named(image: SourceImage, resolution: int) -> Tensor:
    try:
        return decode_square(image.data, resolution)
    except ImageError as error:
        raise ImageError(f"{image.name}: {error}") from error


def _unseen(
    store: ShardStore, images: Iterable[SourceImage], mirrored: bool, shard: tuple[int, int]
) -> Iterable[SourceImage]:
    rank, ranks = shard
    seen: set[str] = set()
    for image in images:
        key = image.key
        if key in seen or (key in store and (not mirrored or key + MIRRORED in store)):
            continue
        seen.add(key)
        if int(key[:8], 16) % ranks == rank:
            yield image


def _chunks(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
