# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection's own code against the GPUs, the driver and a Docker daemon of this very machine.

Started by run.sh in mounts and a network of its own. Ends with 1 when a check failed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import traceback
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu, GpuTelemetry
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_holders import driver_holders
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import observe_gpus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_placement import Wish, place
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_smoke_test import build_archive
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_container_toolkit import NvidiaContainerToolkit
from ansible_collections.gpu_fleet.nim.plugins.module_utils._requirements import InvalidExpressionError, satisfied

# Beside this file.
from engine import Engine
from machine import Machine
from nvml import Nvml
from report import Json, Report, wait_for
from services import Services

HERE = os.path.dirname(os.path.abspath(__file__))
#: What nvidia-smi is asked for as CSV.
COLUMNS = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.used",
    "memory.free",
    "compute_mode",
    "mig.mode.current",
    "pci.bus_id",
    "persistence_mode",
)


class Verification:
    """All checks, in order; a later one may use what an earlier one found out."""

    def __init__(self, work: str, output: str) -> None:
        self.report = Report(output)
        self.host = Machine(work)
        self.engine = Engine(work, self.host, self.report)
        self.gpus: t.Tuple[Gpu, ...] = ()
        self.smi = self.host.which("nvidia-smi") or "nvidia-smi"

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
        try:
            for unit in self.host.systemd.units.values():
                unit.end()
            self.engine.end()
        except Exception:
            self.report.check("everything is taken down again", False, traceback.format_exc())
        return self.report.end()

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
        self.report.keep("nvidia-smi-q-x.xml", xml)
        self.gpus = found.gpus
        driver, cuda = nvml.driver()
        same("driver version, NVML", found.smi_driver_version, driver)
        same("CUDA version, NVML", found.cuda_version, cuda)
        same("driver version, kernel module", found.driver.version if found.driver else "", driver)
        same("flavour", found.driver.flavour if found.driver else "", flavour_of(self.host))
        same("error of nvidia-smi", found.smi_error, "")
        rows, seen, blocks = self._witnesses()
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

    def _witnesses(self) -> t.Tuple[t.List[t.List[str]], t.List[Json], t.List[str]]:
        """What nvidia-smi prints as CSV, what NVML says, and the XML of each GPU, at this moment."""
        query = "--query-gpu=" + ",".join(COLUMNS)
        listed = self.host.run([self.smi, query, "--format=csv,noheader,nounits"]).stdout
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(listed)) if row]
        xml = self.host.run([self.smi, "-q", "-x"]).stdout
        return rows, Nvml().gpus(), re.findall(r"<gpu id=.*?</gpu>", xml, re.DOTALL)

    def _compare(self, gpu: Gpu, row: t.Sequence[str], known: Json, block: str, who: str = "") -> None:
        """Every field of a GPU against everybody else who knows it."""
        cells = dict(zip(COLUMNS, row))
        compared = set()

        def check(field: str, witness: str, other: t.Any, mine: t.Any = None, near: int = 0) -> None:
            compared.add(field)
            mine = getattr(gpu, field) if mine is None else mine
            good = abs((mine or 0) - other) <= near if near else mine == other
            text = "%s ~ %s" % (mine, other) if near else str(mine) if good else "%r != %r" % (mine, other)
            self.report.check("%sGPU %d %s, %s" % (who, gpu.index, field, witness), good, text)

        def raw(path: str) -> str:
            text = block
            for name in path.split("/"):
                part = re.search(r"<%s>(.*?)</%s>" % (name, name), text, re.DOTALL)
                text = part.group(1) if part else ""
            return "" if text.strip() in ("N/A", "[N/A]") else text.strip()

        for field in ("index", "uuid", "name", "brand", "architecture", "compute_mode", "mig", "minor", "bdf"):
            check(field, "NVML", known[field])
        for field in ("persistence_mode", "memory_total_mib", "fabric_state"):
            check(field, "NVML", known[field])
        for field, column in (
            ("index", "index"),
            ("uuid", "uuid"),
            ("name", "name"),
            ("memory_total_mib", "memory.total"),
        ):
            check(field, "CSV", cells[column], str(getattr(gpu, field)))
        for field, column in (("memory_used_mib", "memory.used"), ("memory_free_mib", "memory.free")):
            # Somebody may allocate between two questions.
            check(field, "CSV", int(cells[column]), near=64)
            check(field, "NVML", known[field], near=64)
        check("compute_mode", "CSV", cells["compute_mode"])
        check("mig", "CSV", "" if cells["mig.mode.current"] == "[N/A]" else cells["mig.mode.current"])
        check("bdf", "CSV", cells["pci.bus_id"].lower()[4:])
        check("persistence_mode", "CSV", cells["persistence_mode"])
        for field, path in (
            ("uuid", "uuid"),
            ("architecture", "product_architecture"),
            ("brand", "product_brand"),
            ("fabric_state", "fabric/state"),
            ("fabric_status", "fabric/status"),
            ("recovery_action", "gpu_recovery_action"),
        ):
            check(field, "XML", raw(path))
        check("processes", "NVML", known["pids"], sorted(one["pid"] for one in gpu.processes if one["type"] == "C"))
        if gpu.mig != "Enabled":
            check("mig_devices", "MIG mode", (), tuple(gpu.mig_devices))
        self._condition(gpu, known["telemetry"], raw, who)
        compared.add("telemetry")
        for other in sorted({field.name for field in dataclasses.fields(Gpu)} - compared):
            self.report.note("skipped", "%sGPU %d %s" % (who, gpu.index, other), "nobody else was asked for it")

    def _condition(self, gpu: Gpu, known: Json, raw: t.Callable[[str], str], who: str) -> None:
        """What a GPU says of its own condition against NVML, and against its own page where NVML has no question."""
        mine = dataclasses.asdict(gpu.telemetry)
        # NVML is not asked for memory beyond repair, and has other words for what ails a fabric.
        mine["repairs"] = tuple(name for name in mine["repairs"] if name != "unrepairable_memory")
        mine["fabric_troubles"] = tuple(trouble.partition(":")[0] for trouble in mine["fabric_troubles"])
        checks = [(name, "NVML", value) for name, value in known.items()]
        mine["unrepairable_memory"] = "unrepairable_memory" in gpu.telemetry.repairs
        checks += [("unrepairable_memory", "XML", raw("ecc_errors/unrepairable_memory") == "Yes")]
        # A GPU that answers NVML is not lost.
        checks += [("lost", "NVML", "")]
        mine["slowdowns"] = tuple(mine["slowdowns"])
        for name, witness, value in checks:
            label = "%sGPU %d telemetry %s, %s" % (who, gpu.index, name, witness)
            text = str(value) if mine[name] == value else "%r != %r" % (mine[name], value)
            self.report.check(label, mine[name] == value, text)
        for name in sorted(set(mine) - {name for name, _witness, _value in checks}):
            self.report.note("skipped", "%sGPU %d telemetry %s" % (who, gpu.index, name), "NVML has no answer")

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
        self.report.keep("gpu_host_info.json", json.dumps(answer, indent=1, sort_keys=True))
        self.report.same("changed", answer["changed"], False)
        self.report.same("GPUs", [gpu["uuid"] for gpu in answer["gpus"]], [gpu.uuid for gpu in self.gpus])
        for entry, row, known, block in zip(answer["gpus"], *self._witnesses()):
            telemetry = GpuTelemetry(**entry.pop("telemetry"))
            self._compare(Gpu(telemetry=telemetry, **entry), row, known, block, "gpu_host_info: ")
        self.report.same("PCI addresses", [gpu["bdf"] for gpu in answer["pci_gpus"]], [gpu.bdf for gpu in self.gpus])
        self.report.same("flavour", answer["driver"]["flavour"], flavour_of(self.host))
        states = [gpu.fabric_state for gpu in self.gpus if gpu.fabric_state]
        self.report.same("fabric states", answer["fabric"]["states"], states)
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
                self.report.keep("nvidia-smi-q-x.process.xml", self.host.run([self.smi, "-q", "-x"]).stdout)
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
        self._many(uuids)

    def _many(self, uuids: t.Sequence[str]) -> None:
        """All ways to fill this host with models of one size."""
        count = len(uuids)
        for size in [size for size in range(1, count + 1) if count % size == 0]:
            wishes = [Wish("m%d" % number, size) for number in range(count // size)]
            placed = place(wishes, self.gpus)
            given = [uuid for wish in wishes for uuid in placed[wish.name]]
            what = "%d models of %d GPUs" % (len(wishes), size)
            self.report.check(what, sorted(given) == sorted(uuids) and set(map(len, placed.values())) == {size})
            self.report.check(what + ": the same every time", place(wishes, self.gpus) == placed)
            # The first one goes, the others are listed the other way round.
            kept = [Wish(wish.name, size, placed[wish.name]) for wish in reversed(wishes[1:])]
            stayed = {wish.name: placed[wish.name] for wish in kept}
            self.report.check(what + ": all stay when one goes", place(kept, self.gpus) == stayed)
            back = place([*kept, Wish("new", size)], self.gpus)["new"]
            self.report.check(what + ": a new one gets what became free", back == placed["m0"])

    # -- Docker -----------------------------------------------------------------------------------

    def docker(self) -> None:
        """A Docker daemon of our own, with CDI"""
        self.engine.begin(self.gpus)

    def smoke_test(self) -> None:
        """The toolkit's smoke test: an image out of this host's own files, and every GPU seen in a container"""
        archive = build_archive(self.host, ["/bin/sh", self.smi])
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            names = ["/" + member.name for member in tar.getmembers() if member.isfile()]
        self.report.check("the image has a shell and the C library", any("libc.so.6" in name for name in names), names)
        self.report.check(
            "and nothing of the driver", not [name for name in names if "nvidia" in name or "libcuda" in name]
        )
        if not self.engine.up:
            self.report.note("skipped", "smoke test", "no Docker")
            return
        toolkit = NvidiaContainerToolkit(injection="cdi")
        toolkit._smoke_test(self.host)
        record = json.loads(self.host.read_text("/run/gpu_fleet/validations/nvidia_container_toolkit.json") or "{}")
        self.report.check("it passed", record["gpus"] == sorted(gpu.uuid for gpu in self.gpus), record)

    def services(self) -> None:
        """Services by nim_service: on the GPUs that they were given, from their options to their end"""
        if not self.engine.up:
            self.report.note("skipped", "services", "no Docker")
            return
        Services(self.host, self.engine, self.report, self.gpus).run()


def flavour_of(host: Host) -> str:
    text = host.read_text("/proc/driver/nvidia/version") or ""
    return "open" if "Open Kernel Module" in text else "proprietary"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    return Verification(options.work, options.output).run()


if __name__ == "__main__":
    raise SystemExit(main())
