"""From a config to encoded splits: find the sources; encode the usable rows, once per machine, and cache
them."""

import copy
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ft.data.columns import Columns, Scoring
from ft.data.encode import EncodedRows, encode
from ft.data.pieces import Cut
from ft.data.sources import Source, find_sources, fingerprints
from ft.data.usable import usable_splits
from ft.durable import find_damage, write_manifest
from ft.errors import UserError
from ft.options import DataOptions
from ft.tasks.base import Task

CACHE_VERSION = 16  # part of every key: raise it when encodings change; incomplete ones are rebuilt anyway


@dataclass
class Data:
    """The encoded splits ("train", "validation", "test"; those that exist), and what is known about them. One
    requested by an evaluation has no labels if no row of its source has one.

    `facts` has, for each split, rows, rows dropped by reason, and rows whose text occurs elsewhere, too;
    `notes` are lines for the user; `tokens` (tokens,) holds the sorted ids of all tokens that occur in any
    row; `fingerprint` identifies everything that decided the encoding, `sources` the bytes of each source.
    `slices` has, for each scored split, the columns by which results are sliced, of all rows of its source,
    and their class names if they are class numbers."""

    splits: dict[str, EncodedRows]
    columns: Columns
    facts: dict[str, Any]
    notes: list[str]
    tokens: np.ndarray
    fingerprint: str
    sources: dict[str, str]
    slices: dict[str, dict[str, tuple[pa.ChunkedArray, list[str]]]] = field(default_factory=dict)

    def was_set_aside(self, split: str) -> bool:
        """Whether the rows of a split were set aside from the training rows, and have no source of their
        own."""
        return "dropped" not in self.facts[split]

    def rows_of_update(self, global_batch_size: int | None) -> int:
        """The number of rows in an update: all training rows, if these are fewer than requested."""
        rows = len(self.splits["train"])
        return min(global_batch_size or rows, rows)

    def draw(self, options: DataOptions) -> dict[str, Any]:
        """What decides which training rows are set aside: the rows, the splits and their sizes; the labels,
        by which they are stratified; and the bad rows among them."""
        found: dict[str, Any] = {"train": self.sources.get("train")}
        for split in ("validation", "test"):
            # A test split without labels has a source, but no facts; rows may be set aside in its place.
            has_facts, name = split in self.facts, f"{split}_split_percentage"
            is_drawn = self.was_set_aside(split) if has_facts else split not in self.sources
            found[name] = getattr(options, name) if is_drawn else None
        dropped = self.facts.get("train", {}).get("dropped")  # how many for which reason
        return found | {"label_column_name": self.columns.label, "dropped": dropped}


def prepare_data(
    options: DataOptions,
    task: Task,
    tokenizer: Any,
    max_length: int,
    progress: Callable,
    only: str | None = None,
    scoring: Scoring | None = None,
    sources: dict[str, Source] | None = None,
) -> Data:
    """Read, audit and encode the data that the options name, or map what an earlier run has encoded.

    `only` limits the work to one of train, validation and test; if that is not train, the task must know its
    targets already. `scoring` is for the one split of an evaluation: its rows may have ids, and need no
    labels. `sources` are what the options name, if they were found already.

    One process per machine does the work while the others wait for its lock, not in a collective that could
    time out. Raises `UserError` for anything wrong with the data."""
    sources = sources or find_sources(options)
    if only is None and "train" not in sources:
        raise UserError(
            f"no training data: found {' and '.join(sources)} only; set train_file or train_split_name."
        )
    prints = fingerprints(sources)
    folder = cache_root() / _key(options, task, tokenizer, max_length, prints, only, scoring)
    old = _stamp(folder) if options.overwrite_cache else None
    data = None if options.overwrite_cache else _open(folder, task)
    if data is None:
        about = options, task, tokenizer, max_length, sources, prints, only, scoring, progress
        data = _built_once(folder, task, old, partial(_build, folder, *about))
    read = [source for name, source in sources.items() if only in (None, name)]
    data.notes[:0] = [note for source in read for note in source.notes]
    return data


def _built_once(folder: Path, task: Task, old: int | None, build: Callable[[], object]) -> Data:
    """What was built by the first of a machine's processes that need it, in place of what has the stamp
    `old`."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            data = _open(folder, task) if old is None or _stamp(folder) != old else None
            if data is None:
                build()
                data = _open(folder, task)
    except OSError as error:
        raise UserError(
            f"the encoding cache {str(folder.parent)!r} cannot be written: {error}; set HF_HOME to a folder "
            "that can (and HF_HUB_CACHE, if models of the Hub are to be found where they are)."
        ) from None
    assert data is not None
    return data


def _stamp(folder: Path) -> int | None:
    """What distinguishes an encoding from another one in its place; None if there is none."""
    try:
        return (folder / "data.json").stat().st_mtime_ns
    except OSError:
        return None


def _is_damaged(folder: Path) -> bool:
    try:
        return bool(find_damage(folder, "data.json"))
    except OSError:
        return True


def _open(folder: Path, task: Task) -> Data | None:
    """What an earlier run has encoded; None if there is nothing, or nothing complete."""
    if _is_damaged(folder):
        return None
    try:
        known = json.loads((folder / "data.json").read_text())
        data = Data(
            splits={name: EncodedRows.open(folder / f"{name}.arrow") for name in known["splits"]},
            columns=Columns(tuple(known["columns"].pop("texts")), **known["columns"]),
            facts=known["facts"],
            notes=known["notes"],
            tokens=np.array(known["tokens"]),
            fingerprint=folder.name,
            sources=known["sources"],
        )
    # For a truncated file, pyarrow raises a ValueError; one of an older version lacks a key.
    except (OSError, ValueError, KeyError):
        return None
    task.load_state(known["task"])
    return data


def cache_root() -> Path:
    """Where encodings are cached: beside the caches of the other Hugging Face libraries (HF_HOME)."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"
    )
    try:
        return Path(home).expanduser() / "ft-encoded"
    except RuntimeError:
        raise UserError("the encoding cache needs a home folder, but there is none; set HF_HOME.") from None


def _key(
    options: DataOptions, task: Task, tokenizer: Any, max_length: int, prints: dict, only: str | None,
    scoring: Scoring | None,
) -> str:  # fmt: skip
    """A hash over everything that decides the encoding: bytes of the data, tokenizer, options, targets known
    beforehand."""
    chosen = {name: getattr(options, name) for name in DataOptions.__annotations__ if name not in NOT_IN_KEY}
    parts = [CACHE_VERSION, *_identity(tokenizer), max_length, chosen, prints, [only] if only else []]
    parts += [type(task).__name__, task.state(), *([vars(scoring)] if scoring else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _identity(tokenizer: Any) -> list[Any]:
    """Everything that decides how a tokenizer works, but not where it is stored."""
    known: dict[str, Any] = {}
    for name, value in tokenizer.init_kwargs.items():
        if name.endswith("_file"):
            known[name] = (
                value and Path(value).exists() and hashlib.sha256(Path(value).read_bytes()).hexdigest()
            )
        elif name not in ("name_or_path", "is_local", "local_files_only"):
            known[name] = value
    if type(tokenizer).__module__.startswith("transformers_modules."):  # of the repository's own code
        code = Path(sys.modules[type(tokenizer).__module__].__file__ or "").read_bytes()
        known["code"] = hashlib.sha256(code).hexdigest()
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), known]
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()  # these two are set again in every call
    backend.no_padding()
    return [type(tokenizer).__name__, backend.to_str(), known]


def _is_glued(tokenizer: Any) -> bool:
    """Whether nothing separates the texts of a pair: neither a token between them nor token types."""
    more = tokenizer.num_special_tokens_to_add(pair=True) - tokenizer.num_special_tokens_to_add()
    return more < 1 and "token_type_ids" not in tokenizer.model_input_names


# What does not change the encoding; paths are left out because the bytes behind them are in the key.
NOT_IN_KEY = (
    "overwrite_cache preprocessing_num_workers dataloader_num_workers train_file validation_file test_file "
    "dataset_name max_length"
).split()


def _build(
    folder: Path,
    options: DataOptions,
    task: Task,
    tokenizer: Any,
    max_length: int,
    sources: dict[str, Source],
    prints: dict[str, str],
    only: str | None,
    scoring: Scoring | None,
    progress: Callable,
) -> None:
    tables, columns, facts, notes = usable_splits(options, task, sources, only, scoring)
    is_pair = len(columns.texts) == 2
    least = tokenizer.num_special_tokens_to_add(pair=is_pair) + len(columns.texts)
    if max_length < least:
        raise UserError(
            f"max_length: found {max_length}, expected at least {least} tokens for a pair of texts with this "
            "tokenizer."
        )
    cut = Cut(max_length, options.long_text or "truncate", options.max_windows or 1)
    if is_pair and cut.long_text != "truncate":
        raise UserError(
            f"long_text: found {cut.long_text}, but a row has two texts ({', '.join(columns.texts)}), of "
            "which the longer one is truncated; set long_text: truncate (a model trained with another "
            "setting keeps it), or name one column in text_column_names."
        )
    if is_pair and _is_glued(tokenizer):
        notes.append(
            f"WARNING text_column_names: the tokenizer puts nothing between {' and '.join(columns.texts)}: "
            "the model cannot see where the second begins; give both in one column, with words between them"
        )
    # Encoding sets its truncation, which would be exported with the model.
    tokenizer = copy.deepcopy(tokenizer)
    host = platform.node()
    for left in folder.parent.glob(f"{folder.name}.{host}.*.tmp"):  # from a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{host}.{os.getpid()}.tmp")
    old = folder.with_name(f"{folder.name}.{host}.{os.getpid()}.old.tmp")
    temporary.mkdir(parents=True)
    try:
        tokens = np.zeros(0, np.int64)
        with progress(total=sum(t.num_rows for t in tables.values()), desc="encode", unit="rows") as bar:
            for name, table in tables.items():
                path = temporary / f"{name}.arrow"
                workers = options.preprocessing_num_workers
                tokens = np.union1d(tokens, encode(table, columns, tokenizer, cut, path, workers, bar))
        if fingerprints(sources) != prints:  # else it would be cached under the key of other rows
            raise UserError("the data was changed while it was read; start again.")
        state = {
            "splits": list(tables),
            "columns": vars(columns),
            "facts": facts,
            "notes": notes,
            "tokens": tokens.tolist(),
            "sources": prints,
            "task": task.state(),
        }
        (temporary / "data.json").write_text(json.dumps(state))
        write_manifest(temporary)
        if folder.exists():  # other runs may have mapped it, and keep theirs
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
