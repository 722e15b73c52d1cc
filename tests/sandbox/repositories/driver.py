# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The driver packages of NVIDIA's network repository, in the shapes and with the relations of the real ones."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deb import Package

HERE = Path(__file__).resolve().parent
LIBRARIES = "/usr/lib/x86_64-linux-gnu"

#: branch -> (CUDA version, driver versions, oldest first).
BRANCHES = {
    535: ("12.2", ["535.183.06"]),
    550: ("12.4", ["550.54.15"]),
    555: ("12.5", ["555.42.06"]),
    570: ("12.8", ["570.124.06"]),
    575: ("12.9", ["575.57.08"]),
    580: ("13.0", ["580.65.06", "580.82.07", "580.95.05"]),
    590: ("13.1", ["590.44.01"]),
    595: ("13.2", ["595.45.04"]),
}
#: The first branch whose packages do not carry the branch in their names; of the lockstep companions, an earlier one.
BRANCHLESS = 590
COMPANIONS_BRANCHLESS = 580
#: The first branch with nvidia-open; before, nobody mentions such a package.
OPEN_METAPACKAGE = 560
#: DKMS cannot build this version: for the tests of that failure.
BROKEN_BUILD = "580.82.07"


def compile_programs(build: Path, capture: Path) -> dict[str, bytes]:
    """{"nvidia-smi/580.95.05": content, ...} of everything that is compiled, one program per driver version."""
    build.mkdir(parents=True, exist_ok=True)
    (build / "gpu_xml.h").write_text(gpu_header(capture))
    (build / "library.c").write_text("const char standin_version[] = VERSION;\n")
    jobs: dict[str, list[str]] = {}
    for branch, (cuda, versions) in BRANCHES.items():
        for version in versions:
            defines = [f'-DVERSION="{version}"', f'-DCUDA="{cuda}"', f"-DBRANCH={branch}"]
            jobs[f"nvidia-smi/{version}"] = ["-static", *defines, f"-I{build}", str(HERE / "standins/nvidia-smi.c")]
            jobs[f"nvdaemon/{version}"] = ["-static", *defines, str(HERE / "standins/nvdaemon.c")]
            for soname in ("libcuda.so.1", "libnvidia-ml.so.1"):
                shared = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", *defines, str(build / "library.c")]
                jobs[f"{soname}/{version}"] = shared

    def work(item: tuple[str, list[str]]) -> tuple[str, bytes]:
        name, arguments = item
        target = build / name.replace("/", "-")
        command = ["gcc", "-O1", "-s", "-w", "-Wl,--build-id=none", "-o", str(target), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        return name, target.read_bytes()

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(work, jobs.items()))


def gpu_header(capture: Path) -> str:
    """The <gpu> block of a real capture as a C string."""
    match = re.search(r"<gpu id=[^>]*>\n(.*?)\t</gpu>", capture.read_text(encoding="utf-8"), re.DOTALL)
    assert match, capture
    escaped = match.group(1).replace("\\", "\\\\").replace('"', '\\"').replace("\n", '\\n"\n"')
    return f'static const char GPU_XML[] = "{escaped}";\n'


def packages(distribution: str, programs: dict[str, bytes], public_key: bytes) -> list[Package]:
    """Every package of one distribution's repository."""
    ubuntu = distribution.startswith("ubuntu")
    found: list[Package] = [keyring(distribution, public_key)]
    for branch, (_cuda, versions) in BRANCHES.items():
        for version in versions:
            found += _Release(branch, version, ubuntu, programs).packages()
        found += [_pinning(f"{branch}", f"{branch}.*", "1")]
        found += [_pinning(version, f"{version}*", "1") for version in versions]
    found.append(Package("nvlsm", "2025.10.11-1", description="NVLink subnet manager (stand-in, empty)"))
    return found


def keyring(distribution: str, public_key: bytes) -> Package:
    url = f"https://developer.download.nvidia.com/compute/cuda/repos/{distribution}/x86_64/"
    key = "/usr/share/keyrings/cuda-archive-keyring.gpg"
    source = f"/etc/apt/sources.list.d/cuda-{distribution}-x86_64.list"
    pin = "/etc/apt/preferences.d/cuda-repository-pin-600"
    return Package(
        "cuda-keyring",
        "1.1-1",
        files={
            key: (public_key, 0o644),
            source: (f"deb [signed-by={key}] {url} /\n".encode(), 0o644),
            pin: (pin_file(), 0o644),
        },
        scripts={"conffiles": f"{source}\n{pin}\n"},
        architecture="all",
    )


def pin_file() -> bytes:
    return (
        b"Package: nsight-compute\nPin: origin *ubuntu.com*\nPin-Priority: -1\n\n"
        b"Package: nsight-systems\nPin: origin *ubuntu.com*\nPin-Priority: -1\n\n"
        b"Package: *\nPin: release l=NVIDIA CUDA\nPin-Priority: 600\n"
    )


def _pinning(what: str, pattern: str, revision: str) -> Package:
    path = "/etc/apt/preferences.d/nvidia-driver-pinning"
    text = "Package: *nvidia* cuda-drivers* libcuda1* libnvsdm*\nPin: version %s\nPin-Priority: 1000\n" % pattern
    return Package(
        f"nvidia-driver-pinning-{what}",
        f"{what}-{revision}",
        {
            "Provides": "nvidia-driver-pinning",
            "Conflicts": "nvidia-driver-pinning",
            "Replaces": "nvidia-driver-pinning",
        },
        files={path: (text.encode(), 0o644)},
        architecture="all",
    )


_MODPROBE = {
    "/usr/bin/nvidia-modprobe": (
        b"#!/bin/sh\n# Stand-in: loads the driver; the stand-in module makes the devices itself.\n"
        b'case " $* " in *" -u "*) modprobe -q nvidia-uvm || exit 1 ;; esac\nexec modprobe -q nvidia\n',
        0o4755,
    )
}
_KERNEL_FILES = {
    "/usr/lib/modprobe.d/nvidia-graphics-drivers.conf": (
        b"blacklist nouveau\nblacklist lbm-nouveau\nalias nouveau off\nalias lbm-nouveau off\n",
        0o644,
    ),
    "/usr/lib/modprobe.d/nvidia-graphics-drivers-kms.conf": (b"options nvidia-drm modeset=1\n", 0o644),
    "/usr/lib/udev/rules.d/71-nvidia.rules": (
        b'ACTION=="add|bind", ATTR{vendor}=="0x10de", DRIVER=="nvidia", TEST!="/sys/module/nvidia_uvm", '
        b'RUN+="/sbin/modprobe nvidia-uvm"\n',
        0o644,
    ),
}
_REBUILD = "#!/bin/sh\nset -e\nif command -v update-initramfs >/dev/null; then update-initramfs -u; fi\n"


class _Release:
    """All packages of one driver version."""

    def __init__(self, branch: int, version: str, ubuntu: bool, programs: dict[str, bytes]) -> None:
        self.branch, self.version, self.programs = branch, version, programs
        self.ubuntu = ubuntu
        self.revision = f"{version}-" + (("0ubuntu1" if branch < BRANCHLESS else "1ubuntu1") if ubuntu else "1")
        self.found: list[Package] = []

    def name(self, stem: str, flavour: str = "", branchless: int = BRANCHLESS) -> str:
        return stem + (f"-{self.branch}" if self.branch < branchless else "") + flavour

    def exactly(self, *names: str) -> str:
        return ", ".join(f"{name} (= {self.revision})" for name in names)

    def add(self, stem: str, flavour: str = "", depends: str = "", alternatives: str = "", **more: object) -> Package:
        """A package of which only one branch (and of ``alternatives`` only one flavour) can be installed."""
        branchless = COMPANIONS_BRANCHLESS if more.pop("companion", False) else BRANCHLESS
        name = self.name(stem, flavour, branchless)
        virtual = alternatives or stem + flavour
        relations = {"Depends": depends, "Provides": virtual, "Conflicts": virtual, "Replaces": virtual}
        if virtual == name:
            del relations["Provides"]
        package = Package(name, self.revision, relations, **more)  # type: ignore[arg-type]
        self.found.append(package)
        return package

    def packages(self) -> list[Package]:
        self._companions()
        if not self.ubuntu:
            self._debian()
            return self.found
        self._libraries()
        self._tools()
        for flavour in ("", "-open"):
            self._kernel(flavour)
            self._metapackages(flavour)
        return self.found

    def _debian(self) -> None:
        """Debian's parts have one name in every branch; only the metapackages of branches up to 580 carry it."""

        def part(name: str, depends: str = "", **more: object) -> None:
            self.found.append(Package(name, self.revision, {"Depends": depends}, **more))  # type: ignore[arg-type]

        library = self._library_files()
        for name, soname in (("libcuda1", "libcuda.so"), ("libnvidia-ml1", "libnvidia-ml.so")):
            files = {path: content for path, content in library[0].items() if soname in path}
            links = {path: target for path, target in library[1].items() if soname in path}
            part(name, files=files, links=links, scripts={"triggers": "activate-noawait ldconfig\n"})
        part("nvidia-smi", self.exactly("libnvidia-ml1"), files=self._smi_files())
        part(
            "nvidia-persistenced",
            files=self._persistence_files(),
            scripts=_service_scripts("nvidia-persistenced.service", enable=True),
        )
        part("nvidia-modprobe", files=_MODPROBE)
        for name in (
            "nvidia-settings",
            "nvidia-driver-bin",
            "nvidia-driver-libs",
            "firmware-nvidia-gsp",
            "libnvidia-cfg1",
            "xserver-xorg-video-nvidia",
        ):
            part(name)
        part("nvidia-kernel-support", files=_KERNEL_FILES, scripts={"postinst": _REBUILD, "postrm": _REBUILD})
        for name, flavour in (("nvidia-kernel-dkms", ""), ("nvidia-kernel-open-dkms", "-open")):
            relations = dict.fromkeys(("Provides", "Conflicts", "Replaces"), "nvidia-kernel-dkms-any")
            relations["Depends"] = "dkms, " + self.exactly("nvidia-kernel-support")
            self.found.append(
                Package(name, self.revision, relations, files=self._source_files(flavour), scripts=self._dkms_scripts())
            )
        kernel = f"nvidia-kernel-dkms (= {self.revision}) | nvidia-kernel-open-dkms (= {self.revision})"
        names = ("libcuda1", "libnvidia-ml1", "libnvidia-cfg1", "nvidia-smi", "nvidia-driver-bin", "nvidia-driver-libs")
        names += ("nvidia-kernel-support", "firmware-nvidia-gsp", "xserver-xorg-video-nvidia")
        part("nvidia-driver", self.exactly(*names) + f", nvidia-persistenced, nvidia-modprobe, {kernel}")
        for stem, dkms in (("cuda-drivers", "nvidia-kernel-dkms"), ("nvidia-open", "nvidia-kernel-open-dkms")):
            if stem == "nvidia-open" and self.branch < OPEN_METAPACKAGE:
                continue
            part(
                self.name(stem),
                ", ".join(f"{one} (>= {self.revision})" for one in (dkms, "nvidia-driver", "nvidia-settings")),
            )
            if self.branch < BRANCHLESS:
                part(stem, self.exactly(self.name(stem)))

    def _library_files(self) -> tuple[dict[str, tuple[bytes, int]], dict[str, str]]:
        files, links = {}, {}
        for soname in ("libcuda.so.1", "libnvidia-ml.so.1"):
            stem = soname[:-2]
            files[f"{LIBRARIES}/{stem}.{self.version}"] = (self.programs[f"{soname}/{self.version}"], 0o644)
            links[f"{LIBRARIES}/{soname}"] = f"{stem}.{self.version}"
        links[f"{LIBRARIES}/libcuda.so"] = "libcuda.so.1"
        return files, links

    def _smi_files(self) -> dict[str, tuple[bytes, int]]:
        return {"/usr/bin/nvidia-smi": (self.programs[f"nvidia-smi/{self.version}"], 0o755)}

    def _persistence_files(self) -> dict[str, tuple[bytes, int]]:
        pid_file = "/run/nvidia-persistenced/nvidia-persistenced.pid"
        unit = _unit("NVIDIA Persistence Daemon", "/usr/bin/nvidia-persistenced --verbose", pid_file)
        return {
            "/usr/bin/nvidia-persistenced": (self.programs[f"nvdaemon/{self.version}"], 0o755),
            "/usr/lib/systemd/system/nvidia-persistenced.service": (unit, 0o644),
        }

    def _source_files(self, flavour: str) -> dict[str, tuple[bytes, int]]:
        conf = f'PACKAGE_NAME="nvidia"\nPACKAGE_VERSION="{self.version}"\nAUTOINSTALL="yes"\n'
        for index, module in enumerate(("nvidia", "nvidia-modeset", "nvidia-drm", "nvidia-uvm", "nvidia-peermem")):
            conf += f'BUILT_MODULE_NAME[{index}]="{module}"\nDEST_MODULE_LOCATION[{index}]="/kernel/drivers/char/drm"\n'
        conf += f'# For the stand-in of dkms:\nSTANDIN_LICENSE="{"Dual MIT/GPL" if flavour else "NVIDIA"}"\n'
        if self.version == BROKEN_BUILD:
            conf += 'STANDIN_BUILD_FAILS="yes"\n'
        return {f"/usr/src/nvidia-{self.version}/dkms.conf": (conf.encode(), 0o644)}

    def _dkms_scripts(self) -> dict[str, str]:
        return {
            "postinst": f"""#!/bin/sh
set -e
case "$1" in
configure | abort-upgrade | abort-deconfigure | abort-remove)
    /usr/lib/dkms/common.postinst nvidia {self.version}
    if command -v update-initramfs >/dev/null; then update-initramfs -u; fi
    ;;
esac
""",
            "prerm": f"""#!/bin/sh
set -e
case "$1" in
remove | upgrade | deconfigure)
    if [ -d /var/lib/dkms/nvidia/{self.version} ]; then dkms remove -m nvidia -v {self.version} --all; fi
    ;;
esac
""",
        }

    def _libraries(self) -> None:
        files, links = self._library_files()
        self.add("libnvidia-common", architecture="all")
        self.add("libnvidia-compute", files=files, links=links, scripts={"triggers": "activate-noawait ldconfig\n"})
        for stem in ("cfg1", "decode", "encode", "extra", "fbc1", "gl"):
            self.add(f"libnvidia-{stem}", depends=self.exactly(self.name("libnvidia-common")) if stem == "gl" else "")
        self.add("xserver-xorg-video-nvidia")

    def _tools(self) -> None:
        self.add("nvidia-utils", depends=self.name("libnvidia-compute"), files=self._smi_files())
        self.add(
            "nvidia-compute-utils" if self.branch < BRANCHLESS else "nvidia-persistenced",
            depends=self.name("libnvidia-cfg1"),
            alternatives="nvidia-persistenced",
            files=self._persistence_files(),
            scripts=_service_scripts("nvidia-persistenced.service", enable=True),
        )
        # These two keep one name in all branches.
        self.found.append(Package("nvidia-modprobe", self.revision, files=_MODPROBE))
        self.found.append(Package("nvidia-settings", self.revision))

    def _companions(self) -> None:
        """What must have the driver's version exactly; its revision is another."""
        driver_revision, self.revision = self.revision, f"{self.version}-1"
        daemon = self.programs[f"nvdaemon/{self.version}"]
        for stem, program, title in (
            ("nvidia-fabricmanager", "nv-fabricmanager", "NVIDIA fabric manager service"),
            ("nvidia-imex", "nvidia-imex", "NVIDIA IMEX service"),
        ):
            directory = stem if stem == "nvidia-fabricmanager" else program
            unit = _unit(title, f"/usr/bin/{program}", f"/run/{directory}/{program}.pid")
            self.add(
                stem,
                companion=True,
                files={
                    f"/usr/bin/{program}": (daemon, 0o755),
                    f"/usr/lib/systemd/system/{stem}.service": (unit, 0o644),
                },
                scripts=_service_scripts(f"{stem}.service", enable=False),
            )
        self.add(
            "libnvidia-nscq", companion=True, files={f"{LIBRARIES}/libnvidia-nscq.so.{self.version}": (b"", 0o644)}
        )
        if self.branch >= COMPANIONS_BRANCHLESS:
            self.add("libnvsdm", companion=True, files={f"{LIBRARIES}/libnvsdm.so.{self.version}": (b"", 0o644)})
        self.revision = driver_revision

    def _kernel(self, flavour: str) -> None:
        if not flavour:
            self.add("nvidia-kernel-common", files=_KERNEL_FILES, scripts={"postinst": _REBUILD, "postrm": _REBUILD})
        self.add(
            "nvidia-kernel-source", flavour, alternatives="nvidia-kernel-source", files=self._source_files(flavour)
        )
        self.add(
            "nvidia-dkms",
            flavour,
            depends="dkms, "
            + self.exactly(self.name("nvidia-kernel-source", flavour), self.name("nvidia-kernel-common")),
            alternatives="nvidia-dkms-kernel",
            scripts=self._dkms_scripts(),
        )

    def _metapackages(self, flavour: str) -> None:
        name = self.name
        dkms, source = name("nvidia-dkms", flavour), name("nvidia-kernel-source", flavour)
        persistence = name("nvidia-compute-utils") if self.branch < BRANCHLESS else "nvidia-persistenced"
        compute = [name("libnvidia-cfg1"), name("libnvidia-compute"), persistence, name("nvidia-kernel-common"), source]
        graphics = [name(f"libnvidia-{stem}") for stem in ("gl", "extra", "decode", "encode", "fbc1", "common")]
        utils = [name("nvidia-utils"), name("xserver-xorg-video-nvidia")]
        self.add("nvidia-headless-no-dkms", flavour, self.exactly(*compute), "nvidia-headless-no-dkms")
        no_dkms = name("nvidia-headless-no-dkms", flavour)
        self.add("nvidia-headless", flavour, self.exactly(no_dkms, dkms), "nvidia-headless")
        everything = self.exactly(dkms, *compute, *graphics, *utils)
        self.add("nvidia-driver", flavour, everything, "nvidia-driver-binary")
        if flavour and self.branch < OPEN_METAPACKAGE:
            return
        # The outermost packages ask for "this version or newer" of the driver, and so may bring a newer one.
        stem = "nvidia-open" if flavour else "cuda-drivers"
        at_least = ", ".join(
            f"{one} (>= {self.revision})"
            for one in (name("nvidia-driver", flavour), "nvidia-modprobe", "nvidia-settings")
        )
        self.found.append(Package(name(stem), self.revision, {"Depends": at_least}))
        if self.branch < BRANCHLESS:
            self.found.append(Package(stem, self.revision, {"Depends": self.exactly(name(stem))}))


def _unit(title: str, command: str, pid_file: str) -> bytes:
    return (
        f"[Unit]\nDescription={title}\nWants=syslog.target\n\n[Service]\nType=forking\nPIDFile={pid_file}\n"
        f"ExecStart={command}\n\n[Install]\nWantedBy=multi-user.target\n"
    ).encode()


def _service_scripts(unit: str, enable: bool) -> dict[str, str]:
    # Only when it is new: an administrator's "disable" outlives an upgrade.
    enabling = f'    if [ -z "$2" ]; then systemctl enable --quiet {unit}; fi\n' if enable else ""
    start = (
        f"        systemctl restart {unit} || true\n" if enable else f"        systemctl try-restart {unit} || true\n"
    )
    return {
        "postinst": "#!/bin/sh\nset -e\nif [ \"$1\" = configure ]; then\n"
        f"{enabling}    if [ -d /run/systemd/system ]; then\n        systemctl daemon-reload\n{start}    fi\nfi\n",
        "prerm": f'#!/bin/sh\nset -e\nif [ -d /run/systemd/system ] && [ "$1" = remove ]; then systemctl stop {unit} || true; fi\n',
        "postrm": "#!/bin/sh\nset -e\n"
        f'if [ "$1" = purge ] && [ ! -e /usr/lib/systemd/system/{unit} ]; then rm -f /etc/systemd/system/multi-user.target.wants/{unit}; fi\n'
        "if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi\n",
    }  # fmt: skip
