"""A child's answer, read by the parent: nothing in it may make the parent run out of memory or stop the sweep.

A record batch may be compressed, and 28 kB then unfold to 600 MB (measured); and a file's footer may name the same
batch a million times. Both are refused from the file's own description, before anything is read or unfolded.

Reference: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format, and ``Message.fbs`` and ``File.fbs``
beside it for the numbers of the fields.
"""

from __future__ import annotations

import struct
from pathlib import Path

from audits.errors import ArtifactError, GradauditError
from audits.report import AuditReport
from registry_models.answer import MAXIMUM_ROWS, MAXIMUM_ROWS_BYTES, ROWS_FILE, read_answer

_MAGIC = b"ARROW1"
_BLOCK = struct.Struct("<qixxxxq")
_RECORD_BATCH = 3
_FOOTER_BATCHES = 3
_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER = 1, 2
_BATCH_LENGTH, _BATCH_COMPRESSION = 0, 3


def read_untrusted(folder: Path) -> AuditReport:
    """Read a child's answer; whatever is wrong with it is one kind of error.

    Raises:
        ArtifactError: the answer is missing, too large, or not of the agreed form.
    """
    try:
        refuse_inflated(folder / ROWS_FILE)
        return read_answer(folder)
    except GradauditError:
        raise
    except Exception as error:  # deep nesting, numbers beyond any type: one more way of being wrong
        raise ArtifactError(f"the audit's answer is not of the agreed form: {type(error).__name__}") from error


def refuse_inflated(path: Path) -> None:
    """Refuse an Arrow file whose batches hold more than the file.

    Raises:
        ArtifactError: a batch is compressed, or the batches have more rows or bytes than they may.
    """
    if not path.is_file() or path.is_symlink() or path.stat().st_size > MAXIMUM_ROWS_BYTES:
        raise ArtifactError("the audit's rows are missing or too large")
    content = path.read_bytes()
    rows = size = 0
    try:
        length = struct.unpack_from("<i", content, len(content) - len(_MAGIC) - 4)[0]
        footer = _Table.root(content, len(content) - len(_MAGIC) - 4 - length)
        for offset, described, body in footer.structs(_FOOTER_BATCHES, _BLOCK):
            message = _Table.root(content, offset + 8)
            size += described + body
            if size > len(content) or message.byte(_MESSAGE_HEADER_TYPE) != _RECORD_BATCH:
                raise ArtifactError("the audit's rows claim more than their file holds")
            batch = message.table(_MESSAGE_HEADER)
            if batch.has(_BATCH_COMPRESSION):
                raise ArtifactError("the audit's rows are compressed, which an honest answer's are not")
            rows += batch.long(_BATCH_LENGTH)
            if not 0 <= rows <= MAXIMUM_ROWS:
                raise ArtifactError(f"the audit answered with more than {MAXIMUM_ROWS:,} rows")
    except (struct.error, IndexError) as error:
        raise ArtifactError("the audit's rows are no Arrow file") from error


class _Table:
    """A flatbuffers table: enough of the format to read a few fields."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content, self._at = content, at
        self._fields = at - self._number("<i", at)
        self._count = (self._number("<H", self._fields) - 4) // 2

    @classmethod
    def root(cls, content: bytes, at: int) -> _Table:
        if not 0 <= at < len(content):
            raise IndexError(at)
        return cls(content, at + struct.unpack_from("<I", content, at)[0])

    def has(self, field: int) -> bool:
        return self._place(field) != 0

    def byte(self, field: int) -> int:
        return self._number("<B", self._place(field)) if self.has(field) else 0

    def long(self, field: int) -> int:
        return self._number("<q", self._place(field)) if self.has(field) else 0

    def table(self, field: int) -> _Table:
        return _Table(self._content, self._follow(field))

    def structs(self, field: int, form: struct.Struct) -> list[tuple[int, int, int]]:
        if not self.has(field):
            return []
        vector = self._follow(field)
        count = self._number("<I", vector)
        if count * form.size > len(self._content):
            raise IndexError(count)
        return [form.unpack_from(self._content, vector + 4 + form.size * index) for index in range(count)]

    def _follow(self, field: int) -> int:
        place = self._place(field)
        if not place:
            raise IndexError(field)
        return place + self._number("<I", place)

    def _place(self, field: int) -> int:
        offset = self._number("<H", self._fields + 4 + 2 * field) if field < self._count else 0
        return self._at + offset if offset else 0

    def _number(self, form: str, at: int) -> int:
        if at < 0:
            raise IndexError(at)
        return int(struct.unpack_from(form, self._content, at)[0])
