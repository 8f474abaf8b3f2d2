"""Connections of the lab's server: until a request's headers are complete, a client holds no place for long.

Nothing before the headers shows the token. A request without it is answered with "Connection: close" (server.py), so
that all connections that stay open belong to those who have the token.
"""

import asyncio
from collections import Counter

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# for headers to arrive; a browser closes and reopens the connections that it opens in advance
HEADERS_S = 10
MAX_CONNECTIONS = 200  # a browser opens six per tab
MAX_WAITING = MAX_CONNECTIONS // 2  # for headers; the rest is for those who have the token


class LabProtocol(H11Protocol):
    """HTTP/1.1 connection with a deadline for headers.

    If too many connections wait for headers, the oldest of the client that has the most is closed.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for headers."""
        super().connection_made(transport)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        """Read data, which does not extend the deadline."""
        super().data_received(data)
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""
        super().connection_lost(exc)
        self._remove_deadline()

    def _set_deadline(self) -> None:
        """Set the deadline if headers are incomplete, remove it if they are complete."""
        if self.conn.their_state is not h11.IDLE:
            self._remove_deadline()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(HEADERS_S, self._give_up)
            waiting = [other for other in self.connections if other._deadline is not None]
            if len(waiting) > MAX_WAITING:
                clients = Counter(other._address for other in waiting)
                min(
                    waiting, key=lambda other: (-clients[other._address], other._deadline.when())
                )._give_up()

    def _remove_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._remove_deadline()
        self.transport.abort()

    @property
    def _address(self) -> str | None:
        return self.client and self.client[0]
