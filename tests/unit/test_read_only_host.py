# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that is only looked at: everything once, and the slow questions first."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import threading
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import INFO, VERSION
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import CHAIN
from ansible_collections.gpu_fleet.nim.plugins.module_utils._package_versions import DPKG_QUERY
from ansible_collections.gpu_fleet.nim.plugins.module_utils._read_only_host import (
    DockerLook,
    ReadOnlyHost,
    ask_early,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._systemd import UNITS
from fake_host import FakeHost

GPU = {
    "/sys/bus/pci/devices/0000:1b:00.0/vendor": "0x10de\n",
    "/sys/bus/pci/devices/0000:1b:00.0/class": "0x030200\n",
    "/sys/bus/pci/devices/0000:1b:00.0/device": "0x2335\n",
}
DRIVER = {
    "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
}
DEBIAN = {"/etc/os-release": "ID=debian\n"}
DOCKERD = {"/var/run/docker.pid": "812", "/proc/812/comm": "dockerd\n"}


class Asked(DockerLook):
    """Notes which questions are sent early."""

    def __init__(self) -> None:
        super().__init__()
        self.early: list[str] = []

    def ask_early(self, path: str) -> None:
        self.early.append(path)


def asked(files: dict[str, str], resources: t.Sequence[str] = CHAIN) -> tuple[FakeHost, list[str]]:
    host, api = FakeHost(dict(files)), Asked()
    ask_early(ReadOnlyHost(host), api, resources)
    assert not host.calls, "an early question was waited for"
    return host, api.early


def test_what_takes_long_is_started_first() -> None:
    long = 60 * "x"
    configured = dict.fromkeys(("/etc/nim/%s.json" % name for name in ("Llama_3.1", "x y", long, long + "x")), "{}")
    host, early = asked({**GPU, **DRIVER, **DOCKERD, **DEBIAN, **configured})
    units, *others = host.started
    assert units[-len(UNITS) - 3 :] == (*UNITS, "nim.target", "nim-Llama_3.1.service", "nim-%s.service" % long)
    # Not nvidia-smi, which holds the GPUs while it runs: the plan would take it for somebody who uses them.
    assert others == [DPKG_QUERY]
    assert early == [INFO, VERSION]


def test_a_host_without_dpkg_is_not_asked_for_its_packages() -> None:
    host, early = asked({**GPU, **DOCKERD, "/etc/os-release": "ID=rocky\nID_LIKE=rhel\n"})
    assert DPKG_QUERY not in host.started
    assert early == [INFO, VERSION]


def test_asking_starts_nothing_on_the_host() -> None:
    # The socket would start the daemon.
    assert asked({**GPU, "/var/run/docker.pid": "812", "/proc/812/comm": "bash\n"})[1] == []
    assert asked({**GPU, "/var/run/docker.pid": "../1"})[1] == []


def test_what_cannot_be_read_fails_no_early_question() -> None:
    class Pipe(FakeHost):
        def read_bytes(self, path: str) -> bytes | None:
            if path == "/var/run/docker.pid":
                raise FleetError("unreadable", "Reading it failed.")
            return super().read_bytes(path)

    for host in (Pipe({**GPU, **DEBIAN}), FakeHost(dict(GPU))):
        ask_early(ReadOnlyHost(host), Asked(), CHAIN)
        assert [argv[0] for argv in host.started] == ["systemctl"]


@pytest.mark.parametrize(("files", "resources"), [({}, CHAIN), (GPU, ["docker_engine"]), (GPU, ["nvidia_driver"])])
def test_who_is_not_asked_later_is_not_asked_early(files: dict[str, str], resources: t.Sequence[str]) -> None:
    host, early = asked({**DRIVER, **DOCKERD, **files}, resources)
    assert (host.started, early) == ([], [])


def test_a_command_that_was_started_is_not_run_again() -> None:
    host = FakeHost(commands={"tool": "answer"})
    looked_at = ReadOnlyHost(host)
    looked_at.start_early(["tool"])
    assert [looked_at.run(["tool"]).stdout, looked_at.run(["tool"]).stdout] == ["answer", "answer"]
    assert looked_at.run(["tool"], env={"A": "1"}).stdout == "answer"
    assert (host.started, host.calls) == ([("tool",)], [("tool",), ("tool",)])
    with pytest.raises(AssertionError):
        looked_at.start(["tool"])


class Dockerd:
    """Answers every connection once with the same text, and counts them."""

    def __init__(self, path: pathlib.Path, answer: bytes) -> None:
        self.answer = answer
        self.requests: list[str] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _address = self.listener.accept()
            except OSError:
                return
            # One who has forgotten the question reads no answer.
            with connection, contextlib.suppress(BrokenPipeError):
                self.requests.append(connection.recv(4096).decode().split()[1])
                connection.sendall(self.answer)


@pytest.fixture
def api(tmp_path: pathlib.Path) -> t.Iterator[DockerLook]:
    found = DockerLook()
    found.socket_path = str(tmp_path / "docker.sock")
    yield found


def test_an_early_question_is_the_question(api: DockerLook) -> None:
    dockerd = Dockerd(pathlib.Path(api.socket_path), b'HTTP/1.0 200 OK\r\n\r\n{"Version": "26.1.5"}')
    api.ask_early(VERSION)
    assert [api.version()["Version"], api.version()["Version"]] == ["26.1.5", "26.1.5"]
    assert dockerd.requests == [VERSION]


def test_what_goes_wrong_with_an_early_question_is_said_when_it_counts(api: DockerLook) -> None:
    api.ask_early(INFO)
    with pytest.raises(FleetError, match="there is no such socket"):
        api.info()
    dockerd = Dockerd(pathlib.Path(api.socket_path), b"")
    api.ask_early(INFO)
    with pytest.raises(FleetError, match=r"Asking Docker at .* for /info failed"):
        api.info()
    dockerd.answer = b'HTTP/1.0 200 OK\r\n\r\n{"Driver": "overlay2"}'
    assert api.info() == {"Driver": "overlay2"}


def test_what_is_forgotten_is_asked_anew(api: DockerLook) -> None:
    dockerd = Dockerd(pathlib.Path(api.socket_path), b'HTTP/1.0 200 OK\r\n\r\n{"Driver": "overlay2"}')
    api.ask_early(INFO)
    api.forget()
    assert api.info() == {"Driver": "overlay2"}
    assert dockerd.requests == [INFO, INFO]
