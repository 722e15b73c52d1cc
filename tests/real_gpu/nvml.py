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
            "persistence_mode": {0: "Disabled", 1: "Enabled"}.get(
                self._number("nvmlDeviceGetPersistenceMode", handle) or 0, "?"
            ),
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
        }
