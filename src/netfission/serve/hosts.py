"""Which names a server answers to: a page of another name that resolves to its address reads nothing."""

import re
import socket
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import ip_address

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from netfission.utils.errors import invalid, shortened

_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d*)?")


class HostMiddleware:
    """Middleware that refuses a request whose `Host` is not a name of the server (421).

    IP addresses, `localhost` and the machine's own name are always accepted: a browser sends them only if a
    user has typed or followed them, and no owner of another name can point it there (DNS rebinding).

    Args:
        app: the application.
        names: further names; `*` for all.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = frozenset({"localhost", socket.gethostname().lower(), *map(str.lower, names)})
        self._accepts = lru_cache(maxsize=256)(self._accepts_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it."""
        if scope["type"] == "http":
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            if not (self._accepts(hosts[0]) if len(hosts) == 1 else self._needs_none(scope, hosts)):
                expected = "one of this server's names, see its option --allowed-host"
                error = invalid(
                    "Host", expected, found=shortened(b", ".join(hosts).decode("latin-1")) or "none"
                )
                await JSONResponse({"error": str(error)}, 421)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    @staticmethod
    def _needs_none(scope: Scope, hosts: list[bytes]) -> bool:
        return not hosts and scope["http_version"] == "1.0"

    def _accepts_host(self, host: bytes) -> bool:
        match = _HOST.fullmatch(host.decode("latin-1"))
        if match is None:
            return False
        name = (match["ipv6"] or match["name"]).lower().removesuffix(".")
        return "*" in self._names or name in self._names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
