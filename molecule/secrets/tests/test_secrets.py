# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The NGC key is nowhere but in two files that only root reads, and in the memory of containers that fetch their model.

Those are a short-lived one for an image whose family is known, and the service itself for one that tells nothing. Neither
Docker nor containerd has it. A secret variable of a model ("token") is in its file and in its containers, nowhere else.

One host, from bare: check mode, two runs whose controller is killed, the run that finishes, one more, the other playbooks,
the modules that ask a registry, and a run with the key expired; all with -vvvv, all watched. Then everything is searched.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import secrets
import threading
from pathlib import Path
from typing import Any, Iterable, Iterator

import pytest
from control import World
from fleet_testing import CHECKOUT, SANDBOX, Fleet, Run

FLEET = Fleet("secrets")
HOST = FLEET.host("gpu01")
#: Where Ansible and the tests keep files from run to run.
KEPT = (CHECKOUT / ".build/ansible", SANDBOX / "ansible", SANDBOX / "run")
ALLOWED = {"key /root/.docker/config.json": "600", "key /etc/nim/ngc.env": "600", "token /etc/nim/llama.env": "600"}
#: What Docker and containerd write down about containers: their variables are in there, the key is not.
CONTAINERD = "/var/lib/containerd"
OF_CONTAINERS = ("/run/containerd/", "/run/docker/", CONTAINERD + "/", "/var/lib/docker/containers/")
#: The playbooks beside site, with their options.
OTHERS = {
    "plan": [],
    "preflight": [],
    "status": [],
    "diagnose": [],
    # Another setting, of the service that has a secret variable: it is started anew.
    "deploy": ["-e", "shm_size=17GB", "-e", "nim_deploy_min_ready=0"],
    "upgrade_drivers": ["--check", "-e", "nvidia_driver_branch=595", "-e", "driver_upgrade_min_ready=0"],
    "remove": ["--check"],
}
#: gateway has no NGC key; for its own secrets see scenario gateway. rollout is a part of two others.
ELSEWHERE = {"gateway", "rollout"}
_IMAGE = {"image": "{{ nim_models[0].image }}", "api_key": "{{ ngc_api_key }}"}
#: Modules with a key that no playbook calls.
ASK = [
    {
        "hosts": "gpu_hosts",
        "gather_facts": False,
        "become": True,
        "tasks": [
            {"name": "Ask for the image", "gpu_fleet.nim.nim_image_info": _IMAGE},
            {"name": "Ask for its profiles", "gpu_fleet.nim.nim_profile_info": {**_IMAGE, "method": "manifest"}},
        ],
    }
]


def needles(key: str) -> list[str]:
    """The key as it is and as base64 has it, whatever stands before it."""
    found = [key, base64.b64encode(("$oauthtoken:" + key).encode()).decode().rstrip("="), key.encode().hex()]
    for shift in range(3):
        # The first and the last characters depend on the neighbours of the key.
        found.append(base64.b64encode(b"\0" * shift + key.encode()).decode().rstrip("=")[4:-4])
    return found


@dataclasses.dataclass
class Evidence:
    """What the runs left behind, and what was seen while they ran."""

    key: str
    token: str
    runs: dict[str, Run] = dataclasses.field(default_factory=dict)
    watched: dict[str, Any] = dataclasses.field(default_factory=dict)
    searched: dict[str, Any] = dataclasses.field(default_factory=dict)
    controller: set[str] = dataclasses.field(default_factory=set)
    kept: set[str] = dataclasses.field(default_factory=set)
    controller_rounds: int = 0

    def ids(self, container: str) -> list[str]:
        """Every container of that name that was seen with the secret variable, or runs now."""
        seen = [what.split()[1] for what, name in self.watched["inspections"].items() if name == container]
        return [*seen, *(identifier for name, identifier in self.searched["identifiers"].items() if name == container)]

    @property
    def needles(self) -> dict[str, list[str]]:
        return {"key": needles(self.key), "token": needles(self.token)}


def _files(*directories: Path) -> Iterator[Path]:
    """Everything below, but no sockets and pipes: nobody may write to those."""
    for directory in directories:
        for top, dummy, names in os.walk(directory):
            yield from (Path(top) / name for name in names if (Path(top) / name).is_file())


def _with_secrets(evidence: Evidence, paths: Iterable[Path]) -> set[str]:
    wanted = [needle.encode() for texts in evidence.needles.values() for needle in texts]
    found = set()
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if any(needle in data for needle in wanted):
            found.add(str(path))
    return found


def _watch_controller(evidence: Evidence, directory: Path, stop: threading.Event) -> None:
    """Argument lists on this machine, and Ansible's temporary files."""
    while not stop.wait(0.05):
        evidence.controller_rounds += 1
        evidence.controller |= _with_secrets(evidence, [*Path("/proc").glob("[0-9]*/cmdline"), *_files(directory)])


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    world = World(SANDBOX)
    found = Evidence("nvapi-" + secrets.token_urlsafe(40), "hf_" + secrets.token_urlsafe(30))
    temporary = tmp_path_factory.mktemp("ansible")
    variables = tmp_path_factory.mktemp("vault") / "key.json"
    variables.touch(mode=0o600)
    variables.write_text(json.dumps({"ngc_api_key": found.key, "hf_token": found.token}), encoding="utf-8")
    environment = {"ANSIBLE_HOME": str(KEPT[0]), "ANSIBLE_LOCAL_TEMP": str(temporary), "NGC_API_KEY": ""}
    loud = ["-vvvv", "--diff", "-e", "@%s" % variables]
    world.set_key(found.key)
    stop = threading.Event()
    on_controller = threading.Thread(target=_watch_controller, args=(found, temporary, stop))
    try:
        request = {"mode": "watch", "needles": found.needles, "skip": []}
        with HOST.start_program("watch_host.py", request) as watcher:
            on_controller.start()

            def done(name: str, run: Run) -> None:
                found.runs[name] = run
                # The next run writes over some of it.
                found.kept |= _with_secrets(found, _files(*KEPT))

            def run(name: str, *options: str, succeeds: bool = True) -> None:
                done(name, FLEET.site(*loud, *options, succeeds=succeeds, environment=environment))

            def interrupted(name: str, moment: str, after: float) -> None:
                done(name, FLEET.play_until(moment, "site", *loud, after=after, environment=environment))

            run("check mode", "--check")
            interrupted("killed while packages are installed", r"TASK \[.*Install the NVIDIA driver", 5)
            interrupted("killed while the image is pulled", r"TASK \[.*Images are on the host", 1)
            run("finished")
            run("again")
            for playbook, options in OTHERS.items():
                done(playbook, FLEET.play(playbook, *loud, *options, environment=environment))
            asked = tmp_path_factory.mktemp("play") / "ask.yml"
            asked.write_text(json.dumps(ASK), encoding="utf-8")
            done("modules that ask", FLEET.play(asked, *loud, environment=environment))
            world.set_key(found.key, "expired")
            run("expired", "-e", "ngc_validate=always", succeeds=False)
            found.watched = json.loads(watcher.communicate()[0])
        stop.set()
        on_controller.join()
        request = {"mode": "search", "needles": found.needles, "skip": ["/proc", "/sys"]}
        found.searched = HOST.run_program("watch_host.py", request)
        yield found
    finally:
        stop.set()
        world.remove_key(found.key)


def test_interrupted_runs_are_finished_by_the_next(evidence: Evidence) -> None:
    for name in ("killed while packages are installed", "killed while the image is pulled"):
        assert evidence.runs[name].code < 0 and "PLAY RECAP" not in evidence.runs[name].output
    assert evidence.runs["finished"].code == 0
    assert evidence.runs["again"].changed() == []
    assert HOST.run("systemctl is-active nim-llama") == "active"
    assert HOST.run("dpkg --audit") == ""


def test_expired_key_is_told_before_anything_is_stopped(evidence: Evidence) -> None:
    run = evidence.runs["expired"]
    assert "nvcr.io" in run.failure(HOST.name)
    assert "TASK [gpu_fleet.nim.nim" not in run.output


def test_ansible_prints_no_key(evidence: Evidence) -> None:
    playbooks = {path.stem for path in (CHECKOUT / "playbooks").glob("*.yml")}
    assert playbooks == {"site", *OTHERS, *ELSEWHERE} and set(OTHERS) < set(evidence.runs)
    assert "nim-llama" in json.dumps(evidence.runs["deploy"].results) and evidence.runs["deploy"].changed()
    for name, run in evidence.runs.items():
        assert len(run.output) > 5000, "%s was not loud" % name
        # Other callback plugins store what a task has returned.
        said = run.output + json.dumps(run.results)
        assert [secret for secret, texts in evidence.needles.items() if any(t in said for t in texts)] == [], name


def test_no_key_on_the_controller(evidence: Evidence) -> None:
    assert evidence.controller_rounds > 50
    assert evidence.controller == set()
    # What is kept was found, and read: the packages of modules, and what the last run said.
    names = {path.name for path in _files(*KEPT)}
    assert {"output", "results.jsonl"} < names and any(
        name.startswith("ansible_collections.gpu_fleet") for name in names
    )
    assert evidence.kept == set()


def without_containers(files: dict[str, str]) -> dict[str, str]:
    """Findings without those of the token where Docker and containerd keep the variables of a container."""
    kept = {}
    for what, mode in files.items():
        name, path = what.split(" ", 1)
        if name != "token" or not path.startswith(OF_CONTAINERS):
            kept[what] = mode
    return kept


def test_no_key_in_arguments_and_files_while_it_runs(evidence: Evidence) -> None:
    assert evidence.watched["rounds"] > 50
    assert evidence.watched["arguments"] == {}
    found = evidence.watched["files"]
    # Where Docker and containerd keep variables was looked at, and meant: the token is there.
    assert any(what.startswith("token " + CONTAINERD) for what in found), sorted(found)
    # A file is written beside its place and then moved there, private from the start.
    passing = r"\w+ (/root/\.docker|/etc/nim)/\.(config\.json|(ngc|llama)\.env)\.\w+"
    # For the moment of a docker exec (does the container still have its GPUs?) runc is handed the container's variables.
    passing += r"|token /tmp/runc-process\d+"
    # As long as a deployment lasts it keeps the files of before, for the way back.
    passing += r"|\w+ /var/lib/gpu_fleet/(nim-deploy\.before|\.nim-deploy\.before\.\w+)"
    found = without_containers(found)
    assert {
        path: mode for path, mode in found.items() if not (re.fullmatch(passing, path) and mode == "600")
    } == ALLOWED


def test_only_containers_that_fetch_have_the_key_and_docker_does_not_know_it(evidence: Evidence) -> None:
    inspections = evidence.watched["inspections"]
    assert [what for what in inspections if what.startswith("key ")] == []
    assert {name for what, name in inspections.items() if what.startswith("token ")} == {
        "nim-llama",
        "nim-llama-download",
    }
    seen = set()
    for what, cgroup in evidence.watched["environments"].items():
        secret = what.split()[0]
        allowed = {
            "key": ["nim-llama-download", "nim-arctic"],
            "token": ["nim-llama", "nim-llama-download"],
        }[secret]
        holders = [name for name in allowed if any(identifier in cgroup for identifier in evidence.ids(name))]
        assert holders, (what, cgroup)
        seen.update((secret, name) for name in holders)
    # They have it: otherwise nothing was looked at.
    assert {("key", "nim-llama-download"), ("key", "nim-arctic"), ("token", "nim-llama")} <= seen


def test_a_service_that_fetches_by_itself_has_its_model(evidence: Evidence) -> None:
    assert evidence.runs["finished"].code == 0
    assert HOST.succeeds("test -n \"$(find /var/lib/nim/cache/arctic -name '*.safetensors')\"")
    assert HOST.ready(8001)


def test_afterwards_it_is_in_two_files_only(evidence: Evidence) -> None:
    searched = evidence.searched
    assert "nim-llama.service" in searched["unit_names"]
    assert sorted(searched["identifiers"]) == ["nim-arctic", "nim-llama"]
    assert without_containers(searched["files"]) == ALLOWED
    assert HOST.run("stat --format %%a %s" % CONTAINERD) == "700"
    assert searched["containers"] == ["token nim-llama"]
    assert searched["arguments"] == []
    holders = {"key": "nim-arctic", "token": "nim-llama"}
    for what in searched["environments"]:
        secret, cgroup = what.split(" ", 1)
        assert searched["identifiers"][holders[secret]] in cgroup, what
    assert (searched["units"], searched["journal"]) == ([], [])
    # No pipe is left that waits for a reader.
    assert HOST.run("find /run/nim -type p") == ""
