"""Where records come from: files, folders, tables and lists, each as rows that know their place in it."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

_SUFFIXES = (".json", ".jsonl", ".parquet")
# what records are known by, and how much of it is shown
_ID_FIELDS = ("id", "_id", "idx", "uuid", "sample_id", "question_id", "image_id")
_LONGEST_ID = 60
# what JSON takes for space
_SPACE = re.compile(r"[ \t\n\r]*")


class RecordError(ValueError):
    """A record that cannot be used; the message says where it is and what is wrong."""


class Rows(Protocol):
    """Records of one source, in order. Reading one may raise a `ValueError`."""

    def __len__(self) -> int: ...

    def __getitem__(self, idx: int) -> Mapping[str, Any]: ...

    def origin(self, idx: int, name: str = "") -> str:
        """Where a record is, for messages; `name` is its id as `named` says it."""
        ...


class ListRows:
    """Records in memory, counted from 0; an entry that is a `ValueError` could not be parsed."""

    def __init__(self, records: Sequence[Any], origins: Sequence[str] | None = None):
        self.records, self.origins = records, origins

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, idx: int) -> Mapping[str, Any]:
        if isinstance(self.records[idx], ValueError):
            raise self.records[idx]
        return self.records[idx]

    def origin(self, idx: int, name: str = "") -> str:
        if self.origins is None:
            return f"record {idx}" + _in_brackets(name)
        # the line alone says nothing of a file that is one line
        return self.origins[idx] + _in_brackets(f"record {idx}", name)


def _in_brackets(*notes: str) -> str:
    notes = ", ".join(filter(None, notes))
    return f" ({notes})" if notes else ""


def named(record: Any) -> str:
    """The id of a record for messages, empty if it has none."""
    names = (record.get(field) for field in _ID_FIELDS) if isinstance(record, Mapping) else ()
    name = next((name for name in names if isinstance(name, (str, int)) and name != ""), None)
    if name is None:
        return ""
    name = ascii(name)
    return f"id {name}" if len(name) <= _LONGEST_ID else f"id {name[:_LONGEST_ID]}..."


class DatasetRows:
    """Rows of a `datasets.Dataset`, whose images stay encoded until they are needed."""

    def __init__(self, dataset: Any):
        features = str(dataset.features)
        # Arrow rows hold encoded images, but the text of JSON columns; by name, since old versions lack the latter
        self.encoded = dataset.format["type"] is None and "Json(" not in features
        self.dataset = dataset.with_format("arrow") if self.encoded else dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> Mapping[str, Any]:
        return _only_row(self.dataset[idx]) if self.encoded else self.dataset[idx]

    def origin(self, idx: int, name: str = "") -> str:
        return f"row {idx} of the data set" + _in_brackets(name)


class ParquetRows:
    """Rows of a parquet file, as an Arrow table in memory."""

    def __init__(self, file: Path):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError("Parquet files need pyarrow: `pip install pyarrow`.") from error
        try:
            self.table = pyarrow.parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise RecordError(f"{file}: not a readable parquet file ({error}).") from error
        self.name = file.name

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, idx: int) -> Mapping[str, Any]:
        return _only_row(self.table.slice(idx, 1))

    def origin(self, idx: int, name: str = "") -> str:
        return f"{self.name}, row {idx}" + _in_brackets(name)


def open_source(source: Any) -> tuple[list[Rows], Path | None]:
    """The rows of a source, and the folder that its paths start from if it has one.

    Args:
        source: a `.json`, `.jsonl` or `.parquet` file, a folder of such files, a `datasets.Dataset`, or a sequence of
            records.

    Raises:
        RecordError: a file is damaged as a whole.
        ValueError: the source is something else.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.name[0] != ".")
            if not files:
                raise ValueError(f"The folder {path} must hold {', '.join(_SUFFIXES)} files, but has none.")
            return [_open_file(file) for file in files], path
        return [_open_file(path)], path.parent
    if _is_dataset(source):
        return [DatasetRows(source)], None
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return [ListRows(source)], None
    raise ValueError(
        f"`source` must be a file, a folder, a `datasets.Dataset` or a list of records, got {type(source).__name__}. "
        "Pass one split of a dataset. A stream of records is not checked before: give it to the trainer itself, with "
        "a `VtcCollator`."
    )


def _open_file(file: Path) -> Rows:
    if not file.is_file():
        raise ValueError(f"`source` must be an existing file or folder, got {os.fspath(file)!r}.")
    if file.suffix not in _SUFFIXES:
        raise ValueError(f"The data file must end in {', '.join(_SUFFIXES)}, got {file.name!r}.")
    if file.suffix == ".parquet":
        return ParquetRows(file)
    with open(file, "rb") as stream:
        # by its content, since files of lines are often called .json
        first = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    entries = _array_entries(file) if first == b"[" and file.suffix == ".json" else _line_entries(file)
    records, origins = [], []
    for line, record in entries:
        records.append(record)
        origins.append(f"{file.name}, line {line}")
    return ListRows(records, origins)


def _line_entries(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of each line that is not blank; a line that cannot be parsed is a `ValueError`."""
    with open(file, "rb") as stream:
        for line, content in enumerate(stream, start=1):
            content = content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content
            if content.strip():
                yield line, _parsed(content)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(
            f"The line must be valid UTF-8, but byte {error.start} of it is not. Save the data in UTF-8."
        )
    except json.JSONDecodeError as error:
        return ValueError(f"The line must be one JSON value: {error.msg} at column {error.colno}.")
    # nesting without end, numbers of thousands of digits
    except (RecursionError, ValueError) as error:
        return ValueError(f"The line must be one JSON value: {error}.")


def _array_entries(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of each entry of a JSON list, the line being that on which the entry begins.

    Raises:
        RecordError: the file is no JSON list. What is lost then is unknown, so that it cannot be skipped.
    """
    # bytes that are not UTF-8 become lone surrogates, which the record that holds them is refused for
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    scan = json.JSONDecoder().raw_decode
    line, counted, position = 1, 0, _past_space(text, text.index("[") + 1)
    try:
        more = text[position : position + 1] != "]"
        while more:
            entry, end = scan(text, position)
            line, counted = line + text.count("\n", counted, position), position
            yield line, entry
            position = _past_space(text, end)
            more = text[position : position + 1] == ","
            if more:
                position = _past_space(text, position + 1)
        if text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if text[position + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, position + 1)
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{file}, line {error.lineno}: the file is damaged ({error.msg}). Repair it: it is never skipped, "
            "since nobody can tell which records are lost."
        ) from error
    except (RecursionError, ValueError) as error:
        raise RecordError(f"{file}, after line {line}: the file cannot be parsed ({error}).") from error


def _past_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()


def _is_dataset(source: Any) -> bool:
    # whoever has one has imported the package
    module = sys.modules.get("datasets")
    return module is not None and isinstance(source, module.Dataset)


def _only_row(table: Any) -> Mapping[str, Any]:
    """The row of an Arrow table of one row."""
    try:
        (row,) = table.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"Text must be valid UTF-8 ({error.reason}). Write the table again.") from None
    return row
