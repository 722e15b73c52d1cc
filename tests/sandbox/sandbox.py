# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""GPU hosts on one machine, for the demo, the tests and a try: real systemd, sshd and Docker, stand-in GPUs."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys

from fleet_sandbox import engine, hosts, images, inventory, world
from fleet_sandbox.common import ROOT, SandboxError, locked, say, step


def names_of(options: argparse.Namespace) -> list[str]:
    """Short names of the hosts that `up` is asked for."""
    if options.hosts:
        return [name for name in options.hosts.split(",") if name]
    return ["gpu%02d" % number for number in range(1, options.number + 1)]


def ready_below(with_world: bool) -> None:
    """Everything that hosts stand on."""
    with locked():
        engine.install_needs()
        engine.start()
        engine.warn_if_small()
        engine.start_network()
        if with_world:
            world.start()


def up(options: argparse.Namespace) -> None:
    ready_below(not options.no_world)
    names = names_of(options)
    if names:
        hosts.add(names, scenario=options.scenario)
    path = hosts.scenario_inventory(options.scenario)
    say("ready: %s; inventory %s" % (" ".join(names) or "no hosts", path))


def add(options: argparse.Namespace) -> None:
    ready_below(not options.no_world)
    hosts.add(
        options.names,
        scenario=options.scenario,
        image=options.image,
        specification=options.gpus,
        settings=options.hardware,
    )


def chosen(options: argparse.Namespace) -> list[str]:
    """Full names of the hosts a command is about; a scenario alone means all of its hosts."""
    if options.names:
        return [inventory.full_name(options.scenario, name) for name in options.names]
    if options.scenario:
        return sorted(inventory.select(inventory.load(), options.scenario))
    raise SandboxError("name the hosts, or a scenario with --scenario")


def remove(options: argparse.Namespace) -> None:
    names = chosen(options)
    if names and engine.answers():
        hosts.remove(names)


def down(options: argparse.Namespace) -> None:
    if options.scenario:
        options.names = []
        remove(options)
        return
    if not ROOT.exists():
        say("nothing is there")
        return
    with locked():
        engine.stop(keep_images=options.keep_images)
        keep = {"docker", "docker-config", "lock"} | world.KEEP if options.keep_images else set()
        with step("removing %s" % ROOT):
            for path in ROOT.iterdir():
                if path.name in keep:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    if not options.keep_images:
        ROOT.rmdir()
    say("down")


def status(options: argparse.Namespace) -> None:
    print(engine.report())
    if not engine.answers():
        return
    print(world.report())
    states = hosts.states()
    for name, host in sorted(inventory.load().items()):
        gpus = host["hardware"]["gpus"]
        print(
            "%-24s %-15s %-9s %-11s %d x %s"
            % (
                name,
                host["address"],
                states.get(name, "missing"),
                host["image"],
                len(gpus),
                gpus[0]["name"] if gpus else "-",
            )
        )


def execute(options: argparse.Namespace) -> None:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    terminal = ["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    container = "world" if options.name == "world" else hosts.PREFIX + options.name
    command = [engine.client(), "exec", "--interactive", *terminal, container, *(command or ["bash", "-l"])]
    sys.exit(subprocess.run(command, check=False).returncode)


def show_inventory(options: argparse.Namespace) -> None:
    table = inventory.load()
    selected = (
        {name: table[name] for name in chosen(options)} if options.names else inventory.select(table, options.scenario)
    )
    print(json.dumps(inventory.structure(selected), indent=2) if options.json else inventory.render(selected), end="")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sandbox.py", description=__doc__)
    commands = top.add_subparsers(dest="action", required=True)

    def command(name: str, function: object, text: str, hosts_argument: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        if hosts_argument:
            sub.add_argument("names", nargs=hosts_argument, metavar="NAME")
        if name not in ("status", "exec", "build"):
            sub.add_argument(
                "--scenario", default="", help="hosts of one test scenario; their names begin with it: SCENARIO-NAME"
            )
        return sub

    sub = command("up", up, "build and start everything that is missing")
    sub.add_argument("--hosts", default="", help="names, separated by commas (default: gpu01,gpu02)")
    sub.add_argument("-n", dest="number", type=int, default=2, help="number of hosts gpu01, gpu02, ... (default: 2)")
    sub.add_argument("--no-world", action="store_true", help="hosts only, without the outside world")
    sub = command("add", add, "make further hosts", "+")
    sub.add_argument(
        "--image", default="", choices=["", *images.HOST_IMAGES], help="default: debian13; gpu01: ubuntu2404"
    )
    sub.add_argument("--gpus", default="", help="NAME:MEMORY_MIB:COUNT[,...] or none; default: one or two NVIDIA H200")
    sub.add_argument(
        "--hardware", action="append", default=[], metavar="KEY=VALUE", help="for example secure_boot=true"
    )
    sub.add_argument("--no-world", action="store_true", help=argparse.SUPPRESS)
    command("remove", remove, "remove hosts with their data", "*")
    sub = command("down", down, "remove everything, without trace")
    sub.add_argument("--keep-images", action="store_true", help="keep built images for a faster next time")
    sub.add_argument("--all", action="store_true", help="the default; for symmetry")
    command("status", status, "what is there")
    sub = command("exec", execute, "run a command in a host, or in the world")
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    sub = command("inventory", show_inventory, "print the inventory", "*")
    sub.add_argument("--json", action="store_true")
    sub = command("stop", lambda o: [hosts.stop(n, o.power_cut) for n in chosen(o)], "shut hosts down", "*")
    sub.add_argument("--power-cut", action="store_true", help="without warning")
    command("start", lambda o: [hosts.start(n) for n in chosen(o)], "switch hosts on, or wake paused ones", "*")
    command("pause", lambda o: [hosts.pause(n) for n in chosen(o)], "freeze hosts, so that nobody reaches them", "*")
    return top


def main() -> int:
    options = parser().parse_args()
    try:
        options.function(options)
    except SandboxError as error:
        say("ERROR: %s" % error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
