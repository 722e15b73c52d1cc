# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The part of the distribution's archive that belongs to this machine's kernel, as a directory of packages.

The running kernel is no distribution's: its headers, and the tools that would need a compiler or build a real initramfs,
are stand-ins. ``archive.py DIRECTORY`` writes them with an index; the host uses the directory as a local repository.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "repositories"))
from deb import Package, flat_repository  # noqa: E402 (found through the path set above)

RELEASE = os.uname().release


def source(name: str) -> bytes:
    return (HERE / "files" / name).read_bytes()


def program(name: str) -> bytes:
    """A Python program; in the checkout such a file does not name its interpreter."""
    return b"#!/usr/bin/python3\n" + source(name)


def packages() -> list[Package]:
    version = RELEASE.split("-")[0] + "-1"
    diverted = "modprobe rmmod"
    hardware = Package(
        "sandbox-hardware",
        "1.0",
        {"Depends": "kmod, python3"},
        files={
            "/usr/lib/sandbox-hardware/hardware.py": (program("hardware.py"), 0o755),
            "/usr/lib/sandbox/boot.d/10-hardware": (source("boot-hook"), 0o755),
        },
        links={
            "/usr/sbin/modprobe": "../lib/sandbox-hardware/hardware.py",
            "/usr/sbin/rmmod": "../lib/sandbox-hardware/hardware.py",
        },
        scripts={
            "preinst": f"""#!/bin/sh
set -e
for name in {diverted}; do
    path=/usr/sbin/$name
    dpkg-query -S "$path" >/dev/null 2>&1 || path=/sbin/$name
    dpkg-divert --quiet --package sandbox-hardware --add --rename --divert "$path.kmod" "$path"
done
""",
        },
    )
    headers = Package(
        f"linux-headers-{RELEASE}",
        version,
        files={f"/usr/src/linux-headers-{RELEASE}/Makefile": (b"# stand-in headers\n", 0o644)},
        links={f"/lib/modules/{RELEASE}/build": f"/usr/src/linux-headers-{RELEASE}"},
        description=f"stand-in headers of the sandbox machine's kernel {RELEASE}",
    )
    found = [
        hardware,
        headers,
        Package(
            "dkms",
            "3.99.0-1",
            {"Depends": "sandbox-hardware"},
            files={
                "/usr/sbin/dkms": (program("dkms"), 0o755),
                "/usr/lib/dkms/common.postinst": (source("dkms-common.postinst"), 0o755),
                "/var/lib/dkms/": (b"", 0o755),
            },
            architecture="all",
        ),
        Package(
            "initramfs-tools",
            "0.999",
            {"Provides": "linux-initramfs-tool"},
            files={"/usr/sbin/update-initramfs": (source("update-initramfs"), 0o755)},
            scripts={"postinst": "#!/bin/sh\nset -e\nupdate-initramfs -u\n"},
            architecture="all",
        ),
        Package(
            "mokutil",
            "1:0.99",
            {"Depends": "sandbox-hardware"},
            links={"/usr/bin/mokutil": "../lib/sandbox-hardware/hardware.py"},
        ),
    ]
    for name in ("linux-headers-generic", "linux-headers-amd64"):
        found.append(Package(name, version, {"Depends": f"linux-headers-{RELEASE}"}))
    return found


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    flat_repository(
        directory, packages(), None, {"Origin": "gpu_fleet.nim sandbox", "Label": "kernel of the sandbox machine"}
    )


if __name__ == "__main__":
    main()
