# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Image references: Docker's grammar, normalisation, mirrors."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference, check_mirrors
from hypothesis import given, settings
from hypothesis import strategies as st

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest"),
    [
        ("nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4", "nvcr.io", "nim/meta/llama-3.1-8b-instruct", "1.8.4", None),
        ("nvcr.io/nim/meta/x@" + DIGEST, "nvcr.io", "nim/meta/x", None, DIGEST),
        ("nvcr.io/nim/meta/x:1@" + DIGEST, "nvcr.io", "nim/meta/x", "1", DIGEST),
        ("mirror.example:5000/ngc/nim/x", "mirror.example:5000", "ngc/nim/x", "latest", None),
        ("localhost/x:1", "localhost", "x", "1", None),
        ("[::1]:5000/x:1", "[::1]:5000", "x", "1", None),
        ("ubuntu", "docker.io", "library/ubuntu", "latest", None),
        ("index.docker.io/ubuntu:24.04", "docker.io", "library/ubuntu", "24.04", None),
        ("vllm/vllm-openai:v0.9", "docker.io", "vllm/vllm-openai", "v0.9", None),
        ("a.b/x__y/z--w:_T.a-b", "a.b", "x__y/z--w", "_T.a-b", None),
    ],
)
def test_parse(text: str, registry: str, repository: str, tag: str | None, digest: str | None) -> None:
    assert ImageReference.parse(text) == ImageReference(registry, repository, tag, digest)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not an image reference"),
        (None, "not an image reference"),
        (5, "not an image reference"),
        ("https://nvcr.io/nim/x:1", "no scheme"),
        ("nvcr.io/nim/x :1", "white space"),
        ("nvcr.io/nim/x:1\n", "white space"),
        ("nvcr.io/nim/X:1", "lower case"),
        ("nvcr.io/nim//x:1", "malformed"),
        ("nvcr.io/nim/x_:1", "malformed"),
        ("nvcr.io/nim/x___y:1", "malformed"),
        ("nvcr.io/:1", "malformed"),
        ("nvcr.io/nim/x:", "not a tag"),
        ("nvcr.io/nim/x:-1", "not a tag"),
        ("nvcr.io/nim/x:" + "a" * 129, "not a tag"),
        ("nvcr.io/nim/x@sha256:abc", "not a digest"),
        ("nvcr.io/nim/x@", "not a digest"),
        ("nvcr.io/nim/x@" + DIGEST.upper(), "not a digest"),
        ("-a.b/x:1", "not a registry host"),
        ("a.b:port/x:1", "not a registry host"),
        ("a.b:0/x:1", "not a registry host"),
        ("a.b:65536/x:1", "not a registry host"),
        ("a.b:%s/x:1" % ("9" * 6000), "not a registry host"),
        ("nvcr.io/" + "a" * 260 + ":1", "exceed"),
    ],
)
def test_malformed(text: object, part: str) -> None:
    with pytest.raises(FleetError) as error:
        ImageReference.parse(text, "nim_models[0].image")
    assert error.value.reason == "invalid_option"
    assert error.value.message.startswith("nim_models[0].image = ")
    assert part in error.value.message


_component = st.from_regex(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*", fullmatch=True).filter(lambda x: len(x) < 30)


@settings(deadline=None)
@given(
    registry=st.sampled_from(["nvcr.io", "a-b.example:5000", "localhost", "[::1]:5000"]),
    path=st.lists(_component, min_size=1, max_size=4),
    tag=st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", fullmatch=True),
    digest=st.none() | st.just(DIGEST),
)
def test_round_trip(registry: str, path: list[str], tag: str | None, digest: str | None) -> None:
    reference = ImageReference(registry, "/".join(path), tag or (None if digest else "latest"), digest)
    assert ImageReference.parse(str(reference)) == reference


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_an_invalid_option(text: str) -> None:
    try:
        reference = ImageReference.parse(text)
    except FleetError as error:
        assert error.reason == "invalid_option"
        assert "\n" not in error.message
    else:
        assert ImageReference.parse(str(reference)) == reference


def test_with_digest_drops_the_tag() -> None:
    assert str(ImageReference.parse("nvcr.io/nim/x:1").with_digest(DIGEST)) == "nvcr.io/nim/x@" + DIGEST
    with pytest.raises(FleetError):
        ImageReference.parse("nvcr.io/nim/x:1").with_digest("sha256:12")


@pytest.mark.parametrize(
    ("mirrors", "expected"),
    [
        (None, "nvcr.io/nim/meta/x:1"),
        ({}, "nvcr.io/nim/meta/x:1"),
        ({"docker.io": "m.example"}, "nvcr.io/nim/meta/x:1"),
        ({"nvcr.i": "m.example"}, "nvcr.io/nim/meta/x:1"),
        ({"nvcr.io": "mirror.example:5000/ngc"}, "mirror.example:5000/ngc/nim/meta/x:1"),
        ({"nvcr.io": "mirror.example"}, "mirror.example/nim/meta/x:1"),
        ({"nvcr.io": "a.example", "nvcr.io/nim": "b.example/nims"}, "b.example/nims/meta/x:1"),
    ],
)
def test_rewritten(mirrors: dict[str, str] | None, expected: str) -> None:
    assert str(ImageReference.parse("nvcr.io/nim/meta/x:1").rewritten(mirrors)) == expected


@pytest.mark.parametrize(
    ("mirrors", "part"),
    [
        ("nvcr.io=mirror", "not a dictionary"),
        ({"nvcr.io": "https://mirror.example"}, "no scheme"),
        ({"nvcr.io": ""}, "not a registry host"),
        ({"nvcr.io": "mirror.example/UPPER"}, "not a registry host"),
        ({"nvcr.io": 5}, "not a registry host"),
        ({"nvcr.io": "mirror:65536/ngc"}, "not a registry host"),
    ],
)
def test_bad_mirrors(mirrors: object, part: str) -> None:
    with pytest.raises(FleetError) as error:
        check_mirrors(mirrors, "nim_registry_mirrors")
    assert part in error.value.message
    assert "nim_registry_mirrors" in error.value.message


@pytest.mark.parametrize(
    "text",
    ["ops:hunter2@mirror.example.org:5000/nim/x:1", "ops:hunter2@mirror.example.org/nim/x@sha256:1", "x:hunter2@y"],
)
def test_credentials_are_not_shown(text: str) -> None:
    for refuse in (
        lambda: ImageReference.parse(text),
        lambda: check_mirrors({"nvcr.io": text}),
        lambda: check_mirrors({text: "mirror.example.org"}),
        lambda: check_mirrors({"nvcr.io": "https://" + text}),
        lambda: check_mirrors({"nvcr.io": text.replace("@", "@https://")}),
        lambda: ImageReference.parse(text.replace("@", "@https://")),
        lambda: ImageReference.parse(text.replace("@", "://more@")),
        lambda: check_mirrors([text]),
    ):
        with pytest.raises(FleetError) as caught:
            refuse()
        assert "hunter2" not in caught.value.message


def test_good_mirrors() -> None:
    assert check_mirrors({"nvcr.io": "mirror.example:5000/ngc/"}) == {"nvcr.io": "mirror.example:5000/ngc"}
    assert check_mirrors(None) == {}
