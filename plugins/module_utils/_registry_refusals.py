# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Why a registry refuses an image, in a sentence that says what to do.

nvcr.io gives the same 401 for a repository that does not exist, for one that needs a key and for a revoked key: what a
control repository answers tells them apart.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ._docker_config import TOKEN_USER
from ._errors import FleetError
from ._untrusted import is_digits, json_object


@dataclass(frozen=True)
class Answer:
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


def retry_after(text: str) -> t.Optional[float]:
    """Seconds of a Retry-After header; dates, which registries do not send, count as not given."""
    return float(text) if is_digits(text.strip()) else None


@dataclass(frozen=True)
class Refusals:
    """Errors of one registry, asked with one pair of credentials or none.

    Attributes:
        control_repository: Repository that the credentials may certainly read; empty when none is known.
        control: Whether the registry accepts the credentials, asked where nothing else can be the matter; None = it does not
            say.
    """

    registry: str
    username: str
    has_credentials: bool
    control_repository: str
    control: t.Callable[[], bool | None]

    def bad_key(self, name: str) -> FleetError:
        if self.username == TOKEN_USER:
            return FleetError(
                "bad_key",
                "%s refuses the identity token that is stored for it (asked for %s): it has expired or was revoked; log in "
                "again with 'docker login %s'." % (self.registry, name, self.registry),
                registry=self.registry,
                image=name,
            )
        return FleetError(
            "bad_key",
            "%s refuses the API key (asked for %s): it is wrong, expired or revoked; create a new one that includes the "
            "NGC Catalog service and set ngc_api_key." % (self.registry, name)
            if self.username == "$oauthtoken"
            else "%s refuses the user name or password (asked for %s); correct them." % (self.registry, name),
            registry=self.registry,
            image=name,
        )

    def identity_token(self, name: str) -> FleetError:
        """For a registry that makes nothing of one."""
        return FleetError(
            "identity_token",
            "The login stored for %s is an identity token, with which it gives no access token for %s; log in with a user "
            "name and password instead: 'docker login %s'." % (self.registry, name, self.registry),
            registry=self.registry,
            image=name,
        )

    def of(self, answer: Answer, repository: str, name: str, stage: str) -> FleetError:
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
            accepted = False if repository == self.control_repository else self.control()
            if accepted is False:
                return self.bad_key(name)
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
            wait = retry_after(answer.header("Retry-After"))
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
            "%s answered the question for %s with status %d%s; check that a registry answers there, and no proxy in its place."
            % (self.registry, name, status, said),
            **facts,
        )
