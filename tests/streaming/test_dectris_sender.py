"""What the sender says is DECTRIS stream v2, as an independent client decodes it."""

import re
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cbor2
import h5py
import hdf5plugin
import numpy as np
import pytest
import zmq

from storage.codec import encode
from storage.errors import BadFrame, ProtocolError, ServiceUnavailable, ShapeMismatch
from storage.models import DetectorHeader
from streaming.simulator import DectrisStreamSender, default_detector
from streaming.simulator.dectris import CLOCK_HZ, finish, nearline_user_data, send_images

from .dectris_client import Receiver, decode, tag_hook

SHAPE = (30, 41)
FREE_PORT = "tcp://127.0.0.1:*"
CAPTURE = Path(__file__).parents[3] / "shared" / "data" / "eiger2-16m-stream-v2"


def frames(dtype: str, n: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 200, SHAPE).astype(dtype) for _ in range(n)]


def exchange(send, **options) -> tuple[list[dict], list[bytes]]:
    """What a receiver gets when ``send(sender)`` speaks."""
    with DectrisStreamSender(FREE_PORT, receiver_timeout=20, **options) as sender:
        receiver = Receiver(sender.endpoint)
        send(sender)
        return receiver.messages(), receiver.raw


def send_series(dtype="uint16", codec="bslz4", detector=None, images=None, **start):
    images = frames(dtype) if images is None else images

    def send(sender):
        sender.send_start(detector or default_detector(SHAPE), SHAPE, dtype, len(images), codec=codec, **start)
        for i, image in enumerate(images):
            blob = lz4_blob(image) if codec == "lz4" else encode(image, codec)
            sender.send_image(i, blob)
        sender.send_end()

    return send


def lz4_blob(image: np.ndarray) -> bytes:
    """HDF5-LZ4 framing as HDF5's own filter writes it."""
    with h5py.File.in_memory() as file:
        raw = image.reshape(-1).view("u1")
        chunk = file.create_dataset("x", data=raw, chunks=raw.shape, **hdf5plugin.LZ4())
        return bytes(chunk.id.read_direct_chunk((0,))[1])


@pytest.mark.parametrize("codec", ["bslz4", "lz4", "raw"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_images_arrive_as_they_were(dtype, codec):
    messages, _ = exchange(send_series(dtype, codec))
    assert [m["type"] for m in messages] == ["start", *["image"] * 3, "end"]
    for i, (message, image) in enumerate(zip(messages[1:-1], frames(dtype), strict=True)):
        received = message["data"]["threshold_1"]
        assert message["image_id"] == i
        assert received.dtype == image.dtype
        assert np.array_equal(received, image)


def test_start_message_says_what_the_detector_is():
    detector = default_detector(SHAPE, frame_time=0.01)
    mask = np.arange(SHAPE[0] * SHAPE[1], dtype=np.uint32).reshape(SHAPE)
    flat = np.linspace(0.9, 1.1, mask.size, dtype=np.float32).reshape(SHAPE)
    send = send_series(detector=detector, series_id=70_000, pixel_mask=mask, flatfield=flat)
    start = exchange(send)[0][0]
    assert start["series_id"] == 70_000
    assert (start["image_size_x"], start["image_size_y"]) == (41, 30)
    assert start["image_dtype"] == "uint16"
    assert start["number_of_images"] == 3
    assert list(start["channels"]) == ["threshold_1"]
    assert np.array_equal(start["pixel_mask"]["threshold_1"], mask)
    assert start["flatfield"]["threshold_1"].dtype == np.float32
    assert np.array_equal(start["flatfield"]["threshold_1"], flat)
    x, y, z = start["detector_translation"]
    assert z == -detector.detector_distance
    assert (x, y) == (detector.beam_center_x * 75e-6, detector.beam_center_y * 75e-6)
    same = ["beam_center_x", "count_time", "frame_time", "incident_energy", "saturation_value", "sensor_material"]
    assert [start[name] for name in same] == [getattr(detector, name) for name in same]
    assert dict(start["threshold_energy"]) == {"threshold_1": detector.threshold_energy}
    assert abs(start["arm_date"] - datetime.now(UTC)) < timedelta(minutes=1)
    assert re.fullmatch("[0-9A-HJKMNP-TV-Z]{26}", start["series_unique_id"])
    assert start["user_data"] == ""


def test_basic_header_has_no_arrays():
    start = exchange(send_series(header_detail="basic"))[0][0]
    assert not {"pixel_mask", "flatfield"} & set(start)


def test_what_a_header_does_not_know_is_not_said():
    start = exchange(send_series(detector=DetectorHeader()))[0][0]
    assert not {name for name in start if name.endswith("_enabled")} | {"saturation_value", "threshold_energy"} & set(
        start
    )


def test_every_message_names_its_series():
    messages, raw = exchange(send_series(series_id=5))
    assert {(m["series_id"], m["series_unique_id"]) for m in messages} == {(5, messages[0]["series_unique_id"])}
    for message in raw:
        assert message.startswith(b"\xd9\xd9\xf7")  # tag 55799
        assert next(iter(decode(message))) == "type"
        assert cbor2.loads(message, tag_hook=lambda *arguments: arguments[-1])


def test_times_are_rationals_of_the_detectors_clock():
    detector = default_detector(SHAPE, frame_time=0.002)

    def send(sender):
        sender.send_start(detector, SHAPE, "uint16", 3)
        blobs = [(i, encode(image), None) for i, image in enumerate(frames("uint16"))]
        send_images(sender, blobs, rate=50.0)
        sender.send_end()

    images = exchange(send)[0][1:-1]
    start, stop = (np.array([m[name][0] / m[name][1] for m in images]) for name in ("start_time", "stop_time"))
    assert {m["start_time"][1] for m in images} == {CLOCK_HZ}
    assert np.diff(stop) == pytest.approx([0.02, 0.02], abs=0.015)
    assert (stop - start <= detector.count_time + 1e-6).all()
    for message in images:
        assert message["real_time"][0] == message["stop_time"][0] - message["start_time"][0]
        assert abs(message["series_date"] - datetime.now(UTC)) < timedelta(minutes=1)


def test_appendices_come_through():
    def send(sender):
        user_data = nearline_user_data("lyso", 7, None)
        sender.send_start(default_detector(SHAPE), SHAPE, "uint16", 2, user_data=user_data)
        sender.send_image(0, encode(frames("uint16")[0]), user_data={"laser": True, "note": "ä" * 300})
        sender.send_image(1, encode(frames("uint16")[1]))
        sender.send_end()

    start, first, second, _ = exchange(send)[0]
    assert dict(start["user_data"]["nearline"]) == {"experiment": "lyso", "run": 7, "sample": None}
    assert dict(first["user_data"]) == {"laser": True, "note": "ä" * 300}
    assert "user_data" not in second
    assert nearline_user_data(None, None, None) == {}


def test_two_channels_share_one_message():
    low, high, _ = frames("uint16")

    def send(sender):
        sender.send_start(default_detector(SHAPE), SHAPE, "uint16", 1, channels=("threshold_1", "threshold_2"))
        sender.send_image(0, {"threshold_1": encode(low), "threshold_2": encode(high)})
        sender.send_end()

    start, image, _ = exchange(send)[0]
    assert set(start["pixel_mask"]) == {"threshold_1", "threshold_2"}
    assert np.array_equal(image["data"]["threshold_1"], low)
    assert np.array_equal(image["data"]["threshold_2"], high)


def test_a_prepared_image_may_be_sent_again_and_again():
    image = frames("uint16")[0]

    def send(sender):
        sender.send_start(default_detector(SHAPE), SHAPE, "uint16", 50)
        prepared = sender.prepare_image(encode(image), user_data="kept")
        for i in range(50):
            sender.send_image(i, prepared)
        sender.send_end()

    images = exchange(send, high_water_mark=2)[0][1:-1]
    assert [m["image_id"] for m in images] == list(range(50))
    assert all(np.array_equal(m["data"]["threshold_1"], image) and m["user_data"] == "kept" for m in images)


@pytest.mark.parametrize(
    "arguments", [lambda tag: (tag, True), lambda tag: (object(), tag)], ids=["cbor2 6", "cbor2 5"]
)
def test_the_client_decodes_with_either_hook_signature(arguments):
    tag = cbor2.CBORTag(40, [[1, 2], tag_hook(*arguments(cbor2.CBORTag(69, b"\x01\x00\x02\x00")))])
    assert tag_hook(*arguments(tag)).tolist() == [[1, 2]]


@pytest.mark.skipif(not CAPTURE.is_dir(), reason="no captured stream at ../shared/data")
def test_keys_and_types_are_those_of_a_real_detector():
    """Same keys in the same order as a captured EIGER2 image; a start that lacks only the table."""
    messages, _ = exchange(send_series())
    real = {name: decode((CAPTURE / f"{name}.cbor").read_bytes()) for name in ("start", "image", "end")}
    assert list(messages[1]) == list(real["image"])
    assert list(messages[-1]) == list(real["end"])
    assert set(real["start"]) - set(messages[0]) == {"countrate_correction_lookup_table"}
    assert set(messages[0]) - set(real["start"]) == {"image_dtype", "user_data"}
    for key in set(real["start"]) & set(messages[0]) - {"flatfield", "pixel_mask"}:
        assert type(messages[0][key]) is type(real["start"][key]) or isinstance(real["start"][key], (list, dict)), key


# ---- when things are not as they should be


def test_a_busy_port_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServiceUnavailable, match=f"port {port} belongs to another program"):
            DectrisStreamSender(f"tcp://127.0.0.1:{port}")


def test_a_wrong_endpoint_is_refused():
    with pytest.raises(ServiceUnavailable, match="cannot bind nonsense"):
        DectrisStreamSender("nonsense")


def test_sending_waits_for_a_receiver_and_says_so():
    sentences: list[str] = []
    with DectrisStreamSender(FREE_PORT, receiver_timeout=20, report=sentences.append) as sender:
        worker = threading.Thread(target=send_series(), args=(sender,))
        worker.start()
        deadline = time.monotonic() + 10
        while not sentences and time.monotonic() < deadline:
            time.sleep(0.01)
        messages = Receiver(sender.endpoint).messages()
        worker.join(10)
        assert sender.flush(5)
    assert [m["type"] for m in messages] == ["start", *["image"] * 3, "end"]
    assert "waiting" in sentences[0]
    assert sender.endpoint in sentences[0]


def test_nobody_connecting_in_time_is_an_error():
    expected = pytest.raises(ServiceUnavailable, match="nearline serve")
    with DectrisStreamSender(FREE_PORT, receiver_timeout=0.1) as sender, expected:
        sender.wait_for_receiver()


def test_a_receiver_that_hangs_at_the_end_is_reported():
    """Connected, but never reading: the queues fill, and what is left in them is not called sent.

    Three frames of 25 MB: two may be in the receiver's queue, and some 10 MB in the kernel's.
    """
    large = np.random.default_rng(0).integers(0, 2**16, (3500, 3500)).astype("uint16")
    with DectrisStreamSender(FREE_PORT, receiver_timeout=0.4, high_water_mark=4) as sender:
        context = zmq.Context()
        hung = context.socket(zmq.PULL)
        hung.set(zmq.RCVHWM, 1)
        hung.connect(sender.endpoint)
        try:
            sender.send_start(default_detector(large.shape), large.shape, "uint16", 3)
            for i in range(3):
                sender.send_image(i, encode(large, "raw"))
            assert not sender.flush(0.2)
            with pytest.raises(ServiceUnavailable, match="took no message"):
                finish(sender)
            sender.close(linger=0)
        finally:
            hung.close(linger=0)
            context.term()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda s: s.send_image(0, b""), ProtocolError),
        (lambda s: s.send_end(), ProtocolError),
        (lambda s: s.send_start(default_detector(SHAPE), SHAPE, "float32", 1), BadFrame),
        (
            lambda s: s.send_start(default_detector(SHAPE), SHAPE, "uint16", 1, pixel_mask=np.zeros((2, 2), "u4")),
            ShapeMismatch,
        ),
    ],
    ids=["image before start", "end before start", "dtype", "mask shape"],
)
def test_misuse_is_refused(call, error):
    with DectrisStreamSender(FREE_PORT) as sender, pytest.raises(error):
        call(sender)


def test_unknown_channels_and_second_appendices_are_refused():
    def send(sender):
        sender.send_start(default_detector(SHAPE), SHAPE, "uint16", 1)
        with pytest.raises(BadFrame, match="threshold_1"):
            sender.prepare_image({"difference": b""})
        prepared = sender.prepare_image(encode(frames("uint16")[0]))
        with pytest.raises(ProtocolError, match="prepare_image"):
            sender.send_image(0, prepared, user_data="late")
        sender.send_end()

    assert len(exchange(send)[0]) == 2
