"""What must not leave this machine with a published text: absolute paths, tokens, the names of machine and account."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Collection, Sequence


__all__ = ["private_part", "without_folders"]

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
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY|\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@"
)
_SHORTEST_NAME = 4
_COMMON_NAMES = ("root", "user", "users", "admin", "ubuntu", "localhost", "home", "guest", "runner", "jovyan", "test")


def without_folders(text: str) -> str:
    """`text` with every absolute path reduced to its last part."""
    text = _HOME.sub("", text)
    stripped = text.strip()
    if _WHOLE_PATH.fullmatch(stripped):
        return re.split(r"[\\/]+", stripped.rstrip("\\/"))[-1]
    return _PATHS.sub("", text)


def private_part(text: str, secrets: Sequence[str] = (), allowed: Collection[str] = ()) -> str:
    """What `text` gives away, in words such as "a token"; empty when it gives nothing away.

    Args:
        text: to be published.
        secrets: texts that must not occur, such as the token in use.
        allowed: public texts, such as the repository's id; a name that occurs in them may be published.
    """
    if any(secret and secret in text for secret in secrets) or _TOKENS.search(text):
        return "a token or password"
    if _PATHS.search(text) or _HOME.search(text):
        return "an absolute path"
    known = " ".join((*allowed, *_COMMON_NAMES)).lower()
    for name, what in _names():
        if (
            len(name) >= _SHORTEST_NAME
            and name.lower() not in known
            and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)
        ):
            return what
    return ""


def _names() -> list[tuple[str, str]]:
    host = socket.gethostname()
    names = [(host, "this machine's name"), (host.partition(".")[0], "this machine's name")]
    try:
        names.append((getpass.getuser(), "this account's name"))
    except (KeyError, OSError):
        pass
    return names
