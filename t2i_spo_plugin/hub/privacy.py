"""Texts before they are published: nothing private may leave with them, and nothing in them may act as markup."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Sequence


__all__ = ["encodable", "own_name", "plain", "private_part", "visible", "without_folders"]

_PATHS = re.compile(
    r"file:/+(?:[^\s/\"'<>|]+/)*"
    r"|(?<![\w.:/~)\]-])(?:~\w*|)/(?:[^\s/\"'<>|,;]+/)+"
    r"|(?<![\w])[A-Za-z]:[\\/](?:[^\\/\"'<>|\n]+[\\/])*"
    r"|(?<![\w\\])\\\\[^\\\s]+\\(?:[^\\\n\"'<>|]+\\)*"
)
_HOME = re.compile(r"(?<![\w.:/~)\]-])/(?:home|Users)/[^\s/\"'<>|,;]+/?(?=[\s,;]|$)")
_WHOLE_PATH = re.compile(r"(?:~|/|[A-Za-z]:[\\/]|\\\\|file:)[^\n]*[\\/][^\n]*")
_TOKENS = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|\bsk-[\w-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|\beyJ[\w-]{10,2000}\.eyJ[\w-]{10}|-----BEGIN [A-Z ]*PRIVATE KEY|\b[a-z][a-z0-9+.-]{0,20}://[^/\s:@]{1,200}:[^/\s@]{1,200}@"
)
_MARKUP = re.compile(r"[^\w ,.;:'()/%+=?\-]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)")
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ud800-\udfff]+")
_SHORTEST_NAME = 4
_COMMON_NAMES = ("root", "user", "users", "admin", "ubuntu", "localhost", "home", "guest", "runner", "jovyan", "test")


def without_folders(text: str) -> str:
    """`text` with every absolute path reduced to its last part."""
    text = _HOME.sub("", text)
    stripped = text.strip()
    if _WHOLE_PATH.fullmatch(stripped):
        return re.split(r"[\\/]+", stripped.rstrip("\\/"))[-1]
    return _PATHS.sub("", text)


def private_part(text: str, secrets: Sequence[str] = ()) -> str:
    """The token or path that `text` gives away, in words; empty when it gives none away.

    `secrets` are texts that must not occur, such as the token in use.
    """
    if any(secret and secret in text for secret in secrets) or _TOKENS.search(text):
        return "a token or password"
    return "an absolute path" if _PATHS.search(text) or _HOME.search(text) else ""


def own_name(text: str, public: Sequence[str] = ()) -> str:
    """The name of this machine or account that `text` gives away, in words; empty when it gives none away.

    A name that is common, or occurs in one of the `public` texts, such as the repository's id, is not looked for.
    """
    known = " ".join((*public, *_COMMON_NAMES)).lower()
    for name, what in _names():
        if (
            len(name) >= _SHORTEST_NAME
            and name.lower() not in known
            and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)
        ):
            return what
    return ""


def visible(text: str) -> str:
    """`text` in one line, without control characters and marks that turn or hide text."""
    return " ".join(_INVISIBLE.sub(" ", text).split())


def plain(text: str) -> str:
    """`text` so that Markdown and HTML show it as it is, in one line, in a table too."""
    return _MARKUP.sub(lambda mark: f"&#{ord(mark[0])};", visible(text))


def encodable(text: str) -> str:
    """`text` with a question mark for every half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _names() -> list[tuple[str, str]]:
    host = socket.gethostname()
    names = [(host, "this machine's name"), (host.partition(".")[0], "this machine's name")]
    try:
        names.append((getpass.getuser(), "this account's name"))
    except (KeyError, OSError):
        pass
    return names
