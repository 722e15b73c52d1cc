# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A service that was ready and is silent: one that serves no more is told from one that is only busy."""

from __future__ import annotations

import contextlib
import socket
import threading
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_silence
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_silence import why_silent
from fake_host import FakeHost

CPU = "/sys/fs/cgroup/system.slice/docker-c1.scope/cpu.stat"


class Busy(FakeHost):
    """A host whose container uses a share of one processor."""

    def __init__(self, share: float) -> None:
        super().__init__({"/proc/77/cgroup": "0::/system.slice/docker-c1.scope\n"})
        self.share = share
        self.used = 0.0
        self.sleep(0)

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.used += seconds * self.share
        self.files[CPU] = b"usage_usec %d\nuser_usec 5\n" % round(self.used * 1e6)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nim_silence, "PROBE_SECONDS", 0.1)


@contextlib.contextmanager
def server(*answers: bytes | None) -> t.Iterator[str]:
    """Answers in turn, the last one for ever; None keeps the caller waiting, no bytes hang up."""
    held = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)

        def serve() -> None:
            left = list(answers)
            while True:
                try:
                    connection, _address = listener.accept()
                except OSError:
                    return
                answer = left.pop(0) if len(left) > 1 else left[0]
                if answer is None:
                    held.append(connection)
                    continue
                if answer:
                    connection.recv(4096)
                    connection.sendall(answer)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield "http://127.0.0.1:%d/v1/health/ready" % listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


def status(code: int) -> bytes:
    return b"HTTP/1.1 %d Whatever\r\nContent-Length: 0\r\n\r\n" % code


def test_one_that_says_it_is_ready_costs_no_second_question() -> None:
    host = Busy(0.0)
    with server(status(200)) as address:
        assert why_silent(host, address, 77) == ""
    assert host.clock == FakeHost().clock


def test_nobody_listens() -> None:
    host = Busy(1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert why_silent(host, "http://127.0.0.1:%d/v1/health/ready" % port, 77) == (
        "it was ready, and nobody has listened on its port for 15 seconds"
    )
    assert host.clock - FakeHost().clock >= 15


def test_docker_proxy_takes_the_call_and_hangs_up() -> None:
    with server(b"") as address:
        assert "nobody has listened" in why_silent(Busy(1.0), address, 77)


def test_it_says_itself_that_it_cannot_serve() -> None:
    with server(status(503)) as address:
        assert why_silent(Busy(1.0), address, 77) == (
            "it was ready, and has said for 15 seconds that it cannot serve (HTTP 503)"
        )
    # It may come back, and any other answer is one of a server that is there.
    with server(status(503), status(503), status(200)) as address:
        assert why_silent(Busy(1.0), address, 77) == ""
    for code in (429, 504):
        with server(status(code)) as address:
            assert why_silent(Busy(1.0), address, 77) == ""
    with server(b"SSH-2.0-OpenSSH_9.2\r\n") as address:
        assert why_silent(Busy(1.0), address, 77) == ""


def test_a_busy_one_is_left_alone_and_soon() -> None:
    host = Busy(0.9)
    with server(None) as address:
        assert why_silent(host, address, 77) == ""
    assert host.clock - FakeHost().clock < 5


def test_one_that_stands_still_is_not_busy() -> None:
    with server(None) as address:
        assert why_silent(Busy(0.001), address, 77) == (
            "it was ready, has not answered for 15 seconds and has used no processor time"
        )


def test_what_is_not_known_restarts_nobody() -> None:
    with server(None) as address:
        assert why_silent(FakeHost(), address, 77) == ""
        assert why_silent(Busy(0.0), address, 0) == ""
    assert why_silent(FakeHost(), "", 77) == ""
    assert why_silent(FakeHost(), "http://[::1", 77) == ""


def test_processor_time_of_older_control_groups() -> None:
    host = FakeHost(
        {
            "/proc/7/cgroup": "5:cpu,cpuacct:/docker/c1\n1:name=systemd:/docker/c1\n0::/docker/c1\n",
            "/sys/fs/cgroup/cpuacct/docker/c1/cpuacct.usage": "2500000000\n",
        }
    )
    assert _nim_silence.processor_seconds(host, 7) == 2.5
    host.files["/sys/fs/cgroup/cpuacct/docker/c1/cpuacct.usage"] = b"x"
    assert _nim_silence.processor_seconds(host, 7) is None
