"""The command line: `python -m benchmarks COMMAND --help`."""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks import (
    accuracy,
    dropout,
    encode,
    evaluation,
    exactness,
    gpu,
    growth,
    label_errors,
    memory,
    recipes,
    saving,
    similarity,
    start,
    throughput,
    tutorial,
)
from benchmarks.common import check_results, commit, device, one_device, one_precision, own_cache
from ft.errors import UserError
from ft.heap import start_again

COMMANDS = {
    "throughput": throughput,
    "start": start,
    "encode": encode,
    "evaluation": evaluation,
    "memory": memory,
    "growth": growth,
    "save": saving,
    "exactness": exactness,
    "accuracy": accuracy,
    "tutorial": tutorial,
    "recipes": recipes,
    "dropout": dropout,
    "similarity": similarity,
    "gpu": gpu,
    "label_errors": label_errors,
}
# What is measured in this process has train.py's heap on a CPU: otherwise the pages of large tensors would
# dominate what `dropout` measures.
IN_THIS_PROCESS = ("save", "dropout")
# These do not run train.py, or not with flags that a user could choose.
WITHOUT_FLAGS = ("encode", "evaluation", "save", "dropout", "gpu", "label_errors")


def main(argv: list[str]) -> None:
    """Read the command and its options, and run it; a user error is one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through every `finally`
    try:
        options = parse(argv)
        check_results()
        one_device()
        one_precision()
        if options.command in IN_THIS_PROCESS and device().type == "cpu":
            start_again()
        commit()  # of what is measured, even if the clone changes meanwhile
        with tempfile.TemporaryDirectory() as folder, own_cache(folder):
            COMMANDS[options.command].run(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of the command line. What follows `--` goes to train.py unchanged."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", epilog="What follows -- goes to train.py as it is."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {}
    for name, module in COMMANDS.items():
        command = parsers[name] = commands.add_parser(
            name, help=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument(
            "--name", type=file_name, help="name of the files in benchmarks/results, if not the default one"
        )
        command.add_argument(
            "--quick", action="store_true", help=f"a first look, with {module.QUICK}; its files end in _quick"
        )
        module.add_options(command)
    options = parser.parse_args(argv[:end])
    command = parsers[options.command]
    if options.quick:  # only other defaults: what was typed counts
        command.set_defaults(**COMMANDS[options.command].QUICK)
        options = parser.parse_args(argv[:end])
    for name, value in vars(options).items():
        if isinstance(value, list) and len(set(value)) < len(value):
            command.error(f"--{name}: a value is given twice")
    options.extra = argv[end + 1 :]
    if options.extra and options.command in WITHOUT_FLAGS:
        command.error(f"{options.command} takes no flags for train.py")
    return options


def file_name(text: str) -> str:
    """The type of --name: endings are appended to it, and it must stay in its folder."""
    if text != Path(text).name or len(text) > 200:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name")
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
