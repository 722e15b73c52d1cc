# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Secrets that must not appear in what leaves a host: what is known of them stands here and nowhere else.

A value is masked when it is known (declared as secret, or stored on the host), when its name or its place says that it is
secret, and when it looks like the key of a well-known service.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import typing as t
import urllib.parse

from ._errors import FleetError
from ._host import Host
from ._nim_paths import CONFIGURATION_DIRECTORY

#: What stands in the place of a secret.
MASK = "***"

#: Length of the pieces by which a secret is recognised also where only a part of it stands.
_PIECE = 8
#: A secret is masked wherever it occurs, so a shorter value would take ordinary words with it.
SHORTEST_SECRET = 6
#: A shorter one is masked where it is a word of its own; one that is shorter still, or an ordinary word or number, only where
#: its name stands before it.
SHORTEST_WORD = 4
_ORDINARY = (
    r"(?i)(?:true|false|none|null|auto|info|warn|error|debug|trace|host|root|user|test|data|main|local|https?|chat|json|text|path"
    r"|file|name|model|start|stop|ready|nvme|cuda|gpus|docker|from|with|port|type|size|load|image|mode|exit|code|time|line"
    r"|done|fail|state|unit|[0-9]+)\Z"
)

# -- names ------------------------------------------------------------------------------------------

#: Names that say that their value is secret, as part of an expression (case does not matter). Expressions are compiled when they
#: are needed first: most looks at a host mask nothing.
_TELLING_WORD = (
    r"(?:key(?!s\b|board|ring|word|error|gen)|token(?!s|iz)|secret|passw(?:or)?d|passphrase|credential|authorization)"
)
_TELLING_WORDS = r"[\w.-]{0,64}" + _TELLING_WORD + r"[\w.-]*"
#: The end of a name that is longer than that.
_TELLING_LATE = r"(?<=[\w.-]{64})" + _TELLING_WORD + r"[\w.-]{0,64}"
#: PWD alone is a directory, and what passes in lower case is mostly a step of a computation.
_TELLING_CAPITALS = r"(?-i:[A-Z0-9_]{0,64}_(?:PASS|PWD|AUTH|PAT|PIN)(?![A-Za-z0-9])[A-Z0-9_]*)"
_TELLING = _TELLING_WORDS + "|" + _TELLING_CAPITALS
_NAME_OF_SECRET = r"(?i)" + _TELLING + r"|.*(?:^|_)(?:AUTH|PASS|PWD|PAT|PIN|CERT_DATA)(?:_|$).*"
#: Names that only sound so: of facts, of Docker's options, and of files.
_HARMLESS = (
    r"(?i)key_?(?:state|safe|file|url|path|id|in_service)|.*fingerprint|max_tokens|tokenizer|secret_environment"
    r"|.*[_.-](?:file|path|dir|directory|type|name|count|size|length|limit)"
)
#: Variables of a container whose value is no secret whatever it looks like, unless the name says so.
_PLAIN_VARIABLES = (
    r"(?:NVIDIA|CUDA|NCCL|NV|VLLM|TRTLLM|TORCH|PYTORCH|LIBRARY|LD|OMPI|OMP|UCX|HOME|PATH|PYTHON|LANG|LC|SHELL|TERM|PWD"
    r"|USER|HOSTNAME|TZ)(?:_|\Z)|PATH\Z"
)
_ALSO_NUMBERS = r"(?i)secret|passw|passphrase"
_UUID = r"(?i)(?:GPU-|MIG-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z"
_ONE_WORD = r"[A-Za-z0-9+/_=.~:!@#$%^&*-]{12,}\Z"
_LOGIN = r"(?s)([^\s:]+:)(?!\d+\Z).+\Z"
_LOGIN_OPTIONS = ("-u", "--user", "--proxy-user", "-U", "--proxy-userpwd", "--userpwd")


def is_name_of_secret(name: str) -> bool:
    """Whether a value that stands under this name is secret."""
    return bool(re.match(_NAME_OF_SECRET, name)) and not re.fullmatch(_HARMLESS, name)


def is_plain(value: t.Any) -> bool:
    """Whether a value that stands under no secret's name can be shown: a switch, or a number that is no longer than a port's."""
    return isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) <= 65535)


def looks_secret(value: str) -> bool:
    """Whether a value could be a key: one word of some length with both letters and digits that is no path, name or UUID."""
    if not re.match(_ONE_WORD, value) or value.startswith(("/", "sha256:", "http")) or re.match(_UUID, value):
        return False
    digits, letters = len(re.findall(r"\d", value)), len(re.findall(r"[A-Za-z]", value))
    # Versions and names such as llama-3.1-8b-instruct have few digits or many separators.
    words = [word for word in re.split(r"[._:/-]", value) if word]
    return digits >= 2 and letters >= 2 and max(map(len, words), default=0) >= 10


# -- places -----------------------------------------------------------------------------------------

#: What stands in quotes, up to the quote that closes them; inside JSON inside JSON quotes have backslashes of their own.
_IN_QUOTES = r"(?:\\[^\n]|(?!(?P=%s))[^\n\\])+"
_IN_ESCAPED_QUOTES = r"(?:\\\\(?:\\\\|\\[\"'])|(?!(?P=%s))[^\n])+"
_IN_DEEPER_QUOTES = r"(?:(?!(?<!\\)(?P=%s))[^\n])+"
_QUOTED = r"(?:(?P<quote>[\"'])%s|(?P<escaped>\\[\"'])%s|(?P<deeper>\\{2,}[\"'])%s)" % (
    _IN_QUOTES % "quote",
    _IN_ESCAPED_QUOTES % "escaped",
    _IN_DEEPER_QUOTES % "deeper",
)
#: A value without quotes: it goes on over punctuation that neither ends the sentence nor begins the next ``name=``.
_BARE = (
    r"(?![\"']|\(not shown\))(?:[^\s,;&'\"\\]|\\(?![\"'])|[,;&](?=[^\s,;&'\"\])}])(?![\w.-]{1,64}[=:])|[\"'](?=\w))+"
)
_VALUE = r"(?:%s|%s)" % (_QUOTED, _BARE)
_HOST_PORT = r"[\w.-]+:\d{1,5}(?=[/\s\"',]|\Z)"

#: curl's user and password, after what an option can stand behind.
_CURL = (
    r"(?P<keep>%s(?:-[uU]|--user|--proxy-user)[ =]?(?P<before>\\*[\"'])[^\s:\"']{1,128}:)(?:(?!(?P=before))[^\n])+",
    r"(?P<keep>%s(?:-[uU]|--user|--proxy-user)[ =]?[^\s:\"'/]{1,128}:)(?!//|\d+(?:[\s\"',]|\Z))%%(bare)s",
)
_AFTER_BLANK_OR_QUOTE = r"(?<![^\s\"'])"
_AFTER_NO_WORD = r"(?<![\w-])"

# Texts are as hostile as whoever writes them: in no expression may a match be tried from every character of a run that it
# reads to the end, so a run is entered at its beginning alone (lookbehind) or read to a bound.
#: What is secret whatever its name; of a match the groups "keep", "quote", "escaped" and "deeper" stay.
_PLACES = (
    # keys of NGC, Hugging Face, GitHub, GitLab, OpenAI, AWS, Google, Slack, Docker Hub; JSON web tokens
    r"nvapi-[\w-]{6,}",
    r"\bhf_[A-Za-z0-9]{8,}",
    r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abpr]-|dckr_pat_)[A-Za-z0-9_-]{10,}",
    r"\bsk-(?=[\w-]{0,128}\d)(?:[A-Za-z0-9_]+-){0,3}[A-Za-z0-9_]{12,}",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b",
    r"\bAIza[\w-]{30,}",
    r"\beyJ[\w-]{8,2000}\.[\w-]{4,}(?:\.[\w-]*)?",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    # those of curl and openssl before those in URLs: a password may end like a host with its port
    *(pattern % _AFTER_BLANK_OR_QUOTE for pattern in _CURL),
    r"(?P<keep>-pass(?:in|out|word)?[\s=]pass:)%(value)s",
    # user and password in a URL, also where @ and / are written as they are: up to the last @ that can end them
    r"(?i)(?P<keep>(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{1,20}://)(?:"
    r"[^\s/@:\"'<>]{0,128}:(?!\d{1,5}(?:[/?#]|\Z))[^\s\"'<>]{0,256}(?=@)"
    r"|[^\s/@:\"'<>]{0,128}:\d{1,5}[/?#][^\s\"'<>]{0,256}(?=@%(host)s)"
    r"|[^\s/\"'<>]{1,256}(?=@))",
    r"(?<![\w/@.:%%+-])[\w.%%+-]{1,64}:[^\s/@:\"',]{3,128}(?=@(?:%(host)s|tcp\(|unix\())",
    # what signs a URL
    r"(?i)(?P<keep>\b(?:x-amz-signature|signature|sig)=)[\w%%+/=.-]{16,}",
    # headers, also as curl prints and JSON writes them
    r"(?i)(?P<keep>authorization\\*[\"']?\s*[:=]\s*\\*[\"']?)(?:[a-z]+\s+)?[^\s\"',]{4,}",
    r"(?i)(?P<keep>\b(?:bearer|basic|apikey)\s+)(?!(?-i:[a-z-]+)(?:[\s,.;:)]|\Z))[\w.+/=~-]{8,}",
    r"(?i)(?P<keep>\b(?:set-)?cookie[\"']?\s*:\s*[\"']?)[^\n\"']+",
    # programs that are given them without a name
    *(pattern % _AFTER_NO_WORD for pattern in _CURL),
    r"(?P<keep>\b(?:mysql[\w-]{0,32}|mariadb[\w-]{0,32})\b[^\n]{0,200}?[\s\"']-p)(?![\s\"'])%(value)s",
    r"(?P<keep>\bsshpass[\s\"',]+-p[\s\"',]*)%(value)s",
    r"(?P<keep>\bdocker\s+login\b[^\n]{0,200}?\s-p[ =]?)%(value)s",
    r"(?P<keep>\bredis-cli\b[^\n]{0,200}?\s-a\s+)%(value)s",
    r"(?i)(?P<keep>\blogin\s+\S+\s+password\s+)\S+",
    r"(?i)(?P<keep>[\"'](?:auth|identitytoken|registrytoken)[\"']\s*:\s*[\"'])[^'\"]+",
)
#: What none of the expressions below and above finds anything in, so that most looks need not compile them: no sign that ends
#: a name, no capital, no underscore, and none of the prefixes that need neither.
_PLAIN = r"(?:https?://)?(?!.*(?:nvapi|glpat|xox[abpr]|sk)-)[a-z0-9./-]*\Z"
#: What is secret because of its name.
_NAMED = (
    # NAME=value that is all of a line, as in files of variables
    r"(?m)^(?P<keep>[ \t]*(?:export[ \t]+|declare -x[ \t]+)?(?=(?-i:[A-Z][A-Z0-9_]*)=|%(declared)s=)(?P<name>%(name)s)=)[^\n]+",
    # the same in quotes, as systemd, JSON and shells write it
    r"(?P<keep>(?<!\\)(?P<before>[\"'])-{0,2}(?P<name>%(name)s)=)" + _IN_QUOTES % "before",
    r"(?P<keep>(?<!\\)(?P<before>\\[\"'])-{0,2}(?P<name>%(name)s)=)" + _IN_ESCAPED_QUOTES % "before",
    r"(?P<keep>(?<!\\)(?P<before>\\{2,}[\"'])-{0,2}(?P<name>%(name)s)=)" + _IN_DEEPER_QUOTES % "before",
    # name=value and name = value anywhere
    r"(?P<keep>(?P<name>(?<![\w.-])%(words)s|%(late)s|\b%(capitals)s|%(declared)s)[ \t]?=[ \t]?(?!=))%(value)s",
    # --name value, "--name", "value", and as items of a YAML list
    r"(?P<keep>(?<![\w.-])--?(?P<name>%(name)s|(?:[\w-]{0,64}-)?(?:pass|pwd))(?:=|[ \t]+(?!-)))%(value)s",
    r"(?P<keep>[\"']--?(?P<name>%(name)s)[\"']\s*,\s*)%(quoted)s",
    r"(?P<keep>-[ \t]+[\"']?--?(?P<name>%(name)s)[\"']?[ \t]*\n[ \t]*-[ \t]+)(?:%(quoted)s|[^\n]+)",
    # "name": "value"
    r"(?P<keep>(?<!\\)\\*[\"'](?P<name>%(name)s)\\*[\"']\s*:\s*)%(quoted)s",
    r"(?P<keep>(?<!\\)\\*[\"'](?P<name>[\w.-]{0,64}(?:secret|passw(?:or)?d|passphrase)[\w.-]*|%(declared)s)\\*[\"']\s*:\s*)"
    r"-?\d[\d.]*",
    # name: value at the beginning of a line, with all that follows where the name can only be one of a setting
    r"(?m)^(?P<keep>[ \t]*(?:-[ \t]+)?(?=[\w.-]*_|(?-i:[A-Z0-9]+)[ \t]*:|%(declared)s)(?P<name>%(name)s)[ \t]*:[ \t]+)"
    r"(?:[|>][-+\d]*[ \t]*\n(?P<indent>[ \t]+)[^\n]*(?:\n(?P=indent)[^\n]*)*|[^\n]+)",
    r"(?m)^(?P<keep>[ \t]*(?:-[ \t]+)?(?P<name>%(name)s)[ \t]*:[ \t]+)\S+(?=[ \t]*$)",
    r"(?m)^(?P<keep>[ \t]*[\w.-]{0,64}(?:key|token|secret|passw(?:or)?d|passphrase)[ \t]*:[ \t]+)(?:%(quoted)s|\S+)",
    # the same in a sentence, where "token: unexpected answer" is none
    r"(?P<keep>\b[\w.-]{0,64}(?:secret|passw(?:or)?d|passphrase)[ \t]*:[ \t]+)%(value)s",
    r"(?P<keep>(?:\b[\w.-]{0,64}(?:api[-_ ]?key|(?:access|auth|security)[-_ ]?token)|%(declared)s)[ \t]*:[ \t]+)"
    r"(?!(?-i:[a-z]+)(?:[\s,.;:)]|\Z))%(value)s",
)
#: An expression that nothing matches.
_NEVER = r"(?!)"


@functools.lru_cache(maxsize=8)
def _expressions(names: tuple[str, ...]) -> tuple[t.Pattern[str], ...]:
    """All expressions, for names that are declared beside those that tell by themselves; made when they are needed first."""
    declared = r"(?-i:\b(?:%s))" % "|".join(map(re.escape, names)) if names else _NEVER
    parts = {
        "name": "%s|%s" % (_TELLING, declared) if names else _TELLING,
        "words": _TELLING_WORDS,
        "late": _TELLING_LATE,
        "capitals": _TELLING_CAPITALS,
        "declared": declared,
        "value": _VALUE,
        "bare": _BARE,
        "quoted": _QUOTED,
        "host": _HOST_PORT,
    }
    places = [re.compile(pattern % parts) for pattern in _PLACES]
    return (*places, *(re.compile(pattern % parts, re.I) for pattern in _NAMED))


class Redactor:
    """Masks secrets in texts that leave the host: known values in every form they take, and what looks like one.

    Args:
        secrets: Known values; of ``user:password`` the password counts by itself, too.
        names: Names whose values are secret although they do not tell so.
    """

    def __init__(self, secrets: t.Iterable[str] = (), names: t.Iterable[str] = ()) -> None:
        known: set[str] = set()
        for secret in secrets:
            known.add(secret)
            if ":" in secret:
                known.add(secret.split(":", 1)[1])
        # What is blank is no secret, and NGC's user name is known to everybody.
        known = {secret for secret in known if secret.strip() and secret != "$oauthtoken"}  # noqa: S105
        forms = {form for secret in known if len(secret) >= SHORTEST_SECRET for form in _forms(secret)}
        self._forms = sorted(forms, key=lambda form: (-len(form), form))
        self._pieces = [
            (form[start : start + _PIECE], form)
            for form in self._forms
            if len(form) >= 2 * _PIECE
            for start in range(0, len(form) - _PIECE + 1, _PIECE)
        ]
        short = (secret for secret in known if SHORTEST_WORD <= len(secret) < SHORTEST_SECRET)
        short = (
            form
            for secret in short
            if not re.match(_ORDINARY, secret)
            for form in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
        )
        words = sorted(set(short), key=lambda form: (-len(form), form))
        self._words = re.compile(r"(?<!\w)(?:%s)(?!\w)" % "|".join(map(re.escape, words))) if words else None
        self._declared = frozenset(name for name in names if name.strip())
        self._names = tuple(sorted(name for name in self._declared if not is_name_of_secret(name)))
        self.count = 0

    def text(self, text: str) -> str:
        """A text without secrets."""
        for form in self._forms:
            found = text.count(form)
            if found:
                self.count += found
                text = text.replace(form, MASK)
        for piece, form in self._pieces:
            if piece in text:
                text = self._without_parts(text, piece, form)
        if self._words is not None:
            text = self._words.sub(self._mask, text)
        if re.match(_PLAIN, text):
            return text
        for expression in _expressions(self._names):
            text = expression.sub(self._mask, text)
        return text

    def _mask(self, found: t.Match[str]) -> str:
        groups = found.groupdict()
        quotes = [groups.get(kind) or "" for kind in ("quote", "escaped", "deeper")]
        kept = "".join([groups.get("keep") or "", *quotes])
        name = (groups.get("name") or "").lstrip("-.")
        if found.group(0)[len(kept) :] == MASK or (
            name and name not in self._declared and re.fullmatch(_HARMLESS, name)
        ):
            return found.group(0)
        self.count += 1
        return kept + MASK

    def _without_parts(self, text: str, piece: str, form: str) -> str:
        """Mask every longest part of a secret around one of its pieces: keys are cut by line ends and by column widths."""
        at = form.index(piece)
        parts: list[str] = []
        done = 0
        place = text.find(piece)
        while place >= 0:
            begin, end = place, place + len(piece)
            while begin > done and at - (place - begin) > 0 and text[begin - 1] == form[at - (place - begin) - 1]:
                begin -= 1
            while end < len(text) and at + (end - place) < len(form) and text[end] == form[at + (end - place)]:
                end += 1
            self.count += 1
            parts += [text[done:begin], MASK]
            done = end
            place = text.find(piece, done)
        return "".join([*parts, text[done:]])

    def environment(self, variables: t.Sequence[str]) -> list[str]:
        """``NAME=value`` of a container: values of names that say so, and of other names where they look like a key."""
        found = []
        for variable in variables:
            name, separator, value = variable.partition("=")
            plain = re.match(_PLAIN_VARIABLES, name) or name.startswith("NIM_")
            if value and (self._tells(name) or (not plain and looks_secret(value))):
                self.count += 1
                value = MASK
            found.append(self.text(name) + separator + self.text(value))
        return found

    def _tells(self, name: str) -> bool:
        return name in self._declared or is_name_of_secret(name)

    def structure(self, value: t.Any) -> t.Any:
        """JSON data without secrets: environments, values of keys that say so, and options with a value of their own."""
        if isinstance(value, dict):
            return {self.text(str(key)): self._entry(str(key), entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            if value and all(isinstance(entry, str) for entry in value):
                return self._words_of(value)
            return [self.structure(entry) for entry in value]
        return self.text(value) if isinstance(value, str) else value

    def _words_of(self, words: t.Sequence[str]) -> list[str]:
        """A list of texts: it may be the arguments of a program, where one says what the next one is."""
        found: list[str] = []
        before = ""
        for word in words:
            option = before.lstrip("-") if before.startswith("-") and "=" not in before else ""
            login = re.match(_LOGIN, word) if before in _LOGIN_OPTIONS else None
            if option and word and (self._tells(option) or option.rpartition("-")[2] in ("pass", "pwd")):
                self.count += 1
                found.append(MASK)
            elif login:
                self.count += 1
                found.append(login.group(1) + MASK)
            else:
                # One word of a list may be another one's name and value in one.
                found.append(self._assignment(word))
            before = word
        return found

    def _assignment(self, word: str) -> str:
        """A word of a list: where it is NAME=value, the value goes on to its end."""
        name, separator, value = word.partition("=")
        if value and "\n" not in word and re.fullmatch(r"-{0,2}[\w.-]+", name) and self._tells(name.lstrip("-")):
            self.count += 1
            return self.text(name) + separator + MASK
        return self.text(word)

    def _entry(self, key: str, value: t.Any) -> t.Any:
        if key == "Env" and isinstance(value, list):
            return self.environment([str(entry) for entry in value])
        if self._tells(key) and value not in ("", None) and not isinstance(value, (bool, dict)):
            if isinstance(value, (list, tuple)):
                return [MASK if isinstance(entry, str) else self.structure(entry) for entry in value]
            if isinstance(value, str) or key in self._declared or re.search(_ALSO_NUMBERS, key):
                self.count += 1
                return MASK
        return self.structure(value)


@functools.lru_cache(maxsize=8)
def _redactor(secrets: tuple[str, ...], names: tuple[str, ...]) -> Redactor:
    return Redactor(secrets, names)


def scrub(text: str, secrets: t.Iterable[str] = (), names: t.Iterable[str] = ()) -> str:
    """A text without known secrets and without whatever looks like one."""
    return _redactor(tuple(secrets), tuple(names)).text(text)


def scrub_given(text: str) -> str:
    """What an operator has written, the same; ``user:password@host`` needs no scheme there, and a digest is no host."""
    return re.sub(r"[^\s'\"=/:(\[{,]{1,64}:[^\s'\"@]{1,256}@(?!sha256:)", MASK + "@", scrub(text))


def scrub_data(value: t.Any) -> t.Any:
    """JSON data without whatever looks like a secret."""
    return _redactor((), ()).structure(value)


def _forms(secret: str) -> set[str]:
    """How a value may be written down."""
    raw = secret.encode("utf-8", "surrogatepass")
    as_json = json.dumps(secret)[1:-1]
    forms = {secret, secret[::-1], raw.hex(), raw.hex().upper(), as_json, json.dumps(secret, ensure_ascii=False)[1:-1]}
    # JSON inside JSON, Python's and YAML's quotes, a shell's words, systemd's and Compose's doubled signs, XML.
    forms |= {json.dumps(as_json)[1:-1], repr(secret)[1:-1], secret.replace("\\", "\\\\")}
    forms |= {secret.replace("'", written) for written in ("''", "'\\''", "'\"'\"'")}
    forms |= {re.sub(r"([^\w@%+=:,./-])", r"\\\1", secret), secret.replace("$", "$$")}
    forms |= {written.replace("%", "%%") for written in (secret, json.dumps(secret, ensure_ascii=False)[1:-1])}
    markup = secret.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    quotes = markup.replace('"', "&quot;")
    forms |= {markup, quotes} | {quotes.replace("'", written) for written in ("&#x27;", "&#39;", "&apos;")}
    for quoted in (urllib.parse.quote(secret, safe=""), urllib.parse.quote(secret), urllib.parse.quote_plus(secret)):
        forms |= {quoted, re.sub(r"%[0-9A-F]{2}", lambda found: found.group(0).lower(), quoted)}
    forms |= {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
    for shift in range(3):
        # Inside a longer text, base64 depends on the place: what is the same whatever stands around it.
        inner = base64.b64encode(b"\0" * shift + raw).decode().rstrip("=")
        inner = inner[(0, 2, 3)[shift] : len(inner) - (0, 1, 1)[(len(raw) + shift) % 3]]
        forms |= {inner, inner.replace("+", "-").replace("/", "_")}
    return {form for form in forms if len(form) >= SHORTEST_SECRET}


# -- what is known of a host -----------------------------------------------------------------------


class Secrets(t.NamedTuple):
    """What must not be seen.

    Attributes:
        values: Secrets, as they are and as they are stored.
        names: Names of variables that are secret.
    """

    values: t.Tuple[str, ...] = ()
    names: t.Tuple[str, ...] = ()

    def redactor(self, more: t.Iterable[str] = ()) -> Redactor:
        return Redactor({*self.values, *more}, self.names)


#: Bytes; no such file is longer.
_LARGEST = 2**20
#: Where proxies with a password are configured, and directories of such files.
_PROXIES = (
    "/etc/docker/daemon.json",
    "/etc/environment",
    "/etc/default/docker",
    "/etc/sysconfig/docker",
    "/etc/apt/apt.conf",
)
_PROXY_DIRECTORIES = (
    "/etc/systemd/system/docker.service.d",
    "/etc/systemd/system/containerd.service.d",
    "/etc/apt/apt.conf.d",
)


def environment_files(host: Host) -> list[str]:
    """Files of the key and of the models' secret variables; read only in order to mask what is in them."""
    return [
        "%s/%s" % (CONFIGURATION_DIRECTORY, name)
        for name in host.list_dir(CONFIGURATION_DIRECTORY)
        if name.endswith(".env")
    ]


def known_secrets(host: Host, *, homes: bool = True) -> Secrets:
    """Every secret that this collection or a login has left on the host; read only in order to mask it.

    The key and the models' secret variables, logins at registries, and what stands before the ``@`` of proxies.

    Args:
        homes: Whether to look at the logins of every user, or of root alone, as for what root's containers say.
    """
    values: list[str] = []
    names: list[str] = []
    for path in environment_files(host):
        for line in (_read(host, path) or "").splitlines():
            name, separator, value = line.partition("=")
            if separator and not name.startswith("#"):
                names.append(name.strip())
                values += [value.strip(), value.strip().strip("'\"")]
                # As Docker writes the key down.
                values.append(base64.b64encode(("$oauthtoken:" + value.strip()).encode()).decode())
    users = {"/root"}
    if homes:
        passwd = (_read(host, "/etc/passwd") or "").splitlines()
        users |= {line.split(":")[5] for line in passwd if line.count(":") >= 6}
    for home in sorted(users):
        text = _read(host, home.rstrip("/") + "/.docker/config.json")
        values += [*docker_secrets(text), *_logins_in_urls(text)]
    for directory in _PROXY_DIRECTORIES:
        for name in host.list_dir(directory):
            values += _logins_in_urls(_read(host, "%s/%s" % (directory, name)))
    for path in _PROXIES:
        values += _logins_in_urls(_read(host, path))
    return Secrets(
        tuple(value for value in dict.fromkeys(values) if value), tuple(dict.fromkeys(name for name in names if name))
    )


def _logins_in_urls(text: str | None) -> list[str]:
    """``user:password`` of URLs, as they are written and as they are meant; a password may hold @ and / as they are."""
    found: list[str] = []
    for pair in re.findall(r"(?i)[a-z][a-z0-9+.-]{1,20}://([^\s:@/\"']{0,256}:[^\s\"']{1,512})@", text or ""):
        # A comma or a semicolon may begin another URL.
        for login in (pair, re.split(r"@[^@]*://", pair)[0]):
            found += [login, urllib.parse.unquote(login)]
    return found


def docker_secrets(text: str | None) -> list[str]:
    """Credentials in Docker's ``config.json``: passwords, as they are and as Docker writes them, and tokens."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return []
    secrets: list[str] = []
    auths = found.get("auths") if isinstance(found, dict) else None
    for entry in auths.values() if isinstance(auths, dict) else []:
        if not isinstance(entry, dict):
            continue
        secrets += [str(entry[key]) for key in ("auth", "password", "identitytoken", "registrytoken") if entry.get(key)]
        try:
            pair = base64.b64decode(str(entry.get("auth") or "")).decode("utf-8")
        except ValueError:
            continue
        if ":" in pair:
            secrets += [pair, pair.split(":", 1)[1]]
    return secrets


def _read(host: Host, path: str) -> str | None:
    try:
        found = host.stat(path)
        # Users' own files are among them.
        return host.read_text(path) if found is not None and found.size <= _LARGEST else None
    except FleetError:
        return None
