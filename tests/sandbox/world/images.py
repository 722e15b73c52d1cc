# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The images that the sandbox's nvcr.io offers: what each one says about itself.

Names, tags, environment and labels follow the real catalogue where it is recorded; sizes do not.
"""

from __future__ import annotations

import hashlib
from typing import Any

# The form CUDA base images use since 12.x: the driver is new enough, or its branch can carry the compatibility
# package on this brand.
BRANDS = (
    "unknown",
    "grid",
    "tesla",
    "nvidia",
    "quadro",
    "quadrortx",
    "nvidiartx",
    "vapps",
    "vpc",
    "vcs",
    "vws",
    "cloudgaming",
)


def require_cuda(version: str, branches: tuple[int, ...] = ()) -> str:
    """NVIDIA_REQUIRE_CUDA with one alternative per brand and driver branch."""
    parts = ["cuda>=%s" % version]
    for branch in branches:
        parts += ["brand=%s,driver>=%d,driver<%d" % (brand, branch, branch + 1) for brand in BRANDS]
    return " ".join(parts)


def profile(description: str, memory_gb: int, **tags: str) -> dict[str, Any]:
    """One profile; its id depends on the description alone, so it is the same in every build."""
    full = {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "pp": "1", "feat_lora": "false"}
    full.update(tags)
    full["profile"] = description.rsplit("-", 1)[-1] if description.endswith(("throughput", "latency")) else ""
    full = {name: value for name, value in full.items() if value}
    identifier = hashlib.sha256(("profile:" + description).encode()).hexdigest()
    return {"id": identifier, "description": description, "memory_gb": memory_gb, "tags": full}


def profiles_1x(memory_gb: int) -> list[dict[str, Any]]:
    """Prebuilt engines for two GPUs, engine-free profiles for all, one that is built on the spot."""
    trt = {"llm_engine": "tensorrt_llm"}
    half = memory_gb // 2 + 1
    return [
        profile(
            "tensorrt_llm-h100-fp8-tp1-pp1-throughput", half, precision="fp8", gpu="H100", gpu_device="2330:10de", **trt
        ),
        profile(
            "tensorrt_llm-h200-fp8-tp1-pp1-throughput", half, precision="fp8", gpu="H200", gpu_device="2335:10de", **trt
        ),
        profile(
            "tensorrt_llm-l40s-fp8-tp1-pp1-throughput", half, precision="fp8", gpu="L40S", gpu_device="26b9:10de", **trt
        ),
        profile("tensorrt_llm-h100-bf16-tp2-pp1-latency", half, gpu="H100", gpu_device="2330:10de", tp="2", **trt),
        profile("vllm-bf16-tp1-pp1", memory_gb),
        profile("vllm-bf16-tp2-pp1", half, tp="2"),
        profile("vllm-bf16-tp1-pp1-lora", memory_gb, feat_lora="true", feat_lora_max_rank="32"),
        profile("tensorrt_llm-trtllm_buildable-bf16-tp1-pp1", memory_gb, trtllm_buildable="true", **trt),
        profile(
            "tensorrt_llm-trtllm_buildable-bf16-tp1-pp1-lora",
            memory_gb,
            trtllm_buildable="true",
            feat_lora="true",
            **trt,
        ),
    ]


def profiles_2x(memory_gb: int) -> list[dict[str, Any]]:
    half = memory_gb // 2 + 1
    return [
        profile("vllm-fp8-tp1-pp1-%d.0" % half, half, precision="fp8"),
        profile("vllm-bf16-tp1-pp1-%d.0" % memory_gb, memory_gb),
        profile("vllm-bf16-tp2-pp1-%d.0" % half, half, tp="2"),
        profile("vllm-fp8-tp1-pp1-feat_lora-%d.0" % half, half, precision="fp8", feat_lora="true"),
    ]


LONG_FORM = (470, 535, 550)


def image(
    repository: str,
    tag: str,
    *,
    model: str,
    dialect: str = "1",
    public: bool = False,
    require: str = "",
    cuda: str = "12.8.0",
    memory_gb: int = 16,
    max_model_len: int = 131072,
    chat_template: bool = True,
    has_metadata: bool = True,
    architectures: tuple[str, ...] = ("amd64",),
    padding_mib: int = 0,
    version: str = "",
    model_version: str = "hf-1",
    files_mib: int = 6,
    silent: bool = False,
) -> dict[str, Any]:
    """One tag of one repository; a silent image has no labels and variables by which its family could be told."""
    second = dialect == "2"
    profiles = {"1": profiles_1x, "2": profiles_2x}.get(dialect, lambda _memory: [])(memory_gb)
    if dialect == "embedding":
        profiles = [profile("onnx-fp16-tp1-pp1", memory_gb, llm_engine="onnx", precision="fp16")]
    return {
        "repository": repository,
        "tag": tag,
        "version": version or tag,
        "dialect": dialect,
        "model": model,
        "public": public,
        "require": require or require_cuda(cuda[: cuda.rindex(".")], LONG_FORM if not second else (535, 550, 570)),
        "cuda": cuda,
        "profiles": profiles,
        "max_model_len": max_model_len,
        "chat_template": chat_template,
        "has_metadata": has_metadata,
        "architectures": list(architectures),
        "padding_mib": padding_mib,
        "model_store": "nim/%s/%s:%s" % (model.split("/")[0], model.split("/")[1].replace(".", "_"), model_version),
        "files_mib": files_mib,
        **({"silent": True} if silent else {}),
    }


LLAMA = "nim/meta/llama-3.1-8b-instruct"
IMAGES = [
    # 1.x, needs a key. Two tags for upgrades; the padding makes the progress of a pull visible.
    image(LLAMA, "1.8.4", model="meta/llama-3.1-8b-instruct", padding_mib=60),
    image(LLAMA, "1.8.5", model="meta/llama-3.1-8b-instruct", padding_mib=60),
    image(
        "nim/mistralai/mistral-7b-instruct-v0.3",
        "1.12.2",
        model="mistralai/mistral-7b-instruct-v0.3",
        cuda="12.9.0",
        max_model_len=32768,
    ),
    # 2.x, public since 2.0.10; one index for two architectures.
    image(
        "nim/nvidia/nemotron-3-nano",
        "2.0.12",
        model="nvidia/nemotron-3-nano",
        dialect="2",
        public=True,
        cuda="12.9.1",
        architectures=("amd64", "arm64"),
    ),
    image(
        "nim/nvidia/nemotron-3-nano",
        "2.0.13",
        model="nvidia/nemotron-3-nano",
        dialect="2",
        public=True,
        cuda="12.9.1",
        architectures=("amd64", "arm64"),
    ),
    # 2.x older than 2.0.10: still needs a key.
    image("nim/openai/gpt-oss-20b", "2.0.5", model="openai/gpt-oss-20b", dialect="2", cuda="12.9.1"),
    # Driver gates: the plain form, and the long one.
    image(
        "nim/meta/llama3-8b-instruct",
        "1.0.3",
        model="meta/llama3-8b-instruct",
        require=require_cuda("12.5"),
        cuda="12.5.0",
        max_model_len=8192,
        has_metadata=False,
    ),
    image(
        "nim/meta/llama-3.1-70b-instruct",
        "1.3.3",
        model="meta/llama-3.1-70b-instruct",
        require=require_cuda("12.5", (470, 535)),
        cuda="12.5.1",
        memory_gb=40,
    ),
    # Needs CUDA 13: only drivers of branch 580 and later carry it.
    image(
        "nim/nvidia/nvidia-nemotron-nano-9b-v2",
        "2.1.5",
        model="nvidia/nvidia-nemotron-nano-9b-v2",
        dialect="2",
        public=True,
        require=require_cuda("13.0"),
        cuda="13.0.0",
    ),
    # Another machine's architecture alone.
    image(
        "nim/meta/llama-3.1-8b-instruct-dgx-spark",
        "1.0.0-variant",
        model="meta/llama-3.1-8b-instruct",
        architectures=("arm64",),
        require=require_cuda("13.0"),
        cuda="13.0.0",
        version="1.0.0",
    ),
    # The container without a model of its own, for fine-tuned weights.
    image("nim/nvidia/llm-nim", "1.12.0", model="nvidia/llm-nim", cuda="12.9.0"),
    # A base model: no chat template.
    image("nim/meta/llama-3.1-8b-base", "1.3.3", model="meta/llama-3.1-8b-base", chat_template=False, cuda="12.6.1"),
    # Other kinds of NIM.
    image(
        "nim/nvidia/nv-embedqa-e5-v5",
        "1.10.1",
        model="nvidia/nv-embedqa-e5-v5",
        dialect="embedding",
        memory_gb=4,
        max_model_len=512,
    ),
    image(
        "nim/snowflake/arctic-embed-l",
        "1.0.1",
        model="snowflake/arctic-embed-l",
        dialect="embedding",
        memory_gb=4,
        max_model_len=512,
        silent=True,
    ),
    image(
        "nim/nvidia/llama-nemotron-embed-1b-v2",
        "2.0.0",
        model="nvidia/llama-nemotron-embed-1b-v2",
        dialect="native",
        public=True,
        memory_gb=4,
        max_model_len=8192,
        cuda="12.9.1",
    ),
    # Not a NIM: a known public repository, to tell a bad key from a wrong name, and for a first GPU container.
    image("nvidia/cuda", "12.8.1-base-ubuntu24.04", model="nvidia/cuda", dialect="cuda", public=True, cuda="12.8.1"),
    image(
        "nvidia/cuda",
        "13.0.1-base-ubuntu24.04",
        model="nvidia/cuda",
        dialect="cuda",
        public=True,
        cuda="13.0.1",
        require=require_cuda("13.0"),
    ),
]


def catalogue() -> dict[str, Any]:
    """What the stand-in for NGC must know: repositories with their access, and model files."""
    repositories: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for entry in IMAGES:
        repositories[entry["repository"]] = {"access": "public" if entry["public"] else "private"}
        if entry["dialect"] == "cuda":
            continue
        name, dummy, version = entry["model_store"].partition(":")
        model = models.setdefault(name, {"access": "public" if entry["public"] else "private", "versions": {}})
        model["versions"][version] = [
            {"path": "config.json", "sizeInBytes": 1024},
            {"path": "tokenizer.json", "sizeInBytes": 65536},
            {"path": "tokenizer_config.json", "sizeInBytes": 2048},
            {"path": "model-00001-of-00002.safetensors", "sizeInBytes": entry["files_mib"] << 19},
            {"path": "model-00002-of-00002.safetensors", "sizeInBytes": entry["files_mib"] << 19},
        ]
    return {"repositories": repositories, "models": models}
