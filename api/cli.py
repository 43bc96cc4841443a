"""The command `perennial`: serve, chat, doctor, bench."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from api.doctor import doctor
from api.leaving import leave_at_once
from api.logs import configure_logging
from runtime.errors import PerennialError, lone_errors
from runtime.garbage import without_collecting
from runtime.settings import DEFAULT_HTTP_BIND, ENVIRONMENT_PREFIX, Accepts, Settings

# Benchmarks are not installed: they lie beside our packages in a clone of the repository.
_BENCH = Path(__file__).parents[1] / "bench" / "__main__.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. An error of ours is one line on stderr and status 1."""
    asked, rest = _parser().parse_known_args(arguments)
    if asked.command == "bench":
        return _bench(rest)
    if rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        settings = _settings(asked)
        # In a conversation only warnings are shown, unless a log level was asked for.
        is_quiet = asked.command == "chat" and settings.log_level == Settings().log_level
        configure_logging("warning" if is_quiet else settings.log_level)
        with lone_errors():
            status = _COMMANDS[asked.command](settings, asked)
        if arguments is None and status == 0:
            leave_at_once()
        return status
    except PerennialError as error:
        print(f"perennial: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _bench(arguments: Sequence[str]) -> int:
    if not _BENCH.is_file():
        print(
            "perennial: the benchmarks are part of the repository, not of an installation: clone it, run "
            "`pip install -c constraints.txt -e '.[bench]'` there, and then `perennial bench -h`",
            file=sys.stderr,
        )
        return 1
    path = os.pathsep.join(filter(None, (str(_BENCH.parents[1]), os.environ.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, "-m", "bench", *arguments], env=os.environ | {"PYTHONPATH": path}).returncode


# Each command imports what it needs when it runs, so that `doctor` can report a foreign package in the place of ours, which
# other commands fail to import.
def _serve(settings: Settings, asked: argparse.Namespace) -> int:
    # Who ignores it from the start, as `nohup` does, wants a server that outlives its terminal.
    hangups = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    stops = (signal.SIGINT, signal.SIGTERM, *hangups)
    # A thread waits for these: Python's handlers nest when signals come faster than they run. They stay blocked, so that one
    # that comes after the drain does not change the exit status. Threads that libraries start at their import are to inherit
    # this, and a shell ignores SIGINT for what it runs in the background.
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    for number in stops:
        signal.signal(number, signal.SIG_DFL)

    from runtime.models import check_name

    check_name(settings.model)
    with without_collecting():
        from api.doors import serve
        from api.traces import configure_tracing

    # The second of these cuts the drain short.
    next_stop = partial(trio.to_thread.run_sync, signal.sigwait, stops, abandon_on_cancel=True)
    configure_tracing()
    trio.run(
        partial(serve, settings, http_bind=asked.bind or None, shutdown_trigger=next_stop, hurry_trigger=next_stop)
    )
    return 0


def _chat(settings: Settings, asked: argparse.Namespace) -> int:
    from api.chat import chat

    return _print_by(partial(trio.run, chat, settings, asked.connect, asked.max_tokens, asked.temperature))


def _doctor(settings: Settings, asked: argparse.Namespace) -> int:
    return _print_by(partial(doctor, settings))


def _print_by(command: Callable[[], int]) -> int:
    """Runs a command that prints; returns its exit status, or that of SIGPIPE if whoever reads the output has left."""
    try:
        with lone_errors():
            status = command()
        sys.stdout.flush()
    except BrokenPipeError:
        # At its exit Python writes what is left, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


_COMMANDS = {"serve": _serve, "chat": _chat, "doctor": _doctor}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perennial", description="A server for long-lived LLM sessions: hour four is as fast as minute zero."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    settings = argparse.ArgumentParser(add_help=False)
    group = settings.add_argument_group("settings", f"each is an environment variable {ENVIRONMENT_PREFIX}<NAME> too")
    for field in dataclasses.fields(Settings):
        accepts: Accepts = field.metadata["accepts"]
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        words = f"{field.metadata['help']} (default: {default if default != '' else 'empty'})"
        names = {f"--{field.name}": None, f"--{field.name.replace('_', '-')}": None}
        group.add_argument(*names, dest=field.name, metavar=accepts.words, help=words.replace("%", "%%"))

    serving = commands.add_parser("serve", parents=[settings], help="serve sessions through gRPC and HTTP")
    serving.add_argument(
        "--bind",
        default=DEFAULT_HTTP_BIND,
        metavar="HOST:PORT",
        help="HTTP address, or unix:PATH for a socket in the file system; empty = no HTTP (default: %(default)s)",
    )
    chatting = commands.add_parser(
        "chat", parents=[settings], help="talk to a model over a session that lives in a server"
    )
    chatting.add_argument(
        "--connect", metavar="HOST:PORT", help="a gRPC server that runs already; without it one is started for the chat"
    )
    chatting.add_argument("--max-tokens", type=_positive, default=512, help="longest answer (default: %(default)s)")
    chatting.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default: %(default)s)")
    commands.add_parser(
        "doctor", parents=[settings], help="say what this machine gives for a model, and prove bit-exactness"
    )
    # Arguments that follow belong to the benchmarks, which know their scenarios.
    commands.add_parser("bench", help="measure this machine, in a clone: `perennial bench -h`", add_help=False)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


def _settings(asked: argparse.Namespace) -> Settings:
    names = {field.name for field in dataclasses.fields(Settings)}
    flags = {name: value for name, value in vars(asked).items() if name in names and value is not None}
    return Settings.from_environment(os.environ, flags)
