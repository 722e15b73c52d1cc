# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""daemon.json as people leave it, answers of a Docker daemon that is none, its pull events and configuration files."""

from __future__ import annotations

import copy
import json
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._daemon_json import (
    edits,
    get_value,
    merge,
    parse,
    read,
    set_value,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_daemon import DockerDaemon
from ansible_collections.gpu_fleet.nim.plugins.module_utils._dockerd import flag_values, parse_exec_start, version_tuple
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_smoke_test import explain_failure, parse_gpu_list
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_services import engine, services
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_pull import PullProgress, progress_text
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_process_state import parse_container
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service_state import observe_services
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_container_toolkit_planner import configured_mode
from fake_host import FakeHost
from fuzzing import broken_json, damaged, encodable, json_text, mutated, only_told, texts, values
from hypothesis import assume, example, given
from hypothesis import strategies as st

PATH = "/etc/docker/daemon.json"
DAEMON: dict[str, t.Any] = {
    "log-driver": "journald",
    "runtimes": {"kata": {"path": "/opt/kata"}, "nvidia": {"path": "nvidia-container-runtime", "args": []}},
    "features": {"containerd-snapshotter": False, "buildkit": True},
    "default-address-pools": [{"base": "10.0.0.0/8", "size": 24}],
    "ключ": "значение",
    "empty": {},
}
keys = st.sampled_from(("live-restore", "features", "runtimes", "nvidia", "cdi", "default-runtime", "ключ", 'a"b', ""))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20).filter(str.isprintable),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)
paths = st.lists(keys, min_size=1, max_size=3).map(tuple)


@st.composite
def written(draw: st.DrawFn) -> str:
    """A valid daemon.json, in some person's or program's style."""
    document = draw(st.dictionaries(keys, plain, max_size=5)) if draw(st.booleans()) else dict(DAEMON)
    text = json.dumps(
        document,
        indent=draw(st.sampled_from((None, 0, 1, 2, 4, "\t"))),
        ensure_ascii=draw(st.booleans()),
        sort_keys=draw(st.booleans()),
        separators=draw(st.sampled_from(((",", ":"), (", ", ": "), (" , ", " : ")))),
    )
    text = draw(st.sampled_from(("", "\n", "  ", "\r\n"))) + text + draw(st.sampled_from(("", "\n", "\n\n", " ")))
    return text.replace("\n", "\r\n") if draw(st.booleans()) and "\n" in text else text


@given(written(), paths, plain)
def test_one_value_is_set_and_all_else_stays(text: str, path: tuple[str, ...], value: t.Any) -> None:
    before = parse(text)
    expected = copy.deepcopy(before)
    holder = expected
    for step in path[:-1]:
        inner = holder.get(step)
        # What is no object cannot hold a key: it is replaced.
        if not isinstance(inner, dict):
            inner = holder[step] = {}
        holder = inner
    holder[path[-1]] = value
    after = set_value(text, path, value)
    assert parse(after) == expected
    assert get_value(parse(after), path) == value
    assert list(parse(after))[: len(before)] == list(before)
    assert set_value(after, path, value) == after or parse(set_value(after, path, value)) == expected


@given(written(), st.lists(st.tuples(paths, plain), max_size=4))
def test_a_merge_is_complete_and_idempotent(text: str, changes: list[tuple[tuple[str, ...], t.Any]]) -> None:
    assume(len({path[0] for path, _value in changes}) == len(changes))
    once = merge(text, changes)
    assert merge(once, changes) == once
    for path, value in changes:
        assert get_value(parse(once), path) == value
    touched = {path[0] for path, _value in changes}
    for key, value in parse(text).items():
        if key not in touched:
            assert parse(once)[key] == value


@given(written(), st.dictionaries(keys, plain, max_size=3))
def test_what_is_to_be_edited_is_what_differs(text: str, wanted: dict[str, t.Any]) -> None:
    changes = edits(parse(text), wanted)
    merged = merge(text, changes)
    assert edits(parse(merged), wanted) == []
    if not changes:
        assert merged == text


def test_foreign_formatting_is_kept() -> None:
    text = '\ufeff{\r\n\t"a" :  1,\r\n\t"b":[1,\r\n2], "ü": "\\u00fc"}\r\n'
    after = set_value(text, ("live-restore",), True)
    for piece in ('"a" :  1', '"b":[1,\r\n2]', '"ü": "\\u00fc"'):
        assert piece in after
    assert parse(after) == {"a": 1, "b": [1, 2], "ü": "ü", "live-restore": True}


@given(damaged(json.dumps(DAEMON, indent=2), 4) | broken_json(DAEMON))
def test_any_daemon_json(text: str) -> None:
    """Broken files are refused and left alone; the resource says so in a sentence."""
    host = FakeHost({PATH: encodable(text)}, {"systemctl show *": "ActiveState=inactive\n"})
    with only_told():
        content, damage = read(host, PATH)
        if content is not None and not damage:
            parse(content, PATH)
    resource = DockerDaemon(options={"debug": True}, api=t.cast(t.Any, NoDocker()))
    with only_told():
        resource.plan(resource.observe(host))
    assert host.files[PATH] == encodable(text)


def test_a_key_that_stands_there_twice_is_refused() -> None:
    for text in ('{"a": 1, "a": 1}', '{"runtimes": {"x": {}, "x": {}}}'):
        with only_told():
            try:
                parse(text)
            except FleetError as error:
                assert "twice" in error.message
            else:
                raise AssertionError(text)


# -- the API ----------------------------------------------------------------------------------------------


class NoDocker(DockerApi):
    def get(self, path: str, parameters: t.Mapping[str, str] | None = None) -> t.Any:
        raise FleetError("docker_unavailable", "Nobody answers.")


class Strange(DockerApi):
    """Answers anything."""

    def __init__(self, answers: t.Mapping[str, t.Any]) -> None:
        super().__init__()
        self.answers = answers

    def get(self, path: str, parameters: t.Mapping[str, str] | None = None) -> t.Any:
        kind = path.strip("/").split("/")
        return self.answers["container" if len(kind) > 2 and kind[0] == "containers" else kind[0]]


INFO: dict[str, t.Any] = {
    "ServerVersion": "26.1.5+dfsg1",
    "CgroupDriver": "systemd",
    "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
    "Runtimes": {"nvidia": {"path": "nvidia-container-runtime"}},
    "DefaultRuntime": "runc",
    "LiveRestoreEnabled": True,
    "CDISpecDirs": ["/etc/cdi"],
    "RegistryConfig": {"IndexConfigs": {"x": {"Secure": False}}, "InsecureRegistryCIDRs": ["127.0.0.0/8"]},
    "Swarm": {"LocalNodeState": "inactive"},
    "Labels": [],
    "DockerRootDir": "/var/lib/docker",
}
LISTED = [
    {
        "Id": "a" * 64,
        "Names": ["/nim-llama"],
        "State": "running",
        "Labels": {"io.gpu-fleet.nim.spec": "x"},
        "Ports": [{"IP": "0.0.0.0", "PrivatePort": 8000, "PublicPort": 8000, "Type": "tcp"}],
    }
]
CONTAINER = {
    "Id": "a" * 64,
    "Name": "/nim-llama",
    "State": {
        "Status": "running",
        "Running": True,
        "Pid": 5,
        "ExitCode": 0,
        "Error": "",
        "StartedAt": "2026-01-01T00:00:00.5Z",
        "FinishedAt": "0001-01-01T00:00:00Z",
        "OOMKilled": False,
    },
    "Config": {"Labels": {"a": "b"}, "Env": ["A=b"], "Cmd": None},
    "HostConfig": {"Runtime": "nvidia", "DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]},
}
IMAGE = {
    "Id": "sha256:" + "b" * 64,
    "RepoDigests": ["nvcr.io/nim/meta/x@sha256:" + "c" * 64],
    "Size": 5,
    "Config": {"Env": ["NIM_X=1", "novalue"], "Labels": {"com.nvidia.nim.version": "1.8.4"}, "Cmd": ["start"]},
}


@given(mutated(INFO, 3), mutated(LISTED, 3), mutated(CONTAINER, 3), mutated(IMAGE, 3), values)
@example(INFO, [{}], CONTAINER, IMAGE, None)
def test_docker_that_answers_anything(
    info: t.Any, listed: t.Any, container: t.Any, image: t.Any, version: t.Any
) -> None:
    api = Strange(
        {
            "info": info,
            "containers": listed,
            "container": container,
            "images": image,
            "version": {"Version": version},
            "_ping": "OK",
            "events": "",
        }
    )
    host = FakeHost(
        {PATH: "{}", "/etc/nim/llama.json": '{"name": "llama"}'},
        {
            "systemctl show *": "Id=docker.service\nActiveState=active\nMainPID=7\nExecStart={ argv[]=/usr/bin/dockerd }\n",
            "dockerd *": "",
            "ss *": "",
        },
    )
    models = parse_models([{"name": "llama", "image": "nvcr.io/nim/meta/x:1", "gpus": 1}])
    with only_told():
        observe_services(host, api, models)
    with only_told():
        assert isinstance(engine(host, api), dict)
    with only_told():
        parse_container(api.container("x"))
    daemon = DockerDaemon(options={"debug": True, "runtimes": {"nvidia": {"path": "x"}}}, api=api)
    with only_told():
        daemon.plan(daemon.observe(host))


@given(values | broken_json({"name": "llama", "gpus": ["GPU-1"], "ready_url": "http://127.0.0.1:1/v1"}))
@example('{"name": "llama", "gpus": ["GPU-1"], "ready_url": "http://127..0.0.1:1/v1"}')
@example('{"name": "llama", "gpus": ["GPU-1"], "ready_url": "http:// 127.0.0.1:1/v1"}')
@example('{"name": "\\ud800", "gpus": ["GPU-1"], "ready_url": "http://127.0.0.1:1/v1"}')
def test_services_whose_files_were_broken(content: t.Any) -> None:
    text = content if isinstance(content, str) else json_text(content)
    host = FakeHost({"/etc/nim/llama.json": encodable(text), "/run/nim/llama.json": encodable(text)})
    # Nobody listens on port 9.
    host.files["/etc/nim/llama.json"] = host.files["/etc/nim/llama.json"].replace(b"8000", b"9")
    with only_told():
        found = services(host, t.cast(t.Any, NoDocker()))
        assert len(found) == 1


# -- what docker prints -----------------------------------------------------------------------------------

EVENT = {"status": "Downloading", "progressDetail": {"current": 10, "total": 100}, "id": "a1b2c3d4e5f6"}


@given(st.lists(mutated(EVENT), max_size=8))
def test_pull_events(events: list[t.Any]) -> None:
    progress = PullProgress({"sha256:a1b2c3d4e5f6" + "0" * 52: 50})
    for number, event in enumerate(events):
        if isinstance(event, dict):
            progress.feed(event)
        snapshot = progress.snapshot(float(number))
        assert 0 <= snapshot["percent"] <= 100
        assert 0 <= snapshot["bytes_done"] <= snapshot["bytes_total"]
        assert progress_text("x", snapshot)


@given(texts, damaged("GPU 0: NVIDIA H200 (UUID: GPU-6e1f0d6a-0f5b-4c3e-9d7a-1b2c3d4e5f60)\n" * 2))
def test_texts_of_programs(text: str, listing: str) -> None:
    with only_told():
        version_tuple(text)
        parse_exec_start(text)
        flag_values(text.split(" "))
        explain_failure(text)
        configured_mode(text)
        assert all(uuid.startswith(("GPU-", "MIG-")) for uuid in parse_gpu_list(listing))
