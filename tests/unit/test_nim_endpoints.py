# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one request that is sent to a model that says it is ready."""

from __future__ import annotations

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
    assert failure.reason == "completion_failed"
    assert "(the model has no chat template; it answers on /v1/completions); ask it there and set" in failure.sentence


def test_chat_that_was_asked_for_where_nothing_works(world: World, nim: Nim) -> None:
    nim.chat = (400, {"message": "no such model"})
    nim.plain = (400, {"message": "no such model either"})
    world.unit("a")
    world.box("a")
    outcome, dummy = check(world, [{"name": "a", "port": nim.port, "completion": "chat"}])
    assert "(HTTP 400: no such model); see 'journalctl" in outcome.failures[0][1].sentence
