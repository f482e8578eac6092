"""Messages that are nearly right, without end, from a seed.

Unlike `tests.streaming.bad_messages`, which flips bytes, these are taken apart and put together again: any
value at any depth becomes one of another kind, absurdly large, or nested; messages lose and gain parts,
come twice, come in another order, and belong to streams that are really open, so that they get far.
"""

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import cbor2
import msgspec

from storage.frame import FrameInfo
from streaming import wire
from tests.streaming import bad_messages as corpus

__all__ = ["VICTIM", "Fuzzer", "Message"]

VICTIM = "victim"  # the experiment that is shot at
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "x", "0", "../../x", "a" * 300, "x\0y", "é" * 50, b"",
    b"\0", b"\xff" * 40, b"a" * 70_000, [], [[]], [None] * 20, list(range(300)), {}, {"a": {}}, {"type": "x"}, {"": ""},
    [-1, -1], [2**20, 2**20], [2**40], "object", "uint16", "Hello", "PutFrames", "image",
]  # fmt: skip
_MORE_REQUESTS = [
    wire.Hello(id=1, protocol=wire.PROTOCOL),
    wire.NextFrames(id=1, stream=corpus.REF, group="bad", member="n", done=[(0, 1)], max_deliveries=3),
    wire.Acknowledge(id=1, stream=corpus.REF, group="bad", leases=[(0, 1)], give_back=True, delay_s=0.1, leaves=True),
    wire.GetGroups(id=1, stream=corpus.REF),
    wire.SeekGroup(id=1, stream=corpus.REF, group="bad", frame_index=1),
    wire.DeadLetters(id=1, stream=corpus.REF, group="bad", action="retry"),
    wire.GetEvents(id=1, experiment=VICTIM, run=1),
    wire.AddEvent(id=1, experiment=VICTIM, run=1, kind="comment", payload={"text": "hello"}),
    wire.StartRun(id=1, experiment=VICTIM, user_data={"a": 1}, request_key="k"),
    wire.StopRun(id=1, experiment=VICTIM, run=1),
]
# Each makes a file or more: they come less often.
_COSTLY = ("AddEvent", "StartRun", "StartStream", "FinishStream", "StopRun")
# Beyond what a source may leave out: a jump that is believed costs a file for each chunk in between.
_FAR = 2**17
_LYING_BYTES = [0x00, 0x1B, 0x5B, 0x7F, 0x9F, 0xBF, 0xC0, 0xC1, 0xC6, 0xDC, 0xDD, 0xDE, 0xDF, 0xFB, 0xFF]


@dataclass(frozen=True, slots=True)
class Message:
    """One message to one of the two doors."""

    door: Literal["native", "detector"]
    parts: list[bytes]

    def __str__(self) -> str:
        return f"{self.door}: " + " | ".join(part.hex() for part in self.parts)


class Fuzzer:
    """The same messages for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.run = 1
        self._series = 0
        self._image = 0
        good = [*corpus.GOOD_REQUESTS.values(), *_MORE_REQUESTS]
        self._requests = [msgspec.msgpack.decode(wire.encode(request)) for request in good]
        self._cheap = [r for r in self._requests if r["type"] not in _COSTLY]
        self._before: list[Message] = []

    def messages(self, n: int) -> Iterator[Message]:
        """Half of them for each door; one in twenty comes again later, out of its order."""
        for _ in range(n):
            if self._before and self._rng.random() < 0.05:
                yield self._rng.choice(self._before)
                continue
            message = self._native() if self._rng.random() < 0.5 else self._detector()
            if self._rng.random() < 0.02:
                self._before = [*self._before[-20:], message]
            yield message

    # ---- native ---------------------------------------------------------------------------------------

    def _native(self) -> Message:
        rng = self._rng
        fields = dict(rng.choice(self._requests if rng.random() < 0.2 else self._cheap))
        if "stream" in fields:
            fields["stream"] = [VICTIM, self.run, "eiger"]
        if "experiment" in fields:
            fields |= {"experiment": VICTIM, "run": rng.choice([None, self.run])}
        if "infos" in fields:
            rows = [
                FrameInfo(frame_index=rng.randrange(200), size_bytes=len(corpus.PIXELS))
                for _ in range(rng.choice([1, 1, 3]))
            ]
            fields["infos"] = msgspec.to_builtins(rows, builtin_types=(bytes,))
        if "header" in fields:
            header = {"experiment": VICTIM, "run": self.run, "data_source": f"new{rng.randrange(5)}", "shape": [16, 16]}
            header |= {"dtype": "uint16", "frames_per_chunk": 10, "planned": 300}
            fields["header"] = self._damaged(header, msgspec.json.encode)
        if "timeout_s" in fields and rng.random() < 0.9:
            fields["timeout_s"] = rng.choice([0.0, 0.0, 0.01, 0.3])
        payload = [corpus.PIXELS] * len(fields["infos"]) if isinstance(fields.get("infos"), list) else []
        header = self._damaged(fields, msgspec.msgpack.encode)
        return Message("native", self._parts([header, *payload]))

    # ---- detector -----------------------------------------------------------------------------------------

    def _detector(self) -> Message:
        rng = self._rng
        draw = rng.random()
        if draw < 0.02 or not self._series:
            self._series, self._image = self._series + 1, 0
            fields = corpus.start(
                **self._of_series(), user_data={"nearline": {"experiment": VICTIM}}, number_of_images=100
            )
            if rng.random() < 0.7:  # a series that is really open, for the images that follow
                return Message("detector", [corpus.dump(fields)])
        elif draw < 0.03:
            fields = corpus.end(**self._of_series())
            self._image = 0
        else:
            self._image += rng.choice([0, 1, 1, 2])
            fields = corpus.image(self._image % 110, **self._of_series())
        return Message("detector", self._parts([self._damaged(fields, corpus.dump)]))

    def _of_series(self) -> dict[str, Any]:
        return {"series_id": self._series, "series_unique_id": f"01BAD{self._series:021d}"}

    # ---- damage ----------------------------------------------------------------------------------------------

    def _damaged(self, fields: dict[str, Any], dump: Any) -> bytes:
        """Encoded with some values exchanged, or some bytes, or both; now and then left whole."""
        rng = self._rng
        tree = fields
        if rng.random() < 0.7:
            for _ in range(rng.choice([1, 1, 1, 2, 4])):
                tree = self._exchange(tree)
        try:
            encoded = dump(tree)
        except (TypeError, ValueError, OverflowError, UnicodeError):  # what cannot even be written
            encoded = dump(fields)
        return self._flip(encoded) if rng.random() < 0.4 else encoded

    def _exchange(self, tree: Any, depth: int = 0) -> Any:
        """The tree with one value, somewhere, replaced, removed or added."""
        rng = self._rng
        if isinstance(tree, dict) and tree:
            key = rng.choice(list(tree))
            draw = rng.random()
            if draw < 0.07:
                return {k: v for k, v in tree.items() if k != key}
            if draw < 0.12:
                return tree | {
                    rng.choice(["surprise", "", "type", key * 2 if isinstance(key, str) else "k"]): self._odd()
                }
            return tree | {key: self._deeper(tree[key], depth)}
        if isinstance(tree, list | tuple) and tree:
            at = rng.randrange(len(tree))
            draw = rng.random()
            if draw < 0.07:
                return [*tree[:at], *tree[at + 1 :]]
            if draw < 0.12:
                return [*tree[:at], *[tree[at]] * rng.choice([2, 3, 50]), *tree[at + 1 :]]
            return [*tree[:at], self._deeper(tree[at], depth), *tree[at + 1 :]]
        if isinstance(tree, cbor2.CBORTag):
            if rng.random() < 0.15:
                return cbor2.CBORTag(
                    rng.choice([0, 1, 2, 4, 24, 28, 29, 30, 40, 65, 69, 70, 85, 258, 56500, 2**32]), tree.value
                )
            return cbor2.CBORTag(tree.tag, self._deeper(tree.value, depth))
        return self._odd(tree)

    def _deeper(self, value: Any, depth: int) -> Any:
        has_more = isinstance(value, dict | list | tuple | cbor2.CBORTag)
        if has_more and depth < 8 and self._rng.random() < 0.75:
            return self._exchange(value, depth + 1)
        if isinstance(value, int) and not isinstance(value, bool) and self._rng.random() < 0.5:
            return value + self._rng.choice([-1, 1, 2, -value, 100, _FAR, 2**31, -(2**31)])
        if isinstance(value, bytes) and value and self._rng.random() < 0.8:
            return self._flip(value)
        return self._odd(value)

    def _odd(self, value: Any = None) -> Any:
        """Something else; every other time of the same kind, so that it gets past the decoder."""
        if self._rng.random() < 0.5:
            alike = [odd for odd in _ODD if type(odd) is type(value)]
            return self._rng.choice(alike or _ODD)
        if self._rng.random() < 0.05:
            nested: Any = 0
            for _ in range(self._rng.choice([10, 100, 900])):
                nested = [nested] if self._rng.random() < 0.5 else {"a": nested}
            return nested
        return self._rng.choice(_ODD)

    def _flip(self, content: bytes) -> bytes:
        rng, message = self._rng, bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 6])):
            at = rng.randrange(len(message) + 1)
            match rng.randrange(7):
                case 0:
                    message[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    del message[at:]
                case 2:
                    del message[at : at + rng.randrange(1, 20)]
                case 3:
                    message[at:at] = message[at : at + rng.randrange(1, 60)]
                case 4:
                    message[at : at + 8] = struct.pack(">Q", rng.choice([2**64 - 1, 2**63, 2**40, 2**32 - 1, 0]))
                case 5:
                    message[at : at + 1] = bytes([rng.choice(_LYING_BYTES)])
                case 6:
                    message += rng.randbytes(rng.choice([1, 8, 500]))
        return bytes(message)

    def _parts(self, parts: list[bytes]) -> list[bytes]:
        """Mostly as they are; else with one lost, doubled, exchanged, cut, empty or many."""
        rng = self._rng
        if rng.random() < 0.8:
            return parts
        at = rng.randrange(len(parts))
        before, part, behind = parts[:at], parts[at], parts[at + 1 :]
        choices: list[list[bytes]] = [
            [*before, *behind] or [b""], [*parts, part], parts[::-1], [*parts, b""], [b"", *parts],
            [*before, self._flip(part), *behind], [*parts, *[b"x"] * 200], [parts[0], b"".join(parts[1:])],
        ]  # fmt: skip
        return rng.choice(choices)
