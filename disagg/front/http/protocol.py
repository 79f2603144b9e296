"""A connection of the HTTP door: uvicorn's, with limits for the headers, which uvicorn itself does not limit."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from disagg.front.http.errors import HttpError

HEADERS_S = 10.0  # how long a client may take to send its headers
MOST_HEADER_BYTES = 2**16
IDLE_S = 75  # how long a connection may stay open between two requests


class LimitedProtocol(HttpToolsProtocol):
    """Answers 408 to headers that take too long, and 431 to headers that are too large. Then it closes."""

    _timer: asyncio.TimerHandle | None = None  # as long as headers are incomplete
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._header_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and self._header_bytes > MOST_HEADER_BYTES:
            self._refuse(431, "Request Header Fields Too Large", f"its headers are over {MOST_HEADER_BYTES:,} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._header_bytes = 0
            self._timer = self.loop.call_later(HEADERS_S, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._refuse(408, "Request Timeout", f"its headers did not arrive within {HEADERS_S:g} s")

    def _refuse(self, status: int, reason: str, message: str) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        body = HttpError(status, message).body
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
