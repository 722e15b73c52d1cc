# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stand-in GPU hardware of a sandbox host, and the kernel's side of it. Runs on the host under several names:

boot (before systemd, from the host's boot script), modprobe, rmmod, mokutil. What the machine has is described in
/etc/sandbox/hardware.json; its state lives on tmpfs and is gone after a reboot.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import uuid

DESCRIPTION = "/etc/sandbox/hardware.json"
RUN = "/run/sandbox-hardware"
PCI = "/sys/bus/pci/devices"
MODULES = "/sys/module"
PROC_DRIVER = "/proc/driver"
PROC_NVIDIA = PROC_DRIVER + "/nvidia"
STANDIN = PROC_DRIVER + "/nvidia-standin"
UDEV_RULE = "/usr/lib/udev/rules.d/71-nvidia.rules"
RELEASE = os.uname().release

#: compute capability and the kernel modules that an architecture can take.
ARCHITECTURES = {
    "Maxwell": ("5.2", "proprietary"),
    "Pascal": ("6.1", "proprietary"),
    "Volta": ("7.0", "proprietary"),
    "Turing": ("7.5", "both"),
    "Ampere": ("8.0", "both"),
    "Ada Lovelace": ("8.9", "both"),
    "Ada": ("8.9", "both"),
    "Hopper": ("9.0", "both"),
    "Grace Hopper": ("9.0", "open"),
    "Blackwell": ("10.0", "open"),
}
#: Devices that belong to a module: who has one open keeps that module from being removed.
DEVICES = {
    "nvidia": r"/dev/nvidia(\d+|ctl|-caps/.*|-nvswitchctl)",
    "nvidia_uvm": r"/dev/nvidia-uvm(-tools)?",
    "nvidia_modeset": r"/dev/nvidia-modeset",
}
#: Compute capabilities of GPUs that can be divided.
MIG = (8.0, 9.0, 10.0)
SIZES = {"nvidia": 14299136, "nvidia_uvm": 1830912, "nvidia_modeset": 1638400, "nvidia_drm": 135168, "nouveau": 3096576}


def write(path: str, text: str | bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as out:
        out.write(text if isinstance(text, bytes) else text.encode())


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as source:
            return source.read().strip()
    except OSError:
        return ""


def log(text: str) -> None:
    """Kernel messages go to the journal as the kernel's, because a container cannot write to the real ring buffer."""
    subprocess.run(["systemd-cat", "-t", "kernel", "-p", "err"], input=text + "\n", text=True, check=False, timeout=10)


def description() -> dict:
    try:
        with open(DESCRIPTION, encoding="utf-8") as source:
            found = json.load(source)
    except FileNotFoundError:
        found = {}
    for index, gpu in enumerate(found.setdefault("gpus", [])):
        gpu.setdefault("name", "NVIDIA H200")
        gpu.setdefault("brand", "NVIDIA")
        gpu.setdefault("architecture", "Hopper")
        gpu.setdefault("device_id", "2335")
        gpu["device_id"] = str(gpu["device_id"]).lower().replace("0x", "")[:4]
        gpu.setdefault("memory_mib", 143771)
        gpu.setdefault("bdf", "0000:%02x:00.0" % (0x18 + 0x11 * index))
        gpu.setdefault("uuid", "GPU-" + str(uuid.uuid5(uuid.NAMESPACE_DNS, os.uname().nodename + gpu["bdf"])))
        gpu.setdefault("class", "0x030000" if gpu["brand"] in ("GeForce", "TITAN", "Quadro") else "0x030200")
        gpu.setdefault("serial", "15%011d" % index)
        gpu["minor"] = index
        gpu.setdefault("compute_cap", compute_capability(gpu))
        # What the product does not have; the capture that nvidia-smi starts from is of one that has everything.
        absent = ["mig_mode/current_mig", "mig_mode/pending_mig"] if float(gpu["compute_cap"] or 0) not in MIG else []
        absent += ["ecc_mode/current_ecc", "ecc_mode/pending_ecc"] if gpu["brand"] in ("GeForce", "TITAN") else []
        gpu["xml"] = {**dict.fromkeys(absent, "N/A"), **gpu.get("xml", {})}
    return found


def compute_capability(gpu: dict) -> str:
    """Of the architecture, with the consumer and small boards of a generation told apart from its largest."""
    known = ARCHITECTURES.get(gpu["architecture"], ("", ""))[0]
    small = gpu["brand"] in ("GeForce", "TITAN", "Quadro") or re.search(r"A(2|10|16|40)$|RTX", gpu["name"])
    return {"8.0": "8.6", "10.0": "12.0"}.get(known, known) if small else known


# -- module files ------------------------------------------------------------------------------------------------------


def module_file(values: list[tuple[str, str]]) -> bytes:
    """A relocatable ELF file whose .modinfo section holds ``values``: what modinfo, depmod and modprobe read."""
    modinfo = b"".join(("%s=%s" % pair).encode() + b"\0" for pair in values)
    names = b"\0.modinfo\0.text\0.symtab\0.strtab\0.shstrtab\0"
    contents = [b"", modinfo, b"\xc3", b"\0" * 24, b"\0", names]
    kinds = [0, 1, 1, 2, 3, 3]
    labels = [b"", b".modinfo", b".text", b".symtab", b".strtab", b".shstrtab"]
    body, offsets = b"", []
    for content in contents:
        body += b"\0" * (-len(body) % 8)
        offsets.append(64 + len(body))
        body += content
    body += b"\0" * (-len(body) % 8)
    header = b"\x7fELF\x02\x01\x01" + b"\0" * 9
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(contents), 5)
    table = b""
    for number, (label, kind, content) in enumerate(zip(labels, kinds, contents)):
        if number == 0:
            table += b"\0" * 64
            continue
        is_symbols = kind == 2
        flags = {1: 2, 2: 6}.get(number, 0)
        table += struct.pack(
            "<IIQQQQIIQQ", names.index(b"\0" + label + b"\0") + 1, kind, flags, 0, offsets[number], len(content),
            4 if is_symbols else 0, 1 if is_symbols else 0, 8, 24 if is_symbols else 0,
        )  # fmt: skip
    return header + body + table


def module_values(name: str, version: str, licence: str, kernel: str, depends: str = "") -> list[tuple[str, str]]:
    values = [("version", version)] if version else []
    values += [("license", licence), ("description", "stand-in of the gpu_fleet.nim sandbox")]
    if name in ("nvidia", "nouveau"):
        values += [("alias", "pci:v000010DEd*sv*sd*bc03sc%si00*" % sub) for sub in ("02", "00")]
    values += [("depends", depends), ("name", name), ("vermagic", "%s SMP preempt mod_unload modversions " % kernel)]
    return values


def modinfo(path: str) -> dict[str, str]:
    with open(path, "rb") as source:
        data = source.read()
    found: dict[str, str] = {}
    for piece in data.split(b"\0"):
        match = re.match(rb"(version|license|depends|name|vermagic)=(.*)", piece, re.DOTALL)
        if match:
            found[match.group(1).decode()] = match.group(2).decode(errors="replace")
    return found


# -- state of the stand-in kernel --------------------------------------------------------------------------------------


def loaded(name: str) -> bool:
    return os.path.exists("%s/%s/initstate" % (MODULES, name))


def loaded_modules() -> list[str]:
    """Names of the modules that this stand-in has loaded, newest first."""
    return [line.split()[0] for line in read(RUN + "/modules").splitlines()]


def holders(name: str) -> list[str]:
    try:
        return sorted(os.listdir("%s/%s/holders" % (MODULES, name)))
    except OSError:
        return []


def device_users(module: str) -> list[int]:
    """Processes, those of nested containers too, that hold a device of a module open."""
    devices = re.compile(DEVICES.get(module, r"(?!)"))
    users = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            descriptors = os.listdir("/proc/%s/fd" % pid)
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                if devices.fullmatch(os.readlink("/proc/%s/fd/%s" % (pid, descriptor))):
                    users.append(int(pid))
                    break
            except OSError:
                continue
    return users


def update_module_table(machine: dict) -> None:
    """/proc/modules, and the reference counts as far as they come from other modules."""
    unload = machine.get("module_unload", True)
    lines = []
    for name in loaded_modules():
        used_by = holders(name)
        stuck = 1 if machine.get("needs_reboot") and name == "nvidia" else 0
        if unload:
            write("%s/%s/refcnt" % (MODULES, name), "%d\n" % (len(used_by) + stuck))
        count = str(len(used_by) + stuck) if unload else "-"
        users = "".join(one + "," for one in used_by) if used_by and unload else "-"
        lines.append("%s %d %s %s Live 0x0000000000000000 (OE)" % (name, SIZES.get(name, 16384), count, users))
    # In place: this file is bind-mounted over /proc/modules.
    write(RUN + "/modules", "".join(line + "\n" for line in lines))


def bind_driver(machine: dict, driver: str | None) -> None:
    for gpu in machine["gpus"]:
        link = "%s/%s/driver" % (PCI, gpu["bdf"])
        if os.path.islink(link):
            os.unlink(link)
        if driver:
            os.symlink("../../../bus/pci/drivers/" + driver, link)


def bound_driver(gpu: dict) -> str:
    try:
        return os.path.basename(os.readlink("%s/%s/driver" % (PCI, gpu["bdf"])))
    except OSError:
        return ""


def node(name: str) -> None:
    """A device that can be opened anywhere: the null device under the driver's name."""
    path = "/dev/" + name
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))
        os.chmod(path, 0o666)  # noqa: S103 (as the driver's own devices)


def remove_nodes(pattern: str) -> None:
    for name in os.listdir("/dev"):
        if re.fullmatch(pattern, name):
            os.unlink("/dev/" + name)


def refuse(machine: dict, name: str, info: dict[str, str]) -> str:
    """Why the kernel does not take this module, as errno's text; empty when it does."""
    if machine.get("secure_boot") and not machine.get("mok_enrolled"):
        log("Loading of module with unavailable key is rejected")
        return "Key was rejected by service"
    if not info.get("vermagic", "").startswith(RELEASE + " "):
        return "Exec format error"
    if name != "nvidia":
        return ""
    if machine.get("load_error"):
        return machine["load_error"]
    version, is_open = info.get("version", ""), info.get("license") != "NVIDIA"
    usable = []
    for gpu in machine["gpus"]:
        takes = ARCHITECTURES.get(gpu["architecture"], ("", "both"))[1]
        where = "GPU %s" % gpu["bdf"]
        if bound_driver(gpu) not in ("", "nvidia"):
            log("NVRM: %s is already bound to %s." % (where, bound_driver(gpu)))
        elif takes == "proprietary" and is_open:
            log(
                "NVRM: The NVIDIA %s (PCI ID: 10de:%s) is not supported by open nvidia.ko because it does not include the required GPU System Processor (GSP)."
                % (where, gpu["device_id"])
            )
        elif takes == "open" and not is_open:
            log(
                "NVRM: The NVIDIA %s (PCI ID: 10de:%s) requires use of the NVIDIA open kernel modules."
                % (where, gpu["device_id"])
            )
        elif takes == "proprietary" and int(version.split(".")[0] or 0) >= 590:
            log("NVRM: The NVIDIA %s is not supported by the %s NVIDIA driver release." % (where, version))
        else:
            usable.append(gpu)
    if machine["gpus"] and not usable:
        log("NVRM: None of the NVIDIA devices were initialized.")
    elif not usable:
        log("NVRM: No NVIDIA GPU found.")
    return "" if usable else "No such device"


def insert(machine: dict, path: str) -> str:
    """Loads a module file; the text of the error, or an empty string."""
    info = modinfo(path)
    name = info.get("name", os.path.basename(path).split(".")[0]).replace("-", "_")
    if loaded(name):
        return ""
    error = refuse(machine, name, info)
    if error:
        return error
    directory = "%s/%s" % (MODULES, name)
    if info.get("version"):
        write(directory + "/version", info["version"] + "\n")
    write(directory + "/taint", "OE\n")
    if machine.get("module_unload", True):
        os.makedirs(directory + "/holders", exist_ok=True)
        for other in filter(None, info.get("depends", "").split(",")):
            holder = "%s/%s/holders/%s" % (MODULES, other.replace("-", "_"), name)
            if os.path.isdir(os.path.dirname(holder)) and not os.path.islink(holder):
                os.symlink("../../" + name, holder)
    if name == "nvidia":
        load_nvidia(machine, info["version"], info.get("license") != "NVIDIA")
    elif name == "nvidia_uvm":
        node("nvidia-uvm")
        node("nvidia-uvm-tools")
    elif name == "nvidia_modeset":
        node("nvidia-modeset")
    elif name == "nouveau":
        bind_driver(machine, "nouveau")
    write(directory + "/initstate", "live\n")
    write(RUN + "/modules", "%s 0\n%s\n" % (name, read(RUN + "/modules")))
    update_module_table(machine)
    return ""


def load_nvidia(machine: dict, version: str, is_open: bool) -> None:
    flavour = "Open Kernel Module for x86_64 " if is_open else "x86_64 Kernel Module "
    builder = "  Release Build  (builder@)  " if is_open else "  Tue Jan  1 00:00:00 UTC 2026"
    write(
        PROC_NVIDIA + "/version",
        "NVRM version: NVIDIA UNIX %s %s%s\nGCC version:  gcc version 15.3.0 (GCC) \n" % (flavour, version, builder),
    )
    write(
        PROC_NVIDIA + "/params",
        "ResmanDebugLevel: 4294967295\nModifyDeviceFiles: 1\nDeviceFileUID: 0\nDeviceFileGID: 0\nDeviceFileMode: 438\nEnableGpuFirmware: 18\n",
    )
    write(PROC_NVIDIA + "/registry", 'Binary: ""\n')
    text = ""
    for gpu in machine["gpus"]:
        gsp = ARCHITECTURES.get(gpu["architecture"], ("", "both"))[1] != "proprietary"
        lines = [
            ("Model: \t\t", gpu["name"]),
            ("IRQ:   \t\t", str(41 + gpu["minor"])),
            ("GPU UUID: \t", gpu["uuid"]),
            ("Video BIOS: \t", "96.00.a5.00.1a"),
            ("Bus Type: \t", "PCIe"),
            ("DMA Size: \t", "52 bits"),
            ("DMA Mask: \t", "0xfffffffffffff"),
            ("Bus Location: \t", gpu["bdf"]),
            ("Device Minor: \t", str(gpu["minor"])),
            ("GPU Firmware: \t", version if gsp else "N/A"),
            ("GPU Excluded:\t", "No"),
        ]
        directory = "%s/gpus/%s" % (PROC_NVIDIA, gpu["bdf"])
        write(directory + "/information", "".join("%s %s\n" % line for line in lines))
        write(directory + "/registry", 'Binary: ""\n')
        values = {
            key: gpu[key]
            for key in ("minor", "bdf", "uuid", "name", "brand", "architecture", "device_id", "memory_mib", "serial")
        }
        values["compute_cap"] = gpu["compute_cap"] or "N/A"
        values["gsp"] = "yes" if gsp else "no"
        values["fabric"] = "yes" if machine.get("fabric") else "no"
        values["lost"] = "yes" if gpu.get("lost") else "no"
        text += "gpu\n" + "".join("%s=%s\n" % pair for pair in values.items())
        text += "".join("xml.%s=%s\n" % pair for pair in gpu["xml"].items())
        node("nvidia%d" % gpu["minor"])
    node("nvidiactl")
    if machine.get("fabric"):
        for number in range(4):
            write(PROC_DRIVER + "/nvidia-nvswitch/devices/0000:c%d:00.0" % number, "")
        node("nvidia-nvswitchctl")
    write(STANDIN + "/gpus", text)
    write(STANDIN + "/version", version + "\n")
    bind_driver(machine, "nvidia")


def remove(machine: dict, name: str) -> str:
    """Unloads a module; the text of the error, or an empty string."""
    if not machine.get("module_unload", True):
        return "could not remove '%s': Function not implemented" % name
    if holders(name):
        return "Module %s is in use by: %s" % (name, " ".join(holders(name)))
    if name == "nouveau" and machine.get("nouveau_in_use"):
        return "Module nouveau is in use"
    if device_users(name) or (machine.get("needs_reboot") and name == "nvidia"):
        return "Module %s is in use" % name
    for other in os.listdir(MODULES):
        link = "%s/%s/holders/%s" % (MODULES, other, name)
        if os.path.islink(link):
            os.unlink(link)
    remove_tree("%s/%s" % (MODULES, name))
    if name == "nvidia":
        remove_tree(PROC_NVIDIA)
        remove_tree(STANDIN)
        remove_tree(PROC_DRIVER + "/nvidia-nvswitch")
        remove_nodes(r"nvidia\d+|nvidiactl|nvidia-nvswitchctl")
        bind_driver(machine, None)
    elif name == "nvidia_uvm":
        remove_nodes(r"nvidia-uvm(-tools)?")
    elif name == "nvidia_modeset":
        remove_nodes(r"nvidia-modeset")
    elif name == "nouveau":
        bind_driver(machine, None)
    kept = [line for line in read(RUN + "/modules").splitlines() if line.split()[0] != name]
    write(RUN + "/modules", "".join(line + "\n" for line in kept))
    update_module_table(machine)
    return ""


def remove_tree(path: str) -> None:
    subprocess.run(["rm", "-rf", path], check=True)


# -- the programs ------------------------------------------------------------------------------------------------------


def kmod(program: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """The real kmod under the name of one of its programs."""
    return subprocess.run(
        [program, *arguments], executable="/usr/bin/kmod", capture_output=True, text=True, check=False
    )


def ours(name: str) -> bool:
    return name.replace("-", "_").startswith(("nvidia", "nouveau", "gdrdrv"))


def modprobe(arguments: list[str]) -> int:
    flags = [one for one in arguments if one.startswith("-")]
    names = [one for one in arguments if not one.startswith("-")]
    short = "".join(flag[1:] for flag in flags if not flag.startswith("--"))
    passive = {
        "--show-depends",
        "--show",
        "--dry-run",
        "--showconfig",
        "-c",
        "-n",
        "-D",
        "--version",
        "-V",
        "--show-exports",
        "--resolve-alias",
        "-R",
    }
    if not names or passive & set(flags) or not any(ours(name) for name in names):
        os.execv("/usr/bin/kmod", ["modprobe", *arguments])  # noqa: S606 (a program, no shell)
    machine = description()
    quiet = "q" in short or "--quiet" in flags

    def fail(text: str) -> int:
        if not quiet:
            print("modprobe: " + text, file=sys.stderr)
        return 1

    if "r" in short or "--remove" in flags:
        for name in names:
            plain = name.replace("-", "_")
            if not loaded(plain):
                if kmod("modprobe", ["--show-depends", name]).returncode:
                    return fail("FATAL: Module %s not found." % name)
                continue
            depends = [one for one in loaded_modules() if plain in holders(one)]
            error = remove(machine, plain)
            if error:
                return fail(
                    ("ERROR: " if error.startswith("could") else "FATAL: ")
                    + error.split(" by:")[0]
                    + ("" if error.startswith("could") else ".")
                )
            for other in depends:
                if loaded(other) and not holders(other):
                    remove(machine, other)
        return 0
    # Without -a the words after the first are parameters of the module.
    status = 0
    for name in names if ("a" in short or "--all" in flags) else names[:1]:
        if loaded(name.replace("-", "_")):
            continue
        listed = kmod(
            "modprobe", [*(["-b"] if "b" in short or "--use-blacklist" in flags else []), "--show-depends", name]
        )
        if listed.returncode:
            status = fail("FATAL: Module %s not found in directory /lib/modules/%s" % (name, RELEASE))
            continue
        for line in listed.stdout.splitlines():
            kind, _space, rest = line.strip().partition(" ")
            if kind == "install":
                if subprocess.run(["sh", "-c", rest], check=False).returncode:
                    status = fail(
                        "ERROR: ../libkmod/libkmod-module.c:1047 command_do() Error running install command '%s' for module %s: retcode 1"
                        % (rest, name)
                    )
                    break
            elif kind == "insmod":
                error = insert(machine, rest.split()[0])
                if error:
                    status = fail("ERROR: could not insert '%s': %s" % (name.replace("-", "_"), error))
                    break
        # What the driver's udev rules do when the driver has bound a device.
        if not status and name.replace("-", "_") == "nvidia" and os.path.exists(UDEV_RULE):
            for other in ("nvidia-modeset", "nvidia-drm", "nvidia-uvm"):
                if not kmod("modprobe", ["--show-depends", other]).returncode:
                    modprobe(["-q", other])
    return status


def rmmod(arguments: list[str]) -> int:
    names = [one for one in arguments if not one.startswith("-")]
    if not any(ours(name) for name in names):
        os.execv("/usr/bin/kmod", ["rmmod", *arguments])  # noqa: S606 (a program, no shell)
    machine = description()
    status = 0
    for name in names:
        plain = os.path.basename(name).split(".ko")[0].replace("-", "_")
        error = remove(machine, plain) if loaded(plain) else "Module %s is not currently loaded" % plain
        if error:
            print("rmmod: ERROR: " + error, file=sys.stderr)
            status = 1
    return status


def mokutil(arguments: list[str]) -> int:
    machine = description()
    if "--sb-state" in arguments:
        if machine.get("firmware") == "bios":
            print("EFI variables are not supported on this system", file=sys.stderr)
            return 255
        print("SecureBoot enabled" if machine.get("secure_boot") else "SecureBoot disabled")
        return 0
    if "--test-key" in arguments or "-t" in arguments:
        key = arguments[-1]
        enrolled = bool(machine.get("mok_enrolled"))
        print("%s is %s" % (key, "already enrolled" if enrolled else "not enrolled"))
        return 1 if enrolled else 0
    if "--list-enrolled" in arguments or "-l" in arguments:
        if not machine.get("mok_enrolled"):
            print("MokListRT is empty")
        return 0
    print("mokutil: the stand-in knows --sb-state, --test-key and --list-enrolled", file=sys.stderr)
    return 1


def is_mounted(path: str) -> bool:
    return any(line.split()[4] == path for line in read("/proc/self/mountinfo").splitlines())


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def boot() -> int:
    machine = description()
    os.makedirs(RUN, exist_ok=True)
    subprocess.run(["mount", "-o", "remount,rw", "/sys"], check=False, capture_output=True)
    builtin = [name for name in os.listdir(MODULES) if not ours(name)]
    apparmor = read(MODULES + "/apparmor/parameters/enabled")
    for target in (PCI, MODULES, PROC_DRIVER):
        if not is_mounted(target):
            mount("-t", "tmpfs", "-o", "mode=0755,size=4m", "sandbox-hardware", target)
    for name in builtin:
        os.makedirs("%s/%s" % (MODULES, name), exist_ok=True)
    if apparmor:
        write(MODULES + "/apparmor/parameters/enabled", apparmor + "\n")
    if not os.path.exists(RUN + "/modules"):
        write(RUN + "/modules", "")
    # A machine whose kernel cannot load modules at all has no such file to put ours over.
    if os.path.exists("/proc/modules") and not is_mounted("/proc/modules"):
        mount("--bind", RUN + "/modules", "/proc/modules")
    # Every start of the container is a boot of its own for whoever compares boot ids.
    if not is_mounted("/proc/sys/kernel/random/boot_id"):
        write(RUN + "/boot_id", str(uuid.uuid4()) + "\n")
        mount("--bind", RUN + "/boot_id", "/proc/sys/kernel/random/boot_id")
    efi = "/sys/firmware"
    if machine.get("firmware", "uefi") == "uefi" and not is_mounted(efi):
        mount("-t", "tmpfs", "-o", "mode=0755,size=64k", "sandbox-hardware", efi)
        secure = 1 if machine.get("secure_boot") else 0
        write(efi + "/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c", bytes([6, 0, 0, 0, secure]))
        write(efi + "/efi/fw_platform_size", "64\n")
    for gpu in machine["gpus"]:
        plug(gpu["bdf"], gpu["device_id"], gpu["class"], "18bf")
    if machine.get("fabric"):
        for number in range(4):
            plug("0000:c%d:00.0" % number, "22a3", "0x068000", "1796")
    prepare_kernel(machine)
    if machine.get("nouveau") and not nouveau_is_blacklisted():
        modprobe(["-q", "nouveau"])
    if machine.get("auto_load", True) and machine["gpus"]:
        gpu = machine["gpus"][0]
        found = kmod("modprobe", ["-b", "--show-depends", modalias(gpu["device_id"], gpu["class"], "18bf")])
        match = re.search(r"/(nvidia[\w-]*)\.ko\S*\s*$", found.stdout)
        if match and not found.returncode and "nouveau" not in (bound_driver(gpu),):
            modprobe(["-q", "nvidia"])
    return 0


def modalias(device: str, pci_class: str, subsystem: str) -> str:
    number = int(pci_class, 16)
    return "pci:v000010DEd0000%ssv000010DEsd0000%sbc%02Xsc%02Xi%02X" % (
        device.upper(), subsystem.upper(), number >> 16, number >> 8 & 255, number & 255,
    )  # fmt: skip


def plug(bdf: str, device: str, pci_class: str, subsystem: str) -> None:
    directory = "%s/%s/" % (PCI, bdf)
    number = int(pci_class, 16)
    for name, value in (
        ("vendor", "0x10de"), ("device", "0x" + device), ("class", pci_class), ("subsystem_vendor", "0x10de"),
        ("subsystem_device", "0x" + subsystem), ("revision", "0xa1"), ("irq", "41"), ("numa_node", "0"),
        ("modalias", modalias(device, pci_class, subsystem)), ("enable", "1"),
        ("resource", "0x0000000000000000 0x0000000000000000 0x0000000000000000"),
    ):  # fmt: skip
        write(directory + name, value + "\n")
    write(directory + "reset", "")
    config = struct.pack(
        "<HHHHBBBBBBBB", 0x10DE, int(device, 16), 6, 16, 0xA1, number & 255, number >> 8 & 255, number >> 16, 0, 0, 0, 0
    )
    config += b"\0" * 28 + struct.pack("<HH", 0x10DE, int(subsystem, 16)) + b"\0" * 16
    write(directory + "config", config)


def prepare_kernel(machine: dict) -> None:
    """The parts of the kernel's package that depmod and modprobe need."""
    directory = "/lib/modules/" + RELEASE
    os.makedirs(directory, exist_ok=True)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if not os.path.exists("%s/%s" % (directory, name)):
            write("%s/%s" % (directory, name), "")
    nouveau = directory + "/kernel/drivers/gpu/drm/nouveau/nouveau.ko"
    new = machine.get("nouveau") and not os.path.exists(nouveau)
    if new:
        write(nouveau, module_file(module_values("nouveau", "", "GPL and additional rights", RELEASE)))
    if new or not os.path.exists(directory + "/modules.dep"):
        subprocess.run(["depmod", "-a", RELEASE], check=False)


def nouveau_is_blacklisted() -> bool:
    """As the initramfs says, when there is one: a blacklist only counts after update-initramfs."""
    initramfs = "/boot/initrd.img-" + RELEASE
    if os.path.exists(initramfs):
        return re.search(r"^\s*blacklist\s+nouveau\s*$", read(initramfs), re.MULTILINE) is not None
    return kmod("modprobe", ["--showconfig"]).stdout.find("blacklist nouveau\n") >= 0


def main() -> int:
    program = os.path.basename(sys.argv[0])
    arguments = sys.argv[1:]
    if program == "hardware.py":
        program, arguments = arguments[0], arguments[1:]
    return {"boot": lambda _a: boot(), "modprobe": modprobe, "rmmod": rmmod, "mokutil": mokutil}[program](arguments)


if __name__ == "__main__":
    sys.exit(main())
