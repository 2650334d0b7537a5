"""Broker URLs: checked where they are given, and shown without their secrets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from yarl import URL

_MAX_HEARTBEAT: Final = 3600
_SCHEMES: Final = {"amqp": 5672, "amqps": 5671}
_ADVICE: Final = "Write it as amqp://user:password@host:port/vhost"


def parse_urls(urls: str | Sequence[str]) -> tuple[URL, ...]:
    """Check one URL or several.

    Raises:
        ValueError: One of them is no AMQP URL. The sentence never shows a password.
        TypeError: They are not strings.
    """
    given: object = [urls] if isinstance(urls, str) else urls
    if not isinstance(given, Sequence) or not all(isinstance(url, str) for url in given):
        raise TypeError(f"a URL, or a list of URLs, is needed, not {type(urls).__name__}.")
    if not given:
        raise ValueError("the list of URLs is empty: give at least one.")
    return tuple(_parse(str(url)) for url in given)


def _parse(text: str) -> URL:
    # Nothing of what cannot be parsed is shown: it may hold a password in an unexpected place.
    try:
        parts = urlsplit(text)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
        url = URL(text)
        _check_at(parts)
        decoded = unquote(parts.path)
    except ValueError:
        raise ValueError(
            f"the broker's URL cannot be parsed. {_ADVICE}, with special characters of the "
            "password and the virtual host percent-encoded.",
        ) from None
    if scheme not in _SCHEMES:
        raise ValueError(f"the broker's URL has the scheme {scheme!r}. {_ADVICE}, or amqps://.")
    if not host:
        raise ValueError(f"the broker's URL has no host. {_ADVICE}.")
    if port == 0:
        raise ValueError(f"the broker's URL has port 0. {_ADVICE}.")
    segments = parts.path.lower().replace("%2e", ".").split("/")
    if {".", ".."} & set(segments) or "%2f" in decoded.lower():
        raise ValueError(
            "the broker's URL names a virtual host that would be taken for another one: one that "
            f"is, or has between slashes, a dot or two, or has %2F in its name. {_ADVICE}, with a "
            "virtual host of another name.",
        )
    if url.password == "":
        raise ValueError(f"the broker's URL has an empty password. {_ADVICE}.")
    heartbeat = url.query.get("heartbeat", "1")
    if not heartbeat.isdecimal() or not 1 <= int(heartbeat) <= _MAX_HEARTBEAT:
        raise ValueError(
            f"the broker's URL has heartbeat={heartbeat}: it must be from 1 to {_MAX_HEARTBEAT} "
            "seconds. Without heartbeats a dead peer is never noticed.",
        )
    return url if port else url.with_port(_SCHEMES[scheme])


def _check_at(parts: SplitResult) -> None:
    """Refuse a password with a slash, a question mark or a #: what follows is no host's."""
    if any("@" in part for part in (parts.path, parts.query, parts.fragment)):
        raise ValueError


def display(url: URL) -> str:
    """Show host, port and virtual host, and nothing of the user, the password and the query."""
    path = url.raw_path if url.raw_path != "/" else "/"
    return f"{url.scheme}://{url.host}:{url.port}{path}"
