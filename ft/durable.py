"""Atomic files and folders: flushed to disk, verified by hashes, put in place by a single rename."""

import hashlib
import json
import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any


def write_manifest(folder: Path) -> None:
    """Write the sizes and hashes of the files of a folder to its manifest.json."""
    files = {path.name: digest(path) for path in sorted(folder.iterdir())}
    write_flushed(folder / "manifest.json", json.dumps(files, indent=1))


def find_damage(folder: Path, *needed: str) -> str:
    """What is wrong with the files of a folder, compared with its manifest, which must list the `needed`
    ones; empty if it is intact. Raises `OSError` if one exists but cannot be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        missing = set(needed) - set(manifest)
        if missing:
            return f"manifest.json lacks {', '.join(sorted(missing))}"
        return next(
            (f"{name} is changed" for name, known in manifest.items() if digest(folder / name) != known),
            "",
        )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, TypeError):
        return "manifest.json cannot be read"


def replace_folder(new: Path, place: Path, keep: Path | None = None) -> None:
    """Flush `new` to disk and move it to `place`; an older folder there is removed afterwards, or kept as
    `keep`."""
    for path in new.iterdir():
        flush(path)
    flush(new)
    old = keep or place.with_name(f".{place.name}.old")
    if place.exists():
        place.rename(make_free(old))
    new.rename(place)
    if keep is None:
        make_free(old)


def make_free(place: Path) -> Path:
    """A free name for a folder: `place`, after removing an older one; if that cannot be removed, as on NFS
    while somebody reads a file of it, the same name with a number."""
    for number in count():
        path = place.with_name(f"{place.name}.{number}") if number else place
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            break
    return path


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_flushed(path: Path, text: str) -> None:
    """Write a text file and flush it to disk."""
    path.write_text(text, encoding="utf-8")
    flush(path)


def replace_file(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk, and rename it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_flushed(temporary, text)
    temporary.rename(path)


def digest(path: Path) -> dict[str, Any]:
    """The size of a file, and the SHA-256 of its content."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return {"bytes": path.stat().st_size, "sha256": sha.hexdigest()}
