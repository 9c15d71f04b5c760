"""A folder with one sub-folder of .txt files per class: its files, and their rows."""

from pathlib import Path

import pyarrow as pa

from ft.data.files import ONE_FILE_A_ROW, is_hidden, read_text

TEXTS = (".txt", ".txt.gz")


def texts_in(folder: Path) -> list[Path]:
    """The .txt files (also .gz) of the class folders in a folder, sorted; hidden folders (of editors) are no
    classes. A broken link is included: reading it reports that."""
    classes = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    # Not by glob, which skips a folder that may not be entered.
    found = (path for one in classes if not is_hidden(Path(one.name)) for path in one.iterdir())
    texts = (path for path in found if path.name.lower().endswith(TEXTS) and not path.is_dir())
    return sorted(path for path in texts if not is_hidden(Path(path.name)))


def read_texts(paths: list[Path]) -> pa.Table:
    """Rows in the order of the sorted paths: the text, the name of its folder as label, and the file. A file
    that is not UTF-8 gets a null text, which the audit reports as a bad row."""
    texts = [read_text(path) for path in paths]
    names = ["/".join(path.parts[-2:]) for path in paths]
    labels = [path.parent.name for path in paths]
    table = pa.table({"text": pa.array(texts, pa.string()), "label": labels, "file": names})
    return table.replace_schema_metadata(ONE_FILE_A_ROW)
