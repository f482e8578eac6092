"""A frame's metadata: a JSON object, kept as the text it came as.

Whoever makes a frame writes it once (`pack_meta`), whoever wants to know reads it (`unpack_meta`). On the
way, through service, journal and frame table, it is bytes: to write it anew for each of them, and in
another order for the digest, was half of what a small row cost.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from storage.errors import BadFrame

__all__ = ["NO_META", "pack_meta", "require_meta", "scalar_columns", "unpack_meta"]

# Without metadata there is no text at all.
NO_META = b""
_LARGEST_BYTES = 4 << 20
_DEEPEST = 32
_MOST_KEYS = 1000
_FLAT = frozenset((str, int, float, bool, type(None)))
_TEXT = frozenset((str,))

# Keys in their order, so that equal metadata are equal bytes, and have one digest.
_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode
# Each value as the text it is. It looks less closely: only for what `_decode` has read before.
_decode_top = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def pack_meta(meta: dict[str, Any]) -> bytes:
    """Metadata as JSON text with sorted keys; `NO_META` for none.

    Raises
    ------
    BadFrame : not JSON (bytes, dates, circles), nested too deep, or larger than 4 MiB.
    """
    if not meta:
        return NO_META
    try:
        _require_json(meta, 0)
        text = _encode(meta)
        # The fast encoder writes NaN and infinity as null; Python's writes what Python reads back.
        if b"null" in text:
            text = json.dumps(meta, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise BadFrame(f"a frame's metadata must be plain JSON: {error}") from None
    _require_size(text)
    return text


def require_meta(text: bytes) -> None:
    """BadFrame for what somebody sent as metadata and `unpack_meta` could not read, or not cheaply."""
    if not text:
        return
    _require_size(text)
    try:
        meta = _decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        meta = _odd_json(text)
    if text.count(b"{") + text.count(b"[") > _DEEPEST:
        _require_json(meta, 0)


def unpack_meta(text: bytes) -> dict[str, Any]:
    """Metadata as an object; ValueError if the text is none."""
    if not text:
        return {}
    try:
        return _decode(text)
    except msgspec.MsgspecError:  # NaN and infinity, which JSON does not have and Python writes all the same
        return dict(json.loads(text.decode()))


def scalar_columns(texts: Sequence[bytes]) -> Iterator[tuple[str, list[Any]]]:
    """The values of many frames by key, in the order of the keys; None where a frame does not have it.

    Keys whose first value is nested are left out, and nothing is made of it: it may be a trace of a thousand numbers.
    So are keys beyond the first thousand: a source that invents them would have each looked for in every row.
    """
    rows: list[dict[str, Any]]
    try:
        rows, is_text = [_decode_top(text) if text else {} for text in texts], True
    except msgspec.MsgspecError:  # what only Python reads
        rows, is_text = [unpack_meta(text) for text in texts], False
    for key in sorted({key for row in rows for key in row})[:_MOST_KEYS]:
        column = [row.get(key) for row in rows]
        values = _read_pieces(column) if is_text else _not_nested(column)
        if values is not None:
            yield key, values


def _read_pieces(pieces: list[Any]) -> list[Any] | None:
    """JSON texts of single values, decoded in one go."""
    if bytes(next(piece for piece in pieces if piece is not None)).lstrip()[:1] in (b"{", b"["):
        return None
    column = b"[%b]" % b",".join([b"null" if piece is None else piece for piece in pieces])
    try:
        return list(msgspec.json.decode(column))
    except msgspec.MsgspecError:
        return list(json.loads(column))


def _not_nested(values: list[Any]) -> list[Any] | None:
    first = next((value for value in values if value is not None), None)
    return None if isinstance(first, dict | list) else values


def _require_size(text: bytes) -> None:
    if len(text) > _LARGEST_BYTES:
        raise BadFrame(f"a frame's metadata of {len(text)} bytes is larger than {_LARGEST_BYTES}; send it as a frame")


def _odd_json(text: bytes) -> dict[str, Any]:
    """What the fast decoder refuses may still be what Python's encoder writes."""
    try:
        meta = json.loads(text.decode())  # of bytes it would guess other encodings
        if not isinstance(meta, dict):
            raise TypeError(f"{type(meta).__name__} instead of an object")
        json.dumps(meta, ensure_ascii=False).encode()  # or it holds half a character
    except (TypeError, ValueError, RecursionError) as error:
        raise BadFrame(f"a frame's metadata must be plain JSON: {error}") from None
    return meta


def _require_json(item: Any, depth: int) -> None:
    """Containers of containers of plain values, with text for keys; leaves are looked at all at once, for speed."""
    if depth > _DEEPEST:
        raise BadFrame(f"a frame's metadata is nested deeper than {_DEEPEST} levels; make it flatter")
    if isinstance(item, dict):
        if not (_TEXT.issuperset(map(type, item)) or all(isinstance(key, str) for key in item)):
            raise TypeError("a key is not text")
        item = item.values()
    if _FLAT.issuperset(map(type, item)):
        return
    for value in item:
        if type(value) in _FLAT:
            continue
        if not isinstance(value, dict | list | tuple):
            raise TypeError(f"a value of type {type(value).__name__}")
        _require_json(value, depth + 1)
