from __future__ import annotations

import gzip
import json
import logging
import lzma
from pathlib import Path

import pytest

from lowrank_kit.data.sources import Document, read_source
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


@pytest.mark.parametrize("kind", [".txt", ".text", ".md", ".rst", ".py"])
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.txt.xz", lzma.compress(b"text" * 1000)[:-20]),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "long"}\n' * 1000)[:-20]),
        ("wrong.txt.xz", b"not xz"),
        ("wrong.txt.gz", b"not gzip"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LowRankError, match=f"{name} could not be read") as caught:
        read(tmp_path / name)
    assert caught.value.exit_code == 1


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
