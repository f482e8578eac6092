"""CBOR (RFC 8949) decoded in place: large byte strings come back as views of the message.

A general decoder copies every byte string, a whole frame each time. A detector's
message is a small envelope around one large blob, so this one walks the envelope in Python and
points into the blob. Everything is bounded by the message itself: no declared length is
believed before the bytes are there.
"""

import struct
from typing import Any, NamedTuple

from storage.errors import BadMessage

__all__ = ["Tag", "decode_view"]

_MAX_DEPTH = 16
_BREAK = object()
_FLOATS = {25: ">e", 26: ">f", 27: ">d"}
_SIMPLE = {20: False, 21: True, 22: None, 23: None}
_SELF_DESCRIBED = 55799
# Others cannot be hashed, or, as views of a message, only sometimes.
_KEYS = (str, int, float, type(None))


class Tag(NamedTuple):
    """A tagged item; what the tag means is the caller's business."""

    number: int
    value: Any


def decode_view(message: memoryview) -> Any:
    """The one item in a message: dict, list, str, int, float, bool, None, memoryview (bytes) or Tag.

    The self-described tag 55799 around the item is taken off.

    Raises
    ------
    BadMessage : cut, malformed, nested deeper than 16, or followed by stray bytes.
    """
    reader = _Reader(message)
    try:
        item = reader.item(0)
    except (IndexError, struct.error):
        raise BadMessage(f"CBOR message of {message.nbytes} bytes ends inside an item; it was cut on its way") from None
    except (UnicodeDecodeError, TypeError, OverflowError) as error:
        raise BadMessage(f"CBOR message of {message.nbytes} bytes is malformed: {error}") from None
    if reader.at != message.nbytes:
        raise BadMessage(f"CBOR message has {message.nbytes - reader.at} stray bytes behind its item")
    while isinstance(item, Tag) and item.number == _SELF_DESCRIBED:
        item = item.value
    return item


class _Reader:
    def __init__(self, message: memoryview) -> None:
        self.data, self.at = message, 0

    def item(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise BadMessage(f"CBOR message is nested deeper than {_MAX_DEPTH} levels")
        head = self.data[self.at]
        self.at += 1
        major, minor = head >> 5, head & 31
        if head == 0xFF:
            return _BREAK
        if major == 7:
            return self._simple_or_float(minor)
        length = None if minor == 31 else minor if minor < 24 else self._argument(minor)
        if length is not None:  # most items are names and numbers
            if major == 0:
                return length
            if major == 3:
                return str(self._take(length), "utf-8")
        return _MAJORS[major](self, length, depth)

    def _argument(self, minor: int) -> int:
        if minor == 24:
            self.at += 1
            return self.data[self.at - 1]
        if minor > 27:
            raise BadMessage(f"CBOR item with reserved length code {minor}")
        return int.from_bytes(self._take(1 << (minor - 24)), "big")

    def _take(self, n_bytes: int) -> memoryview:
        if n_bytes > self.data.nbytes - self.at:
            raise BadMessage(
                f"CBOR item declares {n_bytes} bytes, but only {self.data.nbytes - self.at} are left; "
                "the message was cut on its way"
            )
        view = self.data[self.at : self.at + n_bytes]
        self.at += n_bytes
        return view

    def _simple_or_float(self, minor: int) -> Any:
        if minor in _FLOATS:
            return struct.unpack(_FLOATS[minor], self._take(1 << (minor - 24)))[0]
        if minor in _SIMPLE:
            return _SIMPLE[minor]
        raise BadMessage(f"CBOR simple value {minor} has no meaning here")

    def _unsigned(self, length: int | None, depth: int) -> int:
        return self._known(length)

    def _negative(self, length: int | None, depth: int) -> int:
        return -1 - self._known(length)

    def _bytes(self, length: int | None, depth: int) -> memoryview:
        if length is None:
            return memoryview(b"".join(self._pieces(depth, memoryview)))
        return self._take(length)

    def _text(self, length: int | None, depth: int) -> str:
        return "".join(self._pieces(depth, str))

    def _list(self, length: int | None, depth: int) -> list[Any]:
        items: list[Any] = []
        while length is None or len(items) < length:
            item = self.item(depth + 1)
            if item is _BREAK:
                self._end_of_indefinite(length)
                break
            items.append(item)
        return items

    def _map(self, length: int | None, depth: int) -> dict[Any, Any]:
        items: dict[Any, Any] = {}
        n = 0
        while length is None or n < length:
            key = self.item(depth + 1)
            if key is _BREAK:
                self._end_of_indefinite(length)
                break
            if not isinstance(key, _KEYS):
                raise BadMessage(f"CBOR map with a {type(key).__name__} as key; names and numbers are understood")
            items[key] = self._not_break(self.item(depth + 1))
            n += 1
        return items

    def _tag(self, length: int | None, depth: int) -> Tag:
        return Tag(self._known(length), self._not_break(self.item(depth + 1)))

    def _pieces(self, depth: int, kind: type) -> list[Any]:
        pieces = []
        while (piece := self.item(depth + 1)) is not _BREAK:
            if not isinstance(piece, kind):
                raise BadMessage("CBOR string of indefinite length holds a piece of another type")
            pieces.append(piece)
        return pieces

    @staticmethod
    def _known(length: int | None) -> int:
        if length is None:
            raise BadMessage("CBOR integer or tag of indefinite length")
        return length

    @staticmethod
    def _not_break(item: Any) -> Any:
        if item is _BREAK:
            raise BadMessage("CBOR break in the middle of an item")
        return item

    @staticmethod
    def _end_of_indefinite(length: int | None) -> None:
        if length is not None:
            raise BadMessage("CBOR break inside an item of definite length")


_MAJORS = (
    _Reader._unsigned,
    _Reader._negative,
    _Reader._bytes,
    _Reader._text,
    _Reader._list,
    _Reader._map,
    _Reader._tag,
)
