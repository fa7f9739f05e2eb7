"""An OpenAI-compatible server for tests, on loopback: it answers by how red an image is, or as it is told."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


def redness(body: dict[str, Any]) -> float:
    """Mean red of the image in a request, from 0 to 1."""
    parts = body["messages"][0]["content"]
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return float(np.asarray(image.convert("RGB"))[..., 0].mean() / 255)


def words_of(body: dict[str, Any]) -> str:
    """The question of a request."""
    return next((part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"), "")


class ChatServer:
    """A server in a thread.

    Args:
        words: gives the text of an answer by the request.
        odds: gives `log(P(yes) / P(no))`; None for a server without log-probabilities.
        before: answers a request instead, with a status, headers and a body, where it gives any.
        models: the names that the server offers.
    """

    def __init__(
        self,
        words: Callable[[dict[str, Any]], str] = lambda body: "It is red.",
        odds: Callable[[dict[str, Any]], float] | None = lambda body: 8.0 * (redness(body) - 0.5),
        before: Callable[[int, dict[str, Any]], tuple[int, dict[str, str], str] | None] = lambda number, body: None,
        models: tuple[str, ...] = ("tiny",),
    ) -> None:
        self.words, self.odds, self.before, self.models = words, odds, before, models
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> ChatServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *given: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(200, {}, json.dumps({"data": [{"id": name} for name in outer.models]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                self._answer(*(outer.before(number, body) or (200, {}, json.dumps(outer.answer(body)))))

            def _answer(self, status: int, headers: dict[str, str], text: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM answers."""
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": self.words(body)}}
        if body.get("logprobs") and self.odds is not None:
            odds = self.odds(body)
            yes = -math.log1p(math.exp(-odds))
            listed = [
                {"token": "Yes", "logprob": yes + math.log(0.5)},
                {"token": " yes", "logprob": yes + math.log(0.25)},
            ]
            listed += [{"token": "No", "logprob": yes - odds + math.log(0.75)}, {"token": "Red", "logprob": -9.0}]
            choice["logprobs"] = {"content": [{"token": "Yes", "top_logprobs": listed}]}
        return {"choices": [choice]}
