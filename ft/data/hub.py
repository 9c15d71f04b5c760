"""Data from the Hub: a repository by its id, or a local copy of one, read by `datasets`."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from ft.data.files import SEPARATORS, format_of, is_hidden, is_pointer
from ft.errors import UserError
from ft.options import DataOptions

EVALS, TESTS = ("eval", "evaluation"), ("test", "testing")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\..+")  # for years, with a hash after it


def load_by_id(name: str, options: DataOptions) -> dict[str, Any]:
    """The splits of a repository on the Hub, downloaded or from the cache."""
    try:
        return _load(name, options.dataset_config_name)
    except Exception as error:  # the hub client has a dozen unrelated types for "not there" and "no network"
        why = " ".join(str(error).split())[:400] or "no reason given"
        raise UserError(
            f"dataset_name: {name!r} is no local folder, and cannot be loaded from the Hub: "
            f"{type(error).__name__}: {why}"
        ) from None


def load_copy(path: Path, options: DataOptions) -> dict[str, Any] | None:
    """The splits of a folder with a repository's files in it, such as data/train-00000-of-00002.parquet; None
    if it holds none. For csv and tsv files, a split is the list of them, not read yet.

    Its README.md may name configurations; otherwise, each folder with training files is one. Raises
    `UserError` for missing shards, and if it is not clear which configuration is meant."""
    path = path.resolve()  # to `datasets`, "csv" is no folder
    files = sorted(
        p for p in path.rglob("*") if format_of(p) and not p.is_dir() and not is_hidden(p.relative_to(path))
    )
    word = _word(options.train_split_name)  # to `datasets`, Train.csv is all of the data, test rows, too
    training = [p.relative_to(path) for p in files if word.search(str(p.relative_to(path)))]
    has_configurations = "configs" in _card(path)
    if not files or not (training or has_configurations):
        return None
    wanted, inside = options.dataset_config_name, None
    if not has_configurations:
        inside = _choose(wanted, sorted({str(_configuration(file, word)) for file in training}), path)
        wanted = None
    files = [file for file in files if inside is None or (path / inside) in file.parents]
    _check_files(files, path)
    root = path / (inside or "") / "data"  # where the shards of each split have its name
    if not has_configurations and not any(f.parent == root and SHARD.fullmatch(f.name) for f in files):
        _check_test_files([file.relative_to(path) for file in files], path)
    try:
        where = {"data_dir": inside} if inside else {}
        has_tables = any(format_of(file) in SEPARATORS for file in files)
        splits = _files_of(str(path), wanted, **where) if has_tables else None
        return splits or _load(str(path), wanted, **where)
    except Exception as error:
        why = " ".join(f"{error} {error.__cause__ or ''}".split())[:400] or "no reason given"
        raise UserError(
            f"dataset_name: {str(path)!r} cannot be read by `datasets`: {type(error).__name__}: {why}"
        ) from None


def _load(name: str, configuration: str | None, **options: Any) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    return dict(datasets.load_dataset(name, configuration, **options))


def _files_of(name: str, configuration: str | None, **options: Any) -> dict[str, list[Path]] | None:
    """The csv or tsv files of each split, as `datasets` tells them apart; None if it has to read them, as
    there are others, or README.md says how. It reads a csv file by the rules of pandas, to which "NA" and
    "None" are nothing, and 007 is 7."""
    import datasets

    builder = datasets.load_dataset_builder(name, configuration, **options)
    found = {str(split): [Path(file) for file in files] for split, files in builder.config.data_files.items()}
    kinds = {format_of(file) for files in found.values() for file in files}
    if not kinds <= SEPARATORS.keys() or builder.info.features is not None:
        return None
    plain, config = vars(type(builder.config)()), vars(builder.config)
    ours = {"name", "data_dir", "data_files", "description", "version", "sep"}  # do not change how it reads
    is_plain = all(config[name] == value for name, value in plain.items() if name not in ours)
    return found if is_plain and {SEPARATORS[kind] for kind in kinds if kind} == {config["sep"]} else None


def _card(path: Path) -> dict[str, Any]:
    """The YAML header of a repository's README.md."""
    try:
        head = re.match(r"---\n(.*?)\n---", (path / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        content = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _configuration(file: Path, train: re.Pattern[str]) -> Path:
    """The folder of a configuration to which a training file belongs: CONFIGURATION/train-... or
    CONFIGURATION/train/..."""
    folder = file.parent
    return folder.parent if train.fullmatch(folder.name) else folder


def _choose(wanted: str | None, folders: list[str], path: Path) -> str | None:
    """The folder of the configuration that is meant; None for the whole repository."""
    if wanted is None and len(folders) == 1:
        return None
    if wanted in folders:
        return wanted
    if folders == ["."]:
        raise UserError(f"dataset_config_name: {str(path)!r} has no configurations; leave it out.")
    raise UserError(
        f"dataset_config_name: found {wanted or 'none'!r}; {str(path)!r} holds the configurations "
        f"{', '.join(folders[:20])}: name one of them."
    )


def _word(*words: str) -> re.Pattern[str]:
    """One of the words, in a path."""
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(map(re.escape, words))})(?![A-Za-z0-9])")


def _check_test_files(files: list[Path], path: Path) -> None:
    """Refuse files of two kinds that `datasets` would score as one split, and one that fits both, twice."""
    evals, tests = ([f for f in files if _word(*words).search(str(f))] for words in (EVALS, TESTS))
    if evals and tests:
        raise UserError(
            f"dataset_name: {str(path)!r} holds {evals[0]} and {tests[0]}, which `datasets` takes for one "
            "test split; rename the first to validation, or name all as train_file, validation_file and "
            "test_file."
        )


def _check_files(files: list[Path], path: Path) -> None:
    """Refuse files that only stand for others, and splits of which a shard is missing."""
    shards: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: is a broken link; fetch the file.")
        if is_pointer(file):
            raise UserError(
                f"{file}: is a Git LFS pointer to a file that was not fetched; run `git lfs pull` in "
                f"{str(path)!r}."
            )
        if shard := SHARD.fullmatch(file.name):
            shards[file.parent, shard[1], int(shard[3])].add(int(shard[2]))
    for (folder, split, count), there in shards.items():
        missing = sorted(set(range(count)) - there)
        if missing:
            raise UserError(
                f"{folder}: lacks {len(missing)} of the {count} files of {split}, {split}-{missing[0]:05}-of-"
                f"{count:05} the first; fetch them."
            )
