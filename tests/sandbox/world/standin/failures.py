# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Failures that STANDIN_FAIL can ask for: the literal text, when it appears and how the container ends.

Those of Docker, the toolkit, the kernel and the registry are here too, for where the situation itself cannot be made.

``phase``: start (before anything else) | profile | download | engine | serving (after ready) | request.
``end``: an exit code | "continue" (harmless or survivable) | "unhealthy" (stays up, health turns 503) | "hang" (never
ready).  Codes are those recorded for the real thing; where none is recorded the stand-in uses 1 (and 0 for a failed
authentication, which is recorded).
"""

FAILURES = {
    # NIM
    "nim-01": ("profile", 1, "Detected 0 compatible profile(s)."),
    "nim-02": (
        "profile",
        1,
        "Detected 0 compatible profile(s).\n"
        "Detected additional 2 compatible profile(s) that are currently not runnable due to low free GPU memory.\n"
        "Could not find a profile that is currently runnable with the detected hardware. Please check the system"
        " information below and make sure you have enough free GPUs.",
    ),
    "nim-03": (
        "profile",
        1,
        "Could not find a profile that is currently runnable with the detected hardware. Please check the system"
        " information below and make sure you have enough free GPUs.",
    ),
    "nim-04": ("profile", 1, "Could not match a profile in manifest"),
    "nim-05": (
        "profile",
        1,
        "Model download failed: Environment variable NIM_MODEL_PROFILE is set to 0123abcd but no matching profile_id or"
        " profile description is found in manifest.",
    ),
    "nim-06": (
        "download",
        1,
        "ManifestDownloadError: Error downloading manifest: I/O error Permission denied (os error 13)",
    ),
    "nim-07a": ("download", "continue", "Error downloading models, ignoring and continuing startup"),
    "nim-07b": ("download", "continue", "Download failed after 5 attempts. Last exception:"),
    "nim-08": ("download", 0, "ManifestDownloadError: Error downloading manifest: Authentication Error"),
    "nim-09": (
        "download",
        1,
        "error sending request for url (https://api.ngc.nvidia.com/v2/org/nim/team/meta/models/llama3-8b-instruct/hf/files)",
    ),
    "nim-10": ("download", 1, "One or more errors fetching files:"),
    "nim-11": ("download", 1, "the repo file list has not been validated"),
    "nim-12": ("download", 1, "error decoding response body"),
    "nim-13": (
        "download",
        "continue",
        "/opt/nim/.cache: cache is read-only, application may fail if model is not already present in cache",
    ),
    "nim-14": ("start", 1, "Unsupported value ('VERBOSE') of NIM_LOG_LEVEL"),
    "nim-15a": ("engine", 1, "OSError: [Errno 24] Too many open files"),
    "nim-15b": ("download", 1, "I/O error Too many open files (os error 24)"),
    "nim-16a": ("download", 1, "OSError: [Errno 28] No space left on device"),
    "nim-16c": ("download", 1, "I/O error No space left on device (os error 28)"),
    "nim-17": ("profile", "hang", ""),
    "nim-18a": ("profile", "hang", ""),
    "nim-18b": ("profile", "hang", ""),
    "nim-19": ("profile", "continue", "Profile 0123abcd supports LoRA, but LoRA is disabled. Skipping profile."),
    "nim-20": ("download", "continue", "checksum of blob 0123abcd does not match the expected value"),
    # Engine
    "eng-21a": (
        "engine",
        1,
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 44.39 GiB"
        " of which 1.21 GiB is free.",
    ),
    "eng-21b": ("engine", 1, "torch.cuda.OutOfMemoryError: CUDA out of memory."),
    "eng-22": (
        "engine",
        1,
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing"
        " the engine.",
    ),
    "eng-23": (
        "engine",
        1,
        "ValueError: Free memory on device (59.32/79.15 GiB) on startup is less than desired GPU memory utilization"
        " (0.9, 71.24 GiB)",
    ),
    "eng-24": (
        "engine",
        1,
        "ValueError: The model's max seq len (131072) is larger than the maximum number of tokens that can be stored in KV"
        " cache (84992).",
    ),
    "eng-25": ("engine", 1, "RuntimeError: Engine core initialization failed. See root cause above."),
    "eng-26": ("serving", "unhealthy", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."),
    "eng-27a": ("engine", 1, "[TRT] [E] Error Code 2: OutOfMemory (Requested size was 2147483648 bytes.)"),
    "eng-27b": ("engine", 1, "Engine building failed, please check the error log."),
    "eng-28a": ("engine", 137, "Killed"),
    "eng-28c": ("engine", 137, ""),
    "eng-29": ("engine", 1, "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
    "eng-30a": ("engine", 1, "ValueError: Unknown RoPE scaling type extended"),
    "eng-30b": ("engine", 1, "ValueError: `rope_scaling` must be a dictionary with two fields"),
    "eng-31": ("engine", 1, "ValueError: max_num_batched_tokens must be <= 65528 when LoRA is enabled"),
    "eng-32": ("request", "continue", ""),
    "eng-33a": ("engine", 1, "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)"),
    "eng-33b": ("engine", 1, "RuntimeError: NCCL error: unhandled cuda error"),
    "eng-33c": ("engine", 1, "torch.distributed.DistBackendError: unhandled system error"),
    "eng-34a": (
        "engine",
        1,
        "OSError: [Errno 28] No space left on device: '/dev/shm/nccl-Ab12Cd'\nNo space left on device: /dev/shm",
    ),
    "eng-34b": ("engine", 135, "Bus error"),
    "eng-34c": ("engine", 135, ""),
    "eng-35": ("engine", 1, "NCCL WARN NVLS initialization failed (NCCL_NVLS_ENABLE)"),
    "eng-36": (
        "engine",
        1,
        "OSError: [Errno 30] Read-only file system: '/opt/nim/.cache/vllm/vllm/gpu_p2p_access_cache_for_0,1.json'",
    ),
    "eng-37": ("engine", 70, ""),
    # What the container itself says about driver and host
    "host-48": ("serving", "unhealthy", "Failed to initialize NVML: Unknown Error"),
    "host-49": (
        "start",
        1,
        "WARNING: The NVIDIA Driver was not detected.  GPU functionality will not be available.\n"
        "   Use the NVIDIA Container Toolkit to start this container with GPU support; see\n"
        "   https://docs.nvidia.com/datacenter/cloud-native/ .",
    ),
    "host-50a": (
        "start",
        1,
        "ERROR: The NVIDIA Driver is present, but CUDA failed to initialize.  GPU functionality will not be available.\n"
        "   [[ System not yet initialized (error 802) ]]",
    ),
    "host-50b": (
        "start",
        1,
        "ERROR: The NVIDIA Driver is present, but CUDA failed to initialize.  GPU functionality will not be available.\n"
        "   [[ No CUDA-capable device is detected (error 100) ]]",
    ),
    "host-50c": (
        "engine",
        1,
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    ),
    "host-51": (
        "engine",
        1,
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported display driver / cuda"
        " driver combination",
    ),
    "host-58a": ("start", 255, "exec /opt/nim/start_server.sh: exec format error"),
    "host-42b": ("engine", 1, "unsatisfied condition: cuda>=13.0 (cuda=12.6)"),
    "host-45b": ("engine", 1, "Failed to initialize NVML: Driver/library version mismatch"),
    "host-46": ("engine", 1, "nvidia-container-cli: device error: 9: unknown device"),
    "host-54": (
        "engine",
        1,
        'Error response from daemon: Conflict. The container name "/nim-llama" is already in use by container "0123abcd".',
    ),
    "host-55": (
        "engine",
        1,
        "failed to register layer: write /usr/lib/libcublas.so.12: no space left on device",
    ),
    "host-56": (
        "engine",
        1,
        "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
    ),
    "host-57": ("engine", 1, "Error response from daemon: error from registry: Incorrect Repository Format"),
    "host-59": (
        "engine",
        1,
        "nvidia-container-cli: mount error: failed to add device rules: unable to find eBPF program",
    ),
    "eng-28b": ("engine", 1, '"OOMKilled": true'),
    # Registry and NGC
    "reg-60": ("download", 1, 'Head "https://nvcr.io/v2/nim/x/manifests/1": unauthorized: authentication required'),
    "reg-61": (
        "download",
        1,
        "failed to authorize: failed to fetch oauth token: unexpected status from GET request to"
        " https://nvcr.io/proxy_auth?scope=repository%3Anim%2Fx%3Apull: 403 Forbidden",
    ),
    "reg-62a": (
        "download",
        1,
        "failed to authorize: failed to fetch oauth token: unexpected status from GET request to"
        " https://nvcr.io/proxy_auth?scope=repository%3Anim%2Fx%3Apull: 401 Unauthorized",
    ),
    "reg-62b": ("download", 1, "failed to fetch anonymous token: unexpected status: 401 Unauthorized"),
    "reg-63": ("download", 1, 'denied: {"errors": [{"code": "DENIED", "message": "Access Denied"}]}'),
    "reg-64": ("download", 1, "unexpected status from HEAD request: 402 Payment Required"),
    "reg-65": ("download", 1, "unexpected status from HEAD request: 451 Unavailable For Legal Reasons"),
    "reg-66": ("download", 1, "manifest unknown: manifest unknown"),
    "reg-67": (
        "download",
        1,
        "pull access denied for nvcr.io/nim/x, repository does not exist or may require 'docker login'",
    ),
    "reg-68": ("download", 1, "toomanyrequests: too many requests"),
    "reg-69": ("download", 1, "HTTP 401: Invalid API key."),
    "reg-70": ("download", 1, "tls: failed to verify certificate: x509: certificate signed by unknown authority"),
}
