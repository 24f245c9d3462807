"""Where an upstream is. Pure, and light enough for every command to use."""

from __future__ import annotations

from yarl import URL


def origin_of(url: str) -> str:
    """The upstream's URL without a trailing slash or `/v1`, which clients bring themselves.

    Raises:
        ValueError: it is not an http(s) URL, or carries a query, fragment or credentials.
    """
    parsed = URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("expected a URL like http://127.0.0.1:8080")
    if parsed.query_string or parsed.fragment:
        raise ValueError("expected a URL without query and fragment")
    if parsed.user or parsed.password:
        raise ValueError("expected a URL without credentials; use upstream.api_key")
    path = parsed.raw_path.rstrip("/").removesuffix("/v1").rstrip("/")
    return str(parsed.origin()) + path
