"""Refusals that mean "I work on something else", and the waiting between attempts."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.upstream.busy import LONGEST_S, MAX_BODY, SHORTEST_S, Backoff, asked_delay, delays, says_busy

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)

VENDOR_DEMO = {
    "error": {
        "message": "RKLLM_Server is busy! Maybe you can try again later.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
}
GATEKEEPER = {"error": {"message": "Timed out in the queue", "type": "service_unavailable", "code": 503}}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


@pytest.mark.parametrize(
    "body",
    [
        VENDOR_DEMO,
        GATEKEEPER,
        {"error": "server busy, please try again.  maximum pending requests exceeded"},
        {"error": "Model is overloaded", "error_type": "overloaded"},
        {"error": {"type": "overloaded_error", "message": "Overloaded"}},
        {"detail": "Server is busy"},
    ],
)
def test_busy(body: Any) -> None:
    assert says_busy(503, json.dumps(body).encode())
    assert not says_busy(500, json.dumps(body).encode())
    assert not says_busy(200, json.dumps(body).encode())


@pytest.mark.parametrize(
    "body",
    [
        LOADING,
        {"error": {"message": "Loading model", "type": "service_unavailable", "code": 503}},
        {"error": {"message": "busy loading the model", "type": "server_error"}},
        {"detail": "No model loaded"},
        {"detail": "No models available. Please place .rkllm files in the models directory."},
        {"error": {"message": "boom", "type": "server_error"}},
        {"error": {"message": ["busy"], "type": ["service_unavailable"]}},
        {"error": None},
        {"message": "busy"},
        ["busy"],
        "busy",
        None,
    ],
)
def test_not_busy(body: Any) -> None:
    assert not says_busy(503, json.dumps(body).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"busy",
        b"<html>busy</html>",
        b"\xff\xfe\x00",
        b"[" * 20_000,
        b'{"error": {"code": ' + b"9" * 5000 + b', "message": "busy"}}',
        json.dumps(VENDOR_DEMO).encode() + b" " * MAX_BODY,
    ],
)
def test_what_cannot_be_read_is_not_busy(body: bytes) -> None:
    assert not says_busy(503, body)


@settings(deadline=None)
@given(st.floats(0, 300), st.integers())
def test_delays_grow_within_bounds_and_stay_within_the_limit(limit_s: float, seed: int) -> None:
    found = list(delays(limit_s, random.Random(seed)))
    assert sum(found) <= limit_s + 1e-9
    assert limit_s - sum(found) <= SHORTEST_S
    assert all(SHORTEST_S <= delay <= LONGEST_S for delay in found)
    for number, delay in enumerate(found[:-1]):
        assert min(SHORTEST_S * 2**number, LONGEST_S / 2) <= delay <= min(SHORTEST_S * 2 ** (number + 1), LONGEST_S)


def test_two_callers_do_not_come_back_together() -> None:
    assert list(delays(60, random.Random(1))) != list(delays(60, random.Random(2)))


def test_what_the_server_asks_for_is_waited() -> None:
    backoff = Backoff(20, random.Random(1))
    assert backoff.next_delay(12.0) == 12.0
    assert backoff.next_delay(12.0) is None, "more than is left"
    assert (backoff.next_delay(0.0) or 0) >= SHORTEST_S, "at once is too soon"
    assert Backoff(20, random.Random(1)).next_delay(float("nan")) is None


@pytest.mark.parametrize(
    ("field", "seconds"),
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        (format_datetime(NOW + timedelta(seconds=30), usegmt=True), 30.0),
        (format_datetime(NOW - timedelta(days=30), usegmt=True), 0.0),
        ("Sun, 22 Nov 2026 12:00:09 -0000", 9.0),
    ],
)
def test_reading_the_field(field: str, seconds: float) -> None:
    assert asked_delay(field, NOW) == seconds


@pytest.mark.parametrize(
    "field", [None, "", "soon", "-1", "9" * 5000, "1e9", "٣", "Sun, 99 Foo 2026", "Mon, 1 Jan 99999 0:0 GMT"]
)
def test_a_field_that_says_nothing(field: str | None) -> None:
    assert asked_delay(field, NOW) is None


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_field(field: str) -> None:
    asked = asked_delay(field, NOW)
    assert asked is None or asked >= 0.0
