# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The four packages of the NVIDIA Container Toolkit."""

from __future__ import annotations

from pathlib import Path

from deb import Package

HERE = Path(__file__).resolve().parent
VERSIONS = ("1.17.8", "1.20.0")
PROGRAM = "/usr/lib/nvidia-container-toolkit-standin/programs"

REFRESH_SERVICE = """\
[Unit]
Description=Refresh NVIDIA CDI specification file
ConditionPathExists=|/usr/bin/nvidia-smi
ConditionPathExists=|/usr/sbin/nvidia-smi
ConditionPathExists=|/opt/nvidia/bin/nvidia-smi
ConditionPathExists=/usr/bin/nvidia-ctk
StartLimitBurst=5
StartLimitIntervalSec=10

[Service]
Type=oneshot
Environment=NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=/var/run/cdi/nvidia.yaml
EnvironmentFile=-/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env
ExecCondition=/usr/bin/grep -qE '/nvidia.ko[:]' /lib/modules/%v/modules.dep
ExecStartPre=/bin/sh -c 'nvidia-smi -L'
ExecStartPre=-/usr/bin/nvidia-ctk system create-device-nodes --control-devices --load-kernel-modules
ExecStart=/usr/bin/nvidia-ctk cdi generate
Restart=on-failure
RestartSec=1
CapabilityBoundingSet=CAP_SYS_MODULE CAP_SYS_ADMIN CAP_MKNOD CAP_SYS_PTRACE CAP_DAC_OVERRIDE CAP_FOWNER

[Install]
WantedBy=multi-user.target
"""
REFRESH_PATH = """\
[Unit]
Description=Trigger CDI refresh on NVIDIA driver install / uninstall events

[Path]
PathChanged=/lib/modules/%v/modules.dep
PathChanged=/lib/modules/%v/modules.dep.bin
PathChanged=/usr/bin/nvidia-ctk

[Install]
WantedBy=multi-user.target
"""


def packages() -> list[Package]:
    return [package for version in VERSIONS for package in _release(version)]


def _release(version: str) -> list[Package]:
    revision = f"{version}-1"
    program = (HERE / "standins/container-toolkit.py").read_bytes().replace(b"@VERSION@", version.encode())
    program = b"#!/usr/bin/python3 -IS\n" + program
    units = tuple(int(one) for one in version.split(".")[:2]) >= (1, 18)
    files: dict[str, tuple[bytes, int]] = {PROGRAM: (program, 0o755)}
    postinst = "#!/bin/sh\nset -e\nif [ \"$1\" = configure ]; then\n    mkdir -p /etc/nvidia-container-runtime\n    nvidia-ctk config --in-place\n"  # fmt: skip
    if units:
        for name, text in (("service", REFRESH_SERVICE), ("path", REFRESH_PATH)):
            files[f"/etc/systemd/system/nvidia-cdi-refresh.{name}"] = (text.encode(), 0o644)
        files["/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env"] = (
            b"# NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=/var/run/cdi/nvidia.yaml\n",
            0o644,
        )
        postinst += (
            "    if [ -d /run/systemd/system ]; then\n        systemctl daemon-reload\n"
            "        systemctl enable --quiet --now nvidia-cdi-refresh.path || true\n"
            "        systemctl enable --quiet nvidia-cdi-refresh.service || true\n"
            "        systemctl start --no-block nvidia-cdi-refresh.service || true\n    fi\n"
        )
    scripts = {"postinst": postinst + "fi\n"}
    if units:
        scripts["prerm"] = (
            '#!/bin/sh\nset -e\nif [ "$1" = remove ] && [ -d /run/systemd/system ]; then\n'
            "    systemctl disable --quiet --now nvidia-cdi-refresh.path nvidia-cdi-refresh.service || true\nfi\n"
        )
        scripts["conffiles"] = "/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env\n"
    names = (
        "nvidia-container-runtime",
        "nvidia-container-runtime.cdi",
        "nvidia-container-runtime.legacy",
        "nvidia-ctk",
        "nvidia-cdi-hook",
    )
    return [
        Package(
            "libnvidia-container1",
            revision,
            files={f"/usr/lib/x86_64-linux-gnu/libnvidia-container.so.{version}": (b"", 0o644)},
        ),
        Package(
            "libnvidia-container-tools",
            revision,
            {"Depends": f"libnvidia-container1 (= {revision})"},
            files={"/usr/bin/nvidia-container-cli": (program, 0o755)},
        ),
        Package(
            "nvidia-container-toolkit-base",
            revision,
            {"Depends": "python3, util-linux"},
            files=files,
            links={f"/usr/bin/{name}": PROGRAM for name in names},
            scripts=scripts,
        ),
        Package(
            "nvidia-container-toolkit",
            revision,
            {
                "Depends": f"nvidia-container-toolkit-base (= {revision}), libnvidia-container-tools (= {revision}), "
                f"libnvidia-container1 (= {revision})"
            },
            links={
                "/usr/bin/nvidia-container-runtime-hook": PROGRAM,
                "/usr/bin/nvidia-container-toolkit": "nvidia-container-runtime-hook",
            },
        ),
    ]
