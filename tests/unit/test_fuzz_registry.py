# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A registry, a login file and a key that may be anything; image references as people type them."""

from __future__ import annotations

import hashlib
import json
import ssl
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_config import decode_basic, stored_credentials
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_record import RECORD, read_record
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference, check_mirrors
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_key import (
    check_api_key,
    key_in_environment,
    render_environment,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_login import NgcLogin
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_family import detect_family, family_of_image
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import scrub
from ansible_collections.gpu_fleet.nim.plugins.module_utils._registry import (
    RegistryClient,
    parse_challenge,
    token_url,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._registry_refusals import Answer
from ansible_collections.gpu_fleet.nim.plugins.module_utils._requirements import evaluate
from ansible_collections.gpu_fleet.nim.plugins.module_utils._tls_errors import issuer_name
from fake_host import FakeHost
from fuzzing import broken_json, damaged, encodable, json_text, mutated, only_told, texts, values
from hypothesis import given
from hypothesis import strategies as st

KEY = "nvapi-very-secret-0123456789"
REFERENCE = ImageReference.parse("registry.example/nim/meta/x:1.8.4")
CHALLENGE = 'Bearer realm="https://registry.example/proxy_auth?scope=repository:nim/meta/x:pull",service="r"'
CONFIG = {
    "architecture": "amd64",
    "created": "2026-01-01T00:00:00Z",
    "config": {"Env": ["CUDA_VERSION=12.5.0", "X"], "Labels": {"com.nvidia.nim.version": "1.8.4"}},
}
MANIFEST = {
    "schemaVersion": 2,
    "config": {"digest": "sha256:" + "0" * 64},
    "layers": [{"digest": "sha256:" + "a" * 64, "size": 1000}],
}
INDEX = {
    "manifests": [
        {"digest": "sha256:" + "b" * 64, "platform": {"os": "linux", "architecture": "amd64"}},
        {"digest": "sha256:" + "c" * 64, "platform": {"os": "unknown", "architecture": "unknown"}},
    ]
}
TOKEN = {"token": "tkn", "expires_in": 300}
statuses = st.sampled_from((200, 200, 200, 201, 204, 301, 400, 401, 401, 402, 403, 404, 418, 429, 451, 500, 503, 599))


CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Strange(RegistryClient):
    """Answers what it was given, one after the other, and then the last one again."""

    def __init__(self, answers: t.Sequence[Answer], user: str = "$oauthtoken") -> None:
        super().__init__("registry.example", user, KEY, proxies={}, attempts=2, sleep=lambda seconds: None)
        self.answers = list(answers)

    def _context(self, directory: str) -> ssl.SSLContext:
        # Reading all the system's certificates takes longer than everything else.
        return CONTEXT

    def _exchange(
        self, url: str, headers: t.Mapping[str, str], name: str, form: t.Mapping[str, str] | None = None
    ) -> Answer:
        for value in headers.values():
            assert "\n" not in value
            assert "\r" not in value
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@st.composite
def answers(draw: st.DrawFn) -> list[Answer]:
    found = []
    for document in (TOKEN, INDEX, MANIFEST, CONFIG):
        if draw(st.booleans()):
            body = encodable(draw(damaged(json.dumps(draw(st.sampled_from((TOKEN, INDEX, MANIFEST, CONFIG)))))))
        else:
            body = json_text(draw(mutated(document))).encode()
        headers = {"www-authenticate": draw(damaged(CHALLENGE)), "retry-after": draw(texts)}
        if draw(st.booleans()):
            headers["docker-content-digest"] = draw(
                st.sampled_from(("sha256:" + hashlib.sha256(body).hexdigest(), "md5:1", ""))
            )
        found.append(Answer(draw(statuses), headers, body))
    return found


@given(answers())
def test_a_registry_that_answers_anything(given_answers: list[Answer]) -> None:
    for ask in (
        lambda client: client.resolve(REFERENCE, "amd64"),
        lambda client: client.compressed_sizes(REFERENCE),
        lambda client: client.check_credentials(),
        lambda client: client.check_credentials(REFERENCE),
    ):
        for user in ("$oauthtoken", "<token>"):
            with only_told():
                try:
                    ask(Strange(given_answers, user))
                except FleetError as error:
                    assert KEY not in error.message + repr(error.facts)
                    assert "\n" not in error.message
                    raise


def _answer(document: t.Any) -> Answer:
    body = json_text(document).encode()
    return Answer(200, {}, body)


@given(mutated(INDEX, 3), mutated(MANIFEST, 3), mutated(CONFIG, 3))
def test_documents_of_every_shape(index: t.Any, manifest: t.Any, config: t.Any) -> None:
    """Digests that agree, so that it comes to the contents."""
    last = _answer(config)
    if isinstance(manifest, dict) and isinstance(manifest.get("config"), dict) and "digest" in manifest["config"]:
        manifest["config"]["digest"] = "sha256:" + hashlib.sha256(last.body).hexdigest()
    middle = _answer(manifest)
    entries = index.get("manifests") if isinstance(index, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and "digest" in entry:
            entry["digest"] = "sha256:" + hashlib.sha256(middle.body).hexdigest()
    with only_told():
        image = Strange([_answer(index), middle, last]).resolve(REFERENCE, "amd64")
        assert image.compressed_size >= 0
        assert detect_family(image.labels, image.environment, "1.8.4").key
        evaluate(image.environment, "580.95.05", "13.0")
    with only_told():
        Strange([_answer(index), middle]).compressed_sizes(REFERENCE)


@given(texts, texts)
def test_headers(challenge: str, realm: str) -> None:
    scheme, parameters = parse_challenge(challenge)
    assert isinstance(scheme, str)
    token_url(parameters, "repository:x:pull")
    token_url({"realm": realm}, "repository:x:pull", "user")
    token_url({"realm": "http://[" + realm}, "repository:x:pull")


@given(st.binary(max_size=200))
def test_certificates(der: bytes) -> None:
    try:
        issuer_name(der)
    except (ValueError, IndexError):
        # Both are what the caller expects of a certificate that it cannot read.
        return


@given(texts)
def test_basic_credentials(text: str) -> None:
    found = decode_basic(text)
    assert found is None or len(found) == 2


# -- references -------------------------------------------------------------------------------------------

_words = st.sampled_from(
    (
        "nvcr.io",
        "nim",
        "meta",
        "x",
        "/",
        ":",
        "@",
        "1.8.4",
        "sha256:",
        "a" * 64,
        "LATEST",
        "..",
        "-",
        "_",
        " ",
        "localhost",
    )
)


@given(st.lists(_words | texts, max_size=8).map("".join) | values)
def test_references(text: t.Any) -> None:
    with only_told():
        reference = ImageReference.parse(text)
        again = ImageReference.parse(str(reference))
        assert again == reference
        assert reference.registry
        assert reference.repository
        assert str(reference) == str(reference).strip()
        assert ImageReference.parse(str(reference.with_digest("sha256:" + "0" * 64))).digest
        assert str(reference.rewritten({})) == str(reference)


@given(values | st.dictionaries(texts | st.just("nvcr.io"), texts | st.just("mirror.example:5000/ngc"), max_size=3))
def test_mirrors(mirrors: t.Any) -> None:
    with only_told():
        checked = check_mirrors(mirrors)
        ImageReference.parse("nvcr.io/nim/meta/x:1").rewritten(checked)


@given(values)
def test_images_of_every_shape(labels: t.Any) -> None:
    assert family_of_image({"Config": {"Labels": None, "Env": None}}).key
    if isinstance(labels, dict):
        text = {str(key): str(value) for key, value in labels.items()}
        assert detect_family(text, text, None).key


# -- logins, keys, records ----------------------------------------------------------------------------------

LOGIN = {"auths": {"nvcr.io": {"auth": "JG9hdXRodG9rZW46c2VjcmV0"}}, "credHelpers": {"x": "y"}, "credsStore": "z"}


@given(broken_json(LOGIN), texts, broken_json({"Username": "u", "Secret": "s"}))
def test_login_files(text: str, passwd: str, helper: str) -> None:
    host = FakeHost(
        {"/root/.docker/config.json": encodable(text), "/etc/passwd": "root:x:0:0:root:/root:/bin/bash\n" + "x:" + "y"},
        {"docker-credential-*": helper, "getent *": passwd},
    )
    for registry in ("nvcr.io", "x"):
        with only_told():
            found = stored_credentials(host, registry)
            assert found is None or all(isinstance(part, str) for part in found)
    with only_told():
        stored_credentials(host, "nvcr.io", "somebody")
    login = NgcLogin(api_key=KEY, validate=False)
    with only_told():
        try:
            changes = login.plan(login.observe(host))
        except FleetError as error:
            assert KEY not in error.message
            raise
        assert KEY not in repr([change.as_dict() for change in changes])
    assert host.files["/root/.docker/config.json"] == encodable(text)


@given(texts | values)
def test_keys(key: t.Any) -> None:
    with only_told():
        try:
            checked = check_api_key(key)
        except FleetError as error:
            assert not isinstance(key, str) or len(key) < 8 or key not in error.message
            raise
        assert key_in_environment(render_environment(checked)) == checked


@given(damaged("# comment\nNGC_API_KEY=%s\nOTHER=1\n" % KEY))
def test_key_files(text: str) -> None:
    found = key_in_environment(text)
    assert found is None or found


PINNED = {
    "schema": 1,
    "images": {"nvcr.io/nim/x:1": {"source": "nvcr.io/nim/x", "digest": "sha256:1", "image_id": "sha256:2"}},
}


@given(broken_json(PINNED))
def test_the_record_of_pinned_images(text: str) -> None:
    with only_told():
        for image, pinned in read_record(FakeHost({RECORD: encodable(text)})).items():
            assert isinstance(image, str)
            assert isinstance(pinned.run, str)


@given(st.lists(texts, max_size=4), texts)
def test_secrets_are_scrubbed_from_any_text(secrets: list[str], around: str) -> None:
    long = [secret for secret in [*secrets, KEY] if len(secret) >= 8]
    text = around + around.join(long) + around
    scrubbed = scrub(text, long)
    assert KEY not in scrubbed


@given(st.dictionaries(st.sampled_from(("NVIDIA_REQUIRE_CUDA", "CUDA_VERSION", "NVIDIA_DISABLE_REQUIRE")), texts))
def test_environments_of_images(environment: dict[str, str]) -> None:
    verdict = evaluate(environment, "535.183.01", "12.2", [("Tesla", None)])
    assert verdict.ok or verdict.message.endswith(".")
