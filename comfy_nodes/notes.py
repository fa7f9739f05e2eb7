"""What a node has to say while others run: on the node itself, and in the log."""

from __future__ import annotations

import logging
from typing import Any


_log = logging.getLogger(__name__)


def note(node: str | None, text: str) -> None:
    """Show `text` on the node with the id `node` in the browser that runs the workflow, and log it as a warning."""
    _log.warning(text)
    # Not in a process that has no server, such as that of another program or of a test.
    from server import PromptServer

    server: Any = getattr(PromptServer, "instance", None)
    if node and server is not None:
        server.send_progress_text(text, node, server.client_id)
