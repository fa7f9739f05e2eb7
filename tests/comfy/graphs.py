"""ComfyUI in this process: folders of its own, the pack loaded as ComfyUI loads it, and graphs run by its executor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

from comfy.cli_args import args


args.cpu = True  # Before anything imports comfy.model_management.

import execution  # noqa: E402
import folder_paths  # noqa: E402
import nodes  # noqa: E402
from comfy_api.latest import io  # noqa: E402


PACK = Path(__file__).parents[2] / "comfy_nodes"


class GivenPictures:
    """Hands on what `GIVEN` holds, as a stock node hands on pictures."""

    GIVEN: dict = {}
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "give", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"key": ("STRING", {})}}

    def give(self, key):
        return (self.GIVEN[key],)


class Kept:
    """Keeps what it is given in `SEEN`, under the node's own number."""

    SEEN: dict = {}
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (io.AnyType.io_type, {})}, "hidden": {"number": "UNIQUE_ID"}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def keep(self, value, number):
        self.SEEN.setdefault(number, []).append(value)
        return {"ui": {}, "result": ()}


class Server:
    """Stands in for the server: remembers what the browser would be told."""

    client_id, last_node_id, sockets_metadata = "test", None, {}

    def __init__(self):
        self.sent = []

    def send_sync(self, event, data, client_id=None):
        self.sent.append((event, data))


def load_pack(base: Path) -> dict:
    """ComfyUI's folders below `base`, and the pack's nodes by id."""
    folder_paths.models_dir = str(base / "models")
    (base / "models" / "safety_cost").mkdir(parents=True)
    for set_folder, name in (
        (folder_paths.set_output_directory, "output"),
        (folder_paths.set_temp_directory, "temp"),
        (folder_paths.set_input_directory, "input"),
    ):
        (base / name).mkdir()
        set_folder(str(base / name))
    before = set(nodes.NODE_CLASS_MAPPINGS)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(nodes.init_public_apis())
    assert loop.run_until_complete(nodes.load_custom_node(str(PACK))), "the pack does not load"
    found = {name: nodes.NODE_CLASS_MAPPINGS[name] for name in set(nodes.NODE_CLASS_MAPPINGS) - before}
    nodes.NODE_CLASS_MAPPINGS.update(GivenPictures=GivenPictures, Kept=Kept)
    return found


def new_executor() -> execution.PromptExecutor:
    return execution.PromptExecutor(
        Server(), cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    )


def run_graph(graph: dict, executor: execution.PromptExecutor | None = None) -> SimpleNamespace:
    """Run a prompt: `kept` by node, `ui` by node, `success`, and the `messages` that the browser gets."""
    executor = executor or new_executor()
    Kept.SEEN.clear()
    executor.server.sent.clear()
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", graph, None))
    if not valid:
        return SimpleNamespace(success=False, invalid=node_errors or error, kept={}, ui={}, messages=[])
    executor.execute(graph, "test", {"client_id": "test"}, outputs)
    return SimpleNamespace(
        success=executor.success,
        invalid=None,
        kept=dict(Kept.SEEN),
        ui=executor.history_result.get("outputs", {}),
        messages=list(executor.server.sent),
    )
