"""argv and YAML to a config: the only file that knows the parser (jsonargparse); it runs before torch is
imported.

jsonargparse beat `transformers.HfArgumentParser` (and TRL's layer on it) on what a user meets: help texts
stand as docstrings under the fields, `--print_config` is there, YAML values are checked like flags (5e-5 is a
number), YAML is a default below the command line, and importing it takes 0.1 s where transformers takes 0.9.
Neither suggests the nearest key nor takes "--flag" for "--flag true" and "a b" for a list, so these are added
here."""

import difflib
import os
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from ft.config import Config
from ft.errors import EXIT_USER_ERROR, UserError

ConfigT = TypeVar("ConfigT", bound=Config)


class _Parser(ArgumentParser):
    """Turns the parser's complaints into a `UserError`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.replace('Parser key "', "").replace('":', ":", 1).split())
        raise UserError(text.replace("<class '", "").replace("'>", "").replace("typing.", ""))


def parse(
    config_class: type[ConfigT], argv: Sequence[str] | None = None, defaults: str | None = None
) -> ConfigT:
    """The checked config from `argv`: defaults < YAML < command line.

    `defaults` names the YAML file that is used when there are no arguments at all. A mistake is printed in
    one line, without a usage text, and ends the process with exit code 2; so do --help and --print_config,
    with 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv and defaults is not None:
        argv = [defaults]
    try:
        config = _parse(config_class, argv)
        config.check()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    return config


def _parse(config_class: type[ConfigT], argv: list[str]) -> ConfigT:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=os.path.basename(sys.argv[0]), description=config_class.__doc__, allow_abbrev=False)
    parser.usage = "%(prog)s [CONFIG.yaml] [--flag value ...]"
    parser.add_argument(
        "--config", action=ActionConfigFile, help="A YAML file of flags; --config may be left out."
    )
    known: set[str | int] = set()
    for group in reversed(config_class.__mro__[:-1]):  # each class of options is one group of --help
        if "__annotations__" in vars(group):
            parser.add_class_arguments(group, None, skip=set(known))
            known |= set(vars(group)["__annotations__"])
    kinds = {field.name: _kind(field.type) for field in fields(config_class)}
    values = vars(parser.parse_args(_normalise(argv, kinds)))
    return config_class(**{name: values[name] for name in kinds})


def _kind(annotation: Any) -> str:
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if bool in members:
        return "bool"
    return "list" if any(typing.get_origin(member) is list for member in members) else "one"


def _normalise(argv: list[str], kinds: dict[str, str]) -> list[str]:
    """Allow what users type: a bare CONFIG.yaml, "--flag" for true, "--names a b"; refuse unknown keys."""
    bare = []
    for before, word in zip(["", *argv], argv, strict=False):
        is_file = word.endswith((".yaml", ".yml")) or not before
        if is_file and before != "--config" and not word.startswith("-"):
            bare.append(word)
    # Files go first, wherever they stand, so that the command line has the last word.
    argv = [w for word in bare for w in ("--config", word)] + [word for word in argv if word not in bare]
    known = [*kinds, "config", "help", "print_config"]
    result: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word == "-h":
            result.append(word)
            continue
        if not word.startswith("--"):
            raise UserError(f"{word!r} stands alone; expected [CONFIG.yaml] and then --flag value pairs.")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        _known(name, known, "command line")
        values = [value] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        if name in ("help", "print_config"):
            result.append(f"--{name}" + equals + value)
            continue
        if name == "config":
            for path in values:
                _check_yaml(path, known)
        kind = kinds.get(name, "one")
        if kind == "bool" and not values:
            values = ["true"]
        if kind == "list":
            values = [",".join(values)]
        if len(values) != 1:
            raise UserError(f"{name}: found {len(values)} values {' '.join(values)!r}, expected one.")
        result.append(f"--{name}={values[0]}")
    return result


def _check_yaml(path: str, known: Sequence[str]) -> None:
    """Check that a config file exists, is plain YAML and holds known keys only."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"config file {path!r} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path!r} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"config file {path!r} holds no `key: value` lines.")
    for name in content:
        _known(str(name), known, path)


def _known(name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "; see --help."
        raise UserError(f"unknown key {name!r} ({where}){hint}")


def dump(config: Config) -> str:
    """The config as YAML that `parse` reads back, in the order of --help."""
    return yaml.safe_dump(
        {field.name: getattr(config, field.name) for field in fields(config)}, sort_keys=False
    )
