# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A container that keeps NIM's contract without running a model: log texts, HTTP, utilities, signals, exit codes.

It is the program behind every command of the stand-in images (``nim-run``, ``nim-serve``, ``list-model-profiles``,
``download-to-cache``, …); the name it is called by decides.  What the image is comes from
``/opt/nim/etc/default/standin.json``.  ``README.md`` beside it lists the STANDIN_* variables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time

from cache import Cache
from environment import FatalError, env_flag, env_number
from gpus import Gpus
from log import RANKS, Log
from profiles import Profiles, listing
from service import Service

CONFIG_PATH = os.environ.get("STANDIN_CONFIG", "/opt/nim/etc/default/standin.json")


def command_list(image: dict, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="list-model-profiles")
    parser.add_argument("--output-format", choices=["text", "json"], default="text")
    parser.add_argument("--output-file")
    options = parser.parse_args(arguments)
    gpus = Gpus()
    profiles = Profiles(image["profiles"], gpus.gpus, True)
    time.sleep(env_number("STANDIN_LIST_SECONDS", 0))
    if options.output_format == "json":
        compatible = profiles.group("runnable") + profiles.group("buildable")
        text = json.dumps({"compatible": [{"profile_id": p["id"], "tags": p["tags"]} for p in compatible]})
    else:
        text = listing(image, profiles)
    if options.output_file:
        with open(options.output_file, "w") as handle:
            handle.write(text + "\n")
    else:
        print(text)
    return 0


def command_download(image: dict, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="download-to-cache")
    parser.add_argument("-p", "--profiles", "--profile", nargs="+", default=[])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--model-uri")
    parser.add_argument("--manifest-file")
    options = parser.parse_args(arguments)
    log = Log(image["dialect"])
    log.threshold = min(log.threshold, RANKS["INFO"])
    profiles = Profiles(image["profiles"], Gpus().gpus, options.lora)
    try:
        for wanted in options.profiles or ([] if options.all else [os.environ.get("NIM_MODEL_PROFILE", "")]):
            chosen = profiles.select(wanted, "", False)
            log.note("Selected profile: %s (%s)" % (chosen["id"], chosen["description"]), "ngc_injector.py", 207)
        log.note(
            "Preparing model workspace. This step might download additional files to run the model.",
            "ngc_injector.py",
            234,
        )
        begun = time.time()
        Cache(image, log, threading.Event()).fill()
        log.note("Model workspace is now ready. It took %.3f seconds" % (time.time() - begun), "ngc_injector.py", 241)
    except FatalError as exc:
        for line in exc.text.splitlines():
            log.problem(line)
        return exc.code
    return 0


def command_store(image: dict, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="create-model-store")
    parser.add_argument("-p", "--profile")
    parser.add_argument("--model-repo")
    parser.add_argument("-m", "--model-store", required=True)
    options = parser.parse_args(arguments)
    code = command_download(image, ["-p", options.profile] if options.profile else [])
    if code:
        return code
    cache = Cache(image, Log(image["dialect"]), threading.Event())
    if not cache.complete():
        return 0
    shutil.copytree(cache.snapshot, options.model_store, symlinks=False, dirs_exist_ok=True)
    return 0


def command_native(image: dict, arguments: list[str]) -> int:
    """The native family: SHOW_CONFIG, download-only, or serve with the weights in NIM_ENGINE_MODEL_PATH."""
    if env_flag("SHOW_CONFIG"):
        for name in ("NIM_SERVER_BIND_ADDR", "LOG_FORMAT", "RUST_LOG", "NIM_ENGINE_MODEL_PATH", "NIM_ENGINE_PRECISION"):
            print("%s=%s" % (name, os.environ.get(name, "")))
        return 0
    os.environ["NIM_CACHE_PATH"] = os.environ.get("NIM_ENGINE_MODEL_PATH") or "/model"
    if env_flag("NIM_ENGINE_MODEL_DOWNLOAD_ONLY"):
        return command_download(image, ["--all"])
    return Service(image, arguments).run()


def command_serve(image: dict, arguments: list[str]) -> int:
    service = Service(image, [argument for argument in arguments if argument != "--dry-run"])
    if "--dry-run" in arguments:
        try:
            service.configure()
        except FatalError as exc:
            print(exc.text)
            return exc.code
        print(
            json.dumps(
                {
                    "model": image["model"],
                    "served_model_name": service.names,
                    "max_model_len": service.max_model_len,
                    "arguments": service.engine_options,
                },
                indent=2,
            )
        )
        return 0
    return service.run()


def main() -> int:
    name = os.path.basename(sys.argv[0])
    arguments = sys.argv[1:]
    commands = {
        "list-model-profiles": command_list,
        "nim_list_model_profiles": command_list,
        "download-to-cache": command_download,
        "create-model-store": command_store,
        "nim-run": command_serve,
        "nim-serve": command_serve,
        "nim-native": command_native,
    }
    if name not in commands and arguments and arguments[0] in commands:
        name, arguments = arguments[0], arguments[1:]
    try:
        with open(CONFIG_PATH) as handle:
            image = json.load(handle)
    except OSError as exc:
        print("%s: %s" % (CONFIG_PATH, exc.strerror), file=sys.stderr)
        return 66
    if name not in commands:
        print("usage: standin_nim.py {%s} [argument …]" % ",".join(sorted(commands)), file=sys.stderr)
        return 64
    return commands[name](image, arguments)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
