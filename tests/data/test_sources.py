from __future__ import annotations

import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowrank_kit.data.sources import Document, read_source, source_files, text_bytes
from lowrank_kit.errors import LowRankError, UsageError


def read(source: Path | str) -> list[Document]:
    return list(read_source(str(source)))


def test_the_standard_library_is_the_default() -> None:
    documents = list(read_source())
    assert documents == list(read_source("stdlib"))
    names = [document.name for document in documents]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert "ArgumentParser" in next(document.text for document in documents if document.name == "argparse.py")
    excluded = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
    assert all(excluded.isdisjoint(Path(name).parts) for name in names)
    assert not any(Path(name).name.startswith("_sysconfigdata") for name in names)
    # 10.7 to 11.4 MB in Python 3.10 to 3.13.
    assert 8e6 < sum(len(document.text.encode()) for document in documents) < 16e6


def test_a_stripped_standard_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "os.py").write_text("import sys\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"not installed: 1 \.py files in .*, expected at least 200") as caught:
        list(read_source())
    assert "file or folder" in str(caught.value.hint)


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "deep.md").write_text("deep")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "z.rst.gz").write_bytes(gzip.compress(b"last"))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(b'{"text": "one"}\n\n{"text": "two", "id": 3}\n'))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git" / "description.txt").write_text("hidden")
    assert read(tmp_path) == [
        Document("a.txt", "first"),
        Document("b/deep.md", "deep"),
        Document("c.jsonl.xz:1", "one"),
        Document("c.jsonl.xz:3", "two"),
        Document("z.rst.gz", "last"),
    ]


@pytest.mark.parametrize("kind", [".txt", ".text", ".raw", ".md", ".rst", ".py"])
def test_each_plain_type_as_a_file_compressed_or_not(tmp_path: Path, kind: str) -> None:
    for compression, compress in (("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)):
        path = tmp_path / f"file{kind}{compression}"
        path.write_bytes(compress("naïve\n".encode()))
        assert read(path) == [Document(path.name, "naïve\n")]


def test_bytes_that_are_not_utf_8_are_replaced_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xefve\r\nline\rend")
    with caplog.at_level(logging.WARNING):
        assert read(path) == [Document("latin.txt", "na\ufffdve\nline\nend")]
    assert "latin.txt is not UTF-8 (byte 5)" in caplog.text


def test_half_a_surrogate_pair_in_json_is_made_encodable(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"text": "a\ud800b"}')
    assert read(path) == [Document("rows.jsonl:1", "a?b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"rows\.jsonl, line 3: not a JSON value"),
        ('{"content": "x"}', r'rows\.jsonl:3: no string in the field "text"'),
        ('{"text": 5}', r'rows\.jsonl:3: no string in the field "text"'),
        ('["text"]', r'rows\.jsonl:3: no string in the field "text"'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(LowRankError, match=message) as caught:
        read(path)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("compress", [bytes, lzma.compress, gzip.compress])
@pytest.mark.parametrize("end", ['{"text": "cut o', '{"text": "cut off"', "{", '{"text": "na\xc3'])
def test_a_file_that_ends_in_the_middle_of_a_line(tmp_path: Path, end: str, compress: Callable[[bytes], bytes]) -> None:
    suffix = {bytes: "", lzma.compress: ".xz", gzip.compress: ".gz"}[compress]
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(compress(b'{"text": "one"}\n\n{"text": "two"}\n' + end.encode("latin-1")))
    documents = read_source(str(path))
    assert [next(documents).text, next(documents).text] == ["one", "two"]
    message = rf"rows\.jsonl.*, line 4: the last line is cut off after {len(end)} bytes: .*\nhint: .*copy it again"
    with pytest.raises(LowRankError, match=message) as caught:
        next(documents)
    assert caught.value.exit_code == 1


def test_a_last_line_without_a_line_end_is_whole(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    assert [document.text for document in read(tmp_path / "rows.jsonl")] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.txt.xz", lzma.compress(b"text" * 1000)[:-20]),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "long"}\n' * 1000, mtime=0)[:-20]),
        ("wrong.txt.xz", b"not xz"),
        ("wrong.txt.gz", b"not gzip"),
        ("wrong.parquet", b"not parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LowRankError, match=f"{name} could not be read") as caught:
        read(tmp_path / name)
    assert caught.value.exit_code == 1


# Parquet


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """1000 rows, in groups of 300."""
    path = tmp_path / "rows.parquet"
    columns = {"id": list(range(1000)), "text": [f"row {number}" for number in range(1000)]}
    pq.write_table(pa.table(columns), path, row_group_size=300)
    return path


def test_parquet_row_by_row(table: Path) -> None:
    assert read(table) == [Document(f"rows.parquet:{number}", f"row {number}") for number in range(1000)]
    (table.parent / "a.txt").write_text("first")
    assert [document.name for document in read(table.parent)][:2] == ["a.txt", "rows.parquet:0"]


def test_parquet_that_is_cut_off(table: Path) -> None:
    content = table.read_bytes()
    table.write_bytes(content[:-100])
    with pytest.raises(LowRankError, match=r"rows\.parquet could not be read: .*\nhint: is the file complete"):
        read(table)
    # Damage in the pages, with the footer whole.
    footer = int.from_bytes(content[-8:-4], "little") + 8
    table.write_bytes(content[:4] + bytes(len(content) - footer - 4) + content[-footer:])
    with pytest.raises(LowRankError, match=r"rows\.parquet could not be read"):
        read(table)


def test_parquet_without_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["x"], "id": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match=r'rows\.parquet has no column "text"; its columns: content, id'):
        read(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "rows.parquet")
    with pytest.raises(LowRankError, match=r'rows\.parquet:1: no string in the field "text"'):
        read(tmp_path / "rows.parquet")


# Pieces, and files that are not read


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_plain_file_in_pieces(tmp_path: Path, separator: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("long.txt" if compress is bytes else "long.txt.gz")
    text = separator.join(f"pièce€😀{number:03}" for number in range(200))
    path.write_bytes(compress(text.encode()))
    pieces = list(read_source(str(path), piece_bytes=100))
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.text.encode()) <= 100 for piece in pieces)
    assert all(piece.text.endswith(separator) for piece in pieces[:-1])
    assert [piece.name for piece in pieces] == [f"{path.name}:{number + 1}" for number in range(len(pieces))]
    assert len(pieces) < 2 * len(text.encode()) / 100


def test_a_paragraph_is_preferred_to_a_line_in_pieces_too(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 60 + "\n\n" + "y\n" + "z " * 40)
    pieces = list(read_source(str(tmp_path / "long.txt"), piece_bytes=100))
    assert pieces[0].text == "x" * 60 + "\n\n"


def test_a_short_file_and_rows_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 99)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "y" * 300}))
    assert list(read_source(str(tmp_path), piece_bytes=100)) == read(tmp_path)


def test_the_files_of_a_source_and_their_size(tmp_path: Path, table: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt.xz").write_bytes(b"x" * 100)
    (tmp_path / "d.txt").write_bytes(b"x" * 10)
    names = {"b/c.txt.xz", "d.txt", "rows.parquet"}
    assert source_files(str(tmp_path)) == {name: tmp_path / name for name in names}
    assert text_bytes(str(tmp_path)) == 4 * 100 + 10 + 4 * table.stat().st_size
    assert text_bytes(str(tmp_path / "d.txt")) == 10
    assert 8e6 < text_bytes() < 16e6


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match=r"no such text source: .*absent") as caught:
        read(tmp_path / "absent")
    assert "hub:NAME" in str(caught.value.hint)
    assert "stdlib" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no text files in the folder"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r'unknown file type "\.png"'):
        read(tmp_path / "picture.png")


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Path:
    for split, texts in (("train", ["one", "two"]), ("test", ["three"])):
        lines = [json.dumps({"text": text, "id": index}) for index, text in enumerate(texts)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_dataset_through_datasets(dataset_folder: Path) -> None:
    assert [document.text for document in read(f"hub:{dataset_folder}")] == ["one", "two"]
    assert read(f"hub:{dataset_folder}:test") == [Document(f"{dataset_folder}:test:0", "three")]
    files = source_files(f"hub:{dataset_folder}")
    assert files
    assert all(file.suffix == ".arrow" for file in files.values())
    assert text_bytes(f"hub:{dataset_folder}") > 6


def test_datasets_that_cannot_be_read(dataset_folder: Path) -> None:
    with pytest.raises(UsageError, match=r'\(split "nosuch"\) could not be loaded'):
        read(f"hub:{dataset_folder}:nosuch")
    with pytest.raises(UsageError, match=r'the dataset "nobody/nothing" .* could not be loaded'):
        read("hub:nobody/nothing")
    with pytest.raises(UsageError, match='"hub:" names no dataset'):
        read("hub:")
    for path in dataset_folder.iterdir():
        path.unlink()
    (dataset_folder / "train.jsonl").write_text('{"content": "x", "id": 1}')
    with pytest.raises(UsageError, match='no column "text"; its columns: content, id'):
        read(f"hub:{dataset_folder}")
