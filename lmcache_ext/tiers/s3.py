"""Objects in a bucket: `s3://bucket/prefix?endpoint=http://host:9000`.

    <prefix>/v1/<first byte of the key, hex>/<key, hex>     an object: header and parts, one behind the other

Through obstore (Rust's object_store): requests, TLS and waiting happen in its threads, without the interpreter's lock.
Bytes to write are sent from the parts themselves; bytes that are read take one copy. A PUT is visible whole or not at
all; ETags are not looked at, because header and sum prove every byte.

Credentials come from the URL's user and password (never shown), the environment (AWS_ACCESS_KEY_ID, …), the profile's
keys in `~/.aws/credentials`, or the platform (web identity, container, instance), in this order.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.base import KEY_BYTES, Parts
from lmcache_ext.tiers.header import BLOCK
from lmcache_ext.tiers.medium import MEDIA, Found, Medium
from lmcache_ext.tiers.urls import Address

_STEP = 256 << 10  # bytes: reads arrive in steps of at least this many; 64 KiB to 1 MiB measured alike
_PAGE = 1000  # objects in one answer of a listing, S3's limit
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_KEYS = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
_TOKEN = {"session_token": "aws_session_token"}


@MEDIA.register("s3")
class S3(Medium):
    """A bucket, or what lies in it under a prefix.

    Args:
        bucket: its name.
        prefix: in front of all names; may be empty.
        config: obstore's settings (endpoint, region, …).
        timeout: seconds for one request, its body included. Requests that fail sooner are repeated until then.
        connect_timeout: seconds to connect.
        retries: repetitions at most.
        shared: look for objects that other engines wrote. Without a `capacity_gb` the bucket's own rules bound it.
    """

    lasting = True

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        config: Mapping[str, Any] | None = None,
        timeout: float = 10.0,
        connect_timeout: float = 2.0,
        retries: int = 2,
        shared: bool = False,
    ) -> None:
        self.shared = self.bounded = shared
        self._bucket = bucket
        self._root = "/".join([*filter(None, prefix.split("/")), "v1"])
        self._trial = f"{self._root}/probe"
        self._config = dict(config or {})
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._retries = retries
        self._store: Any = None

    @classmethod
    def from_address(cls, address: Address) -> S3:
        """`s3://[key:secret@]bucket/prefix?endpoint=&region=&path_style=&timeout=10&connect_timeout=2&retries=2&shared=0`

        `path_style` (bucket in the path, not in the host's name) is on where there is an endpoint, unless it says no.
        """
        parts = urlsplit(address.url)
        user, _, bucket = parts.netloc.rpartition("@")
        if not bucket:
            raise ConfigError("url", address.shown, "must name a bucket: s3://bucket/prefix")
        named = (os.environ.get(name, "") for name in _ENDPOINTS)
        endpoint = address.text("endpoint") or next(filter(None, named), "")
        if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
            raise address.refusal("endpoint", endpoint, "must be http://host:port or https://host:port")
        given = {"endpoint": endpoint, "region": address.text("region")}
        config: dict[str, Any] = {name: value for name, value in given.items() if value}
        config["virtual_hosted_style_request"] = not address.flag("path_style", bool(endpoint))
        if user:
            key, _, secret = user.partition(":")
            config |= {"access_key_id": unquote(key), "secret_access_key": unquote(secret)}
        timeout, connect, retries = (
            address.number(*each) for each in (("timeout", 10.0), ("connect_timeout", 2.0), ("retries", 2))
        )
        if not (timeout > 0 and connect > 0 and retries >= 0):
            raise address.refusal("timeout", timeout, "timeouts must be greater than 0, retries not less")
        return cls(bucket, unquote(parts.path), config, timeout, connect, int(retries), address.flag("shared"))

    def open(self) -> None:
        """Asks nothing of the server: it may come up later."""
        try:
            from obstore.store import S3Store
        except ImportError:
            raise ConfigError("url", f"s3://{self._bucket}", "needs obstore: pip install obstore") from None
        make: Any = S3Store  # its settings are typed one by one
        config = {"unsigned_payload": True, "disable_bulk_delete": True, **_profile(os.environ), **self._config}
        client = {
            "allow_http": str(config.get("endpoint", "")).startswith("http:"),
            "timeout": timedelta(seconds=self._timeout),
            "connect_timeout": timedelta(seconds=self._connect_timeout),
        }
        retry = {"max_retries": self._retries, "retry_timeout": timedelta(seconds=self._timeout)}
        try:
            self._store = make(self._bucket, config=config, client_options=client, retry_config=retry)
        except Exception as error:
            raise ConfigError("url", f"s3://{self._bucket}", f"can't be set up: {error}") from None

    @property
    def client(self) -> Any:
        """obstore's store for the bucket, once it is open."""
        return self._store

    @property
    def root(self) -> str:
        """What objects' names begin with."""
        return self._root

    def name(self, key: bytes) -> str:
        """Where the object of `key` lies in the bucket."""
        digits = key.hex()
        return f"{self._root}/{digits[:2]}/{digits}"

    def write(self, key: bytes, header: memoryview, parts: Parts) -> None:
        filled = [view for view in (header, *parts) if view.nbytes]
        with _told():
            self._store.put(self.name(key), iter(filled), use_multipart=False)

    def read(self, key: bytes, header: memoryview, parts: Parts) -> int:
        with _told():
            found = self._store.get(self.name(key))
            size = int(found.meta["size"])
            whole = size == header.nbytes + sum(part.nbytes for part in parts)
            _fill([header, *parts] if whole else [header], found.stream(min_chunk_size=_STEP))
        return size

    def size(self, key: bytes) -> int | None:
        try:
            with _told():
                return int(self._store.head(self.name(key))["size"])
        except FileNotFoundError:
            return None

    def remove(self, key: bytes) -> None:
        with contextlib.suppress(FileNotFoundError), _told():
            self._store.delete(self.name(key))

    def scan(self, sweep: bool, faults: list[str]) -> Iterator[Found]:
        """One request for 1000 objects."""
        for each in self._listed():
            path, size = each["path"], int(each["size"])
            key = _key_of(path)
            if path == self._trial:
                continue  # of a process that ended within its probe
            if key is None or path != self.name(key):
                faults.append(f"{path} is not ours")
            elif size < BLOCK:
                faults.append(f"{path} is cut off within its header")
                if sweep:
                    self.remove(key)
            else:
                yield Found(key, size, each["last_modified"].timestamp())

    def _listed(self, below: str = "") -> Iterator[Any]:
        with _told():
            for page in self._store.list(f"{self._root}/{below}", chunk_size=_PAGE):
                yield from page

    def probe(self, write: bool) -> None:
        """A small object, written and removed, or the first page of a listing."""
        if write:
            with _told():
                self._store.put(self._trial, b"probe", use_multipart=False)
                self._store.delete(self._trial)
        else:
            next(self._listed("00/"), None)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn obstore's errors into short OSErrors: the whole text may name the access key, and fills a page."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
            raise FileNotFoundError(_short(str(error))) from None
        raise OSError(_short(str(error))) from None
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {_short(str(error))}") from None


def _short(text: str) -> str:
    """What the server said, else the last of the causes."""
    said = re.search(r"<Code>([^<]*)</Code>", text)
    text = text.partition("\n")[0]
    status = re.search(r"status code: (\d+ [A-Za-z ]*)", text)
    if said or status:
        return " ".join(each[1].strip() for each in (status, said) if each)
    return text.rpartition(" - ")[2][:200]


def _fill(views: Iterable[memoryview], steps: Iterator[Any]) -> None:
    """Fill `views` from a stream of buffers. Raises OSError if it ends too soon; what is behind is not fetched."""
    step = memoryview(b"")
    for view in views:
        at = 0
        while at < view.nbytes:
            if not step.nbytes:
                step = memoryview(next(steps, b""))
                if not step.nbytes:
                    raise OSError(f"the body ended {view.nbytes - at} bytes too soon")
            some = step[: view.nbytes - at]
            view[at : at + some.nbytes] = some
            at += some.nbytes
            step = step[some.nbytes :]


def _key_of(path: str) -> bytes | None:
    name = path.rpartition("/")[2]
    try:
        return bytes.fromhex(name) if len(name) == 2 * KEY_BYTES else None
    except ValueError:
        return None


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """Keys of the AWS profile that is chosen, for lack of keys in the environment. Only keys: no SSO, no roles."""
    if "AWS_ACCESS_KEY_ID" in environment:
        return {}
    file = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    parser = configparser.RawConfigParser()
    try:
        parser.read(file)
    except (configparser.Error, OSError) as error:
        raise ConfigError("AWS_SHARED_CREDENTIALS_FILE", file, f"can't be read: {type(error).__name__}") from None
    section = environment.get("AWS_PROFILE", "default")
    if not parser.has_section(section) or not all(parser.has_option(section, name) for name in _KEYS.values()):
        return {}
    return {
        name: parser.get(section, there)
        for name, there in (_KEYS | _TOKEN).items()
        if parser.has_option(section, there)
    }
