# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Waiting for all NIM services of a host at once, in slices that a controller can follow."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import time
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._failure_causes import DOCKER, KERNEL, Match, SignatureBook, xid_signature
from ._failure_signatures import CHAT_SIGNATURE, OUT_OF_MEMORY, PORT_SIGNATURES, Signature
from ._health_target import HealthTarget
from ._host import Host
from ._kernel_log import OUT_OF_MEMORY as OUT_OF_MEMORY_KILL
from ._kernel_log import (
    XID,
    KernelLine,
    gpu_addresses,
    kernel_events,
    read_kernel_log,
)
from ._nim_endpoints import NO_CHAT_TEMPLATE, ask_metrics, ask_models, ask_profile, ask_version, complete, http_request
from ._nim_gpus import gpus_of_services
from ._nim_log import RUN_FIELD, journal_lines, last_words, message_of, phase_of, read_log
from ._nim_process_state import (
    ContainerReader,
    ContainerState,
    Word,
    observe_units,
    parse_container,
    parse_time,
    port_holder,
    read_word,
    stranger_on_port,
    wanted_gpus,
    wanted_spec,
)
from ._nim_ready import RECORD_DIRECTORY, read_record, record_path
from ._nim_watch import FRESH_SECONDS, Failure, Watch
from ._redaction import Redactor, known_secrets
from ._xid_errors import XID_FATAL

Json = t.Dict[str, t.Any]

#: Seconds between two polls, and between two reads of the container's log.
POLL_SECONDS = 1.0
LOG_SECONDS = 1.0
#: Seconds between two looks once a line has foretold the end, and between two reads of the kernel log.
DECIDING_POLL_SECONDS = 0.5
KERNEL_SECONDS = 1.0
#: Seconds that the kernel's line and Docker's word about a killed container may come after its exit code.
KILL_SECONDS = 1.5
#: Polls in a row in which a stranger answers on the port before it counts as one: the service's own container
#: may be created and published between two looks.
STRANGER_POLLS = 4
#: For a model that cannot chat where chat was asked for.
CHAT_REMEDY = "ask it there and set completion to completion or auto, or use a model with a chat template"


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


def _id_of(instance: str) -> str:
    """Id of a container out of what names one of its runs."""
    return instance.partition("@")[0]


class HealthCheck:
    """Waits for all services of a host at once."""

    def __init__(
        self,
        host: Host,
        api: ContainerReader,
        targets: t.Sequence[HealthTarget],
        signatures: t.Sequence[Signature] = (),
    ) -> None:
        self.host = host
        self.api = api
        self.targets = list(targets)
        self.book = SignatureBook(signatures)
        self.redactor = Redactor()
        self.kernel_read = 0.0

    def run(
        self,
        resume: t.Mapping[str, t.Any] | None,
        *,
        interval: float,
        wait: bool,
        record: bool = True,
        strict: bool = False,
    ) -> Outcome:
        """Look until all are ready, one is doomed, or ``interval`` seconds have passed.

        Args:
            resume: What an earlier call returned.
            interval: Seconds after which an unfinished wait is interrupted; 0 for never.
            wait: False for one single look.
            record: Whether measured times may be written down on the host.
            strict: Whether starts that failed before the first look count too.
        """
        kept = dict((resume or {}).get("models") or {})
        shown = list((resume or {}).get("phases") or [])
        now = self.host.time()
        watches = [Watch.load(target, kept.get(target.name), now, self.book) for target in self.targets]
        for watch in watches:
            watch.strict = strict
        self.redactor = known_secrets(self.host, homes=False).redactor()
        began = self.host.monotonic()
        while True:
            pending = [watch for watch in watches if not watch.done]
            self._look(pending, wait=wait, record=record)
            failed = any(watch.failure for watch in watches)
            pending = [watch for watch in watches if not watch.done]
            if not wait or failed or not pending:
                return self._outcome(watches, finished=True)
            spent = self.host.monotonic() - began
            if any(watch.deciding for watch in pending):
                # The end is near: going back to the controller now would only delay it.
                self.host.sleep(DECIDING_POLL_SECONDS)
                continue
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
        heard: list[KernelLine] | None = None
        patience: float | None = None
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
                if heard is None:
                    heard = self._kernel_lines(watches, now) if wait else []
                self._hear_kernel(watch, heard, [state.id for state in (container, downloader) if state], now)
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
            if not wait:
                watch.decide()
            # A container that is gone has its last lines in the journal only.
            gone = container is None or (container.running and watch.replaced_by(container))
            if watch.failure is not None and (gone or not watch.failure.lines):
                self._last_words(watch, container, word)
            if watch.failure is not None and watch.failure.unexplained_kill:
                ids = [state.id for state in (container, downloader) if state]
                # All of them that ended together share one wait.
                patience = patience or self.host.monotonic() + (KILL_SECONDS if wait else 0.0)
                self._who_killed(watch, {*ids, word.container, _id_of(watch.instance)}, patience)
            self._name_port_holder(watch)
        with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda pair: self._confirm(pair[0], pair[1], record=record), ready))

    def _container(self, name: str) -> tuple[ContainerState | None, str]:
        try:
            return parse_container(self.api.container(name)), ""
        except FleetError as error:
            return None, error.message

    def _kernel_lines(self, watches: t.Sequence[Watch], now: float) -> list[KernelLine]:
        """What the kernel has said since the wait began."""
        if now - self.kernel_read < KERNEL_SECONDS:
            return []
        self.kernel_read = now
        return read_kernel_log(self.host, min(watch.since for watch in watches) - 1.0) or []

    def _hear_kernel(
        self, watch: Watch, lines: t.Sequence[KernelLine], containers: t.Sequence[str], now: float
    ) -> None:
        """Let a service know what the kernel says about its GPUs and its containers."""
        if not lines:
            return
        texts = "\n".join(line.text for line in lines)
        told = self.book.find(texts, source=KERNEL, deciding=True)
        if told is not None:
            watch.foretell(told, now)
        gpus: set[str] | None = None
        for event in kernel_events(lines):
            line = self.redactor.text(event.text)
            if event.kind == OUT_OF_MEMORY_KILL and event.container in containers:
                watch.foretell(Match(OUT_OF_MEMORY, line, source=KERNEL), now)
            elif event.kind == XID:
                if gpus is None:
                    addresses = gpu_addresses(self.host)
                    own = wanted_gpus(self.host, watch.target.name)
                    gpus = {bdf for bdf, uuid in addresses.items() if uuid in own}
                match = Match(xid_signature(event), line, source=KERNEL)
                if event.bdf in gpus and event.number in XID_FATAL:
                    watch.foretell(match, now)
                elif event.bdf in gpus:
                    watch.hint = match

    def _name_port_holder(self, watch: Watch) -> None:
        failure = watch.failure
        if failure is not None and failure.signature in PORT_SIGNATURES:
            holder = port_holder(self.host, watch.target.port)
            if holder:
                publisher = self._publisher(watch.target.port) if "docker-proxy" in holder else ""
                held = "port %d is held by %s%s" % (
                    watch.target.port,
                    holder,
                    " of container %s" % publisher if publisher else "",
                )
                watch.failure = dataclasses.replace(
                    failure,
                    sentence="%s; %s." % (failure.sentence.rstrip("."), held),
                    what="%s (%s)" % (failure.what, held),
                )

    def _publisher(self, port: int) -> str:
        """Name of the container that publishes a port; Docker's proxy listens in its stead."""
        try:
            running = self.api.containers(all=False)
        except FleetError:
            # It only says more about a failure that is known already.
            return ""
        return next(
            (
                str(entry["Names"][0]).lstrip("/")
                for entry in running
                if entry.get("Names") and any(one.get("PublicPort") == port for one in entry.get("Ports") or ())
            ),
            "",
        )

    def _follow_log(self, watch: Watch, name: str, container: ContainerState | None, now: float) -> None:
        if container is None or (container.running and now - watch.log_read < LOG_SECONDS):
            return
        if container.running and watch.replaced_by(container):
            return
        if container.instance != watch.log_instance:
            # The first look may have met what an earlier start left behind.
            watch.log_instance = container.instance
            watch.forget_log()
            watch.phase, watch.phase_since = "starting", now
        watch.log_read = now
        # By its id: the name may be another container's a moment later.
        lines, watch.cursor = read_log(self.host, container.id, watch.cursor, since=container.speaks_since)
        watch.take_lines(lines, now, self.redactor, running=container.running)
        if watch.phase == "download" and watch.free_at_start:
            free = self.host.free_bytes(watch.target.cache_directory)
            watch.downloaded = max(watch.downloaded, watch.free_at_start - free)

    def _who_killed(self, watch: Watch, containers: t.Collection[str], patience: float) -> None:
        """Ask the witnesses of a kill, who may speak a moment after the exit code.

        Args:
            containers: Ids of those that may have been killed.
            patience: Until when, in seconds of the monotonic clock.
        """
        while True:
            lines = read_kernel_log(self.host, watch.since - FRESH_SECONDS) or []
            for event in kernel_events(lines):
                if event.kind == OUT_OF_MEMORY_KILL and event.container and event.container in containers:
                    watch.explain(known=Match(OUT_OF_MEMORY, self.redactor.text(event.text), source=KERNEL))
                    return
            states = [self._container(identifier)[0] for identifier in sorted(containers) if identifier]
            if any(state is not None and state.oom_killed for state in states):
                watch.explain(known=Match(OUT_OF_MEMORY, "", source=DOCKER))
                return
            if self.host.monotonic() >= patience:
                return
            self.host.sleep(DECIDING_POLL_SECONDS)

    def _last_words(self, watch: Watch, container: ContainerState | None, word: Word) -> None:
        """A service that failed before its container said anything: what its wrapper said."""
        failure = watch.failure
        if failure is None or failure.reason in ("unit_missing", "not_running", "maintenance", "wrong_server"):
            return
        lines: list[str] = []
        if watch.target.downloader in failure.what:
            lines = last_words(self.host, watch.target.downloader, word.container)
        elif failure.reason == "container_ended" and "its container" in failure.what:
            # Where none was started, the name's last lines are those of an earlier one.
            identifier = _id_of(watch.instance) or word.container or (container.id if container is not None else "")
            lines = last_words(self.host, watch.target.container, identifier)
        if not lines and not failure.lines:
            # Why a start failed is said by one run of the unit, and the next one may have begun.
            lines = journal_lines(self.host, "_SYSTEMD_UNIT", watch.target.unit, of_last=(RUN_FIELD, 2))
        if not lines:
            return
        told = [part for line in lines for part in message_of(line).splitlines() if part.strip()]
        watch.explain([self.redactor.text(line)[:500] for line in told])

    def _confirm(self, watch: Watch, container: ContainerState, *, record: bool) -> None:
        """The service is ready: who answers, which version, and does it really complete."""
        target = watch.target
        known = read_record(self.host, target, container)
        stranger = "" if known else stranger_on_port(self.host, target.port, container.id)
        if stranger:
            watch.fail(
                "wrong_server",
                "is not what answers on %s: %s does, although container %s runs"
                % (target.url, stranger, target.container),
                "stop that server or give the model another port",
            )
            return
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
        # One that failed is asked again, and counts for those who may not ask.
        if not isinstance(completion, dict) or (record and not completion.get("ok")):
            if model is None or target.completion == "none":
                completion = {"kind": "none", "ok": True, "text": None, "seconds": 0.0, "note": None}
            elif not record:
                completion = None
            else:
                completion = complete(target, model, target.completion)
                # Everybody may read the record.
                completion["note"] = self.redactor.text(completion["note"]) if completion["note"] else None
        if record:
            self._write_record(target, container, {"seconds_to_ready": seconds, "completion": completion})
        if completion is not None and not completion.get("ok"):
            watch.fail(
                "completion_failed",
                "says it is ready, but does not complete on /v1/%s (%s)"
                % (
                    "chat/completions" if completion.get("kind") == "chat" else "completions",
                    completion.get("note"),
                ),
                CHAT_REMEDY
                if target.completion == "chat" and "/v1/completions" in str(completion.get("note"))
                else "see 'journalctl CONTAINER_NAME=%s'" % target.container,
            )
            if watch.failure is not None and str(completion.get("note")).startswith(NO_CHAT_TEMPLATE):
                watch.failure = dataclasses.replace(watch.failure, signature=CHAT_SIGNATURE)
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
            "metrics_url": ask_metrics(target),
            "gpus": [],
            "completion": completion,
            "reason": None,
            "message": None,
        }

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

    def _write_record(self, target: HealthTarget, container: ContainerState, values: Json) -> None:
        content = json.dumps(dict(values, instance=container.instance, asked=target.completion), sort_keys=True)
        path = record_path(target)
        try:
            if self.host.read_text(path) != content:
                self.host.make_dir(RECORD_DIRECTORY, mode=0o755)
                self.host.write_file(path, content, mode=0o644)
        except FleetError:
            # A note of our own that can be taken again at any time.
            return

    def _outcome(self, watches: t.Sequence[Watch], *, finished: bool) -> Outcome:
        now = self.host.time()
        for watch in watches:
            watch.failure = watch.failure and watch.failure.masked(self.redactor)
        models = [watch.result if watch.result is not None else self._unready(watch) for watch in watches]
        if finished:
            gpus = gpus_of_services(self.host, [watch.target.name for watch in watches if watch.result is not None])
            for model in models:
                model["gpus"] = gpus.get(model["name"], [])
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
            "metrics_url": None,
            "gpus": [],
            "completion": None,
            "reason": failure.reason if failure else None,
            "message": failure.sentence if failure else None,
        }
