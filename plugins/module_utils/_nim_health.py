# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Waiting for NIM services: ready, doomed, or still on the way, and in which phase.

Three witnesses are asked together, because each alone misleads: the HTTP port (another server may hold it), the
systemd unit (``active`` while the container crash-loops), and the container (gone, replaced, ended with code 0
although its key was refused). Everything is asked from the host: the image may lack curl.
"""

from __future__ import annotations

import base64
import calendar
import concurrent.futures
import http.client
import json
import re
import ssl
import time
import typing as t
from dataclasses import dataclass, field

from ._errors import FleetError
from ._failure_signatures import Match, find_cause
from ._host import Host
from ._nim_unit import SPEC_LABEL

Json = t.Dict[str, t.Any]

#: Seconds between two polls, and between two reads of the container's log.
POLL_SECONDS = 1.0
LOG_SECONDS = 2.0
#: Seconds that the Docker daemon may be away while a service starts (a restart of the daemon takes about 2 to 20 s).
DOCKER_AWAY_SECONDS = 60.0
#: Polls in a row in which a stranger answers on the port before it counts as one: the service's own container
#: may be created and published between two looks.
STRANGER_POLLS = 4
#: Lines of log that are kept and shown.
TAIL_LINES = 30
#: Seconds for one health request, and for one completion on a model that may still warm up.
PROBE_TIMEOUT = 3.0
COMPLETION_TIMEOUT = 60.0
#: Where the measured start times are kept; they are void after a reboot, as the containers' start times are.
RECORD_DIRECTORY = "/run/gpu_fleet/health"
#: What the units' main process says about the start, and what the containers are meant to run (see _nim_unit).
WORD_DIRECTORY = "/run/nim"
CONFIGURATION_DIRECTORY = "/etc/nim"
#: A failed start this many seconds before the first look belongs to the deployment that is waited for.
FRESH_SECONDS = 60.0
#: Ends in a row after which "ready" has to last before it is believed; the wrapper counts, and forgets after 30 s of service.
UNSTEADY_ENDS = 2
#: The file that holds the NGC key on the host; read only in order to mask it in log lines.
KEY_FILE = "/etc/nim/ngc.env"

COMPLETIONS = ("auto", "chat", "completion", "none")


# -- what is waited for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class HealthTarget:
    """One service to wait for.

    Attributes:
        name: Name of the model in ``nim_models``; unit ``nim-<name>.service``, container ``nim-<name>``.
        address: Address on which the host itself reaches the published port.
        start_timeout: Seconds from the beginning of the wait.
        expected: Names that ``/v1/models`` must list; empty when NIM derives the name itself.
        cache_directory: Where the model is downloaded to; its growth is shown as progress.
    """

    name: str
    address: str = "127.0.0.1"
    port: int = 8000
    scheme: str = "http"
    start_timeout: float = 1800.0
    expected: tuple[str, ...] = ()
    completion: str = "auto"
    cache_directory: str = ""

    @property
    def unit(self) -> str:
        return "nim-%s.service" % self.name

    @property
    def container(self) -> str:
        return "nim-%s" % self.name

    @property
    def downloader(self) -> str:
        """The container that fetches the model before the service's own is created."""
        return "nim-%s-download" % self.name

    @property
    def url(self) -> str:
        address = "[%s]" % self.address if ":" in self.address else self.address
        return "%s://%s:%d" % (self.scheme, address, self.port)


def parse_targets(models: t.Sequence[t.Any]) -> list[HealthTarget]:
    """Entries of ``nim_models`` (or mappings with at least ``name``) that are meant to run; other keys are ignored.

    Raises:
        FleetError: ``invalid_option``.
    """
    targets: list[HealthTarget] = []
    for index, entry in enumerate(models):
        where = "models[%d]" % index
        if not isinstance(entry, dict):
            raise _invalid(where, entry, "is no mapping", "give name, and port where it is not 8000")
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", name):
            raise _invalid("%s.name" % where, name, "is no name of a model", "use letters, digits, '.', '_' and '-'")
        if any(target.name == name for target in targets):
            raise _invalid("%s.name" % where, name, "is there twice", "give every model its own name")
        if entry.get("state", "started") != "started":
            continue
        completion = entry.get("completion") or "auto"
        if completion not in COMPLETIONS:
            raise _invalid("%s.completion" % where, completion, "is unknown", "use %s" % ", ".join(COMPLETIONS))
        environment = entry.get("environment") or {}
        tls = isinstance(environment, dict) and str(environment.get("NIM_SSL_MODE", "")).lower() == "tls"
        expected = entry.get("served_model_name") or entry.get("custom_model_name") or ""
        targets.append(
            HealthTarget(
                name=name,
                address=_reachable_address(str(entry.get("bind_address") or "0.0.0.0")),  # noqa: S104  # read, not bound
                port=_number(entry.get("port", 8000), "%s.port" % where, 1, 65535),
                scheme="https" if tls else "http",
                start_timeout=float(
                    _number(entry.get("start_timeout", 1800), "%s.start_timeout" % where, 1, 7 * 24 * 3600)
                ),
                expected=tuple(part.strip() for part in str(expected).split(",") if part.strip()),
                completion=completion,
                cache_directory=str(entry.get("cache_directory") or "/var/lib/nim/cache/%s" % name),
            )
        )
    return targets


def _invalid(option: str, value: t.Any, wrong: str, remedy: str) -> FleetError:
    return FleetError("invalid_option", "%s = %r: %s; %s." % (option, value, wrong, remedy))


def _number(value: t.Any, option: str, least: int, most: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise _invalid(option, value, "is no whole number from %d to %d" % (least, most), "correct it")
    return number


def _reachable_address(bind_address: str) -> str:
    bind_address = bind_address.strip("[]")
    if bind_address == "0.0.0.0":  # noqa: S104  # compared, not bound
        return "127.0.0.1"
    return "::1" if bind_address == "::" else bind_address


# -- the witnesses --------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitState:
    """A unit as ``systemctl show`` tells it; ``main_started`` is in seconds of the host's monotonic clock."""

    load: str = "not-found"
    active: str = "inactive"
    sub: str = "dead"
    restarts: int = 0
    invocation: str = ""
    result: str = "success"
    main_status: int = 0
    condition_met: bool = True
    main_started: float = 0.0


def observe_units(host: Host, units: t.Sequence[str]) -> dict[str, UnitState]:
    """All units with one call of systemctl."""
    if not units:
        return {}
    keys = "Id,LoadState,ActiveState,SubState,NRestarts,InvocationID,Result,ExecMainStatus,ConditionResult"
    shown = host.run(
        ["systemctl", "show", "--property=%s,ExecMainStartTimestampMonotonic" % keys, *units], timeout=30
    ).stdout
    found: dict[str, UnitState] = {}
    for block in re.split(r"\n\s*\n", shown):
        value = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if not value.get("Id"):
            continue
        found[value["Id"]] = UnitState(
            load=value.get("LoadState", ""),
            active=value.get("ActiveState", ""),
            sub=value.get("SubState", ""),
            restarts=_digits(value.get("NRestarts")),
            invocation=value.get("InvocationID", ""),
            result=value.get("Result", ""),
            main_status=_digits(value.get("ExecMainStatus")),
            condition_met=value.get("ConditionResult", "yes") != "no",
            main_started=_digits(value.get("ExecMainStartTimestampMonotonic")) / 1e6,
        )
    return {unit: found.get(unit, UnitState()) for unit in units}


def _digits(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


@dataclass(frozen=True)
class ContainerState:
    """A container as the engine tells it; times are seconds since the epoch."""

    id: str
    status: str
    started: float | None
    finished: float | None
    exit_code: int
    oom_killed: bool
    error: str
    spec: str = ""

    @property
    def running(self) -> bool:
        return self.status == "running"

    @property
    def instance(self) -> str:
        """Changes with every start, also when the same container is started again."""
        return "%s@%s" % (self.id, self.started)


def parse_container(inspected: t.Mapping[str, t.Any] | None) -> ContainerState | None:
    """The few facts of ``docker inspect`` that the wait needs."""
    if not inspected:
        return None
    state = inspected.get("State") or {}
    return ContainerState(
        id=str(inspected.get("Id", "")),
        status=str(state.get("Status", "")),
        started=parse_time(str(state.get("StartedAt", ""))),
        finished=parse_time(str(state.get("FinishedAt", ""))),
        exit_code=int(state.get("ExitCode") or 0),
        oom_killed=bool(state.get("OOMKilled")),
        error=str(state.get("Error") or ""),
        spec=str(((inspected.get("Config") or {}).get("Labels") or {}).get(SPEC_LABEL) or ""),
    )


def parse_time(text: str) -> float | None:
    """Docker's RFC 3339 time in UTC as seconds since the epoch; its zero time (year 1) is None."""
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?Z", text)
    if not found or text.startswith("0001-"):
        return None
    whole = calendar.timegm(time.strptime(found.group(1), "%Y-%m-%dT%H:%M:%S"))
    return whole + float(found.group(2) or 0)


@dataclass(frozen=True)
class Word:
    """What the unit's main process left word of: its phase, since when, failed starts and ends soon after ready in a row."""

    phase: str = ""
    since: float = 0.0
    failures: int = 0
    detail: str = ""
    unsteady: int = 0


def read_word(host: Host, name: str) -> Word:
    """The word of a unit's main process; empty when there is none or it is broken."""
    found = _read_object(host, "%s/%s.json" % (WORD_DIRECTORY, name))
    failures, unsteady, since = found.get("failures"), found.get("unsteady"), found.get("since")
    return Word(
        phase=str(found.get("phase") or ""),
        since=float(since) if isinstance(since, (int, float)) else 0.0,
        failures=failures if isinstance(failures, int) else 0,
        detail=str(found.get("detail") or ""),
        unsteady=unsteady if isinstance(unsteady, int) else 0,
    )


def wanted_spec(host: Host, name: str) -> str:
    """Name of what the service's container is meant to run; empty when that cannot be told."""
    return str(_read_object(host, "%s/%s.json" % (CONFIGURATION_DIRECTORY, name)).get("spec") or "")


def _read_object(host: Host, path: str) -> Json:
    try:
        found = json.loads(host.read_text(path) or "{}")
    except (FleetError, ValueError):
        # A file that is being replaced or was broken by hand; whoever owns it reports that.
        return {}
    return found if isinstance(found, dict) else {}


class ContainerReader(t.Protocol):
    """The part of the Docker client that is used here."""

    def container(self, name: str) -> Json | None: ...


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    body: str

    def json(self) -> Json:
        """The body as a mapping; empty when it is none."""
        try:
            parsed = json.loads(self.body)
        except ValueError:
            return {}
        return parsed if isinstance(parsed, dict) else {}


def http_request(
    target: HealthTarget, path: str, *, body: Json | None = None, timeout: float = PROBE_TIMEOUT
) -> HttpAnswer | None:
    """One request to a service without proxies; None when nobody answers in HTTP within ``timeout`` seconds."""
    connection: http.client.HTTPConnection
    if target.scheme == "https":
        # Health is asked over the loopback, where the certificate's name never fits.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(target.address, target.port, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(target.address, target.port, timeout=timeout)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return HttpAnswer(response.status, response.read(1_000_000).decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def port_holder(host: Host, port: int) -> str:
    """Who listens on a TCP port, as "docker-proxy (pid 812)"; empty when it cannot be told."""
    listed = host.run(["ss", "-Hltnp", "sport", "=", ":%d" % port], timeout=10).stdout
    found = {"%s (pid %s)" % pair for pair in re.findall(r'\("([^"]+)",pid=(\d+)', listed)}
    return ", ".join(sorted(found))


# -- the log --------------------------------------------------------------------------------------

#: Phases in the order of a start, each with the texts that begin it (NIM 1.x, NIM 2.x, vLLM, TensorRT-LLM, SGLang).
_PHASE_TEXTS: tuple[tuple[str, str], ...] = (
    ("serving", r"Serving endpoints|Uvicorn running on|Application startup complete|Starting vLLM API server"),
    ("graphs", r"[Cc]apturing (?:CUDA )?graph|[Cc]apture cuda graph|Graph capturing finished"),
    (
        "build",
        r"[Bb]uild(?:ing)?\b.*\b[Ee]ngine|[Ee]ngine (?:is being built|build(?:ing)?\b)"
        r"|trtllm-build|\[TRT\].*(?:Compiler|Building)",
    ),
    (
        "loading",
        r"Loading (?:model weights|safetensors|pt checkpoint|weights|model)|Starting to load model"
        r"|Load weight begin|Model loading took",
    ),
    (
        "engine",
        r"Model workspace is now ready|Initializing an? (?:V1 )?LLM engine|Initializing a V1|Serializing engine",
    ),
    ("download", r"Preparing model workspace|[Dd]ownload(?:ing|ed)\b|Fetching \d+ files"),
    ("profile", r"Detected \d+ compatible profile|Matched profile|Selected profile|Valid profile|Profile metadata"),
)
_PHASES = [(name, re.compile(pattern)) for name, pattern in _PHASE_TEXTS]
#: What the operator reads.
PHASE_WORDS = {
    "waiting_for_docker": "waiting for Docker",
    "starting": "starting the container",
    "profile": "choosing a profile",
    "download": "downloading the model",
    "build": "building the engine",
    "engine": "starting the engine",
    "loading": "loading the model",
    "graphs": "capturing CUDA graphs",
    "serving": "starting the server",
    "settling": "answering, but it ended soon after it was ready before; watching whether it stays",
    "ready": "ready",
}
_PERCENT = re.compile(r"(?<![\d.])(\d{1,3})(?:\.\d+)?\s?%")
_FRACTION = re.compile(r"(?<![\d/.])(\d{1,6})/(\d{1,6})(?![\d/])")


def message_of(line: str) -> str:
    """What a log line says: the line itself, or message and exception of a JSON line (its level is not reliable)."""
    stripped = line.strip()
    if stripped.startswith("{") and stripped.endswith("}"):
        try:
            record = json.loads(stripped)
        except ValueError:
            return stripped
        if isinstance(record, dict):
            parts = [str(record.get(key) or "") for key in ("message", "exc_info")]
            told = "\n".join(part for part in parts if part and part != "None")
            return told or stripped
    return stripped


def phase_of(message: str) -> str | None:
    """The phase that a message begins or belongs to."""
    for name, pattern in _PHASES:
        if pattern.search(message):
            return name
    return None


def percent_of(message: str) -> int | None:
    """The last percentage that a message names; in a message that belongs to a phase "layer 3/32" is one too."""
    found = [int(number) for number in _PERCENT.findall(message)]
    if found:
        return found[-1] if found[-1] <= 100 else None
    parts = _FRACTION.findall(message) if phase_of(message) else []
    if parts:
        done, total = int(parts[-1][0]), int(parts[-1][1])
        return 100 * done // total if 1 < total >= done else None
    return None


_SECRETS = re.compile(
    r"nvapi-[\w-]{6,}"
    r"|\bhf_[A-Za-z0-9]{8,}"
    r"|(?i:(?<=bearer )|(?<=basic )|(?<=apikey ))[\w.+/=~-]{8,}"
    r"|(?i:(?:(?<=api_key=)|(?<=api-key=)|(?<=token=)|(?<=secret=)|(?<=password=)))[^\s,;&'\"]{4,}"
    r"|(?i:(?:(?<=api_key': ')|(?<=token': ')|(?<=api_key\": \")|(?<=token\": \")))[^'\"]{4,}"
)


def host_secrets(host: Host) -> list[str]:
    """Values that must not appear in a log line that leaves the host: the NGC key and what Docker makes of it."""
    try:
        content = host.read_text(KEY_FILE)
    except FleetError:
        return []
    values: list[str] = []
    for line in (content or "").splitlines():
        value = line.partition("=")[2].strip().strip("'\"")
        if len(value) >= 8:
            values += [value, base64.b64encode(("$oauthtoken:" + value).encode()).decode()]
    return values


def scrub(text: str, secrets: t.Iterable[str] = ()) -> str:
    """Mask known secrets, and whatever looks like one."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)


def read_log(host: Host, container: str, cursor: str, limit: int = 400) -> tuple[list[str], str]:
    """Lines of a container's log after ``cursor`` (an RFC 3339 time, empty for the beginning), and the new cursor."""
    argv = ["docker", "logs", "--timestamps", "--tail", str(limit)]
    if cursor:
        argv += ["--since", cursor]
    read = host.run([*argv, container], timeout=20)
    if not read.ok:
        return [], cursor
    stamped: list[tuple[str, str]] = []
    for line in read.stdout.splitlines() + read.stderr.splitlines():
        when, _space, text = line.partition(" ")
        # What came before stays out: --since includes the moment itself.
        if re.match(r"\d{4}-\d\d-\d\dT", when) and when > cursor:
            stamped.append((when, text))
    # The two streams come one after the other; the stable sort keeps the order within a moment.
    stamped.sort(key=lambda entry: entry[0])
    return [text for _when, text in stamped], stamped[-1][0] if stamped else cursor


# -- one service while it starts ------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Why a service will not become ready.

    Attributes:
        sentence: What happened, with cause and remedy where they are known.
        lines: The last lines of the log.
        signature: Identifier of the known failure that was recognised.
    """

    reason: str
    sentence: str
    what: str
    remedy: str = ""
    lines: tuple[str, ...] = ()
    signature: str | None = None


@dataclass
class Watch:
    """What is known of one service; everything survives between two calls of the module as JSON."""

    target: HealthTarget
    since: float
    looks: int = 0
    instance: str = ""
    base_restarts: int = 0
    base_failures: int = 0
    restarts: int = 0
    phase: str = "starting"
    phase_since: float = 0.0
    percent: int | None = None
    cursor: str = ""
    tail: list[str] = field(default_factory=list)
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
        "tail",
        "log_read",
        "log_instance",
        "free_at_start",
        "downloaded",
        "docker_away_since",
        "stranger",
        "result",
    )

    def dump(self) -> Json:
        return {key: getattr(self, key) for key in self._KEPT}

    @classmethod
    def load(cls, target: HealthTarget, kept: t.Mapping[str, t.Any] | None, now: float) -> Watch:
        """A watch as an earlier call left it, or a new one."""
        watch = cls(target=target, since=now, phase_since=now)
        for key in cls._KEPT:
            if kept and key in kept:
                setattr(watch, key, kept[key])
        return watch

    @property
    def done(self) -> bool:
        return self.result is not None or self.failure is not None

    def take_lines(self, lines: t.Sequence[str], now: float, secrets: t.Sequence[str]) -> None:
        """Follow the log: phase, percentage, and the tail that is shown when it fails."""
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
            self.tail += [scrub(part, secrets)[:500] for part in message.splitlines() if part.strip()]
        del self.tail[:-TAIL_LINES]

    def fail(
        self, reason: str, what: str, remedy: str = "", exit_code: int | None = None, oom_killed: bool = False
    ) -> None:
        """End the wait; cause and remedy come from the log where it says them, else ``remedy`` is given."""
        match: Match | None = find_cause("\n".join(self.tail), exit_code=exit_code, oom_killed=oom_killed)
        sentence = "NIM %s %s" % (self.target.name, what)
        if match is not None:
            sentence += ": %s; %s" % (match.signature.cause, match.signature.remedy)
        elif remedy:
            sentence += "; %s" % remedy
        signature = None if match is None else match.signature.id
        self.failure = Failure(reason, sentence + ".", what, remedy, tuple(self.tail), signature)

    def explain(self, lines: t.Sequence[str]) -> None:
        """Look for the cause of a failure once more, in lines from elsewhere."""
        if self.failure is not None:
            self.tail = list(lines)
            self.fail(self.failure.reason, self.failure.what, self.failure.remedy)

    def judge(
        self,
        now: float,
        unit: UnitState,
        unit_started: float,
        container: ContainerState | None,
        docker_error: str,
        answer: HttpAnswer | None,
        word: Word = Word(),
        downloading: bool = False,
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
            self.base_restarts = unit.restarts
            fresh = word.phase in ("failed", "back_off") and now - word.since <= FRESH_SECONDS and word.failures == 1
            self.base_failures = 0 if fresh else word.failures
        self.looks += 1
        # The count begins anew when the service was ready.
        self.restarts = max(self.restarts, unit.restarts)
        answers_ready = answer is not None and answer.status == 200

        if container is not None and running:
            if self.instance and container.instance != self.instance:
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
        elif (
            container is not None
            and container.status in ("exited", "dead")
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
            )
            return False

        if word.failures > self.base_failures:
            detail = word.detail.rstrip(".") or "ended before it was ready"
            self.fail(
                "container_ended",
                "did not start: %s%s" % ("its container " if detail.startswith(("ended", "was")) else "", detail),
                "see 'journalctl -u %s'" % self.target.unit,
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
        return False

    def _ended_now(self, unit: UnitState, unit_started: float, container: ContainerState) -> bool:
        """Whether an exited container belongs to this start, and is not what an earlier one left behind."""
        if self.instance:
            return container.instance == self.instance or (container.finished or 0.0) >= self.since
        if unit.active in ("failed", "inactive") or unit.sub == "auto-restart":
            return (container.finished or 0.0) >= unit_started - 1.0 or unit.sub == "auto-restart"
        return (container.finished or 0.0) >= unit_started - 1.0

    def check_budget(self, now: float) -> None:
        """Fail when the start has taken longer than it may."""
        waited = now - self.since
        if self.failure is None and waited >= self.target.start_timeout:
            self.fail(
                "start_timeout",
                "is not ready after %s (%s)" % (_seconds(waited), PHASE_WORDS.get(self.phase, self.phase)),
                "raise start_timeout if it only needs longer",
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
        return float(instance.rpartition("@")[2])
    except ValueError:
        return otherwise


def _seconds(seconds: float) -> str:
    return "%d s" % round(seconds)


def _size(count: int) -> str:
    return "%.1f GB" % (count / 1e9) if count >= 1e9 else "%d MB" % round(count / 1e6)


# -- after it is ready ----------------------------------------------------------------------------


def ask_models(target: HealthTarget) -> list[str] | None:
    """Names of the models that the service offers; None when it does not speak that interface."""
    answer = http_request(target, "/v1/models", timeout=10)
    if answer is None or answer.status != 200:
        return None
    entries = answer.json().get("data")
    if not isinstance(entries, list):
        return None
    return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and entry.get("id")]


def ask_version(target: HealthTarget) -> str | None:
    """Release of the NIM as it says itself."""
    answer = http_request(target, "/v1/version", timeout=10)
    if answer is None or answer.status != 200:
        return None
    release = answer.json().get("release") or answer.json().get("version")
    return str(release) if release else None


def ask_profile(target: HealthTarget) -> str | None:
    """The profile that NIM chose (later 1.x and 2.x)."""
    answer = http_request(target, "/v1/metadata", timeout=10)
    if answer is None or answer.status != 200:
        return None
    profile = answer.json().get("selectedModelProfileId")
    return str(profile) if profile else None


def error_text(answer: HttpAnswer | None) -> str:
    """What an error answer says, in one line."""
    if answer is None:
        return "no answer"
    body = answer.json()
    error = body.get("error")
    told = error.get("message") if isinstance(error, dict) else error or body.get("message") or body.get("detail")
    text = " ".join(str(told or answer.body).split())
    return "HTTP %d: %s" % (answer.status, text[:300])


def complete(target: HealthTarget, model: str, how: str) -> Json:
    """Send one short request to the model.

    Returns:
        ``kind`` (chat, completion, none), ``ok``, ``text``, ``seconds``, ``note``.
    """
    began = time.monotonic()

    def outcome(kind: str, ok: bool, text: str | None, note: str | None) -> Json:
        return {
            "kind": kind,
            "ok": ok,
            "text": text,
            "seconds": round(time.monotonic() - began, 3),
            "note": note,
        }

    if how == "none":
        return outcome("none", True, None, None)
    refused = ""
    if how in ("auto", "chat"):
        answer = http_request(
            target,
            "/v1/chat/completions",
            body={"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
            timeout=COMPLETION_TIMEOUT,
        )
        if answer is not None and answer.status == 200:
            return outcome("chat", True, _chat_text(answer), None)
        if how == "chat" or answer is None or answer.status >= 500:
            return outcome("chat", False, None, error_text(answer))
        refused = error_text(answer)
        missing = answer.status in (404, 405)
    else:
        missing = False
    answer = http_request(
        target,
        "/v1/completions",
        body={"model": model, "prompt": "Hello", "max_tokens": 8},
        timeout=COMPLETION_TIMEOUT,
    )
    if answer is not None and answer.status == 200:
        note = None
        if refused:
            note = (
                "the model has no chat template; it answers on /v1/completions"
                if "chat template" in refused.lower() or "chat_template" in refused.lower()
                else "it answers on /v1/completions; on /v1/chat/completions: %s" % refused
            )
        return outcome("completion", True, _completion_text(answer), note)
    if how == "auto" and missing and answer is not None and answer.status in (404, 405):
        return outcome("none", True, None, "the model offers neither chat nor completions")
    return outcome("completion", False, None, error_text(answer))


def _first_choice(answer: HttpAnswer) -> Json:
    choices = answer.json().get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    return first if isinstance(first, dict) else {}


def _chat_text(answer: HttpAnswer) -> str:
    message = _first_choice(answer).get("message")
    return str((message or {}).get("content") or "")[:200] if isinstance(message, dict) else ""


def _completion_text(answer: HttpAnswer) -> str:
    return str(_first_choice(answer).get("text") or "")[:200]


# -- all services of the host ---------------------------------------------------------------------


@dataclass
class Outcome:
    """What one call of the module found out.

    Attributes:
        finished: Nothing is left to wait for.
        models: One mapping a service, in the order given.
        text: One line of progress.
        resume: What the next call needs.
        failures: Services that will not become ready.
    """

    finished: bool
    models: list[Json]
    text: str
    resume: Json
    failures: list[tuple[HealthTarget, Failure]]


class HealthCheck:
    """Waits for all services of a host at once."""

    def __init__(self, host: Host, api: ContainerReader, targets: t.Sequence[HealthTarget]) -> None:
        self.host = host
        self.api = api
        self.targets = list(targets)
        self.secrets: list[str] = []

    def run(self, resume: t.Mapping[str, t.Any] | None, *, interval: float, wait: bool, record: bool = True) -> Outcome:
        """Look until all are ready, one is doomed, or ``interval`` seconds have passed.

        Args:
            resume: What an earlier call returned.
            interval: Seconds after which an unfinished wait is interrupted; 0 for never.
            wait: False for one single look that judges nothing.
            record: Whether measured times may be written down on the host.
        """
        kept = dict((resume or {}).get("models") or {})
        shown = list((resume or {}).get("phases") or [])
        now = self.host.time()
        watches = [Watch.load(target, kept.get(target.name), now) for target in self.targets]
        self.secrets = host_secrets(self.host)
        began = self.host.monotonic()
        while True:
            pending = [watch for watch in watches if not watch.done]
            self._look(pending, wait=wait, record=record)
            failed = any(watch.failure for watch in watches)
            pending = [watch for watch in watches if not watch.done]
            if not wait or failed or not pending:
                return self._outcome(watches, finished=True)
            spent = self.host.monotonic() - began
            if interval and spent >= interval - POLL_SECONDS / 2:
                return self._outcome(watches, finished=False)
            if interval and shown and spent >= 2 * POLL_SECONDS and self._phases(watches) != shown:
                return self._outcome(watches, finished=False)
            self.host.sleep(POLL_SECONDS)

    @staticmethod
    def _phases(watches: t.Sequence[Watch]) -> list[str]:
        return ["ready" if watch.result is not None else watch.phase for watch in watches]

    def _look(self, watches: t.Sequence[Watch], *, wait: bool, record: bool) -> None:
        units = observe_units(self.host, [watch.target.unit for watch in watches])
        with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
            answers = list(pool.map(lambda watch: http_request(watch.target, "/v1/health/ready"), watches))
        ready: list[tuple[Watch, ContainerState]] = []
        for watch, given in zip(watches, answers):
            answer = given
            target = watch.target
            unit = units[target.unit]
            word = read_word(self.host, target.name)
            container, docker_error = self._container(target.container)
            spec = wanted_spec(self.host, target.name) if container is not None and container.spec else ""
            if container is not None and spec and container.spec != spec:
                # What an earlier configuration left behind is about to be replaced, and its answers do not count.
                container, answer = None, None
            downloader = None
            if container is None or not container.running:
                downloader, _error = self._container(target.downloader)
            downloading = downloader is not None and downloader.running
            now = self.host.time()
            if watch.looks == 0 and wait:
                watch.free_at_start = self.host.free_bytes(target.cache_directory)
            if not (answer is not None and answer.status == 200):
                if downloading:
                    self._follow_log(watch, target.downloader, downloader, now)
                    if watch.phase == "starting":
                        watch.phase = "download"
                else:
                    self._follow_log(watch, target.container, container, now)
                if word.phase == "waiting_for_docker":
                    watch.phase, watch.percent = word.phase, None
            unit_started = now - (self.host.monotonic() - unit.main_started)
            if (
                watch.judge(now, unit, unit_started, container, docker_error, answer, word, downloading)
                and container is not None
            ):
                ready.append((watch, container))
                continue
            if watch.stranger >= STRANGER_POLLS or (watch.stranger and not wait):
                holder = port_holder(self.host, watch.target.port)
                watch.fail(
                    "wrong_server",
                    "is not what answers on %s: %s does, and container %s is not running"
                    % (watch.target.url, holder or "another server", watch.target.container),
                    "stop that server or give the model another port",
                )
            watch.check_budget(now)
            # A container that is gone has its last lines in the journal only.
            if watch.failure is not None and (container is None or not watch.failure.lines):
                self._last_words(watch)
        with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda pair: self._confirm(pair[0], pair[1], record=record), ready))

    def _container(self, name: str) -> tuple[ContainerState | None, str]:
        try:
            return parse_container(self.api.container(name)), ""
        except FleetError as error:
            return None, error.message

    def _follow_log(self, watch: Watch, name: str, container: ContainerState | None, now: float) -> None:
        if container is None or (container.running and now - watch.log_read < LOG_SECONDS):
            return
        if watch.instance and container.instance != watch.instance:
            # What the ended container still had to say is in the journal only.
            lines = self._journal("CONTAINER_ID_FULL=%s" % watch.instance.partition("@")[0])
            if lines:
                watch.tail = []
                watch.take_lines(lines, now, self.secrets)
            return
        if container.instance != watch.log_instance:
            # The first look may have met what an earlier start left behind.
            watch.log_instance = container.instance
            watch.cursor, watch.tail, watch.percent = "", [], None
            watch.phase, watch.phase_since = "starting", now
        watch.log_read = now
        lines, watch.cursor = read_log(self.host, name, watch.cursor)
        watch.take_lines(lines, now, self.secrets)
        if watch.phase == "download" and watch.free_at_start:
            free = self.host.free_bytes(watch.target.cache_directory)
            watch.downloaded = max(watch.downloaded, watch.free_at_start - free)

    def _journal(self, match: str) -> list[str]:
        read = self.host.run(["journalctl", "--no-pager", "-q", "-o", "cat", "-n", str(TAIL_LINES), match], timeout=20)
        return read.stdout.splitlines() if read.ok else []

    def _last_words(self, watch: Watch) -> None:
        """A service that failed before its container said anything: what its wrapper said."""
        failure = watch.failure
        if failure is None or failure.reason in ("unit_missing", "not_running", "maintenance", "wrong_server"):
            return
        lines: list[str] = []
        if watch.target.downloader in failure.what:
            lines = self._journal("CONTAINER_NAME=%s" % watch.target.downloader)
        elif failure.reason == "container_ended" and "its container" in failure.what:
            # Where none was started, the name's last lines are those of an earlier one.
            lines = self._journal("CONTAINER_NAME=%s" % watch.target.container)
        if not lines and not failure.lines:
            lines = self._journal("_SYSTEMD_UNIT=%s" % watch.target.unit)
        if not lines:
            return
        told = [part for line in lines for part in message_of(line).splitlines() if part.strip()]
        watch.explain([scrub(line, self.secrets)[:500] for line in told])

    def _confirm(self, watch: Watch, container: ContainerState, *, record: bool) -> None:
        """The service is ready: who answers, which version, and does it really complete."""
        target = watch.target
        known = self._read_record(target, container)
        seconds = known.get("seconds_to_ready")
        if seconds is None:
            if watch.looks > 1 and container.started:
                seconds = round(self.host.time() - container.started, 1)
            else:
                seconds = self._seconds_from_log(target, container)
        models = ask_models(target)
        version = ask_version(target)
        if target.expected and models is not None and not set(target.expected) <= set(models):
            watch.fail(
                "wrong_model",
                "answers on %s with the model %s, but %s was asked for"
                % (target.url, ", ".join(models) or "none", ", ".join(target.expected)),
                "check served_model_name, weights_directory and what else listens on port %d" % target.port,
            )
            return
        model = target.expected[0] if target.expected else (models[0] if models else None)
        completion = known.get("completion")
        if not isinstance(completion, dict):
            if model is None or target.completion == "none":
                completion = {"kind": "none", "ok": True, "text": None, "seconds": 0.0, "note": None}
            elif not record:
                completion = None
            else:
                completion = complete(target, model, target.completion)
        if completion is not None and not completion.get("ok"):
            watch.fail(
                "completion_failed",
                "says it is ready, but does not complete on /v1/%s (%s)"
                % (
                    "chat/completions" if completion.get("kind") == "chat" else "completions",
                    scrub(str(completion.get("note")), self.secrets),
                ),
                "see 'journalctl CONTAINER_NAME=%s'" % target.container,
            )
            return
        watch.result = {
            "name": target.name,
            "ready": True,
            "phase": "ready",
            "seconds_to_ready": seconds,
            "restarts": watch.restarts,
            "url": target.url,
            "model_id": model,
            "models": models or [],
            "version": version,
            "profile": ask_profile(target),
            "completion": completion,
            "reason": None,
            "message": None,
        }
        if record:
            self._write_record(target, container, {"seconds_to_ready": seconds, "completion": completion})

    def _seconds_from_log(self, target: HealthTarget, container: ContainerState) -> float | None:
        """A service that was ready before the first look says in its log when it began to serve."""
        if container.started is None:
            return None
        until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(container.started + target.start_timeout))
        read = self.host.run(["docker", "logs", "--timestamps", "--until", until, target.container], timeout=20)
        for line in read.stdout.splitlines() + read.stderr.splitlines():
            when, _space, text = line.partition(" ")
            stamp = parse_time(when)
            if stamp is not None and stamp >= container.started and phase_of(message_of(text)) == "serving":
                return round(stamp - container.started, 1)
        return None

    def _read_record(self, target: HealthTarget, container: ContainerState) -> Json:
        try:
            content = self.host.read_text("%s/%s.json" % (RECORD_DIRECTORY, target.name))
            found = json.loads(content or "{}")
        except (FleetError, ValueError):
            # A note of our own that can be taken again at any time.
            return {}
        if not isinstance(found, dict) or found.get("instance") != container.instance:
            return {}
        if found.get("asked") != target.completion:
            found.pop("completion", None)
        return found

    def _write_record(self, target: HealthTarget, container: ContainerState, values: Json) -> None:
        content = json.dumps(dict(values, instance=container.instance, asked=target.completion), sort_keys=True)
        path = "%s/%s.json" % (RECORD_DIRECTORY, target.name)
        try:
            if self.host.read_text(path) != content:
                self.host.make_dir(RECORD_DIRECTORY, mode=0o755)
                self.host.write_file(path, content, mode=0o644)
        except FleetError:
            # Only the measured time is lost.
            return

    def _outcome(self, watches: t.Sequence[Watch], *, finished: bool) -> Outcome:
        now = self.host.time()
        models = [watch.result if watch.result is not None else self._unready(watch) for watch in watches]
        return Outcome(
            finished=finished,
            models=models,
            text="; ".join(watch.line(now) for watch in watches),
            resume={"models": {watch.target.name: watch.dump() for watch in watches}, "phases": self._phases(watches)},
            failures=[(watch.target, watch.failure) for watch in watches if watch.failure is not None],
        )

    @staticmethod
    def _unready(watch: Watch) -> Json:
        failure = watch.failure
        return {
            "name": watch.target.name,
            "ready": False,
            "phase": "failed" if failure else watch.phase,
            "seconds_to_ready": None,
            "restarts": watch.restarts,
            "url": watch.target.url,
            "model_id": None,
            "models": [],
            "version": None,
            "profile": None,
            "completion": None,
            "reason": failure.reason if failure else None,
            "message": failure.sentence if failure else None,
        }
