# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Look-alikes of EL machines: Debian's rpm and dnf in a root file system whose os-release says Rocky Linux.

Real: rpm, dnf (the version of EL 9 from Debian 12; a newer dnf 4 for EL 10 from Debian 13), versionlock, HTTP.
Stand-ins: everything that would be installed, the kernel's name, and the GPU, which is a directory in /sys.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import pathlib
import shutil
import subprocess
import typing as t

from repositories import KERNELS, build_script, repositories

HERE = pathlib.Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]
HARDWARE = HERE.parent / "hardware/files"
STATE = CHECKOUT / ".sandbox/cache/rpm"
SUITES = {9: "bookworm", 10: "trixie"}
PACKAGES = ("ca-certificates", "createrepo-c", "dnf", "dnf-plugins-core", "gnupg", "kmod", "mount", "python3-systemd")
PACKAGES += ("rpm",)
_MINOR = {9: "9.6", 10: "10.0"}
_H200 = "0x2335"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(argv: t.Sequence[str], stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError("%s: status %d\n%s" % (" ".join(argv), done.returncode, (done.stdout + done.stderr)[-4000:]))
    return done


@contextlib.contextmanager
def _alone() -> t.Iterator[None]:
    """One process builds, the others wait for it."""
    STATE.mkdir(parents=True, exist_ok=True)
    with (STATE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build() -> pathlib.Path:
    """Make what is not there yet; the directory with the repositories."""
    with _alone():
        for major in SUITES:
            root(major)
        return public()


def root(major: int) -> pathlib.Path:
    """The unchanged root file system of a machine, made when it is not there."""
    made = STATE / ("el%d-%s" % (major, _digest(SUITES[major], *PACKAGES, inspect.getsource(_fill))))
    if made.is_dir():
        return made
    for old in (*STATE.glob("el%d-*" % major), *STATE.glob("partial-el%d*" % major)):
        shutil.rmtree(old)
    partial = STATE / ("partial-el%d" % major)
    command = ["mmdebstrap", "--quiet", "--variant=apt", "--include=" + ",".join(PACKAGES)]
    command += ['--aptopt=Acquire::Languages "none"', "--dpkgopt=force-unsafe-io"]
    command += ["--dpkgopt=path-exclude=/usr/share/%s/*" % name for name in ("man", "doc", "locale")]
    _run([*command, SUITES[major], str(partial), "http://deb.debian.org/debian"])
    _fill(partial, major)
    partial.rename(made)
    return made


def _fill(base: pathlib.Path, major: int) -> None:
    version = _MINOR[major]
    device = "sys/bus/pci/devices/0000:18:00.0"
    files = {
        "etc/os-release": 'NAME="Rocky Linux"\nVERSION="%s"\nID="rocky"\nID_LIKE="rhel centos fedora"\nVERSION_ID="%s"\n'
        'PLATFORM_ID="platform:el%d"\nPRETTY_NAME="Rocky Linux %s (look-alike on Debian)"\n'
        % (version, version, major, version),
        # As Rocky has it.
        "etc/dnf/dnf.conf": "[main]\ngpgcheck=1\ninstallonly_limit=3\nclean_requirements_on_remove=True\nbest=True\n"
        "skip_if_unavailable=False\n",
        "etc/dnf/vars/releasever": "%d\n" % major,
        # Debian's rpm keeps its database in the home directory, and Debian's dnf has a plugin that Rocky's has not.
        "etc/rpm/macros": "%_dbpath /var/lib/rpm\n",
        "etc/dnf/plugins/local.conf": "[main]\nenabled = 0\n",
        device + "/vendor": "0x10de\n",
        device + "/device": _H200 + "\n",
        device + "/class": "0x030200\n",
        "lib/modules/%s/modules.order" % KERNELS[major]: "",
        "lib/modules/%s/modules.builtin" % KERNELS[major]: "",
    }
    for name, content in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        path.write_text(content, encoding="utf-8")


def public() -> pathlib.Path:
    """Directory with all repositories, built when their description has changed."""
    inputs = [HERE / "repositories.py", HARDWARE / "dkms", HARDWARE / "hardware.py"]
    made = STATE / ("repositories-" + _digest(*(path.read_text("utf-8") for path in inputs)))
    if not made.is_dir():
        for old in STATE.glob("repositories-*"):
            shutil.rmtree(old)
        work = STATE / "partial-repositories"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / "script").write_text(build_script(repositories(HARDWARE), work), encoding="utf-8")
        Machine(10, STATE / "builder").run("sh", "/work/script", binds={work: "/work"})
        shutil.rmtree(STATE / "builder")
        (work / "public").rename(made)
        shutil.rmtree(work)
    return made


class Machine:
    """One machine: a root file system of its own that starts as the unchanged one. Nothing runs between two commands.

    Attributes:
        binds: Directories from outside, and where they are in the machine.
        free: Free bytes that every file system of it shows; None for what it has.
    """

    def __init__(self, major: int, directory: pathlib.Path) -> None:
        self.major = major
        self.kernel = KERNELS[major]
        self.base = root(major)
        self.binds: dict[pathlib.Path, str] = {}
        self.free: int | None = None
        self.upper, self.scratch, self.merged = (directory / name for name in ("upper", "scratch", "merged"))
        for path in (self.upper, self.scratch, self.merged):
            path.mkdir(parents=True)

    def run(
        self, *argv: str, stdin: str = "", check: bool = True, binds: t.Mapping[pathlib.Path, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as root of the machine, in mount and process namespaces that end with it."""
        mounts = ["mount -t overlay overlay -o lowerdir=%s,upperdir=%s,workdir=%s %s"]
        script = mounts[0] % (self.base, self.upper, self.scratch, self.merged)
        for source, target in {
            CHECKOUT / "plugins/module_utils": "/mnt/code",
            HERE: "/mnt/tests",
            **self.binds,
            **(binds or {}),
        }.items():
            script += "\nmkdir -p %s%s\nmount --bind %s %s%s" % (self.merged, target, source, self.merged, target)
        script += '\nmount -t proc proc %s/proc\nexec chroot %s "$@"' % (self.merged, self.merged)
        space = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", script, "sh"]
        return _run([*space, *argv], stdin, check)

    def ask(self, operation: str, **arguments: t.Any) -> dict[str, t.Any]:
        """Let the collection's code do one thing in the machine (see in_machine.py)."""
        request = {"operation": operation, "kernel": self.kernel, "free": self.free, **arguments}
        done = self.run("python3", "-B", "/mnt/tests/in_machine.py", stdin=json.dumps(request), check=False)
        try:
            return t.cast("dict[str, t.Any]", json.loads(done.stdout))
        except ValueError:
            raise RuntimeError("%s: %s" % (operation, (done.stdout + done.stderr)[-4000:])) from None

    def write(self, path: str, content: str) -> None:
        self.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat >"$1"', "sh", path, stdin=content)

    def read(self, path: str) -> str:
        return self.run("cat", path).stdout


def connect(machine: Machine, server: str) -> None:
    """What is on a Rocky machine before we come: its own repository, whose key it trusts."""
    major = machine.major
    machine.write("/etc/stand-in-server", server)
    machine.write(
        "/etc/yum.repos.d/rocky.repo",
        "[baseos]\nname=Rocky\nbaseurl=%s/rocky/%d\ngpgcheck=1\ngpgkey=%s/rocky/%d/KEY\n"
        % (server, major, server, major),
    )
    machine.run("dnf", "-q", "-y", "install", "rocky-release")


def remove(directory: pathlib.Path) -> None:
    """Takes a machine away; the kernel's work directory of an overlay has no permissions at all."""
    with contextlib.suppress(FileNotFoundError):
        for path, names, dummy in os.walk(directory):
            for name in names:
                (pathlib.Path(path) / name).chmod(0o700)
        shutil.rmtree(directory)
