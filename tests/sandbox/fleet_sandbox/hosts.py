# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""GPU hosts: containers with systemd, sshd and an address, made, started, stopped, paused and removed."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import socket
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import gpus, images, inventory, world
from .common import NETWORK, ROOT, WORLD_ADDRESS, SandboxError, locked, run, say, step
from .engine import docker

LABEL = "gpu_fleet.sandbox.host"
PREFIX = "host-"
H200 = "NVIDIA H200:143771:%d"
# What `up` builds unless told otherwise; further gpuNN are like gpu02.
DEFAULTS = {"gpu01": ("ubuntu2404", H200 % 2)}
FALLBACK = ("debian13", H200 % 1)
CAPABILITIES = (
    "SYS_ADMIN",
    "NET_ADMIN",
    "NET_RAW",
    "SYS_PTRACE",
    "SYS_CHROOT",
    "MKNOD",
    "SETFCAP",
    "DAC_READ_SEARCH",
    "SYS_NICE",
    "SYS_BOOT",
    "SYSLOG",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SYS_MODULE",
    "IPC_LOCK",
)
APT_PROXY_PORT = 3142


def ensure_key() -> None:
    """The key pair with which Ansible enters the hosts."""
    if not inventory.KEY.exists():
        inventory.SSH.mkdir(parents=True, exist_ok=True)
        inventory.SSH.chmod(0o700)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "gpu-fleet-sandbox", "-f", str(inventory.KEY)])


def _host_key(name: str) -> tuple[str, str]:
    """Private and public SSH host key of a new host, made here so that it is known before the first connection."""
    path = inventory.SSH / ("host-%s" % name)
    for old in (path, path.with_suffix(".pub")):
        old.unlink(missing_ok=True)
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)])
    public = path.with_name(path.name + ".pub")
    private_text, public_text = path.read_text(), public.read_text()
    path.unlink()
    public.unlink()
    return private_text, public_text


def _resolver() -> str:
    """resolv.conf of the hosts: the world's name server, or the machine's as long as there is no world."""
    return "nameserver %s\n" % WORLD_ADDRESS if world.answers(53) else world.resolver()


def _files(name: str, address: str, hardware: dict[str, Any], private: str, public: str) -> bytes:
    """A tar archive with everything that makes this host differ from its image."""
    hosts = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n%s %s\n" % (address, name)
    content = [
        ("etc/sandbox/hosts", hosts, 0o644),
        ("etc/sandbox/hostname", name + "\n", 0o644),
        ("etc/sandbox/resolv.conf", _resolver(), 0o644),
        ("etc/sandbox/hardware.json", json.dumps(hardware, indent=2) + "\n", 0o644),
        ("root/.ssh/authorized_keys", inventory.KEY.with_suffix(".pub").read_text(), 0o600),
        ("etc/ssh/ssh_host_ed25519_key", private, 0o600),
        ("etc/ssh/ssh_host_ed25519_key.pub", public, 0o644),
    ]
    if world.answers(APT_PROXY_PORT):
        # For Debian's own packages only: the hosts' other repositories are reached as in production.
        proxy = 'Acquire::http::Proxy::deb.debian.org "http://%s:%d";\n' % (WORLD_ADDRESS, APT_PROXY_PORT)
        content.append(("etc/apt/apt.conf.d/01sandbox-proxy", proxy, 0o644))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        directory = tarfile.TarInfo("root/.ssh")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(directory)
        for path, text, mode in content:
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.mtime = len(text.encode()), mode, int(time.time())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def states() -> dict[str, str]:
    """Name -> "running", "off" (it powered itself off), or Docker's word ("paused", "exited", ...) of the hosts."""
    names = docker("ps", "--all", "--quiet", "--filter=label=%s" % LABEL).split()
    if not names:
        return {}
    form = '{{index .Config.Labels "%s"}} {{.State.Status}} {{.State.Pid}}' % LABEL
    found = {}
    for line in docker("inspect", "--format=%s" % form, *names, check=False).splitlines():
        name, state, number = line.split()
        if state == "running":
            # PID 1 of a host that powered itself off is the boot script's "sleep".
            with contextlib.suppress(OSError):
                if pathlib.Path("/proc/%s/comm" % number).read_text() == "sleep\n":
                    state = "off"
        found[name] = state
    return found


def add(
    names: list[str], *, scenario: str = "", image: str = "", specification: str = "", settings: list[str] | None = None
) -> None:
    """Make hosts that do not exist yet, start those that are down, and return when SSH answers on all of them."""
    ensure_key()
    wanted = [inventory.full_name(scenario, name) for name in names]
    fresh: dict[str, str] = {}
    with locked():
        table = inventory.load()
        found = states()
        for short, name in zip(names, wanted):
            # "created": an earlier command was interrupted before the host was complete.
            if name in table and found.get(name, "created") != "created":
                continue
            if name in table:
                del table[name]
            default_image, default_gpus = DEFAULTS.get(short, FALLBACK)
            private, public = _host_key(name)
            table[name] = {
                "address": inventory.allocate(name, {host["address"] for host in table.values()}),
                "image": image or default_image,
                "hardware": gpus.describe(name, specification or default_gpus, settings or []),
                "host_key": " ".join(public.split()[:2]),
                "scenario": scenario,
            }
            fresh[name] = private
        old = [n for n in wanted if n not in fresh and table[n].get("reference") != images.host(table[n]["image"])]
        if old:
            say("made from an older image, and left as they are: %s (to renew: remove, then up)" % " ".join(old))
        references = {kind: images.host(kind) for kind in {table[name]["image"] for name in fresh}}
        for name in fresh:
            table[name]["reference"] = references[table[name]["image"]]
        inventory.save(table)
    with step("hosts %s" % " ".join(wanted)), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: _make(name, table[name], fresh[name]), fresh))
        for name in wanted:
            if name not in fresh and found[name] != "running":
                start(name)
        list(pool.map(lambda name: wait(name, table[name]["address"]), wanted))
    write_scenario(scenario)


def write_scenario(scenario: str) -> None:
    """Inventory file of a test scenario, next to the main one."""
    if scenario:
        path = scenario_inventory(scenario)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(inventory.render(inventory.select(inventory.load(), scenario)))


def scenario_inventory(scenario: str) -> pathlib.Path:
    """Where the inventory of a scenario lies."""
    return ROOT / "inventories" / ("%s.yml" % scenario) if scenario else inventory.INVENTORY


def _make(name: str, host: dict[str, Any], private: str) -> None:
    docker("rm", "--force", "--volumes", PREFIX + name, check=False)
    command = ["create", "--name=%s%s" % (PREFIX, name), "--hostname=%s" % name, "--label=%s=%s" % (LABEL, name)]
    command += ["--network=%s" % NETWORK, "--ip=%s" % host["address"], "--restart=always", "--cgroupns=private"]
    command += ["--stop-signal=SIGRTMIN+3"]
    command += ["--cap-add=%s" % capability for capability in CAPABILITIES]
    command += ["--security-opt=%s=unconfined" % what for what in ("seccomp", "apparmor", "systempaths")]
    command += ["--tmpfs=/run:exec", "--tmpfs=/run/lock", "--volume=/var/lib/docker", "--volume=/var/lib/containerd"]
    docker(*command, host["reference"])
    docker(
        "cp",
        "-",
        "%s%s:/" % (PREFIX, name),
        stdin=_files(name, host["address"], host["hardware"], private, host["host_key"] + "\n"),
    )
    docker("start", PREFIX + name)


def wait(name: str, address: str, timeout: float = 30.0) -> None:
    """Return when sshd of the host greets."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            with socket.create_connection((address, 22), timeout=1) as connection:
                if connection.recv(4) == b"SSH-":
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise SandboxError(
        "host %s does not answer with SSH on %s after %d s; see: sandbox.py exec %s -- journalctl -b"
        % (name, address, timeout, name)
    )


def _known(name: str) -> dict[str, Any]:
    table = inventory.load()
    if name not in table:
        raise SandboxError("host %s: unknown; there are: %s" % (name, ", ".join(sorted(table)) or "none"))
    return table[name]


def remove(names: list[str]) -> None:
    """Remove hosts with their data."""
    with step("removing %s" % " ".join(names)), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: docker("rm", "--force", "--volumes", PREFIX + name, check=False), names))
    with locked():
        table = inventory.load()
        scenarios = {table.pop(name, {}).get("scenario", "") for name in names}
        inventory.save(table)
    for scenario in scenarios - {""}:
        if inventory.select(inventory.load(), scenario):
            write_scenario(scenario)
        else:
            scenario_inventory(scenario).unlink(missing_ok=True)


def stop(name: str, power_cut: bool = False) -> None:
    """Shut a host down in order, or cut its power."""
    _known(name)
    with step("stopping %s" % name):
        docker(*(("kill",) if power_cut else ("stop", "--time=60")), PREFIX + name)


def start(name: str) -> None:
    """Switch a host on (also after it powered itself off) and wait for SSH."""
    host = _known(name)
    state = states().get(name, "missing")
    if state == "paused":
        docker("unpause", PREFIX + name)
    elif state != "running":
        docker("kill", PREFIX + name, check=False)
        empty = io.BytesIO()
        with tarfile.open(fileobj=empty, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("etc/sandbox/powered-on"), io.BytesIO())
        docker("cp", "-", "%s%s:/" % (PREFIX, name), stdin=empty.getvalue())
        docker("start", PREFIX + name)
    with step("waiting for %s" % name):
        wait(name, host["address"])


def pause(name: str) -> None:
    """Freeze a host: it keeps its state and answers nobody."""
    _known(name)
    docker("pause", PREFIX + name)
