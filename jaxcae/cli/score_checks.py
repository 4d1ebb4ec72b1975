"""What `jaxcae score` refuses before anything is loaded."""

from pathlib import Path
from typing import Any

from jaxcae.data import CATALOGUE
from jaxcae.errors import InputError


def check_asked(arguments: Any) -> None:
    """Refuse what cannot be read or written, before anything is loaded."""
    if arguments.follow:
        for name in ("data", "output", "events", "plots", "json"):
            if getattr(arguments, name):
                raise InputError(
                    f"`follow` goes from standard input to output: leave out `{name}`."
                )
        return
    absent = [name for name in ("data", "output") if getattr(arguments, name) is None]
    if absent:
        named = " and ".join(f"--{name}" for name in absent)
        raise InputError(f"needs {named}; jaxcae score --help lists the options.")
    assert arguments.output is not None
    _check_output(arguments.output)
    for name, suffix in (("events", ".csv"), ("plots", "")):
        path = getattr(arguments, name)
        if path is None:
            continue
        if suffix and path.suffix.lower() != suffix:
            raise InputError(f"--{name} {path}: expected a name that ends in {suffix}.")
        if not path.parent.is_dir():
            raise InputError(f"--{name} {path}: there is no directory {path.parent}.")
        if path.exists() and path.is_dir() == bool(suffix):
            raise InputError(f"--{name} {path}: is {'a directory' if suffix else 'no directory'}.")
    written = [path for path in (arguments.output, arguments.events) if path is not None]
    for path in written:
        source = Path(arguments.data or "")
        read = source.exists() and arguments.data not in CATALOGUE
        if read and path.exists() and path.samefile(source):
            raise InputError(f"{path}: is the data to score; choose another name.")
    if arguments.events is not None and arguments.events == arguments.output:
        raise InputError(f"--events {arguments.events}: is the --output, too.")


def check_series(arguments: Any) -> None:
    """Refuse what a run on a series does not do."""
    if arguments.output is not None and arguments.output.suffix.lower() != ".csv":
        raise InputError(f"--output {arguments.output}: scores of a series are written as .csv.")
    if arguments.network is not None:
        raise InputError("`network`: a series is scored by the network that was calibrated.")
    if arguments.flatten:
        raise InputError("`flatten`: a series has its channels in columns.")


def _check_output(path: Path) -> None:
    """Refuse an output that cannot be written."""
    if path.suffix.lower() not in (".csv", ".npy"):
        raise InputError(f"--output {path}: expected a name that ends in .csv or .npy.")
    if path.is_dir():
        raise InputError(f"--output {path}: is a directory, expected a file.")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no directory {path.parent}.")
