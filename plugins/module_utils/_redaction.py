# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Secrets that must not appear in what leaves a host."""

from __future__ import annotations

import base64
import json
import re
import typing as t
import urllib.parse

from ._errors import FleetError
from ._host import Host
from ._nim_paths import CONFIGURATION_DIRECTORY

#: What stands in the place of a secret.
MASK = "***"

_SECRETS = re.compile(
    r"nvapi-[\w-]{6,}"
    r"|\bhf_[A-Za-z0-9]{8,}"
    r"|(?i:(?<=bearer )|(?<=basic )|(?<=apikey ))[\w.+/=~-]{8,}"
    r"|(?i:(?:(?<=api_key=)|(?<=api-key=)|(?<=token=)|(?<=secret=)|(?<=password=)))[^\s,;&'\"]{4,}"
    r"|(?i:(?:(?<=api_key': ')|(?<=token': ')|(?<=api_key\": \")|(?<=token\": \")))[^'\"]{4,}"
)


def host_secrets(host: Host) -> list[str]:
    """Values that must not appear in a log line that leaves the host: the NGC key, what Docker makes of it, and the secret
    variables of the models."""
    values: list[str] = []
    for path in environment_files(host):
        for line in (_read(host, path) or "").splitlines():
            name, separator, value = line.partition("=")
            value = value.strip().strip("'\"")
            if separator and not name.startswith("#") and len(value) >= 8:
                values += [value, base64.b64encode(("$oauthtoken:" + value).encode()).decode()]
    return values


def environment_files(host: Host) -> list[str]:
    """Files of the key and of the models' secret variables; read only in order to mask what is in them."""
    return [
        "%s/%s" % (CONFIGURATION_DIRECTORY, name)
        for name in host.list_dir(CONFIGURATION_DIRECTORY)
        if name.endswith(".env")
    ]


def scrub(text: str, secrets: t.Iterable[str] = ()) -> str:
    """Mask known secrets, and whatever looks like one."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)


#: Length of the pieces by which a secret is recognised also where only a part of it stands.
_PIECE = 8
#: A secret is masked wherever it occurs, so a shorter value would take ordinary words with it.
SHORTEST_SECRET = 6

_TELLING = r"[\w.-]{0,64}(?:key(?!s\b|board|ring|word)|token(?!s|iz)|secret|passw(?:or)?d|passphrase|credential|authorization)[\w.-]*"
#: What looks like a secret wherever it stands; the group "keep" stays.
_LOOKS = tuple(
    re.compile(pattern)
    for pattern in (
        # keys of NGC, Hugging Face, GitHub, GitLab, OpenAI, AWS, Google, Slack, Docker Hub; JSON web tokens
        r"nvapi-[\w-]{6,}",
        r"\b(?:hf|gh[pousr]|github_pat|glpat|sk|AKIA|ASIA|AIza|xox[abpr]|dckr_pat)[-_]?[A-Za-z0-9_-]{10,}",
        r"\beyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?",
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        # user and password in a URL
        r"(?P<keep>(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{1,20}://)[^\s/@\"']+(?=@)",
        # Authorization headers, also as curl prints and JSON writes them
        r"(?i)(?P<keep>authorization[\"']?\s*[:=]\s*[\"']?)(?:[a-z]+\s+)?[\w.+/=~-]{4,}",
        r"(?i)(?P<keep>\b(?:bearer|basic|apikey)\s+)[\w.+/=~-]{8,}",
        # NAME=value, --name value, "name": "value", 'name': 'value', name: value
        r"(?i)(?P<keep>\b%s=)[^\s,;&'\"]+" % _TELLING,
        r"(?i)(?P<keep>--%s[ =])[^\s,;&'\"]+" % _TELLING,
        r"(?i)(?P<keep>[\"']%s[\"']\s*:\s*[\"'])[^'\"]+" % _TELLING,
        r"(?i)(?P<keep>[\"'](?:auth|identitytoken|registrytoken)[\"']\s*:\s*[\"'])[^'\"]+",
        r"(?im)(?P<keep>^[ \t]*[\w.-]{0,64}(?:key|token|secret|passw(?:or)?d|passphrase)\s*:\s+)\S+",
    )
)
#: Variables of a container whose value is no secret whatever it looks like, unless the name says so.
_PLAIN_VARIABLES = re.compile(
    r"(?:NVIDIA|CUDA|NCCL|NV|VLLM|TRTLLM|TORCH|PYTORCH|LIBRARY|LD|OMPI|OMP|UCX|HOME|PATH|PYTHON|LANG|LC|SHELL|TERM|PWD|USER|HOSTNAME|TZ)(?:_|\Z)|PATH\Z"
)
_NAME_OF_SECRET = re.compile(_TELLING + r"|.*(?:^|_)(?:AUTH|PASS|PWD|PAT|CERT_DATA)(?:_|$).*", re.I)
_UUID = re.compile(r"(?:GPU-|MIG-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", re.I)
#: Keys of facts and of Docker that only sound like secrets.
_HARMLESS_KEY = re.compile(
    r"key_?(?:fingerprint|state|safe|file|url|path|id|in_service)|.*_fingerprint|max_tokens|tokenizer", re.I
)
_ONE_WORD = re.compile(r"[A-Za-z0-9+/_=.~:!@#$%^&*-]{12,}\Z")
_OPTION_OF_SECRET = re.compile(r"--?%s\Z" % _TELLING, re.I)


def looks_secret(value: str) -> bool:
    """Whether a value could be a key: one word of some length with both letters and digits that is no path, name or UUID."""
    if not _ONE_WORD.match(value) or value.startswith(("/", "sha256:", "http")) or _UUID.match(value):
        return False
    digits, letters = len(re.findall(r"\d", value)), len(re.findall(r"[A-Za-z]", value))
    # Versions and names such as llama-3.1-8b-instruct have few digits or many separators.
    words = [word for word in re.split(r"[._:/-]", value) if word]
    return digits >= 2 and letters >= 2 and max(map(len, words), default=0) >= 10


class Redactor:
    """Masks secrets in texts that leave the host: known values in every form they take, and what looks like one.

    Args:
        secrets: Known values; ``user:password`` counts as a whole and by its parts.
    """

    def __init__(self, secrets: t.Iterable[str]) -> None:
        known: set[str] = set()
        for secret in secrets:
            known.add(secret)
            if ":" in secret:
                known.update(secret.split(":", 1))
        known = {secret for secret in known if len(secret) >= SHORTEST_SECRET and secret != "$oauthtoken"}  # noqa: S105  # NGC's user name
        forms = sorted({form for secret in known for form in _forms(secret)}, key=lambda form: (-len(form), form))
        self._forms = forms
        self._pieces = [
            (form[start : start + _PIECE], form)
            for form in forms
            if len(form) >= 2 * _PIECE
            for start in range(0, len(form) - _PIECE + 1, _PIECE)
        ]
        self.count = 0

    def text(self, text: str) -> str:
        """A text without secrets."""
        for form in self._forms:
            self.count += text.count(form)
            text = text.replace(form, MASK)
        for piece, form in self._pieces:
            if piece in text:
                text = self._without_parts(text, piece, form)
        for pattern in _LOOKS:
            text = pattern.sub(self._mask, text)
        return text

    def _mask(self, found: t.Match[str]) -> str:
        kept = found.groupdict().get("keep") or ""
        if found.group(0)[len(kept) :].startswith(MASK):
            return found.group(0)
        self.count += 1
        return kept + MASK

    def _without_parts(self, text: str, piece: str, form: str) -> str:
        """Mask every longest part of a secret around one of its pieces: keys are cut by line ends and by column widths."""
        at = form.index(piece)
        place = text.find(piece)
        while place >= 0:
            begin, end = place, place + len(piece)
            while begin > 0 and at - (place - begin) > 0 and text[begin - 1] == form[at - (place - begin) - 1]:
                begin -= 1
            while end < len(text) and at + (end - place) < len(form) and text[end] == form[at + (end - place)]:
                end += 1
            self.count += 1
            text = text[:begin] + MASK + text[end:]
            place = text.find(piece, begin + len(MASK))
        return text

    def environment(self, variables: t.Sequence[str]) -> list[str]:
        """``NAME=value`` of a container: values of names that say so, and of other names where they look like a key."""
        found = []
        for variable in variables:
            name, separator, value = variable.partition("=")
            plain = _PLAIN_VARIABLES.match(name) or name.startswith("NIM_")
            if value and (_NAME_OF_SECRET.match(name) or (not plain and looks_secret(value))):
                self.count += 1
                value = MASK
            found.append(name + separator + self.text(value))
        return found

    def structure(self, value: t.Any) -> t.Any:
        """JSON data without secrets: environments, values of keys that say so, and options with a value of their own."""
        if isinstance(value, dict):
            return {self.text(str(key)): self._entry(str(key), entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            found = []
            masked = False
            for entry in value:
                found.append(MASK if masked and isinstance(entry, str) else self.structure(entry))
                masked = isinstance(entry, str) and bool(_OPTION_OF_SECRET.match(entry))
            return found
        return self.text(value) if isinstance(value, str) else value

    def _entry(self, key: str, value: t.Any) -> t.Any:
        if key == "Env" and isinstance(value, list):
            return self.environment([str(entry) for entry in value])
        if isinstance(value, str) and value and _NAME_OF_SECRET.match(key) and not _HARMLESS_KEY.match(key):
            self.count += 1
            return MASK
        return self.structure(value)


def _forms(secret: str) -> set[str]:
    """How a value may be written down."""
    raw = secret.encode("utf-8", "surrogatepass")
    forms = {secret, secret[::-1], raw.hex(), raw.hex().upper(), json.dumps(secret)[1:-1]}
    forms |= {urllib.parse.quote(secret, safe=""), urllib.parse.quote(secret), urllib.parse.quote_plus(secret)}
    forms |= {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
    for shift in range(3):
        # Inside a longer text, base64 depends on the place: what is the same whatever stands around it.
        inner = base64.b64encode(b"\0" * shift + raw).decode().rstrip("=")
        inner = inner[(0, 2, 3)[shift] : len(inner) - (0, 1, 1)[(len(raw) + shift) % 3]]
        forms |= {inner, inner.replace("+", "-").replace("/", "_")}
    return {form for form in forms if len(form) >= SHORTEST_SECRET}


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


def known_secrets(host: Host) -> list[str]:
    """Every secret that this collection or a login has left on the host; read only in order to mask it.

    The key and the models' secret variables, logins at registries of every user, and what stands before the ``@`` of
    proxies.
    """
    secrets: list[str] = []
    for path in environment_files(host):
        for line in (_read(host, path) or "").splitlines():
            name, separator, value = line.partition("=")
            if separator and not name.startswith("#"):
                secrets += [value.strip(), value.strip().strip("'\"")]
    homes = {"/root"} | {
        line.split(":")[5] for line in (_read(host, "/etc/passwd") or "").splitlines() if line.count(":") >= 6
    }
    for home in sorted(homes):
        secrets += docker_secrets(_read(host, home.rstrip("/") + "/.docker/config.json"))
    configurations = ["/etc/docker/daemon.json", "/etc/environment"]
    for directory in ("/etc/systemd/system/docker.service.d", "/etc/apt/apt.conf.d"):
        configurations += ["%s/%s" % (directory, name) for name in host.list_dir(directory)]
    for path in configurations:
        for pair in re.findall(r"[a-z][a-z0-9+.-]{1,20}://([^\s/@\"']+:[^\s/@\"']+)@", _read(host, path) or ""):
            secrets += [pair, urllib.parse.unquote(pair)]
    return [secret for secret in dict.fromkeys(secrets) if secret]


def _read(host: Host, path: str) -> str | None:
    try:
        return host.read_text(path)
    except FleetError:
        return None
