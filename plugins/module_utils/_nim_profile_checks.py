# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Whether a profile can run on the GPUs of a host, found out before anything is downloaded."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._gpu import Gpu
from ._nim_profiles import INCOMPATIBLE, LOW_MEMORY, Profile

#: Compute capabilities by architecture as nvidia-smi names it (NVIDIA: CUDA GPU compute capability).
_CAPABILITIES: dict[str, tuple[str, ...]] = {
    "Volta": ("7.0", "7.2"),
    "Turing": ("7.5",),
    "Ampere": ("8.0", "8.6", "8.7"),
    "Ada Lovelace": ("8.9",),
    "Hopper": ("9.0",),
    "Blackwell": ("10.0", "10.1", "10.3", "11.0", "12.0", "12.1"),
}
#: Data-centre GPUs, whose names tell them apart for certain.
_KNOWN_KIND = re.compile(r"(?:gb?h?|a|b|h|l|t|v)\d{1,3}[sg]?\Z")
_MIB_PER_GB = 1e9 / 2**20
#: Patterns of a manifest that are matched: plain text, a look-ahead for plain text, and ".*" at the end.
_PLAIN_PATTERN = re.compile(r"\^[A-Za-z0-9 _.-]{1,60}(?:\(\?![A-Za-z0-9 _-]{1,30}\))?(?:\.\*)?\$?\Z")


@dataclass(frozen=True)
class Check:
    """One question about a profile on a host.

    Attributes:
        name: ``gpu_kind``, ``gpu_count``, ``gpu_memory``, ``lora`` or ``listing``.
        passed: None where nobody knows.
        message: What is the matter, and what to do about it; empty when it passed.
    """

    name: str
    passed: bool | None
    message: str = ""

    def as_dict(self) -> dict[str, t.Any]:
        return {"check": self.name, "passed": self.passed, "message": self.message}


def memory_mib(gigabytes: float) -> int:
    """GB as NIM and the vendors of GPUs count them (a GPU of 24 GB has 23034 MiB) in MiB.

    The decimal unit is the smaller one, so that no GPU is refused for the way it is counted.
    """
    return int(gigabytes * _MIB_PER_GB)


def check_profile(
    profile: Profile,
    gpus: t.Sequence[Gpu],
    *,
    count: int | None = None,
    lora: bool = False,
    devices: t.Mapping[str, str] | None = None,
) -> list[Check]:
    """All checks of a profile.

    Args:
        gpus: The GPUs that it could have: those of the host, or those that the model was given.
        count: How many of them the model gets; None = as many as the profile needs.
        lora: Whether the model has LoRA adapters.
        devices: PCI device id (four hexadecimal digits) by PCI address, as sysfs has them.
    """
    needed = profile.gpus
    kinds = [_kind(profile, gpu, (devices or {}).get(gpu.bdf, "")) for gpu in gpus]
    checks = [_check_kind(profile, gpus, kinds)]
    # An unsuitable kind does not count, an unknown one may.
    fitting = [gpu for gpu, kind in zip(gpus, kinds) if kind is not False]
    checks.append(_check_count(needed, len(gpus), count))
    if profile.memory_gb is None or not gpus:
        checks.append(Check("gpu_memory", None, "The memory that the profile needs is not known." if gpus else ""))
    else:
        checks.append(_check_memory(profile, fitting or list(gpus), needed or 1))
    if lora:
        checks.append(_check_lora(profile))
    if profile.verdict == INCOMPATIBLE:
        checks.append(Check("listing", False, "list-model-profiles calls it incompatible with this host."))
    elif profile.verdict == LOW_MEMORY:
        shorter = ""
        if profile.reduced_model_length:
            shorter = ", or set max_model_length: %d" % profile.reduced_model_length
        checks.append(
            Check(
                "listing",
                False,
                "list-model-profiles finds too little free GPU memory for it; stop what uses the GPUs%s." % shorter,
            )
        )
    elif profile.verdict is not None:
        checks.append(Check("listing", True))
    return checks


def verdict(checks: t.Iterable[Check]) -> bool | None:
    """Whether a profile fits: False as soon as one check failed, None while one is open that matters."""
    results = [check.passed for check in checks if check.name != "listing"]
    listed = [check.passed for check in checks if check.name == "listing"]
    if False in results or False in listed:
        return False
    if True in listed:
        # NIM itself has looked at the GPUs.
        return True
    return None if None in results + listed else True


def require_profile(
    model: str,
    profile: Profile,
    gpus: t.Sequence[Gpu],
    *,
    count: int | None = None,
    lora: bool = False,
    devices: t.Mapping[str, str] | None = None,
) -> list[Check]:
    """Refuse a profile that cannot run; what is not known is no reason to.

    Returns:
        The questions to which nobody knows the answer.

    Raises:
        FleetError: ``profile_unsuitable``.
    """
    checks = check_profile(profile, gpus, count=count, lora=lora, devices=devices)
    failed = [check for check in checks if check.passed is False]
    if failed:
        raise FleetError(
            "profile_unsuitable",
            "Model %s cannot run profile %s: %s" % (model, profile, " ".join(check.message for check in failed)),
            model=model,
            profile=profile.id or profile.description,
            checks=[check.as_dict() for check in failed],
        )
    return [check for check in checks if check.passed is None]


# -- the checks -----------------------------------------------------------------------------------


def _check_kind(profile: Profile, gpus: t.Sequence[Gpu], kinds: t.Sequence[bool | None]) -> Check:
    wanted = profile.gpu or profile.tags.get("product_name_regex") or profile.tags.get("compute_capability")
    if not gpus or not (wanted or profile.gpu_device):
        return Check("gpu_kind", True if gpus else None)
    if kinds.count(True) >= (profile.gpus or 1):
        return Check("gpu_kind", True)
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    kind = wanted or "PCI device %s" % profile.gpu_device
    if all(one is False for one in kinds):
        return Check(
            "gpu_kind",
            False,
            "It was built for %s, and the GPUs here are %s; name a profile for them, or one without a kind of GPU."
            % (kind, names),
        )
    if kinds.count(False) > len(gpus) - (profile.gpus or 1):
        return Check(
            "gpu_kind",
            False,
            "It was built for %d GPUs of kind %s, and the GPUs here are %s; name a profile for them."
            % (profile.gpus or 1, kind, names),
        )
    return Check("gpu_kind", None, "Whether %s is the kind that it was built for, %s, is not known." % (names, kind))


def _check_count(needed: int | None, there: int, count: int | None) -> Check:
    if needed is None:
        return Check("gpu_count", None, "The number of GPUs that the profile needs is not known.")
    if count is not None and count < needed:
        return Check(
            "gpu_count",
            False,
            "It needs %d GPUs, and gpus gives the model %d; set gpus: %d, or leave gpus out." % (needed, count, needed),
        )
    if needed > there:
        return Check(
            "gpu_count",
            False,
            "It needs %d GPUs, and there %s %d; name a profile with a smaller tp."
            % (needed, "is" if there == 1 else "are", there),
        )
    return Check("gpu_count", True)


def _check_memory(profile: Profile, gpus: t.Sequence[Gpu], needed: int) -> Check:
    wanted = memory_mib(profile.memory_gb or 0)
    sizes = [gpu.memory_total_mib for gpu in gpus]
    enough = [size for size in sizes if size is not None and size >= wanted]
    unknown = [size for size in sizes if size is None]
    if len(enough) >= needed:
        return Check("gpu_memory", True)
    if len(enough) + len(unknown) >= needed:
        return Check("gpu_memory", None, "The GPUs do not tell how much memory they have.")
    largest = max((size for size in sizes if size is not None), default=0)
    shorter = ""
    if profile.reduced_memory_gb and profile.reduced_model_length and memory_mib(profile.reduced_memory_gb) <= largest:
        shorter = ", or set max_model_length: %d (then %g GB do)" % (
            profile.reduced_model_length,
            profile.reduced_memory_gb,
        )
    elif profile.verdict is None:
        # No listing has said what a shorter context would take.
        shorter = ", or set max_model_length to a shorter context"
    return Check(
        "gpu_memory",
        False,
        "It needs %g GB on each of %d GPU%s, and the largest here has %.0f GB; name a smaller profile%s."
        % (profile.memory_gb or 0, needed, "" if needed == 1 else "s", largest / _MIB_PER_GB, shorter),
    )


def _check_lora(profile: Profile) -> Check:
    if profile.lora is None:
        return Check("lora", None, "Whether the profile can load LoRA adapters is not known.")
    if profile.lora:
        return Check("lora", True)
    return Check(
        "lora", False, "It cannot load LoRA adapters; name a profile with LoRA support, or leave lora_directory out."
    )


def _kind(profile: Profile, gpu: Gpu, device: str) -> bool | None:
    """Whether a GPU is of the kind that a profile was built for; None when that cannot be told."""
    if profile.gpu_device and device and profile.gpu_device == device.lower():
        return True
    pattern = profile.tags.get("product_name_regex", "")
    if pattern:
        known_pattern = _PLAIN_PATTERN.match(pattern) is not None and bool(gpu.name)
        return re.match(pattern, gpu.name.replace(" ", "-")) is not None if known_pattern else None
    capability = profile.tags.get("compute_capability", "").strip()
    known = _CAPABILITIES.get(gpu.architecture)
    if capability:
        if known is None or not re.match(r"\d{1,2}\.\d\Z", capability):
            return None
        if capability not in known:
            return False
        return True if known == (capability,) else None
    if not profile.gpu:
        # A profile without a kind runs everywhere; one with a device id alone only where that is known.
        return None if profile.gpu_device else True
    wanted = _words(profile.gpu)
    there = _words(gpu.name)
    wanted_kind = next((word for word in wanted if _KNOWN_KIND.match(word)), "")
    there_kind = next((word for word in there if _KNOWN_KIND.match(word)), "")
    if wanted_kind and there_kind and wanted_kind != there_kind:
        return False
    if profile.gpu_device and device:
        # The same name and another device: a variant (SXM, PCIe, NVL) that may or may not do.
        return None
    return True if wanted and set(wanted) <= set(there) else None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
