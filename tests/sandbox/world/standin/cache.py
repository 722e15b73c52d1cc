# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The model cache, filled from api.ngc.nvidia.com."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import ssl
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request

from environment import FatalError, env_flag, env_number
from log import Log


class Cache:
    """The model cache in NIM's own layout, filled from api.ngc.nvidia.com."""

    CHUNK = 1 << 18

    def __init__(self, image: dict, log: Log, stop: threading.Event) -> None:
        self.image = image
        self.log = log
        self.stop = stop
        self.root = os.environ.get("NIM_CACHE_PATH") or "/opt/nim/.cache"
        self.base = (os.environ.get("NIM_REPOSITORY_OVERRIDE") or "https://api.ngc.nvidia.com").rstrip("/")
        store = image["model_store"]  # "nim/meta/llama-3_1-8b-instruct:hf-1"
        self.store, dummy, self.version = store.partition(":")
        self.directory = os.path.join(self.root, "ngc", "hub", "models--" + self.store.replace("/", "--"))
        self.snapshot = os.path.join(self.directory, "snapshots", self.version)
        self.context = None  # type: ssl.SSLContext | None

    def key(self) -> str:
        names = ["NGC_CLI_API_KEY", "NGC_API_KEY"] if self.image["dialect"] == "2" else ["NGC_API_KEY"]
        for name in names:
            if os.environ.get(name):
                return os.environ[name]
        return ""

    def complete(self) -> bool:
        marker = os.path.join(self.directory, "refs", self.version)
        return os.path.isfile(marker) and os.path.isdir(self.snapshot)

    def url(self, path: str = "") -> str:
        parts = self.store.split("/")  # org, team, model
        url = "%s/v2/org/%s/team/%s/models/%s/%s/files" % (self.base, parts[0], parts[1], parts[2], self.version)
        return url + ("?path=" + urllib.parse.quote(path) if path else "")

    def _context(self) -> ssl.SSLContext:
        if self.context is None:
            self.context = ssl.create_default_context()
            if not os.environ.get("SSL_CERT_FILE") and os.path.exists("/etc/ssl/certs/ca-certificates.crt"):
                self.context.load_verify_locations("/etc/ssl/certs/ca-certificates.crt")
        return self.context

    def _open(self, url: str, offset: int = 0):
        request = urllib.request.Request(url)
        request.add_header("User-Agent", "nim-standin/" + self.image["version"])
        if self.key():
            request.add_header("Authorization", "Bearer " + self.key())
        if offset:
            request.add_header("Range", "bytes=%d-" % offset)
        try:
            return urllib.request.urlopen(request, timeout=60, context=self._context())
        except urllib.error.HTTPError as exc:
            if exc.code in (401, 403):
                self.stop.wait(env_number("STANDIN_AUTH_SECONDS", 1))
                # Recorded for 1.x: the container ends with code 0 although nothing works.
                raise FatalError(0, "ManifestDownloadError: Error downloading manifest: Authentication Error") from exc
            raise FatalError(
                1, "One or more errors fetching files:\nHTTP status %d for url (%s)" % (exc.code, url)
            ) from exc
        except (urllib.error.URLError, OSError) as exc:
            self.log.problem("error sending request for url (%s)" % url, "rust/nim-sdk/src/hub/repo.rs", 119)
            raise FatalError(
                1, "ManifestDownloadError: Error downloading manifest: error sending request for url (%s)" % url
            ) from exc

    def _refused(self) -> int:
        """Why nothing can be written into the cache, as errno; 0 when something can."""
        try:
            os.makedirs(self.root, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                return 0
        except OSError as exc:
            # A full disk is met while something is written.
            return 0 if exc.errno == errno.ENOSPC else exc.errno or errno.EIO

    def fill(self) -> None:
        """Download what is missing.  A file that was begun is continued."""
        refused = self._refused()
        if self.complete():
            if refused:
                self.log.warn(
                    "%s: cache is read-only, application may fail if model is not already present in cache" % self.root
                )
            return
        if refused == errno.EROFS:
            self.log.warn(
                "%s: cache is read-only, application may fail if model is not already present in cache" % self.root
            )
        if refused:
            raise FatalError(
                1,
                "ManifestDownloadError: Error downloading manifest: I/O error %s (os error %d)"
                % (os.strerror(refused), refused),
            )
        if env_flag("NIM_DISABLE_MODEL_DOWNLOAD"):
            raise FatalError(1, "Model files are not in the cache and NIM_DISABLE_MODEL_DOWNLOAD is set.")
        if not self.key() and not self.image["public"]:
            self.stop.wait(env_number("STANDIN_AUTH_SECONDS", 1))
            raise FatalError(0, "ManifestDownloadError: Error downloading manifest: Authentication Error")
        try:
            self._download()
        except OSError as exc:
            number = exc.errno or 0
            raise FatalError(
                1, "One or more errors fetching files:\nI/O error %s (os error %d)" % (os.strerror(number), number)
            ) from exc

    def _download(self) -> None:
        with self._open(self.url()) as answer:
            files = json.load(answer)["modelFiles"]
        for name in ("blobs", "refs"):
            os.makedirs(os.path.join(self.directory, name), exist_ok=True)
        os.makedirs(self.snapshot, exist_ok=True)
        for entry in files:
            blob = hashlib.md5(("%s/%s/%s" % (self.store, self.version, entry["path"])).encode()).hexdigest()  # noqa: S324
            blob_path = os.path.join(self.directory, "blobs", blob)
            if not os.path.exists(blob_path):
                self._file(entry, blob_path)
            link = os.path.join(self.snapshot, entry["path"])
            os.makedirs(os.path.dirname(link), exist_ok=True)
            if not os.path.islink(link):
                os.symlink(os.path.relpath(blob_path, os.path.dirname(link)), link)
        with open(os.path.join(self.directory, "refs", self.version), "w") as handle:
            handle.write(self.version)
        self.stop.wait(env_number("STANDIN_DOWNLOAD_SECONDS", 0))

    def _file(self, entry: dict, blob_path: str) -> None:
        partial = blob_path + ".incomplete"
        have = os.path.getsize(partial) if os.path.exists(partial) else 0
        size = entry["sizeInBytes"]
        if have < size:
            self.log.note("Downloading file: %s (%d bytes)" % (entry["path"], size), "nim_hub_ngc.rs", 210)
            with self._open(self.url(entry["path"]), have) as answer, open(partial, "ab") as handle:
                if have and answer.status != 206:
                    handle.truncate(0)
                while not self.stop.is_set():
                    chunk = answer.read(self.CHUNK)
                    if not chunk:
                        break
                    handle.write(chunk)
                    handle.flush()
        if os.path.getsize(partial) != size:
            raise FatalError(1, "One or more errors fetching files:\nerror decoding response body")
        os.replace(partial, blob_path)
