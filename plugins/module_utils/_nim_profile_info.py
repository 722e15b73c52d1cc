# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The profiles of an image for the GPUs of this host: from NIM's own listing, or from the manifest in the image."""

from __future__ import annotations

import secrets
import typing as t
from dataclasses import dataclass

from ._docker_api import DockerApi
from ._errors import FleetError
from ._gpu import Gpu
from ._gpu_inventory import GpuInventory, observe_gpus
from ._gpu_placement import Wish, place
from ._gpu_smoke_test import explain_failure
from ._gpu_wishes import device_ids, given_gpus
from ._host import CommandResult, Host
from ._image_record import read_record
from ._nim_configuration import gpu_arguments
from ._nim_family import Family, detect_family, family_of_image
from ._nim_image import NimImages
from ._nim_manifest import Manifest, manifest_on_disk
from ._nim_manifest_sources import manifest_at_registry, manifest_by_container
from ._nim_models import parse_models
from ._nim_profile_checks import Check, check_profile, verdict
from ._nim_profile_listing import Listing, parse_listing
from ._nim_profiles import LOW_MEMORY, Profile, match_profile
from ._registry import RegistryClient
from ._registry_image import image_architecture

Json = t.Dict[str, t.Any]

METHODS = ("auto", "container", "manifest")
#: Containers that list profiles; nothing else is called like that.
CONTAINER_PREFIX = "nim-profiles-"
_LISTERS = ("list-model-profiles", "nim_list_model_profiles")


@dataclass(frozen=True)
class Found:
    """Profiles and where they come from.

    Attributes:
        source: ``container``, ``image`` or ``registry``.
        certain: Whether these are certainly all profiles of the image.
        busy: Whether somebody computed on the GPUs while they were looked at.
    """

    source: str
    profiles: tuple[Profile, ...]
    family: Family
    certain: bool = True
    unknown: tuple[str, ...] = ()
    busy: bool = False


class ProfileInfo:
    """One question for the profiles of an image.

    Args:
        method: ``container`` runs the listing in the image, which has to be on the host; ``manifest`` reads the file in
            the image, on the host or at the registry; ``auto`` takes the first where it can and else the second.
        gpus: As ``gpus`` of a model; None = all.
        profile: Id or description to look for.
        lora: Whether adapters are to be loaded.
        injection: How containers get their GPUs.
        environment: Variables for the listing, for images whose model comes from elsewhere.
        timeout: Seconds for the listing.

    Raises:
        FleetError: ``invalid_option``.
    """

    def __init__(
        self,
        image: str,
        *,
        method: str = "auto",
        gpus: t.Any = None,
        profile: str | None = None,
        lora: bool = False,
        injection: str = "runtime",
        environment: t.Mapping[str, t.Any] | None = None,
        timeout: int = 300,
        api_key: str | None = None,
        docker_user: str = "root",
        registry_mirrors: t.Any = None,
        api: DockerApi | None = None,
        client: t.Callable[..., RegistryClient] = RegistryClient,
    ) -> None:
        entry: Json = {"name": "profiles", "image": image, "environment": dict(environment or {})}
        if gpus not in (None, ""):
            entry["gpus"] = gpus
        if profile:
            entry["profile"] = profile
        try:
            self.model = parse_models([entry], variable="")[0]
        except FleetError as error:
            error.message = error.message.replace("[0].", "", 1)
            raise
        self.images = NimImages(
            [{"image": image}],
            registry_mirrors=registry_mirrors,
            api_key=api_key,
            docker_user=docker_user,
            client=client,
        )
        self.reference = self.images.wanted[0].reference
        self.method = method
        self.lora = lora
        self.injection = injection
        self.timeout = timeout
        self.api = api or DockerApi()
        self.warnings: list[str] = []

    def ask(self, host: Host) -> Json:
        """Return values of the module.

        Raises:
            FleetError: ``image_missing``, ``no_gpu``, ``listing_failed``, ``no_manifest``, ``no_profiles``,
                ``gpus_unavailable``, and those of the registry.
        """
        inventory = observe_gpus(host)
        local = self._local(host)
        gpus = self._gpus(inventory)
        found = self._find(host, local, gpus)
        devices = device_ids(inventory)
        profiles = [self._described(profile, gpus, devices, found.busy) for profile in found.profiles]
        if found.unknown:
            self.warnings.append("Headings of the listing that are not understood: %s." % "; ".join(found.unknown))
        if not found.certain:
            self.warnings.append(
                "The manifest of %s may be another one: layers that are too large to be looked at come after it."
                % self.reference
            )
        return {
            "image": str(self.reference),
            "source": found.source,
            "family": found.family.key,
            "gpus": [
                {"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name, "memory_mib": gpu.memory_total_mib}
                for gpu in gpus
            ],
            "profiles": profiles,
            "match": self._match(found, profiles),
        }

    # -- what is there --------------------------------------------------------------------------------

    def _local(self, host: Host) -> Json | None:
        """The image on the host: the pinned one, else what carries the name."""
        pinned = read_record(host).get(str(self.reference))
        names = (pinned.image_id, pinned.run) if pinned is not None else (str(self.reference),)
        try:
            return next(filter(None, map(self.api.image, names)), None)
        except FleetError:
            # Without a daemon the registry is left.
            return None

    def _gpus(self, inventory: GpuInventory) -> list[Gpu]:
        if not inventory.gpus:
            return []
        request = "all" if self.model.gpus is None else self.model.gpus
        placed = place([Wish("(the listing)", request)], inventory.gpus)
        return given_gpus(placed["(the listing)"], inventory.gpus)

    def _find(self, host: Host, local: Json | None, gpus: t.Sequence[Gpu]) -> Found:
        family = family_of_image(local, self.reference.tag) if local is not None else None
        if family is not None and family.key == "native":
            raise self._native()
        if self.method == "container" or (self.method == "auto" and local is not None and gpus):
            if local is None or family is None:
                raise FleetError(
                    "image_missing",
                    "Image %s is not on this host; pull it with gpu_fleet.nim.nim_image, or set method to manifest."
                    % self.reference,
                    image=str(self.reference),
                )
            if not gpus:
                raise FleetError(
                    "no_gpu",
                    "The listing of %s needs a GPU, and this host shows none; set up the driver, or set method to "
                    "manifest." % self.reference,
                )
            try:
                listing = self._listing(host, str(local.get("Id", "")), gpus)
            except FleetError as error:
                if self.method == "container":
                    raise
                self.warnings.append("%s The manifest was read in its place." % error.message)
            else:
                busy = any(gpu.processes for gpu in gpus)
                return Found("container", listing.profiles, family, True, listing.unknown, busy)
        if local is not None and family is not None:
            manifest = manifest_on_disk(host, local) or manifest_by_container(host, str(local.get("Id", "")))
            if manifest is None:
                raise self._without_manifest()
            return Found("image", manifest.profiles, family)
        return self._at_registry(host)

    def _at_registry(self, host: Host) -> Found:
        reference = self.reference.rewritten(self.images.mirrors)
        client = self.images.client(host, reference.registry)
        image = client.resolve(reference, image_architecture(host.machine()))
        family = detect_family(image.labels, image.environment, self.reference.tag)
        if family.key == "native":
            raise self._native()
        manifest: Manifest | None = manifest_at_registry(client, reference, image)
        if manifest is None:
            raise self._without_manifest()
        return Found("registry", manifest.profiles, family, manifest.certain)

    def _native(self) -> FleetError:
        return FleetError(
            "no_profiles",
            "Image %s has the native NIM runtime, which has no profiles; leave profile out." % self.reference,
            image=str(self.reference),
        )

    def _without_manifest(self) -> FleetError:
        return FleetError(
            "no_manifest",
            "Image %s has no manifest of profiles that can be found; pull it and set method to container."
            % self.reference,
            image=str(self.reference),
        )

    # -- the listing ----------------------------------------------------------------------------------

    def _listing(self, host: Host, image: str, gpus: t.Sequence[Gpu]) -> Listing:
        """Run the utility of the image in a container that is gone afterwards."""
        name = CONTAINER_PREFIX + secrets.token_hex(4)
        uuids = [gpu.uuid for gpu in gpus]
        command = ["docker", "run", "--rm", "--pull=never", "--name=" + name, "--log-driver=none", "--cap-drop=ALL"]
        command += ["--security-opt=no-new-privileges", "--pids-limit=-1", *gpu_arguments(uuids, self.injection)]
        if self.injection == "runtime":
            command.append("--env=NVIDIA_VISIBLE_DEVICES=" + ",".join(uuids))
        command += ["--env=%s=%s" % pair for pair in sorted(self.model.environment.items())]
        try:
            answer = host.run([*command, image, _LISTERS[0]], timeout=self.timeout)
            if answer.rc == 127:
                # The utilities of speech NIMs: the image's own start program does not run commands.
                answer = host.run([*command, "--entrypoint=" + _LISTERS[1], image], timeout=self.timeout)
        finally:
            if self.api.container(name) is not None:
                # A listing that is left behind would hold the GPUs.
                host.run(["docker", "rm", "--force", name], timeout=60)
        listing = parse_listing(answer.stdout)
        if not listing.understood:
            listing = parse_listing(answer.stdout + "\n" + answer.stderr)
        if not listing.understood:
            raise self._failed(answer)
        return listing

    def _failed(self, answer: CommandResult) -> FleetError:
        dummy, remedy = explain_failure(answer.stdout + answer.stderr)
        problem = answer.last_line().rstrip(".")
        if answer.rc == 124:
            problem, remedy = "no end after %d s" % self.timeout, "raise timeout"
        return FleetError(
            "listing_failed",
            "Listing the profiles of %s in a container failed: %s; %s." % (self.reference, problem, remedy),
            image=str(self.reference),
            rc=answer.rc,
            output=(answer.stdout + answer.stderr)[-4000:],
        )

    # -- answers --------------------------------------------------------------------------------------

    def _described(self, profile: Profile, gpus: t.Sequence[Gpu], devices: t.Mapping[str, str], busy: bool) -> Json:
        count = len(gpus) if self.model.gpus is not None else None
        checks = check_profile(profile, gpus, count=count, lora=self.lora, devices=devices) if gpus else []
        if profile.verdict == LOW_MEMORY and busy:
            # It says so of every profile while a NIM runs on the GPUs.
            message = "list-model-profiles finds too little free memory, but somebody uses the GPUs now."
            checks = [Check("listing", None, message) if check.name == "listing" else check for check in checks]
        return {
            "id": profile.id,
            "description": profile.description,
            "backend": profile.backend,
            "precision": profile.precision,
            "tp": profile.tp,
            "pp": profile.pp,
            "gpus": profile.gpus,
            "gpu": profile.gpu,
            "gpu_device": profile.gpu_device,
            "memory_gb": profile.memory_gb,
            "reduced_memory_gb": profile.reduced_memory_gb,
            "reduced_model_length": profile.reduced_model_length,
            "lora": profile.lora,
            "buildable": profile.buildable,
            "tags": dict(profile.tags),
            "verdict": profile.verdict,
            "section": profile.section,
            "fits": _fits(checks),
            "checks": [check.as_dict() for check in checks],
        }

    def _match(self, found: Found, profiles: t.Sequence[Json]) -> Json | None:
        if not self.model.profile or self.model.profile == "default":
            return None
        try:
            match = match_profile(self.model.profile, found.profiles)
        except FleetError as error:
            return {
                "found": False if found.certain else None,
                "certain": found.certain,
                "candidates": [],
                "fits": None,
                "message": error.message,
            }
        candidates = [one.id for one in match.candidates]
        fits = {one["fits"] for one in profiles if one["id"] in candidates}
        return {
            "found": True if match.certain else None,
            "certain": match.certain and found.certain,
            "candidates": candidates,
            "fits": fits.pop() if len(fits) == 1 else None,
            "message": "",
        }


def _fits(checks: t.Sequence[Check]) -> bool | None:
    return verdict(checks) if checks else None
