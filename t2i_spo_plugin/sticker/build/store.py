"""Scenes rendered once and kept on disk, and batches made ahead: on a GPU both would take longer than a step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


CHUNK = 200

RenderImage = Callable[[int], np.ndarray]
"""Seed -> uint8 array of one fixed shape; a module's own function, so that worker processes can call it."""


def _render_chunk(render: RenderImage, first: int, count: int) -> np.ndarray:
    return np.stack([render(seed) for seed in range(first, first + count)])


def rendered(path: Path, render: RenderImage, first_seed: int, count: int, jobs: int = 1) -> Tensor:
    """`render(seed)` of `count` seeds as a uint8 tensor `[count, ...]` that is mapped from the file `path`.

    What `path` holds already is not rendered again, so a run that was stopped goes on. `jobs` is the number of worker
    processes; with 1 the calling process renders.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = render(first_seed).shape
    note = path.with_suffix(".json")
    # A module that runs as a command is called `__main__`; what it renders is the same.
    module = getattr(sys.modules[render.__module__].__spec__, "name", render.__module__)
    key = {"first_seed": first_seed, "shape": list(shape), "render": f"{module}.{render.__qualname__}"}
    done = 0
    if note.is_file():
        stored = json.loads(note.read_text())
        done = stored.pop("count") if {k: v for k, v in stored.items() if k != "count"} == key else 0
    size = int(np.prod(shape))
    if done < count:
        with path.open("r+b" if done else "wb") as file, ProcessPoolExecutor(jobs) as pool:
            file.seek(done * size)
            file.truncate()
            starts = range(first_seed + done, first_seed + count, CHUNK)
            counts = [min(CHUNK, first_seed + count - start) for start in starts]
            arguments = [render] * len(starts), starts, counts
            chunks = pool.map(_render_chunk, *arguments) if jobs > 1 else map(_render_chunk, *arguments)
            for chunk in tqdm(chunks, total=len(starts), desc=f"render {path.stem}", mininterval=10):
                file.write(chunk.tobytes())
                done += len(chunk)
                file.flush()
                note.write_text(json.dumps(key | {"count": done}))
    return torch.from_file(str(path), shared=True, size=count * size, dtype=torch.uint8).view(count, *shape)


def as_pixels(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 `[B, H, W, 3]` -> float32 `[B, 3, H, W]` in [0, 1], channels last in memory, on `device`."""
    return images.to(device).permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)


class _Numbered(Dataset):
    def __init__(self, make: Callable[[int], Any], first: int, last: int) -> None:
        self.make, self.first, self.last = make, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, position: int) -> Any:
        return self.make(self.first + position)


def prefetched(make: Callable[[int], Any], first: int, last: int, jobs: int = 1) -> Callable[[int], Any]:
    """A function that gives `make(n)` for n from `first` to `last - 1`, asked for in this order.

    With more than one job, that many processes make the next ones meanwhile; what they make is the same.
    """
    if jobs <= 1 or last <= first:
        return make
    # Forked, for what makes a batch reads gigabytes that are mapped from a file and cannot be sent to a process.
    loader = DataLoader(
        _Numbered(make, first, last),
        batch_size=None,
        num_workers=jobs,
        prefetch_factor=4,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    return lambda _n: next(batches)
