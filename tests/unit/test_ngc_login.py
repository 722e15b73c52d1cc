# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The NGC key and the Docker configuration it is stored in."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _docker_api
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_config import stored_credentials
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_reference import ImageReference
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_key import (
    check_api_key,
    fingerprint,
    key_in_environment,
    printable,
    render_environment,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_login import NgcLogin
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_login_record import RECORD
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Outcome, converge
from ansible_collections.gpu_fleet.nim.plugins.modules import ngc_login
from fake_host import FakeHost

KEY = "nvapi-AbC_def-0123456789"
NEW = "nvapi-new-0123456789-0123456789"
PATH = "/root/.docker/config.json"
PASSWD = "root:x:0:0:root:/root:/bin/bash\nalice:x:1000:1001:Alice:/home/alice:/bin/bash\nnohome:x:5:5::nohome:/x\n"


class FakeRegistry:
    """Stands in for RegistryClient; ``refuse`` is the reason of every answer."""

    refuse: t.ClassVar[str] = ""
    asked: t.ClassVar[list[tuple[str, ...]]] = []

    options: t.ClassVar[dict[str, t.Any]] = {}

    def __init__(self, registry: str, username: str, password: str, **options: t.Any) -> None:
        self.who = (registry, username, password)
        FakeRegistry.options = options

    def check_credentials(self, reference: ImageReference | None = None) -> None:
        self.asked.append((*self.who, str(reference or "")))
        if self.refuse:
            raise FleetError(self.refuse, "The registry refuses.")


@pytest.fixture(autouse=True)
def registry() -> type[FakeRegistry]:
    FakeRegistry.refuse = ""
    FakeRegistry.asked.clear()
    return FakeRegistry


@pytest.fixture
def host() -> FakeHost:
    found = FakeHost(files={"/etc/passwd": PASSWD})
    found.dirs |= {"/root", "/home/alice"}
    return found


def _auth(user: str, secret: str) -> str:
    return base64.b64encode(("%s:%s" % (user, secret)).encode()).decode()


def _login(key: str | None = KEY, **options: t.Any) -> NgcLogin:
    return NgcLogin(key, client=t.cast(t.Any, FakeRegistry), **options)


def _run(host: FakeHost, key: str | None = KEY, **options: t.Any) -> Outcome[t.Any]:
    outcome = converge(host, _login(key, **options), check_mode=False)
    printed = repr([change.as_dict() for change in outcome.changes]) + repr([c.diff for c in outcome.changes])
    printed += repr(outcome.changes) + repr(outcome.state)
    for secret in (KEY, NEW):
        assert secret not in printed
        assert _auth("$oauthtoken", secret) not in printed
    return outcome


# -- the key ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("", "empty"),
        (None, "no text"),
        (5, "no text"),
        (KEY + "\n", "line break"),
        (KEY[:9] + "\r\n" + KEY[9:], "line break"),
        (" " + KEY, "white space"),
        ("nvapi-a b-0123456789", "white space"),
        ('"%s"' % KEY, "quotes"),
        ("'%s" % KEY, "quotes"),
        ("{{ vault_key }}", "white space"),
        ("{{vault_key}}", "template"),
        ("$oauthtoken:" + KEY, "user name"),
        ("nvapi-schlüssel-0123", "characters"),
        ("nvapi-\x00-0123456789", "characters"),
        ("nvapi-", "too short"),
    ],
)
def test_bad_keys(key: t.Any, part: str) -> None:
    with pytest.raises(FleetError) as error:
        check_api_key(key, "ngc_api_key")
    assert error.value.reason == "invalid_option"
    assert error.value.message.startswith("ngc_api_key = (not shown): ")
    assert part in error.value.message
    if isinstance(key, str) and len(key) > 8:
        assert key not in error.value.message
        assert KEY not in error.value.message


@pytest.mark.parametrize("key", [KEY, "bGVnYWN5LWtleS1vZi1uZ2M6MDEyMw==", "a" * 84])
def test_good_keys(key: str) -> None:
    assert check_api_key(key) == key
    assert key_in_environment(render_environment(key)) == key


def test_key_in_environment() -> None:
    assert key_in_environment(None) is None
    assert key_in_environment("# NGC_API_KEY=x\nOTHER=1\nNGC_API_KEY=\n") is None


def test_fingerprint() -> None:
    assert fingerprint("test") == "sha256:9f86d081884c"


@pytest.mark.parametrize("secret", [KEY, NEW, "nvapi-" + "x_-9" * 16, "dTlsYm4xMjM0NTY3ODkw" * 4 + "Zm9v"])
def test_a_key_of_ngc_is_shown_as_a_fingerprint(secret: str) -> None:
    assert printable(secret) == fingerprint(secret)


@pytest.mark.parametrize(
    "secret", ["", "hunter2", "nvapi-hunter2", "correct-horse-battery-staple", "a" * 83, KEY + " x"]
)
def test_a_password_that_could_be_guessed_has_no_fingerprint(secret: str) -> None:
    assert printable(secret) is None


# -- storing ----------------------------------------------------------------------------------------------


def test_first_login_then_nothing(host: FakeHost) -> None:
    outcome = _run(host)
    assert outcome.changed
    assert json.loads(host.files[PATH]) == {"auths": {"nvcr.io": {"auth": _auth("$oauthtoken", KEY)}}}
    assert host.modes[PATH] == (0o600, 0, 0)
    assert host.modes["/root/.docker"] == (0o700, 0, 0)
    assert FakeRegistry.asked == [("nvcr.io", "$oauthtoken", KEY, "")]
    assert _login().result(outcome.state)["login"]["fingerprint"] == fingerprint(KEY)
    assert not _run(host).changed
    # Nothing to do: the registry was not asked again.
    assert len(FakeRegistry.asked) == 1


def test_a_refused_key_changes_nothing(host: FakeHost, registry: type[FakeRegistry]) -> None:
    _run(host)
    before = dict(host.files)
    registry.refuse = "bad_key"
    with pytest.raises(FleetError) as error:
        _run(host, NEW)
    assert error.value.reason == "bad_key"
    assert NEW not in repr(error.value.facts) + error.value.message
    assert host.files == before


def test_rotation_shows_as_fingerprints(host: FakeHost) -> None:
    _run(host)
    (change,) = _run(host, NEW).changes
    assert change.before == "$oauthtoken " + fingerprint(KEY)
    assert change.after == "$oauthtoken " + fingerprint(NEW)
    assert change.diff is not None
    assert change.diff.after == "nvcr.io: $oauthtoken %s\n" % fingerprint(NEW)


def test_of_a_password_nothing_is_shown_from_which_it_could_be_guessed(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of the one that is given nor of the one that somebody else has stored before."""
    theirs, ours = "letmein", "hunter2"
    host.files[PATH] = json.dumps({"auths": {"mirror:5000": {"auth": _auth("them", theirs)}}}).encode()
    run = functools.partial(_module, host, monkeypatch, capsys, registry="mirror:5000")
    given: dict[str, t.Any] = {"username": "them", "api_key": ours}
    check, real, again = run(True, **given), run(False, **given), run(False, **given)
    gone = run(False, state="absent")
    for result in (check, real, again, gone):
        for secret in (theirs, ours):
            assert fingerprint(secret) not in json.dumps(result)
            assert secret not in json.dumps(result)
    assert check["changes"] == real["changes"]
    change = real["changes"][0]
    assert (change["from"], change["to"]) == ("them, a password", "them, the password that is given")
    assert real["diff"][0]["after"] == "mirror:5000: them, the password that is given\n"
    assert again["changed"] is False
    assert again["login"]["fingerprint"] is None
    assert [change["from"] for change in gone["changes"]] == ["them, a password"]


def test_everything_else_is_kept(host: FakeHost) -> None:
    others = {
        "auths": {"docker.io": {"auth": _auth("me", "pw")}, "mirror:5000": {"identitytoken": "id-token"}},
        "proxies": {"default": {"httpProxy": "http://u:p@proxy"}},
        "détachKeys": "ctrl-x",
    }
    host.files[PATH] = json.dumps(others).encode()
    (change, *_rest) = _run(host).changes
    written = json.loads(host.files[PATH])
    assert written["auths"].pop("nvcr.io")
    assert written == others
    for secret in ("pw", "id-token", "u:p@proxy", _auth("me", "pw")):
        assert secret not in repr(change.diff)


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"auths": []}', '{"credsStore": 5}', '{"credHelpers": "x"}'])
def test_a_broken_file_is_left_alone(host: FakeHost, content: str) -> None:
    host.files[PATH] = content.encode()
    with pytest.raises(FleetError) as error:
        _run(host)
    assert error.value.reason == "docker_config_unreadable"
    assert host.files[PATH] == content.encode()


@pytest.mark.parametrize("content", ["", "  \n"])
def test_an_empty_file_is_like_none(host: FakeHost, content: str) -> None:
    host.files[PATH] = content.encode()
    assert _run(host).changed


def test_another_user(host: FakeHost) -> None:
    _run(host, docker_user="alice")
    assert host.modes["/home/alice/.docker/config.json"] == (0o600, 1000, 1001)
    assert host.modes["/home/alice/.docker"] == (0o700, 1000, 1001)


@pytest.mark.parametrize("link", ["/home/alice/.docker", "/home/alice/.docker/config.json"])
def test_root_follows_no_link_of_another_user(host: FakeHost, link: str) -> None:
    host.links[link] = "/etc"
    with pytest.raises(FleetError) as error:
        _run(host, docker_user="alice")
    assert error.value.reason == "unsafe_path"
    assert not [path for path in host.files if path.startswith("/home")]


def test_users_of_a_directory_service(host: FakeHost) -> None:
    host.commands["getent passwd ldap"] = "ldap:*:7000:7000::/srv/ldap:/bin/sh\n"
    host.dirs.add("/srv/ldap")
    _run(host, docker_user="ldap")
    assert "/srv/ldap/.docker/config.json" in host.files


@pytest.mark.parametrize("user", ["nobody-here", "nohome"])
def test_no_such_user(host: FakeHost, user: str) -> None:
    with pytest.raises(FleetError) as error:
        _run(host, docker_user=user)
    assert error.value.reason == "no_such_user"


def test_permissions_are_mended(host: FakeHost) -> None:
    _run(host)
    host.modes[PATH] = (0o644, 0, 0)
    host.modes["/root/.docker"] = (0o755, 0, 0)
    outcome = _run(host)
    assert [change.what for change in outcome.changes] == ["permissions of /root/.docker", "permissions of " + PATH]
    assert host.modes[PATH] == (0o600, 0, 0)
    assert host.modes["/root/.docker"] == (0o700, 0, 0)
    assert not _run(host).changed


# -- credential helpers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "key"),
    [({"credsStore": "pass"}, "credsStore"), ({"credHelpers": {"nvcr.io": "pass"}}, "credHelpers")],
)
def test_a_credential_helper_is_not_written_beside(host: FakeHost, content: dict[str, t.Any], key: str) -> None:
    host.files[PATH] = json.dumps(content).encode()
    with pytest.raises(FleetError) as error:
        _run(host)
    assert error.value.reason == "credential_helper"
    assert "docker-credential-pass" in error.value.message
    assert key in error.value.message
    assert json.loads(host.files[PATH]) == content
    # It has the key already: nothing to do, and others read it from there.
    host.commands["docker-credential-pass get"] = json.dumps({"Username": "$oauthtoken", "Secret": KEY})
    host.modes["/root/.docker"] = (0o755, 0, 0)
    assert not _run(host).changed
    assert stored_credentials(host, "nvcr.io") == ("$oauthtoken", KEY)


def test_the_helper_of_another_registry_is_no_matter(host: FakeHost) -> None:
    host.files[PATH] = b'{"credHelpers": {"gcr.io": "gcloud"}}'
    assert _run(host).changed


# -- no key, absent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, ""])
def test_no_key_is_fine(host: FakeHost, key: str | None) -> None:
    outcome = _run(host, key)
    assert not outcome.changed
    assert "only public images" in _login(key).result(outcome.state)["message"]
    assert FakeRegistry.asked == []
    _run(host)
    assert "left as it is" in _login(key).result(_run(host, key).state)["message"]


def test_absent(host: FakeHost) -> None:
    host.files[PATH] = json.dumps(
        {"auths": {"nvcr.io": {"auth": _auth("$oauthtoken", KEY)}, "https://nvcr.io": {}, "xnvcr.io": {"auth": "eDp5"}}}
    ).encode()
    assert _run(host, None, state="absent").changed
    assert json.loads(host.files[PATH]) == {"auths": {"xnvcr.io": {"auth": "eDp5"}}}
    assert not _run(host, None, state="absent").changed
    assert FakeRegistry.asked == []


def test_a_file_that_holds_nothing_any_more_goes(host: FakeHost) -> None:
    _run(host)
    assert _run(host, None, state="absent").changed
    assert PATH not in host.files
    assert PATH.rsplit("/", 1)[0] not in host.dirs
    assert not _run(host, None, state="absent").changed


def test_a_file_with_other_settings_stays(host: FakeHost) -> None:
    host.files[PATH] = json.dumps({"auths": {"nvcr.io": {"auth": _auth("$oauthtoken", KEY)}}, "psFormat": "x"}).encode()
    assert _run(host, None, state="absent").changed
    assert json.loads(host.files[PATH]) == {"auths": {}, "psFormat": "x"}


def test_absent_on_a_bare_host(host: FakeHost) -> None:
    assert not _run(host, None, state="absent").changed
    assert PATH not in host.files


# -- only what is ours ------------------------------------------------------------------------------------


def _take_back(host: FakeHost, key: str | None = None, **options: t.Any) -> Outcome[t.Any]:
    return _run(host, key, state="absent", only_ours=True, **options)


def _left(host: FakeHost, key: str | None = None, **options: t.Any) -> str:
    """What taking back says that it has left."""
    login = _login(key, state="absent", only_ours=True, **options)
    return str(login.result(converge(host, login, check_mode=False).state)["message"])


def test_what_we_have_stored_is_ours(host: FakeHost) -> None:
    """Without its key: the host remembers."""
    _run(host)
    assert host.modes[RECORD] == (0o600, 0, 0)
    (change,) = _take_back(host).changes
    assert (change.before, change.after) == ("$oauthtoken " + fingerprint(KEY), None)
    assert PATH not in host.files
    assert RECORD not in host.files
    assert not _take_back(host).changed
    assert _left(host) == ""


def test_the_record_says_nothing_about_the_key(host: FakeHost) -> None:
    _run(host)
    record = host.files[RECORD].decode()
    for text in (KEY, _auth("$oauthtoken", KEY)):
        assert text not in record
        assert hashlib.sha256(text.encode()).hexdigest()[:12] not in record
    # Another random key on another host; and no name by which a support bundle would take it along.
    other = FakeHost(files={"/etc/passwd": PASSWD})
    other.dirs.add("/root")
    _run(other)
    assert other.files[RECORD] != host.files[RECORD]
    assert not RECORD.endswith(".json")


@pytest.mark.parametrize("key", [None, "", NEW, KEY + "\n"])
def test_the_login_of_somebody_else_stays(host: FakeHost, key: str | None) -> None:
    """Who uses public images only may have logged in by hand."""
    host.files[PATH] = json.dumps({"auths": {"nvcr.io": {"auth": _auth("$oauthtoken", KEY)}}}).encode()
    before = dict(host.files)
    assert not _run(host, None).changed
    assert not _take_back(host, key).changed
    assert host.files == before
    message = _left(host, key)
    assert PATH in message
    assert "'docker logout nvcr.io' as root" in message


def test_a_login_that_came_after_ours_stays(host: FakeHost) -> None:
    _run(host)
    host.files[PATH] = json.dumps({"auths": {"nvcr.io": {"auth": _auth("$oauthtoken", NEW)}}}).encode()
    assert not _take_back(host).changed
    assert b"auth" in host.files[PATH]


def test_the_key_of_the_inventory_is_ours(host: FakeHost) -> None:
    """Stored before there was a record, or the record is lost."""
    _run(host)
    del host.files[RECORD]
    assert not _take_back(host, KEY, username="other").changed
    assert _take_back(host, KEY).changed
    assert PATH not in host.files


def test_a_rotated_key_is_ours(host: FakeHost) -> None:
    _run(host)
    _run(host, NEW)
    assert _take_back(host).changed
    assert PATH not in host.files


def test_a_rotation_that_was_interrupted(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(host)

    def dies(*_arguments: t.Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NgcLogin, "_write", dies)
        with pytest.raises(KeyboardInterrupt):
            _run(host, NEW)
    assert stored_credentials(host, "nvcr.io") == ("$oauthtoken", KEY)
    assert _take_back(host).changed
    assert PATH not in host.files


def test_a_login_of_somebody_else_that_we_replaced_does_not_become_ours(host: FakeHost) -> None:
    theirs = json.dumps({"auths": {"nvcr.io": {"auth": _auth("$oauthtoken", KEY)}}}).encode()
    host.files[PATH] = theirs
    _run(host, NEW)
    host.files[PATH] = theirs
    assert not _take_back(host).changed


def test_registries_and_users_are_told_apart(host: FakeHost) -> None:
    _run(host)
    _run(host, "password", registry="mirror:5000", username="me")
    _run(host, docker_user="alice")
    assert not _take_back(host, registry="other:5000").changed
    assert _take_back(host).changed
    assert stored_credentials(host, "mirror:5000") == ("me", "password")
    assert stored_credentials(host, "nvcr.io", "alice") == ("$oauthtoken", KEY)
    assert _take_back(host, registry="mirror:5000").changed
    assert PATH not in host.files
    assert _take_back(host, docker_user="alice").changed
    assert RECORD not in host.files


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"key": "xx", "logins": {}}',
        b'{"key": 5, "logins": []}',
        b'{"key": "ab", "logins": {"root nvcr.io": 5}}',
        b'{"key": "ab", "logins": {"root nvcr.io": null}}',
        b'{"key": "ab", "logins": {"root nvcr.io": [null]}}',
    ],
)
def test_a_broken_record_is_told_and_left(host: FakeHost, content: bytes) -> None:
    _run(host)
    host.files[RECORD] = content
    # What is right already does not need it.
    assert not _run(host).changed
    # What is stored must be noted there: refused before anything.
    before = dict(host.files)
    for ask in (lambda: _run(host, NEW), lambda: _login(NEW).precheck(host)):
        with pytest.raises(FleetError) as caught:
            ask()
        assert caught.value.reason == "state_unreadable"
        assert caught.value.message.startswith("Reading %s failed: it is not what this collection writes (" % RECORD)
    # Nothing is taken away that may be somebody else's, which is said; with its key, or whoever it is of, it goes.
    assert not _take_back(host).changed
    said = _left(host)
    assert said.startswith("Reading %s failed: " % RECORD)
    assert "is not known to be stored by this collection, so it is left" in said
    assert host.files == before
    assert _take_back(host, KEY).changed
    assert _left(host).startswith("Reading %s failed: " % RECORD) and "so it is left;" not in _left(host)
    assert host.files[RECORD] == content


def test_a_plain_logout_with_a_broken_record(host: FakeHost) -> None:
    _run(host)
    host.files[RECORD] = b"{"
    logout = _login(None, state="absent")
    outcome = converge(host, logout, check_mode=False)
    assert outcome.changed and PATH not in host.files
    assert RECORD in logout.result(outcome.state)["message"]
    assert host.files[RECORD] == b"{"


def test_a_login_that_is_there_already_is_not_written_down(host: FakeHost) -> None:
    host.files[PATH] = json.dumps({"auths": {"nvcr.io": {"auth": _auth("$oauthtoken", KEY)}}}).encode()
    host.modes[PATH] = (0o600, 0, 0)
    host.modes["/root/.docker"] = (0o700, 0, 0)
    assert not _run(host).changed
    assert RECORD not in host.files


def test_plainly_absent_forgets(host: FakeHost) -> None:
    _run(host)
    assert _run(host, None, state="absent").changed
    assert RECORD not in host.files


@pytest.mark.parametrize("content", [{"credsStore": "pass"}, {"credHelpers": {"nvcr.io": "pass"}}])
def test_what_a_credential_helper_has_stays_and_holds_nothing_up(host: FakeHost, content: dict[str, t.Any]) -> None:
    # Docker leaves an empty entry beside a helper.
    host.files[PATH] = json.dumps({**content, "auths": {"nvcr.io": {}}}).encode()
    before = dict(host.files)
    assert _left(host, KEY) == ""
    host.commands["docker-credential-pass get"] = json.dumps({"Username": "$oauthtoken", "Secret": KEY})
    assert not _take_back(host, KEY).changed
    assert host.files == before
    assert "docker-credential-pass" in _left(host, KEY)


def test_what_we_stored_before_there_was_a_helper_goes(host: FakeHost) -> None:
    _run(host)
    content = {"credsStore": "pass", **json.loads(host.files[PATH])}
    host.files[PATH] = json.dumps(content).encode()
    host.commands["docker-credential-pass get"] = json.dumps({"Username": "me", "Secret": "theirs"})
    (change,) = _take_back(host).changes
    assert change.before == "$oauthtoken " + fingerprint(KEY)
    assert json.loads(host.files[PATH]) == {"credsStore": "pass", "auths": {}}
    assert "docker-credential-pass" in _left(host)


def test_ours_goes_and_the_same_registry_under_another_name_stays(host: FakeHost) -> None:
    _run(host)
    content = json.loads(host.files[PATH])
    content["auths"]["https://nvcr.io"] = {"identitytoken": "theirs"}
    host.files[PATH] = json.dumps(content).encode()
    assert _take_back(host).changed
    assert json.loads(host.files[PATH]) == {"auths": {"https://nvcr.io": {"identitytoken": "theirs"}}}
    assert "docker logout https://nvcr.io" in _left(host)


def test_module_takes_back_only_ours(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = functools.partial(_module, host, monkeypatch, capsys)
    run(False, api_key=KEY)
    files = dict(host.files)
    back: dict[str, t.Any] = {"state": "absent", "only_ours": True}
    check_1 = run(True, **back)
    assert host.files == files
    real_1, check_2, real_2 = run(False, **back), run(True, **back), run(False, **back)
    assert [found["changed"] for found in (check_1, real_1, check_2, real_2)] == [True, True, False, False]
    assert check_1["changes"] == real_1["changes"]
    before = "nvcr.io: $oauthtoken %s\n" % fingerprint(KEY)
    assert check_1["diff"] == real_1["diff"]
    assert real_1["diff"] == [{"before_header": PATH, "after_header": PATH, "before": before, "after": ""}]
    assert not any(found.get("warnings") for found in (check_1, real_1, check_2, real_2))

    host.dirs.add("/root/.docker")
    host.files[PATH] = json.dumps({"auths": {"nvcr.io": {"auth": _auth("$oauthtoken", NEW)}}}).encode()
    for check in (True, False):
        found = run(check, api_key=KEY, **back)
        assert found["changed"] is False
        assert "was not stored by this collection" in json.dumps(found["warnings"])
    assert host.files[PATH]
    assert run(False, api_key=KEY, only_ours=True)["reason"] == "invalid_option"


# -- options ----------------------------------------------------------------------------------------------


def test_entitlement_is_checked_for_the_repository(host: FakeHost, registry: type[FakeRegistry]) -> None:
    _run(host, check_repository="nim/meta/x:1")
    assert registry.asked[-1][3] == "nvcr.io/nim/meta/x:1"
    registry.refuse = "no_entitlement"
    with pytest.raises(FleetError, match="refuses"):
        _run(host, NEW, check_repository="nim/meta/x:1")
    # Without a tag, that tag "latest" is absent proves that the repository can be read.
    registry.refuse = "no_such_tag"
    assert _run(host, NEW, check_repository="nim/meta/x").changed
    with pytest.raises(FleetError, match="refuses"):
        _run(host, KEY, check_repository="nim/meta/x:1")


def test_never_validated(host: FakeHost) -> None:
    _run(host, validate="never")
    assert FakeRegistry.asked == []


@pytest.mark.parametrize(
    "options",
    [
        {"registry": "https://nvcr.io"},
        {"registry": "nvcr.io/nim"},
        {"registry": "no such host"},
        {"docker_user": "a:b"},
        {"docker_user": ""},
        {"username": "a:b"},
        {"username": ""},
        {"state": "here"},
        {"check_repository": "UPPER"},
    ],
)
def test_bad_options(options: dict[str, str]) -> None:
    with pytest.raises(FleetError) as error:
        _login(**options)
    assert error.value.reason == "invalid_option"


def test_passwords_of_other_registries_may_be_anything(host: FakeHost) -> None:
    _run(host, "p w'\"ß", registry="mirror:5000", username="me")
    assert stored_credentials(host, "mirror:5000") == ("me", "p w'\"ß")
    with pytest.raises(FleetError):
        _login("a\nb", username="me")


def test_stored_credentials(host: FakeHost) -> None:
    assert stored_credentials(host, "nvcr.io") is None
    _run(host)
    assert stored_credentials(host, "nvcr.io") == ("$oauthtoken", KEY)
    host.files[PATH] = b'{"auths": {"nvcr.io": {"auth": "***"}}}'
    assert stored_credentials(host, "nvcr.io") is None
    host.files[PATH] = b'{"auths": {"nvcr.io": {"username": "a", "password": "b"}}}'
    assert stored_credentials(host, "nvcr.io") == ("a", "b")


@pytest.mark.parametrize(
    "entry",
    [
        {"identitytoken": KEY},
        # As 'az acr login' leaves it: a user without a password.
        {"auth": _auth("00000000-0000-0000-0000-000000000000", ""), "identitytoken": KEY},
    ],
)
def test_a_stored_identity_token(host: FakeHost, entry: dict[str, str]) -> None:
    host.files[PATH] = json.dumps({"auths": {"x.azurecr.io": entry}}).encode()
    assert stored_credentials(host, "x.azurecr.io") == ("<token>", KEY)
    for none in ("", None, 7):
        host.files[PATH] = json.dumps({"auths": {"x.azurecr.io": {"identitytoken": none}}}).encode()
        assert stored_credentials(host, "x.azurecr.io") is None


def test_an_identity_token_of_a_helper(host: FakeHost) -> None:
    host.files[PATH] = b'{"credHelpers": {"x.azurecr.io": "acr-env"}}'
    host.commands["docker-credential-acr-env get"] = json.dumps({"Username": "<token>", "Secret": KEY})
    assert stored_credentials(host, "x.azurecr.io") == ("<token>", KEY)


def test_the_login_of_docker_hub_stands_under_its_old_address(host: FakeHost) -> None:
    host.files[PATH] = json.dumps({"auths": {"https://index.docker.io/v1/": {"auth": _auth("me", "pw")}}}).encode()
    assert stored_credentials(host, "docker.io") == ("me", "pw")
    host.files[PATH] = json.dumps({"auths": {"docker.io": {"auth": _auth("you", "pw")}}}).encode()
    assert stored_credentials(host, "docker.io") == ("you", "pw")


def test_an_identity_token_is_replaced_and_not_shown(host: FakeHost) -> None:
    host.files[PATH] = json.dumps({"auths": {"nvcr.io": {"identitytoken": "id-token"}}}).encode()
    (change, *_rest) = _run(host).changes
    assert change.before == "<token>, a password"
    assert "id-token" not in repr(change) + repr(change.diff)
    assert stored_credentials(host, "nvcr.io") == ("$oauthtoken", KEY)


def test_precheck(host: FakeHost, registry: type[FakeRegistry]) -> None:
    _login().precheck(host)
    assert len(registry.asked) == 1
    _run(host)
    registry.asked.clear()
    _login().precheck(host)
    _login(NEW, validate="never").precheck(host)
    _login(None, validate="always").precheck(host)
    assert registry.asked == []
    _login(validate="always").precheck(host)
    assert len(registry.asked) == 1
    registry.refuse = "bad_key"
    with pytest.raises(FleetError):
        _login(NEW).precheck(host)


# -- the module -------------------------------------------------------------------------------------------


def _module(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], check: bool, **options: t.Any
) -> dict[str, t.Any]:
    monkeypatch.setattr(ngc_login, "Host", lambda: host)
    monkeypatch.setattr(ngc_login, "NgcLogin", functools.partial(NgcLogin, client=t.cast(t.Any, FakeRegistry)))
    arguments = dict(options, _ansible_check_mode=check, _ansible_diff=True)
    with patch_module_args(arguments), pytest.raises(SystemExit):
        ngc_login.main()
    printed = capsys.readouterr().out
    for secret in (KEY, NEW, _auth("$oauthtoken", KEY), _auth("$oauthtoken", NEW)):
        assert secret not in printed
    return t.cast("dict[str, t.Any]", json.loads(printed))


def test_module_check_real_check_real(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], registry: type[FakeRegistry]
) -> None:
    run = functools.partial(_module, host, monkeypatch, capsys, api_key=KEY)
    check_1 = run(check=True)
    assert PATH not in host.files
    real_1 = run(check=False)
    check_2, real_2 = run(check=True), run(check=False)
    registry.refuse = "bad_key"
    bad = _module(host, monkeypatch, capsys, False, api_key=NEW)
    bad_check = _module(host, monkeypatch, capsys, True, api_key=NEW)
    after = "nvcr.io: $oauthtoken %s\n" % fingerprint(KEY)
    assert (check_1["changed"], real_1["changed"], check_2["changed"], real_2["changed"]) == (True, True, False, False)
    assert check_1["diff"] == real_1["diff"]
    assert real_1["diff"] == [{"before_header": PATH, "after_header": PATH, "before": "", "after": after}]
    assert check_2["diff"] == real_2["diff"] == []
    assert check_1["changes"] == real_1["changes"]
    assert real_2["login"]["fingerprint"] == fingerprint(KEY)
    assert check_1["login"]["fingerprint"] is None
    for result in (bad, bad_check):
        assert result["failed"] is True
        assert result["changed"] is False
        assert result["reason"] == "bad_key"
        assert result["msg"] == "The registry refuses."
    assert json.loads(host.files[PATH])["auths"]["nvcr.io"]["auth"] == _auth("$oauthtoken", KEY)


def test_module_without_a_key(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _module(host, monkeypatch, capsys, False)
    assert result["changed"] is False
    assert "only public images" in result["message"]
    bad = _module(host, monkeypatch, capsys, False, api_key=KEY + "\n")
    assert bad["reason"] == "invalid_option"
    assert bad["msg"] == (
        "api_key = (not shown): there is a line break in the key; store it without one (printf %s instead of echo)."
    )


# -- as this host's Docker would ask ------------------------------------------------------------------


class Engine:
    """Docker that says how it reaches registries."""

    def __init__(self, **info: t.Any) -> None:
        self.answer = info

    def info(self) -> dict[str, t.Any]:
        return self.answer


def test_the_key_is_checked_through_the_proxies_of_the_daemon(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    engine = Engine(HttpsProxy="http://proxy.example:3128", NoProxy="localhost")
    _login(api=engine).precheck(host)
    assert FakeRegistry.options["proxies"] == {"https": "http://proxy.example:3128", "no": "localhost"}
    assert FakeRegistry.options["insecure"] is None
    # What the daemon is to be told counts more than what it was told.
    _login(api=engine, daemon_options={"proxies": {"https-proxy": "http://new.example:3128"}}).precheck(host)
    assert FakeRegistry.options["proxies"]["https"] == "http://new.example:3128"


def test_a_registry_without_tls_is_asked_as_the_daemon_may(host: FakeHost) -> None:
    engine = Engine(RegistryConfig={"IndexConfigs": {"mirror.example:5000": {"Secure": False}}})
    _run(host, "password", registry="mirror.example:5000", username="me", api=engine)
    assert FakeRegistry.options["insecure"] is True


def test_a_daemon_that_is_stopped_is_not_woken(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_arguments: t.Any) -> None:
        raise AssertionError("that would start it")

    monkeypatch.setattr(_docker_api.DockerApi, "get", asked)
    host.commands["systemctl show * docker.service"] = "ActiveState=inactive\n"
    host.commands["systemctl show * docker.socket"] = "ActiveState=active\n"
    _login().precheck(host)
    assert FakeRegistry.asked
