"""What the browser asks of an adapter before it is loaded: its picture, and what its file says of itself."""

from __future__ import annotations

import asyncio
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from aiohttp import web

from t2i_spo_plugin.adapters import inspect_adapter
from t2i_spo_plugin.errors import AdapterError

from .files import fingerprint
from .patching import adapter_file, adapter_files


FACTS, PICTURE = "/spo/adapter", "/spo/adapter/picture"
_PICTURES = (".preview.png", ".preview.jpg", ".preview.jpeg", ".preview.webp", ".png", ".jpg", ".jpeg", ".webp")
"""What other managers put in place of a file's `.safetensors`, the likeliest first."""
_EMBEDDED = re.compile(r"data:image/(jpeg|png|webp);base64,[A-Za-z0-9+/=]+")
_LARGEST_EMBEDDED = 2**20
"""Characters of a picture in the header, at most."""
_THUMBNAIL, _TRIGGER = "modelspec.thumbnail", "modelspec.trigger_phrase"


def register_routes() -> None:
    """Add the two addresses to ComfyUI's server, where there is one."""
    from server import PromptServer  # only ComfyUI's own process can import it

    running = getattr(PromptServer, "instance", None)
    if running is not None:
        running.routes.get(FACTS)(_answer_facts)
        running.routes.get(PICTURE)(_answer_picture)


def adapter_facts(name: str) -> dict[str, Any]:
    """What is known of one of `adapter_files`, in the words of `Inspection`; the key `error` where it is none.

    `picture` is an address, as the browser takes it, or empty.
    """
    if name not in adapter_files():
        return {"error": f"there is no adapter {name!r}"}
    path = adapter_file(name)
    return _facts(path, fingerprint([path])) | {"has_file_picture": picture_of(path) is not None}


def picture_of(adapter: Path) -> Path | None:
    """The picture beside the file of an adapter, as other managers name it; None when there is none."""
    candidates = (adapter.with_name(adapter.stem + ending) for ending in _PICTURES)
    return next((path for path in candidates if path.is_file()), None)


@lru_cache(maxsize=64)
def _facts(path: Path, files: str) -> dict[str, Any]:
    """Read once, until the fingerprint `files` changes."""
    try:
        found = inspect_adapter(path)
    except AdapterError as error:
        return {"error": str(error)}
    metadata = dict(found.metadata)
    picture, trigger = metadata.pop(_THUMBNAIL, ""), metadata.pop(_TRIGGER, "")
    is_picture = len(picture) <= _LARGEST_EMBEDDED and _EMBEDDED.fullmatch(picture)
    return {
        "title": found.title or path.stem,
        "base": found.base_architecture or " or ".join(found.architectures_by_keys),
        "prediction": found.prediction_type,
        "rank": found.ranks,
        "modules": found.modules,
        "bytes": found.bytes,
        "trigger": trigger,
        "training": metadata,
        "warnings": found.warnings,
        "picture": picture if is_picture else "",
    }


async def _answer_facts(request: web.Request) -> web.Response:
    # Of a large file this takes seconds, in which the server has to go on.
    return web.json_response(await asyncio.to_thread(adapter_facts, request.query.get("name", "")))


async def _answer_picture(request: web.Request) -> web.StreamResponse:
    name = request.query.get("name", "")
    path = picture_of(adapter_file(name)) if name in adapter_files() else None
    return web.Response(status=404) if path is None else web.FileResponse(path)
