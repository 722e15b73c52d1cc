# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Model profiles: which of them fit these GPUs, the choice, and the listing."""

from __future__ import annotations

from environment import FatalError
from gpus import Gpu


class Profiles:
    def __init__(self, profiles: list, gpus: list[Gpu], lora: bool) -> None:
        self.all = profiles
        self.gpus = gpus
        self.lora = lora

    def verdict(self, profile: dict) -> str:
        """runnable | low | incompatible | buildable, for these GPUs."""
        tags = profile["tags"]
        tp = int(tags.get("tp", 1)) * int(tags.get("pp", 1))
        wanted_gpu = tags.get("gpu", "")
        if len(self.gpus) < tp:
            return "incompatible"
        fitting = [gpu for gpu in self.gpus if not wanted_gpu or wanted_gpu.upper() in gpu.name.upper()]
        fitting = [gpu for gpu in fitting if gpu.total_gb * 1.05 >= profile["memory_gb"]]
        if len(fitting) < tp:
            return "incompatible"
        if len([gpu for gpu in fitting if gpu.free_gb * 1.05 >= profile["memory_gb"]]) < tp:
            return "low"
        return "buildable" if tags.get("trtllm_buildable") == "true" else "runnable"

    def group(self, verdict: str) -> list:
        return [profile for profile in self.all if self.verdict(profile) == verdict]

    def select(self, wanted: str, selector: str, fine_tuned: bool) -> dict:
        """The profile to run.  FatalError as NIM is."""
        if wanted and wanted != "default":
            for profile in self.all:
                if wanted in (profile["id"], profile["description"]):
                    return profile
            raise FatalError(
                1,
                "Model download failed: Environment variable NIM_MODEL_PROFILE is set to %s but no matching profile_id or"
                " profile description is found in manifest." % wanted,
            )
        candidates = self.group("runnable") + self.group("buildable")
        if fine_tuned:
            # Prebuilt engines hold the base model's weights: only a profile that loads or builds from weights fits.
            candidates = self.group("buildable") or [p for p in candidates if p["tags"]["llm_engine"] != "tensorrt_llm"]
        if selector:
            pairs = dict(pair.split("=", 1) for pair in selector.split(",") if "=" in pair)
            candidates = [p for p in candidates if all(p["tags"].get(k) == v for k, v in pairs.items())]
            if not candidates:
                raise FatalError(1, "Could not match a profile in manifest")
        wanted_lora = [p for p in candidates if (p["tags"].get("feat_lora") == "true") == self.lora]
        candidates = wanted_lora or candidates
        if wanted == "default":
            candidates = [p for p in candidates if p["tags"]["llm_engine"] == "vllm"] or candidates
        if not candidates:
            raise FatalError(
                1,
                "Could not find a profile that is currently runnable with the detected hardware. Please check the system"
                " information below and make sure you have enough free GPUs.",
            )
        return candidates[0]


def listing(image: dict, profiles: Profiles) -> str:
    """What list-model-profiles prints."""
    second = image["dialect"] == "2"
    lines = ["SYSTEM INFO"]

    def gpu_lines(title: str, gpus: list[Gpu]) -> None:
        if not gpus:
            lines.append("- %s: <None>" % title)
            return
        lines.append("- %s:" % title)
        for gpu in gpus:
            percent = int(100 * gpu.used / gpu.total) if gpu.total else 0
            lines.append(
                "  -  [%s:10de] (%d) %s [current utilization: %d%%]" % (gpu.pci_id, gpu.index, gpu.name, percent)
            )

    free = [gpu for gpu in profiles.gpus if gpu.used * 10 < gpu.total]
    busy = [gpu for gpu in profiles.gpus if gpu not in free]
    gpu_lines("Free GPUs", free)
    if busy:
        gpu_lines("Non-free GPUs", busy)

    def section(title: str, group: list, indent: int = 2) -> None:
        if not group:
            lines.append("- %s: <None>" % title if ":" not in title else "- %s <None>" % title)
            return
        lines.append("- " + title + ("" if title.endswith("GPU free memory") and not second else ":"))
        plain = [p for p in group if p["tags"].get("feat_lora") != "true"]
        lora = [p for p in group if p["tags"].get("feat_lora") == "true"]
        pad = " " * indent

        def entry(profile: dict) -> str:
            text = "%s (%s)" % (profile["id"], profile["description"])
            if second and title != "Incompatible with system":
                text += " [requires >=%d GB/gpu]" % profile["memory_gb"]
            return text

        lines.extend("%s- %s" % (pad, entry(p)) for p in plain)
        if lora:
            lines.append(pad + "- With LoRA support:")
            lines.extend("%s  - %s" % (pad, entry(p)) for p in lora)

    lines.append("MODEL PROFILES")
    section("Compatible with system and runnable", profiles.group("runnable"))
    low = profiles.group("low")
    if second:
        if low:
            section("Compatible with system but low memory", low, 4)
    elif low:
        section("Compatible with system but not runnable due to low GPU free memory", low)
    build = "Compilable to TRT-LLM using just-in-time compilation of HF models to TRTLLM engines"
    if second or profiles.group("buildable"):
        section(build, profiles.group("buildable"))
    section("Incompatible with system", profiles.group("incompatible"), 4 if second else 2)
    return "\n".join(lines)
