# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What NVML says of the GPUs, read through ctypes: the second witness beside nvidia-smi, and the container's own eyes."""

from __future__ import annotations

import ctypes
import typing as t

#: Values of nvml.h.
BRANDS = {0: "Unknown", 1: "Quadro", 2: "Tesla", 3: "NVS", 4: "GRID", 5: "GeForce", 6: "Titan", 14: "NVIDIA"}
ARCHITECTURES = {
    2: "Kepler",
    3: "Maxwell",
    4: "Pascal",
    5: "Volta",
    6: "Turing",
    7: "Ampere",
    8: "Ada Lovelace",
    9: "Hopper",
    10: "Blackwell",
}
COMPUTE_MODES = {0: "Default", 1: "Exclusive_Thread", 2: "Prohibited", 3: "Exclusive_Process"}
_NOT_SUPPORTED = 3
_UNCORRECTED = 1  # of nvmlMemoryErrorType_t
_NO_YES = {0: "No", 1: "Yes"}
_DISABLED_ENABLED = {0: "Disabled", 1: "Enabled"}
_SLOWDOWNS = {0x8: "hw_slowdown", 0x40: "hw_thermal_slowdown", 0x80: "hw_power_brake_slowdown"}
_FABRIC_HEALTH = {1: "Healthy", 2: "Unhealthy", 3: "Limited Capacity"}
#: First bit of each part of the mask of a fabric's health; 1 in its two bits means trouble.
_FABRIC_TROUBLES = {"bandwidth": 0, "route recovery in progress": 2, "route unhealthy": 4, "access timeout recovery": 6}


class _Pci(ctypes.Structure):
    _fields_ = [
        ("legacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("id", ctypes.c_uint),
        ("subsystem", ctypes.c_uint),
        ("address", ctypes.c_char * 32),
    ]


class _Memory(ctypes.Structure):
    """nvmlMemory_v2_t: used memory without what the driver reserves, as nvidia-smi shows it."""

    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("memory", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class _Fabric(ctypes.Structure):
    """nvmlGpuFabricInfo_t."""

    _fields_ = [
        ("cluster", ctypes.c_char * 16),
        ("status", ctypes.c_uint),
        ("clique", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    ]


class _FabricHealth(ctypes.Structure):
    """nvmlGpuFabricInfo_v3_t."""

    _fields_ = [
        ("version", ctypes.c_uint),
        ("cluster", ctypes.c_char * 16),
        ("status", ctypes.c_uint),
        ("clique", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
        ("mask", ctypes.c_uint),
        ("summary", ctypes.c_ubyte),
    ]


class _Sram(ctypes.Structure):
    """nvmlEccSramErrorStatus_v1_t: eleven counters before the flag."""

    _fields_ = [("version", ctypes.c_uint), ("counters", ctypes.c_ulonglong * 11), ("exceeded", ctypes.c_uint)]


class _Repair(ctypes.Structure):
    """nvmlRepairStatus_v1_t."""

    _fields_ = [("version", ctypes.c_uint), ("channel", ctypes.c_uint), ("tpc", ctypes.c_uint)]


class NvmlError(Exception):
    """NVML is not there or refuses."""


class Nvml:
    """An open NVML."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise NvmlError(str(error)) from error
        self.call("nvmlInit_v2")

    def call(self, name: str, *arguments: t.Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise NvmlError("%s: error %d" % (name, code))

    def _text(self, name: str, *before: t.Any) -> str:
        buffer = ctypes.create_string_buffer(128)
        self.call(name, *before, buffer, 128)
        return buffer.value.decode()

    def _number(self, name: str, handle: t.Any) -> t.Optional[int]:
        value = ctypes.c_uint()
        code = getattr(self.library, name)(handle, ctypes.byref(value))
        if code == _NOT_SUPPORTED:
            return None
        if code:
            raise NvmlError("%s: error %d" % (name, code))
        return value.value

    def driver(self) -> t.Tuple[str, str]:
        """Driver version and CUDA version."""
        cuda = ctypes.c_int()
        self.call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        version = "%d.%d" % (cuda.value // 1000, cuda.value % 1000 // 10)
        return self._text("nvmlSystemGetDriverVersion"), version

    def gpus(self) -> t.List[t.Dict[str, t.Any]]:
        """One mapping a GPU that this process may open."""
        count = ctypes.c_uint()
        self.call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        found = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            self.call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))
            found.append(self._gpu(index, handle))
        return found

    def _gpu(self, index: int, handle: ctypes.c_void_p) -> t.Dict[str, t.Any]:
        pci = _Pci()
        self.call("nvmlDeviceGetPciInfo_v3", handle, ctypes.byref(pci))
        memory = _Memory(version=ctypes.sizeof(_Memory) | 2 << 24)
        self.call("nvmlDeviceGetMemoryInfo_v2", handle, ctypes.byref(memory))
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        mig = self.library.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending))
        number = ctypes.c_uint(64)
        processes = (_Process * 64)()
        self.call("nvmlDeviceGetComputeRunningProcesses_v3", handle, ctypes.byref(number), processes)
        fabric = _Fabric()
        if getattr(self.library, "nvmlDeviceGetGpuFabricInfo", lambda *_arguments: 1)(handle, ctypes.byref(fabric)):
            fabric.state = 0
        return {
            "index": index,
            "uuid": self._text("nvmlDeviceGetUUID", handle),
            "name": self._text("nvmlDeviceGetName", handle),
            "brand": BRANDS.get(self._number("nvmlDeviceGetBrand", handle) or 0, "?"),
            "architecture": ARCHITECTURES.get(self._number("nvmlDeviceGetArchitecture", handle) or 0, "?"),
            "compute_mode": COMPUTE_MODES.get(self._number("nvmlDeviceGetComputeMode", handle) or 0, "?"),
            "persistence_mode": _DISABLED_ENABLED.get(self._number("nvmlDeviceGetPersistenceMode", handle) or 0, "?"),
            "minor": self._number("nvmlDeviceGetMinorNumber", handle),
            # Empty where the GPU cannot do it, as the collection says it.
            "mig": "" if mig else ("Enabled" if current.value else "Disabled"),
            "bdf": "%04x:%02x:%02x.0" % (pci.domain, pci.bus, pci.device),
            # Empty where there is no fabric, as the collection says it.
            "fabric_state": {1: "Not Started", 2: "In Progress", 3: "Completed"}.get(fabric.state, ""),
            "memory_total_mib": memory.total >> 20,
            "memory_used_mib": memory.used >> 20,
            "memory_free_mib": memory.free >> 20,
            "pids": sorted(processes[position].pid for position in range(number.value)),
            "telemetry": dict(self._condition(handle), mig_pending="" if mig else _DISABLED_ENABLED[pending.value]),
        }

    def _condition(self, handle: ctypes.c_void_p) -> t.Dict[str, t.Any]:
        """A GPU's condition in the collection's words; what this driver's NVML cannot be asked is not in it."""
        first, second, third, fourth = (ctypes.c_uint() for _number in range(4))
        wide = ctypes.c_ulonglong()
        found: t.Dict[str, t.Any] = {}

        def asked(name: str, *arguments: t.Any) -> t.Optional[bool]:
            """True when it answered, False when the GPU has no such thing, None when there is no such question."""
            if not hasattr(self.library, name):
                return None
            code = getattr(self.library, name)(handle, *arguments)
            return True if not code else False if code == _NOT_SUPPORTED else None

        def versioned(structure: t.Any, version: int) -> t.Any:
            structure.version = ctypes.sizeof(structure) | version << 24
            return ctypes.byref(structure)

        if asked("nvmlDeviceGetEccMode", ctypes.byref(first), ctypes.byref(second)):
            found["ecc"], found["ecc_pending"] = _DISABLED_ENABLED[first.value], _DISABLED_ENABLED[second.value]
        for counter, name in enumerate(("ecc_volatile", "ecc_aggregate")):
            if asked("nvmlDeviceGetTotalEccErrors", _UNCORRECTED, counter, ctypes.byref(wide)):
                found[name] = wide.value
        rows = asked("nvmlDeviceGetRemappedRows", *map(ctypes.byref, (first, second, third, fourth)))
        if rows is not None:
            found["remap_pending"] = _NO_YES[third.value] if rows else ""
            found["remap_failure"] = _NO_YES[fourth.value] if rows else ""
        retired = asked("nvmlDeviceGetRetiredPagesPendingStatus", ctypes.byref(first))
        if retired is not None:
            found["retirement_pending"] = _NO_YES[first.value] if retired else ""
        if asked("nvmlDeviceGetCurrentClocksEventReasons", ctypes.byref(wide)):
            found["slowdowns"] = tuple(name for bit, name in _SLOWDOWNS.items() if wide.value & bit)
        sram, repair, fabric = _Sram(), _Repair(), _FabricHealth()
        if asked("nvmlDeviceGetSramEccErrorStatus", versioned(sram, 1)):
            found["sram_threshold_exceeded"] = _NO_YES[sram.exceeded]
        if asked("nvmlDeviceGetRepairStatus", versioned(repair, 1)):
            pending = {"channel_repair_pending": repair.channel, "tpc_repair_pending": repair.tpc}
            found["repairs"] = tuple(name for name, there in pending.items() if there)
        health = asked("nvmlDeviceGetGpuFabricInfoV", versioned(fabric, 3))
        if health is not None:
            found["fabric_health"] = _FABRIC_HEALTH.get(fabric.summary, "") if health else ""
            found["fabric_troubles"] = tuple(
                name for name, bit in _FABRIC_TROUBLES.items() if health and fabric.mask >> bit & 3 == 1
            )
        return found
