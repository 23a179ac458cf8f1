"""HTTP connections with bounds on the head of a request and its time, whose errors are JSON."""

import asyncio
import json
import sys
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from netfission.utils.errors import invalid, shortened

HEAD_BYTES = 2**16  # of a request's head: its first line and header lines, and of trailers after its body
HEAD_LINES = 100
LINGER_SECONDS = 1.0  # for which what follows a request that was refused is read
HEAD_SECONDS = 10.0  # for the head of a request, from the start of a connection or from its last answer
STUCK_SECONDS = 60.0  # in which a client has to read a part of an answer that does not fit into buffers


class _LargeHeadError(Exception):
    """The head of a request is too large."""


# Which class uvicorn's is depends on what is installed.
class BoundedHTTPProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's protocol with bounds on the head of each request (431); its own errors are JSON."""

    _timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None  # of a client that reads its answer
    _unread = 0  # bytes of the answer when it was started
    _answered: Any = None  # the request that the application answers; `cycle` is the last one that came
    _refused = False
    _pending = 0  # bytes that came since the last whole head or piece of a body
    _bytes = _lines = 0  # of the headers of the request
    _codings = b""  # of its body

    def data_received(self, data: bytes) -> None:
        """Parse what has come, and refuse a head that grows without end."""
        if self._refused:
            return
        self._pending += len(data)
        super().data_received(data)
        if self._pending > HEAD_BYTES and not (self._refused or self.transport.is_closing()):
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin to count the headers of a request."""
        super().on_message_begin()
        self._bytes = self._lines = 0
        self._codings = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header, or make the parser stop: httptools passes on this error."""
        self._bytes += len(name) + len(value)
        self._lines += 1
        if self._bytes > HEAD_BYTES or self._lines > HEAD_LINES:
            raise _LargeHeadError
        if name.lower() == b"transfer-encoding":
            self._codings = value
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin a request, unless its first line is too long."""
        if len(self.url) > HEAD_BYTES:
            raise _LargeHeadError
        self._pending = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Add a piece of the body."""
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._pending = 0
        super().on_message_complete()

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
        self._leave_unanswered()
        super().connection_lost(exc)
        self._stop_timer()
        self._stop_reading_timer()

    def _leave_unanswered(self) -> None:
        """Drop the application's answer: on a closed transport it would be a traceback in the log."""
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        """Start the time limit of a client that does not read its answer; the transport calls this."""
        super().pause_writing()
        self._start_reading_timer()

    def resume_writing(self) -> None:
        """Stop the time limit, as the client has read."""
        super().resume_writing()
        self._stop_reading_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer data that is not HTTP; uvicorn calls this instead of the application."""
        if isinstance(getattr(sys.exception(), "__context__", None), _LargeHeadError):
            self._refuse_head()
        elif self._codings and self._codings.lower() != b"chunked":
            found = shortened(self._codings.decode("latin-1"))
            self._refuse("501 Not Implemented", invalid("Transfer-Encoding", "chunked", found=found))
        else:
            self._refuse("400 Bad Request", invalid("request", "valid HTTP/1.1", found="other data"))

    def _refuse_head(self) -> None:
        expected = f"of at most {HEAD_LINES} lines and {HEAD_BYTES // 1024} KiB"
        self._refuse(
            "431 Request Header Fields Too Large", invalid("head of the request", expected, found="more")
        )

    def _refuse(self, status: str, error: ValueError) -> None:
        """Answer without the application, and close the connection."""
        self._leave_unanswered()  # the application may have begun with the request, whose head was valid
        content = json.dumps({"error": str(error)}).encode()
        head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(content)}"]
        head += ["X-Content-Type-Options: nosniff", "Connection: close", "", ""]
        self.transport.write("\r\n".join(head).encode() + content)
        # What the client still sends is thrown away for a while: closed at once, the connection would be
        # reset, and the client might not get the answer.
        self._refused = True
        self.transport.write_eof()
        self._stop_timer()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _start_reading_timer(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._reading_timer = self.loop.call_later(STUCK_SECONDS, self._abort_if_stuck)

    def _stop_reading_timer(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()

    def _abort_if_stuck(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread:
            self._start_reading_timer()
        else:
            self.transport.abort()  # closed, it would wait until all is read

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._close_if_idle, self.cycle)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _close_if_idle(self, last_cycle: Any) -> None:
        if self.cycle is last_cycle:  # no head arrived in the meantime
            self.transport.close()
