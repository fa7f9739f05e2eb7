"""ComfyUI's front end in Chromium: opened in either renderer, with workflows loaded and run, and complaints heard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Response, sync_playwright
from running import Server


RENDERERS = ("classic", "nodes 2.0")
OLDEST_NODES_2 = (0, 20)
"""The version of ComfyUI from which on Nodes 2.0 are tested: in 0.16 they were a preview, and time is short."""
_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingNodesWarning": True,
    "Comfy.Workflow.ShowMissingModelsWarning": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.VueNodes.AutoScaleLayout": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    # There is no graphics card: drawing takes what the models need.
    "LiteGraph.Canvas.MaximumFps": 10,
    # Text stays text, however small.
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.InstalledVersion": "1.0.0",
    "Comfy.Locale": "en",
    "Comfy.ColorPalette": "dark",
}
_NOT_OURS = (
    # Pages of ComfyUI that are not installed here, or that are on the Internet.
    "/templates/",
    "/docs/Comfy",
    # The server of 0.16.3 lists outputs that are text, which its front end refuses.
    "[Jobs API]",
    "core workflow templates",
    "fuse options",
    "fuse_options",
    "comfy.org",
    # What ComfyUI 0.30 says of itself at every start, also without any pack.
    "graph accessed before initialization",
    # ComfyUI's own first workflow asks for models that are not there.
    "huggingface.co",
    "googletagmanager",
    "userdata",
    "/user.css",
    "favicon",
    "manager/",
)
_STARTED = "window.app?.extensionManager && document.querySelector('#graph-canvas')"

_FIT = """(margin) => {
    const { canvas, graph } = app.canvas;
    const [title, { width, height }] = [30, canvas.getBoundingClientRect()];
    const left = Math.min(...graph.nodes.map((node) => node.pos[0]));
    const top = Math.min(...graph.nodes.map((node) => node.pos[1])) - title;
    const right = Math.max(...graph.nodes.map((node) => node.pos[0] + node.size[0]));
    const bottom = Math.max(...graph.nodes.map((node) => node.pos[1] + node.size[1]));
    const scale = Math.min((width - 2 * margin) / (right - left), (height - 2 * margin) / (bottom - top), 1);
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [margin / scale - left, margin / scale - top];
    app.canvas.setDirty(true, true);
    return { x: 0, y: 0, width: (right - left) * scale + 2 * margin, height: (bottom - top) * scale + 2 * margin };
}"""


def chromium() -> str | None:
    """The browser to use: CHROMIUM, or the first of the usual names on the path."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((found for name in names if (found := shutil.which(name))), None)


@contextmanager
def start_browser() -> Iterator[Browser]:
    """One headless browser for many pages."""
    with sync_playwright() as playwright:
        # Images of the screen have to be the same on a machine with and without a graphics card.
        options = ["--no-sandbox", "--disable-gpu", "--force-color-profile=srgb", "--font-render-hinting=none"]
        browser = playwright.chromium.launch(executable_path=chromium(), args=options)
        yield browser
        browser.close()


class Canvas:
    """A page with ComfyUI's canvas."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page = page
        self.server = server
        self.complaints: list[str] = []
        """What the console reported as an error, and what the server did not answer."""
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("response", self._on_response)

    def _on_console(self, message: ConsoleMessage) -> None:
        where = message.location.get("url", "")
        # A request without an answer is told of by `_on_response`, with its address.
        if message.type == "error" and not any(part in f"{message.text} {where}" for part in _NOT_OURS):
            if not message.text.startswith("Failed to load resource"):
                self.complaints.append(f"console: {message.text} ({where})")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400 and not any(part in response.url for part in _NOT_OURS):
            self.complaints.append(f"{response.status}: {response.url}")

    def toasts(self) -> list[str]:
        """The red messages on the screen."""
        return self.page.locator(".p-toast-message-error, .p-dialog .pi-exclamation-triangle").all_inner_texts()

    def load(self, workflow: dict[str, Any], name: str = "test") -> None:
        """Show a saved workflow, all of it on the screen."""
        self.page.evaluate("([workflow, name]) => app.loadGraphData(workflow, true, true, name)", [workflow, name])
        self.page.wait_for_timeout(300)
        self.fit()

    def fit(self, margin: int = 24) -> dict[str, float]:
        """Move and scale the canvas so that the whole workflow is seen; where it lies on the screen."""
        area = self.page.evaluate(_FIT, margin)
        self.page.wait_for_timeout(600)
        return area

    def zoom(self, kind: str) -> None:
        """Show the first node of a kind in its own size."""
        script = """(kind) => {
            const node = app.canvas.graph.nodes.find((each) => each.type === kind);
            Object.assign(app.canvas.ds, { scale: 1, offset: [100 - node.pos[0], 100 - node.pos[1]] });
            app.canvas.setDirty(true, true);
        }"""
        self.page.evaluate(script, kind)
        self.page.wait_for_timeout(600)

    def run(self, timeout: float = 180.0) -> None:
        """Run the workflow as the button does, to its end.

        Raises:
            AssertionError: it was refused, or a node raised.
        """
        outcome = self.page.evaluate(
            """(seconds) => new Promise(async (done) => {
                const api = window.comfyAPI.api.api;
                const finish = (text) => { clearTimeout(timer); done(text); };
                const timer = setTimeout(() => finish('no answer'), 1000 * seconds);
                for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
                    api.addEventListener(end, (event) =>
                        finish(end + ' ' + (event.detail?.exception_message ?? '')), { once: true });
                await app.queuePrompt(0);
                const refused = app.lastNodeErrors ?? {};
                if (Object.keys(refused).length) finish('refused: ' + JSON.stringify(refused));
            })""",
            timeout,
        )
        assert outcome.startswith("execution_success"), outcome
        self.page.wait_for_timeout(400)

    def image(self, path: Path) -> None:
        """The canvas alone, without menus and messages, as a file."""
        toggle = "() => app.extensionManager.command.execute('Workspace.ToggleFocusMode')"
        self.page.evaluate(toggle)
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=path, clip=self.fit(), quality=80 if path.suffix == ".jpg" else None)
        self.page.evaluate(toggle)

    def set(self, setting: str, value: Any) -> None:
        """Change a setting as the settings dialog does."""
        script = "([name, value]) => app.extensionManager.setting.set(name, value)"
        self.page.evaluate(script, [setting, value])
        self.page.wait_for_timeout(800)

    def saved(self) -> dict[str, Any]:
        """The workflow as the front end would save it now."""
        # What JavaScript has not defined is left out of a file, but would come here as None.
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))


@contextmanager
def open_canvas(
    browser: Browser,
    server: Server,
    renderer: str = "classic",
    size: tuple[int, int] = (1200, 800),
    sharpness: float = 1.0,
) -> Iterator[Canvas]:
    """ComfyUI in a fresh page, without a workflow."""
    server.post("/settings", _SETTINGS | {"Comfy.VueNodes.Enabled": renderer == "nodes 2.0"})
    viewport = {"width": size[0], "height": size[1]}
    context = browser.new_context(viewport=viewport, device_scale_factor=sharpness)
    page = context.new_page()
    canvas = Canvas(page, server)
    try:
        page.goto(server.url)
        page.wait_for_function(_STARTED, timeout=90_000)
        page.wait_for_function("() => app.extensions?.length > 10 && !document.querySelector('.p-progress-spinner')")
        page.wait_for_timeout(1500)
        page.evaluate("() => app.graph.clear()")
        yield canvas
    finally:
        context.close()
