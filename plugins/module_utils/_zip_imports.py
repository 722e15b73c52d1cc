# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Imports out of the archive that ansible-core sends to a host: every file compiled once, or all of them ahead.

Python compiles a file in an archive twice: once to tell its name (CPython ``Lib/zipimport.py``: ``get_filename`` makes the
code and throws it away; 3.8 to 3.14 alike), and once to run it. For a module of many files that was a third of its run.
"""

from __future__ import annotations

import importlib
import sys
import typing as t
import zipfile
from importlib.machinery import ModuleSpec, PathFinder
from zipimport import zipimporter

#: ``ansible_collections.<namespace>.<name>``: others are left to Python.
_COLLECTION = ".".join(__name__.split(".")[:3]) + "."


class CompiledOnce:
    """Finds files of this collection in archives; all else, and whatever is not plain, is left to Python."""

    @staticmethod
    def find_spec(fullname: str, path: t.Sequence[str] | None = None, target: t.Any = None) -> ModuleSpec | None:
        if not fullname.startswith(_COLLECTION):
            return None
        for entry in path or ():
            archive = sys.path_importer_cache.get(entry)
            if not isinstance(archive, zipimporter):
                return None
            try:
                if archive.is_package(fullname):
                    return None
            except ImportError:
                continue
            origin = "%s/%s%s.py" % (archive.archive, archive.prefix, fullname.rpartition(".")[2])
            loader: t.Any = archive
            spec = ModuleSpec(fullname, loader, origin=origin)
            # What it says of its origin is a file name.
            spec.has_location = True
            return spec
        return None


def compile_once() -> None:
    """From now on."""
    if CompiledOnce not in sys.meta_path and PathFinder in sys.meta_path:
        # Right before Python's own: whatever others have put in front stays there.
        sys.meta_path.insert(sys.meta_path.index(PathFinder), CompiledOnce)


def import_all() -> None:
    """Every file beside this one that has come in the same archive, for work that goes on when the archive is gone."""
    package = __name__.rpartition(".")[0]
    loader = getattr(__spec__, "loader", None)
    if not isinstance(loader, zipimporter):
        return
    folder = package.replace(".", "/") + "/"
    with zipfile.ZipFile(loader.archive) as archive:
        names = [name[len(folder) : -len(".py")] for name in archive.namelist() if name.startswith(folder)]
    for name in names:
        if name.isidentifier() and name != "__init__":
            importlib.import_module("%s.%s" % (package, name))
