"""The `auto-round` command: finds the sub-command, and turns what goes wrong into one sentence and an exit code.

0: done. 1: it failed. 2: the command line, or what it names, cannot be used. 130: interrupted; 143, 129: ended by
SIGTERM, SIGHUP, which leave as little behind as Ctrl-C. Tracebacks appear with `--debug` only. The libraries that take
seconds to import are imported by the sub-commands that need them.
"""

from __future__ import annotations

import contextlib
import difflib
import faulthandler
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from auto_round import __version__
from auto_round.cli.parser import UsageError
from auto_round.logger import logger, setup_logging

COMMANDS: dict[str, tuple[str, str]] = {
    "quantize": ("auto_round.cli.quantize", "quantize a model, save and verify it (also without this word)"),
    "plan": ("auto_round.cli.plan", "what quantizing a model will do, need and take, from its headers alone"),
    "list": ("auto_round.cli.listing", "show schemes, formats, recipes, algorithms, backends"),
    "eval": ("auto_round.cli.evaluate", "perplexity, KL divergence from the original, benchmark tasks"),
    "verify": ("auto_round.cli.verify", "check a quantized folder again"),
    "export": ("auto_round.cli.export", "write an earlier run in another format"),
    "doctor": ("auto_round.cli.doctor", "say whether a model type can be quantized, and what mends it if not"),
    "demo": ("auto_round.cli.demo", "quantize a small shipped model and measure the result"),
}

# Errors about what the user gave; others of this package mean that the work failed. A class that nobody has imported
# yet cannot have been raised, so looking one up imports nothing.
USAGE_ERRORS = (
    "auto_round.schemes:SchemeError",
    "auto_round.settings:SettingsError",
    "auto_round.plan:PlanError",
    "auto_round.calibration.data:CalibrationDataError",
    "auto_round.calibration.data:CalibrationFileNotFoundError",
    "auto_round.calibration.data:MissingExtraError",
    "auto_round.eval.harness:MissingEvalExtraError",
    "auto_round.eval.harness:UnknownTaskError",
)
LONGEST = 600  # characters of a message that another library wrote
KEPT = "the same command goes on from the last finished block"


class Ended(BaseException):
    """The system, or somebody, asked the process to end; raised where it was, so that it cleans up on its way out."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None, recipe: str = "default") -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        with _ending_cleanly():
            return _dispatch(arguments, recipe, debug)
    except SystemExit as stop:  # argparse, after printing help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _fail(f"interrupted; {KEPT}", 130, debug)
    except Ended as end:
        return _fail(f"ended by {signal.Signals(end.number).name}; {KEPT}", 128 + end.number, debug)
    except BrokenPipeError:  # `auto-round list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(*_explain(error, debug), debug)


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Turn the signals that end a process into an exception; where a signal is ignored (nohup), it stays so."""

    def end(number: int, frame: Any) -> None:
        raise Ended(number)

    if not faulthandler.is_enabled() and sys.stderr is sys.__stderr__:
        faulthandler.enable()  # a shard that is cut while it is mapped ends the process: then at least say where
    main = threading.current_thread() is threading.main_thread()
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if main and hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in wanted}
    ours = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _dispatch(arguments: list[str], recipe: str, debug: bool) -> int:
    command, rest = _route(arguments)
    if command == "help":
        return _help(rest)
    _quieten(debug)
    module = importlib.import_module(COMMANDS[command][0])
    return module.run(rest, recipe) if command in ("quantize", "plan") else module.run(rest)


def _route(arguments: list[str]) -> tuple[str, list[str]]:
    """The sub-command and its arguments; whatever does not begin with one belongs to `quantize`."""
    if not arguments or arguments[0] in ("help", "-h", "--help", "--version"):
        return "help", arguments
    if arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    for flag, command in (("--list", "list"), ("--eval", "eval")):
        if flag in arguments:
            return command, arguments
    first = arguments[0]
    close = difflib.get_close_matches(first, COMMANDS, n=1, cutoff=0.7)
    if close and not Path(first).exists():
        raise UsageError(f"{first!r} is neither a command nor a model folder; did you mean `auto-round {close[0]}`?")
    return "quantize", arguments


def _help(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"auto-round {__version__}")
        return 0
    if len(arguments) > 1 and arguments[1] in COMMANDS:
        importlib.import_module(COMMANDS[arguments[1]][0]).run(["--help"])
    print("usage: auto-round MODEL [options]\n       auto-round COMMAND [options]\n\ncommands:")
    for name, (_, about) in COMMANDS.items():
        print(f"  {name:<10}{about}")
    print(
        "\nauto-round-best, -light, -opt-rtn and -rtn are auto-round with other recipes (`auto-round list recipes`).\n"
        "`auto-round COMMAND --help` shows a command's options; `auto-round demo` is a good start."
    )
    return 0


def _quieten(debug: bool) -> None:
    """Our own messages on standard error; those of the libraries, and of other ranks, only when asked for."""
    setup_logging("DEBUG" if debug else "WARNING" if _rank() else None)
    if not debug:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# ---- errors ------------------------------------------------------------------------------------------------------


def _explain(error: Exception, debug: bool) -> tuple[str, int]:
    """(sentence, exit code) for an error."""
    if isinstance(error, UsageError):
        return str(error), 2
    usage = tuple(known for known in map(_loaded, USAGE_ERRORS) if known is not None)
    if isinstance(error, usage) or (isinstance(error, TypeError) and _raised_in(error) == "auto_round.autoround"):
        return str(error), 2
    if isinstance(error, OSError):
        return _explain_os(error), 1
    if type(error).__module__.startswith("auto_round.") or (
        isinstance(error, (ValueError, RuntimeError)) and _raised_in(error).startswith("auto_round.")
    ):
        return str(error), 1
    hint = "" if debug else " (run again with --debug for the traceback)"
    return f"{type(error).__name__}: {error}{hint}", 1


def _loaded(name: str) -> type[Exception] | None:
    module, attribute = name.split(":")
    return getattr(sys.modules.get(module), attribute, None)


def _raised_in(error: Exception) -> str:
    """The name of the module whose code raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""


def _explain_os(error: OSError) -> str:
    if error.strerror is None or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}; check the path, its permissions and the space on its disk"


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    text = " ".join(message.split())
    text = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    logger.debug("exit code %d", code)
    who = f"auto-round: rank {_rank()}" if _rank() else "auto-round"
    print(f"{who}: {text}", file=sys.stderr)
    return code


def _rank() -> int:
    """This process's number among those of the run; 0 also for the only one."""
    return int(os.environ.get("RANK", 0))


# ---- entry points ------------------------------------------------------------------------------------------------


def main_best() -> int:
    return main(recipe="best")


def main_light() -> int:
    return main(recipe="light")


def main_rtn() -> int:
    return main(recipe="rtn")


def main_opt_rtn() -> int:
    return main(recipe="opt_rtn")


def main_eval() -> int:
    return main(["eval", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
