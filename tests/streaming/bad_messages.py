"""One corpus of bad messages: used on the decoders alone and against a running service.

``DETECTOR`` and ``NATIVE`` hold what somebody thought of; `mutations` what nobody did.
"""

import random
import struct
from collections.abc import Iterator
from typing import Any

import cbor2
import msgspec
import numpy as np

from storage.codec import encode
from storage.frame import FrameInfo
from storage.models import StreamHeader
from streaming import wire

SERIES = "01BAD000000000000000000000"
SHAPE = (16, 16)
PIXELS = encode(np.arange(256, dtype=np.uint16).reshape(SHAPE))


def array(blob: Any = PIXELS, shape: Any = SHAPE, tag: int = 69, codec: Any = "bslz4", size: Any = 2) -> cbor2.CBORTag:
    return cbor2.CBORTag(40, [list(shape), cbor2.CBORTag(tag, cbor2.CBORTag(56500, [codec, size, blob]))])


def start(**fields: Any) -> dict[str, Any]:
    return {
        "type": "start", "series_id": 1, "series_unique_id": SERIES, "number_of_images": 50, "image_dtype": "uint16",
        "image_size_x": SHAPE[1], "image_size_y": SHAPE[0], "channels": ["threshold_1"], "frame_time": 0.1,
    } | fields  # fmt: skip


def other_start(**fields: Any) -> dict[str, Any]:
    """A start message of another series than the one that is being recorded."""
    return start(series_id=2, series_unique_id="01X") | fields


def image(image_id: Any = 0, data: Any = None, **fields: Any) -> dict[str, Any]:
    data = {"threshold_1": array()} if data is None else data
    times = {"start_time": [0, 50_000_000], "stop_time": [9, 50_000_000]}
    return (
        {"type": "image", "series_id": 1, "series_unique_id": SERIES, "image_id": image_id, "data": data}
        | times
        | fields
    )


def end(**fields: Any) -> dict[str, Any]:
    return {"type": "end", "series_id": 1, "series_unique_id": SERIES} | fields


def dump(message: Any) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(55799, message))


def _deep(n: int) -> bytes:
    return b"\x81" * n + b"\x00"


# Each is refused by the decoder, or by the series it claims to belong to.
DETECTOR: dict[str, bytes] = {
    "empty": b"",
    "garbage": bytes(range(256)),
    "text": b"hello detector",
    "stream v1 json": b'{"htype":"dheader-1.0","series":1,"header_detail":"none"}',
    "a number": dump(5),
    "a list": dump([1, 2]),
    "no type": dump({"series_id": 1}),
    "unknown type": dump({"type": "telemetry"}),
    "type is a map": dump({"type": {"a": 1}}),
    "nested 100 deep": _deep(100),
    "nested 100000 deep": _deep(100_000),
    "map of 2^64-1 items": b"\xbb" + b"\xff" * 8,
    "list of 2^64-1 items": b"\x9b" + b"\xff" * 8,
    "bytes of 2^62": b"\x5b\x3f" + b"\xff" * 7,
    "unhashable key": b"\xa1\x80\x00",
    "key of bytes": b"\xa1\x41\x00\x00",
    "key of tagged bytes": b"\xa1\xc1\x41\x00\x00",
    "break alone": b"\xff",
    "reserved length": b"\x1c",
    "text that is not utf-8": b"\x62\xff\xfe",
    "stray bytes": dump(image()) + b"\0",
    "cut in the envelope": dump(image())[:40],
    "cut in the pixels": dump(image())[:-80],
    "image without data": dump(image(data={})),
    "image data is text": dump(image(data={"threshold_1": "x"})),
    "image without series": dump({"type": "image", "image_id": 0, "data": {"threshold_1": array()}}),
    "image_id is text": dump(image("0")),
    "image_id negative": dump(image(-1)),
    "image_id beyond planned": dump(image(50)),
    "image_id 2^53-1": dump(image(2**53 - 1)),
    "image_id 2^64-1": dump(image(2**64 - 1)),
    "image_id true": dump(image(True)),
    "other series": dump(image(series_unique_id="01OTHER", series_id=9)),
    "wrong shape": dump(image(3, {"threshold_1": array(shape=(8, 32))})),
    "wrong dtype": dump(image(3, {"threshold_1": array(tag=70, size=4)})),
    "giant shape": dump(image(3, {"threshold_1": array(shape=(2**40, 2**40))})),
    "shape of text": dump(image(3, {"threshold_1": array(shape=("a", "b"))})),
    "shape negative": dump(image(3, {"threshold_1": array(shape=(-16, -16))})),
    "big-endian": dump(image(3, {"threshold_1": array(tag=65)})),
    "unknown codec": dump(image(3, {"threshold_1": array(codec="zstd")})),
    "codec is a number": dump(image(3, {"threshold_1": array(codec=3)})),
    "pixels are text": dump(image(3, {"threshold_1": array(blob="x" * 50)})),
    "pixels are a number": dump(image(3, {"threshold_1": array(blob=7)})),
    "pixels cut": dump(image(3, {"threshold_1": array(blob=PIXELS[:-9])})),
    "pixels declare 2^64-1 bytes": dump(image(3, {"threshold_1": array(blob=b"\xff" * 8 + PIXELS[8:])})),
    "pixels empty": dump(image(3, {"threshold_1": array(blob=b"")})),
    "unknown channel": dump(image(3, {"../../x": array()})),
    "channel without a name": dump(image(3, {"": array()})),
    "times are text": dump(image(3, start_time="noon")),
    "time beyond 64 bits": dump(image(3, start_time=[2**64 - 1, 1])),
    "end without series": dump({"type": "end"}),
    "end of another series": dump(end(series_id=9, series_unique_id="01OTHER")),
    "start without series": dump({"type": "start"}),
    "start with a path as channel": dump(other_start(channels=["a", "../../x"])),
    "start with 1000 channels": dump(other_start(channels=[f"c{i}" for i in range(1000)])),
    "start of 2^40 pixels": dump(other_start(image_size_x=2**20, image_size_y=2**20)),
    "start with negative size": dump(other_start(image_size_x=-5)),
    "start with dtype object": dump(other_start(image_dtype="object")),
    "start with dtype of a struct": dump(other_start(image_dtype="(9999,)u4")),
}  # fmt: skip

# Odd, but nothing that frames should be given up for.
ODD_BUT_FINE: dict[str, dict[str, Any]] = {
    "negative times": {"count_time": -1.0, "frame_time": float("nan"), "sensor_thickness": -5},
    "infinite energy": {"incident_energy": float("inf"), "incident_wavelength": "1 A"},
    "translation is text": {"detector_translation": "far away", "beam_center_x": None},
    "thresholds are a list": {"threshold_energy": [1, 2], "saturation_value": "many", "flatfield_enabled": "yes"},
    "masks are garbage": {"pixel_mask": {"threshold_1": array(shape=(2**32, 2**32))}, "flatfield": 7},
    "mask of another shape": {"pixel_mask": {"threshold_1": array(shape=(8, 32), tag=69)}},
    "number_of_images 2^64-1": {"number_of_images": 2**64 - 1},
    "number_of_images negative": {"number_of_images": -7},
    "user data nested": {"user_data": {"a": {"b": [1, {"c": b"\xff" * 10}]}, 7: float("nan"), "n": -(2**64)}},
}

REF = wire.StreamRef("lyso", 1, "eiger")
_HEADER = StreamHeader(experiment="lyso", run=1, data_source="new", shape=SHAPE, dtype="uint16").model_dump_json()


def native(request: Any, **changes: Any) -> bytes:
    """A request with some of its fields replaced by anything at all."""
    fields = msgspec.msgpack.decode(wire.encode(request)) | changes
    return msgspec.msgpack.encode(fields)


def _header(**changes: Any) -> bytes:
    return msgspec.json.encode(msgspec.json.decode(_HEADER) | changes)


NUMBERS = [0, -1, 2**31, 2**53, 2**63 - 1, -(2**63), 2**64 - 1]
FLOATS = [float("nan"), float("inf"), float("-inf"), -1e308, 1e308]
GOOD_REQUESTS: dict[str, Any] = {
    "Hello": wire.Hello(id=1, protocol=1),
    "ListRuns": wire.ListRuns(id=1),
    "OpenRun": wire.OpenRun(id=1, experiment="lyso", run=1),
    "Wait": wire.Wait(id=1, stream=REF),
    "Read": wire.Read(id=1, stream=REF, start=0, stop=3),
    "Latest": wire.Latest(id=1, stream=REF),
    "NextFrames": wire.NextFrames(id=1, stream=REF, group="bad", member="m"),
    "Acknowledge": wire.Acknowledge(id=1, stream=REF, group="bad", leases=[(0, 5)]),
    "WaitChunk": wire.WaitChunk(id=1, stream=REF, chunk=0),
    "GetPlane": wire.GetPlane(id=1, stream=REF, name="pixel_mask"),
    "GetLedger": wire.GetLedger(id=1, stream=REF),
    "GetStatus": wire.GetStatus(id=1),
    "Annotate": wire.Annotate(id=1, experiment="lyso", run=1),
    "GetAnnotations": wire.GetAnnotations(id=1, experiment="lyso", run=1),
    "StartStream": wire.StartStream(id=1, header=_HEADER.encode()),
    "PutFrames": wire.PutFrames(id=1, stream=REF, infos=[FrameInfo(frame_index=0, size_bytes=len(PIXELS))]),
    "FinishStream": wire.FinishStream(id=1, stream=wire.StreamRef("lyso", 1, "nothing")),
}


def numbers() -> Iterator[tuple[str, list[bytes]]]:
    """Every number that a client may name, absurd."""
    for name, request in GOOD_REQUESTS.items():
        for field, value in msgspec.msgpack.decode(wire.encode(request)).items():
            if field == "id" or isinstance(value, bool):
                continue
            choices = FLOATS if isinstance(value, float) else NUMBERS if isinstance(value, int) else []
            for choice in choices:
                yield f"{name}.{field}={choice}", [native(request, **{field: choice}), PIXELS]


def _stream_names() -> Iterator[tuple[str, list[bytes]]]:
    for experiment, run, source in [
        ("../../etc", 1, "eiger"), ("lyso", -1, "eiger"), ("lyso", 2**64 - 1, "eiger"), ("lyso", 1, "../../passwd"),
        ("", 0, ""), ("lyso", 999, "eiger"), ("lyso", 1, "nothing"), ("nobody", 1, "eiger"), ("a" * 5000, 1, "eiger"),
        ("lyso", 1, "x\0y"),
    ]:  # fmt: skip
        for name, request in GOOD_REQUESTS.items():
            if hasattr(request, "stream"):
                yield f"{name} of {experiment[:9]}/{run}/{source}", [native(request, stream=[experiment, run, source])]


# The fields of a row between its size and its metadata.
_AS_USUAL = [0, b"", 0, *[None] * 4, "", *[None] * 5, "", None]


def _frames() -> Iterator[tuple[str, list[bytes]]]:
    put = GOOD_REQUESTS["PutFrames"]
    row = [90, len(PIXELS)]
    for name, rows, parts in [
        ("no payload", [row], []),
        ("too many parts", [row], [PIXELS] * 7),
        ("sizes do not add up", [[90, 3], [91, 4]], [b"12345678"]),
        ("negative size", [[90, -5]], [PIXELS]),
        ("cut", [row], [PIXELS[:-4]]),
        ("garbage", [[90, 300]], [b"\xff" * 300]),
        ("index -1", [[-1, len(PIXELS)]], [PIXELS]),
        ("index 2^63-1", [[2**63 - 1, len(PIXELS)]], [PIXELS]),
        ("index 2^64-1", [[2**64 - 1, len(PIXELS)]], [PIXELS]),
        ("index 10^9", [[10**9, len(PIXELS)]], [PIXELS]),
        ("row is text", ["x"], [PIXELS]),
        ("metadata of bytes", [[*row, *_AS_USUAL, {"a": b"x"}]], [PIXELS]),
        ("tick of 2^64-1", [[*row, 0, b"", 0, 2**64 - 1]], [PIXELS]),
    ]:  # fmt: skip
        yield f"frames: {name}", [native(put, infos=rows), *parts]
    yield "frames: unknown ack", [native(put, ack="engraved"), PIXELS]


def _starts() -> Iterator[tuple[str, list[bytes]]]:
    request = GOOD_REQUESTS["StartStream"]
    for name, header, parts in [
        ("not json", b"{", []),
        ("nested json", b"[" * 100_000, []),
        ("giant shape", _header(shape=[2**20, 2**20]), []),
        ("negative shape", _header(shape=[-1, 5]), []),
        ("dtype object", _header(dtype="object"), []),
        ("frames_per_chunk 10^9", _header(frames_per_chunk=10**9), []),
        ("planned 10^30", _header(planned=10**30), []),
        ("path as name", _header(data_source="../x"), []),
        ("mask too short", _header(), [b"123"]),
        ("unknown field", _header(surprise=1), []),
        ("exists with another header", _header(data_source="eiger", shape=[1, 1]), []),
    ]:
        yield f"start: {name}", [native(request, header=header), *parts]


def _malformed() -> Iterator[tuple[str, list[bytes]]]:
    yield "no parts", [b""]
    yield "garbage", [bytes(range(256))]
    yield "cbor", [dump(image())]
    yield "unknown tag", [msgspec.msgpack.encode({"type": "Destroy", "id": 1})]
    yield "nested", [b"\x91" * 100_000]
    yield "map of 2^32-1", [b"\xdf\xff\xff\xff\xff"]
    yield "id is text", [native(GOOD_REQUESTS["GetStatus"], id="x")]
    yield "protocol 99", [native(GOOD_REQUESTS["Hello"], protocol=99)]
    yield "plane that is the data", [native(GOOD_REQUESTS["GetPlane"], name="data")]
    yield "plane with a path", [native(GOOD_REQUESTS["GetPlane"], name="../../run.json")]
    yield "run of another type", [native(GOOD_REQUESTS["OpenRun"], run="1; DROP TABLE run")]
    yield "start_run: path", [wire.encode(wire.StartRun(id=1, experiment="../x"))]
    yield "start_run: data", [wire.encode(wire.StartRun(id=1, experiment="ok", user_data={"a": b"x"}))]
    yield "finish with 10^12 frames", [wire.encode(wire.FinishStream(id=1, stream=REF, announced=10**12))]
    yield "finish with -1 frames", [wire.encode(wire.FinishStream(id=1, stream=REF, announced=-1))]


NATIVE: dict[str, list[bytes]] = dict([*_malformed(), *_stream_names(), *_frames(), *_starts(), *numbers()])


def mutations(messages: list[bytes], n: int, seed: int = 1) -> Iterator[bytes]:
    """Valid messages with bytes flipped, cut out, doubled, or replaced by lengths that lie."""
    rng = random.Random(seed)
    for _ in range(n):
        message = bytearray(rng.choice(messages))
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            at = rng.randrange(len(message)) if message else 0
            match rng.randrange(6):
                case 0:
                    message[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    del message[at:]
                case 2:
                    del message[at : at + rng.randrange(1, 9)]
                case 3:
                    message[at:at] = message[at : at + rng.randrange(1, 40)]
                case 4:
                    message[at : at + 8] = struct.pack(">Q", rng.choice([2**64 - 1, 2**63, 2**32, 0]))
                case 5:
                    message[at : at + 1] = bytes([rng.choice([0x00, 0x1B, 0x5B, 0x9F, 0xBF, 0xC0, 0xFB, 0xFF, 0xDF])])
        yield bytes(message)


VALID_DETECTOR = [dump(start()), dump(image(2)), dump(image(4, user_data={"a": [1, {"b": 2.5}]})), dump(end())]
VALID_NATIVE = [wire.encode(r) for r in GOOD_REQUESTS.values()]
