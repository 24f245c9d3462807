"""The exposition for Prometheus: names, labels, numbers, and nothing that people wrote."""

from __future__ import annotations

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from proxy.cache.policy import Bypass, Drop, Miss, Outcome
from proxy.web.metrics import Metrics
from storage.base import StorageBusy
from tests.conftest import Proxy, StartProxy
from tests.fake_model import FakeModel, chat_events, raw, reply, sse, streamed

LABELS = {
    "nearhit_requests_total": {"endpoint", "outcome"},
    "nearhit_hits_total": {"tier"},
    "nearhit_misses_total": {"reason"},
    "nearhit_bypass_total": {"reason"},
    "nearhit_stored_total": set(),
    "nearhit_not_stored_total": {"reason"},
    "nearhit_joined_total": set(),
    "nearhit_entries": set(),
    "nearhit_bytes": set(),
    "nearhit_enabled": set(),
    "nearhit_inflight": set(),
    "nearhit_storage_up": set(),
    "nearhit_saved_seconds_total": {"tier"},
    "nearhit_saved_tokens_total": {"kind"},
    "nearhit_lookup_seconds_count": {"tier"},
    "nearhit_upstream_seconds_count": set(),
    "nearhit_upstream_ttft_seconds_count": set(),
}
"""Every series that exists from the start."""


def parsed(exposition: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(exposition) for sample in family.samples]


async def scrape(proxy: Proxy) -> dict[tuple[str, frozenset[str]], float]:
    answer = await proxy.send("GET", "/metrics")
    assert answer.status == 200
    samples = parsed(answer.body.decode())
    return {(sample.name, frozenset(sample.labels.values())): sample.value for sample in samples}


def at(series: dict[tuple[str, frozenset[str]], float], name: str, *labels: str) -> float:
    return series[f"nearhit_{name}", frozenset(labels)]


async def test_the_exposition_is_what_prometheus_reads(proxy: Proxy) -> None:
    answer = await proxy.send("GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    assert {"process_cpu_seconds_total", "python_info"} <= {sample.name for sample in parsed(answer.body.decode())}


@pytest.mark.parametrize("name", sorted(LABELS))
def test_series_exist_from_the_start_with_their_labels(name: str) -> None:
    samples = [sample for sample in parsed(generate_latest(Metrics().registry).decode()) if sample.name == name]
    assert samples
    assert all(set(sample.labels) == LABELS[name] for sample in samples)


def test_every_reason_and_outcome_is_a_series_from_the_start() -> None:
    samples = parsed(generate_latest(Metrics().registry).decode())
    for name, label, expected in (
        ("nearhit_misses_total", "reason", Miss),
        ("nearhit_bypass_total", "reason", Bypass),
        ("nearhit_not_stored_total", "reason", Drop),
        ("nearhit_requests_total", "outcome", Outcome),
    ):
        assert {s.labels[label] for s in samples if s.name == name} == {member.value for member in expected}


def test_series_of_trouble_appear_with_it() -> None:
    metrics = Metrics()
    metrics.removed("bound", 3)
    metrics.storage_failed("write", StorageBusy("locked"))
    metrics.storage_failed("write", StorageBusy("locked"))
    assert metrics.value("nearhit_evicted_total", {"reason": "bound"}) == 3
    assert metrics.value("nearhit_storage_errors_total", {"op": "write"}) == 2


def test_trouble_with_storage_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    for op in ("write", "write", "get", "write"):
        metrics.storage_failed(op, StorageBusy("locked"))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "storage failed (write)",
        "storage failed (get)",
    ]


def test_two_applications_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.stored()
    assert (one.value("nearhit_stored_total"), other.value("nearhit_stored_total")) == (1, 0)


async def test_numbers_follow_what_was_done(proxy: Proxy, model: FakeModel) -> None:
    await proxy.chat("one")
    await proxy.settled()
    await proxy.chat("one")
    await proxy.chat("one", stream=True)
    await proxy.chat("two", headers={"Cache-Control": "no-store"})
    await proxy.post("/v1/completions", json={"prompt": "p", "temperature": 0})
    model.respond = raw(b"[]")
    await proxy.chat("three")
    await proxy.settled()
    series = await scrape(proxy)
    assert at(series, "requests_total", "chat", "HIT") == 2
    assert at(series, "requests_total", "chat", "MISS") == 2
    assert at(series, "requests_total", "chat", "BYPASS") == 1
    assert at(series, "requests_total", "completions", "MISS") == 1
    assert at(series, "hits_total", "exact") == 2
    assert at(series, "misses_total", "absent") == 3
    assert at(series, "bypass_total", "no-store") == 1
    assert at(series, "not_stored_total", "not-understood") >= 1
    assert at(series, "saved_tokens_total", "prompt") == 18
    assert at(series, "saved_tokens_total", "completion") == 8
    assert at(series, "upstream_seconds_count") == 3
    assert at(series, "enabled") == 1
    assert at(series, "inflight") == 0
    assert at(series, "upstream_up", "default") == 1


async def test_every_hit_counts_once_in_both_counters(proxy: Proxy) -> None:
    await proxy.chat("one")
    await proxy.settled()
    for _ in range(5):
        assert (await proxy.chat("one")).outcome == "HIT"
    series = await scrape(proxy)
    assert at(series, "hits_total", "exact") == at(series, "requests_total", "chat", "HIT") == 5


async def test_a_stream_tells_the_time_to_its_first_token(proxy: Proxy) -> None:
    await proxy.chat(stream=True)
    await proxy.settled()
    assert at(await scrape(proxy), "upstream_ttft_seconds_count") == 1


async def test_the_gauges_tell_of_an_absent_upstream_and_a_switched_off_cache(start: StartProxy) -> None:
    proxy = await start(url="http://127.0.0.1:9", cache__mode="off")
    series = await scrape(proxy)
    assert at(series, "upstream_up", "default") == 0
    assert at(series, "enabled") == 0


async def test_broken_streams_count_as_not_stored(proxy: Proxy, model: FakeModel) -> None:
    model.respond = streamed(sse(*chat_events("Hel", "lo")[:-1], done=False), hang_up=True)
    with pytest.raises(Exception, match=r".+"):
        await proxy.chat(stream=True)
    await proxy.settled()
    series = await scrape(proxy)
    assert at(series, "stored_total") == 0
    assert sum(value for (name, _), value in series.items() if name == "nearhit_not_stored_total") == 1


SECRETS = ("sk-client-key", "sk-upstream-key", "opensesame", "planted-prompt", "planted-answer", "planted-query")


async def test_nothing_that_people_wrote_is_shown(start: StartProxy, model: FakeModel) -> None:
    model.respond = reply("planted-answer", " planted-answer")
    proxy = await start(upstream__api_key="sk-upstream-key", admin__token="opensesame")
    headers = {"Authorization": "Bearer sk-client-key", "Cookie": "a=sk-client-key", "X-Api-Key": "sk-client-key"}
    for _ in range(2):
        await proxy.chat("planted-prompt", headers=headers, model="planted-prompt", user="planted-prompt")
        await proxy.settled()
    await proxy.send("GET", "/planted-prompt?key=planted-query", headers=headers)
    await proxy.send("POST", "/v1/chat/completions?key=planted-query", data=b"planted-prompt", headers=headers)
    await proxy.send("PLANTED", "/planted-prompt", headers=headers)
    exposition = (await proxy.send("GET", "/metrics")).body.decode()
    assert not [secret for secret in (*SECRETS, proxy.services.local_token) if secret in exposition]


async def test_the_number_of_series_does_not_grow_with_what_clients_send(proxy: Proxy) -> None:
    await proxy.chat("warm up", model="m")
    await proxy.settled()
    before = len(await scrape(proxy))
    for number in range(20):
        await proxy.chat(f"q{number}", model=f"model-{number}", headers={"Authorization": f"Bearer {number}"})
        await proxy.send("GET", f"/v1/path-{number}")
    await proxy.settled()
    assert len(await scrape(proxy)) == before
