"""Reading one file: every format gives the same table, and the error for a broken file names its line."""

import csv
import gzip
import json
import random
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from ft.data.audit import joined_rows
from ft.data.files import format_of, read_table
from ft.data.tables import MIXED, ROWS_PER_CHUNK
from ft.errors import UserError

ROWS = [
    {"text": "a, b", "label": "x"},
    {"text": 'say "hi"\nor not', "label": "y"},
    {"text": "ünï", "label": "x"},
]
TABLE = pa.table({name: [row[name] for row in ROWS] for name in ROWS[0]})


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def text_of(kind: str) -> str:
    if kind == "json":
        return json.dumps(ROWS, indent=1)
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS)
    delimiter = "\t" if kind == "tsv" else ","
    quoted = [[field.replace('"', '""') for field in row.values()] for row in ROWS]
    return f"text{delimiter}label\n" + "".join(delimiter.join(f'"{f}"' for f in row) + "\n" for row in quoted)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_table(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(f"{path}: ")


# --- formats


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
def test_text_formats_give_the_same_rows_gzipped_or_not(tmp_path, kind, gz):
    table = read_table(write(tmp_path / f"data.{kind}{gz}", text_of(kind)))
    assert table.to_pylist() == ROWS and table.column_names == ["text", "label"]


def test_json_lines_may_be_called_json(tmp_path):
    assert read_table(write(tmp_path / "data.json", text_of("jsonl"))).to_pylist() == ROWS


def test_parquet_and_both_arrow_formats(tmp_path):
    pyarrow.parquet.write_table(TABLE, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    with (
        pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, TABLE.schema) as writer,
    ):
        writer.write_table(TABLE)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        assert read_table(tmp_path / name).equals(TABLE), name


@pytest.mark.parametrize(
    "name, kind",
    [
        ("train.csv", "csv"),
        ("train.CSV", "csv"),
        ("my.train.tsv.gz", "tsv"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.txt", None),
        ("csv", None),
        (".csv", "csv"),
    ],
)
def test_the_name_tells_the_format(name, kind):
    assert format_of(Path("dir.csv") / name) == kind


# --- csv: what spreadsheets, pandas and Windows write


def test_parquet_has_the_columns_of_the_file_and_none_of_its_path(tmp_path):
    import pyarrow.parquet as pq

    path = tmp_path / "lr=1" / "label=3" / "t.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table([["a"], ["b"], [1]], names=["text", "text", "label"]), path)
    assert read_table(path).column_names == ["text", "text", "label"]  # the audit names the duplicate


def test_csv_columns_are_strings(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "text,label,score\n1,01,\n2,1.0,x\n"))
    assert table.to_pylist() == [
        {"text": "1", "label": "01", "score": ""},
        {"text": "2", "label": "1.0", "score": "x"},
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbftext,label\na,x\nb,y\n",
        b"text,label\r\na,x\r\nb,y\r\n",
        b"text,label\ra,x\rb,y\r",
        b"text,label\na,x\nb,y",
        b"\n\ntext,label\n\na,x\n\nb,y\n\n\n",
        b" text , label \na,x\nb,y\n",
        b'"text","label"\n"a","x"\n"b","y"\n',
    ],
    ids=["BOM", "CRLF", "CR", "no last newline", "blank lines", "blanks in the header", "all quoted"],
)
def test_csv_as_it_comes(tmp_path, content):
    table = read_table(write(tmp_path / "a.csv", content))
    assert table.to_pydict() == {"text": ["a", "b"], "label": ["x", "y"]}


def test_a_column_without_a_name_is_kept(tmp_path):  # DataFrame.to_csv writes the index so
    table = read_table(write(tmp_path / "a.csv", ",text\n0,a\n1,b\n"))
    assert table.to_pydict() == {"": ["0", "1"], "text": ["a", "b"]}


def test_a_blank_line_is_a_row_without_text_where_a_line_is_a_text(tmp_path):
    """Otherwise, the numbers of later rows would not match the lines. At the end of the file it is none."""
    table = read_table(write(tmp_path / "a.csv", "\ntext\nfirst\n\nthird\n\n\n"))
    assert table["text"].to_pylist() == ["first", "", "third"]
    table = read_table(write(tmp_path / "b.csv", "text\r\r\na\r\r\nb\r\r\n"))  # doubled line ends
    assert table["text"].to_pylist() == ["a", "b"]


def test_line_breaks_inside_quotes_stay_as_they_are(tmp_path):
    table = read_table(write(tmp_path / "a.csv", b'text,label\r\n"a\r\nb\nc",x\r\n'))
    assert table["text"].to_pylist() == ["a\r\nb\nc"]


def test_a_quote_that_swallows_rows_of_a_file_that_is_not_quoted(tmp_path):
    rows = '"I went there.\t1\nThen I came back."\t0\n'
    message = refused(write(tmp_path / "a.tsv", f"text\tlabel\n{rows}"))
    assert "lines 2 to 3: broken row: a quote opens a field that goes on over 2 rows" in message
    assert "save the file as csv or jsonl" in message  # which also accept a correctly quoted one
    table = read_table(write(tmp_path / "b.tsv", 'text\tlabel\n"a\nb"\tx\n"a ""b"""\ty\n'))
    assert table.to_pylist() == [{"text": "a\nb", "label": "x"}, {"text": 'a "b"', "label": "y"}]


def test_a_quote_that_may_have_swallowed_rows_of_a_csv_file(tmp_path):
    """No error: a text of several lines may look like this."""
    rows = '"quote opens,x\nb,x\nc,y\ninch 12",y\n'
    table = read_table(write(tmp_path / "a.csv", f"text,label\na,x\n{rows}d,x\n"))
    assert table.num_rows == 3
    assert joined_rows(table, "train")[0].startswith(
        "WARNING train: a.csv, lines 3 to 6 are one row, as a quote"
    )
    table = read_table(write(tmp_path / "b.csv", 'text,label\n"a\nb, c\nd",x\n'))
    assert joined_rows(table, "train") == []


def test_chunks_are_smaller_where_texts_are_long(tmp_path, monkeypatch):
    monkeypatch.setattr("ft.data.tables.CHARACTERS_PER_CHUNK", 100)
    table = read_table(write(tmp_path / "a.csv", "text,label\n" + f"{'w' * 60},x\n" * 7))
    assert [len(chunk) for chunk in table["text"].chunks] == [2, 2, 2, 1]


def test_a_field_of_a_megabyte(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "text,label\n" + "w " * 500_000 + ",x\n"))
    assert len(table["text"][0].as_py()) == 1_000_000


# Lines are lines of the file: the header is line 1; blank lines and line breaks inside quotes count.
@pytest.mark.parametrize(
    "rows, said",
    [
        ("a,x\nb\n", "line 3: found 1 fields, expected 2 (text, label)"),
        ("a,x\nb,x,y\n", "line 3: found 3 fields, expected 2"),
        ("\n\na,x\n\nb\n", "line 6: found 1 fields"),
        ('"a\nb\nc",x\nd\n', "line 5: found 1 fields"),
        ('a,x\n"b\nc,x\nd,y\n', "lines 3 to 5: broken row: a quoted field is not closed"),
        ('a,x\n"b" c,x\n', "line 3: broken row"),
        ('a,x\n"b\nc"d,x\n', "lines 3 to 4: broken row"),
        ("a,x\nb\0b,x\n", "line 3: holds a NUL"),
        ("a,x\n\ufefftext, label\nb,x\n", "line 3: repeats the header; were several files joined?"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_broken_csv_row_is_named_with_its_line(tmp_path, rows, said, newline):
    content = ("text,label\n" + rows).replace("\n", newline)
    message = refused(write(tmp_path / "a.csv", content))
    if "NUL" in said and "line contains NUL" in message:
        said = "line 3: broken row"  # Python 3.10's own complaint
    assert message.startswith(said)


@pytest.mark.parametrize("content, line", [("text,text\na,b\n", 1), ("\n\ntext,a,text\na,b,c\n", 3)])
def test_a_column_that_stands_twice(tmp_path, content, line):
    assert refused(write(tmp_path / "a.csv", content)).startswith(f"line {line}: the column 'text'")


# --- json


def test_json_rows_may_lack_keys(tmp_path):
    table = read_table(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"label": 1, "text": "b"}\n'))
    assert table.to_pydict() == {"text": ["a", "b"], "label": [None, 1]}


def test_a_key_that_comes_late_and_a_type_that_changes_late(tmp_path):
    rows = [{"a": 1, "b": 1, "c": 1}] * ROWS_PER_CHUNK + [{"a": 2.5, "b": "x", "c": None, "d": "late"}]
    table = read_table(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert table["a"].type == pa.float64() and table["a"][-1].as_py() == 2.5
    assert table.schema.field("b").metadata == MIXED and table["b"][-1].as_py() == '"x"'
    assert table["c"].type == pa.int64() and table["c"].null_count == 1
    assert table["d"].null_count == ROWS_PER_CHUNK and table["d"][-1].as_py() == "late"


def test_a_chunk_of_nulls_in_a_column_of_several_types(tmp_path):
    rows = [{"a": None}] * ROWS_PER_CHUNK + [{"a": 1}, {"a": "x"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = read_table(tmp_path / "t.jsonl")
    assert table["a"].null_count == ROWS_PER_CHUNK and table["a"].to_pylist()[-2:] == ["1", '"x"']


@pytest.mark.parametrize("values", [[1, "x"], [1, True], [0.5, True], [[1], 1], [2**70, 1]])
def test_a_column_of_several_types_is_kept_as_json_and_marked(tmp_path, values):
    content = "".join(json.dumps({"text": "a", "odd": value}) + "\n" for value in values)
    table = read_table(write(tmp_path / "a.jsonl", content))
    assert table.schema.field("odd").metadata == MIXED
    assert [json.loads(value) for value in table["odd"].to_pylist()] == values
    assert table["text"].to_pylist() == ["a", "a"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", '{"t": "a"}\n\n{"t": \n', "line 3: broken JSON"),
        ("a.jsonl", '{"t": "a"}\r\n{"t"}\r\n', "line 2: broken JSON"),
        ("a.jsonl", '{"t": "a"}\n"b"\n', "line 2: found str, expected an object"),
        ("a.jsonl", '{"t": "a\0"}\n', "line 1: broken JSON"),
        ("a.json", '{"t": "a",\n "u": 1}\n', "line 1: broken JSON"),
        ("a.json", '[{"t": 1},\n {"t": }]', "line 2: broken JSON"),
        ("a.json", '[{"t": 1}', "line 1: broken JSON"),
        ("a.json", '[{"t": 1}, 2]', "row 1: found int, expected an object"),
        ("a.jsonl", '{"t": "a"}\n{"t": "\\ud83d"}\n', "row 1 (rows count from 0): 't' holds half of"),
        ("a.jsonl", '{"t": "a", "\\ud83d": 1}\n', "the column '\\ud83d' is named with half of"),
        ("a.jsonl", '{"t": "a"}\n{"t": ' + "1" * 5000 + "}\n", "line 2: holds a whole number of thousands"),
        ("a.json", '[{"t": ' + "1" * 5000 + "}]", "holds a whole number of thousands"),
    ],
)
def test_broken_json_is_named_with_its_line_or_row(tmp_path, name, content, said):
    assert refused(write(tmp_path / name, content)).startswith(said)


# --- files that are not what their name says


@pytest.mark.parametrize("name", "a.csv a.tsv a.json a.jsonl a.parquet a.arrow a.csv.gz".split())
def test_a_file_of_no_bytes(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert "empty" in refused(tmp_path / name)


@pytest.mark.parametrize(
    "name, content",
    [("a.csv", "text,label\n"), ("a.json", "[]"), ("a.jsonl", "\n \n"), ("a.csv.gz", "text,label\n")],
)
def test_a_file_without_rows(tmp_path, name, content):
    assert refused(write(tmp_path / name, content)) == "holds no rows."


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_bytes_that_are_not_utf8_are_named_with_line_and_byte(tmp_path, kind, gz):
    content = text_of(kind).encode()  # five lines of csv, three of jsonl
    bad = '{"text": "é"}\n' if kind == "jsonl" else "é,x\n"
    line, byte = content.count(b"\n") + 1, bad.index("é") + 1
    message = refused(write(tmp_path / f"a.{kind}{gz}", content + bad.encode("latin-1")))
    assert message == f"line {line}: byte {byte} (0xe9) is not UTF-8; save the file as UTF-8."


# A flipped byte in the middle of an arrow file goes unnoticed: it is plain data without a checksum.
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.parquet", "garbage"),
        ("a.parquet", "cut"),
        ("a.parquet", "middle"),
        ("a.arrow", "garbage"),
        ("a.arrow", "cut"),
    ],
)
def test_a_damaged_parquet_or_arrow_file(tmp_path, name, damage):
    path = tmp_path / name
    table = pa.table({"text": [f"row {i}" for i in range(5000)]})
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    whole = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(b"not at all" * 100)
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(whole[:40] + b"\xff" * 200 + whole[240:])
    message = refused(path)
    assert message.startswith(f"is not a whole {name[2:]} file: ") and message.endswith("copy it again.")


@pytest.mark.parametrize("damage", ["garbage", "cut", "middle", "tail"])
def test_a_damaged_gzip_file(tmp_path, damage):
    rows = "".join(f"{random.Random(i).random()},x\n" for i in range(2000))
    whole = gzip.compress(b"text,label\n" + rows.encode())
    broken = {
        "garbage": b"text,label\na,b\n",
        "cut": whole[: len(whole) // 2],
        "middle": whole[:2000] + b"\xff" * 100 + whole[2100:],
        "tail": whole[:-8] + b"\0" * 8,
    }[damage]
    (tmp_path / "a.csv.gz").write_bytes(broken)
    assert refused(tmp_path / "a.csv.gz").startswith("is not a whole gzip file: ")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", "text\na\n")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(UserError, match=r"a\.csv: cannot be read: Permission denied\."):
        read_table(path)


def test_a_long_json_array_that_is_not_utf8(tmp_path):
    rows = json.dumps([{"text": "a" * 100}] * 2000).encode()
    path = write(tmp_path / "a.json", rows[:-5] + b"\xe9" + rows[-5:])
    assert "is not UTF-8; save the file as UTF-8" in refused(path)


# --- size


def test_many_rows_take_seconds_and_little_memory(tmp_path):
    words = random.Random(0).choices("the a film was, is very good and ünicode".split(), k=2000)
    texts = [" ".join(words[i : i + 30]) for i in range(0, 1900, 7)]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((texts[i % len(texts)], i % 5) for i in range(50_000))
    begin = time.process_time()
    assert read_table(tmp_path / "a.csv").num_rows == 50_000
    assert time.process_time() - begin < 4  # 0.4 s on a free core
    tracemalloc.start()
    read_table(tmp_path / "a.csv")
    peak = tracemalloc.get_traced_memory()[1]  # of Python objects; Arrow's buffers are not counted
    tracemalloc.stop()
    assert peak < 15e6, f"{peak:,} bytes of Python objects for {(tmp_path / 'a.csv').stat().st_size:,}"
