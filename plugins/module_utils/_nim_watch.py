# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""How the evidence about one service is judged while it starts: ready, doomed, or still on the way.

Three witnesses are heard together, because each alone misleads: the HTTP port (another server may hold it), the systemd
unit (``active`` while the container crash-loops), and the container (gone, replaced, ended with code 0 although its key
was refused).
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field, replace

from ._failure_causes import DOCKER, KERNEL, Match, SignatureBook, best
from ._failure_signatures import EXIT_CODES
from ._health_target import HealthTarget
from ._nim_endpoints import HttpAnswer
from ._nim_log import PHASE_WORDS, message_of, percent_of, phase_of
from ._nim_process_state import UNSTEADY_ENDS, ContainerState, UnitState, Word
from ._redaction import Redactor
from ._untrusted import real_number

Json = t.Dict[str, t.Any]

#: Seconds that the Docker daemon may be away while a service starts (a restart of the daemon takes about 2 to 20 s).
DOCKER_AWAY_SECONDS = 60.0
#: Lines of log that are shown when a start fails, and lines in which its cause is looked for.
TAIL_LINES = 30
WINDOW_LINES = 120
#: Seconds that a line which foretells the end is given for the line that says more, or for the end itself. Together with
#: the seconds between two looks it must stay below 5.
DECISION_SECONDS = 1.5
#: Failed starts belong to the deployment that is waited for when the first of them was this many seconds before the first
#: look; those of a service that fails for longer are history.
FRESH_SECONDS = 60.0
#: Exit code of a container that was killed.
KILLED = 137


@dataclass(frozen=True)
class Failure:
    """Why a service will not become ready.

    Attributes:
        sentence: What happened, with cause and remedy where they are known.
        lines: The last lines of the log.
        signature: Identifier of the known failure that was recognised.
        match: That failure, and the line in which it was found.
        exit_code: Of the container, where it is known to have ended.
        oom_killed: Docker says that the kernel killed it for want of memory.
        said: What Docker or the unit's main process said about it, to its last full stop.
    """

    reason: str
    sentence: str
    what: str
    remedy: str = ""
    lines: tuple[str, ...] = ()
    signature: str | None = None
    match: Match | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    said: str = ""

    @property
    def unexplained_kill(self) -> bool:
        """Whether the container was killed and nothing tells by whom."""
        match = self.match
        vague = match is None or match.signature.umbrella or match.signature == EXIT_CODES[KILLED]
        return self.exit_code == KILLED and vague

    def masked(self, redactor: Redactor) -> Failure:
        """The same without secrets: what Docker says of a start may quote arguments and lines of an environment file."""
        return replace(
            self,
            sentence=redactor.text(self.sentence),
            what=redactor.text(self.what),
            said=redactor.text(self.said),
        )


@dataclass
class Watch:
    """What is known of one service; everything survives between two calls of the module as JSON."""

    target: HealthTarget
    since: float
    book: SignatureBook = field(default_factory=SignatureBook)
    #: What failed before the first look counts too.
    strict: bool = False
    looks: int = 0
    instance: str = ""
    base_restarts: int = 0
    base_failures: int = 0
    restarts: int = 0
    phase: str = "starting"
    phase_since: float = 0.0
    percent: int | None = None
    cursor: str = ""
    window: list[str] = field(default_factory=list)
    doom: Match | None = None
    doom_since: float = 0.0
    hint: Match | None = None
    log_read: float = 0.0
    log_instance: str = ""
    free_at_start: int = 0
    downloaded: int = 0
    docker_away_since: float = 0.0
    stranger: int = 0
    result: Json | None = None
    failure: Failure | None = None

    _KEPT: t.ClassVar[tuple[str, ...]] = (
        "since",
        "looks",
        "instance",
        "base_restarts",
        "base_failures",
        "restarts",
        "phase",
        "phase_since",
        "percent",
        "cursor",
        "window",
        "doom_since",
        "log_read",
        "log_instance",
        "free_at_start",
        "downloaded",
        "docker_away_since",
        "stranger",
        "result",
    )

    #: Kept by the signature's identifier; what the kernel says is read anew by every call.
    _KEPT_MATCHES: t.ClassVar[tuple[str, ...]] = ("doom", "hint")

    def dump(self) -> Json:
        matches = {key: getattr(self, key) for key in self._KEPT_MATCHES}
        kept = {key: getattr(self, key) for key in self._KEPT}
        for key, match in matches.items():
            if match is not None and match.source != KERNEL:
                kept[key] = [match.signature.id, match.line, match.own, match.source]
        return kept

    @classmethod
    def load(
        cls, target: HealthTarget, kept: t.Mapping[str, t.Any] | None, now: float, book: SignatureBook | None = None
    ) -> Watch:
        """A watch as an earlier call left it, or a new one."""
        watch = cls(target=target, since=now, phase_since=now, book=book or SignatureBook())
        for key in cls._KEPT:
            if kept and key in kept:
                setattr(watch, key, kept[key])
        for key in cls._KEPT_MATCHES:
            identifier, line, own, source = (kept or {}).get(key) or ("", "", False, "")
            signature = watch.book.by_id(identifier) if identifier else None
            if signature is not None:
                setattr(watch, key, Match(signature, line, own, source))
        return watch

    @property
    def done(self) -> bool:
        return self.result is not None or self.failure is not None

    @property
    def deciding(self) -> bool:
        """Whether the end is foretold, and only waited for in case another line says more."""
        return self.doom is not None and not self.done

    def replaced_by(self, container: ContainerState) -> bool:
        """Whether this is another run than the one that was watched."""
        return bool(self.instance) and container.instance != self.instance

    def forget_log(self) -> None:
        """Another container begins: what the one before said counts no longer."""
        self.cursor, self.window, self.percent = "", [], None
        self.doom, self.doom_since, self.hint = None, 0.0, None

    def take_lines(self, lines: t.Sequence[str], now: float, redactor: Redactor, *, running: bool = True) -> None:
        """Follow the log: phase, percentage, known texts, and the lines that are shown when it fails.

        Args:
            running: Whether the container runs; what one said that has ended foretells nothing about the next one.
        """
        for line in lines:
            message = message_of(line)
            if not message:
                continue
            phase = phase_of(message)
            if phase is not None and phase != self.phase:
                self.phase, self.phase_since, self.percent = phase, now, None
            percent = percent_of(message)
            if percent is not None and self.phase in ("download", "build", "loading", "graphs"):
                self.percent = percent
            self.window += [redactor.text(part)[:500] for part in message.splitlines() if part.strip()]
        if lines:
            match = self.book.find("\n".join(self.window), deciding=running)
            if match is not None and running:
                self.foretell(match, now)
            elif match is not None:
                self.hint = match
        del self.window[:-WINDOW_LINES]

    def foretell(self, match: Match, now: float) -> None:
        """A line says that this start is lost; the one that explains it best is kept."""
        self.doom_since = self.doom_since or now
        self.doom = best(self.doom, match)

    def fail(
        self,
        reason: str,
        what: str,
        remedy: str = "",
        exit_code: int | None = None,
        oom_killed: bool = False,
        said: str = "",
    ) -> None:
        """End the wait; cause and remedy come from the log where it says them, else ``remedy`` is given.

        Args:
            said: What Docker or the unit's main process said about it.
        """
        match = best(
            self.book.find("", oom_killed=oom_killed),
            self.doom,
            self.book.find("\n".join(self.window)),
            self.book.find(said, source=DOCKER) if said else None,
            self.hint,
        )
        if match is None:
            match = self.book.find("", exit_code=exit_code)
        sentence = "NIM %s %s" % (self.target.name, what)
        if match is not None:
            sentence += ": %s; %s" % (match.signature.cause, match.signature.remedy)
        elif remedy:
            sentence += "; %s" % remedy
        signature = None if match is None else match.signature.id
        lines = tuple(self.window[-TAIL_LINES:])
        self.failure = Failure(
            reason, sentence + ".", what, remedy, lines, signature, match, exit_code, oom_killed, said
        )

    def explain(self, lines: t.Sequence[str] | None = None, *, known: Match | None = None) -> None:
        """Look for the cause of a failure once more.

        Args:
            lines: From elsewhere, in place of those of the log.
            known: What has been found out since.
        """
        failure = self.failure
        if failure is None:
            return
        if lines is not None:
            self.window = list(lines)
        self.doom = known or self.doom
        self.fail(
            failure.reason,
            failure.what,
            failure.remedy,
            exit_code=failure.exit_code,
            oom_killed=failure.oom_killed,
            said=failure.said or failure.what,
        )

    def judge(
        self,
        now: float,
        unit: UnitState,
        unit_started: float,
        container: ContainerState | None,
        docker_error: str,
        answer: HttpAnswer | None,
        word: Word,
        downloading: bool,
    ) -> bool:
        """Take one look's facts; True when the service is ready. Sets ``failure`` when it is doomed.

        Args:
            now: Seconds since the epoch.
            unit_started: When the unit's main process was started, in seconds since the epoch.
            answer: What ``/v1/health/ready`` said.
            downloading: Whether the container that fetches the model runs.
        """
        running = container is not None and container.running
        first = self.looks == 0
        if first:
            self.base_restarts = 0 if self.strict else unit.restarts
            failing_since = word.failing_since or (word.since if word.failures == 1 else 0.0)
            fresh = word.phase in ("failed", "back_off") and now - failing_since <= FRESH_SECONDS
            self.base_failures = 0 if fresh or self.strict else word.failures
        self.looks += 1
        # The count begins anew when the service was ready.
        self.restarts = max(self.restarts, unit.restarts)
        answers_ready = answer is not None and answer.status == 200

        if container is not None and running:
            if self.replaced_by(container):
                self.fail(
                    "container_ended",
                    "did not start: its container ended after %s and was started again"
                    % _seconds(max(0.0, (container.started or now) - _instance_start(self.instance, self.since))),
                    "see 'journalctl CONTAINER_NAME=%s'" % self.target.container,
                )
                return False
            self.instance = container.instance
            self.docker_away_since = 0.0
            self.stranger = 0
            if answers_ready:
                self.percent = None
                # It ended again and again, and the wrapper has not seen it serve for a while: it may only be ready in
                # between. A single end is left alone: somebody may have killed it by hand.
                self.phase = "settling" if word.unsteady >= UNSTEADY_ENDS else "ready"
                if self.phase == "ready":
                    return True
            elif word.phase == "ready":
                self.phase, self.percent = "silent", None
        elif (
            container is not None
            and container.status in ("exited", "dead")
            # Stopped by somebody: what its container said at the end is not why.
            and unit.active != "inactive"
            and self._ended_now(unit, unit_started, container)
        ):
            lived = (container.finished or now) - (container.started or now)
            self.fail(
                "container_ended",
                "did not start: its container ended with exit code %d after %s"
                % (container.exit_code, _seconds(max(0.0, lived)))
                + (" (%s)" % container.error if container.error else ""),
                "see 'journalctl CONTAINER_NAME=%s'" % self.target.container,
                exit_code=container.exit_code,
                oom_killed=container.oom_killed,
                said=container.error,
            )
            return False

        if word.failures > self.base_failures:
            detail = word.detail.rstrip(".") or "ended before it was ready"
            if word.failures > 1:
                detail += " (%d starts in a row have failed)" % word.failures
            exit_code, oom_killed = word.ended
            self.fail(
                "container_ended",
                "did not start: %s%s" % ("its container " if detail.startswith(("ended", "was")) else "", detail),
                "see 'journalctl -u %s'" % self.target.unit,
                exit_code=exit_code,
                oom_killed=oom_killed,
                # As it was said: a known text may end with a full stop.
                said=word.detail,
            )
        elif unit.load == "not-found":
            self.fail("unit_missing", "has no unit %s" % self.target.unit, "run the nim role first")
        elif unit.active == "failed":
            self.fail(
                "unit_failed",
                "did not start: %s failed (%s, exit status %d, %d restarts)"
                % (self.target.unit, unit.result, unit.main_status, unit.restarts),
                "see 'journalctl -u %s'" % self.target.unit,
            )
        elif unit.active == "inactive" and not unit.condition_met:
            self.fail(
                "maintenance",
                "is held back: a condition of %s is not met" % self.target.unit,
                "remove /var/lib/nim/maintenance when the host may serve again",
            )
        elif unit.active == "inactive" and not running:
            self.fail(
                "not_running",
                "is not running: %s is inactive" % self.target.unit,
                "start it with 'systemctl start %s'" % self.target.unit,
            )
        elif not running and not downloading and unit.restarts >= self.base_restarts + 2:
            self.fail(
                "restart_loop",
                "did not start: %s was restarted %d times without a running container"
                % (self.target.unit, unit.restarts),
                "see 'journalctl -u %s'" % self.target.unit,
            )
        elif docker_error:
            self.docker_away_since = self.docker_away_since or now
            if now - self.docker_away_since >= DOCKER_AWAY_SECONDS:
                self.fail("docker_unavailable", "cannot be watched: %s" % docker_error.rstrip("."))
        elif answers_ready and not running:
            self.stranger += 1
        if now - self.doom_since >= DECISION_SECONDS:
            self.decide()
        return False

    def decide(self) -> None:
        """Fail for what a line has foretold."""
        if self.failure is None and self.doom is not None:
            where = "the kernel log" if self.doom.source == KERNEL else "its log"
            self.fail("start_failed", 'will not start: %s says "%s"' % (where, _short(self.doom.line)))

    def _ended_now(self, unit: UnitState, unit_started: float, container: ContainerState) -> bool:
        """Whether an exited container belongs to this start, and is not what an earlier one left behind."""
        if self.instance:
            return container.instance == self.instance or (container.finished or 0.0) >= self.since
        if unit.active == "failed" or unit.sub == "auto-restart":
            return (container.finished or 0.0) >= unit_started - 1.0 or unit.sub == "auto-restart"
        return (container.finished or 0.0) >= unit_started - 1.0

    def check_budget(self, now: float) -> None:
        """Fail when the start has taken longer than it may."""
        waited = now - self.since
        if self.failure is None and waited >= self.target.start_timeout:
            self.fail(
                "start_timeout",
                "is not ready after %s (%s)" % (_seconds(waited), PHASE_WORDS.get(self.phase, self.phase)),
                "if it has hung, 'systemctl restart %s' starts it anew" % self.target.unit
                if self.phase == "silent"
                else "raise start_timeout if it only needs longer",
            )

    def line(self, now: float) -> str:
        """Progress for one line on the operator's screen."""
        if self.result is not None:
            seconds = self.result.get("seconds_to_ready")
            return "%s ready%s" % (self.target.name, "" if seconds is None else " after " + _seconds(seconds))
        text = "%s %s" % (self.target.name, PHASE_WORDS.get(self.phase, self.phase))
        if self.percent is not None:
            text += " %d %%" % self.percent
        if self.phase == "download" and self.downloaded >= 10_000_000:
            text += ", about %s" % _size(self.downloaded)
        text += ", %s of %s" % (_seconds(now - self.since), _seconds(self.target.start_timeout))
        if self.restarts > self.base_restarts:
            text += ", %d restart(s)" % (self.restarts - self.base_restarts)
        return text


def _instance_start(instance: str, otherwise: float) -> float:
    try:
        return real_number(float(instance.rpartition("@")[2]), otherwise)
    except ValueError:
        return otherwise


def _seconds(seconds: float) -> str:
    return "%d s" % round(seconds)


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _size(count: int) -> str:
    return "%.1f GB" % (count / 1e9) if count >= 1e9 else "%d MB" % round(count / 1e6)
