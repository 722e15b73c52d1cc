# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A Docker daemon of our own with CDI, and an image out of this machine's own files."""

from __future__ import annotations

import fcntl
import glob
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_smoke_test import build_archive

# Beside this file.
from machine import Journal, Machine, library_path
from report import Json, Report, wait_for

HERE = os.path.dirname(os.path.abspath(__file__))
LIBRARIES = "/usr/local/real_gpu/lib"
PROGRAMS = "/opt/real_gpu"
CGROUP = "real_gpu"


class Engine:
    """The daemon, from its start to its end."""

    def __init__(self, work: str, host: Machine, report: Report) -> None:
        self.work, self.host, self.report = work, host, report
        self.api = DockerApi()
        self.process: t.Optional[subprocess.Popen[bytes]] = None

    @property
    def up(self) -> bool:
        return self.process is not None

    def begin(self, gpus: t.Sequence[Gpu]) -> None:
        missing = [name for name in ("dockerd", "docker", "containerd", "runc", "iptables") if not shutil.which(name)]
        if missing:
            self.report.note("skipped", "Docker", "no %s; see --tools" % ", ".join(missing))
            return
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            # ip link set lo up, where there is no ip.
            fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
        self.host.journal = Journal()
        os.makedirs("/run/cdi", exist_ok=True)
        self._write_cdi("/run/cdi/nvidia.yaml", gpus)
        options: Json = {"features": {"cdi": True}, "cdi-spec-dirs": ["/run/cdi"], "live-restore": True}
        options["cgroup-parent"] = "/" + CGROUP
        proxy = shutil.which("docker-proxy")
        if proxy:
            options["userland-proxy-path"] = proxy
        with open(self.work + "/daemon.json", "w", encoding="utf-8") as stream:
            json.dump(options, stream)
        _cgroup_leaf()
        self.start()
        up = wait_for(self.api.available, 60)
        if not self.report.check("dockerd answers", up, "" if up else self.log()):
            self.process = None
            return
        info = self.api.info()
        self.report.note(
            "note",
            "Docker",
            {key: info.get(key) for key in ("ServerVersion", "CgroupDriver", "CgroupVersion", "Driver")},
        )
        self.report.check("CDI is on", info.get("CDISpecDirs"), info.get("CDISpecDirs"))

    def start(self) -> None:
        with open(self.work + "/dockerd.log", "ab") as log:
            self.process = subprocess.Popen(
                ["dockerd", "--config-file", self.work + "/daemon.json", "--exec-opt", "native.cgroupdriver=cgroupfs"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def start_again(self) -> None:
        try:
            os.unlink("/run/docker.pid")
        except FileNotFoundError:
            pass
        self.start()

    def log(self) -> str:
        with open(self.work + "/dockerd.log", encoding="utf-8", errors="replace") as stream:
            return stream.read()[-3000:]

    def end(self) -> None:
        if self.process is None:
            return
        names = self.host.run(["docker", "ps", "-aq"]).stdout.split()
        if names:
            self.host.run(["docker", "rm", "-f", *names], timeout=60)
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        # A containerd that a killed daemon has left behind belongs to this run too.
        pid = (self.host.read_text("/run/docker/containerd/containerd.pid") or "").strip()
        if pid.isdigit() and "containerd" in (self.host.read_text("/proc/%s/cmdline" % pid) or ""):
            os.kill(int(pid), signal.SIGTERM)
        for directory, _inner, _files in os.walk("/sys/fs/cgroup/" + CGROUP, topdown=False):
            try:
                os.rmdir(directory)
            except OSError as error:
                self.report.note("note", "left in place: %s" % directory, error.strerror)

    def _write_cdi(self, path: str, gpus: t.Sequence[Gpu]) -> None:
        """The CDI specification of this machine: from nvidia-ctk, or by hand where there is none."""
        if shutil.which("nvidia-ctk"):
            done = self.host.run(["nvidia-ctk", "cdi", "generate", "--device-name-strategy=uuid", "--output=" + path])
            self.report.check("nvidia-ctk cdi generate", done.ok, "" if done.ok else done.last_line())
            self.report.keep("cdi.yaml", self.host.read_text(path) or "")
            return
        directory = os.path.dirname(os.path.realpath(library_path("libnvidia-ml.so.1")))
        self.report.note("note", "CDI specification by hand for the libraries in", directory)
        mounts: t.List[Json] = []
        # The one in /usr/bin may be a script that calls another one.
        for folder in ["/usr/bin", *os.environ.get("PATH", "").split(":"), os.path.dirname(directory) + "/bin"]:
            program = os.path.realpath(folder + "/nvidia-smi")
            mount = {"hostPath": program, "containerPath": program, "options": ["ro", "nosuid", "bind"]}
            if os.path.exists(program) and mount not in mounts:
                mounts.append(mount)
        for name in (
            "cuda",
            "cudadebugger",
            "nvidia-ml",
            "nvidia-ptxjitcompiler",
            "nvidia-gpucomp",
            "nvidia-nvvm",
            "nvidia-nvvm70",
        ):
            for found in sorted(glob.glob("%s/lib%s.so.*" % (directory, name))):
                target = "%s/%s" % (LIBRARIES, os.path.basename(found))
                mounts.append(
                    {"hostPath": os.path.realpath(found), "containerPath": target, "options": ["ro", "nosuid", "bind"]}
                )
        common = [
            node for node in ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools") if os.path.exists(node)
        ]
        devices = [
            {"name": gpu.uuid, "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia%d" % (gpu.minor or 0)}]}}
            for gpu in gpus
        ]
        every = [{"path": "/dev/nvidia%d" % (gpu.minor or 0)} for gpu in gpus]
        spec = {
            "cdiVersion": "0.5.0",
            "kind": "nvidia.com/gpu",
            "devices": [*devices, {"name": "all", "containerEdits": {"deviceNodes": every}}],
            "containerEdits": {
                "deviceNodes": [{"path": node} for node in common],
                "mounts": mounts,
                "env": ["LD_LIBRARY_PATH=" + LIBRARIES],
            },
        }
        with open(path, "w", encoding="utf-8") as stream:
            json.dump(spec, stream, indent=1)  # JSON is YAML too
        self.report.keep("cdi.json", json.dumps(spec, indent=1))

    def build_image(self, name: str) -> Json:
        """Python and our programs as an image with the labels of a NIM; what Docker says of it."""
        python = os.path.realpath(sys.executable)
        standard = os.path.dirname(os.path.realpath(os.__file__))
        needed = ["/bin/sh", python]
        site = torch_directory()
        own = (standard + "/", site + "/" if site else standard + "/")
        torch = sorted(glob.glob(site + "/torch/lib/*.so")) if site else []
        for library in [*sorted(glob.glob(standard + "/lib-dynload/*.so")), *torch]:
            needed += re.findall(r"=>\s*(/\S+)", self.host.run(["ldd", library]).stdout)
        wanted = [
            path
            for path in dict.fromkeys(needed)
            if not path.startswith(own) and "nvidia" not in path and "libcuda" not in path
        ]
        smi = self.host.which("nvidia-smi") or "nvidia-smi"
        buffer = io.BytesIO(build_archive(self.host, [*wanted, smi]))
        with tarfile.open(fileobj=buffer, mode="a") as tar:
            tar.add(standard, filter=_standard_library)
            for program in ("serve.py", "cuda.py", "nvml.py"):
                tar.add("%s/%s" % (HERE, program), arcname="%s/%s" % (PROGRAMS[1:], program))
        path = self.work + "/image.tar"
        with open(path, "wb") as stream:
            stream.write(buffer.getvalue())
        changes = ["CMD %s" % json.dumps([python, PROGRAMS + "/serve.py"]), "LABEL com.nvidia.nim.version=2.0.0"]
        changes.append("ENV NVIDIA_REQUIRE_CUDA=cuda>=12.0")
        argv = ["docker", "import"]
        for change in changes:
            argv += ["--change", change]
        self.host.check([*argv, path, name], reason="import_failed", doing="docker import", timeout=120)
        self.report.note("note", "image", "%d MiB" % (len(buffer.getvalue()) >> 20))
        return self.api.image(name) or {}


def torch_directory() -> t.Optional[str]:
    """The directory that holds PyTorch for this Python, None without."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    return os.path.dirname(next(iter(spec.submodule_search_locations or [""]))) if spec else None


def _standard_library(member: tarfile.TarInfo) -> t.Optional[tarfile.TarInfo]:
    unwanted = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "tkinter", "ensurepip"}
    if os.path.basename(member.name) in unwanted or "/config-" in member.name:
        return None
    member.uid = member.gid = 0
    return member


def _cgroup_leaf() -> None:
    """In a cgroup namespace the root may hold processes, and then it can have no children with controllers."""
    root = "/sys/fs/cgroup"
    if not os.path.exists(root + "/cgroup.type"):
        return
    os.makedirs(root + "/init", exist_ok=True)
    with open(root + "/cgroup.procs", encoding="utf-8") as stream:
        pids = stream.read().split()
    for pid in pids:
        try:
            with open(root + "/init/cgroup.procs", "w", encoding="utf-8") as stream:
                stream.write(pid)
        except OSError:
            continue  # kernel threads, and processes that have ended
