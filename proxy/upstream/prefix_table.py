"""What is wanted, seeded and known of the leads on one fingerprint, and what is to be done next. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from proxy.upstream.effect import EFFECTIVE, INEFFECTIVE, UNPROVED, helped, judged, reused
from proxy.upstream.prefix import Evidence, Hitch, Kept, Lead, Readied, Ready, Seeded, Style

_REFUSALS = 2
"""Refusals after which a lead, or its file, is left alone: one more try than the first."""
_PROOFS = 3
"""Attempts to measure an effect, after which it is taken for none."""
_SLOW_RESTORES = 2
_UNNOTICED_S = 0.1
"""What a restore may take whatever computing takes: too little to tell one from the other."""
_TIMED_OUT_S = 2.5
"""A restore that came to nothing and took so long did not only wait for its turn."""
_MOST_PAUSE_S = 600.0
_PATIENTLY = 6.0
"""How much longer than a busy server one is left in peace that refused: it is asked only once more."""
_CHARS_A_TOKEN = 4
"""For prefixes whose tokens nobody told; of many languages, more."""


class Source(StrEnum):
    """Why a prefix is wanted; those that somebody asked for come first."""

    CONFIG = "config"
    API = "api"
    LEARNED = "learned"


class State(StrEnum):
    """How far a prefix is."""

    SEEDED = "seeded"
    """The server can restore it."""
    WARM = "warm"
    """It was computed, and lasts for as long as the server does not need the room."""
    WANTED = "wanted"
    SEEDING = "seeding"
    INEFFECTIVE = "ineffective"
    """It would not help."""
    FAILED = "failed"


class Aim(StrEnum):
    """What is best done for a lead."""

    KEPT = "kept"
    """Have the server keep it."""
    WARM = "warm"
    NOTHING = "nothing"


class Work(StrEnum):
    """What the server is asked to do."""

    SEED = "seed"
    PROVE = "prove"


_REASONS = {
    Hitch.TOO_SHORT: "it is too short to be worth the trouble",
    Hitch.UNSUPPORTED: "this server cannot do it",
    Hitch.REFUSED: "the server refused to compute it",
    Hitch.BUSY: "the server was busy",
    Hitch.UNREACHABLE: "the server did not answer",
}
NO_RESTORE = "restoring its file does not help this model"
NO_EFFECT = "this model computes it again all the same"
DORMANT = "nothing has asked for it since before the server was restarted"
UNMEASURED_YET = "whether it helps is measured first"
UNMEASURED = "it could not be measured whether it helps"
SLOW = "restoring it takes longer than computing it"
IN_DOUBT = "the server was restarted meanwhile, or may have been"
NOT_RELEASED = "the disk refused to forget what was kept under its name"
NOT_KEPT = "the server computed it, and did not save it"
PRIVATE = "prompts are to be stored as digests only, and the server would keep its words"
_ORDER = tuple(Source)


@dataclass(eq=False, slots=True)
class Entry:
    """One lead.

    `file` is where the server keeps it, `size` in bytes. `stopped` says why it is left alone for good, `delayed` why it
    is not done yet, and `not_before` when it may be tried again (seconds of the caller's clock). `refusals` counts how
    often the server refused its file, `refused` how often to compute it, `attempts` those in a row without success.
    `warm` since the table's moment `warmed_at`, when there had been `calls_when_warmed` calls; `dormant`: nobody called
    since then, and the server was restarted. `proved`: its effect was measured in this run of the server. `on_trial`:
    the call under way came right after the warm-up, so that nothing else is to blame if it reuses nothing. `seconds` is
    what computing it took, `slow` counts restores in a row that took longer; `restored`: some call had it restored.
    `called_at` is when a call last began with it (seconds of the caller's clock).
    """

    lead: Lead
    name: str
    model: str
    source: Source
    file: str = ""
    tokens: int = 0
    size: int = 0
    warm: bool = False
    warmed_at: int = -1
    calls_when_warmed: int = -1
    dormant: bool = False
    proved: bool = False
    on_trial: bool = False
    seeding: bool = False
    stopped: str = ""
    delayed: str = ""
    not_before: float = 0.0
    attempts: int = 0
    refusals: int = 0
    refused: int = 0
    calls: int = 0
    restores: int = 0
    seconds: float = 0.0
    slow: int = 0
    restored: bool = False
    called_at: float = 0.0
    tokens_reused: int = 0

    @property
    def likely_tokens(self) -> int:
        """The prefix's tokens, or about as many as its text should have."""
        return self.tokens or self.lead.chars // _CHARS_A_TOKEN

    def postpone(self, why: str, now: float, pause_s: float) -> None:
        """Not now: each time in a row, the pause is twice as long."""
        self.attempts += 1
        self.delayed = why
        self.not_before = now + min(pause_s * 2.0 ** min(self.attempts - 1, 30), _MOST_PAUSE_S)

    def succeeded(self) -> None:
        """Nothing is in the way any more."""
        self.delayed, self.not_before, self.attempts, self.refused = "", 0.0, 0, 0

    def drop_file(self) -> str:
        """It is not kept any more; where it was."""
        file, self.file, self.size, self.proved = self.file, "", 0, False
        return file


@dataclass(frozen=True, slots=True)
class Job:
    """Something to ask the server for."""

    work: Work
    entry: Entry


class Table:
    """The leads on one fingerprint."""

    def __init__(self, fingerprint: bytes, *, keeps_files: bool, keeps_learned: bool, retry_s: float) -> None:
        """`keeps_files`: the server may save files; `keeps_learned`: also of what was learned from calls.

        `retry_s` is the first pause of many.
        """
        self.fingerprint = fingerprint
        self.model: str | None = None
        """Its friendly name, None: not known yet."""
        self.entries: dict[bytes, Entry] = {}
        self.kept = UNPROVED
        self.warmed = UNPROVED
        self._keeps_files = keeps_files
        self._keeps_learned = keeps_learned
        self._retry_s = retry_s
        self._happened = 0
        self._silent = False
        self._tells = False
        self._unmeasured = False

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    @property
    def keeping_helps(self) -> bool | None:
        """What was found out about having prefixes kept, so that it holds for later runs of nearhit, too."""
        return None if self._unmeasured else self.kept.helps

    def aim(self, entry: Entry, style: Style) -> Aim:
        """What is best done for a lead on a server of this style."""
        private = entry.source is Source.LEARNED and not self._keeps_learned
        if style is Style.NAMED:
            return Aim.NOTHING if private or self.kept.helps is False else Aim.KEPT
        if style is Style.FILE and self._keeps_files and not private and self.kept.helps is not False:
            return Aim.KEPT
        return Aim.NOTHING if style is Style.NONE or self.warmed.helps is False else Aim.WARM

    def usable(self, entry: Entry | None, style: Style, instance: str = "") -> Kept | None:
        """What may be restored for a call by this run; where replies do not tell, it must have been measured before."""
        if entry is None or not entry.file or entry.stopped or self.aim(entry, style) is not Aim.KEPT:
            return None
        return Kept(entry.file, entry.tokens, instance) if entry.proved or style is Style.FILE else None

    def todo(self, entry: Entry, style: Style) -> Work | None:
        """What is left to do for a lead."""
        if entry.stopped or entry.seeding:
            return None
        aim = self.aim(entry, style)
        if aim is Aim.KEPT and not entry.file:
            # Where nothing tells whether it helps, one is measured before more are made.
            return None if style is Style.NAMED and self._measuring() else Work.SEED
        if aim is Aim.KEPT and style is Style.NAMED:
            return None if entry.proved else Work.PROVE
        if aim is Aim.WARM and not entry.warm:
            return None if entry.dormant else Work.SEED
        unknown = (self.kept if aim is Aim.KEPT else self.warmed).helps is None
        return Work.PROVE if aim is not Aim.NOTHING and unknown and self._silent and not self._tells else None

    def next_job(self, style: Style, now: float) -> Job | None:
        """What is most worth doing now: what somebody asked for first, then what most calls begin with."""
        ready = [(entry, work) for entry in self if entry.not_before <= now and (work := self.todo(entry, style))]
        if not ready:
            return None
        entry, work = min(ready, key=lambda one: (one[1] is Work.SEED, _ORDER.index(one[0].source), -one[0].calls))
        return Job(work, entry)

    def next_at(self, style: Style) -> float | None:
        """When there is something to do; None where nothing is left."""
        return min((entry.not_before for entry in self if self.todo(entry, style)), default=None)

    def called(self, entry: Entry | None) -> None:
        """A call comes, with this lead."""
        self._happened += 1
        if entry is not None:
            entry.calls += 1
            entry.dormant = False
            entry.on_trial = entry.warm and entry.warmed_at == self._happened - 1

    def answered(self, entry: Entry, ready: Ready, evidence: Evidence, style: Style) -> int:
        """Judge by a reply; the tokens that it did not compute again because the lead had been seeded.

        Only what was restored speaks for or against restoring: what a slot held anyway was computed by the model.
        """
        on_trial, entry.on_trial = entry.on_trial, False
        success = helped(evidence, entry.likely_tokens)
        entry.restored = entry.restored or ready.how in (Readied.RESTORED, Readied.NAMED)
        if ready.how is Readied.RESTORED:
            entry.restores += 1
            entry.refusals = 0 if success else entry.refusals
            self.kept = judged(self.kept, success)
        elif on_trial and style is not Style.NAMED:
            self.warmed = judged(self.warmed, success)
            # It is tried once more, as one failure may be chance.
            entry.warm = entry.warm and (success is not False or self.warmed.helps is False)
        if not (entry.file or entry.warm):
            return 0
        self._silent = self._silent or (success is None and evidence.computed is None)
        tokens = reused(evidence, entry.likely_tokens)
        entry.tokens_reused += tokens
        return tokens

    def restore_took(self, entry: Entry, ready: Ready, limit_s: float) -> bool:
        """Whether a lead is left alone from now on: restoring it took longer than computing, twice in a row.

        `limit_s` is how long preparing a call may take at most.
        """
        slow = ready.how is Readied.SKIPPED and ready.seconds >= min(_TIMED_OUT_S, limit_s)
        if ready.how is Readied.RESTORED:
            slow = entry.seconds > 0 and ready.seconds > max(entry.seconds, _UNNOTICED_S)
            entry.slow = entry.slow if slow else 0
        entry.slow += slow
        if entry.slow >= _SLOW_RESTORES and not entry.stopped:
            entry.stopped = SLOW
            return True
        return False

    def file_refused(self, entry: Entry) -> str:
        """The server cannot use a lead's file: it is seeded once more, and then left alone. The file's name."""
        entry.refusals += 1
        entry.not_before = 0.0
        if entry.refusals >= _REFUSALS:
            entry.stopped = "the server refused its file, twice"
        return entry.drop_file()

    def seeded(self, entry: Entry, seeded: Seeded, style: Style, now: float, unkept: str = NOT_KEPT) -> None:
        """The server has computed a lead's prefix; if it keeps it, under a name, else `unkept` is why not."""
        self._happened += 1
        entry.file, entry.tokens, entry.size, entry.proved = seeded.file, seeded.tokens, seeded.bytes, False
        entry.seconds, entry.slow = seeded.seconds, 0
        entry.warm, entry.warmed_at, entry.calls_when_warmed = True, self._happened, entry.calls
        if self.aim(entry, style) is not Aim.KEPT or seeded.file:
            entry.succeeded()
        else:
            self._refuse(entry, unkept, now)

    def failed(self, entry: Entry, hitch: Hitch, now: float) -> None:
        """The server has not computed a lead's prefix."""
        self._happened += 1
        if hitch in (Hitch.TOO_SHORT, Hitch.UNSUPPORTED):
            entry.stopped = _REASONS[hitch]
        elif hitch is Hitch.REFUSED:
            self._refuse(entry, _REASONS[hitch], now)
        else:
            entry.postpone(_REASONS[hitch], now, self._retry_s)

    def took_too_long(self, entry: Entry, seconds: float, now: float) -> None:
        """Seeding was given up after so many seconds; it is tried once more, as the server may have been busy."""
        self._happened += 1
        self._refuse(entry, f"it took longer than {seconds:g} seconds", now)

    def preempted(self, entry: Entry, now: float) -> None:
        """A call came while something was done for it."""
        self._happened += 1
        entry.postpone("calls came in between", now, self._retry_s)

    def in_doubt(self, entry: Entry, now: float) -> None:
        """What was done for it may have been done by another run of the server: it counts for nothing."""
        self._happened += 1
        entry.postpone(IN_DOUBT, now, self._retry_s)

    def proved(self, entry: Entry, style: Style, effect: bool | None, now: float) -> None:
        """What measuring told. None: nothing; it need not where replies tell, and elsewhere it is tried again."""
        self._happened += 1
        if style is not Style.NAMED:
            self._proved_for_all(effect, style)
        elif effect is None:
            entry.postpone(UNMEASURED, now, self._retry_s)
            if entry.attempts >= _PROOFS:
                self._give_up(entry, UNMEASURED)
        elif effect:
            self.kept, entry.proved = EFFECTIVE, True
            entry.succeeded()
        else:
            self._give_up(entry, NO_EFFECT)

    def found_before(self, helps: bool | None) -> None:
        """What an earlier run of nearhit found out about keeping prefixes of this model."""
        if helps is not None and self.kept is UNPROVED:
            self.kept = EFFECTIVE if helps else INEFFECTIVE

    def reconsider(self) -> None:
        """Nothing is kept any more, and what was found out about it is forgotten."""
        self.kept, self._unmeasured = UNPROVED, False

    def restarted(self) -> None:
        """Nothing is warm any more. What nobody called for since it was last computed is not computed again."""
        for entry in self:
            unused = entry.calls == entry.calls_when_warmed and entry.source is Source.LEARNED
            entry.dormant = entry.dormant or (entry.warm and unused)
            entry.warm = entry.on_trial = entry.proved = False
            entry.not_before = 0.0

    def state(self, entry: Entry, style: Style) -> tuple[State, str]:
        """How far a lead is, and why it is no further."""
        if entry.seeding:
            return State.SEEDING, ""
        if entry.stopped:
            return State.INEFFECTIVE if entry.stopped == SLOW else State.FAILED, entry.stopped
        aim = self.aim(entry, style)
        if aim is Aim.NOTHING:
            return self._nothing(style)
        if aim is Aim.KEPT and entry.file:
            return State.SEEDED, "" if style is Style.FILE or entry.proved else UNMEASURED_YET
        no_restore = NO_RESTORE if style is Style.FILE and self.kept.helps is False else ""
        if entry.warm and aim is Aim.WARM:
            return State.WARM, no_restore
        return State.WANTED, entry.delayed or (DORMANT if entry.dormant else no_restore)

    def effective(self, entry: Entry, style: Style) -> bool | None:
        """Whether what is done for a lead is known to help, or not to."""
        if entry.stopped == SLOW:
            return False
        kept = self.aim(entry, style) is Aim.KEPT or style is Style.NAMED
        return (self.kept if kept else self.warmed).helps

    def _nothing(self, style: Style) -> tuple[State, str]:
        if style is Style.NAMED and self.kept.helps is False:
            return State.INEFFECTIVE, UNMEASURED if self._unmeasured else NO_EFFECT
        if style is Style.NAMED:
            return State.FAILED, PRIVATE
        return (State.FAILED, _REASONS[Hitch.UNSUPPORTED]) if style is Style.NONE else (State.INEFFECTIVE, NO_EFFECT)

    def _refuse(self, entry: Entry, why: str, now: float) -> None:
        entry.refused += 1
        entry.postpone(why, now, self._retry_s * _PATIENTLY)
        if entry.refused >= _REFUSALS:
            entry.stopped = f"{why}, twice"

    def _measuring(self) -> bool:
        return self.kept.helps is None and any(entry.file and not entry.stopped for entry in self)

    def _give_up(self, entry: Entry, why: str) -> None:
        """One that does not help tells of all others, unless some do."""
        if self.kept.helps:
            entry.stopped = why
        else:
            self.kept, self._unmeasured = INEFFECTIVE, why is UNMEASURED

    def _proved_for_all(self, effect: bool | None, style: Style) -> None:
        self._tells = effect is None
        verdict = EFFECTIVE if effect else INEFFECTIVE
        if effect is not None and style is Style.FILE:
            self.kept = verdict
        elif effect is not None:
            self.warmed = verdict
