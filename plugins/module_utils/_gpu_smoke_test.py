# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""A container as proof that GPUs get into containers, made of the host's own files; and what its failures mean."""

from __future__ import annotations

import hashlib
import io
import os.path
import re
import typing as t

from ._errors import FleetError
from ._host import Host

_NAME = "gpu-fleet-smoke-test"
_DIRECTORY = "/run/gpu_fleet/smoke_test"
_C_LIBRARY = ("libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1")
#: Seconds for the container: on a large host without persistence mode the first NVML call alone takes most of a minute.
_TIMEOUT = 180


def parse_gpu_list(text: str) -> t.Tuple[str, ...]:
    """UUIDs of GPUs and MIG devices in the output of ``nvidia-smi -L``, sorted."""
    return tuple(sorted(re.findall(r"\(UUID: ((?:GPU|MIG)-[0-9A-Za-z/-]+)\)", text)))


#: What a failed GPU container says -> what it means and what to do. First match counts.
_SIGNATURES: t.Tuple[t.Tuple[str, str, str], ...] = (
    (
        r"could not select device driver",
        "daemon_without_gpu_driver",
        "dockerd found no NVIDIA hook when it was started; it must be restarted once after the toolkit is installed "
        "(injection = gpus does it), or use injection = runtime",
    ),
    (
        r"unknown or invalid runtime name",
        "runtime_not_registered",
        "the running daemon does not know the runtime 'nvidia'; run again to tell it",
    ),
    (
        r"[Dd]river/library version mismatch",
        "driver_mismatch",
        "the loaded kernel module and the driver's libraries have different versions; reload the driver or reboot",
    ),
    (
        r"(unresolvable CDI devices|could not find CDI device|CDI device injection failed)",
        "cdi_spec_missing",
        "the CDI specification is missing or stale; see 'systemctl status nvidia-cdi-refresh' and 'nvidia-ctk cdi list'",
    ),
    (
        r"(libnvidia-ml\.so\.1: cannot open|load library failed: libnvidia-ml)",
        "driver_libraries_missing",
        "the driver's libraries are not installed on this host; install the driver's user-space packages",
    ),
    (
        r"(driver not loaded|couldn't communicate with the NVIDIA driver|nvml error: driver not loaded)",
        "driver_not_loaded",
        "the driver's kernel module is not loaded; load it, then run again",
    ),
    (
        r"Failed to initialize NVML: Unknown Error",
        "devices_denied",
        "the container may not open the GPU devices; see the toolkit's troubleshooting page on cgroups, and use a mode "
        "other than legacy",
    ),
    (
        r"nvidia-smi\"?: (stat |executable file |)?(not found|no such file)|executable file not found",
        "nothing_injected",
        "the runtime injected nothing into the container; check 'mode' in /etc/nvidia-container-runtime/config.toml",
    ),
    (
        r"nvidia-container-runtime\"?: (executable file )?(not found|no such file)",
        "runtime_program_missing",
        "the registered runtime program is not there; reinstall nvidia-container-toolkit-base",
    ),
    (
        r"[Cc]annot connect to the Docker daemon",
        "docker_unavailable",
        "Docker does not run; see 'systemctl status docker'",
    ),
)


def explain_failure(output: str) -> t.Tuple[str, str]:
    """Reason and remedy for what a failed GPU container printed."""
    for pattern, reason, remedy in _SIGNATURES:
        if re.search(pattern, output):
            return reason, remedy
    return "gpu_container_failed", "see 'journalctl -u docker' and /var/log/nvidia-container-runtime.log"


def run_gpu_container(host: Host, injection: str, smi: str) -> t.Tuple[str, ...]:
    """Run ``nvidia-smi -L`` in a container and compare it with the host.

    Args:
        injection: How the container asks for GPUs, ``runtime``, ``cdi`` or ``gpus``.
        smi: nvidia-smi of the host.

    Returns:
        UUIDs of the GPUs that the container sees: all of the host.

    Raises:
        FleetError: With a reason of ``explain_failure``, ``host_gpu_failed`` or ``gpu_container_differs``.
    """
    listed = host.run([smi, "-L"], timeout=_TIMEOUT)
    expected = parse_gpu_list(listed.stdout)
    if not listed.ok or not expected:
        reason, remedy = explain_failure(listed.stdout + listed.stderr)
        raise FleetError(
            "host_gpu_failed" if reason == "gpu_container_failed" else reason,
            "Listing the GPUs on the host with 'nvidia-smi -L' failed: %s; %s."
            % (listed.last_line().rstrip("."), remedy),
            rc=listed.rc,
        )
    image = _build_image(host, smi)
    arguments = {
        "runtime": ["--runtime=nvidia", "--env=NVIDIA_VISIBLE_DEVICES=all"],
        "cdi": ["--device=nvidia.com/gpu=all"],
        "gpus": ["--gpus=all"],
    }[injection]
    # What an interrupted run left behind would hold the name.
    host.run(["docker", "rm", "--force", _NAME], timeout=60)
    try:
        result = host.run(
            [
                "docker",
                "run",
                "--rm",
                "--name=%s" % _NAME,
                "--pull=never",
                "--network=none",
                "--log-driver=none",
                "--env=NVIDIA_DRIVER_CAPABILITIES=utility",
                *arguments,
                image,
                "nvidia-smi",
                "-L",
            ],
            timeout=_TIMEOUT,
        )
    finally:
        host.run(["docker", "rm", "--force", _NAME], timeout=60)
        host.run(["docker", "rmi", "--force", image], timeout=60)
    output = result.stdout + result.stderr
    if not result.ok:
        reason, remedy = explain_failure(output)
        raise FleetError(
            reason,
            "Running 'nvidia-smi -L' in a container (%s) failed: %s; %s."
            % (" ".join(arguments), _cause(output).rstrip("."), remedy),
            rc=result.rc,
            stderr=result.stderr[-2000:],
        )
    seen = parse_gpu_list(result.stdout)
    if seen != expected:
        raise FleetError(
            "gpu_container_differs",
            "A container (%s) sees the GPUs %s where the host has %s; check NVIDIA_VISIBLE_DEVICES defaults and the CDI "
            "specification." % (" ".join(arguments), ", ".join(seen) or "none", ", ".join(expected)),
            seen=list(seen),
            expected=list(expected),
        )
    return seen


def _build_image(host: Host, smi: str) -> str:
    """An image out of the host's own files: a shell and the C library, so that an injected nvidia-smi can run.

    No registry is needed, and the container has the very libc that the driver's tools were installed for.
    """
    archive = build_archive(host, ["/bin/sh", smi])
    image = "%s:%s" % (_NAME, hashlib.sha256(archive).hexdigest()[:12])
    path = "%s/image.tar" % _DIRECTORY
    host.make_dir(_DIRECTORY, mode=0o700)
    host.write_file(path, archive, mode=0o600)
    # Behind a link (Debian's alternatives, a driver with a root of its own) the program is mounted where it really is.
    places = dict.fromkeys((os.path.dirname(smi), os.path.dirname(_resolved(host, smi))))
    search = "PATH=%s:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" % ":".join(places)
    try:
        host.check(
            ["docker", "import", "--change", "ENV %s" % search, path, image],
            reason="gpu_container_failed",
            doing="Importing the image of the GPU smoke test",
            timeout=120,
        )
    finally:
        host.remove(_DIRECTORY)
    return image


def _resolved(host: Host, path: str) -> str:
    """A path without the symbolic links in its last part."""
    for _link in range(16):
        target = host.read_link(path)
        if not target:
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return path


def build_archive(host: Host, programs: t.Sequence[str]) -> bytes:
    """A tar of programs' interpreters and shared libraries (and the shell itself), the root of a tiny container.

    The last program is what the NVIDIA runtime injects, so only its libraries go in.
    """
    paths: t.Dict[str, None] = {}
    todo = list(programs)
    injected = programs[-1]
    while todo:
        program = todo.pop(0)
        content = host.read_bytes(program) or b""
        if program != injected:
            paths[program] = None
        if content.startswith(b"#!"):
            words = content[2:].split(b"\n", 1)[0].decode("utf-8", "replace").split()
            todo += [word for word in words if word.startswith("/") and word not in paths]
            continue
        for line in host.run(["ldd", program]).stdout.splitlines():
            # "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)" and "/lib64/ld-linux-x86-64.so.2 (0x…)"
            found = re.search(r"(?:=>\s*)?(/\S+)\s+\(0x", line)
            # The driver's own libraries are injected with it.
            if not found or "nvidia" in found.group(1) or "libcuda" in found.group(1):
                continue
            paths[found.group(1)] = None
            if os.path.basename(found.group(1)) == "libc.so.6":
                # The rest of the C library: where nvidia-smi is a wrapper script, ldd does not see what the program needs.
                for name in _C_LIBRARY:
                    paths[os.path.join(os.path.dirname(found.group(1)), name)] = None
    # Here: only this needs it, and a look at the host does not.
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        made: t.Set[str] = set()

        def directory(path: str) -> None:
            if path in ("", "/") or path in made:
                return
            directory(os.path.dirname(path))
            made.add(path)
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.type = tarfile.DIRTYPE
            entry.mode = 0o755
            archive.addfile(entry)

        # Places that runtimes and their hooks mount on or write to.
        for path in ("/dev", "/etc/ld.so.conf.d", "/proc", "/run", "/sys", "/tmp", "/usr/bin", "/var"):  # noqa: S108 (in the image)
            directory(path)
        for path in sorted(paths):
            data = host.read_bytes(path)
            if data is None:
                continue
            directory(os.path.dirname(path))
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size = len(data)
            entry.mode = 0o755
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _cause(output: str) -> str:
    """The line of docker's or nvidia-smi's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"(?i)error|fail|unknown|not found|could not", line) and not line.startswith("Run 'docker"):
            return re.sub(r"\Adocker: (Error response from daemon: )?", "", line)
    return lines[-1] if lines else "it printed nothing"
