"""Questions of the command line to a running nearhit."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from proxy.config import Settings

_TIMEOUT_S = 10


class AskError(Exception):
    """No useful answer came; the message says what to do."""


def ask(settings: Settings, url: str | None, path: str) -> Any:
    """GET one of nearhit's own routes, with the token that the settings or the data directory hold.

    Raises:
        AskError: nothing answers there, or it refuses.
    """
    listen = settings.listen
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(listen.host, listen.host)  # noqa: S104 - not for binding
    base = (url or f"http://{host}:{listen.port}").rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise AskError(f"{base} is not a URL like http://127.0.0.1:8090")
    token = settings.admin.token or _local_token(settings)
    headers = {"X-Nearhit-Admin": token} if token else {}
    request = urllib.request.Request(base + path, headers=headers)  # noqa: S310 - checked above
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise AskError(f"{base} refused: {_message(error)}") from error
    except (OSError, ValueError) as error:
        raise AskError(f"no nearhit answers at {base} ({error}); is it running, and on this port?") from error


def _local_token(settings: Settings) -> str:
    try:
        return (settings.data / "admin.token").read_text(encoding="ascii")
    except OSError:
        return ""


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
