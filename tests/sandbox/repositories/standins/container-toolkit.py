# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stand-in for the NVIDIA Container Toolkit's programs, told apart by the name they are called by.

nvidia-container-runtime, nvidia-container-runtime-hook, nvidia-cdi-hook, nvidia-ctk and nvidia-container-cli. The GPUs,
their devices and their errors are those of the stand-in driver; what is done to a container is done for real.
"""

import json
import os
import re
import resource
import subprocess
import sys

VERSION = "@VERSION@"
#: Since 1.18 "auto" builds a CDI specification in memory; before, it added the prestart hook.
AUTO_MODE = "jit-cdi" if tuple(int(one) for one in VERSION.split(".")[:2]) >= (1, 18) else "legacy"
CONFIG = os.environ.get("NVIDIA_CTK_CONFIG_FILE_PATH") or "/etc/nvidia-container-runtime/config.toml"
STANDIN = "/proc/driver/nvidia-standin"
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
SPEC_DIRS = ("/etc/cdi", "/var/run/cdi")
#: Where a container finds the stand-in kernel module's files: nothing can be mounted below a container's own /proc.
KERNEL_SIDE = ("/proc/driver", "/run/nvidia-kernel")

DEFAULT_CONFIG = """\
#accept-nvidia-visible-devices-as-volume-mounts = false
#accept-nvidia-visible-devices-envvar-when-unprivileged = true
disable-require = false
supported-driver-capabilities = "compat32,compute,display,graphics,ngx,utility,video"
#swarm-resource = "DOCKER_RESOURCE_GPU"

[nvidia-container-cli]
#debug = "/var/log/nvidia-container-toolkit.log"
environment = []
#ldcache = "/etc/ld.so.cache"
ldconfig = "@/sbin/ldconfig.real"
load-kmods = true
#no-cgroups = false
#path = "/usr/bin/nvidia-container-cli"
#root = "/run/nvidia/driver"
#user = "root:video"

[nvidia-container-runtime]
#debug = "/var/log/nvidia-container-runtime.log"
log-level = "info"
mode = "auto"
runtimes = ["runc", "crun"]

[nvidia-container-runtime.modes]

[nvidia-container-runtime.modes.cdi]
annotation-prefixes = ["cdi.k8s.io/"]
default-kind = "nvidia.com/gpu"
spec-dirs = ["/etc/cdi", "/var/run/cdi"]

[nvidia-container-runtime.modes.csv]
mount-spec-path = "/etc/nvidia-container-runtime/host-files-for-container.d"

[nvidia-container-runtime.modes.legacy]
cuda-compat-mode = "ldconfig"

[nvidia-container-runtime-hook]
path = "nvidia-container-runtime-hook"
skip-mode-detection = false

[nvidia-ctk]
path = "nvidia-ctk"
"""


class RefusedError(Exception):
    """What the program says before it ends with an error."""


def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as source:
            return source.read()
    except OSError:
        return None


# -- the driver --------------------------------------------------------------------------------------------------------


def library_version():
    """Version of the user space, by the file that libnvidia-ml.so.1 leads to."""
    try:
        return os.path.realpath(LIBRARIES + "/libnvidia-ml.so.1", strict=True).split(".so.")[1]
    except (OSError, IndexError):
        raise RefusedError("failed to initialize NVML: ERROR_LIBRARY_NOT_FOUND") from None


def gpus():
    """[{minor, uuid, ...}] as NVML would list them, or NVML's error."""
    version = library_version()
    loaded = read(STANDIN + "/version")
    if loaded is None:
        raise RefusedError("failed to initialize NVML: Driver Not Loaded")
    if loaded.strip() != version:
        raise RefusedError("failed to initialize NVML: Driver/library version mismatch")
    found = []
    for line in (read(STANDIN + "/gpus") or "").splitlines():
        if line == "gpu":
            found.append({})
        else:
            key, _equals, value = line.partition("=")
            found[-1][key] = value
    return [gpu for gpu in found if gpu.get("lost") != "yes"]


def select(request):
    """The GPUs that NVIDIA_VISIBLE_DEVICES asks for."""
    there = gpus()
    if request == "all":
        return there
    chosen = []
    for name in filter(None, request.split(",")):
        if name == "none":
            continue
        if name.isdigit():
            if int(name) >= len(there):
                raise RefusedError("failed to get device handle from index: Invalid Argument")
            chosen.append(there[int(name)])
            continue
        match = [gpu for gpu in there if gpu["uuid"] == name]
        if not match:
            raise RefusedError("failed to get device handle from UUID: Not Found")
        chosen += match
    return chosen


def library_files():
    version = library_version()
    directory = os.path.dirname(os.path.realpath(LIBRARIES + "/libnvidia-ml.so.1"))
    return ["%s/%s" % (directory, name) for name in sorted(os.listdir(directory)) if name.endswith(".so." + version)]


def node_of(path):
    status = os.stat(path)
    return {
        "path": path,
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": 0o666,
        "permissions": "rwm",
    }


def common_edits():
    """What every container with a GPU gets besides the GPU's own device."""
    version = library_version()
    nodes = [
        node_of(path) for path in ("/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidiactl") if os.path.exists(path)
    ]
    programs = [path for path in ("/usr/bin/nvidia-persistenced", "/usr/bin/nvidia-smi") if os.path.exists(path)]
    mounts = [{"hostPath": path, "containerPath": path} for path in programs + library_files()]
    mounts.append({"hostPath": KERNEL_SIDE[0], "containerPath": KERNEL_SIDE[1]})
    for mount in mounts:
        mount["options"] = ["ro", "nosuid", "nodev", "rbind", "rprivate"]
    links = []
    for soname in ("libcuda.so.1", "libnvidia-ml.so.1"):
        links += ["--link", "%s.%s::%s/%s" % (soname[:-2], version, LIBRARIES, soname)]
    links += ["--link", "libcuda.so.1::%s/libcuda.so" % LIBRARIES]
    hooks = [
        {
            "hookName": "createContainer",
            "path": "/usr/bin/nvidia-cdi-hook",
            "args": ["nvidia-cdi-hook", "create-symlinks", *links],
            "env": ["NVIDIA_CTK_DEBUG=false"],
        },
        {
            "hookName": "createContainer",
            "path": "/usr/bin/nvidia-cdi-hook",
            "args": ["nvidia-cdi-hook", "enable-cuda-compat", "--host-driver-version=" + version],
            "env": ["NVIDIA_CTK_DEBUG=false"],
        },
        {
            "hookName": "createContainer",
            "path": "/usr/bin/nvidia-cdi-hook",
            "args": ["nvidia-cdi-hook", "update-ldcache", "--folder", LIBRARIES],
            "env": ["NVIDIA_CTK_DEBUG=false"],
        },
    ]
    return {
        "env": ["NVIDIA_CTK_LIBCUDA_DIR=" + LIBRARIES, "NVIDIA_VISIBLE_DEVICES=void"],
        "deviceNodes": nodes,
        "hooks": hooks,
        "mounts": mounts,
    }


def specification():
    """The CDI specification of this host."""
    devices, nodes = [], []
    for index, gpu in enumerate(gpus()):
        node = node_of("/dev/nvidia" + gpu["minor"])
        nodes.append(node)
        devices.append({"name": str(index), "containerEdits": {"deviceNodes": [node]}})
        devices.append({"name": gpu["uuid"], "containerEdits": {"deviceNodes": [node]}})
    devices.sort(key=lambda one: (not one["name"].isdigit(), one["name"]))
    devices.append({"name": "all", "containerEdits": {"deviceNodes": nodes}})
    return {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices, "containerEdits": common_edits()}


def to_yaml(value, indent=0):
    pad = " " * indent
    if isinstance(value, dict):
        text = ""
        for key, inner in value.items():
            if isinstance(inner, (dict, list)):
                text += "%s%s:\n%s" % (pad, key, to_yaml(inner, indent + 4))
            else:
                text += "%s%s: %s\n" % (pad, key, scalar(inner))
        return text
    text = ""
    for inner in value:
        if isinstance(inner, dict):
            text += pad + "- " + to_yaml(inner, indent + 2)[indent + 2 :]
        else:
            text += "%s- %s\n" % (pad, scalar(inner))
    return text


def scalar(value):
    if isinstance(value, str) and (value.isdigit() or not value):
        return '"%s"' % value
    return str(value)


# -- configuration -----------------------------------------------------------------------------------------------------


def option(section, key, otherwise):
    """Value of an option of config.toml; comments are absent options."""
    current = ""
    for line in (read(CONFIG) or DEFAULT_CONFIG).splitlines():
        text = line.strip()
        if text.startswith("["):
            current = text.strip("[]")
        elif current == section and re.match(r"%s\s*=" % re.escape(key), text):
            return text.split("=", 1)[1].strip().strip('"')
    return otherwise


def set_option(text, path, value):
    section, _dot, key = path.rpartition(".")
    if value in ("true", "false"):
        rendered = value
    elif key in ("runtimes", "environment", "spec-dirs", "annotation-prefixes"):
        rendered = "[%s]" % ", ".join('"%s"' % one for one in re.split("[,:]", value))
    else:
        rendered = '"%s"' % value
    lines, current, start = text.splitlines(), "", 0 if not section else None
    for number, line in enumerate(lines):
        if line.strip().startswith("["):
            current = line.strip().strip("[]")
            if current == section:
                start = number + 1
        elif current == section and re.match(r"\s*#?\s*%s\s*=" % re.escape(key), line):
            lines[number] = "%s = %s" % (key, rendered)
            return "\n".join(lines) + "\n"
    if start is None:
        lines += ["", "[%s]" % section, "%s = %s" % (key, rendered)]
    else:
        lines.insert(start, "%s = %s" % (key, rendered))
    return "\n".join(lines) + "\n"


# -- nvidia-container-runtime ------------------------------------------------------------------------------------------


def low_level_runtime():
    for name in re.findall(r"[\w./-]+", option("nvidia-container-runtime", "runtimes", "runc")):
        for directory in os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").split(":"):
            if os.access(os.path.join(directory, name), os.X_OK):
                return os.path.join(directory, name)
    raise RefusedError("no runtime binary found from candidate list: [runc crun]")


def runtime(arguments):
    log = arguments[arguments.index("--log") + 1] if "--log" in arguments[:-1] else None
    try:
        below = low_level_runtime()
        if "create" in arguments:
            modify(bundle_of(arguments))
        elif "exec" in arguments and "--process" in arguments[:-1]:
            limit_process_file(arguments[arguments.index("--process") + 1])
    except RefusedError as error:
        if log:
            with open(log, "a", encoding="utf-8") as out:
                out.write(json.dumps({"level": "error", "msg": str(error), "time": "2026-01-01T00:00:00Z"}) + "\n")
        print(error, file=sys.stderr)
        return 1
    os.execv(below, [below, *arguments])  # noqa: S606 (a program, no shell)


def bundle_of(arguments):
    for index, word in enumerate(arguments):
        if word in ("--bundle", "-b"):
            return arguments[index + 1]
        if word.startswith("--bundle="):
            return word.split("=", 1)[1]
    return "."


def environment_of(spec):
    return dict(one.split("=", 1) for one in spec.get("process", {}).get("env", []) if "=" in one)


def grant_what_can_be(process):
    """The sandbox's hosts may lack the capability that lets the Docker of a real host raise limits."""
    for limit in process.get("rlimits") or []:
        hard = resource.getrlimit(getattr(resource, limit["type"]))[1]
        if hard != resource.RLIM_INFINITY:
            limit["hard"], limit["soft"] = min(limit["hard"], hard), min(limit["soft"], hard)


def limit_process_file(path):
    with open(path, encoding="utf-8") as source:
        process = json.load(source)
    grant_what_can_be(process)
    with open(path, "w", encoding="utf-8") as out:
        json.dump(process, out)


def modify(bundle):
    path = os.path.join(bundle, "config.json")
    with open(path, encoding="utf-8") as source:
        spec = json.load(source)
    request = environment_of(spec).get("NVIDIA_VISIBLE_DEVICES", "")
    if request in ("", "void"):
        return
    qualified = [name for name in request.split(",") if "=" in name]
    grant_what_can_be(spec.get("process", {}))
    mode = option("nvidia-container-runtime", "mode", "auto")
    if mode == "auto":
        mode = "cdi" if qualified else AUTO_MODE
    if mode == "legacy":
        hook = {"path": "/usr/bin/nvidia-container-runtime-hook", "args": ["nvidia-container-runtime-hook", "prestart"]}
        existing = spec.setdefault("hooks", {}).setdefault("prestart", [])
        if not any(os.path.basename(one["path"]) == "nvidia-container-runtime-hook" for one in existing):
            existing.insert(0, hook)
    elif mode in ("jit-cdi", "csv"):
        try:
            chosen = select(",".join(name.split("=")[-1] for name in request.split(",")))
            edits = common_edits()
        except RefusedError as error:
            raise RefusedError(
                "could not apply required modification to OCI specification: error modifying OCI spec: failed to create the "
                'automatic CDI modifier: failed to generate CDI spec for mode "auto": failed to construct device spec '
                "generators: %s" % error
            ) from None
        edits["deviceNodes"] = [node_of("/dev/nvidia" + gpu["minor"]) for gpu in chosen] + edits["deviceNodes"]
        apply(spec, edits)
    elif mode == "cdi":
        names = [name if "=" in name else "nvidia.com/gpu=" + name for name in request.split(",")]
        apply(spec, edits_from_files(names))
    else:
        raise RefusedError(
            "could not apply required modification to OCI specification: invalid runtime mode: %r" % mode
        )
    with open(path, "w", encoding="utf-8") as out:
        json.dump(spec, out)


def specification_files():
    """(path, text) of the specifications, those that win last."""
    found = []
    for directory in SPEC_DIRS:
        for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else []:
            if name.endswith((".yaml", ".json")):
                found.append(("%s/%s" % (directory, name), read("%s/%s" % (directory, name)) or ""))
    return found


def device_blocks(text):
    """{device name: its part of the text} of a specification."""
    head = re.split(r"^containerEdits:", text, flags=re.MULTILINE)[0]
    pieces = re.split(r"^\s*- name:\s*", head, flags=re.MULTILINE)[1:]
    return {piece.splitlines()[0].strip().strip("\"'"): piece for piece in pieces}


def edits_from_files(names):
    edits = {"env": [], "deviceNodes": [], "hooks": [], "mounts": []}
    shared = None
    missing = []
    for name in names:
        block = None
        for _path, text in specification_files():
            kind = re.search(r"^kind:\s*(\S+)", text, re.MULTILINE)
            if kind and name.startswith(kind.group(1) + "="):
                block = device_blocks(text).get(name.split("=", 1)[1], block)
                shared = text if block is not None else shared
        if block is None:
            missing.append(name)
            continue
        edits["deviceNodes"] += [node_of(path) for path in re.findall(r"- path:\s*(/dev/\S+)", block)]
    if missing:
        raise RefusedError(
            "could not apply required modification to OCI specification: error modifying OCI spec: failed to inject devices: "
            "unresolvable CDI devices %s" % ", ".join(missing)
        )
    tail = re.split(r"^containerEdits:", shared, flags=re.MULTILINE)[1]
    edits["deviceNodes"] += [node_of(path) for path in re.findall(r"- path:\s*(/dev/\S+)", tail)]
    options = ["ro", "nosuid", "nodev", "rbind", "rprivate"]
    for host, container in re.findall(r"hostPath:\s*(\S+)\s+containerPath:\s*(\S+)", tail):
        edits["mounts"].append({"hostPath": host, "containerPath": container, "options": options})
    edits["env"] = ["NVIDIA_VISIBLE_DEVICES=void"]
    return edits


def apply(spec, edits):
    environment = spec["process"].setdefault("env", [])
    for one in edits["env"]:
        environment[:] = [other for other in environment if other.split("=")[0] != one.split("=")[0]] + [one]
    linux = spec.setdefault("linux", {})
    devices = linux.setdefault("devices", [])
    rules = linux.setdefault("resources", {}).setdefault("devices", [])
    for node in edits["deviceNodes"]:
        if not any(one["path"] == node["path"] for one in devices):
            devices.append(
                {
                    "path": node["path"],
                    "type": "c",
                    "major": node["major"],
                    "minor": node["minor"],
                    "fileMode": 0o666,
                    "uid": 0,
                    "gid": 0,
                }
            )
            rules.append({"allow": True, "type": "c", "major": node["major"], "minor": node["minor"], "access": "rwm"})
    for mount in edits["mounts"]:
        spec.setdefault("mounts", []).append(
            {
                "destination": mount["containerPath"],
                "source": mount["hostPath"],
                "type": "bind",
                "options": mount["options"],
            }
        )
    for hook in edits["hooks"]:
        spec.setdefault("hooks", {}).setdefault(hook["hookName"], []).append(
            {key: hook[key] for key in ("path", "args", "env")}
        )


# -- what an image asks of the driver ----------------------------------------------------------------------------------


def unsatisfied(environment, chosen):
    """The first alternative of a NVIDIA_REQUIRE_* variable of which none holds for a GPU (libnvidia-container, dsl.c).

    Asked in the old way only: nothing evaluates these variables when GPUs are given by CDI.
    """
    if environment.get("NVIDIA_DISABLE_REQUIRE", "").lower() in ("1", "t", "true"):
        return ""
    program = "/usr/bin/nvidia-smi"
    asked = [program, "--version"] if os.path.exists(program) else ["true"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    cuda = re.search(r"^CUDA Version\s*: ([\d.]+)", told, re.MULTILINE)
    facts = {"driver": library_version(), "cuda": cuda.group(1) if cuda else ""}
    for name, wanted in sorted(environment.items()):
        alternatives = wanted.split() if name.startswith("NVIDIA_REQUIRE_") else []
        for gpu in chosen:
            known = ("quadro", "tesla", "nvs", "grid", "geforce", "titan")
            brand = gpu.get("brand", "").lower()
            facts["brand"] = brand if brand in known else "unknown"
            if alternatives and not any(all(holds(term, facts) for term in one.split(",")) for one in alternatives):
                return alternatives[0]
    return ""


def holds(term, facts):
    name, operator, value = re.match(r"(\w+)([<>!=]+)(.*)", term).groups()
    if not facts.get(name):
        return True
    if name == "brand":
        return (facts[name] == value.lower()) is (operator == "=")
    have, wanted = ([int(part) for part in text.split(".")] for text in (facts[name], value))
    while have[-1:] == [0]:
        have.pop()
    while wanted[-1:] == [0]:
        wanted.pop()
    return {
        "=": have == wanted,
        "!=": have != wanted,
        "<": have < wanted,
        "<=": have <= wanted,
        ">": have > wanted,
        ">=": have >= wanted,
    }[operator]


# -- the hooks ---------------------------------------------------------------------------------------------------------


def root_of(state):
    with open(os.path.join(state["bundle"], "config.json"), encoding="utf-8") as source:
        spec = json.load(source)
    return os.path.join(state["bundle"], spec["root"]["path"]), spec


def prestart(arguments):
    """The old way: after the container's file system was made, from outside, without the low-level runtime's knowledge."""
    if arguments[:1] != ["prestart"]:
        return 0
    state = json.load(sys.stdin)
    root, spec = root_of(state)
    request = environment_of(spec).get("NVIDIA_VISIBLE_DEVICES", "")
    if request in ("", "void"):
        return 0
    try:
        chosen, edits = select(request), common_edits()
    except RefusedError as error:
        text = str(error)
        print("Auto-detected mode as 'legacy'", file=sys.stderr)
        if "device handle" in text:
            print("nvidia-container-cli: device error: %s: unknown device" % request, file=sys.stderr)
        elif "Not Loaded" in text:
            print("nvidia-container-cli: initialization error: nvml error: driver not loaded", file=sys.stderr)
        elif "mismatch" in text:
            print(
                "nvidia-container-cli: initialization error: nvml error: driver/library version mismatch",
                file=sys.stderr,
            )
        else:
            print(
                "nvidia-container-cli: initialization error: load library failed: libnvidia-ml.so.1: cannot open shared object file: no such file or directory",
                file=sys.stderr,
            )
        return 1
    condition = unsatisfied(environment_of(spec), chosen)
    if condition:
        print(
            "nvidia-container-cli: requirement error: unsatisfied condition: %s, please update your driver to a newer"
            " version, or use an earlier cuda container" % condition,
            file=sys.stderr,
        )
        return 1
    script = "set -e\n"
    for node in edits["deviceNodes"] + [node_of("/dev/nvidia" + gpu["minor"]) for gpu in chosen]:
        script += "[ -e {0}{1} ] || mknod -m 666 {0}{1} c {2} {3}\n".format(
            root, node["path"], node["major"], node["minor"]
        )
    for mount in edits["mounts"]:
        target = root + mount["containerPath"]
        make = (
            "mkdir -p %s" % target
            if os.path.isdir(mount["hostPath"])
            else "mkdir -p %s; [ -e %s ] || : > %s" % (os.path.dirname(target), target, target)
        )
        script += "%s\nmount --rbind %s %s\n" % (make, mount["hostPath"], target)
    for word in edits["hooks"][0]["args"]:
        if "::" in word:
            target, _colons, link = word.partition("::")
            script += "ln -sf %s %s%s\n" % (target, root, link)
    done = subprocess.run(
        ["nsenter", "-t", str(state["pid"]), "-m", "--", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print("nvidia-container-cli: mount error: " + done.stderr.strip(), file=sys.stderr)
        return 1
    return 0


def cdi_hook(arguments):
    """Of the hooks only create-symlinks does something; no program here needs the others."""
    if arguments[:1] != ["create-symlinks"]:
        return 0
    root, _spec = root_of(json.load(sys.stdin))
    for word in arguments:
        if "::" in word:
            target, _colons, link = word.partition("::")
            path = root + link
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not os.path.lexists(path):
                os.symlink(target, path)
    return 0


# -- nvidia-ctk and nvidia-container-cli -------------------------------------------------------------------------------


def flags_of(arguments):
    """{flag: value}; a flag without a value is true."""
    found, index = {}, 0
    while index < len(arguments):
        word = arguments[index]
        if word.startswith("-"):
            name, equals, value = word.lstrip("-").partition("=")
            if not equals and index + 1 < len(arguments) and not arguments[index + 1].startswith("-"):
                index += 1
                value = arguments[index]
            found.setdefault(name, []).append(value)
        index += 1
    return {key: values[-1] if key != "set" else values for key, values in found.items()}


def write_file(path, text):
    directory = os.path.dirname(path)
    if directory:
        os.makedirs(directory, exist_ok=True)
    with open(path, "w", encoding="utf-8") as out:
        out.write(text)


def ctk(arguments):
    words = [one for one in arguments if not one.startswith("-")]
    flags = flags_of(arguments)
    if "version" in flags or "v" in flags:
        print("NVIDIA Container Toolkit CLI version %s\ncommit: stand-in" % VERSION)
        return 0
    if words[:1] == ["config"]:
        text = read(CONFIG) or DEFAULT_CONFIG
        for setting in flags.get("set", []):
            key, _equals, value = setting.partition("=")
            text = set_option(text, key, value)
        target = flags.get("output") or (CONFIG if "in-place" in flags else flags.get("o"))
        if target:
            write_file(target, text)
        else:
            print(text, end="")
        return 0
    if words[:2] == ["cdi", "generate"]:
        try:
            spec = specification()
        except RefusedError as error:
            raise RefusedError("failed to generate CDI spec: failed to create device CDI specs: %s" % error) from None
        text = json.dumps(spec) if flags.get("format") == "json" else "---\n" + to_yaml(spec)
        target = flags.get("output") or os.environ.get("NVIDIA_CTK_CDI_OUTPUT_FILE_PATH")
        if target:
            write_file(target, text)
            os.chmod(target, 0o644)
            log("Generated CDI spec with version %s" % spec["cdiVersion"])
        else:
            print(text, end="")
        return 0
    if words[:2] == ["cdi", "list"]:
        names = set()
        for _path, text in specification_files():
            kind = re.search(r"^kind:\s*(\S+)", text, re.MULTILINE)
            names |= {"%s=%s" % (kind.group(1), name) for name in device_blocks(text)} if kind else set()
        log("Found %d CDI devices" % len(names))
        for name in sorted(names):
            print(name)
        return 0
    if words[:2] == ["runtime", "configure"]:
        return configure(flags)
    if words[:2] == ["system", "create-device-nodes"]:
        if "load-kernel-modules" in flags:
            for module in ("nvidia", "nvidia-uvm", "nvidia-modeset"):
                subprocess.run(["modprobe", module], check=False, capture_output=True)
        return 0
    if words[:2] == ["system", "create-dev-char-symlinks"]:
        return 0
    raise RefusedError("No help topic for '%s'" % " ".join(words))


def configure(flags):
    """As the real one up to 1.20.0: turning CDI on loses every other feature."""
    if flags.get("runtime", "docker") != "docker":
        raise RefusedError("unrecognized runtime '%s'" % flags["runtime"])
    path = flags.get("config") or "/etc/docker/daemon.json"
    text = read(path)
    try:
        config = {} if text is None else json.loads(text)
    except ValueError:
        raise RefusedError(
            "unable to load config for runtime docker: unable to load config file: "
            + ("EOF" if not text.strip() else "invalid character")
        ) from None
    name = flags.get("nvidia-runtime-name") or "nvidia"
    program = flags.get("nvidia-runtime-path") or flags.get("runtime-path") or "nvidia-container-runtime"
    config.setdefault("runtimes", {})[name] = {"args": [], "path": program}
    if "nvidia-set-as-default" in flags or "set-as-default" in flags:
        config["default-runtime"] = name
    if {"cdi.enabled", "cdi.enable", "enable-cdi"} & set(flags):
        config["features"] = {"cdi": True}
    rendered = json.dumps(config, indent=4, sort_keys=True)
    if "dry-run" in flags:
        print(rendered)
        return 0
    write_file(path, rendered)
    log("Loading config from " + path)
    log("Wrote updated config to " + path)
    log("It is recommended that docker daemon be restarted.")
    return 0


def log(text):
    print('time="2026-01-01T00:00:00Z" level=info msg="%s"' % text, file=sys.stderr)


def cli(arguments):
    if set(arguments) & {"-V", "--version"}:
        print("cli-version: %s\nlib-version: %s" % (VERSION, VERSION))
        return 0
    if "info" in arguments:
        try:
            there = gpus()
        except RefusedError as error:
            raise RefusedError(
                "nvidia-container-cli: initialization error: nvml error: " + str(error).rsplit(": ", 1)[1].lower()
            ) from None
        print("NVRM version:   %s\n" % library_version())
        for index, gpu in enumerate(there):
            print(
                "Device Index:   %d\nDevice Minor:   %s\nModel:          %s\nBrand:          %s\nGPU UUID:       %s\n"
                % (index, gpu["minor"], gpu["name"], gpu["brand"], gpu["uuid"])
            )
    return 0


def main():
    program = os.path.basename(sys.argv[0])
    programs = {
        "nvidia-container-runtime": runtime,
        "nvidia-container-runtime.cdi": runtime,
        "nvidia-container-runtime.legacy": runtime,
        "nvidia-container-runtime-hook": prestart,
        "nvidia-container-toolkit": prestart,
        "nvidia-cdi-hook": cdi_hook,
        "nvidia-ctk": ctk,
        "nvidia-container-cli": cli,
    }
    try:
        return programs[program](sys.argv[1:])
    except RefusedError as error:
        print('time="2026-01-01T00:00:00Z" level=error msg="%s"' % error, file=sys.stderr)
        return 1


sys.exit(main())
