"""A model behind an OpenAI-compatible server (vLLM, SGLang, Ollama and others), asked over HTTP.

The key comes from an environment variable, is sent in one header to the address that the user named, follows no
redirect, and stands in no message, log, table or cache.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from PIL import Image

from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.files import MAX_JSON, parse_json, quoted, read_json, write_json
from t2i_spo_plugin.identity import content_hash
from t2i_spo_plugin.options import check_range

from .chat import NotAnswered, Question, log_odds


Result = TypeVar("Result")

_AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""What a server says that may answer a little later."""
_MOST_LOG_PROBABILITIES = 20
_LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class EndpointOptions:
    """How a server is asked.

    Attributes:
        model: the name that the server has for it; when left out, the only one that it offers.
        key_variable: the environment variable that holds the key; none is sent where it is not set.
        concurrency: requests at a time.
        retries: how often a request is repeated that found no connection or a busy server.
        wait: seconds before the first repetition, doubled each time; a server's `Retry-After` goes first.
        timeout: seconds that an answer may take.
        budget: requests that may be sent, repetitions included; what comes later is not answered.
        cache: folder of answers by content: what was asked before is not asked again.
        max_edge: pixels along the longer side of the image that is sent.
    """

    model: str = ""
    key_variable: str = "SPO_ENDPOINT_KEY"
    concurrency: int = 8
    retries: int = 4
    wait: float = 1.0
    timeout: float = 120.0
    budget: int | None = None
    cache: Path | None = None
    max_edge: int = 1024

    def __post_init__(self) -> None:
        check_range("concurrency", self.concurrency, 1, whole=True)
        check_range("retries", self.retries, 0, whole=True)
        check_range("wait", self.wait, 0.0)
        check_range("timeout", self.timeout, 0.0, open_low=True)
        check_range("max_edge", self.max_edge, 16, whole=True)
        if self.budget is not None:
            check_range("budget", self.budget, 0, whole=True)


class Endpoint:
    """Asks a server; follows `Chat`. What the server cannot answer is `NotAnswered`, with its reason.

    Args:
        url: up to and including the version, such as `http://localhost:8000/v1`.
        options: how it is asked.

    Raises:
        ConfigError: no http address, or one that holds a key.
        SPOError: no model is named, and the server does not offer exactly one.
    """

    def __init__(self, url: str, options: EndpointOptions) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"expected an address such as http://localhost:8000/v1, got {_without_secrets(url)}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"the address {_without_secrets(url)} carries more than a path; a key belongs into the environment "
                f"variable {options.key_variable}"
            )
        self.url, self.options = url.rstrip("/"), options
        self.sent = 0
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.name = options.model or self._only_model()

    @property
    def identity(self) -> str:
        """Address and model's name: which weights the server has, it does not say."""
        return content_hash("endpoint", self.url, self.name, self.options.max_edge)

    def to(self, device: Any) -> Endpoint:
        """Nothing: the server has its own devices."""
        return self

    def yes_no(self, questions: Sequence[Question]) -> list[float | None | NotAnswered]:
        """See `Chat.yes_no`."""
        more = {"max_tokens": 1, "logprobs": True, "top_logprobs": _MOST_LOG_PROBABILITIES}

        def odds(choice: Mapping[str, Any]) -> float | None:
            content = (choice.get("logprobs") or {}).get("content") or [{}]
            listed = content[0].get("top_logprobs") or []
            return log_odds((str(one["token"]), float(one["logprob"])) for one in listed) if listed else None

        return self._every(questions, more, odds)

    def text(self, questions: Sequence[Question], max_tokens: int) -> list[str | NotAnswered]:
        """See `Chat.text`."""
        return self._every(
            questions, {"max_tokens": max_tokens}, lambda choice: str(choice["message"]["content"] or "")
        )

    def _every(
        self, questions: Sequence[Question], more: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Result]
    ) -> list[Result | NotAnswered]:
        def ask(question: Question) -> Result | NotAnswered:
            try:
                return read(self._choice({**self._body(question), **more}))
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                return NotAnswered(self._clean(f"the server's answer is not understood: {type(error).__name__}"))
            except SPOError as error:
                return NotAnswered(self._clean(str(error)))

        with ThreadPoolExecutor(self.options.concurrency) as threads:
            return list(threads.map(ask, questions))

    def _body(self, question: Question) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if question.image is not None:
            content.append(
                {"type": "image_url", "image_url": {"url": _data_url(question.image, self.options.max_edge)}}
            )
        if question.text:
            content.append({"type": "text", "text": question.text})
        body = {"model": self.name, "messages": [{"role": "user", "content": content}], "temperature": 0, "seed": 0}
        if question.template_arguments:
            body["chat_template_kwargs"] = dict(question.template_arguments)
        return body

    def _choice(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first choice of the answer to `body`, from the cache where it is there."""
        file = None
        if self.options.cache is not None:
            text = json.dumps([self.url, body], sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()
            file = Path(self.options.cache) / digest[:2] / f"{digest}.json"
            if file.is_file():
                return read_json(file)
        answer = self._request("/chat/completions", body)
        choice: Mapping[str, Any] = answer["choices"][0]
        kept = {"message": {"content": choice["message"]["content"]}, "logprobs": choice.get("logprobs")}
        if file is not None:
            write_json(file, kept)
        return kept

    def _only_model(self) -> str:
        try:
            models = [str(one["id"]) for one in self._request("/models", None)["data"]]
        except (KeyError, TypeError) as error:
            raise SPOError(f"{self.url} does not list its models; name one (`model`)") from error
        if len(models) != 1:
            raise SPOError(f"{self.url} offers {', '.join(models[:10]) or 'no model'}; name one (`model`)")
        return models[0]

    def _request(self, path: str, body: Mapping[str, Any] | None) -> Any:
        reason = ""
        for attempt in range(self.options.retries + 1):
            with self._lock:
                if self.options.budget is not None and self.sent >= self.options.budget:
                    raise SPOError(f"the budget of {self.options.budget} requests is spent")
                self.sent += 1
            wait = self.options.wait * 2**attempt
            try:
                return self._sent(path, body)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {_text_of(error)}"
                if error.code not in _AGAIN:
                    break
                wait = _retry_after(error, wait)
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", "") or error or type(error).__name__)
            if attempt < self.options.retries:
                time.sleep(min(wait, _LONGEST_WAIT))
        raise SPOError(self._clean(f"{self.url} did not answer: {reason}"))

    def _sent(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.options.key_variable, "")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with self._opener.open(request, timeout=self.options.timeout) as answer:
            return parse_json(answer.read(MAX_JSON + 1), f"the answer of {self.url}")

    def _clean(self, text: str) -> str:
        """`text` without the key, should a server repeat it."""
        key = os.environ.get(self.options.key_variable, "")
        return text.replace(key, "[key]") if key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to an address that the user never named."""

    def redirect_request(self, *given: Any) -> None:
        return None


def _data_url(image: Image.Image, max_edge: int) -> str:
    image = image.convert("RGB")
    if max(image.size) > max_edge:
        image.thumbnail((max_edge, max_edge), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _text_of(error: urllib.error.HTTPError) -> str:
    try:
        said = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        said = ""
    return quoted(" ".join(said.split()), 200) if said else str(error.reason)


def _retry_after(error: urllib.error.HTTPError, otherwise: float) -> float:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return otherwise


def _without_secrets(url: str) -> str:
    """The address as far as it may be repeated."""
    parts = urlsplit(url)
    return (
        f"{parts.scheme}://{parts.hostname or ''}{parts.path}" if parts.hostname else quoted(url.partition("@")[0], 40)
    )
