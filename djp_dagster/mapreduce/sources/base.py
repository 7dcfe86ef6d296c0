"""What every source of a map-reduce is: splits, each a stream of blocks, each a list of records.

A block is what is mapped at once: either its records one by one, or all of it by a mapper over whole blocks. What in a
block is no record (text that is no UTF-8, JSON that is none) is said beside them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import msgspec

from djp_dagster.errors import InvalidSettingError

Form = Literal["records", "bytes", "arrow", "pandas"]
"""In which form mappers get blocks: record by record, or whole."""

SPLIT_BYTES = 32 << 20
BLOCK_BYTES = 1 << 17
"""Of text: what is mapped at once stays in the processor's cache, which makes twice the difference."""
_KEPT_BYTES = 64 << 10


class Bad(msgspec.Struct, frozen=True):
    """A record that cannot be mapped.

    Attributes:
        source: the file, object or topic.
        position: where in it.
        reason: what is wrong with it.
        raw: the record itself, or its first 64 KiB.
    """

    source: str
    position: int
    reason: str
    raw: bytes


class Block:
    """Some records of a split.

    Args:
        records: those that are good; not looked at by mappers over whole blocks.
        whole: all of it, for those.
        size: in bytes, as read.
        count: how many records, bad ones included.
        bad: those that are not.
        locate: of a good record, by its number, what a `Bad` says of it: position and raw bytes.
    """

    __slots__ = ("bad", "count", "locate", "records", "size", "whole")

    def __init__(
        self,
        *,
        records: Sequence[Any] = (),
        whole: Any = None,
        size: int,
        count: int,
        bad: Sequence[Bad] = (),
        locate: Callable[[int], tuple[int, bytes]],
    ) -> None:
        self.records, self.whole, self.size, self.count = records, whole, size, count
        self.bad, self.locate = bad, locate


class Split(Protocol):
    """A part of a source that one task maps. Picklable."""

    @property
    def uri(self) -> str:
        """Of the file, object or topic."""

    @property
    def size(self) -> int:
        """About how many bytes there are to read."""

    def identity(self) -> str:
        """What it is a part of, in which version, and which: equal for equal input, and without secrets."""

    def blocks(self, form: Form) -> Iterator[Block]:
        """Its records, block by block.

        Raises:
            SourceError: what is there is not what was found when the job was planned, or damaged.
        """


class Source(Protocol):
    """Where a map-reduce reads."""

    def forms(self) -> tuple[Form, ...]:
        """The forms it can give blocks in; the second is what ``batch=True`` means."""

    def plan(self) -> Sequence[Split]:
        """Its splits, as of now.

        Raises:
            SourceError: there is no such thing.
        """


def cut(raw: bytes) -> bytes:
    """What is kept of a record that is bad."""
    return raw[:_KEPT_BYTES]


def form_of(source: Source, batch: bool | str) -> Form:
    """The form that ``batch=`` asks for.

    Raises:
        InvalidSettingError: the source has no such form.
    """
    forms = source.forms()
    if batch is False:
        return "records"
    wanted = forms[1] if batch is True and len(forms) > 1 else batch
    if wanted not in forms[1:]:
        raise InvalidSettingError(
            f"{type(source).__name__} has no blocks of batch={batch!r}; use one of {[True, *forms[1:]]}, or a mapper "
            "of single records",
            setting="batch",
            value=batch,
        )
    return wanted
