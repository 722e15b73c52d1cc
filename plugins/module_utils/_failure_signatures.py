# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Texts by which NIM, its engines, the container runtime and the registry say what went wrong.

The texts are those that the projects print themselves or that their issue trackers quote; ``marginal`` says that one
was only reported by third parties or is general knowledge. An exit code alone never decides: NIM 1.x ends with 0 when
its key is refused.

One known failure has no entry: nim-20, the checksum warnings of NIM 1.3 that the release notes call harmless. Their text
is not recorded, and in every other version such a warning means a damaged file, so no pattern may silence it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """One text and what it means.

    Attributes:
        id: Stable identifier.
        pattern: Regular expression for ``re.search`` over the text of a log.
        where: Who prints it: container, docker, host or registry.
        cause: Why, as a clause.
        remedy: What to do, as a clause in the imperative.
        harmless: It looks like an error and is none.
        umbrella: A consequence of something else: counts only when nothing else matches.
        passing: A start may survive it: it explains an end, but does not foretell one.
        marginal: Not read in the project's own source.
    """

    id: str
    pattern: str
    where: str
    cause: str
    remedy: str
    harmless: bool = False
    umbrella: bool = False
    passing: bool = False
    marginal: bool = False


SIGNATURES: tuple[Signature, ...] = (
    Signature(
        "eng-34a",
        r"No space left on device.*/dev/shm|/dev/shm.*No space left on device",
        "container",
        "shared memory is too small",
        "raise shm_size",
        marginal=True,
    ),
    Signature(
        "nim-01",
        r"Detected 0 compatible profile\(s\)",
        "container",
        "no model profile of this image fits the GPUs of the host",
        "use a GPU the model supports, or name a profile that fits with profile",
        umbrella=True,
        passing=True,
    ),
    Signature(
        "nim-02",
        r"Detected additional \S+ compatible profile\(s\) that are currently not runnable due to low free GPU memory",
        "container",
        "the GPU is busy: profiles exist, but too little GPU memory is free",
        "stop what else uses the GPU (another NIM, a leftover container), choose a smaller profile, or set NIM_RELAX_MEM_CONSTRAINTS in environment",
        passing=True,
    ),
    Signature(
        "nim-03",
        r"Could not find a profile that is currently runnable with the detected hardware",
        "container",
        "no model profile can run on the GPUs as they are",
        "free the GPU memory, give the model more or other GPUs, or choose another profile",
        umbrella=True,
    ),
    Signature(
        "nim-04",
        r"Could not match a profile in manifest",
        "container",
        "the profile selector matches no profile of the image",
        "correct NIM_TAGS_SELECTOR, or set profile",
    ),
    Signature(
        "nim-05",
        r"NIM_MODEL_PROFILE is set to .*but no matching profile_id or profile description is found in manifest",
        "container",
        "the wanted profile is not in this image",
        "set profile to a 64-digit id or an exact description out of this image's own list",
        marginal=True,
    ),
    Signature(
        "nim-06",
        r"ManifestDownloadError: Error downloading manifest: I/O error Permission denied \(os error 13\)",
        "container",
        "the cache directory cannot be written by the container's user",
        "give cache_directory on the host to the uid in user",
    ),
    Signature(
        "nim-07a",
        r"Error downloading models, ignoring and continuing startup",
        "container",
        "the download of the model broke off",
        "look at the lines before it; a restart resumes the download",
        umbrella=True,
        passing=True,
    ),
    Signature(
        "nim-07b",
        r"Download failed after \S+ attempts\. Last exception:",
        "container",
        "the download of the model broke off",
        "look at the lines after it; a restart resumes the download",
        umbrella=True,
        passing=True,
    ),
    Signature(
        "nim-08",
        r"(?s)ManifestDownloadError.*Authentication Error",
        "container",
        "the NGC key in the container is missing or refused",
        "set a valid ngc_api_key; a login of Docker alone is not enough for the model files",
    ),
    Signature(
        "nim-09",
        r"error sending request for url \(https://api\.ngc\.nvidia\.com/",
        "container",
        "the container cannot reach api.ngc.nvidia.com",
        "check DNS, egress and proxy (HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE in environment)",
        passing=True,
    ),
    Signature(
        "nim-10",
        r"One or more errors fetching files:",
        "container",
        "some files of the model could not be downloaded",
        "start it again: the download resumes",
        umbrella=True,
        passing=True,
    ),
    Signature(
        "nim-11",
        r"the repo file list has not been validated",
        "container",
        "the model cache is damaged or cannot be read",
        "check the file system and owner of cache_directory, then start again",
    ),
    Signature(
        "nim-12",
        r"error decoding response body",
        "container",
        "a download was cut off",
        "start it again: the download resumes",
        passing=True,
    ),
    Signature(
        "nim-13",
        r"cache is read-only, application may fail if model is not already present in cache",
        "container",
        "the cache is mounted read-only and lacks files",
        "fill the cache first, or make cache_directory writable",
        umbrella=True,
        marginal=True,
        passing=True,
    ),
    Signature(
        "nim-14",
        r"Unsupported value \('.*?'\) of NIM_LOG_LEVEL",
        "container",
        "NIM_LOG_LEVEL has a value NIM does not know",
        "use DEFAULT, TRACE, DEBUG, INFO, WARNING, ERROR or CRITICAL",
    ),
    Signature(
        "nim-15a",
        r"Too many open files",
        "container",
        "the limit of open files is too low",
        "set ulimits nofile to 65536 or more",
        passing=True,
    ),
    Signature(
        "nim-15b",
        r"\(os error 24\)",
        "container",
        "the limit of open files is too low",
        "set ulimits nofile to 65536 or more",
        passing=True,
    ),
    Signature(
        "nim-16a",
        r"No space left on device",
        "container",
        "the disk is full",
        "free space on the file systems of cache_directory and of Docker, or move them",
    ),
    Signature(
        "nim-16b",
        # Programs in Go begin it with a small letter.
        r"[Nn]o space left on device",
        "docker",
        "the disk is full",
        "free space on the file systems of cache_directory and of Docker, or move them",
    ),
    Signature(
        "nim-16c",
        r"\(os error 28\)",
        "container",
        "the disk is full",
        "free space on the file systems of cache_directory and of Docker, or move them",
        marginal=True,
    ),
    Signature(
        "nim-17",
        r"received SIGTERM, attempting graceful shutdown\.\.\.",
        "container",
        "something stopped the container before it was ready",
        "give it a longer start_timeout, and find who stopped it",
        umbrella=True,
        passing=True,
    ),
    Signature(
        "nim-18a",
        r"Captured NIM_LLM_PID: 0\b",
        "container",
        "the container was stopped before its engine existed",
        "give it a longer start_timeout, and find who stopped it",
        umbrella=True,
        passing=True,
    ),
    Signature(
        "nim-18b",
        r"has no NIM_LLM process to terminate",
        "container",
        "the container was stopped before its engine existed",
        "give it a longer start_timeout, and find who stopped it",
        umbrella=True,
        passing=True,
    ),
    Signature(
        "nim-19",
        r"supports LoRA, but LoRA is disabled\. Skipping profile\.",
        "container",
        "harmless",
        "nothing to do",
        harmless=True,
    ),
    Signature(
        "eng-21a",
        r"torch\.OutOfMemoryError: CUDA out of memory",
        "container",
        "the model does not fit into GPU memory",
        "shorten max_model_length, choose a smaller profile (fp8), or give it more GPUs",
    ),
    Signature(
        "eng-21b",
        r"torch\.cuda\.OutOfMemoryError",
        "container",
        "the model does not fit into GPU memory",
        "shorten max_model_length, choose a smaller profile (fp8), or give it more GPUs",
    ),
    Signature(
        "eng-22",
        r"No available memory for the cache blocks\. Try increasing `?gpu_memory_utilization`? when initializing the engine",
        "container",
        "the share of GPU memory is too small for the model",
        "raise NIM_KVCACHE_PERCENT, or shorten max_model_length",
    ),
    Signature(
        "eng-23",
        r"Free memory on device \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less than desired "
        r"GPU memory utilization \((?P<share>[\d.]+), (?P<wanted>[\d.]+) GiB\)",
        "container",
        "another process holds memory of the same GPU",
        "stop that process, or lower NIM_KVCACHE_PERCENT",
    ),
    Signature(
        "eng-24",
        r"model's max seq len \(.+?\) is larger than the maximum number of tokens that can be stored in KV cache",
        "container",
        "the context is too long for the memory that is left",
        "set a smaller max_model_length",
    ),
    Signature(
        "eng-25",
        r"Engine core initialization failed",
        "container",
        "the engine did not start",
        "the lines before it say why",
        umbrella=True,
    ),
    Signature(
        "eng-26",
        r"EngineDeadError",
        "container",
        "the engine died while the container went on",
        "restart the service; if it happens again, look at the lines before it",
    ),
    Signature(
        "eng-27a",
        r"Error Code 2: OutOfMemory",
        "container",
        "building the engine ran out of memory",
        "set NIM_LOW_MEMORY_MODE=1 in environment, use a prebuilt profile, or a host with more memory",
        marginal=True,
        passing=True,
    ),
    Signature(
        "eng-27b",
        r"Engine building failed, please check the error log\.",
        "container",
        "building the engine ran out of memory",
        "set NIM_LOW_MEMORY_MODE=1 in environment, use a prebuilt profile, or a host with more memory",
    ),
    Signature(
        "eng-28a",
        r"(?m)^\s*Killed\s*$",
        "container",
        "the host ran out of memory and the kernel killed the container",
        "give the host more memory or swap, or run fewer models; the kernel log has the details",
        umbrella=True,
    ),
    Signature(
        "eng-28b",
        r'"?OOMKilled"?:\s*true',
        "docker",
        "the host ran out of memory and the kernel killed the container",
        "give the host more memory or swap, or run fewer models; the kernel log has the details",
    ),
    Signature(
        "eng-29",
        r"CUDA error: no kernel image is available for execution on the device",
        "container",
        "the image has no code for this GPU",
        "use a GPU the image supports, or a newer image",
        marginal=True,
    ),
    Signature(
        "eng-30a",
        r"Unknown RoPE scaling type",
        "container",
        "the image is too old for the configuration of the model",
        "use a newer tag of the image",
    ),
    Signature(
        "eng-30b",
        r"`?rope_scaling`? must be a dictionary with\b.*two fields",
        "container",
        "the image is too old for the configuration of the model",
        "use a newer tag of the image",
    ),
    Signature(
        "eng-31",
        r"max_num_batched_tokens must be <= \d+ when LoRA is enabled",
        "container",
        "the context is too long for LoRA with this engine",
        "set max_model_length to 65525 or less",
    ),
    Signature(
        "eng-32",
        r"As of transformers v4\.44, default chat template is no longer allowed",
        "container",
        "the model has no chat template",
        "use /v1/completions, or a chat model",
        passing=True,
    ),
    Signature(
        "eng-33a",
        r"NCCL error",
        "container",
        "communication between GPUs failed",
        "raise shm_size; set NCCL_DEBUG=INFO in environment to see more",
        umbrella=True,
    ),
    Signature(
        "eng-33b",
        r"unhandled cuda error",
        "container",
        "communication between GPUs failed",
        "raise shm_size; set NCCL_DEBUG=INFO in environment to see more",
    ),
    Signature(
        "eng-33c",
        r"unhandled system error",
        "container",
        "communication between GPUs failed",
        "raise shm_size; set NCCL_DEBUG=INFO in environment to see more",
    ),
    Signature(
        "eng-34b",
        r"Bus error",
        "container",
        "shared memory is too small",
        "raise shm_size",
        marginal=True,
    ),
    Signature(
        "eng-35",
        r"(?i)\bNVLS\b.*\b(?:fail|error)|\b(?:fail|error)\w*\b.*\bNVLS\b",
        "container",
        "NVLink SHARP (NVLS) cannot be used",
        "set NCCL_NVLS_ENABLE=0 in environment, and check the Fabric Manager",
        passing=True,
        marginal=True,
    ),
    Signature(
        "eng-36",
        r"gpu_p2p_access_cache",
        "container",
        "the cache lacks a file that NIM 1.1 wants to write",
        "make cache_directory writable, or use a newer tag",
        umbrella=True,
        passing=True,
    ),
    Signature(
        "host-40",
        r'could not select device driver "" with capabilities: \[\[gpu\]\]',
        "docker",
        "Docker knows no GPU driver",
        "install and register the container toolkit (role nvidia_container_toolkit)",
    ),
    Signature(
        "host-40b",
        r'could not select device driver "cdi"',
        "docker",
        "Docker's CDI feature is off",
        "switch it on (nvidia_container_toolkit_cdi), or set nim_gpu_injection to runtime",
    ),
    Signature(
        "host-41",
        r"unknown or invalid runtime name: nvidia",
        "docker",
        "Docker does not know the runtime nvidia",
        "register it (role nvidia_container_toolkit)",
    ),
    Signature(
        "host-42a",
        r"requirement error: unsatisfied condition: (?P<condition>[^,]+), please update your driver to a newer version, or use an earlier cuda container",
        "docker",
        "the driver is too old for the image",
        "install a newer driver branch (nvidia_driver_branch), or use an older tag",
    ),
    Signature(
        "host-42b",
        r"unsatisfied condition: cuda>=(?P<wanted>[\d.]+) \(cuda=(?P<have>[\d.]+)\)",
        "docker",
        "the driver is too old for the image",
        "install a newer driver branch (nvidia_driver_branch), or use an older tag",
    ),
    Signature(
        "host-43",
        r"nvidia-container-cli: initialization error: load library failed: libnvidia-ml\.so\.1"
        r"|failed to initialize NVML: (?:ERROR_LIBRARY_NOT_FOUND|could not load NVML library)",
        "docker",
        "the driver's user-space libraries are missing",
        "install the driver (role nvidia_driver)",
    ),
    Signature(
        "host-44",
        r"nvidia-container-cli: initialization error: nvml error: driver not loaded"
        r"|failed to initialize NVML: Driver Not Loaded",
        "docker",
        "the driver is not loaded",
        "load it or reboot; with Secure Boot, enrol its signing key first",
        marginal=True,
    ),
    Signature(
        "host-45a",
        r"nvml error: driver/library version mismatch",
        "docker",
        "driver and user space are of different versions",
        "reload the driver (role nvidia_driver) or reboot",
        marginal=True,
    ),
    Signature(
        "host-45b",
        r"[Ff]ailed to initialize NVML: Driver/library version mismatch",
        "host",
        "driver and user space are of different versions",
        "reload the driver (role nvidia_driver) or reboot",
        marginal=True,
    ),
    Signature(
        "host-46",
        r"nvidia-container-cli: device error: (?P<device>\S+): unknown device",
        "docker",
        "a GPU that was asked for does not exist",
        "correct gpus",
    ),
    Signature(
        "host-47",
        r"CDI device injection failed: .*unresolvable CDI devices (?P<devices>nvidia\.com/gpu=.*)",
        "docker",
        "the CDI specification lacks the wanted GPU",
        "regenerate it: systemctl restart nvidia-cdi-refresh",
    ),
    Signature(
        "host-48",
        r"Failed to initialize NVML: Unknown Error",
        "container",
        "the container has lost its GPUs, for example by a daemon-reload of systemd",
        "restart the service; the injection mode runtime with jit-cdi does not lose them",
    ),
    Signature(
        "host-49",
        r"WARNING: The NVIDIA Driver was not detected\.",
        "container",
        "the container was started without a GPU",
        "set gpus, and check the role nvidia_container_toolkit",
        passing=True,
    ),
    Signature(
        "host-50a",
        r"System not yet initialized \(error 802\)",
        "container",
        "CUDA cannot be initialised; on machines with NVSwitch the Fabric Manager is absent, stopped or of another version",
        "start the Fabric Manager of exactly the driver's version",
    ),
    Signature(
        "host-50b",
        # The banner for every reason; the one for error 802 is host-50a.
        r"ERROR: The NVIDIA Driver is present, but CUDA failed to initialize\.",
        "container",
        "CUDA cannot be initialised in the container",
        "look at the line after it in the container's log, which names the reason in [[ ]]",
        umbrella=True,
    ),
    Signature(
        "host-50c",
        r"Error 802: system not yet initialized",
        "container",
        "CUDA cannot be initialised; on machines with NVSwitch the Fabric Manager is absent, stopped or of another version",
        "start the Fabric Manager of exactly the driver's version",
    ),
    Signature(
        "host-51",
        r"Error 803: system has unsupported display driver / cuda driver combination",
        "container",
        "CUDA user space and driver do not go together",
        "remove compat libraries from the environment, or install the matching driver",
        marginal=True,
    ),
    Signature(
        "host-52",
        r"NVRM: Xid \(PCI:(?P<pci>[0-9a-f:.]+)(?: GPU-I:\d+)?(?: GPU-CI:\d+)?\): (?P<xid>\d+),",
        "host",
        "the GPU or its driver reported a fault (Xid)",
        "look the number up in the kernel log; 48, 63, 64, 79, 94, 95 mean hardware",
        marginal=True,
        passing=True,
    ),
    Signature(
        "host-53a",
        r"Bind for (?P<address>\S+) failed: port is already allocated",
        "docker",
        "the port is in use",
        "choose another port, or stop what holds it",
    ),
    Signature(
        "host-53b",
        r"address already in use",
        "docker",
        "the port is in use",
        "choose another port, or stop what holds it",
    ),
    Signature(
        "host-54",
        r'Conflict\. The container name "(?P<name>[^"]+)" is already in use',
        "docker",
        "a container of that name is left over",
        "remove it: docker rm",
    ),
    Signature(
        "host-55",
        r"failed to register layer: .*no space left on device",
        "docker",
        "Docker's disk is full",
        "free space there (docker system prune), or move the images: Docker's data-root, or the root of containerd",
    ),
    Signature(
        "host-56",
        r"permission denied while trying to connect to the Docker daemon socket",
        "docker",
        "the user may not use Docker",
        "run it as root, or add the user to docker_users",
    ),
    Signature(
        "host-57",
        r"error from registry: Incorrect Repository Format",
        "docker",
        "this version of Docker Engine cannot pull from nvcr.io",
        "use Docker Engine older than 29.5, or switch containerd-snapshotter off",
    ),
    Signature(
        "host-58a",
        r"exec format error",
        "container",
        "the image is of another processor architecture",
        "use a tag for this architecture",
    ),
    Signature(
        "host-58b",
        r"no matching manifest for \S+.* in the manifest list entries",
        "docker",
        "the image is of another processor architecture",
        "use a tag for this architecture",
    ),
    Signature(
        "host-59",
        r"nvidia-container-cli: mount error: failed to add device rules",
        "docker",
        "the container toolkit is too old for this kernel",
        "update the container toolkit",
        marginal=True,
    ),
    Signature(
        "reg-60",
        r"unauthorized: authentication required",
        "registry",
        "the registry wants a login",
        "set ngc_api_key, or use a public image",
        umbrella=True,
    ),
    Signature(
        "reg-61",
        r"failed to authorize: failed to fetch oauth token: unexpected status from GET request to \S*/proxy_auth\S*: 403 Forbidden",
        "registry",
        "the key may not pull this image",
        "give the key the NGC Catalog service, accept the terms of the image, and use the right organisation",
    ),
    Signature(
        "reg-62a",
        r"failed to authorize: failed to fetch oauth token: unexpected status from GET request to \S*/proxy_auth\S*: 401 Unauthorized",
        "registry",
        "the key is bad or expired, or the repository does not exist",
        "check the key against a repository that is known to exist",
    ),
    Signature(
        "reg-62b",
        r"failed to fetch anonymous token: unexpected status: 401 Unauthorized",
        "registry",
        "the key is bad or expired, or the repository does not exist",
        "check the key against a repository that is known to exist",
    ),
    Signature(
        "reg-63",
        r'denied: \{"errors": ?\[\{"code": ?"DENIED", ?"message": ?"Access Denied"\}\]\}',
        "registry",
        "access to the image is denied",
        "check the entitlement of the key",
    ),
    Signature(
        "reg-64",
        r"402 Payment Required",
        "registry",
        "the image needs an NVIDIA AI Enterprise entitlement",
        "get a licence or a trial for the organisation of the key",
    ),
    Signature(
        "reg-65",
        # The status is recorded, its text is not: these are the words that Docker's HTTP library puts to it.
        r"451 Unavailable For Legal Reasons",
        "registry",
        "the registry may not hand out the image here for legal reasons",
        "use another model or registry",
        marginal=True,
    ),
    Signature(
        "reg-66",
        r"manifest unknown",
        "registry",
        "the tag does not exist",
        "name a tag that exists; many repositories have no latest",
    ),
    Signature(
        "reg-67",
        r"pull access denied for (?P<repo>\S+), repository does not exist or may require 'docker login'",
        "registry",
        "the repository does not exist or needs a login",
        "check the name, and set ngc_api_key",
        umbrella=True,
    ),
    Signature(
        "reg-68",
        r"toomanyrequests",
        "registry",
        "the registry limits the rate of pulls",
        "wait, or use a mirror (nim_registry_mirrors)",
    ),
    Signature(
        "reg-69",
        r"Invalid API key\.",
        "registry",
        "the NGC key is not valid",
        "set a new ngc_api_key",
    ),
    Signature(
        "reg-70",
        r"x509: certificate signed by unknown authority",
        "registry",
        "the certificate is signed by an authority the host does not know",
        "install the authority on the host, and set SSL_CERT_FILE in environment",
        marginal=True,
    ),
)

#: Those that say that a port is taken, but not by whom.
PORT_SIGNATURES = ("host-53a", "host-53b")
#: What a completion finds out, whose answer knows more than the log.
CHAT_SIGNATURE = "eng-32"

#: Exit codes that mean something by themselves when no text does.
EXIT_CODES: dict[int, Signature] = {
    70: Signature(
        "eng-37", "", "docker", "NIM reported a hardware error", "look for Xid messages of the GPU in the kernel log"
    ),
    137: Signature(
        "eng-28c",
        "",
        "docker",
        "the container was killed: by the kernel for want of main memory, or by a stop that took too long",
        "look for oom-kill in the kernel log, and give the host more memory or the model a longer stop_timeout",
    ),
    135: Signature("eng-34c", "", "docker", "shared memory is too small (bus error)", "raise shm_size", marginal=True),
}
OUT_OF_MEMORY = Signature(
    "eng-28b",
    "",
    "docker",
    "the host ran out of memory and the kernel killed the container",
    "give the host more memory or swap, or run fewer models; the kernel log has the details",
)
