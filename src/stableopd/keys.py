"""Keys from the environment, and URLs that hold none."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from stableopd.errors import ConfigError


def key_from(variable: str, section: str) -> str:
    """The key in an environment variable, which is never shown. Raises: ConfigError when it holds no key."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"{section}.api_key_env names the environment variable {variable}, which is not set or empty; export the "
            "server's key in it"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the environment variable {variable} holds characters that no key can have")
    return key


def plain_url(url: str | None) -> str | None:
    """A server's URL as it is. It may be logged and shown, so that it must not carry a secret.

    Raises: ValueError for anything but http(s)://host[:port][/path].
    """
    if url is None:
        return None
    if not url.startswith(("http://", "https://")):
        raise ValueError("server_url must begin with http:// or https://")
    try:
        parts = urlsplit(url)
        port_is_wrong = parts.port == 0
    except ValueError:
        port_is_wrong = True
    if port_is_wrong or not parts.hostname or not url.isprintable():
        raise ValueError("server_url must be a host and, where need be, a port and a path: http://10.0.0.5:8000")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "server_url must hold neither a user and password nor a query: it is shown in messages and kept in "
            "config.yaml. Put the key into an environment variable and name that in api_key_env"
        )
    return url
