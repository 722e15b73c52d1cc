# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds and starts the outside world (tests/sandbox/world): registry, package repositories and names that hosts see."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from . import images
from .common import NETWORK, ROOT, SOURCE, WORLD_ADDRESS, SandboxError, digest, say, step, write_text
from .engine import docker

BUILDER = SOURCE / "world" / "build.py"
SERVICE = SOURCE / "world" / "service"
REPOSITORIES = SOURCE / "repositories" / "build.py"
CONTAINER = "world"
LABEL = "gpu_fleet.sandbox.world"
# Written when the world is complete: what it was made from, and which container it is.
STAMP = ROOT / "world-ready"
# What a later `up` builds on when `down --keep-images` was asked for.
KEEP = {"world", "repositories", "repositories-build", "repositories-key", "cache"}


def _call(*command: str) -> str:
    """Run one of the world's programs; its progress lines pass through, its standard output is returned."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(process.stdout.read)
        errors = []
        for line in process.stderr:
            errors.append(line)
            if line.startswith(("world:", "repositories:")):
                say(line.rstrip())
    if process.wait() != 0:
        text = "".join(errors)[-2000:].strip()
        raise SandboxError("%s: exit %d\n%s" % (" ".join(command[:2]), process.returncode, text))
    return output.result()


def _build(word: str, *arguments: str) -> str:
    return _call(str(BUILDER), word, "--state", str(ROOT), *arguments)


def _repositories() -> None:
    with step("package repositories"):
        _call(str(REPOSITORIES), "--output", str(ROOT / "repositories"))


def _standin() -> None:
    with step("stand-in NIM images"):
        _build("standin")


def _container() -> None:
    with step("image world"):
        image = json.loads(_build("image"))
        if not images.exists(image["tag"]):
            docker("import", image["tar"], image["tag"])
    code = digest([SERVICE])
    label = json.dumps([image["tag"], image["command"], image["run_arguments"]])
    state = docker(
        *("ps", "--all", "--filter=name=^%s$" % CONTAINER),
        '--format={{.State}}|{{.Label "%s"}}|{{.Label "%s.code"}}' % (LABEL, LABEL),
    )
    wanted = digest([], label)
    if state == "running|%s|%s" % (wanted, code):
        return
    docker("rm", "--force", "--volumes", CONTAINER, check=False)
    docker(
        *("run", "--detach", "--name=%s" % CONTAINER, "--hostname=world", "--restart=always"),
        *("--label=%s=%s" % (LABEL, wanted), "--label=%s.code=%s" % (LABEL, code)),
        *("--network=%s" % NETWORK, "--ip=%s" % WORLD_ADDRESS, "--security-opt=apparmor=unconfined"),
        *(*image["run_arguments"], image["tag"], *image["command"]),
    )


def start() -> None:
    """Build what is missing of the world, start it, and fill its registry; meanwhile the hosts' base image is made."""
    if not BUILDER.exists():
        say("no world in this checkout: hosts only")
        return
    made_from = digest([BUILDER.parent, REPOSITORIES.parent])
    identity = docker("ps", "--quiet", "--no-trunc", "--filter=name=^%s$" % CONTAINER)
    if identity and STAMP.exists() and STAMP.read_text() == made_from + identity and answers(443):
        return
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(job) for job in (_container, images.base, _standin, _repositories)]
        for job in jobs:
            job.result()
    with step("world"):
        _build("wait", "--address", WORLD_ADDRESS)
        _build("publish", "--address", WORLD_ADDRESS)
    write_text(STAMP, made_from + docker("ps", "--quiet", "--no-trunc", "--filter=name=^%s$" % CONTAINER))


def answers(port: int) -> bool:
    """True when the world accepts connections on a port."""
    try:
        with socket.create_connection((WORLD_ADDRESS, port), timeout=0.5):
            return True
    except OSError:
        return False


def report() -> str:
    """One line about the world."""
    state = docker("ps", "--all", "--filter=name=^%s$" % CONTAINER, "--format={{.Status}}")
    ports = [str(port) for port in (53, 80, 443, 3142, 5000) if answers(port)]
    return "world: %s, %s, answers on ports %s" % (WORLD_ADDRESS, state or "not there", ", ".join(ports) or "none")


def resolver() -> str:
    """The machine's own name servers, for hosts in a sandbox without a world."""
    with open("/etc/resolv.conf", encoding="utf-8") as lines:
        return "".join(line for line in lines if line.startswith("nameserver")) or os.linesep
