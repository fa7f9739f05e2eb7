"""The HTTP server: `POST /score` with images and prompts, `POST /compute` as Flow-Factory's remote rewards ask.

It keeps nothing, writes no image, and repeats no content. On loopback it needs no token; anywhere else it does.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.options import check_range

from .scoring import Scorer, composite_reward


_SECONDS = 60
"""That a client may take to send what it announced."""


@dataclass(frozen=True)
class ServeOptions:
    """What is served to other programs over HTTP, where, and how much.

    Attributes:
        cost_model: as for spo score; none where only rewards are served.
        policy: what counts as unsafe, as for spo score.
        quality_model: rewards.json of spo reference, or another quality model; needs a cost model beside it.
        reward: single rewards, as for spo reference.
        domain: what the images are, such as photo.
        override_domain: score images of another domain all the same; costs may mean little.
        host: to listen on; anything but loopback needs a token.
        port: to listen on; 0 takes a free one.
        token_variable: the environment variable with the token, which is sent as `Authorization: Bearer TOKEN`.
        max_images: images in a request.
        max_megabytes: of a request.
        lambda_: of q - lambda C, which `/compute` gives.
    """

    cost_model: str = ""
    policy: str = ""
    quality_model: str = ""
    reward: tuple[str, ...] = ()
    domain: str = ""
    override_domain: bool = False
    host: str = "127.0.0.1"
    port: int = 8600
    token_variable: str = "SPO_SERVE_TOKEN"
    max_images: int = 64
    max_megabytes: int = 64
    lambda_: float = 1.0

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, 65535, whole=True)
        check_range("max_images", self.max_images, 1, whole=True)
        check_range("max_megabytes", self.max_megabytes, 1, whole=True)
        check_range("lambda", self.lambda_, 0.0)


class ScoreServer:
    """Serves a scorer until it is closed; requests wait for each other, for there is one set of models.

    Args:
        scorer: the judges.
        options: where, and how much; the judges are those of the scorer.

    Raises:
        ConfigError: another host than loopback without a token, or an address that is not free.
    """

    def __init__(self, scorer: Scorer, options: ServeOptions) -> None:
        self.scorer, self.options = scorer, options
        self._token = os.environ.get(options.token_variable, "")
        if not self._token and not _is_loopback(options.host):
            raise ConfigError(
                f"{options.host} can be reached by others: put a token into the environment variable "
                f"{options.token_variable}, or listen on 127.0.0.1"
            )
        self._judging = threading.Lock()
        try:
            self._server = ThreadingHTTPServer((options.host, options.port), _handler(self))
        except OSError as error:
            raise ConfigError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}") from error
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def serve_forever(self) -> None:
        """Answer until `close` is called from another thread."""
        self._server.serve_forever(0.2)

    def close(self) -> None:
        """Stop answering, and free the address."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, headers: Any, body: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON for a request; `body` reads so many bytes of it."""
        if not self._allowed(headers.get("Authorization", "")):
            return 401, {"error": "send the token as Authorization: Bearer TOKEN"}
        if method == "GET" and path == "/health":
            return 200, {"status": "ok", "version": __version__, **self._described()}
        if method != "POST" or path not in ("/score", "/compute"):
            return 404, {"error": "there are GET /health, POST /score and POST /compute"}
        try:
            content = self._content(headers, body)
            with self._judging:
                return self._scored(content) if path == "/score" else self._computed(content)
        except _Refused as error:
            return error.status, {"error": str(error)}
        except SPOError as error:
            return 422, {"error": str(error)}

    def _scored(self, content: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        images, prompts, safe = self._asked(content, "images", "prompts")
        return 200, {"scores": self.scorer(images, prompts, safe)}

    def _computed(self, content: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        images, prompts, safe = self._asked(content, "image", "prompt")
        rewards = [composite_reward(entry, self.options.lambda_) for entry in self.scorer(images, prompts, safe)]
        if any(reward != reward for reward in rewards):
            return 422, {"error": f"{sum(reward != reward for reward in rewards)} images were not scored"}
        return 200, {"rewards": rewards}

    def _asked(
        self, content: dict[str, Any], images: str, prompts: str
    ) -> tuple[list[bytes], list[str], list[Sequence[str] | None]]:
        encoded = content.get(images)
        if not isinstance(encoded, list) or not encoded or not all(isinstance(one, str) for one in encoded):
            raise _Refused(400, f"{images} must be a list of images in base64")
        if len(encoded) > self.options.max_images:
            raise _Refused(413, f"{len(encoded)} images, at most {self.options.max_images} at a time")
        texts = content.get(prompts)
        if texts is None and not self.scorer.needs_prompts:
            texts = [""] * len(encoded)
        if not isinstance(texts, list) or len(texts) != len(encoded) or not all(isinstance(t, str) for t in texts):
            raise _Refused(400, f"{prompts} must be a list of texts, one an image")
        safe = content.get("safe_prompts") or [None] * len(encoded)
        if not isinstance(safe, list) or len(safe) != len(encoded) or not all(_is_texts(one) for one in safe):
            raise _Refused(400, "safe_prompts must have a list of texts for a harmful prompt and null for any other")
        try:
            files = [base64.b64decode(one.partition(",")[2] if "," in one else one, validate=True) for one in encoded]
        except (binascii.Error, ValueError) as error:
            raise _Refused(400, f"an image is not base64: {error}") from None
        return files, texts, safe

    def _content(self, headers: Any, body: Any) -> dict[str, Any]:
        # A web page may send a form to loopback, but no JSON.
        if headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            raise _Refused(415, "send Content-Type: application/json")
        try:
            length = int(headers.get("Content-Length", ""))
        except ValueError:
            raise _Refused(411, "send Content-Length") from None
        if not 0 <= length <= self.options.max_megabytes * 2**20:
            raise _Refused(413, f"at most {self.options.max_megabytes} MB at a time")
        data = body(length)
        try:
            # Images make it longer than `parse_json` allows; what is nested is not.
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise _Refused(400, "the body is not JSON") from None
        if not isinstance(content, dict):
            raise _Refused(400, "the body must be a JSON object")
        return content

    def _allowed(self, header: str) -> bool:
        return not self._token or hmac.compare_digest(header.encode(), f"Bearer {self._token}".encode())

    def _described(self) -> dict[str, Any]:
        guard = self.scorer.guard
        return {
            "cost_model": guard.name if guard else None,
            "policy": guard.policy.name if guard else None,
            "categories": [category.name for category in guard.policy.enabled] if guard else [],
            "quality": self.scorer.quality is not None,
            "rewards": list(self.scorer.rewards),
            "max_images": self.options.max_images,
            "max_megabytes": self.options.max_megabytes,
        }


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _handler(server: ScoreServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SECONDS
        server_version = "spo"
        sys_version = ""

        def log_message(self, *given: Any) -> None:
            """Nothing: a path or an address is nobody's business."""

        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            try:
                status, content = server.answer(method, self.path, self.headers, self.rfile.read)
            except Exception as error:  # whatever a model raises, the server goes on
                status, content = 500, {"error": f"{type(error).__name__}: the request failed"}
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.send_header("X-Content-Type-Options", "nosniff")
            # What was refused may not have been read.
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(text)
            self.close_connection = True

    return Handler


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))
