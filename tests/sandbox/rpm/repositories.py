# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Signed RPM repositories with the names, versions and module streams of the real ones; the packages are stand-ins.

Real: the package format, signatures, repository metadata, modularity. Stand-ins: the content of the packages. What
depends on what is modelled on NVIDIA's spec files (nvidia-driver, dkms-nvidia); it is not a copy of the live index.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import typing as t

DRIVERS = ("570.124.06", "570.195.03", "580.65.06", "580.95.05", "590.44.01")
TOOLKITS = ("1.17.8", "1.20.0")
ENGINES = ("28.3.3", "28.5.1")
#: Kernel of the look-alikes, in the form of EL.
KERNELS = {9: "5.14.0-570.12.1.el9_6.x86_64", 10: "6.12.0-55.9.1.el10_0.x86_64"}
KEY_FILES = {"cuda": "D42D0685.pub", "toolkit": "gpgkey", "docker": "gpg", "rocky": "RPM-GPG-KEY"}


@dataclasses.dataclass
class Package:
    """One package: ``requires``, ``provides`` and ``conflicts`` as in a spec file, ``files`` as path -> (mode, content)."""

    name: str
    version: str
    release: str
    epoch: int = 0
    architecture: str = "x86_64"
    requires: t.Sequence[str] = ()
    provides: t.Sequence[str] = ()
    conflicts: t.Sequence[str] = ()
    files: t.Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    post: str = ""
    preun: str = ""

    @property
    def nevra(self) -> str:
        return "%s-%d:%s-%s.%s" % (self.name, self.epoch, self.version, self.release, self.architecture)

    def spec(self) -> str:
        lines = ["Name: " + self.name, "Version: " + self.version, "Release: " + self.release]
        lines += ["Epoch: %d" % self.epoch] if self.epoch else []
        lines += ["Summary: Stand-in", "License: GPL-3.0-or-later", "AutoReqProv: no"]
        lines += ["BuildArch: noarch"] if self.architecture == "noarch" else []
        for tag, values in (("Requires", self.requires), ("Provides", self.provides), ("Conflicts", self.conflicts)):
            lines += ["%s: %s" % (tag, value) for value in values]
        lines += ["", "%description", "Stand-in.", "", "%install"]
        for path, (mode, content) in self.files.items():
            target = "%%{buildroot}%s" % path
            lines.append("mkdir -p %s" % shlex.quote(path.rsplit("/", 1)[0]).replace("/", "%{buildroot}/", 1))
            lines.append("cat >%s <<'END_OF_STAND_IN'\n%s\nEND_OF_STAND_IN" % (target, content.replace("%", "%%")))
            lines.append("chmod %o %s" % (mode, target))
        for section, script in (("post", self.post), ("preun", self.preun)):
            lines += ["", "%" + section, script] if script else []
        return "\n".join([*lines, "", "%files", *self.files, ""])


def driver(version: str, major: int) -> list[Package]:
    """All packages of one driver version for one major version of EL."""
    branch = int(version.split(".")[0])
    release = "1.el%d" % major
    exact = "3:" + version

    def part(name: str, *requires: str, **more: t.Any) -> Package:
        return Package(name, version, release, 3, requires=requires, **more)

    def module(name: str, directory: str, other: str) -> Package:
        source = "/usr/src/%s-%s/dkms.conf" % (directory, version)
        conf = 'PACKAGE_NAME="%s"\nPACKAGE_VERSION="%s"\nSTANDIN_LICENSE="%s"\n' % (
            directory,
            version,
            "Dual MIT/GPL" if "open" in name else "NVIDIA",
        )
        for index, built in enumerate(("nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm")):
            conf += 'BUILT_MODULE_NAME[%d]="%s"\n' % (index, built)
        # As NVIDIA's: a failure of the build does not fail the transaction, which would leave half of it behind.
        build = "for one in /lib/modules/*; do dkms install -m %s -v %s -k ${one##*/} || :; done" % (directory, version)
        return part(
            name,
            "dkms",
            "nvidia-kmod-common = " + exact,
            provides=["nvidia-kmod = " + exact],
            conflicts=[other],
            files={source: (0o644, conf)},
            post=build,
            preun="dkms remove -m %s -v %s --all || :" % (directory, version),
        )

    found = [
        part("nvidia-driver", "nvidia-driver-libs = " + exact, "nvidia-kmod-common = " + exact),
        part("nvidia-driver-libs"),
        part("nvidia-driver-cuda", "nvidia-driver-cuda-libs = " + exact, "nvidia-kmod-common = " + exact),
        part("nvidia-driver-cuda-libs", "libnvidia-ml = " + exact),
        part("libnvidia-ml"),
        part("libnvidia-cfg"),
        part("nvidia-persistenced", "libnvidia-cfg = " + exact),
        part("nvidia-kmod-common", "nvidia-kmod = " + exact),
        part("nvidia-modprobe"),
        module("kmod-nvidia-open-dkms", "nvidia-open", "kmod-nvidia-latest-dkms"),
        module("kmod-nvidia-latest-dkms", "nvidia", "kmod-nvidia-open-dkms"),
        part("nvidia-open", "nvidia-driver = " + exact, "kmod-nvidia-open-dkms = " + exact),
        Package("cuda-drivers", version, release, requires=["nvidia-driver = " + exact, "nvidia-kmod = " + exact]),
    ]
    suffix = "" if branch >= 580 else "-%d" % branch
    companion = release if branch >= 590 else "1"
    found.append(Package("nvidia-fabricmanager" if branch >= 580 else "nvidia-fabric-manager", version, companion))
    found.append(Package("libnvidia-nscq" + suffix, version, companion))
    found.append(Package("nvidia-imex" + suffix, version, companion))
    return found


def modules(packages: t.Mapping[str, t.Sequence[Package]]) -> str:
    """modules.yaml: the streams of NVIDIA's repository for EL 8 and 9, ``latest-dkms`` by default."""
    branches = sorted({version.split(".")[0] for version in packages})
    documents = []

    def stream(name: str, versions: t.Iterable[str], is_open: bool) -> None:
        unwanted = ("kmod-nvidia-latest-dkms", "cuda-drivers") if is_open else ("kmod-nvidia-open-dkms", "nvidia-open")
        artifacts = [one.nevra for version in versions for one in packages[version] if one.name not in unwanted]
        names = ["nvidia-open" if is_open else "cuda-drivers"]
        documents.append(
            "document: modulemd\nversion: 2\ndata:\n  name: nvidia-driver\n  stream: '%s'\n  version: 20260101000000\n"
            "  context: 0a1b2c3d\n  arch: x86_64\n  summary: Stand-in\n  description: Stand-in\n  license:\n"
            "    module: [MIT]\n  profiles:\n    default:\n      rpms: [%s]\n  artifacts:\n    rpms:\n%s"
            % (name, ", ".join(names), "".join("    - %s\n" % one for one in artifacts))
        )

    for branch in branches:
        mine = [version for version in packages if version.startswith(branch + ".")]
        stream(branch + "-open", mine, True)
        stream(branch + "-dkms", mine, False)
    stream("open-dkms", packages, True)
    stream("latest-dkms", packages, False)
    documents.append(
        "document: modulemd-defaults\nversion: 1\ndata:\n  module: nvidia-driver\n  stream: latest-dkms\n"
        "  profiles:\n%s" % "".join("    %s-%s: [default]\n" % (b, k) for b in branches for k in ("open", "dkms"))
    )
    return "".join("---\n%s...\n" % document for document in documents)


def dkms(major: int, hardware: pathlib.Path) -> Package:
    """The stand-in of the sandbox's hosts, as an RPM."""
    files = {
        "/usr/sbin/dkms": (0o755, "#!/usr/bin/python3\n" + (hardware / "dkms").read_text(encoding="utf-8")),
        "/usr/lib/sandbox-hardware/hardware.py": (
            0o755,
            "#!/usr/bin/python3\n" + (hardware / "hardware.py").read_text(encoding="utf-8"),
        ),
    }
    return Package("dkms", "3.2.2", "1.el%d" % major, architecture="noarch", files=files)


def toolkit(version: str) -> list[Package]:
    names = ("libnvidia-container1", "libnvidia-container-tools", "nvidia-container-toolkit-base")
    found = [Package(name, version, "1") for name in names]
    found.append(
        Package("nvidia-container-toolkit", version, "1", requires=["%s = %s-1" % (n, version) for n in names])
    )
    return found


def engine(version: str, major: int) -> list[Package]:
    release = "1.el%d" % major
    return [
        Package("docker-ce", version, release, 3, requires=["containerd.io", "docker-ce-cli"]),
        Package("docker-ce-cli", version, release, 1),
        Package("containerd.io", "1.7.28", release),
        Package("docker-buildx-plugin", "0.29.1", release),
        Package("docker-compose-plugin", "2.40.0", release),
    ]


def repositories(hardware: pathlib.Path) -> dict[str, tuple[list[Package], str, str]]:
    """Path below the server's root -> packages, modules.yaml (or nothing), name of the key file (or nothing)."""
    found: dict[str, tuple[list[Package], str, str]] = {}
    for major, kernel in KERNELS.items():
        drivers = {version: driver(version, major) for version in DRIVERS}
        everything = [one for packages in drivers.values() for one in packages]
        if major >= 10:
            # Without EPEL: NVIDIA's repository has a dkms of its own.
            everything.append(dkms(major, hardware))
        path = "compute/cuda/repos/rhel%d/x86_64" % major
        found[path] = (everything, modules(drivers) if major < 10 else "", KEY_FILES["cuda"])
        engines = {one.nevra: one for version in ENGINES for one in engine(version, major)}
        found["linux/centos/%d/x86_64/stable" % major] = (list(engines.values()), "", "../../../" + KEY_FILES["docker"])
        version, dummy, release = kernel[: -len(".x86_64")].partition("-")
        base = [
            Package("kernel-devel", version, release, files={"/lib/modules/%s/build/Makefile" % kernel: (0o644, "")}),
            # What Debian provides here, as far as the other packages ask for it.
            Package("rocky-release", str(major), "1", architecture="noarch", provides=["/bin/sh", "/usr/bin/python3"]),
            # The plugin itself is Debian's.
            Package("python3-dnf-plugin-versionlock", "4.3.0", "20.el%d" % major, architecture="noarch"),
        ]
        if major < 10:
            epel = "[epel]\nname=EPEL\nbaseurl=@SERVER@/epel/%d\ngpgcheck=1\ngpgkey=@SERVER@/epel/%d/KEY\n" % (
                major,
                major,
            )
            crb = '#!/bin/sh\ntest "$1" = enable && touch /var/lib/crb-enabled\n'
            files = {"/etc/yum.repos.d/epel.repo": (0o644, epel), "/usr/bin/crb": (0o755, crb)}
            post = 'sed -i "s|@SERVER@|$(cat /etc/stand-in-server)|" /etc/yum.repos.d/epel.repo'
            base.append(
                Package("epel-release", str(major), "9.el%d" % major, architecture="noarch", files=files, post=post)
            )
            found["epel/%d" % major] = ([dkms(major, hardware)], "", "KEY")
        found["rocky/%d" % major] = (base, "", "KEY")
    kits = [one for version in TOOLKITS for one in toolkit(version)]
    found["libnvidia-container/stable/rpm/x86_64"] = (kits, "", "../../../" + KEY_FILES["toolkit"])
    return found


def build_script(repositories: t.Mapping[str, tuple[t.Sequence[Package], str, str]], work: pathlib.Path) -> str:
    """Writes the spec files below ``work`` and returns the shell script that makes the repositories of them.

    The script runs in a machine that has rpm, createrepo-c and gnupg, with ``work`` at /work, and fills /work/public.
    """
    lines = [
        "set -eu",
        "export GNUPGHOME=/work/gnupg",
        "mkdir -p -m 700 $GNUPGHOME",
        "gpg --batch --quiet --passphrase '' --quick-generate-key 'sandbox <sandbox@example.invalid>' rsa3072 sign never",
        "gpg --batch --armor --export sandbox@example.invalid >/work/key",
    ]
    built: set[tuple[str, str]] = set()
    parallel = []
    for path, (packages, dummy, dummy) in repositories.items():
        for package in packages:
            name = "%s-%s-%s" % (package.name, package.version, package.release)
            if (path, name) in built:
                continue
            built.add((path, name))
            specs = work / "specs"
            specs.mkdir(parents=True, exist_ok=True)
            (specs / (name + ".spec")).write_text(package.spec(), encoding="utf-8")
            parallel.append("%s %s" % (path, name))
    (work / "list").write_text("".join(line + "\n" for line in parallel), encoding="utf-8")
    (work / "one").write_text(
        "#!/bin/sh\nset -eu\nmkdir -p /work/public/$1\n"
        "rpmbuild -bb --quiet --target x86_64 --define '_rpmdir /work/public/'$1 --define '_build_name_fmt %{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm'"
        " --define '_topdir /work/build' --define 'debug_package %{nil}' --define '__os_install_post %{nil}'"
        " --define '_build_id_links none' --define \"_buildrootdir /work/build/root/$$\" /work/specs/$2.spec >/work/log.$$ 2>&1"
        " || { cat /work/log.$$ >&2; exit 255; }\n",
        encoding="utf-8",
    )
    lines.append('xargs -P "$(nproc)" -L 1 sh /work/one </work/list')
    lines.append(
        "find /work/public -name '*.rpm' -print0 | xargs -0 rpmsign --define '_gpg_name sandbox@example.invalid' --addsign >/dev/null"
    )
    for path, (dummy, yaml, key) in repositories.items():
        lines.append("createrepo_c --quiet /work/public/%s" % path)
        if yaml:
            (work / "modules").mkdir(exist_ok=True)
            file = "modules/%s.yaml" % path.replace("/", "_")
            (work / file).write_text(yaml, encoding="utf-8")
            lines.append("modifyrepo_c --mdtype=modules /work/%s /work/public/%s/repodata >/dev/null" % (file, path))
        if key:
            lines.append("cp /work/key /work/public/%s/%s" % (path, key))
    lines.append("gpgconf --kill all")
    return "\n".join(lines) + "\n"
