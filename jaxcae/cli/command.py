"""What `jaxcae COMMAND [OPTIONS]` does.

A command is a module of this package with two names: `Arguments`, a frozen dataclass whose
docstrings are the help, and `run(arguments) -> exit code`. It is imported when it is called, so
that one command does not wait for what another one needs. Results go to stdout, all else to
stderr; an error is one line, and `--debug` shows its traceback.
"""

import importlib
import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from jaxcae.cli.interrupts import Interrupted, interruptible
from jaxcae.errors import InputError, install_hint, printable, unknown_name

COMMANDS = {
    "train": "train a contractive autoencoder, and a plain one beside it",
    "info": "show what is in a run directory; --verify it, or --self-test the installation",
    "explain": "show how the penalty of a model is computed, and why that way",
    "score": "score samples by reconstruction error and Jacobian norm",
    "evaluate": "measure scores against labels, beside simpler detectors",
    "analyze": "look into a trained encoder: spectra, contraction curves, saturation",
    "bench": "time the penalty by every method on this machine",
    "export": "write the encoder and the scorer for use without jaxcae",
}

DONE, FAILED, MISUSE = 0, 1, 2


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; see `jaxcae.cli.main`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    name = arguments[0] if arguments else ""
    prog = f"jaxcae {name}" if name in COMMANDS else "jaxcae"
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(
            f"{prog}: warning: {_with_options(name, _one_line(message))}", file=sys.stderr
        )
        return _guarded(prog, name, arguments[1:], debug)


def _guarded(prog: str, name: str, argv: list[str], debug: bool) -> int:
    """Run a command; turn what it raises into one line and an exit code."""
    try:
        code = _command(prog, name, argv)
        sys.stdout.flush()
        return code
    except SystemExit as exit_:  # --help
        return exit_.code if isinstance(exit_.code, int) else DONE
    except Interrupted as interrupted:
        _tell_others(interrupted.exit_code)
        print(f"{prog}: {interrupted}", file=sys.stderr)
        return interrupted.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, text = _explain(error)
        _tell_others(code, lost=code == FAILED)
        print(f"{prog}: {_with_options(name, text)}", file=sys.stderr)
        return code


def _tell_others(code: int, *, lost: bool = False) -> None:
    """Tell the other processes of the run, where there are any, that this one has failed."""
    processes = sys.modules.get("jaxcae.devices.processes")
    if processes is not None:
        processes.failed(code, lost)


def _command(prog: str, name: str, argv: list[str]) -> int:
    if not name:
        print(_help(), file=sys.stderr)
        return MISUSE
    if name in ("-h", "--help", "help"):
        print(_help())
        return DONE
    if name == "--version":
        from jaxcae import __version__

        print(f"jaxcae {__version__}")
        return DONE
    if name not in COMMANDS or importlib.util.find_spec(f"jaxcae.cli.{name}") is None:
        raise InputError(str(unknown_name("command", name, _available())))
    from jaxcae.cli import device
    from jaxcae.cli.parsing import parse

    module = importlib.import_module(f"jaxcae.cli.{name}")
    reader = getattr(module, "parse", None)
    arguments = reader(argv) if reader else parse(module.Arguments, argv, prog)
    with interruptible():
        if hasattr(module, "prepare"):
            module.prepare(arguments)
        device.use(arguments.device)
        return module.run(arguments) or DONE


def _explain(error: Exception) -> tuple[int, str]:
    from jaxcae.runs import UnfinishedRunError
    from jaxcae.runs.leaves import CheckpointError
    from jaxcae.training import DivergedError

    if isinstance(error, UnfinishedRunError):
        return MISUSE, f"{_one_line(error)} jaxcae train --run-dir RUN_DIR --resume does it."
    if isinstance(error, InputError):
        return MISUSE, _one_line(error)
    if isinstance(error, ModuleNotFoundError):
        return MISUSE, f"needs the package {error.name!r}: run {install_hint('train')}"
    if isinstance(error, CheckpointError | DivergedError):
        return FAILED, _one_line(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return FAILED, _one_line(f"{where}{error.strerror or error}.")
    if isinstance(error, MemoryError):
        return FAILED, "out of memory. Use a smaller --batch-size, or --stream the data."
    from jaxcae.cli import device

    if problem := device.unusable():
        return MISUSE, problem
    kind = type(error).__name__
    return FAILED, f"{kind}: {_one_line(error)} (--debug shows where)"


def _with_options(command: str, text: str) -> str:
    """Name the command's options where a message names settings; see `parsing.with_options`."""
    module = sys.modules.get(f"jaxcae.cli.{command}")
    if module is None or not hasattr(module, "Arguments"):
        return text
    from jaxcae.cli.parsing import with_options

    return with_options(text, module.Arguments)


def _available() -> list[str]:
    return [name for name in COMMANDS if importlib.util.find_spec(f"jaxcae.cli.{name}")]


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {COMMANDS[name]}" for name in _available()]
    return "\n".join(
        [
            "usage: jaxcae COMMAND [OPTIONS]",
            "",
            "Contractive autoencoders: exact Jacobian norms at near the price of a plain one.",
            "",
            "commands:",
            *rows,
            "",
            "`jaxcae COMMAND --help` shows the options of a command. With no option at all,",
            "`jaxcae train` trains on 5,000 MNIST digits in about a minute.",
            "--version shows the version; --debug, with any command, the traceback of an error.",
        ]
    )


def _one_line(text: object) -> str:
    return printable(" ".join(str(text).split()))
