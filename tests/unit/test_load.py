# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The clients of the upgrade's tests notice everything that can be wrong with an answer."""

from __future__ import annotations

import contextlib
import http.server
import json
import pathlib
import socket
import sys
import threading
import typing as t

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "sandbox"))

from load import DONE, FAILED, TRUNCATED, Load, ask, main  # after the path is set


class Server(http.server.ThreadingHTTPServer):
    """A model server that can be told how to fail; ``seen`` are the requests."""

    daemon_threads = True
    fault = ""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, t.Any], str]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return "http://127.0.0.1:%d" % self.server_address[1]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: t.Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, self.headers.get("Authorization", "")))
        fault, tokens = self.server.fault, body["max_tokens"]
        if fault == "refused":
            self.send_response(503)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"busy")
        elif fault == "silent":
            self.close_connection = True
        elif body.get("stream"):
            self._stream(fault, tokens)
        else:
            self._plain(fault, tokens)

    def _plain(self, fault: str, tokens: int) -> None:
        found = {"usage": {"completion_tokens": tokens - (fault == "short")}}
        data = b"not JSON" if fault == "garbage" else json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = True

    def _stream(self, fault: str, tokens: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        chunked = fault != "unchunked"
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def say(text: str) -> None:
            data = text.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

        for number in range(tokens - (fault == "short")):
            say('data: {"choices": [{"text": "x"}]}\n\n')
            if number == 2 and fault in ("cut", "unchunked"):
                self.close_connection = True
                return
            if number == 2 and fault == "half":
                say('data: {"choi')
                break
            if number == 2 and fault == "error":
                say('data: {"error": {"message": "engine died"}}\n\n')
        if fault not in ("open", "half"):
            say("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


@pytest.fixture
def server() -> t.Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_whole_answer(server: Server, streamed: bool) -> None:
    answer = ask(server.url, "llama", streamed=streamed, tokens=8, headers={"Authorization": "Bearer k"})
    assert (answer.outcome, answer.status, answer.why) == (DONE, 200, "")
    ((body, key),) = server.seen
    assert (body["model"], body["max_tokens"], body["ignore_eos"], key) == ("llama", 8, True, "Bearer k")
    assert bool(body.get("stream")) is streamed


@pytest.mark.parametrize(
    "streamed, fault, outcome, says",
    [
        (False, "refused", FAILED, "HTTP 503: busy"),
        (True, "refused", FAILED, "HTTP 503: busy"),
        (False, "silent", FAILED, "RemoteDisconnected"),
        (True, "silent", FAILED, "RemoteDisconnected"),
        (False, "cut", TRUNCATED, "IncompleteRead"),
        (False, "garbage", TRUNCATED, "8 bytes that are no completion"),
        (False, "short", TRUNCATED, "7 of 8 tokens"),
        (True, "cut", TRUNCATED, "no last line after 3 pieces"),
        (True, "unchunked", TRUNCATED, "no last line after 3 pieces"),
        (True, "open", TRUNCATED, "no last line after 8 pieces"),
        (True, "half", TRUNCATED, "half a line after 3 pieces"),
        (True, "error", FAILED, "an error in the stream after 3 pieces: {'message': 'engine died'}"),
        (True, "short", TRUNCATED, "7 of 8 tokens"),
    ],
)
def test_every_way_to_lose_one_is_noticed(server: Server, streamed: bool, fault: str, outcome: str, says: str) -> None:
    server.fault = fault
    answer = ask(server.url, "llama", streamed=streamed, tokens=8)
    assert answer.outcome == outcome and says in answer.why
    assert says in answer.line() and "llama" in answer.line()


def test_nobody_there() -> None:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        answer = ask("http://127.0.0.1:%d" % free.getsockname()[1], "llama", streamed=False, tokens=8)
    assert (answer.outcome, answer.status) == (FAILED, 0) and "ConnectionRefusedError" in answer.why


def test_clients_count_each_kind_and_say_what_was_lost(server: Server) -> None:
    with Load(server.url, ["llama", "qwen"], stream_tokens=5) as load:
        _wait(lambda: load.count(streamed=False).asked >= 8 and load.count(streamed=True).asked >= 8)
    load.check(least=8)
    assert {body["model"] for body, _key in server.seen} == {"llama", "qwen"}
    assert load.count().failed == load.count().truncated == 0 and load.longest > 0
    assert load.count().asked == load.count(streamed=True).asked + load.count(streamed=False).asked
    with pytest.raises(AssertionError, match=r"only \d+ plain requests were made"):
        load.check(least=10**6)
    server.fault = "cut"
    with Load(server.url, ["llama"], stream_tokens=5) as load:
        _wait(lambda: load.count(streamed=True).asked >= 3)
    assert load.count(streamed=True).truncated == load.count(streamed=True).asked
    with pytest.raises(AssertionError, match=r"(?s)0 failed and \d+ truncated of \d+ requests:.*no last line"):
        load.check()
    assert load.as_dict()["streamed"]["truncated"] >= 3 and load.as_dict()["bad"]


def test_by_hand(server: Server, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, output = tmp_path / "key", tmp_path / "out.json"
    key.write_text("sk-1\n")
    arguments = [server.url, "llama", "--seconds", "0.2", "--stream-tokens", "5", "--output", str(output)]
    assert main([*arguments, "--key", str(key)]) == 0
    assert {authorization for _body, authorization in server.seen} == {"Bearer sk-1"}
    assert json.loads(output.read_text()) == json.loads(capsys.readouterr().out)
    server.fault = "refused"
    assert main(arguments) == 1
    assert "HTTP 503" in capsys.readouterr().err


def _wait(condition: t.Callable[[], bool]) -> None:
    pause = threading.Event()
    for _number in range(600):
        if condition():
            return
        pause.wait(0.05)
    raise AssertionError("not within 30 s")
