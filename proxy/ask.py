"""Questions of the command line to a running nearhit."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any, TypeVar
from urllib.parse import urlencode

from proxy.settings import Settings

_TIMEOUT_S = 10.0
_FORBIDDEN = 403
_JSON = "application/json"
_LINES = "application/x-ndjson"

T = TypeVar("T")


class AskError(Exception):
    """No useful answer came; the message says what to do."""


class Refused(AskError):
    """It said no, with this HTTP status."""

    def __init__(self, message: str, status: int, told: Mapping[str, Any]) -> None:
        """`message` is for people, `told` what came in JSON."""
        super().__init__(message)
        self.status = status
        self.told = told


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token elsewhere."""

    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        return None


# Whatever proxy the environment names is for other places than this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def ask(
    settings: Settings,
    url: str | None,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    query: Mapping[str, str] | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> dict[str, Any]:
    """GET one of nearhit's own routes, or POST a JSON body, with the token of the settings or the data directory.

    Another `method` may be given. `timeout_s` is the longest silence.

    Raises:
        Refused: it says no.
        AskError: nothing answers there, or it is no nearhit.
    """
    base, target = base_url(settings, url), _target(path, query)
    data = None if body is None else json.dumps(body).encode()
    return _with_token(
        settings, lambda token: _told(base, _request(base, target, token, data, _JSON, method), timeout_s)
    )


def send_lines(
    settings: Settings, url: str | None, path: str, lines: bytes, *, query: Mapping[str, str], timeout_s: float
) -> dict[str, Any]:
    """POST lines of JSON to one of nearhit's own routes; else as `ask`."""
    base, target = base_url(settings, url), _target(path, query)
    return _with_token(
        settings, lambda token: _told(base, _request(base, target, token, lines, _LINES, None), timeout_s)
    )


def opened(
    settings: Settings, url: str | None, path: str, *, query: Mapping[str, str], timeout_s: float
) -> HTTPResponse:
    """GET one of nearhit's own routes, to be read as it comes, and to be closed; else as `ask`."""
    base, target = base_url(settings, url), _target(path, query)
    return _with_token(settings, lambda token: _opened(base, _request(base, target, token, None, "", None), timeout_s))


def base_url(settings: Settings, url: str | None) -> str:
    """Where nearhit is: at `url`, else where the settings have it listen.

    Raises:
        AskError: `url` is none.
    """
    listen = settings.listen
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host)  # noqa: S104 - not for binding
    base = (url or f"http://{f'[{host}]' if ':' in host else host}:{listen.port}").rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise AskError(f"{base} is not a URL like http://127.0.0.1:8090")
    return base


def _target(path: str, query: Mapping[str, str] | None) -> str:
    try:
        return f"{path}?{urlencode(query)}" if query else path
    except UnicodeEncodeError:
        raise AskError("an argument is not valid UTF-8") from None


def _with_token(settings: Settings, send: Callable[[str], T]) -> T:
    if settings.admin.token:
        return send(settings.admin.token)
    local = _local_token(settings)
    try:
        return send(local)
    except Refused as refused:
        if not local or refused.status != _FORBIDDEN:
            raise
    # Another start has left its token there: this machine may be let in without one.
    return send("")


_Prepared = Callable[[], urllib.request.Request]


def _request(base: str, target: str, token: str, data: bytes | None, kind: str, method: str | None) -> _Prepared:
    headers = {"X-Nearhit-Admin": token} if token else {}
    if data is not None:
        headers["Content-Type"] = kind
    # What is wrong with a URL is told when it is used.
    return lambda: urllib.request.Request(base + target, data, headers, method=method)  # noqa: S310 - the scheme is known


def _told(base: str, prepared: _Prepared, timeout_s: float) -> dict[str, Any]:
    try:
        with _opened(base, prepared, timeout_s) as response:
            answer = json.load(response)
    except (OSError, ValueError, HTTPException) as error:
        raise _silent(base, error) from error
    if not isinstance(answer, dict) or "version" not in answer:
        raise AskError(f"what answers at {base} is no nearhit")
    return answer


def _opened(base: str, prepared: _Prepared, timeout_s: float) -> HTTPResponse:
    try:
        response: HTTPResponse = _opener.open(prepared(), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            told = _body(error)
            raise Refused(f"{base} refused: {_message(told, error.code)}", error.code, told) from error
    except (OSError, ValueError, HTTPException) as error:
        raise _silent(base, error) from error
    return response


def _silent(base: str, error: Exception) -> AskError:
    return AskError(f"no nearhit answers at {base} ({_reason(error)}); is it running, and on this port?")


def _local_token(settings: Settings) -> str:
    try:
        token = (settings.data / "admin.token").read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return token if token.isprintable() else ""


def _body(error: urllib.error.HTTPError) -> Mapping[str, Any]:
    try:
        told = json.load(error)
    except (OSError, ValueError, HTTPException):
        return {}
    return told if isinstance(told, dict) else {}


def _message(told: Mapping[str, Any], status: int) -> str:
    error = told.get("error")
    message = str(error.get("message", "")) if isinstance(error, dict) else ""
    return message if message and message.isprintable() else f"HTTP {status}"


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return ascii(text)[1:-1]
