# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever the secret and wherever it stands, it does not come through; and what is no secret does."""

from __future__ import annotations

import base64
import html
import json
import pathlib
import re
import shlex
import string
import time
import typing as t
import urllib.parse

import pytest
import yaml
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _redaction
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import (
    MASK,
    SHORTEST_SECRET,
    SHORTEST_WORD,
    Redactor,
    known_secrets,
    scrub,
    scrub_data,
)
from fake_host import FakeHost
from hypothesis import assume, example, given
from hypothesis import strategies as st

#: One line, as a variable's value is; also blanks, quotes, backslashes and what structures text elsewhere.
printable = string.ascii_letters + string.digits + string.punctuation + " äßЖ"
secrets = st.text(printable, min_size=SHORTEST_SECRET, max_size=60).filter(lambda text: text == text.strip())
words = st.text(string.ascii_letters + string.digits + string.punctuation, min_size=1, max_size=40)

#: How a declared value is written down by whoever has it.
WRITTEN: dict[str, t.Callable[[str], str]] = {
    "log line": lambda s: "2026-11-20 21:00:00 INFO connecting with %s to the store" % s,
    "env line": lambda s: "COLOUR=%s" % s,
    "shell": lambda s: "export COLOUR=%s; run" % shlex.quote(s),
    "systemd": lambda s: 'Environment="COLOUR=%s"' % s.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%"),
    "json": lambda s: json.dumps({"colour": s, "env": ["COLOUR=" + s]}),
    "json in json": lambda s: json.dumps({"message": json.dumps({"colour": s})}),
    "yaml": lambda s: yaml.safe_dump({"colour": s, "list": [s]}, width=1000, allow_unicode=True),
    "repr": lambda s: repr({"colour": s}),
    "argv": lambda s: json.dumps(["serve", "--colour", s, "--shade=" + s]),
    "process list": lambda s: "root 71 0.0 /opt/serve --colour %s --port 8000" % s,
    "url": lambda s: "GET https://user:%s@host.example:3128/v1" % urllib.parse.quote(s, safe=""),
    "query": lambda s: "GET https://host.example/v1?" + urllib.parse.urlencode({"colour": s, "x": "1"}),
    "login": lambda s: base64.b64encode(b"$oauthtoken:" + s.encode()).decode(),
    "html": lambda s: "<td>%s</td>" % html.escape(s),
}


def parts(secret: str) -> t.Iterator[str]:
    """What of a secret must not be seen: it as it is, and base64 of it."""
    yield secret
    yield base64.b64encode(secret.encode()).decode().rstrip("=")[:-1]


@pytest.mark.parametrize("place", sorted(WRITTEN))
@given(secret=secrets)
@example(secret='it\'s; a,b "c" \\d & 100% $e')
@example(secret="p@ss/w0rd")
@example(secret="0ß2A200ß")
def test_a_declared_secret_never_comes_through(place: str, secret: str) -> None:
    # What the place itself says is no secret that it gives away.
    assume(secret not in WRITTEN[place]("000000") and secret != "$oauthtoken")
    text = WRITTEN[place](secret)
    for done in (Redactor([secret]).text(text), json.dumps(Redactor([secret]).structure({"line": [text]}))):
        for part in parts(secret):
            assert part not in done
        assert MASK in done


@given(secret=st.text(printable, min_size=1, max_size=SHORTEST_SECRET - 1).filter(lambda s: s == s.strip()))
@example(secret="7")
@example(secret="true")
@example(secret="a b,c")
@example(secret="a'b")
@example(secret="000\\")
@example(secret="00ß\\")
def test_a_short_secret_is_masked_where_its_name_stands(secret: str) -> None:
    redactor = Redactor([secret], ["COLOUR"])
    assert redactor.environment(["COLOUR=" + secret]) == ["COLOUR=***"]
    assert redactor.text("COLOUR=%s\n" % secret) == "COLOUR=***\n"
    assert redactor.structure({"COLOUR": secret}) == {"COLOUR": MASK}
    assert redactor.structure(["--env", "COLOUR=" + secret]) == ["--env", "COLOUR=***"]
    assert json.loads(redactor.text(json.dumps({"x": ["COLOUR=" + secret]}))) == {"x": ["COLOUR=***"]}
    assert json.loads(redactor.text(json.dumps({"COLOUR": secret}))) == {"COLOUR": MASK}
    assert redactor.text('Environment="COLOUR=%s" A=b' % secret.replace("\\", "\\\\").replace('"', '\\"')).endswith(
        '"COLOUR=***" A=b'
    )


@given(secret=st.text(string.ascii_lowercase + string.digits, min_size=SHORTEST_WORD, max_size=SHORTEST_SECRET - 1))
def test_a_short_secret_is_masked_as_a_word(secret: str) -> None:
    redactor = Redactor([secret])
    done = redactor.text("connecting with %s to (%s)" % (secret, secret))
    assert done in ("connecting with *** to (***)", "connecting with %s to (%s)" % (secret, secret))
    assert done.count(MASK) == 2 or secret.isdigit() or secret.isalpha()
    # A part of another word is no secret.
    assert redactor.text("x%sy" % secret) == "x%sy" % secret


NAMES = ("NGC_API_KEY", "HF_TOKEN", "DB_PASSWORD", "REGISTRY_AUTH", "MYSQL_PWD", "DB_PASS", "CLIENT_SECRET")


@pytest.mark.parametrize("name", NAMES)
@given(value=words)
@example(value="ab,cd;ef&gh")
@example(value="a,b=c")
@example(value="'quo\"ted")
def test_a_name_that_tells_hides_all_of_its_value(name: str, value: str) -> None:
    redactor = Redactor()
    assert redactor.text("A=b\n%s=%s\nC=d" % (name, value)) == "A=b\n%s=***\nC=d" % name
    assert redactor.text("export %s=%s" % (name, shlex.quote(value))) == "export %s=***" % name
    assert redactor.environment(["%s=%s" % (name, value)]) == [name + "=***"]
    assert redactor.structure({name: value, "a": "b"}) == {name: MASK, "a": "b"}
    # "-TOKEN", "b" could be an option of a command with its value.
    if not value.startswith("-"):
        assert json.loads(redactor.text(json.dumps({name: value, "a": "b"}))) == {name: MASK, "a": "b"}
    assert json.loads(redactor.text(json.dumps(["%s=%s" % (name, value), "a"]))) == ["%s=***" % name, "a"]
    inner = redactor.text(json.dumps({"message": json.dumps({name: value})}))
    assert json.loads(json.loads(inner)["message"]) == {name: MASK}
    if name.isupper() and not name.endswith(("AUTH", "PWD", "PASS")):
        option = "--" + name.lower().replace("_", "-")
        if not value.startswith("-"):
            assert redactor.structure(["x", option, value, "y"]) == ["x", option, MASK, "y"]
        assert redactor.structure(["x", option + "=" + value, "y"]) == ["x", option + "=***", "y"]
    dumped = yaml.safe_dump({name: value, "a": "b"}, width=1000, sort_keys=False)
    assert redactor.text(dumped) in ("%s: ***\na: b\n" % name, "%s: '***'\na: b\n" % name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("REGISTRY_AUTH", "MYSQL_PWD", "DB_PASS")])
@given(value=st.text(string.ascii_letters + string.digits + ",;&@/:+.%!#*()[]{}|~^$?<>-_", min_size=1, max_size=30))
@example(value="ab,cd;ef&gh")
def test_a_name_that_tells_in_the_middle_of_a_line(name: str, value: str) -> None:
    # What looks like the next name=value is taken for one, and so is what ends a sentence or opens with a dash.
    assume(not re.search(r"[,;&][\w.-]+[=:]|[,;&]+[\])}]*$|^[,;&]|[,;&][,;&\])}]|^-|\*\*\*", value))
    # What follows the word of a header is a secret, too.
    assume(value.lower() not in ("basic", "bearer", "apikey"))
    option = "--" + name.lower().replace("_", "-")
    for text in (
        "12:00 INFO env %s=VALUE port=8000" % name,
        "12:00 INFO env %s = VALUE port=8000" % name.lower(),
        "12:00 INFO argv serve %s VALUE port=8000" % option,
        "12:00 INFO argv serve %s=VALUE port=8000" % option,
        "12:00 INFO argv serve %s='VALUE' port=8000" % option,
        '12:00 INFO argv "serve %s=VALUE" port=8000' % option,
    ):
        assert scrub(text.replace("VALUE", value)) == text.replace("VALUE", MASK)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("curl -u user:", " https://host/"),
        ("curl -uuser:", " https://host/"),
        ("curl --user user:", " https://host/"),
        ("curl --proxy-user=user:", " https://host/"),
        ("mysql -h db -p", " mydb"),
        ("/usr/bin/mysqldump --all -p", " mydb"),
        ("sshpass -p ", " ssh host"),
        ("docker login nvcr.io -u me -p ", " "),
        ("redis-cli -h db -a ", " ping"),
        ("openssl rsa -passin pass:", " -in x"),
        ("machine host login me password ", " "),
        ("app --password=", " --port 1"),
        ("app --db-pass ", " --port 1"),
        ("app -password ", " --port 1"),
    ],
)
@given(value=st.text(string.ascii_letters + string.digits + "@/:+.%!#_-", min_size=2, max_size=30))
@example(value="s3cret")
@example(value="000@0:0")
def test_programs_that_are_given_a_password(before: str, after: str, value: str) -> None:
    assume(not value.startswith(("-", "//")) and not value.isdigit() and value not in before + after)
    line = "root 7 1 0 12:00 ? 00:00:00 %s%s%s" % (before, value, after)
    done = scrub(line)
    assert done == line.replace(before + value, before + MASK)
    shown = "abc  image  \"/bin/sh -c '%s%s%s'\"  Up 2 minutes" % (before, value, after)
    assert value not in scrub(shown).replace(MASK, "") or value in shown.replace(before + value, "")


userinfo = st.text(string.ascii_letters + string.digits + "@/:+.%!#$&*()=,;~-_?", min_size=1, max_size=30)


@given(password=userinfo, port=st.sampled_from((":3128", "")))
@example(password="p@ss/w0rd", port=":3128")
@example(password="80/x", port=":3128")
@example(password="///@@@", port="")
@example(password="=-U", port=":3128")
def test_the_password_of_a_proxy_with_whatever_in_it(password: str, port: str) -> None:
    # Digits and a slash are a port and a path, unless what follows tells otherwise.
    assume(port or not re.match(r"\d{1,5}(?:[/?#]|$)", password))
    url = "http://ops:%s@proxy.example%s/" % (password, port)
    assert scrub("before %s after" % url) == "before http://***@proxy.example%s/ after" % port
    document = {"proxies": {"http-proxy": url}, "debug": True}
    masked = {"proxies": {"http-proxy": "http://***@proxy.example%s/" % port}, "debug": True}
    assert scrub_data(document) == masked
    assert json.loads(scrub(json.dumps(document))) == masked
    # What is configured on the host is known, and masked wherever it stands.
    host = FakeHost({"/etc/docker/daemon.json": json.dumps(document)})
    if len(password) >= SHORTEST_SECRET and MASK not in password:
        redactor = known_secrets(host).redactor()
        assert password not in redactor.text("proxy said: bad login %s, go away" % password).replace(MASK, "")


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.uuids(), st.tuples(*[st.integers(0, 999)] * 3))
def test_digests_uuids_and_versions_stay(digest: str, uuid: t.Any, version: tuple[int, int, int]) -> None:
    redactor = Redactor(["pin9", "on", "a-known-secret"], ["COLOUR"])
    dotted = "%d.%02d.%02d" % version
    for line in (
        "nvcr.io/nim/meta/llama-3.1-8b-instruct:%s@sha256:%s" % (dotted, digest),
        "localhost:5000/nim/x:%s@sha256:%s" % (dotted, digest),
        "https://nvcr.io:443/v2/nim/meta/llama/manifests/sha256:%s?ns=nvcr.io" % digest,
        "GPU-%s NVIDIA H200 %s MiB" % (uuid, version[0]),
        "NVIDIA_VISIBLE_DEVICES=GPU-%s,GPU-%s" % (uuid, uuid),
        "nvidia-driver-580-open %s-0ubuntu1 amd64" % dotted,
        "%s  nim-llama  Up 3 days  0.0.0.0:8000->8000/tcp" % digest,
        "docker run -u 1000:1000 --user 0:0 -p 8000:8000 --name nim-llama image@sha256:%s" % digest,
        "2026-11-20T21:00:00.000 INFO step %d: loss 0.%d, %d tokens/s" % version,
    ):
        assert redactor.text(line) == line


@pytest.mark.parametrize(
    "line",
    [
        "GET http://127.0.0.1:8000/v1/models?user=a@b HTTP/1.1 200",
        "Invalid token: unexpected end of input",
        "KeyError: 'weights'",
        "failed to fetch oauth token: unexpected status from GET request: 401 Unauthorized",
        "TokenizerError: no such file",
        "ssh-keygen: invalid option",
        "basic authentication failed, bearer authentication is required",
        "token count = 5, forward_pass=12ms, PWD=/root, tests_pass=3",
        '"max_tokens": 8, "tokenizer": "llama", "tokens": 12, "key_fingerprint": "sha256:0123456789ab"',
        "Set NGC_API_KEY in the environment",
        "password_file=/run/secrets/db",
        "mysql is not installed; docker run -p 3306:3306 mysql",
        "nim-llama.service: Main process exited, code=exited, status=1/FAILURE",
        "ops@gpu01:~$ scp file user@host:/tmp",
        '{"secret_environment": ["HF_TOKEN"], "key": null}',
        "ERROR: 401 Unauthorized: authentication required",
    ],
)
def test_lines_that_only_sound_so(line: str) -> None:
    assert Redactor(["pin9", "on"], ["COLOUR"]).text(line) == line


def test_what_explains_a_failure_stays(fixtures: pathlib.Path) -> None:
    """Signatures are looked for in lines from which secrets were taken out."""
    samples = json.loads((fixtures / "failure-samples.json").read_text())
    assert len(samples) > 50
    for sample in samples.values():
        assert scrub(sample) == sample


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        ("connect failed, password: s3cret, retrying", "connect failed, password: ***, retrying"),
        ("using API key: Abc123", "using API key: ***"),
        ("X-Api-Key: Abc123", "X-Api-Key: ***"),
        ("Cookie: session=abc; x=y", "Cookie: ***"),
        ("dial ops:s3cret@proxy:3128 failed", "dial ***@proxy:3128 failed"),
        ("dsn ops:s3cret@tcp(db:3306)/x", "dsn ***@tcp(db:3306)/x"),
        (
            "GET https://s3.example/x?X-Amz-Date=20261120T000000Z&X-Amz-Signature=0123456789abcdef0123&x=1",
            "GET https://s3.example/x?X-Amz-Date=20261120T000000Z&X-Amz-Signature=***&x=1",
        ),
        ("API_KEY: |\n  first\n  second\nnext: 1", "API_KEY: ***\nnext: 1"),
        ("args:\n- --token\n- s3cret\n- x", "args:\n- --token\n- ***\n- x"),
    ],
)
def test_places_that_tell(line: str, masked: str) -> None:
    assert scrub(line) == masked


#: What a hostile container could fill its log with: single signs, and words with which expressions begin.
RUNS = (
    *"\\\"'=:/@% aA-_.,;&0(<$|\n\t",
    *("key-", ".-key", "token.", "sk-", "eyJ-", "a://:", "-u ", "\\'", "_PASS-", "login ", "docker login ", "bearer "),
)


@pytest.mark.parametrize("run", RUNS)
def test_the_time_it_takes_grows_with_the_text_and_no_faster(run: str) -> None:
    redactor = Redactor(["colour-of-the-day"], ["COLOUR"])
    redactor.text("x")
    for before in ("", 'key="', "key: "):
        text = before + run * (30_000 // len(run))
        began = time.process_time()
        redactor.text(text)
        # Far below a second; with one expression that tries every beginning of the run it is more than ten.
        assert time.process_time() - began < 4, (before, run)


def test_a_secret_that_fills_a_log_takes_no_longer() -> None:
    secret = "0123456789abcdef" * 4
    text = (secret[:30] + "\n") * 60_000
    began = time.process_time()
    done = Redactor([secret]).text(text)
    assert time.process_time() - began < 4
    assert secret[:8] not in done


@given(start=st.text(".-ab_", max_size=20), middle=st.sampled_from(["token", "api_key", "secret"]))
@example(start="a" * 30 + ".b-", middle="token")
def test_a_name_is_known_wherever_its_word_begins(start: str, middle: str) -> None:
    for text in ("%s%s=colour7", "(%s%s=colour7)", "\\%s%s = colour7", "--%s%s=colour7", '\\\\"%s%s\\\\": "colour7"'):
        assert "colour7" not in scrub(text % (start, middle))
    assert "colour7" not in scrub("x.DB_PASS=colour7 --y.DB_PASS=colour7")


@pytest.mark.parametrize("long", ["org.example.%s." % ("deep." * 14), "a" * 200 + ".", "-" * 65])
def test_a_long_name_tells_by_its_end(long: str) -> None:
    for name in ("password", "api_key", "db.secret", "access-token-2"):
        for line in ("%s%s=colour7", "at start: %s%s = colour7, and"):
            assert "colour7" not in scrub(line % (long, name)), (line, name)
    for harmless in ("max_tokens=40967", "key_file=/etc/colour7", "tokenizer=colour7", "keys=colour7"):
        assert scrub(long + harmless) == long + harmless


telling = st.sampled_from(
    [
        "nvapi",
        "hf",
        "ghp",
        "glpat",
        "xoxb",
        "sk",
        "eyj",
        "password",
        "api-key",
        "token",
        "secret",
        "basic",
        "-u",
        "--user",
        "-p",
    ]
)
plain = st.lists(telling | st.text("abc019", min_size=1, max_size=24) | st.sampled_from("./-"), max_size=8).map("".join)


@given(scheme=st.sampled_from(["", "http://", "https://"]), text=plain, declared=st.lists(plain, max_size=2))
@example(scheme="https://", text="nvapi-0123456789", declared=[])
@example(scheme="", text="sk-abc-0123456789abcdef", declared=[])
@example(scheme="", text="glpat-0123456789abcdef", declared=[])
@example(scheme="", text="xoxb-0123456789abcdef", declared=[])
def test_what_is_taken_for_plain_is_plain(scheme: str, text: str, declared: list[str]) -> None:
    assume(re.match(_redaction._PLAIN, scheme + text))
    for expression in _redaction._expressions(tuple(name for name in declared if name)):
        assert expression.sub("", scheme + text) == scheme + text


def test_secrets_without_capitals_are_not_taken_for_plain() -> None:
    for secret in ("nvapi-0123456789", "sk-abc-0123456789abcdef", "glpat-0123456789abcdef", "xoxb-0123456789abcdef"):
        for text in (secret, "https://mirror.example/" + secret, "a/" + secret + "/b"):
            assert secret not in scrub(text), text
