"""The command line: `python -m benchmarks COMMAND --help`."""

import argparse
import sys

from benchmarks import (
    accuracy,
    dropout,
    encode,
    evaluation,
    exactness,
    gpu,
    label_errors,
    memory,
    recipes,
    saving,
    similarity,
    start,
    throughput,
    tutorial,
)

COMMANDS = {
    "throughput": throughput,
    "start": start,
    "encode": encode,
    "evaluation": evaluation,
    "memory": memory,
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


def main(argv: list[str]) -> None:
    """Read the command and its options, and run it. What follows `--` goes to train.py as it is."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", epilog="What follows -- goes to train.py as it is."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument("--name", help="name of the files in benchmarks/results, if not the default one")
        command.add_argument(
            "--quick", action="store_true", help=f"a first look, with {module.QUICK}; its files end in _quick"
        )
        module.add_options(command)
    options = parser.parse_args(argv[:end])
    if options.quick:
        vars(options).update(COMMANDS[options.command].QUICK)
    options.extra = argv[end + 1 :]
    COMMANDS[options.command].run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
