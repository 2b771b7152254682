"""HTTP connections to public hosts alone, by the address that was really connected to.

Looking a name up before it is asked is not enough: whoever owns the name may answer otherwise the second time.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from .pictures import Unusable


def is_public(address: str) -> bool:
    """Whether an IP address (of IPv6 also with its zone) is one of the public internet."""
    return ipaddress.ip_address(address.partition("%")[0]).is_global


def private_host() -> Unusable:
    """What to say of a host that is not public."""
    return Unusable("private address", "lies on a host that is not public; --private-hosts allows it")


class _Checked:
    """Looks at the peer before a byte is sent."""

    def _new_conn(self) -> socket.socket:
        made: socket.socket = super()._new_conn()  # type: ignore[misc]
        if not is_public(made.getpeername()[0]):
            made.close()
            raise private_host()
        return made


class _Http(_Checked, HTTPConnection):
    pass


class _Https(_Checked, HTTPSConnection):
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http  # type: ignore[assignment]


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https  # type: ignore[assignment]


class PublicHosts(HTTPAdapter):
    """For ``requests.Session.mount``; raises :class:`Unusable` for a host that is not public. A proxy is not looked at."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """As requests makes it, with connections of ours."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
