# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a container registry knows of an image before a byte of it is pulled, and why it refuses.

Speaks the OCI distribution API with Docker's token flow (distribution/distribution ``docs/content/spec/auth``), in the
dialect of nvcr.io: the scope stands inside the realm, and a repository that does not exist, one that needs a key and a
revoked key all get the same 401.
"""

from __future__ import annotations

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

from ._docker_config import TOKEN_USER, encode_basic
from ._errors import FleetError
from ._image_reference import DOCKER_HUB, ImageReference
from ._registry_image import CONFIGURATION, INDEX, RegistryImage, layers_of, shaped, wrong_architecture
from ._registry_image import offered as offered_in
from ._registry_refusals import Answer, Refusals, retry_after
from ._tls_errors import CERTIFICATES, tls_error
from ._untrusted import json_object, parse_json

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
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_ACCEPT = ", ".join(_INDEX_TYPES + _MANIFEST_TYPES)

#: Reasons that may be gone at the next try.
TRANSIENT = frozenset(("registry_unreachable", "rate_limit"))


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
    encoded = urllib.parse.urlencode(query, safe=":/,$", errors="replace")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, encoded, ""))


class RegistryClient:
    """Talks to one registry with one pair of credentials or none.

    Args:
        registry: Host with optional port, for example ``nvcr.io``.
        username, password: Credentials; for NGC the user is the literal ``$oauthtoken``, for an identity token ``<token>``.
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
        self._refusals = Refusals(registry, username, bool(password), control_repository, self._control)
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
                ``rate_limit``, ``unauthorized``, ``identity_token``, ``registry_unreachable``, ``tls_error``,
                ``architecture`` or ``registry_error``.
        """
        name = str(reference)
        repository = reference.repository
        version = reference.digest or reference.tag or "latest"
        digest, document = self._manifest(repository, version, name)
        platform_digest = digest
        architectures: t.Tuple[str, ...] = ()
        if "manifests" in document:
            offered = offered_in(shaped(document, INDEX, "index", name))
            architectures = tuple(offered)
            if architecture not in offered:
                raise wrong_architecture(name, architecture, architectures)
            platform_digest, document = self._manifest(repository, offered[architecture], name)
        layers = layers_of(document, name)
        config_digest = str(document["config"].get("digest") or "")
        config = shaped(self._blob_json(repository, config_digest, name), CONFIGURATION, "configuration", name)
        found = str(config.get("architecture") or "")
        architectures = architectures or ((found,) if found else ())
        if found and found != architecture:
            raise wrong_architecture(name, architecture, architectures)
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
        return self._blob(reference.repository, digest, str(reference), "A part").body

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
        for architecture, digest in offered_in(shaped(document, INDEX, "index", name)).items():
            _digest, manifest = self._manifest(reference.repository, digest, name)
            sizes[architecture] = sum(dict(layers_of(manifest, name)).values())
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
            raise self._refusals.bad_key(self.registry)

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
        return self._json(self._blob(repository, digest, name, "The configuration"), name)

    def _blob(self, repository: str, digest: str, name: str, what: str) -> Answer:
        answer = self._ask(repository, "blobs/" + digest, name, {})
        if "sha256:" + hashlib.sha256(answer.body).hexdigest() != digest:
            raise FleetError(
                "registry_error",
                "%s of %s does not have the digest %s that its manifest names; look for a proxy that changes what passes "
                "through it." % (what, name, digest),
                image=name,
            )
        return answer

    @staticmethod
    def _json(answer: Answer, name: str) -> t.Dict[str, t.Any]:
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

    def _ask(self, repository: str, path: str, name: str, headers: t.Mapping[str, str]) -> Answer:
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
            raise self._refusals.of(answer, repository, name, "manifest")
        return answer

    def _authorize(self, repository: str, challenged: Answer, name: str) -> str:
        """Value of the Authorization header that the challenge asks for."""
        scheme, parameters = parse_challenge(challenged.header("Www-Authenticate"))
        if scheme == "basic":
            if not self.has_credentials:
                raise self._refusals.of(challenged, repository, name, "token")
            return self._basic(name)
        answer = self._token(parameters, "repository:%s:pull" % repository if repository else "", name)
        if answer.status >= 300:
            raise self._refusals.of(answer, repository, name, "token")
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

    def _basic(self, name: str) -> str:
        if self._username == TOKEN_USER:
            raise self._refusals.identity_token(name)
        return "Basic " + encode_basic(self._username, self._password)

    def _token(self, parameters: t.Mapping[str, str], scope: str, name: str) -> Answer:
        identity = self.has_credentials and self._username == TOKEN_USER
        if identity:
            url = token_url({"realm": parameters.get("realm", "")}, "")
        else:
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
            if identity:
                return self._exchange_identity(url, parameters, scope, name)
            headers["Authorization"] = self._basic(name)
        return self._request(url, headers, name)

    def _exchange_identity(self, url: str, parameters: t.Mapping[str, str], scope: str, name: str) -> Answer:
        """An access token for the identity token (distribution/distribution ``docs/content/spec/auth/oauth.md``)."""
        form = {
            "grant_type": "refresh_token",
            "refresh_token": self._password,
            "client_id": USER_AGENT,
            "service": parameters.get("service", ""),
            "scope": parameters.get("scope", "") or scope,
        }
        answer = self._request(url, {}, name, {key: value for key, value in form.items() if value})
        if answer.status in (404, 405):
            raise self._refusals.identity_token(name)
        # OAuth 2 says in the second way that it has expired or was revoked (RFC 6749, 5.2).
        error = json_object(answer.body.decode("utf-8", "replace")).get("error") if answer.status == 400 else ""
        if answer.status == 401 or error == "invalid_grant":
            raise self._refusals.bad_key(name)
        return answer

    def _control(self) -> t.Optional[bool]:
        """Whether the registry accepts the credentials, asked where nothing else can be the matter; None = it did not say."""
        repository = self._control_repository
        path = "/v2/%s/tags/list?n=1" % repository if repository else "/v2/"
        answer = self._request(path, {}, self.registry)
        if answer.status != 401:
            return None
        scheme, parameters = parse_challenge(answer.header("Www-Authenticate"))
        if scheme == "basic":
            answer = self._request(path, {"Authorization": self._basic(self.registry)}, self.registry)
        else:
            answer = self._token(parameters, "repository:%s:pull" % repository if repository else "", self.registry)
        if answer.status == 401:
            return False
        if answer.status < 300:
            return True
        if answer.status in (402, 403):
            # Known, but not allowed to read this one: the key itself is good.
            return True
        if answer.status == 400 and self._username == TOKEN_USER:
            # The door asks for no scope, without which some exchange nothing.
            return None
        raise self._refusals.of(answer, repository, self.registry, "token")

    # -- transport --------------------------------------------------------------------------------

    def _request(
        self, url: str, headers: t.Mapping[str, str], name: str, form: t.Optional[t.Mapping[str, str]] = None
    ) -> Answer:
        """Send a request; an absolute path goes to the registry. Transient answers are tried again with back-off."""
        for attempt in range(1, self._attempts + 1):
            pause = float(2 ** (attempt - 1))
            last = attempt == self._attempts
            try:
                answer = self._send(url, headers, name, form)
            except FleetError as error:
                if last or error.reason not in TRANSIENT or not error.facts.get("transient"):
                    raise
            else:
                if answer.status != 429 and answer.status < 500:
                    return answer
                wait = retry_after(answer.header("Retry-After"))
                if last or (wait or 0) > RETRY_AFTER_MAX:
                    return answer
                pause = wait if wait is not None else pause
            self._sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _send(
        self, url: str, headers: t.Mapping[str, str], name: str, form: t.Optional[t.Mapping[str, str]] = None
    ) -> Answer:
        if not url.startswith("/"):
            return self._exchange(url, headers, name, form)
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

    def _exchange(
        self, url: str, headers: t.Mapping[str, str], name: str, form: t.Optional[t.Mapping[str, str]] = None
    ) -> Answer:
        """One request; with a form a POST."""
        data = urllib.parse.urlencode(form, errors="replace").encode("ascii") if form else None
        request = urllib.request.Request(url, data)  # noqa: S310  # the scheme is ours or was checked
        request.add_header("User-Agent", USER_AGENT)
        for key, value in headers.items():
            request.add_header(key, value)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                body = response.read(_BODY_MAX)
                return Answer(response.status, _lower(response.headers), body)
        except urllib.error.HTTPError as error:
            with error:
                try:
                    body = error.read(_BODY_MAX)
                except (OSError, http.client.HTTPException):
                    # The status says enough.
                    body = b""
                return Answer(error.code, _lower(error.headers), body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._transport_error(error, url, name) from None

    def _transport_error(self, error: Exception, url: str, name: str) -> FleetError:
        inner: t.Any = error.reason if isinstance(error, urllib.error.URLError) else error
        host = urllib.parse.urlsplit(url).netloc
        facts: t.Dict[str, t.Any] = {"image": name, "registry": self.registry, "host": host, "transient": True}
        if isinstance(inner, ssl.SSLError):
            return tls_error(inner, host, name, dict(facts, transient=False))
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
