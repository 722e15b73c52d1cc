# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What GPUs a host has and who uses them, read without changing anything.

nvidia-smi loads the kernel module when it is not loaded; therefore it is asked only while the module is loaded.
Everything else comes from sysfs and procfs and works on a host without any driver.
"""

from __future__ import annotations

import re
import typing as t
import xml.etree.ElementTree as ET  # the XML comes from the host's own nvidia-smi
from dataclasses import dataclass, field, replace

from ._host import Host
from ._untrusted import is_digits, json_object

_NVIDIA_VENDOR = "0x10de"
_SMI_TIMEOUT = 90.0  # seconds; eight GPUs without persistence mode take half a minute

# First and last PCI device id of every generation (facts from the public PCI id database). Blackwell is the newest
# here and its range is open upwards: a newer GPU takes the open modules as well.
_ARCHITECTURE_OF_ID: tuple[tuple[int, int, str], ...] = (
    (0x0FB0, 0x0FB0, "Maxwell"),
    (0x0FC0, 0x103F, "Kepler"),
    (0x1180, 0x11FF, "Kepler"),
    (0x1280, 0x130F, "Kepler"),
    (0x1340, 0x143F, "Maxwell"),
    (0x15C0, 0x15FF, "Pascal"),
    (0x1600, 0x16FF, "Maxwell"),
    (0x1720, 0x173F, "Pascal"),
    (0x1740, 0x17FF, "Maxwell"),
    (0x1B00, 0x1D7F, "Pascal"),
    (0x1D80, 0x1DFF, "Volta"),
    (0x1E00, 0x1FFF, "Turing"),
    (0x2080, 0x20FF, "Ampere"),
    (0x2180, 0x21FF, "Turing"),
    (0x2200, 0x22A2, "Ampere"),
    (0x2300, 0x23FF, "Hopper"),
    (0x2400, 0x25FF, "Ampere"),
    (0x2680, 0x28FF, "Ada Lovelace"),
    (0x2900, 0xFFFF, "Blackwell"),
)
#: GH200: the Hopper of a Grace superchip, which takes the open modules only.
_GRACE_HOPPER = range(0x2342, 0x2350)
#: GB200 and GB300: Blackwell of a Grace superchip; these machines form IMEX domains.
_GRACE_BLACKWELL = (0x2941, 0x31C2)


@dataclass(frozen=True)
class PciGpu:
    """A GPU on the PCI bus, driver or not.

    Attributes:
        bdf: PCI address in the form of sysfs, ``0000:00:06.0``.
        device_id: Four hexadecimal digits, lower case.
        architecture: As nvidia-smi names it; empty when the id is older than every supported GPU.
        bound: Kernel driver bound to it: ``nvidia``, ``nouveau``, ``vfio-pci`` or empty.
    """

    bdf: str
    device_id: str
    architecture: str
    bound: str


@dataclass(frozen=True)
class LoadedDriver:
    """The kernel module in memory. ``flavour`` is ``open``, ``proprietary`` or empty when it does not say.

    ``can_unload`` is False on a kernel built without module unloading.
    """

    version: str
    flavour: str
    can_unload: bool


@dataclass(frozen=True)
class GpuTelemetry:
    """What a GPU says of its own condition; an empty string or None where it does not tell.

    Attributes:
        ecc: ``Enabled`` or ``Disabled``; ``ecc_pending`` from the next reset on.
        ecc_volatile: Uncorrectable ECC errors since the driver was loaded or the GPU was reset.
        ecc_aggregate: Uncorrectable ECC errors in the GPU's life.
        sram_threshold_exceeded, remap_pending, remap_failure, retirement_pending: ``Yes`` or ``No``.
        repairs: Of channel repair pending, TPC repair pending and unrepairable memory those that are ``Yes``.
        slowdowns: Hardware slowdowns that are active now, by the names of nvidia-smi without their common beginning.
        fabric_health: Summary of the fabric's health, for example ``Healthy``; ``fabric_troubles`` what is wrong.
        lost: The text with which the GPU refuses to answer, for example ``GPU requires reset``.
    """

    ecc: str = ""
    ecc_pending: str = ""
    ecc_volatile: int | None = None
    ecc_aggregate: int | None = None
    sram_threshold_exceeded: str = ""
    remap_pending: str = ""
    remap_failure: str = ""
    retirement_pending: str = ""
    repairs: tuple[str, ...] = ()
    slowdowns: tuple[str, ...] = ()
    mig_pending: str = ""
    fabric_health: str = ""
    fabric_troubles: tuple[str, ...] = ()
    lost: str = ""


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver sees it. Memory in MiB; None where the driver does not tell."""

    index: int
    uuid: str
    name: str
    brand: str
    architecture: str
    memory_total_mib: int | None
    memory_used_mib: int | None
    memory_free_mib: int | None
    mig: str
    compute_mode: str
    minor: int | None
    bdf: str
    processes: tuple[dict[str, t.Any], ...] = ()
    mig_devices: tuple[dict[str, t.Any], ...] = ()
    persistence_mode: str = ""
    recovery_action: str = ""
    fabric_state: str = ""
    fabric_status: str = ""
    telemetry: GpuTelemetry = GpuTelemetry()


@dataclass(frozen=True)
class GpuInventory:
    """All there is to know about the GPUs of a host at one moment.

    Attributes:
        nvswitches: Number of NVSwitch devices on the PCI bus.
        nvlink5: True where NVLink switches are managed over InfiniBand (HGX B200 and newer).
        imex: True on Grace Blackwell, whose NVLink domain spans hosts.
        cuda_version: CUDA version of the user-space driver, empty when nvidia-smi did not run.
        smi_error: Why nvidia-smi gave no answer; empty when it did or was not asked.
        unlisted: PCI addresses of GPUs that the driver is bound to and nvidia-smi does not list, other than those that
            the driver was told to leave out.
    """

    pci: tuple[PciGpu, ...] = ()
    nvswitches: int = 0
    nvlink5: bool = False
    imex: bool = False
    driver: LoadedDriver | None = None
    gpus: tuple[Gpu, ...] = ()
    cuda_version: str = ""
    smi_driver_version: str = ""
    smi_error: str = ""
    unlisted: tuple[str, ...] = ()

    @property
    def architectures(self) -> tuple[str, ...]:
        """Distinct architectures of all GPUs, sorted."""
        return tuple(sorted({gpu.architecture for gpu in self.pci if gpu.architecture}))

    @property
    def needs_fabric_manager(self) -> bool:
        return self.nvswitches > 0 or self.nvlink5

    @property
    def fabric_states(self) -> tuple[str, ...]:
        """Fabric state of every GPU that has one (N/A left out)."""
        return tuple(gpu.fabric_state for gpu in self.gpus if gpu.fabric_state)


@dataclass(frozen=True)
class Holder:
    """A process that has NVIDIA device files open."""

    pid: int
    command: str
    unit: str
    container_id: str
    container: str
    devices: tuple[str, ...] = field(default=(), compare=False)

    def describe(self) -> str:
        """``pid 812 (python3 serve.py) in container nim-llama, unit docker-….scope``."""
        text = "pid %d (%s)" % (self.pid, self.command or "?")
        if self.container or self.container_id:
            return "%s in container %s" % (text, self.container or self.container_id[:12])
        if self.unit:
            return "%s of unit %s" % (text, self.unit)
        return text

    def as_dict(self) -> dict[str, t.Any]:
        return {
            "pid": self.pid,
            "command": self.command,
            "unit": self.unit,
            "container_id": self.container_id,
            "container": self.container,
            "devices": list(self.devices),
        }


# -- PCI ------------------------------------------------------------------------------------------


def _hexadecimal(text: str) -> int:
    """A PCI id, with or without ``0x``; -1 for anything else."""
    return int(text, 16) if re.match(r"(0x)?[0-9a-fA-F]{1,8}\Z", text) else -1


def architecture_of_device(device_id: str, machine: str = "x86_64") -> str:
    """Architecture of a PCI device id (hexadecimal, with or without ``0x``); empty when it is unknown."""
    number = _hexadecimal(device_id)
    if machine == "aarch64" and number in _GRACE_HOPPER:
        return "Grace Hopper"
    for first, last, name in _ARCHITECTURE_OF_ID:
        if first <= number <= last:
            return name
    return ""


def observe_pci(host: Host) -> tuple[tuple[PciGpu, ...], int]:
    """GPUs on the PCI bus and the number of NVSwitch devices, from sysfs."""
    gpus: list[PciGpu] = []
    switches = 0
    machine = host.machine()
    base = "/sys/bus/pci/devices"
    for bdf in host.list_dir(base):
        if (host.read_text("%s/%s/vendor" % (base, bdf)) or "").strip().lower() != _NVIDIA_VENDOR:
            continue
        pci_class = (host.read_text("%s/%s/class" % (base, bdf)) or "").strip().lower()
        if pci_class.startswith("0x0680"):
            switches += 1
            continue
        if not pci_class.startswith(("0x0300", "0x0302")):
            continue
        device = (host.read_text("%s/%s/device" % (base, bdf)) or "").strip().lower()
        device = device[2:] if device.startswith("0x") else device
        link = host.read_link("%s/%s/driver" % (base, bdf)) or ""
        gpus.append(PciGpu(bdf, device, architecture_of_device(device, machine), link.rsplit("/", 1)[-1]))
    return tuple(gpus), switches


def _has_nvlink5(host: Host) -> bool:
    """NVLink switches of the fifth generation carry SW_MNG in the vital product data of their InfiniBand port."""
    base = "/sys/class/infiniband"
    return any(b"SW_MNG" in (host.read_bytes("%s/%s/device/vpd" % (base, name)) or b"") for name in host.list_dir(base))


# -- loaded module --------------------------------------------------------------------------------


def parse_driver_version(text: str) -> tuple[str, str]:
    """Version and flavour out of ``/proc/driver/nvidia/version``; empty strings when it is not understood."""
    for line in text.splitlines():
        if not line.startswith("NVRM version:"):
            continue
        version = re.search(r"\s(\d{3}\.\d+(?:\.\d+)?)\s", line + " ")
        flavour = "open" if "Open Kernel Module" in line else "proprietary" if "Kernel Module" in line else ""
        return (version.group(1) if version else "", flavour)
    return "", ""


def loaded_modules(host: Host) -> set[str]:
    """Names of loaded kernel modules that can be the NVIDIA driver's (from procfs and sysfs)."""
    names = {line.split(" ", 1)[0] for line in (host.read_text("/proc/modules") or "").splitlines() if line}
    for name in host.list_dir("/sys/module"):
        # Built-in modules have a directory too, but no initstate.
        if name not in names and (
            host.exists("/sys/module/%s/initstate" % name) or host.exists("/sys/module/%s/refcnt" % name)
        ):
            names.add(name)
    return names


def observe_loaded_driver(host: Host) -> LoadedDriver | None:
    """The loaded NVIDIA kernel module, or None. A missing refcnt does not mean that it is not loaded."""
    version, flavour = parse_driver_version(host.read_text("/proc/driver/nvidia/version") or "")
    sysfs = (host.read_text("/sys/module/nvidia/version") or "").strip()
    if not version and not sysfs:
        listed = re.search(r"^nvidia ", host.read_text("/proc/modules") or "", re.MULTILINE)
        if not listed and not host.exists("/sys/module/nvidia/initstate"):
            return None
    return LoadedDriver(sysfs or version, flavour, host.exists("/sys/module/nvidia/refcnt"))


# -- nvidia-smi -----------------------------------------------------------------------------------

_NO_VALUE = {"", "n/a", "[n/a]", "unknown error", "gpu requires reset", "[gpu requires reset]", "[unknown error]"}


def _text(element: ET.Element | None, path: str) -> str:
    """Text of an element; empty when it is missing or says that there is no value."""
    found = (element.findtext(path) if element is not None else None) or ""
    found = found.strip()
    if found.lower() in _NO_VALUE or found.startswith(("Requested functionality", "ERR!", "[Not Supported]")):
        return ""
    return found


def _number(text: str) -> int | None:
    match = re.match(r"-?[0-9]{1,18}(?![0-9])", text)
    return int(match.group()) if match else None


def _mib(text: str) -> int | None:
    """``143771 MiB`` -> 143771; other units are converted, unknown text gives None."""
    match = re.match(r"([0-9]{1,18})(?:\s*([KMGT])i?B)?\s*\Z", text)
    if not match:
        return None
    factor = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}[match.group(2) or "M"]
    return int(int(match.group(1)) * factor)


def normalise_bdf(bdf: str) -> str:
    """``00000000:00:06.0`` (nvidia-smi) -> ``0000:00:06.0`` (sysfs)."""
    domain, dummy, rest = bdf.strip().lower().partition(":")
    return "%s:%s" % (domain[-4:].rjust(4, "0"), rest) if rest else bdf.strip().lower()


def parse_smi(xml: str) -> tuple[str, str, tuple[Gpu, ...]]:
    """CUDA version, driver version and GPUs out of ``nvidia-smi -q -x``.

    Elements come and go between branches and values may be N/A or an error text: what is missing becomes an empty
    string or None, never an exception.

    Raises:
        ValueError: When the text is no XML at all, for example a message of nvidia-smi.
    """
    try:
        root = ET.fromstring(xml)  # noqa: S314 - output of the host's own nvidia-smi
    except ET.ParseError as error:
        raise ValueError(str(error)) from error
    gpus: list[Gpu] = []
    for index, element in enumerate(root.findall("gpu")):
        processes = [
            {
                "pid": _number(_text(entry, "pid")),
                "type": _text(entry, "type"),
                "name": _text(entry, "process_name"),
                "used_memory_mib": _mib(_text(entry, "used_memory")),
            }
            for entry in element.findall("processes/process_info")
        ]
        mig_devices = [
            {
                "index": _number(_text(entry, "index")),
                "gpu_instance_id": _number(_text(entry, "gpu_instance_id")),
                "compute_instance_id": _number(_text(entry, "compute_instance_id")),
                "uuid": _text(entry, "uuid"),
                "memory_total_mib": _mib(_text(entry, "fb_memory_usage/total")),
                "memory_used_mib": _mib(_text(entry, "fb_memory_usage/used")),
            }
            for entry in element.findall("mig_devices/mig_device")
        ]
        gpus.append(
            Gpu(
                index=index,
                uuid=_text(element, "uuid"),
                name=_text(element, "product_name"),
                brand=_text(element, "product_brand"),
                architecture=_text(element, "product_architecture"),
                memory_total_mib=_mib(_text(element, "fb_memory_usage/total")),
                memory_used_mib=_mib(_text(element, "fb_memory_usage/used")),
                memory_free_mib=_mib(_text(element, "fb_memory_usage/free")),
                mig=_text(element, "mig_mode/current_mig"),
                compute_mode=_text(element, "compute_mode"),
                minor=_number(_text(element, "minor_number")),
                bdf=normalise_bdf(element.get("id") or _text(element, "pci/pci_bus_id")),
                processes=tuple(processes),
                mig_devices=tuple(mig_devices),
                persistence_mode=_text(element, "persistence_mode"),
                recovery_action=_text(element, "gpu_recovery_action"),
                fabric_state=_text(element, "fabric/state"),
                fabric_status=_text(element, "fabric/status"),
                telemetry=_telemetry(element),
            )
        )
    return _text(root, "cuda_version"), _text(root, "driver_version"), tuple(gpus)


#: What nvidia-smi prints in place of values when a GPU does not answer any more.
_LOST = ("gpu requires reset", "gpu is lost")
_REPAIRS = ("channel_repair_pending", "tpc_repair_pending", "unrepairable_memory")


def _telemetry(gpu: ET.Element) -> GpuTelemetry:
    """Branches differ: clocks were throttled before they had events, and memory was counted by bits before Ampere."""
    fabric = gpu.find("fabric/health")
    return GpuTelemetry(
        ecc=_text(gpu, "ecc_mode/current_ecc"),
        ecc_pending=_text(gpu, "ecc_mode/pending_ecc"),
        ecc_volatile=_uncorrectable(gpu.find("ecc_errors/volatile")),
        ecc_aggregate=_uncorrectable(gpu.find("ecc_errors/aggregate")),
        sram_threshold_exceeded=_text(gpu, "ecc_errors/aggregate/sram_threshold_exceeded"),
        remap_pending=_text(gpu, "remapped_rows/remapped_row_pending"),
        remap_failure=_text(gpu, "remapped_rows/remapped_row_failure"),
        retirement_pending=_text(gpu, "retired_pages/pending_retirement")
        or _text(gpu, "retired_pages/pending_blacklist"),
        repairs=tuple(name for name in _REPAIRS if _text(gpu, "ecc_errors/" + name) == "Yes"),
        slowdowns=tuple(
            element.tag.split("_reason_", 1)[1]
            for path in ("clocks_event_reasons", "clocks_throttle_reasons")
            for element in gpu.findall(path + "/*")
            if "_reason_hw_" in element.tag and (element.text or "").strip() == "Active"
        ),
        mig_pending=_text(gpu, "mig_mode/pending_mig"),
        fabric_health=_text(gpu, "fabric/health/summary"),
        fabric_troubles=tuple(
            element.tag
            for element in (fabric if fabric is not None else ())
            if (element.text or "").strip().lower() in ("true", "yes", "degraded")
        ),
        lost=next(
            (text for text in map(str.strip, gpu.itertext()) if text.strip("[]").lower() in _LOST),
            "",
        ).strip("[]"),
    )


def _uncorrectable(counters: ET.Element | None) -> int | None:
    """Sum of the counters of uncorrectable errors; None when none of them has a value."""
    found = [
        number
        for element in (counters if counters is not None else ())
        if "_uncorrectable" in element.tag
        for number in [_number(_text(element, "."))]
        if number is not None
    ]
    if found:
        return sum(found)
    return _number(_text(counters, "double_bit/total"))


def _unlisted(host: Host, pci: t.Sequence[PciGpu], gpus: t.Sequence[Gpu]) -> tuple[str, ...]:
    listed = {gpu.bdf for gpu in gpus}
    return tuple(
        gpu.bdf
        for gpu in pci
        if gpu.bound == "nvidia"
        and gpu.bdf not in listed
        and not re.search(
            r"^GPU Excluded:\s*Yes",
            host.read_text("/proc/driver/nvidia/gpus/%s/information" % gpu.bdf) or "",
            re.MULTILINE,
        )
    )


def with_mig_uuids(gpus: t.Sequence[Gpu], listed: str) -> tuple[Gpu, ...]:
    """GPUs whose MIG devices have the UUIDs that ``nvidia-smi -L`` lists; not every branch has them in its XML."""
    found: dict[tuple[str, int], str] = {}
    gpu_uuid = ""
    for line in listed.splitlines():
        gpu = re.match(r"GPU \d+: .*\(UUID: (GPU-[0-9A-Fa-f-]+)\)", line)
        if gpu:
            gpu_uuid = gpu.group(1)
        device = re.match(r"\s+MIG \S+\s+Device\s+(\d+): \(UUID: (MIG-[0-9A-Za-z/-]+)\)", line)
        if device:
            found[(gpu_uuid, int(device.group(1)))] = device.group(2)
    return tuple(
        replace(
            gpu,
            mig_devices=tuple(
                device if device.get("uuid") else dict(device, uuid=found.get((gpu.uuid, device.get("index") or 0), ""))
                for device in gpu.mig_devices
            ),
        )
        for gpu in gpus
    )


def _gpus_from_proc(host: Host, pci: t.Sequence[PciGpu]) -> tuple[Gpu, ...]:
    """Name, UUID and minor number of every GPU from procfs: works while the user-space driver does not match."""
    architectures = {gpu.bdf: gpu.architecture for gpu in pci}
    gpus: list[Gpu] = []
    base = "/proc/driver/nvidia/gpus"
    for bdf in host.list_dir(base):
        text = host.read_text("%s/%s/information" % (base, bdf)) or ""
        values = {
            key.strip(): value.strip() for key, separator, value in (line.partition(":") for line in text.splitlines())
        }
        minor = _number(values.get("Device Minor", ""))
        gpus.append(
            Gpu(
                index=len(gpus),
                uuid=values.get("GPU UUID", ""),
                name=values.get("Model", ""),
                brand="",
                architecture=architectures.get(bdf, ""),
                memory_total_mib=None,
                memory_used_mib=None,
                memory_free_mib=None,
                mig="",
                compute_mode="",
                minor=minor,
                bdf=bdf,
            )
        )
    return tuple(gpus)


def observe_gpus(host: Host, *, with_smi: bool = True) -> GpuInventory:
    """Look at all GPUs of a host.

    Args:
        with_smi: False leaves nvidia-smi out; GPUs then come from procfs, without memory and processes.
    """
    pci, switches = observe_pci(host)
    driver = observe_loaded_driver(host)
    cuda = smi_version = smi_error = ""
    gpus: tuple[Gpu, ...] = ()
    unlisted: tuple[str, ...] = ()
    if driver is not None:
        if with_smi:
            result = host.run(["nvidia-smi", "-q", "-x"], timeout=_SMI_TIMEOUT)
            try:
                cuda, smi_version, gpus = parse_smi(result.stdout)
            except ValueError:
                smi_error = result.last_line()
            if not result.ok and not smi_error and not gpus:
                smi_error = result.last_line()
            if gpus:
                unlisted = _unlisted(host, pci, gpus)
            if any(not device.get("uuid") for gpu in gpus for device in gpu.mig_devices):
                gpus = with_mig_uuids(gpus, host.run(["nvidia-smi", "-L"], timeout=_SMI_TIMEOUT).stdout)
        if not gpus:
            gpus = _gpus_from_proc(host, pci)
    return GpuInventory(
        pci=pci,
        nvswitches=switches,
        nvlink5=_has_nvlink5(host) if pci else False,
        imex=any(_hexadecimal(gpu.device_id) in _GRACE_BLACKWELL for gpu in pci),
        driver=driver,
        gpus=gpus,
        cuda_version=cuda,
        smi_driver_version=smi_version,
        smi_error=smi_error,
        unlisted=unlisted,
    )


# -- holders --------------------------------------------------------------------------------------


def parse_cgroup(text: str) -> tuple[str, str]:
    """systemd unit and container id out of ``/proc/<pid>/cgroup`` (version 1 or 2); empty strings when there is none."""
    unit = container = ""
    for line in text.splitlines():
        path = line.split(":", 2)[-1]
        match = re.search(r"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?(?:/|$)", path)
        if match:
            container = match.group(1)
        parts = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
        if parts and (not unit or line.startswith(("0::", "1:name=systemd"))):
            unit = parts[-1]
    return unit, container


def container_name(host: Host, container_id: str) -> str:
    """Name of a Docker container from Docker's own record, without asking the daemon; empty when unknown."""
    if not container_id:
        return ""
    text = host.read_text("/var/lib/docker/containers/%s/config.v2.json" % container_id)
    return str(json_object(text).get("Name") or "").lstrip("/")


def _is_gpu_device(target: str, drm_nodes: t.Collection[str]) -> bool:
    return bool(re.match(r"/dev/nvidia(?!-container)", target)) or target in drm_nodes


def _nvidia_drm_nodes(host: Host) -> set[str]:
    """Device nodes under /dev/dri that belong to the NVIDIA driver."""
    nodes = set()
    for name in host.list_dir("/sys/class/drm"):
        if re.fullmatch(r"(card|renderD)\d+", name):
            link = host.read_link("/sys/class/drm/%s/device/driver" % name) or ""
            if link.rsplit("/", 1)[-1] == "nvidia":
                nodes.add("/dev/dri/" + name)
    return nodes


def driver_holders(host: Host) -> list[Holder]:
    """Every process with an open NVIDIA device file, by pid; neither lsof nor fuser is needed."""
    drm_nodes = _nvidia_drm_nodes(host)
    holders = []
    for name in host.list_dir("/proc"):
        if not is_digits(name):
            continue
        devices = set()
        for descriptor in host.list_dir("/proc/%s/fd" % name):
            target = host.read_link("/proc/%s/fd/%s" % (name, descriptor))
            if target and _is_gpu_device(target, drm_nodes):
                devices.add(target)
        if not devices:
            continue
        unit, container = parse_cgroup(host.read_text("/proc/%s/cgroup" % name) or "")
        command = (host.read_text("/proc/%s/cmdline" % name) or "").replace("\0", " ").strip()
        if not command:
            command = (host.read_text("/proc/%s/comm" % name) or "").strip()
        # Only the program: arguments of strangers may hold secrets.
        command = command.split(" ", 1)[0]
        holders.append(
            Holder(int(name), command, unit, container, container_name(host, container), tuple(sorted(devices)))
        )
    return sorted(holders, key=lambda holder: holder.pid)
