# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images of the sandbox's hosts, each named after a hash of what it is made from, so that it is built once."""

from __future__ import annotations

import inspect
import os
import pathlib
import platform
import shutil
import subprocess
import threading

from .common import CHECKOUT, ROOT, SOURCE, SandboxError, digest, run, step
from .engine import docker, environment

FILES = SOURCE / "hosts"
HARDWARE = SOURCE / "hardware"
PACKAGE_WRITER = SOURCE / "repositories" / "deb.py"
CA = ROOT / "world" / "ca.crt"
SUITE = "trixie"
HOST_IMAGES = ("debian13", "ubuntu2404")
# Services without a place in a container: consoles, device events, the machine's own kernel settings and modules;
# and the timers that would compete with a test for apt's lock.
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "man-db.timer",
    "systemd-udevd.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udev-trigger.service",
    "systemd-sysctl.service",
    "systemd-modules-load.service",
    "systemd-logind-varlink.socket",
    "console-getty.service",
    "getty@tty1.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "dev-hugepages.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "sys-fs-fuse-connections.mount",
    "systemd-pcrphase.service",
    "systemd-binfmt.service",
    "proc-sys-fs-binfmt_misc.automount",
)
_LOCK = threading.Lock()


def packages() -> list[str]:
    """Package names of hosts/packages.txt."""
    lines = (FILES / "packages.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def exists(reference: str) -> bool:
    """True when the private engine has the image."""
    return bool(docker("images", "--quiet", reference))


def base() -> str:
    """Reference of the Debian base image, built now if need be. Also the world is made from it."""
    reference = "gpu-fleet/base:%s" % digest([FILES / "packages.txt"], SUITE, inspect.getsource(_bootstrap))
    with _LOCK:
        if not exists(reference):
            with step("image base (Debian %s, %d packages)" % (SUITE, len(packages()))):
                _bootstrap(reference)
    return reference


def _bootstrap(reference: str) -> None:
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--include=%s" % ",".join(packages()),
        '--aptopt=Acquire::Languages "none"',
        # Stays in the image: hosts that live for minutes need no file flushed to the disk.
        "--dpkgopt=force-unsafe-io",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        SUITE,
        "-",
    ]
    log = ROOT / "base-image.log"
    with log.open("wb") as errors:
        maker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, "TMPDIR": str(ROOT)}
        )
        taker = subprocess.Popen(
            ["docker", "import", "-", reference],
            stdin=maker.stdout,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **environment()},
        )
        assert maker.stdout is not None
        maker.stdout.close()
        taken, made = taker.wait(), maker.wait()
    if made or taken:
        if not taken:
            docker("rmi", reference, check=False)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise SandboxError("building the base image failed (mmdebstrap %d, import %d):\n%s" % (made, taken, tail))
    log.unlink()


def host(image: str) -> str:
    """Reference of a host image ("debian13" or "ubuntu2404"), built now if need be."""
    if image not in HOST_IMAGES:
        raise SandboxError("image %s: unknown; there are %s" % (image, ", ".join(HOST_IMAGES)))
    below = base()
    # The stand-in hardware is built for the running kernel, with the package writer of the repositories.
    inputs = [FILES, pathlib.Path(__file__)] + [path for path in (HARDWARE, PACKAGE_WRITER, CA) if path.exists()]
    reference = "gpu-fleet/%s:%s" % (image, digest(inputs, below, platform.release()))
    with _LOCK:
        if not exists(reference):
            with step("image %s" % image):
                _build_host(image, below, reference)
    return reference


def _build_host(image: str, below: str, reference: str) -> None:
    container = docker(
        *("run", "--detach", "--network=none", "--security-opt=seccomp=unconfined", below, "sleep", "infinity")
    )
    try:
        number = docker("inspect", "--format={{.State.Pid}}", container)
        rootfs = pathlib.Path("/proc/%s/root" % number)
        _fill(rootfs, image, container)
        docker("kill", container)
        docker(
            *(
                "commit",
                '--change=CMD ["/usr/lib/sandbox/boot"]',
                "--change=ENV container=docker",
                container,
                reference,
            ),
        )
    finally:
        docker("rm", "--force", "--volumes", container, check=False)
    # Earlier ones that no host uses any more; the engine refuses to remove those in use.
    repository, newest = reference.split(":")
    for tag in docker("images", "--format={{.Tag}}", repository).split():
        if tag != newest:
            docker("rmi", "%s:%s" % (repository, tag), check=False)


def _fill(rootfs: pathlib.Path, image: str, container: str) -> None:
    """Write everything into a host image that Debian's packages do not bring."""

    def put(source: str, target: str, mode: int = 0o644) -> None:
        path = rootfs / target
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        shutil.copyfile(FILES / source, path)
        path.chmod(mode)

    put("boot", "usr/lib/sandbox/boot", 0o755)
    put("shutdown", "usr/lib/systemd/system-shutdown/sandbox", 0o755)
    put("sshd.conf", "etc/ssh/sshd_config.d/sandbox.conf")
    put("debian.sources", "etc/apt/sources.list.d/debian.sources")
    (rootfs / "usr/lib/sandbox/boot.d").mkdir(parents=True, exist_ok=True)
    (rootfs / "etc/sandbox").mkdir(exist_ok=True)
    for stale in ("etc/apt/sources.list", "etc/machine-id", "var/lib/dbus/machine-id"):
        (rootfs / stale).unlink(missing_ok=True)
    (rootfs / "etc/machine-id").write_text("")
    if image == "ubuntu2404":
        # usr/lib/os-release is the file behind the link etc/os-release.
        put("ubuntu2404.os-release", "usr/lib/os-release")
        put("ubuntu2404.lsb-release", "etc/lsb-release")
    script = "rm -f /etc/ssh/ssh_host_*; systemctl mask --quiet %s; systemctl set-default --quiet multi-user.target" % (
        " ".join(MASKED)
    )
    # The operator's account of the README's inventory.
    script += "; useradd --create-home --shell /bin/bash ops"
    if CA.exists():
        certificate = rootfs / "usr/local/share/ca-certificates/gpu-fleet-sandbox.crt"
        certificate.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CA, certificate)
        script += "; update-ca-certificates"
    docker("exec", container, "sh", "-ec", script)
    if (HARDWARE / "install.sh").exists():
        run([str(HARDWARE / "install.sh"), str(rootfs)], cwd=CHECKOUT)
