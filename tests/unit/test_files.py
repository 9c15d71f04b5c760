"""Reading one file: every format gives the same rows, and nothing in a text is lost."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ft.data import files
from ft.data.files import FORMATS, format_of, read_table
from ft.errors import UserError

ROWS = [
    {"text": "plain", "label": "a"},
    {"text": 'a "quoted", text', "label": "b"},
    {"text": "two\nlines", "label": "a"},
    {"text": "ünïcödé 漢字 🎉", "label": "b"},
    {"text": " padded ", "label": "a"},
]


def as_csv(delimiter):
    quoted = [[value.replace('"', '""') for value in row.values()] for row in ROWS]
    rows = [delimiter.join(f'"{value}"' for value in row) for row in quoted]
    return "\n".join([delimiter.join(ROWS[0]), *rows, ""]).encode()


def as_arrow(new):
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def as_parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


LINES = "\n".join(map(json.dumps, ROWS)).encode()
CONTENTS = {
    "t.csv": as_csv(","),
    "t.tsv": as_csv("\t"),
    "t.jsonl": LINES,
    "t.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "lines.json": LINES + b"\n",
    "t.csv.gz": gzip.compress(as_csv(",")),
    "t.tsv.gz": gzip.compress(as_csv("\t")),
    "t.jsonl.gz": gzip.compress(LINES),
    "t.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "t.parquet": as_parquet(),
    "file.arrow": as_arrow(pa.ipc.new_file),
    "stream.arrow": as_arrow(pa.ipc.new_stream),
    "CAPITALS.CSV": as_csv(","),
    "two.parts.jsonl": LINES,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_rows_in_their_order(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert read_table(tmp_path / name).to_pylist() == ROWS


def test_names_stand_for_formats():
    assert [format_of(tmp) for tmp in map(files.Path, ["a.csv", "a.jsonl.gz", "A.TSV", "x/a.b.json"])] == [
        "csv", "jsonl", "tsv", "json",
    ]  # fmt: skip
    assert [format_of(files.Path(n)) for n in ["csv", "a.gz", "a.parquet.gz", "a.txt", "a.csv.bak"]] == [
        None
    ] * 5


def rows_of(tmp_path, content, name="t.csv"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(tmp_path / name).to_pylist()


# --- what editors and spreadsheets do to text files


@pytest.mark.parametrize(
    "name, content", [("t.csv", as_csv(",")), ("t.jsonl", LINES), ("t.json", json.dumps(ROWS).encode())]
)
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, name, content):
    assert rows_of(tmp_path, b"\xef\xbb\xbf" + content, name) == ROWS


def test_windows_line_ends(tmp_path):
    expected = [{"text": "x", "label": "a"}, {"text": "two\r\nlines", "label": "b"}]
    assert rows_of(tmp_path, 'text,label\r\nx,a\r\n"two\r\nlines",b\r\n') == expected
    assert rows_of(tmp_path, '{"text": "x", "label": "a"}\r\n', "t.jsonl") == expected[:1]


def test_blank_lines_are_no_rows(tmp_path):
    assert rows_of(tmp_path, "\n\ntext,label\n\nx,a\n\n\ny,b\n\n") == [
        {"text": "x", "label": "a"}, {"text": "y", "label": "b"},
    ]  # fmt: skip
    assert rows_of(tmp_path, '\n{"text": "x"}\n\n  \n{"text": "y"}', "t.jsonl") == [
        {"text": "x"},
        {"text": "y"},
    ]


def test_no_line_end_at_the_end(tmp_path):
    assert rows_of(tmp_path, "text,label\nx,a") == [{"text": "x", "label": "a"}]


def test_a_field_of_a_megabyte(tmp_path):
    long = "word, " * 200_000
    assert rows_of(tmp_path, f'text,label\n"{long}",a\n') == [{"text": long, "label": "a"}]


def test_separators_of_unicode_end_no_line(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    assert rows_of(tmp_path, f"text,label\n{text},a\n") == [{"text": text, "label": "a"}]
    assert rows_of(tmp_path, json.dumps({"text": text}, ensure_ascii=False), "t.jsonl") == [{"text": text}]


def test_names_of_columns_are_stripped_and_texts_are_not(tmp_path):
    assert rows_of(tmp_path, "text , label\n x ,a\n") == [{"text": " x ", "label": "a"}]


def test_values_of_csv_stay_text(tmp_path):
    text = "text,label\n007,1\n1e3,2\nnull,3\nNA,4\n"
    assert [row["text"] for row in rows_of(tmp_path, text)] == ["007", "1e3", "null", "NA"]


# --- JSON


def test_keys_that_some_rows_lack_are_null(tmp_path):
    content = '{"text": "x"}\n{"text": "y", "label": 1}\n'
    assert rows_of(tmp_path, content, "t.jsonl") == [{"text": "x", "label": None}, {"text": "y", "label": 1}]


def test_integers_and_fractions_are_numbers_and_other_mixtures_are_kept_for_the_audit(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1, "b": 1}\n{"a": 2.5, "b": "x"}\n{"a": null, "b": null}\n')
    table = read_table(tmp_path / "t.jsonl")
    assert table["a"].to_pylist() == [1.0, 2.5, None]
    assert table["b"].to_pylist() == ["1", '"x"', None] and table.schema.field("b").metadata == files.MIXED
    assert table.schema.field("a").metadata is None


def test_types_are_found_over_all_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROWS_PER_CHUNK", 2)
    rows = [{"a": None}, {"a": None}, {"a": 1}, {"a": 2}, {"a": 1.5, "b": "late"}, {"a": 3}, {"a": 4}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = read_table(tmp_path / "t.jsonl")
    assert table["a"].to_pylist() == [None, None, 1.0, 2.0, 1.5, 3.0, 4.0]
    assert table["b"].to_pylist() == [None, None, None, None, "late", None, None]
    rows[6]["a"] = "four"
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mixed = read_table(tmp_path / "t.jsonl")
    assert [v and json.loads(v) for v in mixed["a"].to_pylist()] == [None, None, 1, 2, 1.5, 3, "four"]


def test_numbers_beyond_64_bits_are_kept(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"id": 1, "text": "x"}\n{"id": 123456789012345678901234567890, "text": "y"}\n'
    )
    table = read_table(tmp_path / "t.jsonl")
    assert table["text"].to_pylist() == ["x", "y"]


# --- what is wrong is said with its line


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("t.csv", 'text,label\n"two\nlines",a\nx,y,z\n', "line 4: found 3 fields"),
        ("t.csv", 'text,label\n"two\nlines",a\n"open,a\n', "line 4"),
        ("t.jsonl", '{"a": 1}\n\n{"a": 1\n', "line 3"),
        ("t.jsonl", '{"a": 1} {"a": 2}\n', "line 1"),
        ("t.jsonl", '{"a": "\\ud83d"}\n', "row 0"),
        ("t.json", '{"a": [\n{"text": 1}]}', "line 1"),
        ("t.json", "[[]]", "row 0"),
        ("t.csv", b"text,label\n\xff,a\n", "line 2: byte 1 (0xff)"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path, name, content, said):
    with pytest.raises(UserError) as error:
        rows_of(tmp_path, content, name)
    assert str(tmp_path / name) in str(error.value) and said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", [name for name in CONTENTS if name.lower().split(".")[-1] in ("gz", *FORMATS[4:])]
)
def test_half_a_file_is_refused(tmp_path, name):
    for part in (0.3, 0.9):
        (tmp_path / name).write_bytes(CONTENTS[name][: int(len(CONTENTS[name]) * part)])
        with pytest.raises(UserError, match="not a whole"):
            read_table(tmp_path / name)


def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(UserError, match=r"t\.csv: cannot be read"):
        read_table(tmp_path / "t.csv")
