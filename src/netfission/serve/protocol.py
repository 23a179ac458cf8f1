"""HTTP connections that close if no request arrives in time, and that report errors as JSON."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from netfission.utils.errors import invalid

HEAD_SECONDS = 10.0  # for the head of a request, from the start of a connection or from its last answer


# Which class uvicorn's is depends on what is installed.
class TimedHTTPProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's protocol with a time limit on the head of each request; its own errors are JSON."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the time limit of the first request."""
        super().connection_made(transport)
        self._start_timer()

    def on_response_complete(self) -> None:
        """Start the time limit of the next request."""
        super().on_response_complete()
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time limit."""
        super().connection_lost(exc)
        self._stop_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer data that is not HTTP; uvicorn calls this instead of the application."""
        error = str(invalid("request", "valid HTTP/1.1", found="other data"))
        content = json.dumps({"error": error}).encode()
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        self.transport.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + content)
        self.transport.close()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._close_if_idle, self.cycle)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _close_if_idle(self, last_cycle: Any) -> None:
        if self.cycle is last_cycle:  # no head arrived in the meantime
            self.transport.close()
