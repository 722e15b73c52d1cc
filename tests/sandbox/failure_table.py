# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Situations in which a NIM does not become ready, one or more for every failure that the collection knows.

``real`` situations are brought about: the stand-in NIM, the host or the world is made so, and says what it says then. The
others have a container print the literal text, because the sandbox has no such hardware, engine or version.
"""

from __future__ import annotations

import dataclasses
from typing import Any

PUBLIC = "nvcr.io/nim/nvidia/nemotron-3-nano:2.0.12"
#: Like it, and asked for by nobody else while the tables run: transfers of its files are broken on purpose.
BROKEN = "nvcr.io/nim/nvidia/nvidia-nemotron-nano-9b-v2:2.1.5"
BROKEN_FILES = "/models/nvidia-nemotron-nano-9b-v2/"
#: The order for which a container waits, as it sees it; ``@DIR`` in commands is the same directory on the host.
ORDER = "/opt/nim/.cache/order"
GIVE = "touch @DIR/order"


@dataclasses.dataclass(frozen=True)
class Situation:
    """One model that fails, or does not.

    Attributes:
        name: Name of the model; the failure's id unless there are several situations for it. ``@NAME`` in options stands
            for it too.
        failure: Identifier that must be reported; empty where no known failure is meant to be recognised.
        real: It is brought about rather than quoted.
        reasons: The reason that is reported is one of these.
        says: Texts that the message has beside cause and remedy.
        environment: Of the container.
        options: Further options of the model.
        prepare: Shell commands on the host before the model is started.
        order: Shell commands that bring it about; ``@DIR`` is the cache directory, ``@NAME`` the model, ``@PORT`` its port,
            ``@IMAGE`` its image.
        kernel: What the kernel says then of the model's GPU, with its PCI address in place of ``%s``.
        memory: MiB of main memory that the container gets right before the order.
        world: Name of a method of the world's controls with its arguments; calls on the same files exclude each other.
        own_words: Cause and remedy are those in ``says``: they are more exact than what is known of the failure.
        ready: It must become ready nevertheless.
        mend: Shell commands afterwards.
        seconds: From the line that decides to the end of the wait, 5 at most. Where no line decides it runs from the order
            and may be more; the situation says why.
    """

    name: str
    failure: str = ""
    real: bool = True
    reasons: tuple[str, ...] = ("container_ended", "start_failed", "unit_failed", "restart_loop")
    says: tuple[str, ...] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepare: str = ""
    order: str = GIVE
    memory: int = 0
    kernel: str = ""
    world: tuple[str, dict[str, Any]] | None = None
    own_words: bool = False
    ready: bool = False
    mend: str = ""
    seconds: float = 5.0


def waits(name: str, failure: str = "", *, environment: dict[str, str] | None = None, **rest: Any) -> Situation:
    """A container that does nothing until the order, and then meets its situation by itself."""
    return Situation(name, failure, environment={"STANDIN_START_WHEN": ORDER, **(environment or {})}, **rest)


def quotes(failure: str, name: str = "", **rest: Any) -> Situation:
    """A container that prints the literal text at the order."""
    environment = {"STANDIN_FAIL": failure, "STANDIN_FAIL_WHEN": ORDER, **rest.pop("environment", {})}
    return Situation(name or failure, rest.pop("reported", failure), real=False, environment=environment, **rest)


def text(name: str, failure: str, said: str, **environment: str) -> Situation:
    """Words of our own, to see what is made of them; the end is an exit unless the environment says otherwise."""
    return quotes("eng-25", name, reported=failure, environment={"STANDIN_FAIL_TEXT": said, **environment})


WEIGHTS = "/srv/weights/@NAME"


def weights(config: str) -> str:
    return "install -d -o 1000 %s && echo '%s' > %s/config.json && echo '{}' > %s/tokenizer.json" % (
        WEIGHTS,
        config,
        WEIGHTS,
        WEIGHTS,
    )


IN_CONTAINER: tuple[Situation, ...] = (
    # -- NIM
    waits("nim-01", "nim-01", environment={"STANDIN_GPU_NAME": "NVIDIA L4", "STANDIN_GPU_TOTAL_MIB": "4096"}),
    waits("nim-02", "nim-02", environment={"STANDIN_GPU_NAME": "NVIDIA L4", "STANDIN_GPU_USED_MIB": "45000"}),
    quotes("nim-03"),
    waits("nim-04", "nim-04", environment={"NIM_TAGS_SELECTOR": "precision=int3"}),
    # Such a profile is refused before the container is made, unless it is the image that is wrong.
    quotes("nim-05"),
    waits("nim-06", "nim-06", order="chown root: @DIR && chmod 755 @DIR && touch @DIR/order"),
    quotes("nim-07a", environment={"STANDIN_FAIL_END": "1"}),
    quotes("nim-07b", environment={"STANDIN_FAIL_END": "1"}),
    waits(
        "nim-09",
        "nim-09",
        options={"image": BROKEN},
        world=("fail", {"status": 599, "host": "api.ngc.nvidia.com", "where": "files", "path": BROKEN_FILES}),
    ),
    waits(
        "nim-10",
        "nim-10",
        options={"image": BROKEN},
        world=("fail", {"status": 500, "host": "api.ngc.nvidia.com", "where": "files", "path": BROKEN_FILES}),
    ),
    quotes("nim-11"),
    waits(
        "nim-12",
        "nim-12",
        options={"image": BROKEN},
        world=("cut", {"after_bytes": 1000, "host": "api.ngc.nvidia.com", "where": "files", "path": BROKEN_FILES}),
    ),
    # Read-only as the container sees it; the host can still give the order.
    waits(
        "nim-13",
        "nim-13",
        order="nsenter --mount --target $(docker inspect --format '{{.State.Pid}}' nim-@NAME)"
        " busybox mount -o remount,bind,ro none /opt/nim/.cache && " + GIVE,
    ),
    waits("nim-14", "nim-14", environment={"NIM_LOG_LEVEL": "VERBOSE"}),
    waits("nim-15a", "nim-15a", environment={"STANDIN_OPEN_FILES": "9999"}, options={"ulimits": {"nofile": 256}}),
    quotes("nim-15b", environment={"STANDIN_FAIL_TEXT": "I/O error (os error 24)"}),
    quotes("nim-16c", environment={"STANDIN_FAIL_TEXT": "I/O error (os error 28)"}),
    waits(
        "nim-16a",
        "nim-16a",
        prepare="mkdir -p @DIR && mount -t tmpfs -o size=1m,uid=1000,gid=1000 tmpfs @DIR",
        mend="umount @DIR",
    ),
    # Printed by the container because it has a profile for LoRA and nobody wants LoRA.
    waits("nim-19", ready=True),
    quotes("nim-20", reported="", ready=True),
    # -- engines
    quotes("eng-21a"),
    quotes("eng-21b"),
    quotes("eng-22"),
    waits("eng-23", "eng-23", environment={"STANDIN_GPU_NAME": "NVIDIA L40S", "STANDIN_GPU_USED_MIB": "9000"}),
    waits("eng-24", "eng-24", options={"max_model_length": 999999}),
    quotes("eng-25"),
    quotes(
        "eng-26", environment={"STANDIN_FAIL_PHASE": "engine", "STANDIN_FAIL_END": "hang"}, reasons=("start_failed",)
    ),
    quotes("eng-27a"),
    quotes("eng-27b"),
    quotes("eng-28a"),
    # The kernel does it, and says so in its log.
    waits("out-of-memory", "eng-28b", environment={"STANDIN_ALLOCATE_MIB": "500"}, memory=120),
    # Somebody does it, and nothing is said anywhere.
    waits("eng-28c", "eng-28c", order="docker kill nim-@NAME"),
    quotes("eng-29"),
    waits(
        "eng-30a",
        "eng-30a",
        prepare=weights('{"rope_scaling": {"type": "extended", "factor": 8.0}}'),
        options={"weights_directory": WEIGHTS},
    ),
    waits(
        "eng-30b",
        "eng-30b",
        prepare=weights('{"rope_scaling": [8.0]}'),
        options={"weights_directory": WEIGHTS},
    ),
    quotes("eng-31"),
    waits(
        "eng-32",
        "eng-32",
        environment={"STANDIN_NO_CHAT_TEMPLATE": "1"},
        options={"completion": "chat"},
        reasons=("completion_failed",),
        says=("no chat template", "it answers on /v1/completions", "use a model with a chat template"),
        own_words=True,
    ),
    quotes("eng-33a", environment={"STANDIN_FAIL_TEXT": "RuntimeError: NCCL error"}),
    quotes("eng-33b"),
    quotes("eng-33c"),
    waits("eng-34a", "eng-34a", environment={"STANDIN_SHM_MIB": "64"}, options={"shm_size": "16MB"}),
    quotes("eng-34b", environment={"STANDIN_FAIL_END": "1"}),
    waits(
        "eng-34c",
        "eng-34c",
        environment={"STANDIN_SHM_MIB": "64", "STANDIN_SHM_MAP": "1"},
        options={"shm_size": "16MB"},
    ),
    quotes("eng-35"),
    quotes("eng-36"),
    quotes("eng-37"),
    # -- what a container says of driver and host
    quotes("host-48", environment={"STANDIN_FAIL_PHASE": "engine", "STANDIN_FAIL_END": "hang"}),
    quotes("host-50a", environment={"STANDIN_FAIL_PHASE": "engine"}),
    # Another reason than the Fabric Manager, which only error 802 is about.
    quotes("host-50b", environment={"STANDIN_FAIL_PHASE": "engine"}),
    quotes("host-50c"),
    quotes("host-51"),
    # -- what Docker, the toolkit and the registry say, where it cannot be brought about
    quotes("eng-28b"),
    # Printed in a mode of the toolkit that only Jetson boards use.
    quotes("host-42b"),
    quotes("host-45b"),
    quotes("host-54"),
    quotes("host-55"),
    quotes("host-56"),
    quotes("host-57"),
    quotes("host-59"),
    quotes("reg-60"),
    quotes("reg-61"),
    quotes("reg-62a"),
    quotes("reg-62b"),
    quotes("reg-63"),
    quotes("reg-64"),
    quotes("reg-65"),
    quotes("reg-66"),
    quotes("reg-67"),
    quotes("reg-68"),
    quotes("reg-69"),
    quotes("reg-70"),
    # -- the same, said in other ways
    quotes("eng-21a", "json", environment={"NIM_JSONL_LOGGING": "1"}),
    quotes("eng-30a", "json-exception", environment={"NIM_JSONL_LOGGING": "1", "STANDIN_FAIL_TRACEBACK": "1"}),
    text(
        "umbrella-first",
        "eng-22",
        r"RuntimeError: Engine core initialization failed. See root cause above.\n"
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing"
        " the engine.",
    ),
    text(
        "umbrella-last",
        "eng-21a",
        r"torch.OutOfMemoryError: CUDA out of memory.\nRuntimeError: Engine core initialization failed.",
    ),
    # The line alone decides: the container stays.
    quotes("eng-21b", "hangs", environment={"STANDIN_FAIL_END": "hang"}, reasons=("start_failed",)),
    # Neither does what only looks like the end.
    quotes("nim-07a", "goes-on", reported="", ready=True),
    text("other-words", "", "RuntimeError: something that nobody has written down yet"),
    # Nothing in the log, exit code 0: recognised by the end alone.
    quotes("eng-37", "exit-0", reported="", environment={"STANDIN_FAIL_END": "0"}),
    waits(
        "requests-fail",
        environment={"STANDIN_REQUESTS_FAIL": "1"},
        reasons=("completion_failed",),
        says=("HTTP 500", "EngineCore encountered an issue"),
        # No line that is known decides. The time runs from the order, and the NIM has to load its model and become ready
        # (1 s) before anybody can ask it.
        seconds=6,
    ),
)


#: The last on its host: a GPU of which the kernel has said this gets no model any more until it is reset.
LAST: tuple[Situation, ...] = (
    Situation(
        "host-52",
        "host-52",
        environment={"STANDIN_START_WHEN": ORDER},
        order="true",
        kernel="NVRM: Xid (PCI:%s): 79, pid=4711, name=python3, GPU has fallen off the bus.",
        reasons=("start_failed",),
        own_words=True,
        says=("Xid 79 on GPU", "the GPU has fallen off the bus", "reboot the host"),
    ),
)

#: Situations of an image whose files need a key; these are fetched by a container of its own.
STRANGER = (
    "import http.server as h; H = type(str(), (h.BaseHTTPRequestHandler,), dict(do_GET=lambda s:"
    " (s.send_response(200), s.end_headers()))); h.HTTPServer((str(), @PORT), H).serve_forever()"
)
WITH_KEY: tuple[Situation, ...] = (
    Situation(
        "nim-17",
        "nim-17",
        environment={"STANDIN_LOAD_SECONDS": "60"},
        # A program that has only just been started hears no signal yet.
        order="until docker logs nim-@NAME 2>&1 | grep -q Initializing; do sleep 0.2; done; docker stop nim-@NAME",
    ),
    quotes("nim-18a", environment={"STANDIN_FAIL_END": "1", "STANDIN_FAIL_TEXT": "Captured NIM_LLM_PID: 0"}),
    quotes(
        "nim-18b", environment={"STANDIN_FAIL_END": "1", "STANDIN_FAIL_TEXT": "x has no NIM_LLM process to terminate"}
    ),
    Situation(
        "stranger",
        environment={"STANDIN_DOWNLOAD_SECONDS": "60"},
        order="systemd-run --quiet --unit=stranger python3 -c '%s'" % STRANGER,
        mend="systemctl stop stranger",
        reasons=("wrong_server",),
        says=("python3",),
        # No line decides: the stranger says nothing in any log. The time runs from the order, and before its answers count
        # it has to start (1 s), and must answer in four looks in a row, for the container may be about to publish its port.
        seconds=8,
    ),
)

#: What a model meets whose host became unfit after it was deployed. It is started again, as after a reboot.
RESTART = "systemctl reset-failed nim-@NAME; rm -f /run/nim/@NAME.json; systemctl restart nim-@NAME"
STOP = "systemctl stop nim-@NAME; docker rm -f nim-@NAME >/dev/null 2>&1 || true"
DOCKER = "systemctl reset-failed docker; systemctl restart docker"
DAEMON = "/etc/docker/daemon.json"
REFRESH = "/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env"
HOOK = "/usr/bin/nvidia-container-runtime-hook"
LIBRARY = "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"
DRIVER = "/proc/driver/nvidia-standin"
UNLOAD = "systemctl stop nvidia-fabricmanager nvidia-persistenced; for m in nvidia_uvm nvidia_drm nvidia_modeset nvidia; do rmmod $m; done; true"


def broken(name: str, failure: str, breaks: str, mend: str, **rest: Any) -> Situation:
    order = "(%s; %s) >&2 && (%s)" % (STOP, breaks, RESTART)
    return Situation(name, failure, order=order, mend="%s; %s" % (STOP, mend), **rest)


def daemon_json(change: str) -> str:
    """daemon.json with one change (Python, of ``d``), as somebody else's tool leaves it."""
    program = 'import json; d = json.load(open("%s")); %s; json.dump(d, open("%s", "w"))' % (DAEMON, change, DAEMON)
    return "cp %s /root/daemon.json && python3 -c '%s' && %s" % (DAEMON, program, DOCKER)


DAEMON_BACK = "mv /root/daemon.json %s; %s" % (DAEMON, DOCKER)
AWAY, BACK = "mv %s /root/library" % LIBRARY, "rm -f %s %s9*; mv /root/library %s" % (LIBRARY, LIBRARY[:-1], LIBRARY)
OTHER = "%s && touch %s.1 && ln -s %s.1 %s" % (AWAY, LIBRARY[:-1] + "999", LIBRARY[:-1] + "999", LIBRARY)
LOAD = "modprobe nvidia; modprobe nvidia_uvm; systemctl start nvidia-persistenced nvidia-fabricmanager"

#: The image as if it had been built for a driver that comes later; the old way alone asks for that.
NEWER = (
    'cp /etc/nim/@NAME.json /root/ && python3 -c \'import json; p = "/etc/nim/@NAME.json"; d = json.load(open(p));'
    ' d["create"].insert(0, "--env=NVIDIA_REQUIRE_CUDA=cuda>=99.0"); json.dump(d, open(p, "w"))\''
)

SPARK = "nvcr.io/nim/meta/llama-3.1-8b-instruct-dgx-spark:1.0.0-variant"
PULL = (
    "(. /etc/nim/ngc.env && echo $NGC_API_KEY | docker login --username '$oauthtoken' --password-stdin nvcr.io)"
    " && docker pull --quiet --platform linux/arm64 %s && docker logout nvcr.io"
) % SPARK

#: By the way in which containers get their GPUs (nim_gpu_injection).
ON_HOST: dict[str, tuple[Situation, ...]] = {
    "gpus": (
        broken(
            "host-40", "host-40", "mv %s /root/hook && %s" % (HOOK, DOCKER), "mv /root/hook %s; %s" % (HOOK, DOCKER)
        ),
        broken("host-42a", "host-42a", NEWER, "cp /root/@NAME.json /etc/nim/@NAME.json"),
        broken("host-43", "host-43", AWAY, BACK),
        broken("host-44", "host-44", UNLOAD, LOAD),
        broken("host-45a", "host-45a", OTHER, BACK),
        broken(
            "host-46",
            "host-46",
            "cp {0}/gpus /root/gpus && sed -i 's/^uuid=GPU-..../uuid=GPU-0000/' {0}/gpus".format(DRIVER),
            "cp /root/gpus %s/gpus" % DRIVER,
        ),
        broken(
            "host-53a",
            "host-53a",
            "docker run --detach --name squatter --publish @PORT:8000 --entrypoint sleep @IMAGE 600",
            "docker rm -f squatter",
            says=("squatter",),
        ),
        broken(
            "host-53b",
            "host-53b",
            "systemd-run --quiet --unit=squatter python3 -m http.server @PORT; sleep 1",
            "systemctl stop squatter",
            says=("python3",),
        ),
        broken(
            "nim-16b",
            "nim-16b",
            "mount -t tmpfs -o size=4k,nr_inodes=2 tmpfs /var/lib/docker/containers",
            "umount /var/lib/docker/containers",
        ),
    ),
    "runtime": (
        broken(
            "host-58a",
            "host-58a",
            "%s && cp /etc/nim/@NAME.json /root/ && sed -i"
            ' "s#nvcr.io/nim/[^\\"]*@sha256:[0-9a-f]*#$(docker image inspect --format \'{{.Id}}\' %s)#g" /etc/nim/@NAME.json'
            % (PULL, SPARK),
            "cp /root/@NAME.json /etc/nim/@NAME.json; docker image rm %s" % SPARK,
        ),
        # NVSwitches, and nobody who sets them up; host-50b stands beside it, host-50c comes later.
        broken("fabric", "host-50a", "systemctl stop nvidia-fabricmanager", "systemctl start nvidia-fabricmanager"),
        broken("host-41", "host-41", daemon_json('d.pop("runtimes")'), DAEMON_BACK),
        broken("host-49", "host-49", daemon_json('d["runtimes"]["nvidia"]["path"] = "runc"'), DAEMON_BACK),
        # The same as above in the words of the toolkit's newer way.
        broken("newer-43", "host-43", AWAY, BACK),
        broken("newer-44", "host-44", UNLOAD, LOAD),
        broken("newer-45b", "host-45b", OTHER, BACK),
        # The last: its files are gone then.
        broken(
            "nim-08",
            "nim-08",
            "rm -rf @DIR/* /var/lib/nim/state/@NAME.*",
            "true",
            world=("set_key", {"state": "expired"}),
        ),
    ),
    "cdi": (
        broken(
            "host-47",
            "host-47",
            # Each start of the service asks for it to be written anew; somebody has had it written elsewhere.
            "cp {0} /root/refresh.env; echo NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=/root/elsewhere.yaml >> {0};"
            " rm -f /etc/cdi/* /var/run/cdi/*".format(REFRESH),
            "mv /root/refresh.env %s; systemctl restart nvidia-cdi-refresh.service" % REFRESH,
        ),
        broken("host-40b", "host-40b", daemon_json('d["features"]["cdi"] = False'), DAEMON_BACK),
    ),
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What a registry refuses, met by ``nim_image`` before anything is pulled.

    Attributes:
        key: Name of a key of the world's controls; empty for none.
        says: Texts of cause and remedy.
    """

    name: str
    failure: str
    image: str
    reason: str
    says: tuple[str, ...]
    key: str = "KEY_VALID"
    world: tuple[str, dict[str, Any]] | None = None


PRIVATE = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.5"
REFUSALS: tuple[Refusal, ...] = (
    Refusal("no-key", "reg-60", PRIVATE, "no_key", ("wants a key", "set ngc_api_key"), key=""),
    Refusal("not-entitled", "reg-61", PRIVATE, "no_entitlement", ("accept the terms",), key="KEY_WITHOUT_ENTITLEMENT"),
    Refusal("expired", "reg-62a", PRIVATE, "bad_key", ("expired", "create a new one"), key="KEY_EXPIRED"),
    Refusal("nobody", "reg-67", "nvcr.io/nim/nobody/nothing:1.0.0", "no_such_repository", ("check the name",)),
    Refusal("anonymous", "reg-62b", "nvcr.io/nim/nobody/nothing:1.0.0", "no_key", ("or check the name",), key=""),
    Refusal(
        "denied",
        "reg-63",
        "nvcr.io/nim/openai/gpt-oss-20b:2.0.5",
        "no_entitlement",
        ("Access Denied", "accept the terms"),
        world=(
            "fail",
            {
                "status": 403,
                "where": "manifests",
                "repository": "nim/openai/gpt-oss-20b",
                "code": "DENIED",
                "message": "Access Denied",
            },
        ),
    ),
    Refusal("unpaid", "reg-64", PRIVATE, "no_entitlement", ("402", "licence or trial"), key="KEY_UNPAID"),
    Refusal(
        "legal",
        "reg-65",
        "nvcr.io/nim/meta/llama-3.1-8b-base:1.3.3",
        "legal",
        ("451", "use another model"),
        world=("fail", {"status": 451, "where": "manifests", "repository": "nim/meta/llama-3.1-8b-base"}),
    ),
    Refusal("no-tag", "reg-66", PRIVATE[:-1] + "99", "no_such_tag", ("name a tag",)),
    Refusal(
        "too-many",
        "reg-68",
        "nvcr.io/nim/meta/llama-3.1-70b-instruct:1.3.3",
        "rate_limit",
        ("429", "use a mirror"),
        world=("fail", {"status": 429, "where": "manifests", "repository": "nim/meta/llama-3.1-70b-instruct"}),
    ),
    Refusal("other-machine", "host-58b", SPARK, "architecture", ("arm64",)),
)

#: Failures of the reference that have no text to recognise: one that only a person may call harmless in one version.
WITHOUT_SIGNATURE = {"nim-20"}

#: In the order in which they are played.
SITUATIONS = (*IN_CONTAINER, *WITH_KEY, *(situation for table in ON_HOST.values() for situation in table), *LAST)
