"""Questions of the command line to a running nearhit."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from proxy.settings import Settings

_TIMEOUT_S = 10


class AskError(Exception):
    """No useful answer came; the message says what to do."""


class _Refused(AskError):
    """It said no."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token elsewhere."""

    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        return None


# Whatever proxy the environment names is for other places than this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def ask(settings: Settings, url: str | None, path: str, body: Any = None) -> dict[str, Any]:
    """GET one of nearhit's own routes, or POST a JSON body, with the token of the settings or the data directory.

    Raises:
        AskError: nothing answers there, or it refuses.
    """
    listen = settings.listen
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host)  # noqa: S104 - not for binding
    base = (url or f"http://{f'[{host}]' if ':' in host else host}:{listen.port}").rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise AskError(f"{base} is not a URL like http://127.0.0.1:8090")
    if settings.admin.token:
        return _send(base, path, settings.admin.token, body)
    local = _local_token(settings)
    try:
        return _send(base, path, local, body)
    except _Refused:
        if not local:
            raise
    # Another start has left its token there: this machine may be let in without one.
    return _send(base, path, "", body)


def _send(base: str, path: str, token: str, body: Any) -> dict[str, Any]:
    headers = {"X-Nearhit-Admin": token} if token else {}
    data = None if body is None else json.dumps(body).encode()
    if data is not None:
        headers["Content-Type"] = "application/json"
    try:
        request = urllib.request.Request(base + path, data, headers)  # noqa: S310 - the scheme was looked at
        with _opener.open(request, timeout=_TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            raise _Refused(f"{base} refused: {_message(error)}") from error
    except (OSError, ValueError, HTTPException) as error:
        raise AskError(f"no nearhit answers at {base} ({_reason(error)}); is it running, and on this port?") from error
    if not isinstance(answer, dict) or "version" not in answer:
        raise AskError(f"what answers at {base} is no nearhit")
    return answer


def _local_token(settings: Settings) -> str:
    try:
        token = (settings.data / "admin.token").read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return token if token.isprintable() else ""


def _message(error: urllib.error.HTTPError) -> str:
    try:
        message = str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError, HTTPException):
        return f"HTTP {error.code}"
    return message if message.isprintable() else f"HTTP {error.code}"


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return ascii(text)[1:-1]
