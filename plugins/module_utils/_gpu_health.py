# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Whether the GPUs of a host are fit for service, judged by what nvidia-smi and the kernel's log say.

What a GPU does not tell (unified memory, MIG, older drivers) is ``unknown`` and never a refusal. The rules follow NVML's
recovery actions, nvidia-smi's own help texts and NVIDIA's catalogue of Xid errors (docs.nvidia.com/deploy/xid-errors).
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._gpu import Gpu
from ._gpu_inventory import GpuInventory
from ._verdict import OK, REFUSED, UNKNOWN, WARNING, Verdict

if t.TYPE_CHECKING:
    from ._kernel_log import KernelLine

#: NVML's recovery actions (nvmlDeviceGpuRecoveryAction_t), as nvidia-smi prints them, and what they ask for.
RECOVERY_ACTIONS = {
    "GPU Reset": "{reset}",
    "Node Reboot": "reboot the host",
    "Drain P2P": "stop what uses this GPU or its peers, then {reset}",
    "Drain and Reset": "stop what uses this GPU, then {reset}",
    "Recover IMEX Domain": "stop what uses the IMEX domain and start nvidia-imex on all its hosts anew",
}
_RESET = "stop what uses it and run 'nvidia-smi --gpu-reset -i {index}', or reboot the host"
_REPLACE = "take it out of service and have it replaced"

_LOADING = re.compile(r"NVRM: loading NVIDIA ")
#: What is read of the kernel's log.
KERNEL_LINES = "NVRM: (Xid|loading NVIDIA)"


@dataclass(frozen=True)
class Xid:
    """An error that the driver has written to the kernel's log; ``bdf`` without the function, ``0000:1b:00``."""

    bdf: str
    number: int


def parse_xids(log: t.Iterable[KernelLine]) -> tuple[Xid, ...]:
    """Errors since the driver was last loaded, which resets the GPUs; each once, in the order of the log."""
    # Here and below: a look at GPUs that are well needs no list of errors.
    from ._xid_errors import XID_LINE

    found: list[Xid] = []
    for line in log:
        if _LOADING.search(line.text):
            found.clear()
            continue
        match = XID_LINE.search(line.text)
        if match:
            found.append(Xid(_slot(match.group("pci")), int(match.group("xid"))))
    return tuple(dict.fromkeys(found))


def _slot(bdf: str) -> str:
    """``0000:1B:00.0`` -> ``0000:1b:00``: Xid lines leave the function out."""
    return bdf.lower().partition(".")[0]


def gpu_health(inventory: GpuInventory, kernel_log: t.Sequence[KernelLine] | None = None) -> tuple[Verdict, ...]:
    """Verdicts on the host and on each of its GPUs.

    Args:
        kernel_log: Lines with :data:`KERNEL_LINES` of this boot; None when it was not read, and then no verdict on Xid errors is given
            unless an earlier one needs it.
    """
    found = list(_host_verdicts(inventory))
    if inventory.driver is None or not inventory.smi_driver_version:
        return tuple(found)
    xids = None if kernel_log is None else parse_xids(kernel_log)
    for gpu in inventory.gpus:
        found += _gpu_verdicts(gpu, inventory, xids)
    return tuple(found)


def needs_kernel_log(inventory: GpuInventory) -> bool:
    """Whether a GPU does not name its recovery action, so that only the kernel's log can tell of fatal errors."""
    return any(not gpu.recovery_action for gpu in inventory.gpus)


# -- the host -------------------------------------------------------------------------------------

#: What nvidia-smi says when NVML cannot be used: pattern, reason, remedy.
_NVML_FAILURES = (
    (
        "version mismatch",
        "driver_mismatch",
        "load the installed driver with gpu_fleet.nim.nvidia_driver_reload, or reboot the host",
    ),
    (
        "couldn't communicate with the NVIDIA driver",
        "nvml_failed",
        "look at 'journalctl -k' for lines with NVRM, and reboot the host",
    ),
    ("No devices were found", "nvml_failed", "look at 'journalctl -k' for lines with NVRM, and reboot the host"),
    (
        "Unable to determine the device handle",
        "gpu_lost",
        "reboot the host; if it happens again, have the GPU's seat, its power and the GPU itself checked",
    ),
    ("GPU is lost", "gpu_lost", "reboot the host; if it happens again, have the GPU checked"),
)


def _host_verdicts(inventory: GpuInventory) -> t.Iterator[Verdict]:
    if not inventory.pci:
        return
    if inventory.driver is None:
        yield Verdict(
            "nvml",
            UNKNOWN,
            "The NVIDIA driver is not loaded, so nothing is known of the condition of the %s."
            % ("GPU" if len(inventory.pci) == 1 else "%d GPUs" % len(inventory.pci)),
            reason="driver_not_loaded",
        )
        return
    if inventory.smi_error:
        for text, reason, remedy in _NVML_FAILURES:
            if text.lower() in inventory.smi_error.lower():
                yield Verdict(
                    "nvml",
                    REFUSED,
                    "The driver is loaded, but nvidia-smi says: %s." % inventory.smi_error.rstrip("."),
                    remedy,
                    reason,
                )
                return
    if not inventory.smi_driver_version:
        yield Verdict(
            "nvml",
            UNKNOWN,
            "nvidia-smi gave no answer that is understood (%s), so nothing is known of the condition of the GPUs."
            % (inventory.smi_error.rstrip(".") or "no reason given"),
            reason="nvml_unknown",
        )
        return
    yield Verdict("nvml", OK, "The driver %s answers." % inventory.smi_driver_version)
    for bdf in inventory.unlisted:
        yield Verdict(
            "gpu_count",
            REFUSED,
            "GPU %s is on the PCI bus and bound to the driver, but the driver does not list it." % bdf,
            "look at 'journalctl -k' for lines with NVRM and this address, and reboot the host; if it happens again, have "
            "the GPU checked",
            "gpu_lost",
        )
    if not inventory.unlisted:
        yield Verdict("gpu_count", OK, "The driver lists all GPUs that are bound to it (%d)." % len(inventory.gpus))


# -- one GPU --------------------------------------------------------------------------------------


def gpu_label(gpu: Gpu) -> str:
    """``GPU 3 (NVIDIA H200, GPU-…)``."""
    return "GPU %d (%s)" % (gpu.index, ", ".join(part for part in (gpu.name, gpu.uuid) if part))


def complaint(verdict: Verdict, gpu: Gpu) -> str:
    """What a verdict on a GPU says of it, as a clause without the GPU's label."""
    text, label = verdict.message.rstrip("."), gpu_label(gpu) + " "
    return text[len(label) :] if text.startswith(label) else text


_Finding = t.Tuple[str, str, str, str]  # verdict, reason, what is said after the GPU's label, remedy


def _gpu_verdicts(gpu: Gpu, inventory: GpuInventory, xids: t.Sequence[Xid] | None) -> t.Iterator[Verdict]:
    checks: list[tuple[str, _Finding]] = [
        ("recovery_action", _recovery(gpu)),
        ("memory_repair", _memory_repair(gpu)),
        ("ecc", _ecc(gpu)),
        ("fabric", _fabric(gpu, inventory)),
        ("compute_mode", _compute_mode(gpu)),
        ("mig", _mig(gpu)),
        ("persistence", _persistence(gpu)),
        ("slowdown", _slowdown(gpu)),
    ]
    if xids is not None:
        checks.append(("xid", _xids(gpu, xids)))
    reset = _RESET.format(index=gpu.index)
    for check, (verdict, reason, text, remedy) in checks:
        yield Verdict(
            check,
            verdict,
            "%s %s." % (gpu_label(gpu), text),
            remedy.replace("{reset}", reset),
            reason,
            gpu.uuid,
        )


def _ok(text: str) -> _Finding:
    return OK, "", text, ""


def _untold(text: str) -> _Finding:
    return UNKNOWN, "not_told", "does not tell " + text, ""


def _recovery(gpu: Gpu) -> _Finding:
    action = gpu.recovery_action
    if gpu.telemetry.lost:
        lost = "lost" in gpu.telemetry.lost.lower()
        text = "does not answer: nvidia-smi says '%s'" % gpu.telemetry.lost
        return REFUSED, "gpu_lost" if lost else "gpu_reset_required", text, "reboot the host" if lost else "{reset}"
    if action == "None":
        return _ok("needs no recovery")
    if not action:
        return _untold("whether it needs recovery")
    remedy = RECOVERY_ACTIONS.get(action)
    if remedy is None:
        text = "reports the recovery action '%s', which is not known here" % action
        return WARNING, "recovery_action_unknown", text, "look it up in NVIDIA's documentation"
    return REFUSED, "recovery_action", "needs recovery: the driver asks for '%s'" % action, remedy


def _memory_repair(gpu: Gpu) -> _Finding:
    seen = gpu.telemetry
    if seen.remap_failure == "Yes":
        return REFUSED, "row_remap_failed", "could not remap a bad row of its memory", _REPLACE
    if seen.remap_pending == "Yes":
        text = "has bad memory that is only taken out of use by a reset (row remapping pending)"
        return REFUSED, "row_remap_pending", text, "{reset}"
    if seen.retirement_pending == "Yes":
        text = "has bad memory that is only taken out of use by a reset (page retirement pending)"
        return REFUSED, "page_retirement_pending", text, "{reset}"
    if seen.repairs:
        text = "reports %s" % ", ".join(name.replace("_", " ") for name in seen.repairs)
        return WARNING, seen.repairs[0], text, "{reset}; if it stays, have the GPU checked"
    if "No" not in (seen.remap_pending, seen.retirement_pending):
        return _untold("whether bad memory waits for repair")
    return _ok("has no bad memory that waits for repair")


def _ecc(gpu: Gpu) -> _Finding:
    seen = gpu.telemetry
    if seen.sram_threshold_exceeded == "Yes":
        return REFUSED, "sram_threshold_exceeded", "had more uncorrectable SRAM errors than allowed", _REPLACE
    if seen.ecc_volatile:
        text = "had %d uncorrectable memory error%s since it was last reset" % (
            seen.ecc_volatile,
            "" if seen.ecc_volatile == 1 else "s",
        )
        return REFUSED, "ecc_uncorrectable", text, "{reset}"
    if seen.ecc and seen.ecc_pending and seen.ecc != seen.ecc_pending:
        text = "has ECC %s, and %s from the next reset on" % (seen.ecc.lower(), seen.ecc_pending.lower())
        return WARNING, "ecc_mode_pending", text, "{reset}"
    if seen.ecc == "Disabled":
        return _ok("has ECC switched off")
    if seen.ecc_volatile is None:
        return _untold("of memory errors")
    text = "had no uncorrectable memory error since it was last reset"
    return _ok(text + (" (%d in its life)" % seen.ecc_aggregate if seen.ecc_aggregate else ""))


def _fabric(gpu: Gpu, inventory: GpuInventory) -> _Finding:
    """CUDA fails with error 802 before a GPU on NVSwitches has joined the fabric."""
    state, status, seen = gpu.fabric_state, gpu.fabric_status, gpu.telemetry
    manager = "look at 'journalctl -u nvidia-fabricmanager', whose version must equal the driver's"
    if not state or state == "Not Supported":
        if inventory.needs_fabric_manager and not state:
            return _untold("whether it has joined the NVLink fabric")
        return _ok("is in no NVLink fabric")
    if state == "In Progress":
        return REFUSED, "fabric_not_ready", "is still joining the NVLink fabric", "wait a minute; then " + manager
    if state == "Not Started":
        verdict = REFUSED if inventory.needs_fabric_manager else WARNING
        return verdict, "fabric_not_ready", "has not begun to join the NVLink fabric", manager
    if state != "Completed":
        return UNKNOWN, "not_told", "says of the NVLink fabric '%s', which is not known here" % state, ""
    if status and status != "Success":
        return REFUSED, "fabric_failed", "could not join the NVLink fabric: %s" % status, manager
    troubles = ", ".join(seen.fabric_troubles) or "no reason given"
    if seen.fabric_health == "Unhealthy":
        return REFUSED, "fabric_unhealthy", "is badly connected to the NVLink fabric (%s)" % troubles, manager
    if seen.fabric_health not in ("", "Healthy"):
        text = "has an NVLink fabric whose health is '%s' (%s)" % (seen.fabric_health, troubles)
        return WARNING, "fabric_degraded", text, manager
    return _ok("has joined the NVLink fabric")


def _compute_mode(gpu: Gpu) -> _Finding:
    mode = gpu.compute_mode
    default = "run 'nvidia-smi -i %d -c DEFAULT'" % gpu.index
    if mode == "Default":
        return _ok("may be used by any number of processes")
    if not mode:
        return _untold("its compute mode")
    if mode == "Prohibited":
        return REFUSED, "compute_mode", "takes no work: its compute mode is Prohibited", default
    text = "takes one process only: its compute mode is %s" % mode
    # Graphics programs hold no compute context.
    held = [process for process in gpu.processes if "C" in str(process.get("type") or "")]
    if held:
        names = ", ".join("%s (pid %s)" % (process.get("name") or "?", process.get("pid")) for process in held)
        return REFUSED, "compute_mode_busy", "%s, and it is held by %s" % (text, names), default
    return WARNING, "compute_mode", text + ", and many NIMs use several", default


def _mig(gpu: Gpu) -> _Finding:
    pending = gpu.telemetry.mig_pending
    if gpu.mig and pending and gpu.mig != pending:
        text = "has MIG %s, and %s from the next reset on" % (gpu.mig.lower(), pending.lower())
        return WARNING, "mig_mode_pending", text, "{reset}"
    return _ok("has MIG %s" % gpu.mig.lower() if gpu.mig else "has no MIG")


def _persistence(gpu: Gpu) -> _Finding:
    if gpu.persistence_mode == "Disabled":
        text = "is initialised anew for each program, which takes seconds: persistence mode is off"
        return WARNING, "persistence_off", text, "start nvidia-persistenced (nvidia_driver_persistenced: true)"
    return _ok("stays initialised") if gpu.persistence_mode else _untold("its persistence mode")


def _slowdown(gpu: Gpu) -> _Finding:
    if gpu.telemetry.slowdowns:
        text = "is slowed down by its hardware now (%s)" % ", ".join(gpu.telemetry.slowdowns)
        return WARNING, "hardware_slowdown", text, "check cooling and power of the host"
    return _ok("is not slowed down by its hardware")


def _xids(gpu: Gpu, xids: t.Sequence[Xid]) -> _Finding:
    none = _ok("had no error of its own since the driver was loaded")
    here = [xid.number for xid in xids if xid.bdf == _slot(gpu.bdf)]
    if not here:
        return none
    from ._xid_errors import XID_APPLICATION, XID_ERRORS, XID_FATAL, XID_NOTES

    serious = [number for number in here if number not in XID_NOTES and number not in XID_APPLICATION]
    if not serious:
        return none
    text = "had %s since the driver was loaded" % ", ".join(
        "Xid %d%s" % (number, " (%s)" % XID_ERRORS[number].cause if number in XID_ERRORS else "") for number in serious
    )
    fatal = [number for number in serious if number in XID_FATAL]
    if fatal and not gpu.recovery_action:
        # Drivers that name the recovery action know better whether the GPU was reset since; of others only a load of the
        # driver is seen in the log.
        return REFUSED, "xid", text, "reboot the host, or stop what uses its GPUs and load the driver anew"
    return WARNING, "xid", text, "look them up in NVIDIA's catalogue of Xid errors; see 'journalctl -k'"
