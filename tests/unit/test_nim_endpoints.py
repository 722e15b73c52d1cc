# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one request that is sent to a model that says it is ready."""

from __future__ import annotations

import json

from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_services import services
from health_world import Nim, World, check

NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if the "
    "tokenizer does not define one."
)


def test_no_chat_template_falls_back_and_says_so(world: World, nim: Nim) -> None:
    nim.chat = (400, {"object": "error", "message": NO_TEMPLATE, "code": 400})
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    completion = outcome.models[0]["completion"]
    assert completion["kind"] == "completion"
    assert completion["text"] == "world"
    assert completion["note"] == "the model has no chat template; it answers on /v1/completions"


def test_embedding_needs_no_completion(world: World, nim: Nim) -> None:
    nim.chat = nim.plain = (404, {"detail": "Not Found"})
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["completion"]["kind"] == "none"
    assert outcome.models[0]["completion"]["note"] == "the model offers neither chat nor completions"


def test_service_without_model_list_is_ready(world: World, nim: Nim) -> None:
    nim.models = None
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    assert outcome.models[0]["ready"] is True
    assert outcome.models[0]["model_id"] is None


def test_completion_that_breaks_is_a_failure(world: World, nim: Nim) -> None:
    nim.chat = (500, {"error": {"message": "EngineDeadError with nvapi-abcdefghijkl"}})
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port}])
    failure = outcome.failures[0][1]
    assert failure.reason == "completion_failed"
    assert "/v1/chat/completions (HTTP 500: EngineDeadError with ***)" in failure.sentence


def test_a_failed_completion_is_remembered(world: World, nim: Nim) -> None:
    sound = nim.chat
    nim.chat = (500, {"error": {"message": "EngineDeadError with nvapi-abcdefghijkl"}})
    world.unit("a")
    world.box("a")
    entry = {"name": "a", "port": nim.port}
    first, dummy = check(world, [entry])
    assert b"nvapi-" not in world.files["/run/gpu_fleet/health/a.json"]
    asked = nim.requests.count("/v1/chat/completions")
    look, dummy = check(world, [entry], wait=False, record=False)
    assert look.models[0]["ready"] is False
    assert (look.models[0]["reason"], look.models[0]["message"]) == (
        "completion_failed",
        first.models[0]["message"],
    )
    # It is another question that failed.
    for other in ("none", "completion"):
        assert check(world, [{**entry, "completion": other}], wait=False, record=False)[0].models[0]["ready"]
    assert nim.requests.count("/v1/chat/completions") == asked
    url = "http://127.0.0.1:%d/v1/health/ready" % nim.port
    world.files["/etc/nim/a.json"] = json.dumps({"name": "a", "ready_url": url}).encode()
    [status] = services(world, world)
    assert (status["ready"], status["state"]) == (False, "completion failed")
    # Who may ask does, and a success takes the failure's place.
    assert check(world, [entry])[0].failures
    nim.chat = sound
    assert check(world, [entry])[0].models[0]["completion"]["ok"]
    assert check(world, [entry], wait=False, record=False)[0].models[0]["ready"]
    nim.chat = (500, {})
    assert check(world, [entry])[0].models[0]["ready"]


def test_a_failed_completion_of_another_container_does_not_count(world: World, nim: Nim) -> None:
    nim.chat = (500, {})
    world.unit("a")
    world.box("a")
    entry = {"name": "a", "port": nim.port}
    assert check(world, [entry])[0].failures
    world.box("a", box_id="c2")
    assert check(world, [entry], wait=False, record=False)[0].models[0]["ready"]


def test_completion_none_sends_nothing(world: World, nim: Nim) -> None:
    world.unit("a")
    world.box("a")
    check(world, [{"name": "a", "port": nim.port, "completion": "none"}])
    assert not any("completions" in path for path in nim.requests)


def test_chat_that_was_asked_for_is_explained_with_the_endpoint_that_works(world: World, nim: Nim) -> None:
    nim.chat = (400, {"object": "error", "message": NO_TEMPLATE, "code": 400})
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port, "completion": "chat"}])
    failure = outcome.failures[0][1]
    assert (failure.reason, failure.signature) == ("completion_failed", "eng-32")
    assert "(the model has no chat template; it answers on /v1/completions); ask it there and set" in failure.sentence


def test_chat_that_was_asked_for_where_nothing_works(world: World, nim: Nim) -> None:
    nim.chat = (400, {"message": "no such model"})
    nim.plain = (400, {"message": "no such model either"})
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port, "completion": "chat"}])
    assert "(HTTP 400: no such model); see 'journalctl" in outcome.failures[0][1].sentence
