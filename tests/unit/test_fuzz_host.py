# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever a host's files and programs say: GPUs, processes, ports, units and the operating system are read or unknown."""

from __future__ import annotations

import dataclasses
import html
import pathlib
import re
import typing as t
import xml.etree.ElementTree as ET

from ansible_collections.gpu_fleet.nim.plugins.module_utils._disk_space import mount_of, mount_points
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import normalise_bdf, parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_bus import architecture_of_device
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_health import gpu_health, parse_xids
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_holders import (
    container_name,
    driver_holders,
    parse_cgroup,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_host_info import gather
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import observe_gpus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_placement import Wish, place
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_topology import parse_topology
from ansible_collections.gpu_fleet.nim.plugins.module_utils._kernel_log import KernelLine
from ansible_collections.gpu_fleet.nim.plugins.module_utils._listeners import (
    find_listeners,
    listening_sockets,
    own_addresses,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import loaded_modules, parse_driver_version
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_process_state import observe_units, parse_time
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import parse_os_release
from ansible_collections.gpu_fleet.nim.plugins.module_utils._secure_boot import secure_boot_enabled
from ansible_collections.gpu_fleet.nim.plugins.module_utils._systemd import unit_properties
from fake_host import FakeHost
from fuzzing import damaged, encodable, only_told, texts
from hypothesis import example, given
from hypothesis import strategies as st

SMI = (pathlib.Path(__file__).parent / "fixtures" / "nvidia-smi" / "h200-x2.xml").read_text()
NVRM = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder@U22)  Tue Mar 3\n"
)
CGROUP = "0::/system.slice/docker-%s.scope\n12:devices:/docker/%s\n1:name=systemd:/system.slice/nim-a.service\n" % (
    "a" * 64,
    "b" * 64,
)
TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 999 1 0000000000000000 100 0 0
"""
SHOWN = """\
Id=nim-a.service
LoadState=loaded
ActiveState=active
SubState=running
NRestarts=3
InvocationID=abc
Result=success
ExecMainStatus=0
ConditionResult=yes
ExecMainStartTimestampMonotonic=123456789

Id=nim-b.service
LoadState=not-found
ActiveState=inactive
"""
OS_RELEASE = (
    'ID=ubuntu\nVERSION_ID="24.04"\nVERSION_CODENAME=noble\nID_LIKE="debian other"\nPRETTY_NAME="Ubuntu 24.04.2 LTS"\n'
)
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tSYS\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNODE\tSYS\t0-47\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tPHB\tSYS\t0-47\t0\t\tN/A
GPU3\tSYS\tNODE\tPHB\t X \tSYS\t0-47\t0\t\tN/A
NIC0\tPIX\tSYS\tSYS\tSYS\t X \t\t\t

Legend:
  X    = Self
"""
KERNEL = """\
[  12.3] NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.159.04
[ 100.1] NVRM: Xid (PCI:0000:1b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 101.1] NVRM: Xid (PCI:0000:1b:00 GPU-I:01): 94, pid=1234, name=python3, Contained: LTC
"""
MOUNTS = "36 35 98:0 /mnt1 /var/lib/docker rw,noatime master:1 - ext3 /dev/root rw\n29 1 8:1 / /srv\\040x rw - ext4 /dev/sda1 rw\n"


#: What nvidia-smi 580 prints of memory: a number and its unit.
_SIZE = re.compile(r"([0-9]{1,18})\s*([KMGT])i?B")
_PER_MIB = {"K": 1024, "M": 1}
_MIB_PER = {"M": 1, "G": 1024, "T": 1024 * 1024}


def _told_mib(text: str) -> int | None:
    """MiB that a text says, by another way than the parser's; None where it says no size."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    number, unit = int(found.group(1)), found.group(2)
    return number // _PER_MIB[unit] if unit in _PER_MIB else number * _MIB_PER[unit]


def _told_number(text: str) -> int | None:
    return int(text.strip()) if re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else None


def _told_text(text: str) -> str:
    plain = text.strip()
    none = plain.lower() in (
        "n/a",
        "[n/a]",
        "unknown error",
        "[unknown error]",
        "gpu requires reset",
        "[gpu requires reset]",
    )
    return "" if none or plain.startswith(("Requested functionality", "ERR!", "[Not Supported]")) else plain


@given(damaged(SMI, 6))
def test_nvidia_smi_xml(xml: str) -> None:
    """What is read of a damaged document stands in it; the rest is unknown."""
    with only_told():
        try:
            cuda, driver, gpus = parse_smi(xml)
        except ValueError:
            return
    plain = " ".join(html.unescape(xml).split())
    sizes = {None, *(_told_mib(found.group()) for found in _SIZE.finditer(plain))}
    numbers = {None, *map(_told_number, re.findall(r"[0-9]+", plain))}
    assert len(gpus) <= xml.count("<gpu")
    for text in (cuda, driver, *(text for gpu in gpus for text in (gpu.uuid, gpu.name, gpu.mig, gpu.compute_mode))):
        assert " ".join(text.split()) in plain
    for gpu in gpus:
        assert {gpu.memory_total_mib, gpu.memory_used_mib, gpu.memory_free_mib} <= sizes
        assert gpu.minor in numbers


#: Path in the XML, field of the GPU, and what a text there must give.
_FIELDS: dict[str, tuple[str, t.Callable[[str], t.Any]]] = {
    "uuid": ("uuid", _told_text),
    "product_name": ("name", _told_text),
    "mig_mode/current_mig": ("mig", _told_text),
    "compute_mode": ("compute_mode", _told_text),
    "minor_number": ("minor", _told_number),
    "fb_memory_usage/total": ("memory_total_mib", _told_mib),
    "fb_memory_usage/used": ("memory_used_mib", _told_mib),
    "fb_memory_usage/free": ("memory_free_mib", _told_mib),
}
_sizes = st.builds("{}{}{}".format, st.integers(0, 10**18 - 1), st.sampled_from(("", " ")), st.sampled_from(("KiB", "MiB", "GiB", "TiB", "MB")))  # fmt: skip
_values = st.one_of(texts, _sizes, _sizes.flatmap(damaged), st.integers(0, 10**18 - 1).map(str), st.uuids().map("GPU-{}".format))  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(_FIELDS)), _values, max_size=6))
@example({"minor_number": "1,5"})
@example({"minor_number": "-1"})
@example({"fb_memory_usage/total": "143771"})
@example({"fb_memory_usage/total": "143.771 MiB", "fb_memory_usage/free": "[N/A]"})
def test_nvidia_smi_values(changes: dict[str, str]) -> None:
    """A value is exactly what its text says, and None or empty where it says none; nothing else has changed."""
    changes = {path: _in_xml(value) for path, value in changes.items()}
    root = ET.fromstring(SMI)  # noqa: S314 - a fixture
    for path, value in changes.items():
        changed = root.find("gpu/" + path)
        assert changed is not None
        changed.text = value
    xml = ET.tostring(root, encoding="unicode")
    before = parse_smi(SMI)
    with only_told():
        cuda, driver, gpus = parse_smi(xml)
    expected = {_FIELDS[path][0]: _FIELDS[path][1](value) for path, value in changes.items()}
    # A GPU that says so anywhere is lost, and that is told beside its values.
    first = dataclasses.replace(before[2][0], telemetry=gpus[0].telemetry, **expected)
    assert (cuda, driver, gpus) == (*before[:2], (first, *before[2][1:]))
    with only_told():
        place([Wish("a", 1), Wish("b", "all")], gpus)
    host = _gpu_host(xml)
    with only_told():
        gpu_health(observe_gpus(host), [KernelLine(0.0, line) for line in KERNEL.splitlines()])


def _in_xml(value: str) -> str:
    """What may stand in XML of a text."""
    return "".join(char for char in value if char.isprintable() and ord(char) not in (0xFFFE, 0xFFFF))


def _gpu_host(xml: str) -> FakeHost:
    base = "/sys/bus/pci/devices/0000:1b:00.0"
    return FakeHost(
        {
            base + "/vendor": "0x10de\n",
            base + "/class": "0x030200\n",
            base + "/device": "0x2335\n",
            "/sys/module/nvidia/version": "580.159.04\n",
            "/proc/driver/nvidia/version": NVRM,
            "/etc/os-release": OS_RELEASE,
        },
        {"nvidia-smi -q -x": xml},
    )


@given(
    st.dictionaries(st.sampled_from(("vendor", "class", "device")), texts), texts, damaged(NVRM), texts, damaged(SMI)
)
def test_what_sysfs_and_procfs_say_of_gpus(pci: dict[str, str], bdf: str, nvrm: str, version: str, xml: str) -> None:
    host = _gpu_host(xml)
    for name, text in pci.items():
        host.files["/sys/bus/pci/devices/0000:1b:00.0/" + name] = encodable(text)
    host.files["/sys/bus/pci/devices/%s/vendor" % bdf.replace("/", "")] = b"0x10de"
    host.files["/sys/module/nvidia/version"] = encodable(version)
    host.files["/proc/driver/nvidia/version"] = encodable(nvrm)
    host.files["/proc/driver/nvidia/gpus/%s/information" % bdf.replace("/", "")] = encodable(nvrm)
    host.files["/proc/modules"] = encodable(version)
    with only_told():
        found = observe_gpus(host)
        observe_gpus(host, with_smi=False)
        assert found.architectures is not None
        loaded_modules(host)
        gpu_health(found)
        secure_boot_enabled(host)


@given(st.dictionaries(st.sampled_from(("comm", "cmdline", "cgroup")), texts | damaged(CGROUP)), texts, texts)
def test_processes(files: dict[str, str], container: str, record: str) -> None:
    host = FakeHost({"/proc/12/%s" % name: encodable(text) for name, text in files.items()})
    host.links["/proc/12/fd/3"] = "/dev/nvidia0"
    host.links["/proc/12/fd/4"] = container
    host.links["/proc/²/fd/4"] = "/dev/nvidia0"
    host.files["/var/lib/docker/containers/%s/config.v2.json" % ("a" * 64)] = encodable(record)
    with only_told():
        holders = driver_holders(host)
        assert [holder.pid for holder in holders if holder.pid == 12] == [12]
        for holder in holders:
            holder.describe()
            holder.as_dict()
    parse_cgroup(files.get("cgroup", ""))


@given(texts | st.just("[" * 100_000) | st.just('{"Name": 5}') | st.just("[1]"))
def test_dockers_own_record_of_a_container(record: str) -> None:
    host = FakeHost({"/var/lib/docker/containers/x/config.v2.json": encodable(record)})
    with only_told():
        assert isinstance(container_name(host, "x"), str)


@given(texts)
def test_small_texts(text: str) -> None:
    with only_told():
        normalise_bdf(text)
        architecture_of_device(text)
        parse_driver_version(text)
        parse_time(text)
        parse_time("2026-%s-01T00:00:00Z" % text)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_times_that_do_not_exist(month: int, day: int, hour: int, minute: int) -> None:
    found = parse_time("2026-%02d-%02dT%02d:%02d:00.5Z" % (month, day, hour, minute))
    assert found is None or found > 0


@given(damaged(TCP, 5), damaged(TCP, 5), texts)
@example(TCP.replace(":1F40", ":11F40"), TCP, "")
def test_ports(tcp: str, tcp6: str, command: str) -> None:
    host = FakeHost({"/proc/net/tcp": encodable(tcp), "/proc/net/tcp6": encodable(tcp6)})
    host.files["/proc/7/comm"] = encodable(command)
    host.links["/proc/7/fd/1"] = "socket:[12345]"
    for ipv6 in (False, True):
        for address, port, inode in listening_sockets(tcp, ipv6):
            assert address
            assert 0 <= port <= 65535
            assert inode
    with only_told():
        for listener in find_listeners(host, {8000, 22}, []):
            listener.describe()


@given(damaged("  |-- 10.0.0.1\n      /32 host LOCAL\n" * 2), damaged("0" * 31 + "1 01 80 10 80 lo\n"))
def test_addresses(fib: str, inet6: str) -> None:
    assert isinstance(own_addresses(fib, inet6), tuple)


@given(damaged(SHOWN, 5))
def test_units(shown: str) -> None:
    host = FakeHost(commands={"systemctl show *": shown})
    with only_told():
        found = observe_units(host, ["nim-a.service", "nim-b.service"])
        assert set(found) == {"nim-a.service", "nim-b.service"}
        unit_properties(host, "nim-a.service", "ActiveState", "MainPID")


@given(damaged(OS_RELEASE, 5))
def test_os_release(text: str) -> None:
    release = parse_os_release(text)
    assert isinstance(release.repository_distribution, str)
    assert isinstance(release.family, str)
    assert release.major >= 0


@given(damaged(TOPOLOGY, 6), st.integers(1, 4))
def test_topology(text: str, count: int) -> None:
    found = parse_topology(text)
    if found is None:
        return
    for pair in found.nearness:
        assert pair[0] <= pair[1]
    best = found.best([0, 1, 2, 3], count)
    assert len(set(best)) == count


@given(damaged(KERNEL, 6))
def test_kernel_log(text: str) -> None:
    for xid in parse_xids(KernelLine(0.0, line) for line in text.splitlines()):
        assert xid.number >= 0


@given(damaged(MOUNTS, 5), texts)
def test_mounts(text: str, path: str) -> None:
    assert mount_of("/" + path, mount_points(text))


@given(damaged(SMI, 2), damaged(OS_RELEASE), texts)
def test_the_facts_of_a_host(xml: str, release: str, said: str) -> None:
    """Every section is an answer or a cause, whatever the programs of the host say."""
    host = _gpu_host(xml)
    host.files["/etc/os-release"] = encodable(release)
    host.commands.update(
        {
            "systemctl *": said,
            "dkms status": said,
            "dpkg-query *": said,
            "rpm *": said,
            "modinfo *": said,
            "docker *": said,
        }
    )
    with only_told():
        answer = gather(host, (), t.cast(t.Any, _NoDocker()))
        assert isinstance(answer["errors"], dict)


class _NoDocker:
    def available(self) -> bool:
        return False

    def version(self) -> dict[str, t.Any]:
        return {}

    info = version

    def containers(self, *_arguments: t.Any, **_options: t.Any) -> list[t.Any]:
        return []

    def container(self, _name: str) -> None:
        return None

    image = container
