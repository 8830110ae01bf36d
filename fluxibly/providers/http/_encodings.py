"""Bounded decompression: a few bytes can expand to gigabytes, so each step returns at most one piece."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, Protocol

from fluxibly.errors import StreamProtocolError

PIECE = 64 * 1024
"""Maximum number of bytes that a step of decompression returns."""
MAX_BODY = 64 * 1024 * 1024
"""Maximum size of a whole body after decompression, in bytes."""
MAX_ERROR_BODY = 1024 * 1024
"""Maximum number of bytes that are read of an error's body."""
MAX_LAYERS = 3
"""Maximum number of content encodings of a body."""


class Decoder(Protocol):
    """A decoder of one content encoding. `end` raises StreamProtocolError if the data was cut short."""

    def feed(self, data: bytes, /) -> Iterator[bytes]: ...
    def end(self) -> None: ...


def _broken(encoding: str, detail: object) -> StreamProtocolError:
    return StreamProtocolError(f"expected {encoding} data in the body, got invalid data: {detail}")


def _cut(encoding: str) -> StreamProtocolError:
    return StreamProtocolError(f"expected all of the body's {encoding} data, got data that was cut short")


class _Inflate:
    """A decoder of gzip (RFC 1952, any number of members) and deflate (RFC 9110 §8.4.1.2).

    Some servers send deflate without the zlib header, so both kinds are accepted.
    """

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._inflater: Any = None
        self._first = b""

    def _begin(self, data: bytes) -> bytes:
        """Create the inflater and return its data; b"" until the first two bytes show which inflater is needed."""
        if self._encoding == "gzip":
            self._inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            return data
        self._first += data
        if len(self._first) < 2:
            return b""
        has_header = self._first[0] & 0x0F == 8 and int.from_bytes(self._first[:2], "big") % 31 == 0
        self._inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
        return self._first

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._inflater is None:
                data = self._begin(data)
                continue
            inflater = self._inflater
            if inflater.eof:
                if self._encoding != "gzip" or not data.lstrip(b"\0"):
                    return  # padding
                self._inflater = None
                continue
            try:
                piece = inflater.decompress(data, PIECE)
            except zlib.error as error:
                raise _broken(self._encoding, error) from None
            data = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
            if piece:
                yield piece
        inflater = self._inflater
        while inflater is not None and not inflater.eof:  # zlib may hold more output after a full piece
            piece = inflater.decompress(b"", PIECE)
            if not piece:
                return
            yield piece

    def end(self) -> None:
        if self._first and self._inflater is None:
            raise _cut(self._encoding)
        if self._inflater is not None and not self._inflater.eof:
            raise _cut(self._encoding)


class _Brotli:
    """A decoder of br (RFC 7932)."""

    def __init__(self) -> None:
        brotli = _bounded_brotli()
        self._decompressor: Any = brotli.Decompressor()
        self._error: type[Exception] = brotli.error
        self._fed = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        decompressor = self._decompressor
        if not data or decompressor.is_finished():
            return
        self._fed = True
        try:
            piece = decompressor.process(data, output_buffer_limit=PIECE)
            while piece:
                yield piece
                if decompressor.is_finished():
                    return
                piece = decompressor.process(b"", output_buffer_limit=PIECE)
        except self._error as error:
            raise _broken("br", error) from None

    def end(self) -> None:
        if self._fed and not self._decompressor.is_finished():
            raise _cut("br")


def _bounded_brotli() -> Any:
    """Return the module brotli if it can bound its output (version 1.2 and later), else None."""
    try:
        brotli: Any = import_module("brotli")
    except ImportError:
        return None
    return brotli if hasattr(brotli.Decompressor, "can_accept_more_data") else None


def accept_encoding() -> str:
    """Return the value of the accept-encoding header: the encodings that can be decompressed within bounds."""
    return "gzip, deflate, br" if _bounded_brotli() else "gzip, deflate"


def decoders_for(content_encoding: str) -> list[Decoder]:
    """Return the decoders for a `content-encoding` header, in the order to apply them.

    Raises:
        StreamProtocolError: the request did not accept an encoding, or there are too many.
    """
    names = [name.strip().lower().removeprefix("x-") for name in content_encoding.split(",")]
    names = [name for name in reversed(names) if name and name != "identity"]
    if len(names) > MAX_LAYERS:
        raise StreamProtocolError(f"expected at most {MAX_LAYERS} content encodings, got {len(names)}")
    decoders: list[Decoder] = []
    for name in names:
        if name in ("gzip", "deflate"):
            decoders.append(_Inflate(name))
        elif name == "br" and _bounded_brotli():
            decoders.append(_Brotli())
        else:
            raise StreamProtocolError(
                f"expected a content encoding among {accept_encoding()}, got {name!r}", retryable=False
            )
    return decoders


def decoded(decoders: list[Decoder], data: bytes) -> Iterable[bytes]:
    """Return `data` decompressed, in bounded pieces."""
    pieces: Iterable[bytes] = (data,)
    for decoder in decoders:
        pieces = _through(decoder, pieces)
    return pieces


def _through(decoder: Decoder, pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield from decoder.feed(piece)
