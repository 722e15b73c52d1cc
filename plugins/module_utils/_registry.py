# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a container registry knows of an image before a byte of it is pulled, and why it refuses.

Speaks the OCI distribution API with Docker's token flow (distribution/distribution ``docs/content/spec/auth``), in the
dialect of nvcr.io: the scope stands inside the realm, and a repository that does not exist, one that needs a key and a
revoked key all get the same 401.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import http.client
import os
import re
import socket
import ssl
import time
import typing as t
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field

from ._errors import FleetError
from ._image_reference import DOCKER_HUB, ImageReference
from ._untrusted import MapOf, is_digits, json_object, misfit, parse_json

USER_AGENT = "gpu_fleet.nim"
#: Seconds for one request to answer.
TIMEOUT = 30.0
#: Requests in all for an answer that may be better next time.
ATTEMPTS = 4
#: A Retry-After beyond this many seconds ends the attempt: the operator decides when to come back.
RETRY_AFTER_MAX = 30.0
#: Manifests and configurations are some kilobytes; more is no answer of a registry.
_BODY_MAX = 16 * 1024 * 1024
#: Repositories that exist and that every valid key may read: what they answer tells a bad key from a wrong name.
CONTROL_REPOSITORIES = {"nvcr.io": "nvidia/cuda"}
#: Where the Docker Engine looks for the CA of a registry, beside the system's store.
CERTIFICATES = "/etc/docker/certs.d"

_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_ACCEPT = ", ".join(_INDEX_TYPES + _MANIFEST_TYPES)

#: Kernel's machine name -> the name in image manifests.
_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}

#: Reasons that may be gone at the next try.
TRANSIENT = frozenset(("registry_unreachable", "rate_limit"))


def image_architecture(machine: str) -> str:
    """``x86_64`` -> ``amd64``, ``aarch64`` -> ``arm64``; others unchanged."""
    return _ARCHITECTURES.get(machine, machine)


def decode_basic(encoded: str) -> t.Optional[t.Tuple[str, str]]:
    """User and password of base64 ``user:password``, or None when it is no such thing."""
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    user, colon, password = text.partition(":")
    # Docker pads the password with NUL when it reads an old file.
    return (user, password.rstrip("\0")) if colon else None


def encode_basic(user: str, password: str) -> str:
    return base64.b64encode(("%s:%s" % (user, password)).encode("utf-8")).decode("ascii")


@dataclass(frozen=True)
class RegistryImage:
    """One image as the registry describes it.

    Attributes:
        reference: The reference that was asked for, at the place it was asked for.
        digest: Digest that ``docker pull`` by this reference would record: of the index where there is one.
        platform_digest: Digest of the manifest for the architecture; equal to ``digest`` without an index.
        architecture: Architecture of that manifest, for example ``amd64``.
        architectures: All architectures on offer.
        layers: Digest and compressed size in bytes of each layer, base first.
        environment, labels: From the image's configuration.
        created: Time stamp in the configuration, or empty.
    """

    reference: str
    digest: str
    platform_digest: str
    config_digest: str
    architecture: str
    architectures: t.Tuple[str, ...]
    layers: t.Tuple[t.Tuple[str, int], ...]
    environment: t.Dict[str, str] = field(default_factory=dict)
    labels: t.Dict[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def compressed_size(self) -> int:
        """Bytes to download when no layer is there yet."""
        return sum(size for _digest, size in dict(self.layers).items())


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: t.Mapping[str, str]
    body: bytes

    def header(self, name: str) -> str:
        return self.headers.get(name.lower(), "")

    def errors(self) -> t.List[t.Tuple[str, str]]:
        """Code and message of each error in the body, which every registry words a little differently."""
        entries = json_object(self.body.decode("utf-8", "replace")).get("errors")
        return [
            (str(entry.get("code") or "").upper(), " ".join(str(entry.get("message") or "").split()))
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict)
        ]


class _SameHostRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but shows credentials only to the place they were meant for."""

    def redirect_request(
        self, req: urllib.request.Request, fp: t.Any, code: int, msg: str, headers: t.Any, newurl: str
    ) -> t.Optional[urllib.request.Request]:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and _origin(req.full_url) != _origin(new.full_url):
            new.headers.pop("Authorization", None)
            new.unredirected_hdrs.pop("Authorization", None)
        return new


def _origin(url: str) -> t.Tuple[str, str, int]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)


def _is_loopback(registry: str) -> bool:
    host = urllib.parse.urlsplit("//" + registry).hostname or ""
    return host == "localhost" or host == "::1" or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def parse_challenge(header: str) -> t.Tuple[str, t.Dict[str, str]]:
    """Scheme in lower case and parameters of a Www-Authenticate header."""
    scheme, _space, rest = header.strip().partition(" ")
    parameters = {
        name.lower(): quoted if quoted or not bare else bare
        for name, quoted, bare in re.findall(r'([A-Za-z_]+)\s*=\s*(?:"([^"]*)"|([^",\s]+))', rest)
    }
    return scheme.lower(), parameters


def token_url(parameters: t.Mapping[str, str], scope: str, account: str = "") -> str:
    """Where to fetch a token, given the parameters of a Bearer challenge.

    nvcr.io puts the scope into the realm's own query; what is already there is not repeated. Empty when the realm is no URL.
    """
    try:
        parts = urllib.parse.urlsplit(parameters.get("realm", ""))
    except ValueError:
        return ""
    query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    present = {name for name, _value in query}
    wanted = [("service", parameters.get("service", "")), ("scope", parameters.get("scope", "") or scope)]
    if account:
        wanted.append(("account", account))
    query += [(name, value) for name, value in wanted if value and name not in present]
    encoded = urllib.parse.urlencode(query, safe=":/,$")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, encoded, ""))


_INDEX = {"manifests": [{"digest": str, "platform": {"os": str, "architecture": str}}]}
_MANIFEST = {"layers": [{"digest": str, "size": int}], "config": {"digest": str}}
_CONFIG = {"architecture": str, "created": str, "config": {"Env": [str], "Labels": MapOf(str)}}


def _shaped(document: t.Dict[str, t.Any], shape: t.Any, what: str, name: str) -> t.Dict[str, t.Any]:
    """The document, which is what the OCI image specification promises as far as it is read here."""
    wrong = misfit(document, shape)
    if wrong:
        raise FleetError(
            "registry_error",
            "The %s of %s is not what the OCI image specification promises (%s); use a tag that was pushed by another "
            "program, or look for a proxy that changes what passes through it." % (what, name, wrong),
            image=name,
        )
    return document


def _offered(index: t.Mapping[str, t.Any]) -> t.Dict[str, str]:
    """Digest of the manifest for each architecture of Linux."""
    found: t.Dict[str, str] = {}
    for entry in index.get("manifests") or []:
        platform = entry.get("platform") or {}
        # Attestations are listed with the platform unknown/unknown.
        if platform.get("os") == "linux" and platform.get("architecture"):
            found.setdefault(platform["architecture"], entry.get("digest") or "")
    return found


def _layers(manifest: t.Dict[str, t.Any], name: str) -> t.Tuple[t.Tuple[str, int], ...]:
    """Digest and compressed size of each layer."""
    if not isinstance(manifest.get("layers"), list) or not isinstance(manifest.get("config"), dict):
        kind = manifest.get("mediaType") or "schema %s" % manifest.get("schemaVersion")
        raise FleetError(
            "registry_error",
            "The manifest of %s is of a kind that is not supported (%s); use a tag that was pushed in the Docker v2 or "
            "OCI format." % (name, str(kind)[:100]),
            image=name,
        )
    layers = _shaped(manifest, _MANIFEST, "manifest", name)["layers"]
    return tuple((layer.get("digest") or "", max(0, layer.get("size") or 0)) for layer in layers)


class RegistryClient:
    """Talks to one registry with one pair of credentials or none.

    Args:
        registry: Host with optional port, for example ``nvcr.io``.
        username, password: Credentials; for NGC the user is the literal ``$oauthtoken``.
        insecure: As Docker's insecure-registries: no certificate check, plain HTTP when there is no TLS.
            None: for loopback addresses only, like Docker.
        control_repository: Repository that the credentials may certainly read; None = the known one of the registry.
        proxies: ``http``, ``https``, ``no`` as in :func:`urllib.request.getproxies`; None = the environment's.
    """

    def __init__(
        self,
        registry: str,
        username: str = "",
        password: str = "",
        *,
        insecure: t.Optional[bool] = None,
        control_repository: t.Optional[str] = None,
        proxies: t.Optional[t.Mapping[str, str]] = None,
        timeout: float = TIMEOUT,
        attempts: int = ATTEMPTS,
        sleep: t.Callable[[float], None] = time.sleep,
        certificates: str = CERTIFICATES,
    ) -> None:
        self.registry = registry
        self._host = "registry-1.docker.io" if registry == DOCKER_HUB else registry
        self._username = username
        self._password = password
        self._insecure = _is_loopback(registry) if insecure is None else insecure
        self._schemes = ["https", "http"] if self._insecure else ["https"]
        if control_repository is None:
            control_repository = CONTROL_REPOSITORIES.get(registry, "")
        self._control_repository = control_repository
        self._timeout = timeout
        self._attempts = max(1, attempts)
        self._sleep = sleep
        self._tokens: t.Dict[str, str] = {}
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(self._proxies(proxies)),
            urllib.request.HTTPSHandler(context=self._context(certificates)),
            _SameHostRedirects(),
        )

    @property
    def has_credentials(self) -> bool:
        return bool(self._password)

    # -- questions --------------------------------------------------------------------------------

    def resolve(self, reference: ImageReference, architecture: str) -> RegistryImage:
        """Look an image up for an architecture (``amd64``, ``arm64``).

        Raises:
            FleetError: ``no_key``, ``bad_key``, ``no_entitlement``, ``no_such_repository``, ``no_such_tag``, ``legal``,
                ``rate_limit``, ``unauthorized``, ``registry_unreachable``, ``tls_error``, ``architecture`` or
                ``registry_error``.
        """
        name = str(reference)
        repository = reference.repository
        version = reference.digest or reference.tag or "latest"
        digest, document = self._manifest(repository, version, name)
        platform_digest = digest
        architectures: t.Tuple[str, ...] = ()
        if "manifests" in document:
            offered = _offered(_shaped(document, _INDEX, "index", name))
            architectures = tuple(offered)
            if architecture not in offered:
                raise _wrong_architecture(name, architecture, architectures)
            platform_digest, document = self._manifest(repository, offered[architecture], name)
        layers = _layers(document, name)
        config_digest = str(document["config"].get("digest") or "")
        config = _shaped(self._blob_json(repository, config_digest, name), _CONFIG, "configuration", name)
        found = str(config.get("architecture") or "")
        architectures = architectures or ((found,) if found else ())
        if found and found != architecture:
            raise _wrong_architecture(name, architecture, architectures)
        details = config.get("config") or {}
        environment = dict(entry.split("=", 1) for entry in details.get("Env") or [] if "=" in entry)
        return RegistryImage(
            reference=name,
            digest=digest,
            platform_digest=platform_digest,
            config_digest=config_digest,
            architecture=found or architecture,
            architectures=architectures,
            layers=layers,
            environment=environment,
            labels=dict(details.get("Labels") or {}),
            created=str(config.get("created") or ""),
        )

    def blob(self, reference: ImageReference, digest: str) -> bytes:
        """Content of a layer or configuration of an image; meant for small ones.

        Raises:
            FleetError: As :meth:`resolve`.
        """
        name = str(reference)
        answer = self._ask(reference.repository, "blobs/" + digest, name, {})
        if "sha256:" + hashlib.sha256(answer.body).hexdigest() != digest:
            raise FleetError(
                "registry_error",
                "A part of %s does not have the digest %s that its manifest names; look for a proxy that changes what "
                "passes through it." % (name, digest),
                image=name,
            )
        return answer.body

    def compressed_sizes(self, reference: ImageReference) -> t.Dict[str, int]:
        """Bytes to download for each architecture on offer; empty where the image has no index.

        Raises:
            FleetError: As :meth:`resolve`.
        """
        name = str(reference)
        version = reference.digest or reference.tag or "latest"
        _digest, document = self._manifest(reference.repository, version, name)
        if "manifests" not in document:
            return {}
        sizes = {}
        for architecture, digest in _offered(_shaped(document, _INDEX, "index", name)).items():
            _digest, manifest = self._manifest(reference.repository, digest, name)
            sizes[architecture] = sum(dict(_layers(manifest, name)).values())
        return sizes

    def check_credentials(self, reference: t.Optional[ImageReference] = None) -> None:
        """Prove that the credentials are good, and with a reference that they may pull it.

        Args:
            reference: Image or repository that has to be readable; without one, the control repository or the
                registry's own door (as ``docker login`` does) has to accept the credentials.

        Raises:
            FleetError: As :meth:`resolve`.
        """
        if reference is not None:
            self._manifest(reference.repository, reference.digest or reference.tag or "latest", str(reference))
            return
        accepted = self._control()
        if accepted is False:
            raise self._bad_key(self.registry)

    # -- the protocol -----------------------------------------------------------------------------

    def _manifest(self, repository: str, version: str, name: str) -> t.Tuple[str, t.Dict[str, t.Any]]:
        answer = self._ask(repository, "manifests/" + version, name, {"Accept": _ACCEPT})
        digest = answer.header("Docker-Content-Digest")
        computed = "sha256:" + hashlib.sha256(answer.body).hexdigest()
        expected = version if version.startswith("sha256:") else digest
        if expected and expected.startswith("sha256:") and expected != computed:
            raise FleetError(
                "registry_error",
                "The registry's answer for %s has the digest %s where %s was announced; look for a proxy that changes "
                "what passes through it." % (name, computed, expected),
                image=name,
            )
        return computed, self._json(answer, name)

    def _blob_json(self, repository: str, digest: str, name: str) -> t.Dict[str, t.Any]:
        answer = self._ask(repository, "blobs/" + digest, name, {})
        if "sha256:" + hashlib.sha256(answer.body).hexdigest() != digest:
            raise FleetError(
                "registry_error",
                "The configuration of %s does not have the digest %s that its manifest names; look for a proxy that "
                "changes what passes through it." % (name, digest),
                image=name,
            )
        return self._json(answer, name)

    @staticmethod
    def _json(answer: _Answer, name: str) -> t.Dict[str, t.Any]:
        try:
            found = parse_json(answer.body.decode("utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise FleetError(
                "registry_error",
                "The registry answered the question for %s with something that is no JSON object; look for a proxy or "
                "a login page in between." % name,
                image=name,
            )
        return found

    def _ask(self, repository: str, path: str, name: str, headers: t.Mapping[str, str]) -> _Answer:
        """One request below /v2/<repository>/, authenticated as the registry wants it."""
        url = "/v2/%s/%s" % (repository, path)
        sent = dict(headers)
        token = self._tokens.get(repository)
        if token:
            sent["Authorization"] = token
        answer = self._request(url, sent, name)
        if answer.status == 401:
            self._tokens.pop(repository, None)
            sent["Authorization"] = self._authorize(repository, answer, name)
            answer = self._request(url, sent, name)
            if answer.status < 300:
                self._tokens[repository] = sent["Authorization"]
        if answer.status >= 300:
            raise self._refusal(answer, repository, name, "manifest")
        return answer

    def _authorize(self, repository: str, challenged: _Answer, name: str) -> str:
        """Value of the Authorization header that the challenge asks for."""
        scheme, parameters = parse_challenge(challenged.header("Www-Authenticate"))
        if scheme == "basic":
            if not self.has_credentials:
                raise self._refusal(challenged, repository, name, "token")
            return "Basic " + encode_basic(self._username, self._password)
        answer = self._token(parameters, "repository:%s:pull" % repository if repository else "", name)
        if answer.status >= 300:
            raise self._refusal(answer, repository, name, "token")
        found = self._json(answer, name)
        token = found.get("token") or found.get("access_token")
        # What cannot stand in a header would be printed by whoever refuses it.
        if not isinstance(token, str) or not re.match(r"[!-~]+\Z", token):
            raise FleetError(
                "registry_error",
                "%s gave no token for %s that could be used; look for a proxy or a login page in between."
                % (self.registry, name),
                image=name,
                registry=self.registry,
            )
        return "Bearer %s" % token

    def _token(self, parameters: t.Mapping[str, str], scope: str, name: str) -> _Answer:
        url = token_url(parameters, scope, self._username if self.has_credentials else "")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise FleetError(
                "registry_error",
                "%s does not say where to authenticate for %s; check that it is a container registry."
                % (self.registry, name),
                registry=self.registry,
            )
        headers = {}
        if self.has_credentials:
            if parts.scheme == "http" and not self._insecure:
                raise FleetError(
                    "registry_error",
                    "%s wants the key for %s sent to %s without encryption, which is refused; have the registry's "
                    "administrator mend its realm." % (self.registry, name, parts.netloc),
                    registry=self.registry,
                )
            headers["Authorization"] = "Basic " + encode_basic(self._username, self._password)
        return self._request(url, headers, name)

    def _control(self) -> t.Optional[bool]:
        """Whether the registry accepts the credentials, asked where nothing else can be the matter; None = it did not say."""
        repository = self._control_repository
        path = "/v2/%s/tags/list?n=1" % repository if repository else "/v2/"
        answer = self._request(path, {}, self.registry)
        if answer.status != 401:
            return None
        scheme, parameters = parse_challenge(answer.header("Www-Authenticate"))
        if scheme == "basic":
            sent = {"Authorization": "Basic " + encode_basic(self._username, self._password)}
            answer = self._request(path, sent, self.registry)
        else:
            answer = self._token(parameters, "repository:%s:pull" % repository if repository else "", self.registry)
        if answer.status == 401:
            return False
        if answer.status < 300:
            return True
        if answer.status in (402, 403):
            # Known, but not allowed to read this one: the key itself is good.
            return True
        raise self._refusal(answer, repository, self.registry, "token")

    # -- refusals ---------------------------------------------------------------------------------

    def _bad_key(self, name: str) -> FleetError:
        return FleetError(
            "bad_key",
            "%s refuses the API key (asked for %s): it is wrong, expired or revoked; create a new one that includes the "
            "NGC Catalog service and set ngc_api_key." % (self.registry, name)
            if self._username == "$oauthtoken"
            else "%s refuses the user name or password (asked for %s); correct them." % (self.registry, name),
            registry=self.registry,
            image=name,
        )

    def _refusal(self, answer: _Answer, repository: str, name: str, stage: str) -> FleetError:
        """What a status means; the sentence says what to do."""
        facts: t.Dict[str, t.Any] = {"image": name, "registry": self.registry, "status": answer.status}
        codes = {code for code, _message in answer.errors()}
        said = "; ".join(message for _code, message in answer.errors() if message)[:200]
        said = " (it says: %s)" % said if said else ""
        status = answer.status
        if status == 401:
            if not self.has_credentials:
                return FleetError(
                    "no_key",
                    "%s wants a key for %s and none is stored for this host (or the repository does not exist); set "
                    "ngc_api_key, or check the name." % (self.registry, name),
                    **facts,
                )
            accepted = False if repository == self._control_repository else self._control()
            if accepted is False:
                return self._bad_key(name)
            if accepted is None:
                return FleetError(
                    "unauthorized",
                    "%s refuses %s with the stored login (401) and does not tell whether the login or the name is the "
                    "matter; check both." % (self.registry, name),
                    **facts,
                )
            return FleetError(
                "no_such_repository",
                "%s accepts the API key but has no repository %s that it may see; check the name, and that the key's "
                "organisation has access to it." % (self.registry, repository),
                **facts,
            )
        if status == 402:
            return FleetError(
                "no_entitlement",
                "%s wants an NVIDIA AI Enterprise licence or trial for %s (402 Payment Required); activate one for the "
                "organisation of the key." % (self.registry, name),
                **facts,
            )
        if status == 403 or (codes & {"DENIED"} and status < 500 and status not in (429, 451)):
            if not self.has_credentials:
                return FleetError(
                    "no_key", "%s denies %s without a key%s; set ngc_api_key." % (self.registry, name, said), **facts
                )
            return FleetError(
                "no_entitlement",
                "%s knows the API key but does not let it pull %s%s; accept the terms of the image on its NGC page, check "
                "that the key includes the NGC Catalog service and belongs to the right organisation."
                % (self.registry, name, said),
                **facts,
            )
        if status == 404:
            if "NAME_UNKNOWN" in codes or (stage == "token"):
                return FleetError(
                    "no_such_repository",
                    "%s has no repository %s; check the name." % (self.registry, repository),
                    **facts,
                )
            return FleetError(
                "no_such_tag",
                "%s has the repository %s, but nothing in it under %s; name a tag that its NGC page lists (many "
                "repositories have no tag latest)."
                % (self.registry, repository, name[name.rfind(repository) + len(repository) :] or "that name"),
                **facts,
            )
        if status == 451:
            return FleetError(
                "legal",
                "%s may not hand out %s here for legal reasons (451); use another model or registry."
                % (self.registry, name),
                **facts,
            )
        if status == 429:
            wait = _retry_after(answer.header("Retry-After"))
            facts["retry_after"] = wait
            return FleetError(
                "rate_limit",
                "%s limits requests and refused %s for now (429)%s; try again later, log in, or use a mirror."
                % (self.registry, name, ": it asks to wait %d s" % wait if wait is not None else ""),
                **facts,
            )
        if status >= 500:
            return FleetError(
                "registry_unreachable",
                "%s answered the question for %s with status %d%s; try again, and see the registry's status page."
                % (self.registry, name, status, said),
                **facts,
            )
        return FleetError(
            "registry_error",
            "%s answered the question for %s with status %d%s." % (self.registry, name, status, said),
            **facts,
        )

    # -- transport --------------------------------------------------------------------------------

    def _request(self, url: str, headers: t.Mapping[str, str], name: str) -> _Answer:
        """Send a request; an absolute path goes to the registry. Transient answers are tried again with back-off."""
        for attempt in range(1, self._attempts + 1):
            pause = float(2 ** (attempt - 1))
            last = attempt == self._attempts
            try:
                answer = self._send(url, headers, name)
            except FleetError as error:
                if last or error.reason not in TRANSIENT or not error.facts.get("transient"):
                    raise
            else:
                if answer.status != 429 and answer.status < 500:
                    return answer
                wait = _retry_after(answer.header("Retry-After"))
                if last or (wait or 0) > RETRY_AFTER_MAX:
                    return answer
                pause = wait if wait is not None else pause
            self._sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, url: str, headers: t.Mapping[str, str], name: str) -> _Answer:
        if not url.startswith("/"):
            return self._exchange(url, headers, name)
        while True:
            try:
                return self._exchange("%s://%s%s" % (self._schemes[0], self._host, url), headers, name)
            except FleetError as error:
                # Like Docker: an insecure registry is asked with TLS first, then without.
                if len(self._schemes) == 1 or error.reason not in ("tls_error", "registry_unreachable"):
                    raise
                if error.facts.get("cause") in ("dns", "timeout"):
                    raise
                self._schemes.pop(0)

    def _exchange(self, url: str, headers: t.Mapping[str, str], name: str) -> _Answer:
        request = urllib.request.Request(url)  # noqa: S310  # the scheme is ours or was checked
        request.add_header("User-Agent", USER_AGENT)
        for key, value in headers.items():
            request.add_header(key, value)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                body = response.read(_BODY_MAX)
                return _Answer(response.status, _lower(response.headers), body)
        except urllib.error.HTTPError as error:
            with error:
                try:
                    body = error.read(_BODY_MAX)
                except (OSError, http.client.HTTPException):
                    # The status says enough.
                    body = b""
                return _Answer(error.code, _lower(error.headers), body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._transport_error(error, url, name) from None

    def _transport_error(self, error: Exception, url: str, name: str) -> FleetError:
        inner: t.Any = error.reason if isinstance(error, urllib.error.URLError) else error
        host = urllib.parse.urlsplit(url).netloc
        facts: t.Dict[str, t.Any] = {"image": name, "registry": self.registry, "host": host, "transient": True}
        if isinstance(inner, ssl.SSLError):
            return _tls_error(inner, host, name, dict(facts, transient=False))
        remedy = "check DNS, routes, the firewall and the proxy settings of this host (https_proxy, no_proxy)"
        if isinstance(inner, socket.gaierror):
            what, cause = "its name cannot be resolved (%s)" % inner.strerror, "dns"
        elif isinstance(inner, socket.timeout) or getattr(inner, "errno", None) == errno.ETIMEDOUT:
            what, cause = "no answer within %d s" % self._timeout, "timeout"
        elif isinstance(inner, ConnectionRefusedError):
            what, cause = "the connection is refused", "refused"
        elif isinstance(inner, OSError) and inner.strerror:
            what, cause = inner.strerror, "network"
        else:
            what, cause = str(inner) or type(inner).__name__, "network"
        facts["cause"] = cause
        return FleetError(
            "registry_unreachable", "Asking %s for %s failed: %s; %s." % (host, name, what, remedy), **facts
        )

    def _proxies(self, proxies: t.Optional[t.Mapping[str, str]]) -> t.Dict[str, str]:
        found = dict(urllib.request.getproxies() if proxies is None else proxies)
        bypass = found.pop("no", "")
        if bypass and urllib.request.proxy_bypass_environment(self._host, {"no": bypass}):  # type: ignore[attr-defined]  # not in typeshed
            return {}
        return {scheme: url for scheme, url in found.items() if scheme in ("http", "https") and url}

    def _context(self, directory: str) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self._insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context
        folder = os.path.join(directory, self._host)
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            names = []
        for entry in names:
            if entry.endswith(".crt"):
                try:
                    context.load_verify_locations(os.path.join(folder, entry))
                except (OSError, ssl.SSLError) as error:
                    raise FleetError(
                        "tls_error",
                        "%s is not a readable certificate in PEM form (%s); replace or remove it."
                        % (os.path.join(folder, entry), error),
                        registry=self.registry,
                    ) from None
        return context


def _lower(headers: t.Any) -> t.Dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _retry_after(text: str) -> t.Optional[float]:
    """Seconds of a Retry-After header; dates, which registries do not send, count as not given."""
    return float(text) if is_digits(text.strip()) else None


def _wrong_architecture(name: str, wanted: str, offered: t.Sequence[str]) -> FleetError:
    return FleetError(
        "architecture",
        "%s is built for %s, and this host is %s; use a tag or repository for %s%s."
        % (
            name,
            ", ".join(offered) or "no Linux architecture",
            wanted,
            wanted,
            " (for DGX Spark the name ends in -dgx-spark)" if wanted == "arm64" else "",
        ),
        image=name,
        architecture=wanted,
        architectures=list(offered),
    )


_CA_REMEDY = (
    "put the CA certificate in PEM form into /usr/local/share/ca-certificates/NAME.crt and run update-ca-certificates "
    "(RHEL: /etc/pki/ca-trust/source/anchors/, update-ca-trust), then restart Docker, or for this registry alone into "
    "%s/%s/ca.crt"
)


def _tls_error(error: ssl.SSLError, host: str, name: str, facts: t.Dict[str, t.Any]) -> FleetError:
    problem = getattr(error, "verify_message", "") or error.reason or str(error)
    facts["tls_problem"] = problem
    if "expired" in problem or "not yet valid" in problem:
        remedy = "check the clock of this host (timedatectl); if it is right, the certificate has to be renewed"
    elif "ostname" in problem or "IP address" in problem:
        remedy = "use the name that stands in the certificate"
    elif isinstance(error, ssl.SSLCertVerificationError):
        issuer = _issuer(host)
        if issuer:
            facts["issuer"] = issuer
            problem += ", issued by %r" % issuer
        remedy = _CA_REMEDY % (CERTIFICATES, host)
    else:
        remedy = "check that the server speaks TLS on this port; a registry without TLS must be in Docker's insecure-registries"
    return FleetError(
        "tls_error", "TLS with %s failed (asked for %s): %s; %s." % (host, name, problem, remedy), **facts
    )


def _issuer(host: str) -> str:
    """Common name (or organisation) of who issued a server's certificate, which is what names a TLS inspector."""
    parts = urllib.parse.urlsplit("//" + host)
    try:
        pem = ssl.get_server_certificate((parts.hostname or "", parts.port or 443))
        return issuer_name(ssl.PEM_cert_to_DER_cert(pem))
    except (OSError, ValueError, IndexError):
        return ""


def issuer_name(der: bytes) -> str:
    """Common name of the issuer in a DER certificate, else its organisation, else empty (X.509: RFC 5280)."""

    def read(position: int) -> t.Tuple[int, int, int]:
        """Tag, start and end of the value at a position."""
        tag, length = der[position], der[position + 1]
        position += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(der[position : position + size], "big")
            position += size
        return tag, position, position + length

    _tag, start, _end = read(0)
    _tag, position, _end = read(start)
    tag, _start, end = read(position)
    if tag == 0xA0:
        # Optional version; the serial number follows.
        _tag, _start, end = read(end)
    _tag, _start, end = read(end)
    _tag, start, end = read(end)
    issuer = der[start:end]
    # 2.5.4.3 common name, 2.5.4.10 organisation, each followed by a string.
    for identifier in (b"\x06\x03\x55\x04\x03", b"\x06\x03\x55\x04\x0a"):
        at = issuer.find(identifier)
        if at >= 0:
            at += len(identifier)
            return issuer[at + 2 : at + 2 + issuer[at + 1]].decode("utf-8", "replace")
    return ""
