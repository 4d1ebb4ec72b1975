"""`python -m parity`: prove that jaxcae and PyTorch agree, convert weights, visit the museum."""

if __name__ == "__main__":  # before all else: what is imported below takes seconds
    from jaxcae.cli import listen

    listen("python -m parity")

import argparse
import contextlib
import difflib
import importlib.util
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

NEEDED = ("torch", "rich", "safetensors", "matplotlib", "mlxtend")
INSTALL = "pip install -e '.[parity]'"
# What the library asks for by the names of arguments is given here by options.
ADVICE = {
    "names": "Give --encoder LAYER … or --decoder LAYER ….",
    "batch_norm": "Give --batch-norm before or --batch-norm after.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if all is well, 1 on any breach or failure, 2 on misuse."""
    options = parser().parse_args(arguments)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return fail(f"{' and '.join(missing)} is not installed. Install with: {INSTALL}")
    if options.command is not run and options.device != "cpu":
        return fail("--device is for the comparison; the other commands run on the CPU.")
    from jaxcae.cli.device import use

    use(None)  # that which JAX_PLATFORMS asks for must be there
    with contextlib.suppress(BrokenPipeError):
        return int(options.command(options))
    return 0


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what it does not understand."""

    def error(self, message: str) -> NoReturn:
        """Exit with the code of misuse, and name the closest option."""
        wrong = message.rpartition("unrecognized arguments: ")[2].partition(" ")[0]
        known = options_of(self)
        near = difflib.get_close_matches(wrong, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message}.{hint} See {self.prog} --help.\n")


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """List the options of a parser and of all its commands."""
    found = [option for action in parser._actions for option in action.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [
                option for command in action.choices.values() for option in options_of(command)
            ]
    return found


def parser() -> Parser:
    """Describe the command line."""
    top = Parser(
        prog="python -m parity",
        allow_abbrev=False,
        description="Prove that jaxcae and PyTorch compute the same: values, gradients, training.",
        epilog="Exit code 0: all within bounds; 1: a breach; 2: misuse, or PyTorch is missing.",
    )
    top.set_defaults(command=run)
    add_common(top)
    top.add_argument("--case", metavar="NAME", help="only cases whose name holds or matches NAME")
    top.add_argument("--list", action="store_true", help="list the cases and stop")
    commands = top.add_subparsers(title="other commands")

    convert = commands.add_parser(
        "convert",
        help="weights of PyTorch to jaxcae's and back, bit for bit",
        description="Convert a safetensors file of weights to the other framework. The direction "
        "follows from the file.",
    )
    convert.add_argument("source", type=Path, help="a safetensors file of either framework")
    convert.add_argument("target", type=Path, help="where to write")
    convert.add_argument("--force", action="store_true", help="replace the target if it exists")
    for half in ("encoder", "decoder"):
        convert.add_argument(
            f"--{half}", nargs="+", metavar="LAYER", help=f"PyTorch's {half} layers, in order"
        )
    convert.add_argument(
        "--batch-norm",
        choices=("before", "after"),
        help="where BatchNorm stands to the activation; default: as an nn.Sequential numbers it",
    )
    convert.add_argument(
        "--eps", type=float, default=1e-5, help="BatchNorm's eps; default: %(default)s"
    )
    for option, default, meaning in (
        ("activation", None, "hidden activation, to compare outputs with; default: a stand-in"),
        ("latent-activation", "identity", "activation on the code; default: %(default)s"),
        ("output", "identity", "activation on the reconstruction; default: %(default)s"),
    ):
        convert.add_argument(f"--{option}", metavar="NAME", default=default, help=meaning)
    convert.set_defaults(command=convert_weights)

    museum = commands.add_parser(
        "museum",
        help="the wrong penalties, measured, and two pictures",
        description="Measure each wrong recipe against the truth, and train with each; about four "
        "minutes on two cores.",
    )
    museum.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="default: runs/parity")
    museum.add_argument(
        "--steps", type=int, default=100, help="training steps; default: %(default)s"
    )
    museum.set_defaults(command=visit_museum)

    cost = commands.add_parser(
        "cost",
        help="what a training step costs on both sides",
        description="Time a training step with and without the exact penalty, in both frameworks.",
    )
    cost.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="default: runs/parity")
    cost.add_argument("--turns", type=int, default=30, help="steps per variant; the fastest counts")
    cost.set_defaults(command=tell_cost)
    return top


def add_common(command: argparse.ArgumentParser) -> None:
    """Add the options of a run."""
    command.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("runs/parity"),
        help="where report.json and report.md go; default: %(default)s",
    )


def run(options: argparse.Namespace) -> int:
    """Run the cases, print the table and write the reports."""
    import torch

    from jaxcae.files import write_atomic
    from parity import report
    from parity.console import Progress, print_report
    from parity.run import DeviceError, jobs, on, select

    chosen = jobs() if options.case is None else select(options.case)
    if not chosen:
        near = difflib.get_close_matches(options.case, [job.id for job in jobs()], n=3, cutoff=0.3)
        return fail(f"no case matches {options.case!r}; near it: {', '.join(near) or 'none'}.")
    if options.list:
        print("\n".join(job.id for job in chosen))
        return 0
    torch.set_num_threads(1)  # the models are small; more threads only wait for one another
    begin, rows = time.perf_counter(), []
    try:
        with on(options.device), Progress(len(chosen)) as progress:
            for job in chosen:
                progress.begin(job.id)
                rows += list(job.rows(options.device))
            about = report.environment(options.device)
    except DeviceError as error:
        return fail(str(error))
    about |= {
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": time.perf_counter() - begin,
        "cases": options.case or "all",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.json", report.to_json(rows, about)),
        ("report.md", report.to_markdown(rows, about)),
    ):
        write_atomic(options.out / name, text.encode())
    print_report(rows, about, options.out)
    return 0 if all(row.ok for row in rows) else 1


def convert_weights(options: argparse.Namespace) -> int:
    """Convert one file and print what became of every tensor."""
    from jaxcae.errors import InputError, unknown_name
    from jaxcae.runs.leaves import CheckpointError
    from parity.console import print_conversion
    from parity.files import convert_file
    from parity.layers import ConversionError
    from parity.outputs import Activations
    from parity.reference import ACTIVATIONS

    source, target = options.source, options.target
    if target.exists() and not options.force:
        return fail(f"{target} exists; give --force to replace it.")
    if target.is_dir() or not target.absolute().parent.is_dir():
        return fail(f"{target}: expected a file to write, in a directory that exists.")
    if target.exists() and target.samefile(source):
        return fail(f"{target} is the source; give another target.")
    names = (
        options.activation,
        options.latent_activation or "identity",
        options.output or "identity",
    )
    try:
        for name in filter(None, names):
            if name not in ACTIVATIONS:
                raise unknown_name("activation", name, sorted(ACTIVATIONS))
        done = convert_file(
            source,
            target,
            options.encoder,
            options.decoder,
            batch_norm=options.batch_norm,
            eps=options.eps,
            activations=Activations(*names),
        )
    except ConversionError as error:
        return fail(f"{error} {ADVICE.get(error.argument, '')}".rstrip())
    except (ValueError, InputError, CheckpointError) as error:
        return fail(str(error))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_conversion(done, source, target)
    return 0


def visit_museum(options: argparse.Namespace) -> int:
    """Measure the exhibits, train with each, print the table and draw the picture."""
    from parity.console import Progress, print_museum

    if options.steps < 1:
        return fail(f"--steps must be at least 1, got {options.steps}.")
    from parity.museum.visit import visit

    with Progress(None) as progress:
        measured = visit(options.out, options.steps, progress.begin)
    print_museum(measured, options.out)
    return 0


def tell_cost(options: argparse.Namespace) -> int:
    """Time both sides, print milliseconds a step and write them down."""
    from jaxcae.files import write_atomic
    from parity.console import print_cost
    from parity.cost import as_markdown, measure
    from parity.report import environment

    if options.turns < 1:
        return fail(f"--turns must be at least 1, got {options.turns}.")
    costs = measure(options.turns)
    print_cost(costs)
    options.out.mkdir(parents=True, exist_ok=True)
    about = environment(options.device) | {"date": datetime.now(UTC).date().isoformat()}
    write_atomic(options.out / "cost.md", as_markdown(costs, about).encode())
    print(options.out / "cost.md")
    return 0


def fail(message: str) -> int:
    """Say in one line what is wrong; return the exit code of misuse."""
    # A message may hold names from a file, and a terminal obeys what is not printable.
    print("error:", "".join(c if c.isprintable() else "?" for c in message), file=sys.stderr)
    return 2


if __name__ == "__main__":
    from jaxcae.cli.interrupts import run_process

    run_process(main, "python -m parity")
