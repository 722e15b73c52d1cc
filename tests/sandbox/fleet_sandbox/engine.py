# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The private Docker Engine below the sandbox: own data, socket, mounts and cgroup; nothing outside .sandbox is touched.

dockerd gets no say over the machine's packet filter (`--iptables=false`): one nftables table and one switch
(ip_forward) are all that the sandbox changes there, and `down` puts both back.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

from .common import (
    BRIDGE,
    GATEWAY,
    NETWORK,
    ROOT,
    SOURCE,
    SUBNET,
    SandboxError,
    digest,
    output_of,
    read_json,
    run,
    say,
    step,
    write_text,
)

SOCKET = ROOT / "docker.sock"
PIDFILE = ROOT / "dockerd.pid"
STATE = ROOT / "state.json"
NETWORKS = pathlib.Path("/sys/class/net")
DATA = ROOT / "docker"
EXEC_ROOT = ROOT / "run"
LOG = ROOT / "dockerd.log"
NFT_TABLE = "gpu_fleet_sandbox"
# Program -> Debian package that has it.
NEEDS = {
    "dockerd": "docker.io",
    "iptables": "iptables",
    "nft": "nftables",
    "mmdebstrap": "mmdebstrap",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
    "openssl": "openssl",
    "gpg": "gnupg",
    "gcc": "gcc",
}
HEADERS = pathlib.Path("/usr/include/stdio.h")  # libc6-dev, for the stand-ins written in C


def install_needs() -> None:
    """Install the Debian packages that the sandbox runs on, when they are missing."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = sorted({package for program, package in NEEDS.items() if shutil.which(program, path=path) is None})
    if not HEADERS.exists():
        missing.append("libc6-dev")
    if not missing:
        return
    if os.geteuid() != 0:
        raise SandboxError("the sandbox needs root (network, mounts, %s): run it as root" % ", ".join(missing))
    if shutil.which("apt-get") is None:
        raise SandboxError("not found: %s; install them (this machine has no apt-get)" % ", ".join(missing))
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    with step("installing %s" % " ".join(missing)):
        options = ["-q", "-y", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"]
        # A repository of the machine that cannot be reached matters only if a package is then missing.
        run(["apt-get", "update", *options], env=quiet, check=False)
        # --no-install-recommends and the policy below: no second, public Docker Engine is started on this machine.
        policy = pathlib.Path("/usr/sbin/policy-rc.d")
        ours = not policy.exists()
        if ours:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            run(["apt-get", "install", "--no-install-recommends", *options, *missing], env=quiet)
        finally:
            if ours:
                policy.unlink()


def docker(*arguments: str, check: bool = True, stdin: bytes | None = None) -> str:
    """Call the docker client on the private engine and return its standard output."""
    return run([client(), *arguments], check=check, stdin=stdin).stdout.decode(errors="replace").strip()


def environment() -> dict[str, str]:
    """What another program needs in its environment to use the private engine."""
    return {"DOCKER_HOST": "unix://%s" % SOCKET, "DOCKER_CONFIG": str(ROOT / "docker-config")}


def client() -> str:
    """Path of the docker client; its environment is set to the private engine."""
    os.environ.update(environment())
    for candidate in ("/usr/bin/docker", "docker"):
        found = shutil.which(candidate)
        if found:
            return found
    raise SandboxError("no docker client found; install docker.io (or docker-cli)")


def pid() -> int | None:
    """Process id of the running private dockerd."""
    try:
        number = int(PIDFILE.read_text())
        command = pathlib.Path("/proc/%d/cmdline" % number).read_bytes()
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    return number if b"dockerd" in command and str(DATA).encode() in command else None


def answers() -> bool:
    """True when the private engine answers on its socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(2)
    try:
        connection.connect(str(SOCKET))
        connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
        return b"200 OK" in connection.recv(200)
    except OSError:
        return False
    finally:
        connection.close()


def _cgroup2() -> pathlib.Path:
    """Mount point of the machine's cgroup2 tree."""
    for line in pathlib.Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return pathlib.Path(fields[1])
    raise SandboxError(
        "this machine has no cgroup2 file system; mount one (kernel with CONFIG_CGROUPS, mount -t cgroup2)"
    )


def cgroup() -> pathlib.Path:
    """The cgroup that holds dockerd, containerd and every process of every host."""
    return _cgroup2() / ("gpu-fleet-sandbox-%s" % _tag())


def _tag() -> str:
    return digest([], str(ROOT))[:6]


def start() -> None:
    """Start the private dockerd unless it runs already; it outlives this command."""
    if pid() and answers():
        return
    if os.geteuid() != 0:
        raise SandboxError("the sandbox needs root for its Docker Engine and network: run it as root")
    if len(str(EXEC_ROOT)) > 70:
        raise SandboxError("path %s is too long for sockets; use a shorter path for the checkout" % EXEC_ROOT)
    if _link_exists() and docker_is_elsewhere():
        _remove_dead_link()
    # What a dockerd that died (or the machine, without warning) left behind would be taken for living.
    _end_cgroup()
    shutil.rmtree(EXEC_ROOT, ignore_errors=True)
    group = cgroup()
    group.mkdir()
    for directory in (DATA, EXEC_ROOT, ROOT / "docker-config"):
        directory.mkdir(parents=True, exist_ok=True)
    PIDFILE.unlink(missing_ok=True)
    dockerd = [
        "dockerd",
        "--data-root=%s" % DATA,
        "--exec-root=%s" % EXEC_ROOT,
        "--pidfile=%s" % PIDFILE,
        "--host=unix://%s" % SOCKET,
        "--config-file=%s" % (ROOT / "daemon.json"),
        "--bridge=none",
        "--iptables=false",
        "--ip6tables=false",
        "--ip-masq=false",
        "--ip-forward=false",
        "--storage-driver=overlay2",
        "--exec-opt=native.cgroupdriver=cgroupfs",
        "--containerd-namespace=gpu-fleet-sandbox",
        "--containerd-plugins-namespace=gpu-fleet-sandbox-plugins",
    ]
    write_text(ROOT / "daemon.json", "{}\n")
    with step("starting the private Docker Engine"), LOG.open("ab") as log:
        process = subprocess.Popen(
            [str(SOURCE / "fleet_sandbox" / "engine.sh"), "start", str(group), *dockerd],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
        )
        for dummy in range(300):
            if answers():
                break
            if process.poll() is not None:
                raise SandboxError("dockerd ended at once; the end of %s:\n%s" % (LOG, _log_tail()))
            time.sleep(0.1)
        else:
            raise SandboxError("dockerd does not answer after 30 s; the end of %s:\n%s" % (LOG, _log_tail()))


def docker_is_elsewhere() -> bool:
    """True when the bridge on this machine is not the one of this checkout's engine."""
    return not (pid() or STATE.exists())


def _living() -> list[str]:
    """Cgroups of sandboxes, of whatever checkout, in which processes run."""
    groups = _cgroup2().glob("gpu-fleet-sandbox-*/cgroup.events")
    return [str(path.parent) for path in groups if "populated 1" in path.read_text()]


def _remove_dead_link() -> None:
    """Remove the bridge of another checkout's sandbox when that one was killed without `down`; a living one is refused.

    A living one has processes in its cgroup, or hosts on its bridge.
    """
    living = _living()
    hosts = sorted(path.name for path in (NETWORKS / BRIDGE / "brif").glob("*"))
    if living or hosts:
        raise SandboxError(
            "network interface %s exists already: another sandbox runs on this machine (%s); stop it there first "
            "(sandbox.py down)" % (BRIDGE, ", ".join(living + hosts))
        )
    with step("removing the network interface %s that a sandbox which was killed has left" % BRIDGE):
        run(["ip", "link", "del", BRIDGE])


def _log_tail() -> str:
    return "\n".join(LOG.read_text(errors="replace").splitlines()[-12:])


def _link_exists() -> bool:
    return BRIDGE in {name for dummy, name in socket.if_nameindex()}


def start_network() -> None:
    """Create the bridge network of the hosts and let it reach the outside through the machine."""
    if not docker("network", "ls", "--quiet", "--filter", "name=^%s$" % NETWORK):
        _check_subnet_free()
        docker(
            *("network", "create", "--driver=bridge", "--subnet=%s" % SUBNET, "--gateway=%s" % GATEWAY),
            *("--opt=com.docker.network.bridge.name=%s" % BRIDGE, NETWORK),
        )
    forward = pathlib.Path("/proc/sys/net/ipv4/ip_forward")
    state = read_json(STATE, {})
    if "ip_forward" not in state:
        state["ip_forward"] = forward.read_text().strip()
        write_text(STATE, json.dumps(state) + "\n")
    if forward.read_text().strip() != "1":
        forward.write_text("1\n")
    rules = """
        add table ip {table}
        delete table ip {table}
        table ip {table} {{
          chain forward {{
            type filter hook forward priority 0; policy accept;
            tcp flags syn tcp option maxseg size set rt mtu
          }}
          chain postrouting {{
            type nat hook postrouting priority 100; policy accept;
            ip saddr {subnet} ip daddr != {subnet} masquerade
          }}
        }}
    """.format(table=NFT_TABLE, subnet=SUBNET)
    run(["nft", "-f", "-"], stdin=rules.encode())
    _pass_other_firewall(add=True)


def _pass_other_firewall(add: bool) -> None:
    """Where the machine runs a Docker Engine of its own, that drops what it does not know: let the hosts pass there."""
    if run(["iptables", "-w", "-n", "-L", "DOCKER-USER"], check=False).returncode != 0:
        return
    for rule in (["-i", BRIDGE, "-j", "ACCEPT"], ["-o", BRIDGE, "-j", "ACCEPT"]):
        there = run(["iptables", "-w", "-C", "DOCKER-USER", *rule], check=False).returncode == 0
        if add and not there:
            run(["iptables", "-w", "-I", "DOCKER-USER", *rule])
        elif there and not add:
            run(["iptables", "-w", "-D", "DOCKER-USER", *rule])


def _check_subnet_free() -> None:
    wanted = ipaddress.ip_network(SUBNET)
    for line in output_of(["ip", "-o", "-4", "route", "show"]).splitlines():
        words = line.split()
        try:
            route = ipaddress.ip_network(words[0], strict=False)
        except ValueError:
            continue
        if route.prefixlen > 8 and route.overlaps(wanted) and BRIDGE not in words:
            raise SandboxError(
                "network %s of the sandbox is in use on this machine (%s); free it first" % (SUBNET, line)
            )


def stop(keep_images: bool) -> None:
    """Stop the engine with everything in it; put the machine's network back as it was."""
    if keep_images and answers():
        names = docker("ps", "--all", "--quiet").split()
        if names:
            with step("removing %d containers" % len(names)):
                docker("rm", "--force", "--volumes", *names)
        docker("network", "rm", NETWORK, check=False)
        docker("volume", "prune", "--force", check=False)
        number = pid()
        if number:
            with step("stopping the Docker Engine"):
                os.kill(number, signal.SIGTERM)
                for dummy in range(100):
                    if pid() is None:
                        break
                    time.sleep(0.1)
    _end_cgroup()
    # Else the interface, the rules and the switch are another sandbox's, which may have taken them over from this one when
    # this one had been killed.
    if not docker_is_elsewhere() and not _living():
        _restore_network()
    for path in (SOCKET, PIDFILE, STATE, ROOT / "daemon.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(EXEC_ROOT, ignore_errors=True)


def _restore_network() -> None:
    if _link_exists():
        run(["ip", "link", "del", BRIDGE], check=False)
    _pass_other_firewall_safely()
    if shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin") is not None:
        run(["nft", "delete", "table", "ip", NFT_TABLE], check=False)
    if read_json(STATE, {}).get("ip_forward") == "0":
        pathlib.Path("/proc/sys/net/ipv4/ip_forward").write_text("0\n")


def _pass_other_firewall_safely() -> None:
    if shutil.which("iptables", path=os.environ.get("PATH", "") + ":/usr/sbin") is not None:
        _pass_other_firewall(add=False)


def _end_cgroup() -> None:
    """End every process below the sandbox's cgroup and remove it."""
    try:
        group = cgroup()
    except SandboxError:
        return
    if not group.exists():
        return
    with step("ending the processes of the sandbox"):
        kill = group / "cgroup.kill"
        for attempt in range(100):
            if kill.exists():
                kill.write_text("1")
            else:  # kernel < 5.14
                for procs in group.rglob("cgroup.procs"):
                    for number in procs.read_text().split():
                        os.kill(int(number), signal.SIGKILL)
            if "populated 0" in (group / "cgroup.events").read_text():
                break
            time.sleep(0.02 * min(attempt + 1, 10))
        for directory in sorted((d for d in group.rglob("*") if d.is_dir()), key=lambda d: -len(d.parts)):
            directory.rmdir()
        group.rmdir()


def report() -> str:
    """One line about the engine."""
    if not answers():
        return "engine: not running"
    return "engine: %s, cgroup version %s, pid %s, socket %s" % (
        docker("version", "--format", "{{.Server.Version}}"),
        docker("info", "--format", "{{.CgroupVersion}}"),
        pid(),
        SOCKET,
    )


def warn_if_small() -> None:
    """Say so when the disk is nearly full."""
    free = shutil.disk_usage(ROOT).free
    if free < 5 * 2**30:
        say("warning: only %.1f GB free below %s; the sandbox needs about 5 GB" % (free / 2**30, ROOT))
