"""Zip archives whose entries are stored, read by offset; nothing is extracted.

[Note: stored zip]
    entry     local header, name, extra field, the bytes; torch aligns them with the extra field
    ...
    central directory: name, bytes, CRC32 and place of every entry
    (64-bit end of the directory and its locator, where a number needs it)
    end of the directory
An archive may be a part of a file. All of it is checked when it is opened: entries are stored and
neither compressed nor encrypted, have names of a given form in one folder, do not overlap, and
lie before the directory, which lies at the end. An entry's bytes are compared with its CRC32 before
anything is made of them. No name becomes a path.
Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offload.errors import CheckpointError
from offload.state import durable

_MAX_ENTRIES = 1_000_000
_MAX_DIRECTORY_BYTES = 256 << 20
_PIECE_BYTES = 4 << 20
_MAX_FOLDER = 1024  # characters
# End of the central directory, its 64-bit form and locator, a directory's entry, a local header.
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_WIDE = 0xFFFFFFFF  # "see the 64-bit form"
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the archive; `offset` is of its bytes, in the file."""

    offset: int
    nbytes: int
    crc32: int


class ReadOnlyFile:
    """A regular file, read by offset; symbolic links are not followed. A context manager.

    Raises (all methods): StorageError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        with durable.storage_errors("open", path, what=path.name):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.open(path, flags)
            try:
                self.nbytes = durable.regular_file_nbytes(self._descriptor)
            except OSError:
                self.close()
                raise

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` (uint8) from `offset`."""
        with durable.storage_errors(
            "read", self.path, what=self.path.name, offset=offset, nbytes=len(target)
        ):
            durable.read_all(self._descriptor, target, offset)

    def read(self, offset: int, nbytes: int) -> bytes:
        """A small piece of the file."""
        with durable.storage_errors("read", self.path, what=self.path.name, offset=offset):
            if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
                raise OSError(errno.EINVAL, f"{nbytes} bytes at {offset} are not in the file")
        data = bytearray(nbytes)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def close(self) -> None:
        """Close the file; repeated calls do nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class StoredZip:
    """A zip archive: a file, or [start, start + nbytes) of one; see [Note: stored zip].

    Attributes:
        file: where it is.
        entries: by name, without the folder.

    Raises (constructor): CheckpointError: it is no such archive. StorageError: it cannot be read.
    """

    def __init__(
        self, file: ReadOnlyFile, names: str, *, start: int = 0, nbytes: int | None = None
    ) -> None:
        """`names`: a regular expression for names without their folder."""
        self.file = file
        self._start = start
        self._nbytes = file.nbytes if nbytes is None else nbytes
        self._names = re.compile(rf"([^/\0]{{1,{_MAX_FOLDER}}})/({names})")
        self._sound: set[str] = set()  # entries whose CRC32 has matched
        if not 0 <= start <= start + self._nbytes <= file.nbytes:
            raise self.damaged(f"{self._nbytes} bytes at {start} are not in the file")
        self.entries = self._read_directory()

    def small(self, name: str, *, limit_bytes: int) -> bytes:
        """The bytes of an entry.

        Raises:
            CheckpointError: it is not there, larger than the limit, or damaged.
            StorageError: it cannot be read.
        """
        entry = self.entries.get(name)
        if entry is None or entry.nbytes > limit_bytes:
            raise self.damaged(f"it has no {name}, or one of more than {limit_bytes} bytes")
        data = self.file.read(entry.offset, entry.nbytes)
        self.check(name, memoryview(data))
        return data

    def check(self, name: str, data: memoryview) -> None:
        """Raise CheckpointError where all bytes of an entry do not have its CRC32."""
        if zlib.crc32(data) != self.entries[name].crc32:
            raise self._mismatch(name)

    def verify(self, name: str) -> None:
        """Read an entry once, in pieces, and compare it with its CRC32.

        Raises:
            CheckpointError: it is damaged.
            StorageError: it cannot be read.
        """
        if name in self._sound:
            return
        entry = self.entries[name]
        piece = memoryview(bytearray(min(_PIECE_BYTES, entry.nbytes)))
        checksum = 0
        for offset in range(0, entry.nbytes, _PIECE_BYTES):
            part = piece[: min(_PIECE_BYTES, entry.nbytes - offset)]
            self.file.read_into(part, entry.offset + offset)
            checksum = zlib.crc32(part, checksum)
        if checksum != entry.crc32:
            raise self._mismatch(name)
        self._sound.add(name)

    def damaged(self, reason: str) -> CheckpointError:
        """What to raise about this archive."""
        return CheckpointError(
            f"{self.file.path}: no archive of torch.save, or a damaged one: {reason}",
            expected="a zip archive with stored entries, as torch writes it since version 1.6",
        )

    def _read_directory(self) -> dict[str, Entry]:
        """Every entry, by its name without the folder."""
        count, offset, nbytes = self._find_directory()
        if count > _MAX_ENTRIES or nbytes > _MAX_DIRECTORY_BYTES:
            raise self.damaged(f"{count} entries, more than the limit")
        directory = self.file.read(self._start + offset, nbytes)
        entries: dict[str, Entry] = {}
        extents: list[tuple[int, int]] = []
        at, folder = 0, None
        for _ in range(count):
            if at + _CENTRAL.size > nbytes:
                raise self.damaged("its directory ends early")
            fields = _CENTRAL.unpack_from(directory, at)
            name_bytes, extra_bytes, comment_bytes = fields[10:13]
            at += _CENTRAL.size
            name, extra = directory[at : at + name_bytes], at + name_bytes
            at += name_bytes + extra_bytes + comment_bytes
            match = self._names.fullmatch(name.decode("utf-8", errors="replace"))
            if match is None or folder not in (None, match[1]) or match[2] in entries:
                raise self.damaged(f"an entry {name[:100]!r}, which torch.save does not write")
            folder = match[1]
            sizes = self._sizes(fields, directory[extra : extra + extra_bytes])
            start, end = self._extent(name, sizes, limit=offset)
            extents.append((sizes[1], end))
            entries[match[2]] = Entry(self._start + start, end - start, fields[7])
        extents.sort()
        if at != nbytes or any(a[1] > b[0] for a, b in itertools.pairwise(extents)):
            raise self.damaged("its entries overlap, or its directory is longer than they are")
        return entries

    def _find_directory(self) -> tuple[int, int, int]:
        """Number of entries, offset and bytes of the central directory."""
        if self._nbytes < _END.size:
            raise self.damaged("it is too short")
        end_at = self._nbytes - _END.size
        end = _END.unpack(self.file.read(self._start + end_at, _END.size))
        if end[0] != b"PK\x05\x06" or end[7]:
            raise self.damaged("it does not end as a zip archive")
        count, nbytes, offset = end[4], end[5], end[6]
        locator_at, large_at = end_at - _LOCATOR.size, end_at - _LOCATOR.size - _END_64.size
        if large_at >= 0:
            locator = _LOCATOR.unpack(self.file.read(self._start + locator_at, _LOCATOR.size))
            if locator[0] == b"PK\x06\x07":  # torch always writes the 64-bit form, too
                large = _END_64.unpack(self.file.read(self._start + large_at, _END_64.size))
                if locator[2] != large_at or large[0] != b"PK\x06\x06":
                    raise self.damaged("its 64-bit directory is not where it should be")
                count, nbytes, offset, end_at = large[7], large[8], large[9], large_at
        if offset + nbytes != end_at:
            raise self.damaged("its directory is not at its end")
        return count, offset, nbytes

    def _sizes(self, fields: tuple[Any, ...], extra: bytes) -> tuple[int, int]:
        """Bytes of an entry and the offset of its local header."""
        flags, method, compressed, nbytes, disk, header_at = (
            *fields[3:5], fields[8], fields[9], fields[13], fields[16],
        )  # fmt: skip
        wide = [value == _WIDE for value in (compressed, nbytes, header_at)]
        if any(wide):
            values = iter(_zip64_values(extra))
            # The order in the extra field is: bytes, compressed bytes, offset.
            nbytes = next(values, -1) if wide[1] else nbytes
            compressed = next(values, -1) if wide[0] else compressed
            header_at = next(values, -1) if wide[2] else header_at
        if (
            flags & _ENCRYPTED
            or method
            or disk
            or compressed != nbytes
            or min(nbytes, header_at) < 0
        ):
            raise self.damaged("an entry is compressed, encrypted or split")
        return nbytes, header_at

    def _extent(self, name: bytes, sizes: tuple[int, int], *, limit: int) -> tuple[int, int]:
        """Where an entry's bytes begin and end, from the start of the archive."""
        nbytes, header_at = sizes
        if header_at + _LOCAL.size + len(name) + nbytes > limit:
            raise self.damaged(f"entry {name!r} is not inside of it")
        header = self.file.read(self._start + header_at, _LOCAL.size + len(name))
        fields = _LOCAL.unpack_from(header)
        if fields[0] != b"PK\x03\x04" or header[_LOCAL.size :] != name or fields[9] != len(name):
            raise self.damaged(f"entry {name!r} has another name where its bytes are")
        start = header_at + _LOCAL.size + len(name) + fields[10]
        if start + nbytes > limit:
            raise self.damaged(f"entry {name!r} is not inside of it")
        return start, start + nbytes

    def _mismatch(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path}: damaged: {name} does not have the CRC32 that the archive says"
        )


def _zip64_values(extra: bytes) -> tuple[int, ...]:
    """The 64-bit sizes of an extra field, () if it has none."""
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1 and at + nbytes <= len(extra):
            return struct.unpack_from(f"<{nbytes // 8}Q", extra, at)
        at += nbytes
    return ()
