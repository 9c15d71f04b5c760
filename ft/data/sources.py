"""Finds the training, validation and test data that a config names: Hub ids, files, folders and pkg:
paths."""

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ft.data.class_folders import read_texts, texts_in
from ft.data.files import FORMATS, JOINED, class_labels, format_of, is_hidden, read_table
from ft.data.hub import load_by_id, load_copy
from ft.data.tables import is_unicode
from ft.durable import digest
from ft.errors import UserError
from ft.options import DataOptions

SPLIT_NAMES = {"train": ["train"], "validation": ["validation", "valid", "dev", "val"], "test": ["test"]}


@dataclass
class Source:
    """One split before it is read: where it is, what its bytes are, and how to read it."""

    name: str
    files: list[Path]
    read: Callable[[], pa.Table]
    class_names: dict[str, list[str]] = field(default_factory=dict)  # of ClassLabel columns, or lists of them
    root: Path | None = None  # of a folder of texts, where the names below it are part of the data
    notes: list[str] = field(default_factory=list)  # what the user should know about the files
    identity: str = ""  # stands for the bytes if there are no files

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over the bytes of the files and everything else that decides how they are
        read, but not over their location."""
        total = hashlib.sha256(json.dumps([self.identity, self.class_names]).encode())
        for path in self.files:
            try:
                of_file = digest(path)["sha256"]
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
            name = str(path.relative_to(self.root)) if self.root else format_of(path)
            total.update(f"{name}:{of_file}\n".encode())
        return total.hexdigest()


def find_sources(options: DataOptions) -> dict[str, Source]:
    """The splits that the options name, keyed train, validation and test; those that do not exist are left
    out. For an evaluation of a test file, only that: the others may not be on this machine."""
    try:
        return _find_sources(options)
    except OSError as error:  # of a folder that this user may not enter
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}.") from None


def _find_sources(options: DataOptions) -> dict[str, Source]:
    if options.test_file and getattr(options, "split", "train") in (None, "test"):
        return {"test": _from_path("test", local_path(options.test_file))}
    named = {"train": options.train_file, "validation": options.validation_file, "test": options.test_file}
    sources = {split: _from_path(split, local_path(value)) for split, value in named.items() if value}
    if options.dataset_name:
        sources = _from_dataset(options) | sources
    return sources


def fingerprints(sources: dict[str, Source]) -> dict[str, str]:
    """The fingerprint of each split's source."""
    return {split: source.fingerprint() for split, source in sources.items()}


def choose_split(options: DataOptions, sources: dict[str, Source]) -> str:
    """The split to score if none is named: test if there is one, else validation, else train."""
    for split in ("test", "validation"):
        if split in sources or ("train" in sources and getattr(options, f"{split}_split_percentage")):
            return split
    return "train"


def local_path(name: str) -> Path:
    """The path that a name stands for; pkg:PACKAGE/inside is in an installed package, which is not
    imported."""
    if "\0" in name or any(len(os.fsencode(part)) > 255 for part in Path(name).parts):
        raise UserError(
            f"{name[:100]!r} is not a file or folder name; expected a path, a Hub id or a pkg: path."
        )
    if not name.startswith("pkg:"):
        return Path(os.path.expanduser(name))  # Path.expanduser raises if there is no such user
    package, _, inside = name.removeprefix("pkg:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not (spec.submodule_search_locations or spec.origin):
        raise UserError(
            f"{name!r}: the Python package {package!r} is not installed; pip install what ships it."
        )
    root = Path(
        next(iter(spec.submodule_search_locations)) if spec.submodule_search_locations else spec.origin or ""
    )
    if not (root / inside).exists():
        raise UserError(f"{name!r}: the package {package!r} holds no {inside!r} (looked in {root}).")
    return root / inside


def _from_dataset(options: DataOptions) -> dict[str, Source]:
    name = options.dataset_name or ""
    path = local_path(name)
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or format_of(path):
            raise UserError(f"dataset_name: {name!r} does not exist; expected a folder or a Hub id.")
        return _from_splits(load_by_id(name, options), options, name)
    if not path.is_dir():
        raise UserError(
            f"dataset_name: {name!r} is a file; name it as train_file, validation_file or test_file."
        )
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        if options.dataset_config_name:
            raise _no_configurations(path)
        saved = _load_saved("dataset_name", path)
        splits = saved if isinstance(saved, dict) else {options.train_split_name: saved}
        return _from_splits(dict(splits), options, str(path))
    found: dict[str, Source] = {} if options.dataset_config_name else _from_folder(path, options)
    if not found and (copy := load_copy(path, options)):
        return _from_splits(copy, options, str(path))
    if options.dataset_config_name:
        raise _no_configurations(path)
    if not found and texts_in(path):
        found["train"] = _from_path("train", path)
    _require(found, options, sorted(p.name for p in path.iterdir()), str(path))
    return found


def _no_configurations(path: Path) -> UserError:
    return UserError(
        f"dataset_config_name: {str(path)!r} is not a copy of a Hub repository: it has no configurations; "
        "leave it out."
    )


def _from_folder(path: Path, options: DataOptions) -> dict[str, Source]:
    """The splits of a folder with a file or a folder of class folders for each."""
    found: dict[str, Source] = {}
    for split, names in _wanted(options).items():
        for stem in names:
            files = [
                p
                for p in sorted(path.iterdir())
                if p.is_file() and format_of(p) and p.name.split(".")[0] == stem
            ]
            folder = path / stem
            if len(files) > 1:
                raise UserError(f"{path}: {files[0].name} and {files[1].name} both hold {stem!r}; keep one.")
            if files:
                found[split] = _from_path(split, files[0])
            elif texts_in(folder):
                found[split] = _from_path(split, folder)
            if split in found:
                break
    if found:
        next(iter(found.values())).notes += _left_out(
            "WARNING dataset_name: %s left out, as no split has such a name (name it as validation_file "
            "or test_file, or with validation_split_name or test_split_name)",
            _others(path, found, options),
        )
    return found


def _others(path: Path, found: dict[str, Source], options: DataOptions) -> list[Path]:
    """The data files of a folder, and of class folders beside others, that belong to no split found and are
    named by no option."""
    named = [options.train_file, options.validation_file, options.test_file]
    read = {file.resolve() for source in found.values() for file in source.files}
    read |= {local_path(name).resolve() for name in named if name}
    there = [p for p in path.iterdir() if not is_hidden(Path(p.name))]
    roots = [source.root for source in found.values() if source.root]
    folders = [p for p in there if p.is_dir() and p not in roots]
    of_classes: list[Path] = []
    for folder in folders if roots else []:  # only beside class folders; any folder may be beside files
        with contextlib.suppress(OSError):  # one that may not be entered, such as lost+found
            of_classes += [text for text in texts_in(folder) if text.resolve() not in read]
    others = [p for p in there if p.is_file() and format_of(p) and p.resolve() not in read]
    # dataset_info.json, dataset_infos.json: what `datasets` knows about a Hub repository
    return [p for p in others if not p.name.startswith("dataset_info")] + of_classes


def _wanted(options: DataOptions) -> dict[str, list[str]]:
    """For each split, the names to look for: only the user's, if given. A split that is named for one purpose
    is not taken for another."""
    given = {
        "train": options.train_split_name,
        "validation": options.validation_split_name,
        "test": options.test_split_name,
    }
    return {
        split: [name] if name else [n for n in SPLIT_NAMES[split] if n not in given.values()]
        for split, name in given.items()
    }


def _require(found: dict[str, Source], options: DataOptions, there: list[str], where: str) -> None:
    """Complain about a split that the user named and that is missing, or about a place without any."""
    given = {"validation": options.validation_split_name, "test": options.test_split_name}
    for split, name in given.items():
        if name and split not in found:
            raise UserError(
                f"{split}_split_name: {where} holds no split {name!r}; it holds: {', '.join(there[:20])}."
            )
    if not found:
        raise UserError(
            f"dataset_name: {where} holds no training split {options.train_split_name!r}; it holds: "
            f"{', '.join(there[:20]) or 'nothing'}. Expected saved `datasets`, files such as "
            "train.csv or train-00000-of-00001.parquet, or one sub-folder of .txt files per class."
        )


def _from_path(split: str, path: Path) -> Source:
    if not path.exists():
        raise UserError(f"{split}_file: {str(path)!r} does not exist.")
    if path.is_file():
        if format_of(path) is None:
            raise UserError(
                f"{split}_file: {path.name!r}: expected a file that ends in {', '.join(FORMATS)} "
                "(text formats also in .gz)."
            )
        labels = class_labels(path)
        return Source(split, [path], lambda: _without_missing(read_table(path), labels), labels)
    if (path / "state.json").exists():
        return _from_rows(split, _load_saved(f"{split}_file", path))
    texts = texts_in(path)
    if not texts:
        has_data = any(format_of(file) for file in path.glob("*"))  # dataset_dict.json among them
        hint = "a folder of data files is named as dataset_name." if has_data else "expected one per class."
        raise UserError(f"{split}_file: the folder {str(path)!r} holds no sub-folder with .txt files; {hint}")
    if odd := next((name for text in texts if not is_unicode(name := str(text.relative_to(path)))), None):
        raise UserError(
            f"{split}_file: the name {odd!r} in {str(path)!r} is not UTF-8, and names of folders are labels; "
            "rename it (convmv does so for all)."
        )
    below = {file for file in path.glob("*/**/*") if not file.is_dir()}
    others = [file for file in below - {*texts} if not is_hidden(file.relative_to(path))]
    notes = _left_out(f"{split}: %s left out, as no .txt file in the folder of a class", others)
    return Source(split, texts, lambda: read_texts(texts), root=path, notes=notes)


def _left_out(what: str, files: list[Path]) -> list[str]:
    """A note for the user about files that are not read, if any; "%s" becomes "3 files are"."""
    count = f"{len(files):,} {'file is' if len(files) == 1 else 'files are'}"
    return [f"{what % count}: {min(files)}{', ...' * (len(files) > 1)}"] if files else []


def _load_saved(option: str, path: Path) -> Any:
    """The `Dataset` or `DatasetDict` that was saved as a folder, which `option` names."""
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # of many types; for a split without rows, an IndexError
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise UserError(
            f"{option}: {str(path)!r} is not a whole saved `datasets` folder, or one of its splits has no "
            f"rows: {why}; save it again."
        ) from None


def _from_splits(splits: dict, options: DataOptions, where: str) -> dict[str, Source]:
    there = {split: [n for n in names if n in splits] for split, names in _wanted(options).items()}
    used = {split: names[0] for split, names in there.items() if names}
    found = {split: _from_rows(split, splits[name]) for split, name in used.items()}
    _require(found, options, list(splits), where)
    if left := [name for name in splits if name not in used.values()]:
        next(iter(found.values())).notes.append(
            f"dataset_name: splits that are left out: {', '.join(left)} (validation_split_name and "
            "test_split_name choose others)"
        )
    return found


def _from_rows(split: str, rows: Any) -> Source:
    """A split as a `Dataset`, or as the files of a copy of a Hub repository."""
    import datasets

    if isinstance(rows, list):
        return Source(split, rows, partial(_read_files, rows))
    files = [Path(entry["filename"]) for entry in rows.cache_files]
    labels = {}
    for column, kind in rows.features.items():
        inner = getattr(kind, "feature", kind)  # of a list
        if isinstance(inner, datasets.ClassLabel):
            labels[column] = list(inner.names)
    identity = "" if files else rows._fingerprint
    return Source(split, files, partial(_without_missing, rows.data.table, labels), labels, identity=identity)


def _read_files(paths: list[Path]) -> pa.Table:
    """The rows of one file after another; they have the same columns."""
    tables = [read_table(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if sorted(table.column_names) != sorted(tables[0].column_names):
            raise UserError(
                f"{path}: has the columns {', '.join(table.column_names)}, but {paths[0].name} has "
                f"{', '.join(tables[0].column_names)}; expected the same in all files of a split."
            )
    joined = [(table.schema.metadata or {}).get(JOINED) for table in tables]
    table = pa.concat_tables(table.select(tables[0].column_names) for table in tables)
    return table.replace_schema_metadata({JOINED: b"; ".join(filter(None, joined))} if any(joined) else None)


def _without_missing(table: pa.Table, class_labels: Iterable[str]) -> pa.Table:
    """The table with nulls instead of -1, which stands for a missing label in `datasets`."""
    for name in class_labels:
        column = table[name]
        if not pa.types.is_integer(column.type):  # a list without a label is empty
            continue
        known = pc.if_else(pc.greater_equal(column, 0), column, pa.scalar(None, column.type))
        table = table.set_column(table.column_names.index(name), table.schema.field(name), known)
    return table
