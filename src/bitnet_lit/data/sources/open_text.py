"""Text files are opened here, plain or compressed, and come as pieces of decoded text: no file is read as a whole.

    a.txt  a.txt.gz  a.txt.zst      UTF-8; a byte order mark at the start of a file is not part of the text

gzip comes with Python, Zstandard with the package zstandard. A compressed file that was cut off ends with an error:
half of a corpus looks like a corpus.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bitnet_lit.errors import UserError, one_line, read_errors
from bitnet_lit.extras import needs
from bitnet_lit.files.regular_file import open_regular

COMPRESSIONS = (".gz", ".zst")
READ_REMEDY = "check the file and its permissions"
_BLOCK = 2**20  # bytes that are read at once
_COMPRESSED_BLOCK = 2**16  # fewer: text of a few words over and over is a thousand times smaller when it is compressed
_COPY = "copy or download it again"


def text_of(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yield the text of a file in pieces of about a megabyte.

    Args:
        start, stop: the bytes of a file that is not compressed; `stop` None: to its end.

    Raises:
        UserError: the file cannot be read, was cut off, or is not UTF-8; the line says at which byte.
    """
    blocks = _blocks(path, start, stop) if compression_of(path) == "" else _decompressed(path)
    decoder = codecs.getincrementaldecoder("utf-8")()
    at, is_first = start, start == 0
    for block in blocks:
        if is_first and block.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path}: UTF-16, not UTF-8: convert it (iconv -f utf-16 -t utf-8)")
        if (nul := block.find(b"\0")) >= 0:
            raise UserError(
                f"{path}: a NUL at byte {at + nul}: no text, or UTF-16: convert it (iconv -f utf-16le -t utf-8)"
            )
        text = _decode(decoder, block, path, at)
        at += len(block)
        if is_first and text:
            text, is_first = text.removeprefix("\ufeff"), False
        yield text
    _decode(decoder, b"", path, at)


def compression_of(path: Path) -> str:
    """Return how a file is compressed: .gz, .zst, or an empty text."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def file_state(path: Path) -> str:
    """Return path, size and modification time of a file as a text, which changes when the file does.

    Raises:
        UserError: the file is not there any more.
    """
    with read_errors(path, READ_REMEDY):
        status = path.stat()
    return f"{path.absolute()}/{status.st_size}/{status.st_mtime_ns}"


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, at: int) -> str:
    """Decode the bytes of a file from byte `at` on; an empty block ends it."""
    pending = len(decoder.getstate()[0])  # bytes of a character that the block before began
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {at - pending + error.start}: convert it (iconv -f latin1 -t utf-8, if that "
            "is what it is)"
        ) from None


def _blocks(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    with open_regular(path, READ_REMEDY) as file, read_errors(path, READ_REMEDY):
        file.seek(start)
        position = start
        while stop is None or position < stop:
            block = file.read(_BLOCK if stop is None else min(_BLOCK, stop - position))
            if not block:
                break
            position += len(block)
            yield block
        if stop is not None and position < stop:
            raise UserError(f"{path}: became shorter while it was read: give the same command again")


def _decompressed(path: Path) -> Iterator[bytes]:
    with open_regular(path, READ_REMEDY) as file, read_errors(path, READ_REMEDY):
        yield from (_from_gzip if compression_of(path) == ".gz" else _from_zstandard)(file, path)


def _from_gzip(file: BinaryIO, path: Path) -> Iterator[bytes]:
    with gzip.open(file) as content:
        try:
            while block := content.read(_BLOCK):
                yield block
        except EOFError:
            raise UserError(f"{path}: was cut off: it ends inside its compressed data: {_COPY}") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: no gzip file, or a damaged one ({one_line(error, 100)}): {_COPY}") from None


def _from_zstandard(file: BinaryIO, path: Path) -> Iterator[bytes]:
    with needs("zstandard", f"{path}"):
        import zstandard
    frame, is_inside = zstandard.ZstdDecompressor().decompressobj(), False
    while block := file.read(_COMPRESSED_BLOCK):
        while block:
            try:
                content = frame.decompress(block)
            except zstandard.ZstdError as error:
                raise UserError(
                    f"{path}: no Zstandard file, or a damaged one ({one_line(error, 100)}): {_COPY}"
                ) from None
            if content:
                yield content
            is_inside, block = not frame.eof, b""
            if frame.eof:  # a file may hold several frames, one after the other
                block, frame = frame.unused_data, zstandard.ZstdDecompressor().decompressobj()
    if is_inside:
        raise UserError(f"{path}: was cut off: it ends inside its compressed data: {_COPY}")
