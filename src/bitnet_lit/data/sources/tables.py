"""Tables of text are read here: Parquet files, and the Arrow files of Hugging Face's `datasets.save_to_disk`.

    train-00000-of-00010.parquet      a part of a data set on the hub
    data-00000-of-00010.arrow         a part of a folder of `datasets`; streams and files of Arrow's format

The package pyarrow reads both; `datasets` is not needed. A Parquet file is divided into its row groups, and only the
column with the text is read, a few thousand rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_lit.data.sources.documents import documents_of_record, with_unix_line_ends
from bitnet_lit.data.sources.open_text import file_state
from bitnet_lit.data.sources.source import ReadCounts, Segment
from bitnet_lit.errors import UserError, one_line
from bitnet_lit.extras import needs

TABLES = (".parquet", ".arrow")
COLUMNS = ("text", "story", "content")
"""Names under which text is looked for, unless the user gives one."""
_ROWS = 2048  # rows that are turned into texts at once
_COPY = "copy or download it again"


@dataclass(frozen=True)
class TableSegment(Segment):
    """Reads the row groups [start, stop) of a Parquet file, or a whole Arrow file.

    Attributes:
        column: with the text.
        num_bytes: about the bytes of its text.
    """

    path: Path
    column: str
    start: int
    stop: int
    num_bytes: int

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.num_bytes

    def __str__(self) -> str:
        return str(self.path)

    def fingerprint(self) -> str:
        """Return the path, size, modification time, column and range.

        Raises:
            UserError: the file is not there any more.
        """
        return f"{file_state(self.path)}/{self.column}/{self.start}-{self.stop}"

    def texts(self) -> Iterator[str]:
        """Yield the text of each row; a row without a value has an empty one.

        Raises:
            UserError: the file is damaged.
        """
        pyarrow = _pyarrow(self.path)
        try:
            for batch in self._batches(pyarrow):
                for start in range(0, len(batch), _ROWS):
                    for text in batch.slice(start, _ROWS).to_pylist():
                        yield text or ""
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: damaged ({one_line(error, 150)}): {_COPY}") from None

    def _batches(self, pyarrow: Any) -> Iterator[Any]:
        """Yield parts of the column."""
        if self.path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(self.path) as file:
                groups = range(self.start, self.stop)
                for batch in file.iter_batches(_ROWS, row_groups=groups, columns=[self.column]):
                    yield batch.column(0)
        else:
            with pyarrow.memory_map(str(self.path)) as source:
                reader = _open_arrow(source, pyarrow)
                number = reader.schema.get_field_index(self.column)
                if hasattr(reader, "num_record_batches"):  # a file, whose batches are numbered
                    yield from (reader.get_batch(at).column(number) for at in range(reader.num_record_batches))
                else:
                    yield from (batch.column(number) for batch in reader)

    def stories(self, counts: ReadCounts) -> Iterator[str]:
        """Yield the documents of the rows."""
        for text in self.texts():
            counts.bytes_in += len(text.encode("utf-8", "surrogatepass"))
            yield from documents_of_record(with_unix_line_ends(text), counts)


def table_segments(path: Path, column: str | None, every: int) -> list[TableSegment]:
    """Divide a table into segments of about `every` bytes of text.

    Args:
        column: with the text. None: the one of a usual name, or else the only one that holds text.

    Raises:
        UserError: the file is damaged, or has no such column of text; one line.
    """
    pyarrow = _pyarrow(path)
    try:
        if path.suffix.lower() != ".parquet":
            with pyarrow.memory_map(str(path)) as source:
                found = _column(path, _open_arrow(source, pyarrow).schema, column, pyarrow)
            return [TableSegment(path, found, 0, 1, path.stat().st_size)]
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            found = _column(path, file.schema_arrow, column, pyarrow)
            number = [file.metadata.schema.column(at).path for at in range(file.metadata.num_columns)].index(found)
            sizes = [
                file.metadata.row_group(group).column(number).total_uncompressed_size
                for group in range(file.metadata.num_row_groups)
            ]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged, or no {path.suffix} file ({one_line(error, 150)}): {_COPY}") from None
    segments: list[TableSegment] = []
    start = collected = 0
    for group, size in enumerate(sizes, 1):
        collected += size
        if collected >= every or group == len(sizes):
            segments.append(TableSegment(path, found, start, group, collected))
            start, collected = group, 0
    return segments


def has_rows(path: Path) -> bool:
    """Return whether a table has rows. A damaged one counts as if it had: the error is for whoever reads it."""
    pyarrow = _pyarrow(path)
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                return bool(file.metadata.num_rows)
        with pyarrow.memory_map(str(path)) as source:
            reader = _open_arrow(source, pyarrow)
            if hasattr(reader, "num_record_batches"):
                return any(reader.get_batch(at).num_rows for at in range(reader.num_record_batches))
            return any(batch.num_rows for batch in reader)
    except (pyarrow.ArrowException, OSError):
        return True


def _column(path: Path, schema: Any, column: str | None, pyarrow: Any) -> str:
    """Return the name of the column with the text; refuse a table that has none."""
    types = {field.name: field.type for field in schema}
    is_text = {
        name: pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) for name, kind in types.items()
    }
    texts = [name for name, found in is_text.items() if found]
    has = f"it has {', '.join(f'{name} ({types[name]})' for name in types) or 'none'}"
    if column is not None:
        if column not in types:
            raise UserError(f"column={column}: {path} has no such column: {has}")
        if not is_text[column]:
            raise UserError(f"column={column}: holds {types[column]} in {path}, not text: {has}")
        return column
    named = next((name for name in COLUMNS if name in texts), None) or (texts[0] if len(texts) == 1 else None)
    if named is None:
        raise UserError(f"{path}: which column has the text? Give column=<name>: {has}")
    return named


def _pyarrow(path: Path) -> Any:
    with needs("pyarrow", str(path)):
        import pyarrow
    return pyarrow


def _open_arrow(source: Any, pyarrow: Any) -> Any:
    """Open a stream, which `datasets` writes, or a file of Arrow's format."""
    try:
        return pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_file(source)
