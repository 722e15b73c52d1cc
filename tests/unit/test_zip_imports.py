# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files of the collection that come out of an archive are compiled once."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import zipfile

from ansible_collections.gpu_fleet.nim.plugins.module_utils import _zip_imports

PACKAGE = "ansible_collections/gpu_fleet/nim/plugins/module_utils"

#: Counts what is compiled, imports the files, and tells what they say of themselves.
PROGRAM = """
import builtins, json, sys
counted = {}
compiled = builtins.compile
def count(source, filename, *rest, **options):
    counted[str(filename)] = counted.get(str(filename), 0) + 1
    return compiled(source, filename, *rest, **options)
builtins.compile = count
sys.path.insert(0, sys.argv[1])
package = "ansible_collections.gpu_fleet.nim.plugins.module_utils"
if sys.argv[2] == "once":
    __import__(package + "._zip_imports", fromlist=["compile_once"]).compile_once()
first = __import__(package + "._first", fromlist=["NUMBER"])
within = __import__(package + ".within", fromlist=["NUMBER"])
try:
    __import__(package + "._missing")
    missing = ""
except ImportError as error:
    missing = error.name
try:
    first.fail()
except ValueError as error:
    line = error.__traceback__.tb_next.tb_frame.f_code.co_filename
print(json.dumps({
    "counted": {name[len(sys.argv[1]) + 1:]: number for name, number in counted.items() if name.startswith(sys.argv[1])},
    "number": first.NUMBER, "file": first.__file__, "package": first.__package__, "line": line,
    "within": within.NUMBER, "missing": missing,
}))
"""


def packed(archive: pathlib.Path) -> pathlib.Path:
    """The archive of a module, with three files of ours and a package."""
    with zipfile.ZipFile(archive, "w") as packed:
        parts = PACKAGE.split("/")
        for depth in range(1, len(parts) + 1):
            packed.writestr("/".join(parts[:depth]) + "/__init__.py", "")
        packed.writestr(PACKAGE + "/_zip_imports.py", pathlib.Path(str(_zip_imports.__file__)).read_text())
        packed.writestr(
            PACKAGE + "/_first.py", "from ._second import NUMBER\ndef fail():\n    raise ValueError(NUMBER)\n"
        )
        packed.writestr(PACKAGE + "/_second.py", "NUMBER = 7\n")
        packed.writestr(PACKAGE + "/within/__init__.py", "NUMBER = 8\n")
    return archive


def imported(tmp_path: pathlib.Path, how: str) -> dict[str, object]:
    archive = packed(tmp_path / "payload.zip")
    command = [sys.executable, "-I", "-c", PROGRAM, str(archive), how]
    found: dict[str, object] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def test_every_file_is_compiled_once(tmp_path: pathlib.Path) -> None:
    found = imported(tmp_path, "once")
    counted = found["counted"]
    assert isinstance(counted, dict)
    assert counted[PACKAGE + "/_second.py"] == 1
    assert counted[PACKAGE + "/_first.py"] == 1


def test_what_is_imported_is_what_python_would_import(tmp_path: pathlib.Path) -> None:
    once, plain = imported(tmp_path, "once"), imported(tmp_path, "plain")
    for found in (once, plain):
        found.pop("counted")
    assert once == plain
    assert once["number"] == 7
    assert once["within"] == 8
    assert str(once["missing"]).endswith("._missing")


def test_work_that_outlives_the_archive_has_all_that_was_in_it(tmp_path: pathlib.Path) -> None:
    program = """
import os, sys
sys.path.insert(0, sys.argv[1])
package = "ansible_collections.gpu_fleet.nim.plugins.module_utils"
if sys.argv[2] == "all":
    __import__(package + "._zip_imports", fromlist=["import_all"]).import_all()
else:
    __import__(package)
os.unlink(sys.argv[1])
print(__import__(package + "._first", fromlist=["NUMBER"]).NUMBER)
"""
    ended = {}
    for how in ("all", "none"):
        archive = packed(tmp_path / "payload.zip")
        command = [sys.executable, "-I", "-c", program, str(archive), how]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        ended[how] = done.stdout.strip(), done.returncode
    assert ended == {"all": ("7", 0), "none": ("", 1)}


def test_the_program_of_the_units_is_there_when_the_archive_is_gone(tmp_path: pathlib.Path) -> None:
    program = """
import os, sys
sys.path.insert(0, sys.argv[1])
package = "ansible_collections.gpu_fleet.nim.plugins.module_utils"
module = __import__(package + "._nim_unit_program", fromlist=["program"])
os.unlink(sys.argv[1])
print(len(module.program()) > 10000)
"""
    archive = tmp_path / "payload.zip"
    folder = pathlib.Path(str(_zip_imports.__file__)).parent
    with zipfile.ZipFile(packed(archive), "a") as payload:
        for path in folder.glob("_nim_unit*.py"):
            payload.write(path, "%s/%s" % (PACKAGE, path.name))
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(archive)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr
