"""Addresses of tiers: `scheme://location?name=value&…`. Every parameter must be known, every value must fit."""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.options import Options

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_OPTIONS = {field.name: {"float | None": float, "float": float, "int": int, "str": str}[str(field.type)]
            for field in fields(Options)}  # fmt: skip


class Address:
    """One URL, taken apart. Whoever reads a parameter takes it; `finish` refuses what nobody took.

    Raises:
        ConfigError: it is no URL.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if not parts.scheme or "://" not in url:
            raise ConfigError("url", url, "must be scheme://location, e.g. file:///var/cache/kv/")
        self.url = url
        self.scheme = parts.scheme
        self.location = unquote(parts.netloc + parts.path)
        self._given = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._known: set[str] = set()

    @property
    def shown(self) -> str:
        """For messages: without user, password and parameters."""
        return f"{self.scheme}://{self.location.rpartition('@')[2]}"

    def text(self, name: str, default: str = "") -> str:
        """The parameter as it stands."""
        self._known.add(name)
        return self._given.pop(name, default)

    def number(self, name: str, default: float = 0.0) -> float:
        """The parameter as a number. Raises ConfigError if it is none."""
        given = self.text(name, repr(default))
        try:
            return float(given)
        except ValueError:
            raise self.refusal(name, given, "must be a number") from None

    def flag(self, name: str, default: bool = False) -> bool:
        """The parameter as yes or no. Raises ConfigError if it is neither."""
        given = self.text(name, str(default)).lower()
        if given not in _TRUE | _FALSE:
            raise self.refusal(name, given, "must be 1 or 0")
        return given in _TRUE

    def options(self, defaults: dict[str, Any]) -> Options:
        """`Options` from `defaults` and, above them, from the parameters. Raises ConfigError."""
        values = dict(defaults)
        for name, kind in _OPTIONS.items():
            self._known.add(name)
            if name in self._given:
                given = self._given.pop(name)
                try:
                    values[name] = kind(given)
                except ValueError:
                    raise self.refusal(name, given, f"must be a number ({kind.__name__})") from None
        return Options(**values)

    def finish(self) -> None:
        """All parameters must have been taken. Raises ConfigError that lists the known ones."""
        for name, value in self._given.items():
            raise self.refusal(name, value, f"is not a parameter of this tier; known: {', '.join(sorted(self._known))}")

    def refusal(self, name: str, value: object, why: str) -> ConfigError:
        """An error about one parameter."""
        return ConfigError(f"{self.shown} {name}", value, why)
