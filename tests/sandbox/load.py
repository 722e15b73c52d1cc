# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Clients that keep asking a gateway, plain and streamed, and count what they did not get.

Every request is a new connection, as from many clients: what counts is what the gateway and the fleet behind it do to a request,
not how a client pools connections. A request is

- failed when it got no answer, another status than 200, or an error in the middle of a stream;
- truncated when its answer began and is not whole: a body shorter than was said, a stream without its last line, or fewer tokens
  than were asked for.

By hand: load.py http://gateway:8080 meta/llama-3.1-8b-instruct --seconds 60
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import pathlib
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

#: A stream longer than this many seconds without a byte is given up.
PATIENCE = 60
#: Seconds between two requests of a client.
PAUSE = 0.25
DONE, FAILED, TRUNCATED = "done", "failed", "truncated"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        began: Seconds since the epoch.
        status: Of HTTP; 0 for none.
        outcome: ``done``, ``failed`` or ``truncated``.
        why: What was wrong; empty when nothing was.
    """

    model: str
    streamed: bool
    began: float
    seconds: float
    status: int
    outcome: str
    why: str = ""

    def line(self) -> str:
        """One line for people."""
        when = time.strftime("%H:%M:%S", time.gmtime(self.began)) + ("%.2f" % (self.began % 1))[1:]
        kind = "streamed" if self.streamed else "plain"
        return "%s %s %s request %s after %.2f s: %s" % (when, self.model, kind, self.outcome, self.seconds, self.why)


class _CutError(Exception):
    """The answer is not whole."""


class _RefusedError(Exception):
    """There is no answer, or it is an error."""


def ask(url: str, model: str, *, streamed: bool, tokens: int, headers: dict[str, str] | None = None) -> Answer:
    """One request for exactly so many tokens."""
    began, clock = time.time(), time.monotonic()
    status = [0]
    outcome, why = DONE, ""
    try:
        _ask(url, model, streamed, tokens, headers or {}, status)
    except _CutError as error:
        outcome, why = TRUNCATED, str(error)
    except _RefusedError as error:
        outcome, why = FAILED, str(error)
    except (OSError, http.client.HTTPException) as error:
        # Whoever has had a status has been promised an answer.
        outcome, why = (TRUNCATED if status[0] == 200 else FAILED), "%s: %s" % (type(error).__name__, error)
    return Answer(model, streamed, began, time.monotonic() - clock, status[0], outcome, why)


def _ask(url: str, model: str, streamed: bool, tokens: int, headers: dict[str, str], status: list[int]) -> None:
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=PATIENCE)
    body: dict[str, Any] = {"model": model, "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True}
    if streamed:
        body.update(stream=True, stream_options={"include_usage": True})
    try:
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps(body),
            {"Content-Type": "application/json", "Connection": "close", **headers},
        )
        answer = connection.getresponse()
        status[0] = answer.status
        if answer.status != 200:
            raise _RefusedError("HTTP %d: %s" % (answer.status, answer.read(300).decode(errors="replace")))
        if streamed:
            _read_stream(answer, tokens)
        else:
            _read_plain(answer, tokens)
    finally:
        connection.close()


def _read_plain(answer: http.client.HTTPResponse, tokens: int) -> None:
    text = answer.read()
    try:
        found = json.loads(text)["usage"]["completion_tokens"]
    except (ValueError, KeyError, TypeError):
        raise _CutError("%d bytes that are no completion" % len(text)) from None
    if found != tokens:
        raise _CutError("%s of %d tokens" % (found, tokens))


def _read_stream(answer: http.client.HTTPResponse, tokens: int) -> None:
    pieces, usage, closed = 0, None, False
    for raw in answer:
        line = raw.strip()
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]":
            closed = True
            continue
        try:
            entry = json.loads(line[len(b"data: ") :])
        except ValueError:
            raise _CutError("half a line after %d pieces" % pieces) from None
        if "error" in entry:
            raise _RefusedError("an error in the stream after %d pieces: %s" % (pieces, str(entry["error"])[:200]))
        pieces += bool(entry.get("choices"))
        usage = (entry.get("usage") or {}).get("completion_tokens", usage)
    if not closed:
        raise _CutError("no last line after %d pieces" % pieces)
    # Who tells no usage sends a piece a token.
    found = usage if usage is not None else pieces
    if found < tokens:
        raise _CutError("%d of %d tokens" % (found, tokens))


@dataclasses.dataclass(frozen=True)
class Count:
    """Requests of one kind."""

    asked: int
    failed: int
    truncated: int


class Load:
    """Clients of one gateway, for as long as the context lasts.

    Args:
        url: Of the gateway.
        plain: Clients of each model that ask for whole answers.
        streamed: Clients of each model that have them streamed.
        tokens: Of a plain answer; a streamed one has ``stream_tokens``, which should take seconds.
        pause: Seconds that a client waits after an answer, so that it does not ask a gateway that refuses in a tight loop.
        headers: With every request, for example an API key.
    """

    def __init__(
        self,
        url: str,
        models: Sequence[str],
        *,
        plain: int = 1,
        streamed: int = 2,
        tokens: int = 8,
        stream_tokens: int = 400,
        pause: float = PAUSE,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.url = url
        self.headers = headers
        self.pause = pause
        self.answers: list[Answer] = []
        self._end = threading.Event()
        kinds = [(False, tokens)] * plain + [(True, stream_tokens)] * streamed
        self._threads = [
            threading.Thread(target=self._client, args=(model, streams, length), daemon=True)
            for model in models
            for streams, length in kinds
        ]

    def _client(self, model: str, streamed: bool, tokens: int) -> None:
        while not self._end.is_set():
            self.answers.append(ask(self.url, model, streamed=streamed, tokens=tokens, headers=self.headers))
            self._end.wait(self.pause)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Every request that has begun is waited for: it counts."""
        self._end.set()
        until = time.monotonic() + PATIENCE + 10
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        # A stream that trickles on keeps every time-out.
        hanging = sum(thread.is_alive() for thread in self._threads)
        self.answers += [Answer("", True, time.time(), PATIENCE, 0, FAILED, "it never ended")] * hanging

    # -- what was counted

    @property
    def bad(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.outcome != DONE]

    def count(self, *, streamed: bool | None = None) -> Count:
        """Of all requests, or of the plain or the streamed ones."""
        chosen = [answer for answer in self.answers if streamed is None or answer.streamed is streamed]
        outcomes = [answer.outcome for answer in chosen]
        return Count(len(chosen), outcomes.count(FAILED), outcomes.count(TRUNCATED))

    @property
    def longest(self) -> float:
        """Seconds of the longest request that was answered."""
        return max((answer.seconds for answer in self.answers if answer.outcome == DONE), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "plain": dataclasses.asdict(self.count(streamed=False)),
            "streamed": dataclasses.asdict(self.count(streamed=True)),
            "longest": round(self.longest, 2),
            "bad": [dataclasses.asdict(answer) for answer in self.bad[:50]],
        }

    def check(self, least: int = 20) -> None:
        """Nothing was lost.

        Args:
            least: Requests of each kind without which nothing was proven.

        Raises:
            AssertionError: With what was.
        """
        lines = [answer.line() for answer in self.bad[:20]]
        total = self.count()
        assert not self.bad, "%d failed and %d truncated of %d requests:\n%s" % (
            total.failed,
            total.truncated,
            total.asked,
            "\n".join(lines),
        )
        for streamed in (False, True):
            asked = self.count(streamed=streamed).asked
            assert asked >= least, "only %d %s requests were made" % (asked, "streamed" if streamed else "plain")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Clients that keep asking a gateway and count what they did not get.")
    parser.add_argument("url")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--plain", type=int, default=1, help="clients of each model that ask for whole answers")
    parser.add_argument("--streamed", type=int, default=2, help="clients of each model that have them streamed")
    parser.add_argument("--stream-tokens", type=int, default=400)
    parser.add_argument("--key", help="API key of the gateway: a file, its first line")
    parser.add_argument("--output", type=pathlib.Path, help="file for the result, as JSON")
    given = parser.parse_args(arguments)
    key = pathlib.Path(given.key).read_text().split("\n", 1)[0] if given.key else ""
    with Load(
        given.url,
        given.models,
        plain=given.plain,
        streamed=given.streamed,
        stream_tokens=given.stream_tokens,
        headers={"Authorization": "Bearer " + key} if key else None,
    ) as load:
        time.sleep(given.seconds)
    for answer in load.bad[:20]:
        print(answer.line(), file=sys.stderr)
    text = json.dumps(load.as_dict(), indent=1) + "\n"
    print(text, end="")
    if given.output:
        given.output.write_text(text)
    return 1 if load.bad else 0


if __name__ == "__main__":
    sys.exit(main())
