"""argv and YAML to a config: the only file that knows the parser (jsonargparse); it runs before torch is
imported.

jsonargparse was chosen over `transformers.HfArgumentParser` (and TRL's layer on top of it) for what users
see: help texts are docstrings under the fields, types are checked as written (5e-5 is a number, 1.5 is not an
integer), and importing it takes 0.1 s instead of transformers' 0.9. Neither suggests the nearest key, gives
one-line errors with the key and the expected value, or accepts "--flag" for "--flag true", "a b" for a list
and "no" in YAML, so these are added here: a config file is read as the flags that it stands for."""

import difflib
import inspect
import json
import os
import sys
import types
import typing
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from ft.config import Config
from ft.errors import EXIT_DONE, EXIT_USER_ERROR, UserError, print_error

ConfigT = TypeVar("ConfigT", bound=Config)
YAML = (".yaml", ".yml")
PRECISION = "mixed precision belongs to the launch: accelerate launch --mixed_precision bf16 (or fp16)."
HINTS = {
    "model": "did you mean 'model_name_or_path'?",
    "bf16": PRECISION,
    "fp16": PRECISION,
    "mixed_precision": PRECISION,
    "lr": "did you mean 'learning_rate'?",
}
# Without any other flag, they apply to the run that train.py makes without arguments.
OF_ANY_RUN = {"resume_from_checkpoint", "print_config", "preflight", "verify"}

# Of two options for the same thing, the one that wins if both are given.
OUTRANKED_BY = {"num_train_epochs": "max_train_steps", "warmup_ratio": "warmup_steps"}


class _Text(str):
    """A text that is taken verbatim, not as YAML: "null" in quotes is not null."""


class _Parser(ArgumentParser):
    """Turns the parser's complaints into a `UserError`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(message.split()))


def parse(
    config_class: type[ConfigT], argv: Sequence[str] | None = None, defaults: str | None = None
) -> ConfigT:
    """The checked config from `argv`: defaults < YAML < command line.

    `defaults` names the YAML file to use when there are no arguments at all, or only those that say what to
    do with such a run (`OF_ANY_RUN`). A mistake is printed in one line, without a usage text, and ends the
    process with exit code 2; --help and --print_config end it with 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        config, print_it = _parse(config_class, argv, defaults)
        if print_it:
            print(dump(config) if _is_main() else "", end="")
            sys.exit(EXIT_DONE)
        config.check()
    except UserError as error:
        print_error(str(error))
        sys.exit(EXIT_USER_ERROR)
    return config


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _parse(config_class: type[ConfigT], argv: list[str], defaults: str | None) -> tuple[ConfigT, bool]:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=os.path.basename(sys.argv[0]), description=config_class.__doc__, allow_abbrev=False)
    parser.usage = "%(prog)s [CONFIG.yaml] [--flag value ...]"
    parser.add_argument("--config", help="A YAML file of flags; --config may be left out.")
    parser.add_argument(
        "--print_config", action="store_true", help="Print the whole config as YAML and exit."
    )
    grouped: set[str | int] = set()
    for group in reversed(config_class.__mro__[:-1]):  # each class of options is one group of --help
        if own := inspect.get_annotations(group):
            parser.add_class_arguments(group, None, skip=set(grouped))
            grouped |= set(own)
    kinds = {field.name: field.type for field in fields(config_class)}
    if "-h" in argv or "--help" in argv:
        if not _is_main():
            sys.exit(EXIT_DONE)
        for action in parser._actions:  # --names+, to append to a list, is not taken here
            action.option_strings = [word for word in action.option_strings if not word.endswith("+")]
        parser.parse_args(["--help"])
    files, flags = _read(argv, kinds)
    if defaults is not None and not files and flags.keys() <= OF_ANY_RUN:
        files = [defaults]
    given: dict[str, str] = {}
    for layer in [*(_read_yaml(file, kinds) for file in files), flags]:  # later ones win
        outranked = {
            other: "null" for name, other in OUTRANKED_BY.items() if name in layer and other in given
        }
        given |= outranked | layer
    given |= {
        name: _Text(word)
        for name, word in given.items()
        if word != "null" and (_may_be(dict, kinds.get(name)) or _is_text(kinds.get(name), word))
    }
    print_it = given.pop("print_config", "false") != "false"
    values = {name: str(word) for name, word in given.items() if isinstance(word, _Text)}
    typed = {name: f"--{name}={word}" for name, word in given.items() if name not in values}
    wrong = [
        name for name in typed
        if (given[name] == "null" and not _takes_null(kinds[name]))
        or (":" in given[name] and {int, float} & set(_members(kinds[name])))  # 1:30 is 90, to YAML 1.1
    ]  # fmt: skip
    if not wrong:
        try:
            parsed = vars(parser.parse_args(list(typed.values()))) | values
            return config_class(**{name: parsed[name] for name in kinds}), print_it
        except UserError:
            wrong = [name for name in typed if not _is_right(parser, typed[name])]
    name, word = wrong[0], given[wrong[0]]
    near = difflib.get_close_matches(word, map(str, _choices(kinds[name])), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    found = "null" if word == "null" else repr(word)
    raise UserError(f"{name}: found {found}, expected {_expected(kinds[name])}{hint}")


def _is_right(parser: _Parser, word: str) -> bool:
    try:
        parser.parse_args([word])
    except UserError:
        return False
    return True


def _takes_null(annotation: Any) -> bool:
    return type(None) in _members(annotation)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that a field may have: those of a union, or the single one."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_text(annotation: Any, word: str) -> bool:
    """Whether a word is taken verbatim, because YAML might read it as something else ("~" and "#" as null):
    for an option that takes texts, except a list in brackets."""
    members = set(_members(annotation)) - {type(None)}
    return str in members and (members == {str} or not (_may_be(list, annotation) and word.startswith("[")))


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal; none for any other type."""
    return tuple(
        value
        for member in _members(annotation)
        if typing.get_origin(member) is typing.Literal
        for value in typing.get_args(member)
    )


def _may_be(kind: type, annotation: Any) -> bool:
    """Whether an option of this type takes such a kind of value: list or dict."""
    return any(typing.get_origin(member) is kind for member in _members(annotation))


def _expected(annotation: Any) -> str:
    """The type of a field for a message: "a whole number or null"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    choices = ", ".join(map(str, _choices(annotation)))
    kind = names.get(_members(annotation)[0], f"one of {choices}" if choices else "names separated by commas")
    kind = "none, balanced, or weights by label" if _may_be(dict, annotation) else kind
    return kind + (" or null" if _takes_null(annotation) else "")


def _read(argv: list[str], kinds: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The config files and the flags in `argv`, allowing what users type: a bare CONFIG.yaml, "--flag" for
    true, "--names a b". The last of several values counts. Refuses unknown keys."""
    files: list[str] = []
    given: dict[str, str] = {}
    words = deque(argv)
    while words:
        word = words.popleft()
        if not word.startswith("--"):
            if word.startswith("-") or ((files or given) and not word.endswith(YAML)):
                raise UserError(f"{word!r} has no flag; expected [CONFIG.yaml] and then --flag value pairs.")
            files.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        _known(name, [*kinds, "config", "print_config"], "command line")
        is_switch = name == "print_config" or bool in _members(kinds.get(name))
        values = [value] if equals else []
        # A file after a value, or after a switch, is the config; right after any other flag it is a value.
        while not equals and words and not words[0].startswith("--"):
            if words[0].endswith(YAML) and (is_switch or values):
                break
            values.append(words.popleft())
        if is_switch and not values:
            values = ["true"]
        if name in kinds and _may_be(list, kinds[name]) and values:
            values = [",".join(values)]
        if len(values) != 1:
            found = f"{len(values)} values ({' '.join(values)})" if values else "no value"
            raise UserError(f"{name}: found {found}, expected {_expected(kinds.get(name, str))}.")
        if name == "config":
            files.append(values[0])
        else:
            given[name] = values[0]
    return files, given


def _read_yaml(path: str, kinds: dict[str, Any]) -> dict[str, str]:
    """The flags of a config file, each as it would be typed. It has to be plain YAML with known keys, each
    once."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"config file {path!r} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"config file {path!r} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"config file {path!r} holds no `key: value` lines.")
    root: Any = yaml.compose(text, yaml.SafeLoader)  # which still has duplicate keys
    names = [key.value for key, _ in root.value]
    for name in names:
        _known(name, list(kinds), path)
        if names.count(name) > 1:
            raise UserError(f"{name}: set more than once in {path}; keep one.")
    return {key.value: _typed(key.value, node, kinds[key.value], path) for key, node in root.value}


def _typed(name: str, node: yaml.Node, annotation: Any, path: str) -> str:
    """A YAML value as it would be typed: the text in the file, not what YAML 1.1 makes of it, for which no is
    false, 010 is 8, 1.10 is 1.1 and 11:30 is 690."""
    is_mapping = isinstance(node, yaml.MappingNode) and _may_be(dict, annotation)
    entries = [node]
    if is_mapping:
        entries = [entry for pair in node.value for entry in pair]
    elif isinstance(node, yaml.SequenceNode) and _may_be(list, annotation):
        entries = node.value
    for entry in entries:
        is_null = entry.tag.endswith(":null") and entry is not node and not is_mapping
        if not isinstance(entry, yaml.ScalarNode) or entry.tag.endswith(":binary") or is_null:
            raise UserError(
                f"{name}: found {' '.join(yaml.serialize(entry).split())} ({path}), expected "
                f"{_expected(annotation)}."
            )
    if is_mapping:  # a key may occur twice: whoever reads the text refuses it
        pairs = (f"{json.dumps(key.value)}: {json.dumps(value.value)}" for key, value in node.value)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(node, yaml.SequenceNode):
        texts = [entry.value for entry in entries]  # in quotes, or 1e3 would be a number again
        return yaml.safe_dump(texts, default_flow_style=True, default_style='"', width=10**9).strip()
    if node.tag.endswith(":null"):
        return "null"
    return _Text(node.value) if str in _members(annotation) else node.value


def _known(name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = HINTS.get(name) or (f"did you mean {near[0]!r}?" if near else "see --help.")
        raise UserError(f"unknown key {name!r} ({where}); {hint}")


def dump(config: Config) -> str:
    """The config as YAML that `parse` reads back, in the order of --help."""
    return yaml.safe_dump(
        {field.name: getattr(config, field.name) for field in fields(config)}, sort_keys=False
    )
