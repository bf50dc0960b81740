"""Serve an application to clients that may be slow, or many: each connection has a limit."""

import asyncio
import socket

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 30.0  # from its first byte to its last
MAX_CONNECTIONS = 256
WHOLE = (h11.DONE, h11.MUST_CLOSE, h11.MIGHT_SWITCH_PROTOCOL)  # states of a client whose request is whole


class LimitedConnection(H11Protocol):
    """Close a connection whose request is not whole in time, and one beyond the largest number."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first request its time."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._waiting = self.loop.call_later(REQUEST_SECONDS, transport.abort)

    def handle_events(self) -> None:
        """Give each request its time from the first byte until it is whole. Several may arrive in one packet."""
        super().handle_events()
        if self.conn.their_state in WHOLE:
            self._stop_waiting()
        elif self._waiting is None and (self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]):
            self._waiting = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time of a connection that is closed."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = None


def check_address(host: str, port: int) -> None:
    """Check that a server can listen at an address.

    Raises:
        ValueError: If another process listens there, or if the address is not of this machine.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ValueError(
            f"No server can listen at `host` {host} and `port` {port}: {reason}. Set another `port`, or stop the "
            "program that listens there."
        ) from error


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve an application until the process ends."""
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=LimitedConnection,
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=10,
    )
