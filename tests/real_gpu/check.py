# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection's own code against the GPUs, the driver and a Docker daemon of this very machine.

Started by run.sh in mounts and a network of its own. Ends with 1 when a check failed.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import glob
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import typing as t
import urllib.request
import uuid

from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu, driver_holders, observe_gpus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_host_info import gather
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_placement import Wish, place
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_smoke_test import build_archive
from ansible_collections.gpu_fleet.nim.plugins.module_utils._health_target import parse_targets
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import CommandResult, Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_configuration import (
    Secrets,
    build_configuration,
    wrapper_text,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_family import WEIGHTS_PATH, family_of_image
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_health import HealthCheck
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import NimModel, parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service_state import ImageState
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_container_toolkit import NvidiaContainerToolkit
from ansible_collections.gpu_fleet.nim.plugins.module_utils._requirements import InvalidExpressionError, satisfied

# Beside this file.
from nvml import Nvml, NvmlError
from serve import HELD_MIB

HERE = os.path.dirname(os.path.abspath(__file__))

Json = t.Dict[str, t.Any]
LIBRARIES = "/usr/local/real_gpu/lib"
PROGRAMS = "/opt/real_gpu"
CGROUP = "real_gpu"


class Report:
    """Every check with its outcome, on the screen and in a file."""

    def __init__(self) -> None:
        self.entries: t.List[Json] = []

    def note(self, outcome: str, what: str, detail: t.Any = "") -> None:
        what, detail = redact(what), redact(str(detail))
        self.entries.append({"outcome": outcome, "check": what, "detail": detail})
        sys.stdout.write("%-7s %s%s\n" % (outcome, what, ": " + detail if detail else ""))
        sys.stdout.flush()

    def check(self, what: str, good: t.Any, detail: t.Any = "") -> bool:
        self.note("ok" if good else "FAILED", what, detail)
        return bool(good)

    def same(self, what: str, found: t.Any, expected: t.Any) -> bool:
        return self.check(what, found == expected, found if found == expected else "%r != %r" % (found, expected))

    @property
    def failed(self) -> int:
        return sum(entry["outcome"] == "FAILED" for entry in self.entries)


class Machine(Host):
    """This machine, without systemd: systemctl and journalctl are answered from what this program started itself."""

    def __init__(self) -> None:
        self.units: t.Dict[str, Unit] = {}
        self.journal: t.Optional[Journal] = None

    def run(
        self,
        argv: t.Sequence[str],
        *,
        stdin: t.Optional[str] = None,
        env: t.Optional[t.Mapping[str, str]] = None,
        timeout: t.Optional[float] = None,
    ) -> CommandResult:
        if argv[0] == "systemctl":
            words = [self.units[name].show() for name in argv[1:] if name in self.units]
            return CommandResult(tuple(argv), 0 if words else 1, "\n\n".join(words), "")
        if argv[0] == "journalctl":
            field, _equals, value = argv[-1].partition("=")
            lines = self.journal.lines(field, value) if self.journal else []
            return CommandResult(tuple(argv), 0, "\n".join(lines), "")
        return super().run(argv, stdin=stdin, env=env, timeout=timeout)


class Journal:
    """A socket where journald's would be: Docker's log driver wants one."""

    PATH = "/run/systemd/journal/socket"

    def __init__(self) -> None:
        self.entries: t.List[t.Dict[str, str]] = []
        os.makedirs(os.path.dirname(self.PATH), exist_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.PATH)
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        while True:
            data = self.socket.recv(1 << 18)
            entry: t.Dict[str, str] = {}
            while data:
                line, _newline, data = data.partition(b"\n")
                name, equals, value = line.partition(b"=")
                if not equals and len(data) >= 8:
                    size = struct.unpack("<Q", data[:8])[0]
                    value, data = data[8 : 8 + size], data[9 + size :]
                entry[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
            self.entries.append(entry)

    def lines(self, field: str, value: str) -> t.List[str]:
        return [entry.get("MESSAGE", "") for entry in self.entries if entry.get(field) == value]


class Unit:
    """What systemd does with ``nim-NAME.service``: run the wrapper, and stop it with the wrapper's own help."""

    def __init__(self, name: str, wrapper: str, log: str) -> None:
        self.name, self.wrapper, self.log = name, wrapper, log
        self.process: t.Optional[subprocess.Popen[bytes]] = None
        self.restarts = -1

    def start(self) -> None:
        self.restarts += 1
        self.invocation = uuid.uuid4().hex
        self.started = time.monotonic()
        self.environment = dict(os.environ, INVOCATION_ID=self.invocation, HOME="/root")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [self.wrapper, "run", self.name], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
            )

    def stop(self) -> int:
        assert self.process is not None
        environment = dict(self.environment, MAINPID=str(self.process.pid))
        subprocess.run([self.wrapper, "stop", self.name], env=environment, check=True, timeout=120)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def show(self) -> str:
        active = self.process is not None and self.process.poll() is None
        return "\n".join(
            (
                "Id=nim-%s.service" % self.name,
                "LoadState=loaded",
                "ActiveState=%s" % ("active" if active else "inactive"),
                "SubState=%s" % ("running" if active else "dead"),
                "NRestarts=%d" % max(0, self.restarts),
                "InvocationID=%s" % self.invocation,
                "Result=success",
                "ConditionResult=yes",
                "ExecMainStartTimestampMonotonic=%d" % (self.started * 1e6),
            )
        )

    def said(self) -> str:
        with open(self.log, encoding="utf-8", errors="replace") as stream:
            return stream.read()


def wait_for(what: t.Callable[[], t.Any], seconds: float) -> t.Any:
    """Value of ``what`` as soon as it is true, or its last value."""
    end = time.monotonic() + seconds
    while True:
        found = what()
        if found or time.monotonic() >= end:
            return found
        time.sleep(0.2)


class Verification:
    """All checks, in order; a later one may use what an earlier one found out."""

    def __init__(self, work: str, output: str) -> None:
        self.work, self.output = work, output
        self.report = Report()
        self.host = Machine()
        self.gpus: t.Tuple[Gpu, ...] = ()
        self.api = DockerApi()
        self.smi = self.host.which("nvidia-smi") or "nvidia-smi"
        self.dockerd: t.Optional[subprocess.Popen[bytes]] = None

    def run(self) -> int:
        for section in (
            self.machine,
            self.inventory,
            self.module,
            self.holders,
            self.requirements,
            self.placement,
            self.docker,
            self.smoke_test,
            self.services,
        ):
            sys.stdout.write("\n== %s\n" % (section.__doc__ or "").splitlines()[0])
            try:
                section()
            except Exception:
                self.report.check(section.__name__, False, traceback.format_exc())
        self.end()
        counts = {kind: sum(e["outcome"] == kind for e in self.report.entries) for kind in ("ok", "FAILED", "skipped")}
        sys.stdout.write("\n%(ok)d ok, %(FAILED)d failed, %(skipped)d skipped\n" % counts)
        with open(self.output + "/report.json", "w", encoding="utf-8") as stream:
            json.dump(self.report.entries, stream, indent=1)
        return 1 if self.report.failed else 0

    def keep(self, name: str, text: str) -> None:
        with open("%s/%s" % (self.output, name), "w", encoding="utf-8") as stream:
            stream.write(redact(text))

    # -- the host ---------------------------------------------------------------------------------

    def machine(self) -> None:
        """This machine"""
        self.report.note("note", "nvidia-smi", "%s -> %s" % (self.smi, os.path.realpath(self.smi)))
        uname = os.uname()
        self.report.note("note", "kernel", "%s %s" % (uname.sysname, uname.release))
        self.report.note("note", "python", sys.version.split()[0])
        for path in ("/proc/driver/nvidia/version", "/sys/module/nvidia/version", "/sys/module/nvidia/refcnt"):
            self.report.note("note", path, (self.host.read_text(path) or "absent").strip())

    def inventory(self) -> None:
        """What the collection sees, against nvidia-smi (XML and CSV) and NVML"""
        same = self.report.same
        nvml = Nvml()
        found = observe_gpus(self.host)
        xml = self.host.run([self.smi, "-q", "-x"]).stdout
        self.keep("nvidia-smi-q-x.xml", xml)
        self.gpus = found.gpus
        driver, cuda = nvml.driver()
        same("driver version, NVML", found.smi_driver_version, driver)
        same("CUDA version, NVML", found.cuda_version, cuda)
        same("driver version, kernel module", found.driver.version if found.driver else "", driver)
        same("flavour", found.driver.flavour if found.driver else "", flavour_of(self.host))
        same("error of nvidia-smi", found.smi_error, "")
        fields = "index,uuid,name,memory.total,memory.used,memory.free,compute_mode,mig.mode.current,driver_version,"
        fields += "pci.bus_id,persistence_mode"
        listed = self.host.run([self.smi, "--query-gpu=" + fields, "--format=csv,noheader,nounits"]).stdout
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(listed)) if row]
        seen = nvml.gpus()
        blocks = re.findall(r"<gpu id=.*?</gpu>", xml, re.DOTALL)
        for name, other in (("CSV", rows), ("NVML", seen), ("XML", blocks), ("PCI", found.pci)):
            same("number of GPUs, %s" % name, len(found.gpus), len(other))
        for gpu, row, known, block in zip(found.gpus, rows, seen, blocks):
            self._compare(gpu, row, known, block)
            on_bus = [pci for pci in found.pci if pci.bdf == gpu.bdf]
            same("GPU %d on the PCI bus" % gpu.index, len(on_bus), 1)
            for pci in on_bus:
                same(
                    "GPU %d architecture by PCI device id %s" % (gpu.index, pci.device_id),
                    pci.architecture,
                    gpu.architecture,
                )
                same("GPU %d kernel driver" % gpu.index, pci.bound, "nvidia")
        without = observe_gpus(self.host, with_smi=False).gpus
        by_uuid = {gpu.uuid: gpu for gpu in found.gpus}
        for bare in without:
            full = by_uuid.get(bare.uuid)
            same(
                "GPU %s from procfs alone" % bare.uuid,
                (bare.name, bare.minor, bare.bdf, bare.architecture),
                (full.name, full.minor, full.bdf, full.architecture) if full else None,
            )

    def _compare(self, gpu: Gpu, row: t.Sequence[str], known: Json, block: str) -> None:
        def check(field: str, witness: str, mine: t.Any, other: t.Any) -> None:
            good = mine == other
            text = str(mine) if good else "%r != %r" % (mine, other)
            self.report.check("GPU %d %s, %s" % (gpu.index, field, witness), good, text)

        def raw(path: str) -> str:
            text = block
            for name in path.split("/"):
                part = re.search(r"<%s>(.*?)</%s>" % (name, name), text, re.DOTALL)
                text = part.group(1) if part else ""
            return "" if text.strip() in ("N/A", "[N/A]") else text.strip()

        for field in ("index", "uuid", "name", "brand", "architecture", "compute_mode", "mig", "minor", "bdf"):
            check(field, "NVML", getattr(gpu, field), known[field])
        check("persistence_mode", "NVML", gpu.persistence_mode, known["persistence_mode"])
        check("memory_total_mib", "NVML", gpu.memory_total_mib, known["memory_total_mib"])
        for position, field in enumerate(("index", "uuid", "name", "memory_total_mib")):
            check(field, "CSV", str(getattr(gpu, field)), row[position])
        for field, position in (("memory_used_mib", 4), ("memory_free_mib", 5)):
            # Somebody may allocate between two questions.
            for witness, value in (("CSV", int(row[position])), ("NVML", known[field])):
                near = abs((getattr(gpu, field) or 0) - value) <= 64
                self.report.check(
                    "GPU %d %s, %s" % (gpu.index, field, witness), near, "%s ~ %s" % (getattr(gpu, field), value)
                )
        check("compute_mode", "CSV", gpu.compute_mode, row[6])
        check("mig", "CSV", gpu.mig, "" if row[7] == "[N/A]" else row[7])
        check("bdf", "CSV", gpu.bdf, row[9].lower()[4:])
        check("persistence_mode", "CSV", gpu.persistence_mode, row[10])
        check("uuid", "XML", gpu.uuid, raw("uuid"))
        check("architecture", "XML", gpu.architecture, raw("product_architecture"))
        check("brand", "XML", gpu.brand, raw("product_brand"))
        check("fabric_state", "XML", gpu.fabric_state, raw("fabric/state"))
        check("fabric_status", "XML", gpu.fabric_status, raw("fabric/status"))
        check("recovery_action", "XML", gpu.recovery_action, raw("gpu_recovery_action"))

    def module(self) -> None:
        """The module gpu_host_info through Ansible"""
        done = subprocess.run([sys.executable, "-c", "import ansible"], capture_output=True, check=False)
        if done.returncode:
            self.report.note("skipped", "gpu_host_info through Ansible", "no ansible-core for this Python")
            return
        argv = [sys.executable, "-m", "ansible", "adhoc", "localhost", "-i", "localhost,", "-c", "local"]
        argv += ["-e", "ansible_python_interpreter=" + sys.executable, "-m", "gpu_fleet.nim.gpu_host_info"]
        done = subprocess.run(argv, capture_output=True, encoding="utf-8", check=False, timeout=180)
        text = done.stdout.partition("=>")[2]
        if not self.report.check("ansible -m gpu_fleet.nim.gpu_host_info", done.returncode == 0 and text, done.stderr):
            self.report.note("note", "output", done.stdout)
            return
        answer = json.loads(text)
        self.keep("gpu_host_info.json", json.dumps(answer, indent=1, sort_keys=True))
        self.report.same("changed", answer["changed"], False)
        self.report.same("GPUs", [gpu["uuid"] for gpu in answer["gpus"]], [gpu.uuid for gpu in self.gpus])
        self.report.same("CUDA version", answer["cuda_version"], Nvml().driver()[1])
        self.report.same("driver", answer["driver"]["loaded"], Nvml().driver()[0])
        self.report.same("parts that could not be looked at", answer["errors"], {})

    def holders(self) -> None:
        """Who holds the GPUs"""
        before = {holder.pid for holder in driver_holders(self.host)}
        self.report.note("note", "holders before", sorted(before))
        for gpu in self.gpus[:2]:
            process = subprocess.Popen(
                [sys.executable, HERE + "/cuda.py", str(gpu.index), "256"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                # Devices in the order of nvidia-smi.
                env=dict(os.environ, CUDA_DEVICE_ORDER="PCI_BUS_ID"),
            )
            assert process.stdin and process.stdout
            told = process.stdout.readline().split()
            self.report.check("GPU %d computes on the host" % gpu.index, told and float(told[1]) < 1e-3, told[1:])
            self.report.check("GPU %d is the GPU that CUDA used" % gpu.index, told and told[0] == gpu.uuid)
            named = [holder for holder in driver_holders(self.host) if holder.pid == process.pid]
            self.report.check("the CUDA process is named", len(named) == 1, [one.describe() for one in named])
            for holder in named:
                self.report.same("its command", holder.command, sys.executable)
                self.report.check(
                    "its device",
                    "/dev/nvidia%d" % (gpu.minor or 0) in holder.devices,
                    ", ".join(holder.devices),
                )
            seen = {one.uuid: one for one in observe_gpus(self.host).gpus}
            grown = (seen[gpu.uuid].memory_used_mib or 0) - (gpu.memory_used_mib or 0)
            self.report.check("GPU %d memory in use has grown" % gpu.index, grown >= 256, "%d MiB" % grown)
            listed = [entry for entry in seen[gpu.uuid].processes if entry["pid"] == process.pid]
            smi = self.host.run(
                [self.smi, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
            ).stdout
            nvml = [known["pids"] for known in Nvml().gpus() if known["uuid"] == gpu.uuid]
            self.report.note("note", "processes by nvidia-smi (CSV) and NVML", "%r %r" % (smi, nvml))
            if str(process.pid) in smi or process.pid in nvml[0]:
                self.report.check("GPU %d lists the process" % gpu.index, len(listed) == 1, listed)
                self.keep("nvidia-smi-q-x.process.xml", self.host.run([self.smi, "-q", "-x"]).stdout)
            else:
                # In some virtual machines and containers the driver knows other process ids.
                self.report.note("skipped", "GPU %d lists the process" % gpu.index, "the driver does not tell it here")
            process.stdin.close()
            process.wait(timeout=30)
        after = wait_for(lambda: {holder.pid for holder in driver_holders(self.host)} == before, 10)
        self.report.check("nobody else is left", after, sorted(holder.pid for holder in driver_holders(self.host)))

    def requirements(self) -> None:
        """NVIDIA_REQUIRE_* with this driver and these GPUs"""
        driver, cuda = Nvml().driver()
        capabilities = self.host.run([self.smi, "--query-gpu=compute_cap", "--format=csv,noheader"]).stdout.split()
        kinds = [(gpu.brand, capability) for gpu, capability in zip(self.gpus, capabilities)]
        self.report.note("note", "GPU kinds", kinds)
        known = {"quadro", "tesla", "nvs", "grid", "geforce", "titan"}
        brand = self.gpus[0].brand.lower() if self.gpus[0].brand.lower() in known else "unknown"
        branch = int(driver.split(".")[0])
        major, minor = (int(part) for part in cuda.split("."))
        cases: t.List[t.Tuple[str, t.Optional[bool]]] = [
            ("", True),
            ("cuda>=%s" % cuda, True),
            ("cuda>=%d.%d" % (major, minor + 1), False),
            ("cuda>=12.8", (major, minor) >= (12, 8)),
            ("cuda>=99.0", False),
            ("cuda>=99.0 brand=%s,driver>=%d,driver<%d" % (brand, branch, branch + 1), True),
            ("cuda>=99.0 brand=nosuch,driver>=%d,driver<%d" % (branch, branch + 1), False),
            (
                "cuda>=99.0 brand=%s,driver>=470,driver<471 brand=%s,driver>=535,driver<536" % (brand, brand),
                branch in (470, 535),
            ),
            # A longer version is the greater one.
            ("driver<=%d" % branch, False),
            ("driver<%d" % (branch + 1), True),
            ("driver=%s" % driver, True),
            ("arch>=%s" % capabilities[0], True),
            ("arch<%s" % capabilities[0], False),
            ("brand=%s" % brand, True),
            ("brand!=%s" % brand, False),
            ("cuda==12.8", None),
            ("brand>=tesla", None),
            ("cuda >= 12.8", None),
            ("cuda>=7.0 brand==x", True),
        ]
        for expression, expected in cases:
            found: t.Optional[bool]
            try:
                found = satisfied(expression, driver, cuda, kinds)
            except InvalidExpressionError:
                found = None
            words = {True: "met", False: "not met", None: "invalid"}
            self.report.check("%r" % expression, found is expected, words[found])

    def placement(self) -> None:
        """Which GPUs models would get on this host"""
        uuids = tuple(gpu.uuid for gpu in self.gpus)
        count = len(uuids)
        whole = not any(gpu.mig == "Enabled" for gpu in self.gpus)
        if not whole:
            self.report.note("skipped", "placement", "a GPU is in MIG mode")
            return
        self.report.check("all", place([Wish("a", "all")], self.gpus)["a"] == uuids)
        self.report.check("a count of every GPU", place([Wish("a", count)], self.gpus)["a"] == uuids)
        self.report.check("by UUID", place([Wish("a", (uuids[-1],))], self.gpus)["a"] == (uuids[-1],))
        self.report.check("by index", place([Wish("a", (str(count - 1),))], self.gpus)["a"] == (uuids[-1],))
        kept = place([Wish("a", 1, present=(uuids[-1],))], self.gpus)
        self.report.check("a model stays where it is", kept["a"] == (uuids[-1],))
        for what, wishes in (
            ("one too many", [Wish("a", count), Wish("b", 1)]),
            ("one GPU twice", [Wish("a", ("0",)), Wish("b", (uuids[0],))]),
            ("an index beyond the last", [Wish("a", (str(count),))]),
        ):
            try:
                place(wishes, self.gpus)
                self.report.check(what + " is refused", False)
            except FleetError as error:
                self.report.check(what + " is refused", error.reason == "gpus_unavailable", error.message)
        if count > 1:
            both = place([Wish("a", 1), Wish("b", (uuids[0],))], self.gpus)
            self.report.check("two models share no GPU", both == {"a": (uuids[1],), "b": (uuids[0],)})

    # -- Docker -----------------------------------------------------------------------------------

    def docker(self) -> None:
        """A Docker daemon of our own, with CDI"""
        missing = [name for name in ("dockerd", "docker", "containerd", "runc", "iptables") if not shutil.which(name)]
        if missing:
            self.report.note("skipped", "Docker", "no %s; see --tools" % ", ".join(missing))
            return
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            # ip link set lo up, where there is no ip.
            fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
        self.host.journal = Journal()
        os.makedirs("/run/cdi", exist_ok=True)
        self._write_cdi("/run/cdi/nvidia.yaml")
        options: Json = {"features": {"cdi": True}, "cdi-spec-dirs": ["/run/cdi"], "live-restore": True}
        options["cgroup-parent"] = "/" + CGROUP
        proxy = shutil.which("docker-proxy")
        if proxy:
            options["userland-proxy-path"] = proxy
        with open(self.work + "/daemon.json", "w", encoding="utf-8") as stream:
            json.dump(options, stream)
        self._cgroup_leaf()
        self._start_docker()
        up = wait_for(self.api.available, 60)
        if not self.report.check("dockerd answers", up, "" if up else self._docker_log()):
            self.dockerd = None
            return
        info = self.api.info()
        self.report.note(
            "note",
            "Docker",
            {key: info.get(key) for key in ("ServerVersion", "CgroupDriver", "CgroupVersion", "Driver")},
        )
        self.report.check("CDI is on", info.get("CDISpecDirs"), info.get("CDISpecDirs"))

    def _start_docker(self) -> None:
        with open(self.work + "/dockerd.log", "ab") as log:
            self.dockerd = subprocess.Popen(
                ["dockerd", "--config-file", self.work + "/daemon.json", "--exec-opt", "native.cgroupdriver=cgroupfs"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _docker_log(self) -> str:
        with open(self.work + "/dockerd.log", encoding="utf-8", errors="replace") as stream:
            return stream.read()[-3000:]

    @staticmethod
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

    def _write_cdi(self, path: str) -> None:
        """The CDI specification of this machine: from nvidia-ctk, or by hand where there is none."""
        if shutil.which("nvidia-ctk"):
            done = self.host.run(["nvidia-ctk", "cdi", "generate", "--device-name-strategy=uuid", "--output=" + path])
            self.report.check("nvidia-ctk cdi generate", done.ok, "" if done.ok else done.last_line())
            return
        nvml_path = library_path("libnvidia-ml.so.1")
        directory = os.path.dirname(os.path.realpath(nvml_path))
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
            for gpu in self.gpus
        ]
        every = [{"path": "/dev/nvidia%d" % (gpu.minor or 0)} for gpu in self.gpus]
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
        self.keep("cdi.json", json.dumps(spec, indent=1))

    def smoke_test(self) -> None:
        """The toolkit's smoke test: an image out of this host's own files, and every GPU seen in a container"""
        archive = build_archive(self.host, ["/bin/sh", self.smi])
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            names = ["/" + member.name for member in tar.getmembers() if member.isfile()]
        self.report.check("the image has a shell and the C library", any("libc.so.6" in name for name in names), names)
        self.report.check(
            "and nothing of the driver", not [name for name in names if "nvidia" in name or "libcuda" in name]
        )
        if self.dockerd is None:
            self.report.note("skipped", "smoke test", "no Docker")
            return
        toolkit = NvidiaContainerToolkit(injection="cdi")
        toolkit._smoke_test(self.host)
        record = json.loads(self.host.read_text("/run/gpu_fleet/validations/nvidia_container_toolkit.json") or "{}")
        self.report.check("it passed", record["gpus"] == sorted(gpu.uuid for gpu in self.gpus), record)

    # -- services ---------------------------------------------------------------------------------

    def services(self) -> None:
        """A service on one GPU, from its options to its end"""
        if self.dockerd is None:
            self.report.note("skipped", "services", "no Docker")
            return
        limits = grantable_limits()
        if limits is not None:
            self.report.note("note", "limits that this machine can grant", limits)
        entries = [self._entry(number, gpu, limits) for number, gpu in enumerate(self.gpus[:2])]
        models = parse_models(entries)
        image = self._build_image(models[0].image)
        wrapper = self.work + "/nim-unit"
        text = wrapper_text()
        if not os.path.exists(text[2:].split("\n", 1)[0]):
            text = "#!%s\n%s" % (sys.executable, text.split("\n", 1)[1])
        self.host.write_file(wrapper, text, mode=0o755)
        os.makedirs("/run/nim", exist_ok=True)
        os.makedirs("/var/lib/nim/state", exist_ok=True)
        self._image_requirements(image)
        chosen = place([Wish(model.name, model.gpus) for model in models], self.gpus)
        before = {gpu.uuid: gpu.memory_used_mib or 0 for gpu in observe_gpus(self.host).gpus}
        units = []
        for model in models:
            units.append(self._start(model, image, chosen[model.name], wrapper))
        outcome = HealthCheck(self.host, self.api, parse_targets(entries)).run(None, interval=0, wait=True)
        for model, found in zip(models, outcome.models):
            shown = {key: found[key] for key in ("seconds_to_ready", "model_id", "version", "completion", "message")}
            self.report.check("%s is ready and completes" % model.name, found["ready"], shown)
        if any(not found["ready"] for found in outcome.models):
            for model, unit in zip(models, units):
                self.report.note("note", "wrapper", unit.said())
                self.report.note("note", "log", self.host.journal.lines("CONTAINER_NAME", model.container)[-30:])  # type: ignore[union-attr]  # set in docker()
            self.report.note("note", "dockerd", self._docker_log())
            return
        for model in models:
            self._computed(model, chosen[model.name][0], before)
        self._seen_by_info(models)
        self._adoption(models[0], units[0], entries)
        self._daemon_away(models[0], units[0])
        self._stop(models, units, before)
        self._too_large(image, wrapper, limits)

    def _entry(self, number: int, gpu: Gpu, limits: t.Optional[t.Dict[str, int]]) -> Json:
        entry: Json = {
            "name": "real-gpu-%d" % number,
            "image": "nvcr.io/nim/gpu-fleet/real-gpu:2.0.0",
            "gpus": [gpu.uuid],
            "port": 18000 + number,
            "bind_address": "127.0.0.1",
            "served_model_name": "gpu-fleet/real-gpu",
            "shm_size": "1GB",
            "start_timeout": 180,
            "stop_timeout": 20,
        }
        site = torch_directory()
        if site:
            # How a NIM gets files that are on the host already; here it is how the container gets PyTorch.
            entry.update(
                weights_directory=site, environment={"PYTHONPATH": WEIGHTS_PATH, "HOME": "/tmp", "USER": "nim"}
            )
        if limits is not None:
            entry["ulimits"] = limits
        return entry

    def _build_image(self, name: str) -> ImageState:
        """Python and the two programs, as an image with the labels of a NIM."""
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
        buffer = io.BytesIO(build_archive(self.host, [*wanted, self.smi]))
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
        image = self.api.image(name) or {}
        self.report.note("note", "image", "%d MiB" % (len(buffer.getvalue()) >> 20))
        family = family_of_image(image)
        self.report.same("family of the image", family.key, "2.x")
        return ImageState(str(image["Id"]), str(image["Id"]), "", family)

    def _image_requirements(self, image: ImageState) -> None:
        config = (self.api.image(image.identifier) or {}).get("Config") or {}
        self.report.check("its requirement is read", "NVIDIA_REQUIRE_CUDA=cuda>=12.0" in (config.get("Env") or []))

    def _start(self, model: NimModel, image: ImageState, gpus: t.Sequence[str], wrapper: str) -> Unit:
        configuration = configuration_of(model, image, gpus)
        self.host.make_dir(model.cache_directory, mode=0o750, uid=model.uid, gid=model.gid)
        self.host.write_file("/etc/nim/%s.json" % model.name, json.dumps(configuration), mode=0o644)
        self.keep("%s.json" % model.name, json.dumps(configuration, indent=1))
        unit = Unit(model.name, wrapper, "%s/%s.log" % (self.work, model.name))
        self.host.units[model.unit] = unit
        unit.start()
        return unit

    def _computed(self, model: NimModel, wanted: str, before: t.Mapping[str, int]) -> None:
        with urllib.request.urlopen("http://127.0.0.1:%d/gpu" % model.port, timeout=30) as response:
            told = json.load(response)
        self.report.check("%s computed right" % model.name, told["error"] < 1e-3, told)
        self.report.check("%s computed on the GPU that it was given" % model.name, told["uuid"] == wanted)
        self.report.same("%s: GPUs in sight of CUDA" % model.name, told["devices"], 1)
        self.report.check("%s: GPUs in sight of NVML: that one alone" % model.name, told["nvml"] == [wanted])
        seen = {gpu.uuid: gpu for gpu in observe_gpus(self.host).gpus}
        grown = (seen[wanted].memory_used_mib or 0) - before[wanted]
        self.report.check("%s: memory of its GPU has grown" % model.name, grown >= HELD_MIB, "%d MiB" % grown)
        holders = [holder for holder in driver_holders(self.host) if holder.container == model.container]
        self.report.check("%s holds its GPU" % model.name, holders, [holder.describe() for holder in holders])
        nodes = {device for holder in holders for device in holder.devices if re.fullmatch(r"/dev/nvidia\d+", device)}
        self.report.check(
            "%s holds no other" % model.name, nodes == {"/dev/nvidia%d" % (seen[wanted].minor or 0)}, nodes
        )
        listed = {entry["pid"] for entry in seen[wanted].processes}
        if listed:
            self.report.check("%s: the driver lists its process" % model.name, {one.pid for one in holders} <= listed)
        else:
            self.report.note("skipped", "%s: the driver lists its process" % model.name, "it lists none here")
        inspected = self.api.container(model.container) or {}
        configuration = inspected.get("HostConfig") or {}
        self.report.note("note", "limits of the container", configuration.get("Ulimits"))
        self.report.same("%s: capabilities dropped" % model.name, configuration.get("CapDrop"), ["ALL"])

    def _seen_by_info(self, models: t.Sequence[NimModel]) -> None:
        info = gather(self.host, (), self.api)
        self.keep("gather.json", json.dumps(info, indent=1, sort_keys=True))
        states = {entry["name"]: (entry["state"], entry["ready"]) for entry in info["nim"]}
        self.report.same("gpu_host_info: services", states, {model.name: ("ready", True) for model in models})
        ports = {entry["port"] for entry in info["ports"]}
        self.report.check("gpu_host_info: ports", {model.port for model in models} <= ports, sorted(ports))
        self.report.check("gpu_host_info: Docker", info["docker"]["running"] and info["docker"]["cdi"], info["docker"])
        named = {holder["container"] for holder in info["holders"]}
        self.report.check("gpu_host_info: holders", {model.container for model in models} <= named, sorted(named))
        self.report.same("gpu_host_info: errors", info["errors"], {})

    def _instance(self, model: NimModel) -> t.Tuple[str, str]:
        found = self.api.container(model.container) or {}
        state = found.get("State") or {}
        return str(found.get("Id")), str(state.get("StartedAt")) if state.get("Running") else "not running"

    def _adoption(self, model: NimModel, unit: Unit, entries: t.Sequence[Json]) -> None:
        instance = self._instance(model)
        unit.kill()
        time.sleep(1)
        self.report.check("the container outlives its wrapper", self._instance(model) == instance)
        unit.start()
        adopted = wait_for(lambda: "runs already and is adopted" in unit.said(), 30)
        self.report.check("a new wrapper adopts it", adopted and self._instance(model) == instance)
        outcome = HealthCheck(self.host, self.api, parse_targets(entries)).run(None, interval=0, wait=True)
        self.report.check("and it is ready", outcome.models[0]["ready"], outcome.models[0]["message"] or "")

    def _daemon_away(self, model: NimModel, unit: Unit) -> None:
        assert self.dockerd is not None
        instance = self._instance(model)
        networks = ((self.api.container(model.container) or {}).get("NetworkSettings") or {}).get("Networks") or {}
        address = networks["bridge"]["IPAddress"]
        self.dockerd.send_signal(signal.SIGKILL)
        self.dockerd.wait()
        self.report.check(
            "the wrapper notices that Docker is away", wait_for(lambda: "Docker is away" in unit.said(), 30)
        )
        # Not through the published port: on the loopback that is a process of the daemon's.
        with urllib.request.urlopen(
            "http://%s:%d/v1/health/ready" % (address, model.container_port), timeout=10
        ) as answer:
            self.report.same("the service answers without the daemon", answer.status, 200)
        try:
            os.unlink("/run/docker.pid")
        except FileNotFoundError:
            pass
        self._start_docker()
        back = wait_for(lambda: "goes on" in unit.said(), 60)
        self.report.check("the wrapper goes on", back, "" if back else unit.said()[-1000:] + self._docker_log())
        self.report.check("with the same container", self._instance(model) == instance)

    def _stop(self, models: t.Sequence[NimModel], units: t.Sequence[Unit], before: t.Mapping[str, int]) -> None:
        for model, unit in zip(models, units):
            began = time.monotonic()
            self.report.same("%s: code of the stopped wrapper" % model.name, unit.stop(), 0)
            self.report.check(
                "%s is stopped" % model.name,
                self._instance(model)[1] == "not running",
                "%.1f s" % (time.monotonic() - began),
            )
        # The driver frees memory a moment after the process has gone.
        freed = wait_for(
            lambda: all((gpu.memory_used_mib or 0) <= before[gpu.uuid] + 64 for gpu in observe_gpus(self.host).gpus), 20
        )
        self.report.check("the memory of the GPUs is free again", freed)
        names = {holder.container for holder in driver_holders(self.host)}
        self.report.check("no container holds a GPU", not names - {""}, sorted(names))
        for unit in units:
            self.keep("%s.log" % unit.name, unit.said())

    def _too_large(self, image: ImageState, wrapper: str, limits: t.Optional[t.Dict[str, int]]) -> None:
        """A model that does not fit into its GPU, with PyTorch's own words for it."""
        entry = self._entry(9, self.gpus[0], limits)
        if "environment" not in entry:
            self.report.note("skipped", "a model that is too large", "no PyTorch")
            return
        entry["environment"] = dict(entry["environment"], REAL_GPU_TOO_LARGE="1")
        model = parse_models([entry])[0]
        began = time.monotonic()
        unit = self._start(model, image, [self.gpus[0].uuid], wrapper)
        outcome = HealthCheck(self.host, self.api, parse_targets([entry])).run(None, interval=0, wait=True)
        seconds = time.monotonic() - began
        failures = [failure for _target, failure in outcome.failures]
        if self.report.check("a model that is too large is reported", failures, "after %.1f s" % seconds):
            failure = failures[0]
            self.report.check("with its cause", failure.signature, "%s: %s" % (failure.signature, failure.sentence))
            self.keep("too-large.log", "\n".join(failure.lines))
        assert unit.process is not None
        self.report.check(
            "its wrapper ends with a failure", unit.process.wait(timeout=30) != 0, unit.said().splitlines()[-1]
        )

    def end(self) -> None:
        """Take everything down that was started here."""
        for unit in self.host.units.values():
            if unit.process is not None and unit.process.poll() is None:
                unit.kill()
        if self.dockerd is None:
            return
        names = self.host.run(["docker", "ps", "-aq"]).stdout.split()
        if names:
            self.host.run(["docker", "rm", "-f", *names], timeout=60)
        self.dockerd.terminate()
        try:
            self.dockerd.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.dockerd.kill()
        # A containerd that a killed daemon has left behind belongs to this run too.
        pid = (self.host.read_text("/run/docker/containerd/containerd.pid") or "").strip()
        if pid.isdigit() and "containerd" in (self.host.read_text("/proc/%s/cmdline" % pid) or ""):
            os.kill(int(pid), signal.SIGTERM)
        group = "/sys/fs/cgroup/" + CGROUP
        if os.path.isdir(group):
            os.rmdir(group)


# -- helpers --------------------------------------------------------------------------------------


def configuration_of(model: NimModel, image: ImageState, gpus: t.Sequence[str]) -> Json:
    """What nim_service would write for the wrapper."""
    return build_configuration(
        model, image, gpus, injection="cdi", cgroup_driver="cgroupfs", secret=Secrets("0" * 64, {})
    )


_KNOWN: t.Dict[str, str] = {}


def redact(text: str) -> str:
    """Text without what identifies a board; the same GPU keeps the same substitute."""

    def replaced(match: t.Match[str]) -> str:
        found = match.group()
        if found in _KNOWN.values():
            return found
        return _KNOWN.setdefault(found, "GPU-00000000-0000-0000-0000-%012x" % (len(_KNOWN) + 1))

    text = re.sub(r"GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", replaced, text)
    return re.sub(
        r"<(serial|pdi|board_part_number|gpu_part_number|cluster_uuid|chassis_serial_number|board_id)>[^<]*<",
        lambda match: "<%s>REDACTED<" % match.group(1),
        text,
    )


def flavour_of(host: Host) -> str:
    text = host.read_text("/proc/driver/nvidia/version") or ""
    return "open" if "Open Kernel Module" in text else "proprietary"


def library_path(name: str) -> str:
    """Where a library is loaded from."""
    import ctypes

    ctypes.CDLL(name)
    with open("/proc/self/maps", encoding="utf-8") as stream:
        for line in stream:
            path = line.split(None, 5)[-1].strip()
            if os.path.basename(path).startswith(name[: name.index(".so")] + ".so"):
                return path
    raise NvmlError("%s is not in the memory map" % name)


def torch_directory() -> t.Optional[str]:
    """The directory that holds PyTorch for this Python, None without."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    return os.path.dirname(next(iter(spec.submodule_search_locations or [""]))) if spec else None


def grantable_limits() -> t.Optional[t.Dict[str, int]]:
    """Of the collection's default limits those that can be set here; None when all can."""
    wanted = {"memlock": (resource.RLIMIT_MEMLOCK, -1), "nofile": (resource.RLIMIT_NOFILE, 65536)}
    wanted["stack"] = (resource.RLIMIT_STACK, 67108864)
    good: t.Dict[str, int] = {}
    for name, (which, value) in wanted.items():
        _soft, hard = resource.getrlimit(which)
        try:
            resource.setrlimit(which, (resource.getrlimit(which)[0], resource.RLIM_INFINITY if value < 0 else value))
            good[name] = value
        except (OSError, ValueError):
            continue
        finally:
            try:
                resource.setrlimit(which, (resource.getrlimit(which)[0], hard))
            except (OSError, ValueError):
                pass
    return None if len(good) == len(wanted) else good


def _standard_library(member: tarfile.TarInfo) -> t.Optional[tarfile.TarInfo]:
    unwanted = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "tkinter", "ensurepip"}
    if os.path.basename(member.name) in unwanted or "/config-" in member.name:
        return None
    member.uid = member.gid = 0
    return member


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    return Verification(options.work, options.output).run()


if __name__ == "__main__":
    raise SystemExit(main())
