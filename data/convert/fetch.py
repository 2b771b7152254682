"""Pictures by path or URL, in a bounded time and of a bounded size; each failure has a reason.

A list of URLs is somebody else's: a name on it may lead into one's own network. Addresses that are not public are
refused unless they are allowed, at every redirection, by name and by the address connected to; no cookies, ``.netrc`` or other credentials are sent over HTTP.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlparse

from ..messages import first_line, shown
from .pictures import MOST_BYTES, Unusable, checked, file_bytes, too_large

_local = threading.local()
_AGENT = "opsin-data-convert"
_HOPS, _CHUNK = 5, 1 << 16
_LATER = {408, 429, 500, 502, 503, 504}
"""Answers of a server after which it is asked again."""


class _Again(Exception):
    """A failure that may pass."""


@dataclass(frozen=True)
class Fetcher:
    """Reads pictures; small to pickle, one serves all threads.

    Args:
        folder: where relative paths begin; none leads out of it.
        timeout: seconds for a connection, and for the whole of a picture.
        retries: how often a picture is asked for again after a failure that may pass, waiting .5, 1, 2 ... seconds.
        private: also ask hosts that are not public: loopback, one's own network, the cloud's metadata service.
        threads: pictures that are read at the same time.
    """

    folder: str
    timeout: float = 20.0
    retries: int = 2
    private: bool = False
    threads: int = 16

    def fetch_all(self, places: Sequence[bytes | str]) -> Iterator[bytes | Unusable]:
        """Pictures in order, or why one cannot be taken."""
        if not any(isinstance(p, str) and urlparse(p).scheme in ("http", "https", "s3") for p in places):
            yield from map(self._one, places)
            return
        with ThreadPoolExecutor(min(self.threads, len(places))) as pool:
            for place, got in zip(places, pool.map(self._raw, places), strict=True):
                yield self._verdict(place, got)

    def _one(self, place: bytes | str) -> bytes | Unusable:
        return self._verdict(place, self._raw(place))

    def _raw(self, place: bytes | str) -> bytes | Unusable:
        """A picture's bytes, unchecked: how Pillow warns is not for several threads."""
        try:
            return place if isinstance(place, bytes) else self._read(place)
        except Unusable as error:
            return error

    @staticmethod
    def _verdict(place: bytes | str, got: bytes | Unusable) -> bytes | Unusable:
        if isinstance(got, Unusable):
            return got
        try:
            return checked(got)
        except Unusable as error:
            return error

    def _read(self, place: str) -> bytes:
        scheme = urlparse(place).scheme.lower() if "://" in place or place.startswith("data:") else ""
        if scheme in ("http", "https"):
            return self._patiently(place, self._http)
        if scheme == "s3":
            return self._patiently(place, self._s3)
        if scheme == "data":
            return _inline(place)
        if scheme not in ("", "file"):
            raise Unusable("address", f"{scheme}:// is none of http, https, s3, file")
        return file_bytes(self._inside(unquote(urlparse(place).path) if scheme else place))

    def _inside(self, name: str) -> Path:
        """A path, if it does not lead out of the folder (by its words; links in the folder are followed)."""
        path = Path(self.folder, name)
        if "\0" in name or "\\" in name or ".." in Path(name).parts:
            raise Unusable("path", "leads out of the picture folder, or is no path with '/'")
        if Path(os.path.normpath(path)).is_relative_to(os.path.normpath(self.folder)):
            return path
        raise Unusable("path", "leads out of the picture folder")

    def _patiently(self, address: str, read: Any) -> bytes:
        for attempt in range(self.retries + 1):
            try:
                return read(address)
            except _Again as error:
                if attempt == self.retries:
                    raise Unusable("unreachable picture", str(error)) from error
                time.sleep(0.5 * 2**attempt)
        raise AssertionError

    def _http(self, address: str) -> bytes:
        import requests
        from urllib3.exceptions import HTTPError

        ends = time.monotonic() + self.timeout
        for _ in range(_HOPS):
            self._refuse_private(address)
            try:
                with closing(
                    _session(self.private).get(
                        address, stream=True, timeout=self.timeout, allow_redirects=False
                    )
                ) as answer:
                    if answer.is_redirect:
                        address = urljoin(address, answer.headers["location"])
                        if urlparse(address).scheme not in ("http", "https"):
                            raise Unusable("address", "is redirected to something else than http or https")
                        continue
                    if answer.status_code in _LATER:
                        raise _Again(f"the server answers {answer.status_code}")
                    if answer.status_code != 200:
                        raise Unusable("missing picture", f"the server answers {answer.status_code}")
                    return _body(_pieces(answer.raw), answer.headers.get("content-length"), ends)
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, UnicodeError) as error:
                raise Unusable("address", f"is no address ({type(error).__name__})") from error
            except (requests.RequestException, HTTPError) as error:  # its text repeats the address
                raise _Again(f"cannot be fetched ({type(error).__name__})") from error
        raise Unusable("unreachable picture", f"is redirected more than {_HOPS} times")

    def _refuse_private(self, address: str) -> None:
        from requests.utils import get_environ_proxies

        from .public_hosts import is_public, private_host

        if self.private:
            return
        try:
            host, port = urlparse(address).hostname or "", urlparse(address).port
            if get_environ_proxies(address):  # the proxy knows names that this machine need not know
                found = {host} if _is_ip(host) else set()
            else:
                found = {i[4][0] for i in socket.getaddrinfo(host, port or 80, type=socket.SOCK_STREAM)}
        except (OSError, ValueError, UnicodeError) as error:
            raise _Again(f"its host is not known ({type(error).__name__})") from error
        if not all(is_public(str(each)) for each in found):
            raise private_host()

    def _s3(self, address: str) -> bytes:
        from botocore.exceptions import BotoCoreError, ClientError

        parts = urlparse(address)
        try:
            answer = _s3_client(self.timeout).get_object(Bucket=parts.netloc, Key=parts.path.lstrip("/"))
            with closing(answer["Body"]) as body:
                ends = time.monotonic() + self.timeout
                return _body(body.iter_chunks(_CHUNK), answer.get("ContentLength"), ends)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
            if status in _LATER:
                raise _Again(f"the store answers {status}") from error
            raise Unusable("missing picture", f"the store answers {status}") from error
        except BotoCoreError as error:
            raise _Again(f"the store cannot be asked ({type(error).__name__})") from error


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _pieces(raw: Any) -> Iterator[bytes]:
    """A body as it comes: waiting for whole pieces, a server that sends a byte now and then would keep us for hours."""
    while piece := raw.read1(_CHUNK, decode_content=True):
        yield piece


def _body(chunks: Any, length: Any, ends: float) -> bytes:
    """An answer's bytes; its length is not believed."""
    if str(length or "").isdigit() and int(length) > MOST_BYTES:
        raise too_large(int(length))
    got, size = [], 0
    for chunk in chunks:
        got.append(chunk)
        size += len(chunk)
        if size > MOST_BYTES:
            raise too_large(size)
        if time.monotonic() > ends:
            raise _Again("it came too slowly")
    return b"".join(got)


def _inline(address: str) -> bytes:
    head, _, body = address.partition(",")
    if not head.endswith(";base64"):
        raise Unusable("address", "a data: address that is not in base64")
    if len(body) > MOST_BYTES * 4 // 3 + 4:
        raise too_large(len(body) * 3 // 4)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable("unreadable picture", f"is no base64 ({first_line(error)})") from error


def _session(private: bool) -> Any:
    """This thread's connections; unless ``private``, to public hosts alone."""
    import requests

    from .public_hosts import PublicHosts

    kept = _local.__dict__.setdefault("sessions", {})
    if private not in kept:
        session: Any = requests.Session()
        session.headers["User-Agent"] = _AGENT
        session.auth = _no_credentials  # else those of ~/.netrc go out
        session.cookies.set_policy(_no_cookies())
        session.get_redirect_target = _no_target  # else the body of a redirection is read, however long it is
        if not private:
            for scheme in ("http://", "https://"):
                session.mount(scheme, PublicHosts())
        kept[private] = session
    return kept[private]


def _no_credentials(request: Any) -> Any:
    return request


def _no_target(answer: Any) -> None:
    return None


def _no_cookies() -> Any:
    from http.cookiejar import DefaultCookiePolicy

    return DefaultCookiePolicy(allowed_domains=[])


def _s3_client(timeout: float) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    if not hasattr(_local, "s3"):
        config = Config(connect_timeout=timeout, read_timeout=timeout, retries={"total_max_attempts": 1})
        _local.s3 = Session().client("s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
    return _local.s3


def place_of(picture: bytes | str) -> str:
    """Where a picture lies, as it may be written down; empty for one that is at hand."""
    if isinstance(picture, bytes) or picture.startswith("data:"):
        return ""
    return shown(picture)
