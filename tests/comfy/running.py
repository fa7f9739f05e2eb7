"""ComfyUI in this process (`Executor`) and as a server beside it (`Server`)."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch
from environment import BUILD, REPOSITORY

from t2i_spo_plugin.cli.comfyui import PACK


_MINIATURE = Path(__file__).with_name("miniature_nodes")
_TEXT = 3
"""The kind of binary message that is a text for a node."""
_FOLDERS = ("custom_nodes", "models/loras", "input", "output", "temp", "user")

STICKER = "sticker (bundled)"
"""The cost model that comes with the package."""
Link = Sequence[Any]
"""An output of a node: its id, and the number of the output."""
Watch = Callable[[str, Any], None]


@dataclass
class GraphRun:
    """What came of a graph.

    Attributes:
        values: by name, the recorded outputs; a list of one value unless the output is a list.
        ui: by node id, what the node showed.
        messages: what the executor sent to the browser, `(event, data)`.
        notes: what a server had shown on a node while it ran, `(node id, text)`.
    """

    values: dict[str, list[Any]] = field(default_factory=dict)
    ui: dict[str, Any] = field(default_factory=dict)
    messages: list[tuple[str, Any]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        """The one value recorded as `name`."""
        (value,) = self.values[name]
        return value

    def progress(self, node: str) -> list[tuple[float, float]]:
        """How far `node` said it was: value and end."""
        states = (data["nodes"] for event, data in self.messages if event == "progress_state")
        return [(nodes[node]["value"], nodes[node]["max"]) for nodes in states if node in nodes]


class GraphError(Exception):
    """A graph was refused, a node of it raised, or it was cancelled; the message is what the user is shown.

    Attributes:
        run: what there was until then; empty for a graph that was refused.
    """

    def __init__(self, message: str, run: GraphRun | None = None) -> None:
        super().__init__(message)
        self.run = run or GraphRun()


def make_base(path: Path) -> Path:
    """A base directory for ComfyUI, with this repository's pack and the test nodes."""
    for folder in _FOLDERS:
        (path / folder).mkdir(parents=True, exist_ok=True)
    for name, folder in ((PACK, REPOSITORY / "comfy_nodes"), ("miniature_nodes", _MINIATURE)):
        (path / "custom_nodes" / name).symlink_to(folder, target_is_directory=True)
    return path


def with_miniatures(base: Path) -> Path:
    """Add the miniature checkpoints to a base directory; this imports ComfyUI, which has to know its settings."""
    from miniature import UNET_FAMILIES, write_model

    for family in UNET_FAMILIES:
        write_model(family, base / "models")
    return base


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of a graph."""
    return {"class_type": kind, "inputs": inputs}


def text_to_image(family: str, seed: int = 0) -> dict[str, Any]:
    """The stock graph, 64 by 64 pixels in four steps; node 5 gives the latents, node 6 the image."""
    name = f"miniature-{family}.safetensors"
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a sunny street", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": 4,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }


def score_images(
    model: str = STICKER, action: str = "blur region", images: str = "images", threshold: float = 0.5
) -> dict[str, Any]:
    """Images of the test, cost model, and as nodes 3 to 6: cost, overlay, switch and report."""
    judged = {"image": ["1", 0], "safety": ["3", 6], "threshold": threshold}
    style = {"colour_map": "heat", "opacity": 0.6, "boxes": True, "labels": True}
    category = {"threshold": threshold, "category": "the deciding one"}
    return {
        "1": node("TestImages", name=images),
        "2": node("SPO_LoadCostModel", model=model, policy="as the model", override_domain=False),
        "3": node("SPO_SafetyCost", image=["1", 0], cost_model=["2", 0], **category),
        "4": node("SPO_SafetyOverlay", **judged, **style),
        "5": node("SPO_SafetySwitch", **judged, action=action, message="not here"),
        "6": node("SPO_SaveReport", safety=["3", 6], filename_prefix="spo/graph"),
    }


class _Browser:
    """What the executor takes for its server: keeps the messages."""

    client_id: str | None = "test"
    last_node_id: str | None = None

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []
        self.sockets_metadata: dict[str, Any] = {}

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        self.messages.append((event, data))


class Executor:
    """ComfyUI's own executor in this process, with all core nodes, the pack and the test nodes."""

    def __init__(self, base: Path) -> None:
        import execution
        import nodes

        self.base = base
        asyncio.run(self._load(nodes))
        self._execution = execution
        self._browser = _Browser()
        arguments = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        kind = execution.CacheType.CLASSIC
        self._executor = execution.PromptExecutor(self._browser, cache_type=kind, cache_args=arguments)

    async def _load(self, nodes: Any) -> None:
        await nodes.init_public_apis()
        await nodes.init_builtin_extra_nodes()
        for folder in sorted((self.base / "custom_nodes").iterdir()):
            if not await nodes.load_custom_node(str(folder)):
                raise RuntimeError(f"{folder.name} did not import, see the log")

    def run(self, prompt: dict[str, Any], given: Mapping[str, Any] = MappingProxyType({}), **wanted: Link) -> GraphRun:
        """Run a graph in the format of `POST /prompt`, and keep the outputs `wanted`, by name.

        Args:
            prompt: the nodes by id.
            given: what the nodes TestImages hand on, by the name in their inputs.
            wanted: what to record, by name.

        Raises:
            GraphError: the graph is not valid, a node raised or blocked what follows it, or the run was cancelled.
        """
        import nodes

        test_nodes = sys.modules[nodes.NODE_CLASS_MAPPINGS["TestRecord"].__module__]
        recorded = test_nodes.RECORDED
        recorded.clear()
        test_nodes.GIVEN.clear()
        test_nodes.GIVEN.update(given)
        self._browser.messages.clear()
        prompt = prompt | {
            f"record {name}": {"class_type": "TestRecord", "inputs": {"value": list(link), "name": name}}
            for name, link in wanted.items()
        }
        valid, error, outputs, node_errors = asyncio.run(self._execution.validate_prompt("test", prompt, None))
        if not valid:
            raise GraphError(json.dumps([error, node_errors], default=str))
        self._executor.execute(prompt, "test", {"client_id": "test"}, outputs)
        run = GraphRun(dict(recorded), dict(self._executor.history_result["outputs"]), list(self._browser.messages))
        for event, data in run.messages:
            if reason := _failure(event, data):
                raise GraphError(reason, run)
        return run


def _failure(event: str, data: Any) -> str:
    """Why a run ended, when this message to the browser says that it did."""
    if event == "execution_interrupted":
        return f"{data['node_type']}: interrupted"
    if event == "execution_error":
        return f"{data['node_type']}: {data['exception_type']}: {data['exception_message'].strip()}"
    return ""


def _note(message: bytes) -> list[tuple[str, str]]:
    """The text for a node in a binary message: its kind, the length of the node's id, the id, the text."""
    kind, length = struct.unpack(">II", message[:8])
    return [(message[8 : 8 + length].decode(), message[8 + length :].decode())] if kind == _TEXT else []


def check_nothing_is_left_behind(prompt: Callable[[int], object], times: int = 200, start: int = 50) -> None:
    """Run `prompt` with the numbers below `times`: after `start`, tensors and resident memory no longer grow."""
    process, before = psutil.Process(), (0, 0)

    def state() -> tuple[int, int]:
        gc.collect()
        tensors = sum(1 for found in gc.get_objects() if type(found) is torch.Tensor)
        return tensors, process.memory_info().rss

    for number in range(times):
        prompt(number)
        if number == start:
            before = state()
    after = state()
    assert after[0] <= before[0] + 10, f"{after[0] - before[0]} tensors more"
    assert after[1] <= before[1] + 40 * 2**20, f"grew by {(after[1] - before[1]) / 2**20:.0f} MiB"


class Server:
    """A ComfyUI server on a port of its own.

    Attributes:
        started: what it had said when it was up.
    """

    def __init__(self, url: str, base: Path, log: Path) -> None:
        self.url = url
        self.base = base
        self.started = ""
        self._log = log

    @property
    def log(self) -> str:
        """All that the server has said so far."""
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> Any:
        """The JSON object that `path` answers with."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, content: Any) -> None:
        """Send a JSON object to `path`."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=60):
            pass

    def view(self, shown: Mapping[str, str]) -> bytes:
        """A file that a node showed, as the browser fetches it."""
        query = urllib.parse.urlencode(shown)
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as answer:
            return bytes(answer.read())

    def interrupt(self) -> None:
        """Cancel what runs, as the browser's button does."""
        request = urllib.request.Request(f"{self.url}/interrupt", b"{}", {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).close()

    def run(self, prompt: dict[str, Any], watch: Watch | None = None, timeout: float = 120.0) -> GraphRun:
        """Send a graph as the browser does, and wait for its end; there are no recorded values.

        Args:
            prompt: the nodes by id.
            watch: is called with every message, its event and its data.
            timeout: seconds.

        Raises:
            GraphError: the graph is not valid, a node raised, or the run was cancelled.
        """
        return asyncio.run(asyncio.wait_for(self._run(prompt, watch), timeout))

    def run_together(self, *prompts: dict[str, Any], timeout: float = 120.0) -> list[GraphRun]:
        """The same for several graphs, each sent by a client of its own before any has ended."""

        async def together() -> list[GraphRun]:
            return list(await asyncio.gather(*(self._run(prompt, None) for prompt in prompts)))

        return asyncio.run(asyncio.wait_for(together(), timeout))

    async def _run(self, prompt: dict[str, Any], watch: Watch | None) -> GraphRun:
        import aiohttp

        client, run = uuid.uuid4().hex, GraphRun()
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}") as socket_,
        ):
            async with session.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client}) as answer:
                if answer.status != 200:
                    raise GraphError(await answer.text())
                own = (await answer.json())["prompt_id"]
            async for message in socket_:
                if message.type is aiohttp.WSMsgType.BINARY:
                    run.notes += _note(message.data)
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                told = json.loads(message.data)
                event, data = told["type"], told["data"]
                if data.get("prompt_id", own) != own:
                    continue  # Everybody is told of a cancelled run.
                run.messages.append((event, data))
                if watch is not None:
                    watch(event, data)
                if reason := _failure(event, data):
                    raise GraphError(reason, run)
                if event == "executed":
                    run.ui[data["node"]] = data["output"]
                if event == "execution_success":
                    return run
        raise GraphError("the server closed the connection", run)


@contextmanager
def start_server(tree: Path, base: Path) -> Iterator[Server]:
    """Start `tree`'s server with the base directory `base` and stop it at the end; FRONT_END names a newer front end.

    Raises:
        RuntimeError: it did not start, or one of the packs in `base` failed to import.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(tree / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(base)]
    command += ["--database-url", "sqlite:///:memory:"]
    if front_end := os.environ.get("FRONT_END"):
        command += ["--front-end-root", str(BUILD / "front-end" / front_end / "comfyui_frontend_package" / "static")]
    log = base / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_import_path())}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=base)
    server = Server(f"http://127.0.0.1:{port}", base, log)
    try:
        _wait(server, process)
        if "IMPORT FAILED" in server.log:
            raise RuntimeError(f"a pack did not import:\n{server.log[-4000:]}")
        server.started = server.log
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _import_path() -> list[str]:
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [str(REPOSITORY), *(path for path in inherited if path)]


def _wait(server: Server, process: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"ComfyUI did not start:\n{server.log[-4000:]}")
