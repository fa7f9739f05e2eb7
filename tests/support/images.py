"""Image files that no library writes."""

from __future__ import annotations

import struct
import zlib


def grey_png(width: int, height: int, depth: int, rows: bytes, transparent: int | None = None) -> bytes:
    """A grey PNG of `depth` bits a pixel from what its header states and what its rows are, be it all or not.

    Args:
        rows: of the pixels, each with a filter byte of 0 before it.
        transparent: the value that is not to be seen.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    clear = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    return b"\x89PNG\r\n\x1a\n" + header + clear + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def huge_png(edge: int) -> bytes:
    """A PNG that says to have `edge` x `edge` pixels, of which a few follow."""
    return grey_png(edge, edge, 8, bytes(1000))
