# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds the signed package repositories of the sandbox, below the host names that serve them in production.

    build.py --output .sandbox/repositories [--only driver,toolkit,engine]

The result depends on the sources in this directory only; when they have not changed, nothing is built.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import driver  # noqa: E402 (found through the path set above)
import engine  # noqa: E402
import toolkit  # noqa: E402
from deb import Key, flat_repository, write_if_changed  # noqa: E402

CAPTURE = HERE.parents[1] / "unit/fixtures/nvidia-smi/h200-x1.xml"
DISTRIBUTIONS = ("ubuntu2404", "debian13", "debian12")
PARTS = ("driver", "toolkit", "engine")
_STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _STARTED:5.1f} s] repositories: {text}", flush=True)


def fingerprint(part: str) -> str:
    """Of everything that decides what a part looks like."""
    found = hashlib.sha256(part.encode())
    inputs = {
        "driver": [CAPTURE, *sorted((HERE / "standins").glob("*.c"))],
        "toolkit": [HERE / "standins/container-toolkit.py"],
        "engine": [],
    }
    for path in [HERE / "deb.py", HERE / "build.py", HERE / f"{part}.py", *inputs[part]]:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def build_driver(output: Path, key: Key, work: Path) -> None:
    say("compiling the stand-ins of nvidia-smi and the daemons")
    programs = driver.compile_programs(work / "driver", CAPTURE)
    for distribution in DISTRIBUTIONS:
        directory = output / "developer.download.nvidia.com/compute/cuda/repos" / distribution / "x86_64"
        found = driver.packages(distribution, programs, key.public(armor=False))
        say(f"developer.download.nvidia.com {distribution}: {len(found)} packages")
        fields = {"Origin": "NVIDIA", "Label": "NVIDIA CUDA", "Architecture": "x86_64"}
        flat_repository(directory, found, key, fields)
        write_if_changed(directory / "3bf863cc.pub", key.public(armor=True))
        write_if_changed(directory / "cuda-archive-keyring.gpg", key.public(armor=False))
        write_if_changed(directory / f"cuda-{distribution}.pin", driver.pin_file())


def build_toolkit(output: Path, key: Key, work: Path) -> None:
    directory = output / "nvidia.github.io/libnvidia-container"
    found = toolkit.packages()
    say(f"nvidia.github.io: {len(found)} packages")
    fields = {
        "Origin": "https://nvidia.github.io/libnvidia-container",
        "Label": "NVIDIA CORPORATION",
        "Architecture": "amd64",
    }
    flat_repository(directory / "stable/deb/amd64", found, key, fields)
    write_if_changed(directory / "gpgkey", key.public(armor=True))
    line = "deb https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /\n"
    write_if_changed(directory / "stable/deb/nvidia-container-toolkit.list", line.encode())


def build_engine(output: Path, key: Key, work: Path) -> None:
    engine.build(output / "download.docker.com/linux", key, work / "engine", say)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(".sandbox/repositories"))
    parser.add_argument("--only", default=",".join(PARTS), help="parts to build: %(default)s")
    options = parser.parse_args()
    output = options.output.resolve()
    work = output.parent / "repositories-build"
    key = Key(output.parent / "repositories-key")
    key.ensure()
    try:
        for part in options.only.split(","):
            stamp = work / f"{part}.stamp"
            wanted = fingerprint(part) + "\n" + str(output)
            if stamp.is_file() and stamp.read_text() == wanted:
                say(f"{part}: unchanged")
                continue
            {"driver": build_driver, "toolkit": build_toolkit, "engine": build_engine}[part](output, key, work)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(wanted)
    finally:
        key.stop()
    say("ready in " + str(output))


if __name__ == "__main__":
    main()
