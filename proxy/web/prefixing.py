"""The prefix cache of one upstream, put together from settings, the queue, the files and what is known to run."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from proxy.settings import Seed, Settings, UpstreamSettings
from proxy.upstream.adapter import Probe
from proxy.upstream.client import Upstream
from proxy.upstream.identity import Tracker
from proxy.upstream.lane import Lane
from proxy.upstream.prefix import lead_of_prompt
from proxy.upstream.prefix_cache import PrefixCache, running_prefixes
from proxy.upstream.prefix_files import PrefixFiles
from proxy.upstream.prefix_record import ServerNames
from proxy.upstream.prefix_shelf import Keeping
from proxy.upstream.prefix_terms import Configured, Observer, PrefixTerms, Running, Surroundings
from proxy.upstream.routing import DEFAULT, Routing, Shown
from proxy.web.private_files import PrivateFiles

log = logging.getLogger("nearhit.prefixes")

_LONGEST_SEED = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """The upstream that a prefix cache is for. `credential` is what nearhit itself shows there."""

    name: str
    settings: UpstreamSettings
    upstream: Upstream
    tracker: Tracker
    lane: Lane
    routing: Routing
    private: PrivateFiles
    credential: dict[str, str]

    def running(self) -> Running | None:
        """What is confirmed to run there, with all its names."""
        identity = self.tracker.current
        if not identity.confirmed or identity.fingerprint is None:
            return None
        shown = Shown(identity.models, identity.files)
        only = identity.models[0] if len(identity.models) == 1 else ""
        model = identity.loaded or only
        names = {name for name in self.routing.names if self.routing.names[name].model == model}
        friendly = self.routing.friendly(self.name, model, shown) if model else self.name
        run = f"{identity.epoch} {identity.instance}"
        return Running(identity.fingerprint, friendly, frozenset({model, *names}), run, identity.instance)


async def open_prefixes(
    stack: AsyncExitStack, settings: Settings, place: Place, observer: Observer
) -> tuple[PrefixCache | None, tuple[str, ...]]:
    """The prefix cache of an upstream, for the life of the stack, None where there is to be none; and what is wrong."""
    chosen = settings.prefixes
    if chosen.mode == "off":
        return None, ()
    configured, problems = await asyncio.to_thread(read_seeds, settings, place.name)
    for problem in problems:
        log.error("%s; it is not seeded", problem)
    terms = PrefixTerms(
        learn_after=chosen.learn_after,
        seed_idle_s=chosen.seed_idle_s,
        seed_timeout_s=chosen.seed_timeout_s,
        ready_timeout_s=chosen.ready_timeout_s,
        keeps_readable=settings.cache.store_words == "full" and settings.cache.persist == "on",
    )
    surroundings = Surroundings(
        prefixing=lambda: place.tracker.adapter.prefixing,
        running=place.running,
        quiet=place.lane,
        probe=Probe(place.upstream, place.credential, chosen.seed_timeout_s),
        keeping=await asyncio.to_thread(_keeping, settings, place),
        observer=observer,
    )
    cache = await stack.enter_async_context(running_prefixes(PrefixCache(surroundings, terms, configured)))
    return cache, tuple(problems)


def _keeping(settings: Settings, place: Place) -> Keeping:
    names = ServerNames(place.private.secret)
    slot_dir = Path(place.settings.slot_dir).expanduser() if place.settings.slot_dir else None
    if slot_dir is not None and not slot_dir.is_dir():
        log.error(
            "upstream.slot_dir: %s is no folder; prefix caches are kept under a few names on the server", slot_dir
        )
        slot_dir = None
    if not place.private.lasting:
        # Under a secret that nobody knows again, nothing would be found or deleted again.
        slot_dir = None
    chosen = settings.prefixes
    folder = settings.data / "prefixes"
    return Keeping(
        shelf=PrefixFiles(folder, slot_dir, chosen.max_bytes, names=names, upstream=place.upstream.origin),
        names=names,
        origin=place.upstream.origin,
        sees_files=slot_dir is not None,
        max_bytes=chosen.max_bytes,
        ring=chosen.ring if place.private.lasting else 0,
    )


def read_seeds(settings: Settings, upstream: str) -> tuple[list[Configured], list[str]]:
    """The configured prefixes of an upstream, and what is wrong with those that cannot be read. Blocking."""
    configured: list[Configured] = []
    problems: list[str] = []
    for seed in settings.prefixes.seeds:
        if (seed.upstream or DEFAULT) == upstream:
            read = _read_seed(seed)
            if isinstance(read, str):
                problems.append(f"prefixes.seeds: {seed.name}: {seed.file} {read}")
            else:
                configured.append(read)
    return configured, problems


def _read_seed(seed: Seed) -> Configured | str:
    try:
        with Path(seed.file).expanduser().open("rb") as file:
            raw = file.read(_LONGEST_SEED + 1)
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return "is not UTF-8"
    except (OSError, RuntimeError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if not text:
        return "is empty"
    if len(raw) > _LONGEST_SEED:
        return f"is longer than {_LONGEST_SEED} bytes"
    return Configured(seed.name, lead_of_prompt(text), seed.model)
