"""Facts that come late: kept for good, the last word wins, and nothing that cannot be asked for."""

import json
import threading
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from storage.annotations import (
    AnnotationBatch,
    Annotations,
    FolderAnnotations,
    Statement,
    accept_batch,
    batch_from_csv,
    make_batch,
)
from storage.errors import BadAnnotation, BadName

INDEX = np.array([0, 1, 2, 5, 6, 9])
SECOND = 10**9
NOON = datetime(2026, 11, 3, 12, tzinfo=UTC)
# Frame 5 was taken before frame 2: two clocks, or two modules.
UTC_NS = np.array([0, 1, 3, 2, 4, 5]) * SECOND + int(NOON.timestamp()) * SECOND


@pytest.fixture
def annotations(tmp_path):
    return Annotations(FolderAnnotations(tmp_path))


def values(annotations, name="laser", data_sources=("eiger",)):
    return annotations.refreshed().column(name, data_sources, INDEX, UTC_NS).to_pylist()


T, F, N = True, False, None
WHERE = [
    ({"frames": 2}, [N, N, T, N, N, N]),
    ({"frames": 3}, [N, N, N, N, N, N]),
    ({"frames": [9, 0]}, [T, N, N, N, N, T]),
    ({"frames": np.array([9, 0])}, [T, N, N, N, N, T]),
    ({"frames": slice(1, 6)}, [N, T, T, T, N, N]),
    ({"frames": range(1, 6)}, [N, T, T, T, N, N]),
    ({"frames": slice(None)}, [T, T, T, T, T, T]),
    ({"start": 5}, [N, N, N, T, T, T]),
    ({"stop": 5}, [T, T, T, N, N, N]),
    ({"start": 1, "stop": 2}, [N, T, N, N, N, N]),
    ({"from_time": NOON + timedelta(seconds=2)}, [N, N, T, T, T, T]),
    ({"to_time": NOON + timedelta(seconds=3)}, [T, T, N, T, N, N]),
    ({"from_time": "2026-11-03T13:00:01+01:00", "to_time": "2026-11-03T12:00:03Z"}, [N, T, N, T, N, N]),
]


@pytest.mark.parametrize(("where", "expected"), WHERE, ids=[str(w)[:60] for w, _ in WHERE])
def test_where(annotations, where, expected):
    annotations.add(make_batch({"laser": True}, **where))
    assert values(annotations) == expected


def test_later_batches_win_and_none_takes_back(annotations):
    annotations.add(make_batch({"laser": True, "delay_ps": 3}, start=1, stop=9))
    annotations.add(make_batch({"laser": False}, frames=[2, 5]))
    annotations.add(make_batch({"laser": None}, frames=5))
    annotations.add(make_batch({"delay_ps": 1.5}, from_time=NOON + timedelta(seconds=4)))
    assert values(annotations) == [N, T, F, N, T, N]
    assert values(annotations, "delay_ps") == [N, 3.0, 3.0, 3.0, 1.5, 1.5]
    assert annotations.refreshed().names() == ["delay_ps", "laser"]


def test_the_history_keeps_everything(annotations):
    annotations.add(make_batch({"laser": True}, start=1, by="alice"))
    annotations.add(make_batch({"laser": [False, None]}, frames=[2, 5], data_source="eiger"))
    annotations.add(make_batch({"note": "ice"}, to_time=NOON))
    rows = annotations.refreshed().table().to_pylist()
    assert [(r["batch"], r["name"], r["start"], r["stop"], r["value"]) for r in rows] == [
        (1, "laser", 1, None, "true"),
        (2, "laser", 2, 3, "false"),
        (2, "laser", 5, 6, "null"),
        (3, "note", None, None, '"ice"'),
    ]
    assert [r["by"] == "alice" for r in rows] == [True, False, False, False]
    assert [r["data_source"] for r in rows] == [None, "eiger", "eiger", None]
    assert (rows[3]["from_time"], rows[3]["to_time"]) == (None, NOON)
    assert abs(rows[0]["at"] - datetime.now(UTC)) < timedelta(minutes=1)


def test_one_value_a_frame(annotations):
    annotations.add(make_batch({"x": [0.5, 1.5, 2.5], "well": ["A1", "A2", "B1"]}, frames=[9, 2, 4]))
    assert values(annotations, "x") == [N, N, 1.5, N, N, 0.5]
    assert values(annotations, "well") == [N, N, "A2", N, N, "A1"]


def test_data_sources_are_apart(annotations):
    annotations.add(make_batch({"laser": True}, frames=0))
    annotations.add(make_batch({"laser": True}, frames=1, data_source="eiger"))
    annotations.add(make_batch({"laser": True}, frames=2, data_source="jungfrau"))
    assert values(annotations) == [T, T, N, N, N, N]
    assert values(annotations, data_sources=("jungfrau",)) == [T, N, T, N, N, N]
    assert values(annotations, data_sources=("eiger.binned@p1", "eiger")) == [T, T, N, N, N, N]
    assert annotations.refreshed().names(["camera"]) == ["laser"]


def test_integers_stay_exact(annotations):
    annotations.add(make_batch({"pulse": 2**62 + 1}, frames=0))
    assert values(annotations, "pulse")[0] == 2**62 + 1


def test_a_batch_is_one_file_that_is_never_replaced(annotations, tmp_path):
    assert annotations.add(make_batch({"laser": True}, frames=0)) == 1
    before = (tmp_path / "annotations" / "000001.json").read_bytes()
    assert annotations.add(make_batch({"laser": False}, frames=0)) == 2
    assert (tmp_path / "annotations" / "000001.json").read_bytes() == before
    content = json.loads(before)
    assert content["statements"] == [{"name": "laser", "starts": [0], "values": [True], "stops": None}]
    assert content["key"] == "frame_index"


def test_many_writers_lose_nothing(tmp_path):
    def write(number):
        Annotations(FolderAnnotations(tmp_path)).add(make_batch({f"by_{number}": number}, frames=number))

    threads = [threading.Thread(target=write, args=[number]) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Annotations(FolderAnnotations(tmp_path)).refreshed()
    assert found.names() == sorted(f"by_{number}" for number in range(20))
    assert sorted(p.name for p in (tmp_path / "annotations").iterdir()) == [f"{n:06d}.json" for n in range(1, 21)]


def test_what_was_read_does_not_change(annotations):
    annotations.add(make_batch({"laser": True}, frames=0))
    before = annotations.refreshed()
    annotations.add(make_batch({"laser": False}, frames=0))
    assert before.column("laser", ["eiger"], INDEX).to_pylist()[0] is True
    assert before.refreshed().column("laser", ["eiger"], INDEX).to_pylist()[0] is False


REFUSED = [
    ({"laser": 1}, {}, "in one way"),
    ({"laser": 1}, {"frames": 1, "start": 2}, "in one way"),
    ({"laser": 1}, {"start": 1, "from_time": NOON}, "in one way"),
    ({}, {"frames": 1}, "nothing is said"),
    ({"2nd": 1}, {"frames": 1}, "cannot name an annotation"),
    ({"a b": 1}, {"frames": 1}, "cannot name an annotation"),
    ({"läser": 1}, {"frames": 1}, "cannot name an annotation"),
    ({"x" * 64: 1}, {"frames": 1}, "at most 63"),
    ({"x; DROP": 1}, {"frames": 1}, "cannot name an annotation"),
    ({"frame_index": 1}, {"frames": 1}, "choose another name"),
    ({"UTC": 1}, {"frames": 1}, "choose another name"),
    ({"results": 1}, {"frames": 1}, "choose another name"),
    ({"x": float("nan")}, {"frames": 1}, "finite number"),
    ({"x": float("inf")}, {"frames": 1}, "finite number"),
    ({"x": 2**63}, {"frames": 1}, "64 bits"),
    ({"x": {"a": 1}}, {"frames": 1}, "cannot be kept"),
    ({"x": b"a"}, {"frames": 1}, "cannot be kept"),
    ({"x": "a" * 1001}, {"frames": 1}, "at most 1000"),
    ({"x": [1, 2]}, {"frames": [1, 2, 3]}, "2 values for 3 frames"),
    ({"x": [1, 2]}, {"start": 1, "stop": 3}, "2 values for 1 frames or ranges"),
    ({"x": [1, "a"]}, {"frames": [1, 2]}, "numbers and text"),
    ({"x": [True, 1]}, {"frames": [1, 2]}, "numbers and true or false"),
    ({"x": 1}, {"frames": -1}, "not a frame index"),
    ({"x": 1}, {"frames": True}, "not a frame index"),
    ({"x": 1}, {"frames": [1.5]}, "not a frame index"),
    ({"x": 1}, {"frames": []}, "at least one"),
    ({"x": 1}, {"frames": slice(1, 9, 2)}, "steps of 2"),
    ({"x": 1}, {"start": 5, "stop": 5}, "is empty"),
    ({"x": 1}, {"start": 9, "stop": 5}, "is empty"),
    ({"x": 1}, {"frames": range(1_000_001), "stop": None}, None),
    ({"x": 1}, {"frames": np.arange(1_000_001)}, "more than 1000000"),
    ({"x": 1}, {"from_time": datetime(2026, 1, 1)}, "no time zone"),
    ({"x": 1}, {"from_time": "2026-01-01 10:00"}, "no time zone"),
    ({"x": 1}, {"from_time": "yesterday"}, "not a time"),
    ({"x": 1}, {"from_time": NOON, "to_time": NOON}, "is empty"),
    ({"x": 1}, {"from_time": datetime(2999, 1, 1, tzinfo=timezone(timedelta(hours=1)))}, "1678 and 2262"),
    ({f"x{i}": 1 for i in range(201)}, {"frames": 1}, "more than 200"),
    ({"x": 1}, {"frames": 1, "by": ""}, "who annotates"),
]


@pytest.mark.parametrize(
    ("said", "where", "words"), REFUSED, ids=[f"{str(s)[:30]} {str(w)[:40]}" for s, w, _ in REFUSED]
)
def test_refused(said, where, words):
    if words is None:  # a long range is one pair of numbers
        assert len(make_batch(said, **where).statements[0].values) == 1
        return
    with pytest.raises(BadAnnotation, match=words):
        make_batch(said, **where)


def test_data_source_must_be_a_name():
    with pytest.raises(BadName, match="data source"):
        make_batch({"x": 1}, frames=1, data_source="../x")


@pytest.mark.parametrize(
    ("second", "words"),
    [({"x": "text"}, "numbers and text"), ({"x": True}, "numbers and true or false"), ({"X": 2}, "the same spelling")],
    ids=str,
)
def test_one_name_one_kind(annotations, second, words):
    annotations.add(make_batch({"x": 1}, frames=1))
    with pytest.raises(BadAnnotation, match=words):
        annotations.add(make_batch(second, frames=2))
    annotations.add(make_batch({"x": 1.5}, frames=2))
    assert values(annotations, "x") == [N, 1.0, 1.5, N, N, N]


def test_two_kinds_from_two_machines_read_as_text(annotations, tmp_path):
    """Both looked before either wrote: no check can see it, so reading must bear it."""
    store = FolderAnnotations(tmp_path)
    for frame, value in enumerate([1, "a", True]):
        statements = [Statement("x", [frame], [value])]
        store.append(AnnotationBatch(at=NOON, by="me", key="frame_index", statements=statements).encode())
    assert values(annotations, "x") == ["1", "a", "true", N, N, N]


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b'{"at": "2026-01-01T00:00:00Z"}',
    b'{"at":"2026-01-01T00:00:00Z","by":"x","key":"pulse","statements":[]}',
    *(
        b'{"at":"2026-01-01T00:00:00Z","by":"x","key":"utc_ns","statements":[{"name":"x",' + statement + b"}]}"
        for statement in (
            b'"starts":[1,2],"values":[1]',
            b'"starts":[1],"stops":[],"values":[1]',
            b'"starts":[1e99],"values":[1]',
            b'"starts":[99999999999999999999],"values":[1]',
            b'"starts":[1],"values":[[1]]',
        )
    ),
    b"\xff\xfe",
]


@pytest.mark.parametrize("content", DAMAGED, ids=[str(c[-30:]) for c in DAMAGED])
def test_a_damaged_batch_is_named(annotations, tmp_path, content):
    annotations.add(make_batch({"x": 1}, frames=1))
    (tmp_path / "annotations" / "000002.json").write_bytes(content)
    with pytest.raises(BadAnnotation, match=r"annotations/000002\.json .*damaged.* restore"):
        annotations.refreshed()


def test_a_batch_from_elsewhere_is_accepted_as_it_was_made():
    batch = make_batch({"laser": True, "x": [1.5]}, frames=[3], data_source="eiger", by="alice")
    assert accept_batch(batch.encode()) == batch


HOSTILE = {
    "name": {"name": "x; DROP TABLE y"},
    "reserved": {"name": "frame_index"},
    "huge number": {"values": [2**80]},
    "mixed": {"starts": [1, 2], "values": [1, "a"]},
    "long text": {"values": ["a" * 5000]},
    "nested": {"values": [{"a": 1}]},
    "empty range": {"stops": [1]},
    "backwards": {"stops": [-5]},
    "lengths": {"starts": [1, 2, 3]},
    "path": {"data_source": "../../etc"},
    "nobody": {"by": ""},
    "key": {"key": "pulse"},
    "many": {"starts": list(range(1_000_001)), "values": [1] * 1_000_001},
    "names": {"statements": [{"name": f"x{i}", "starts": [1], "values": [1]} for i in range(300)]},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_batch_from_elsewhere_is_refused(change):
    content = json.loads(make_batch({"x": 1}, frames=[1]).encode())
    place = content if set(change) & set(content) else content["statements"][0]
    place.update(change)
    with pytest.raises((BadAnnotation, BadName)):
        accept_batch(json.dumps(content).encode())


@pytest.mark.parametrize("content", DAMAGED, ids=[str(c[-30:]) for c in DAMAGED])
def test_bytes_that_are_no_batch_are_refused(content):
    with pytest.raises(BadAnnotation, match="no batch of annotations"):
        accept_batch(content)


def test_too_large_a_batch_is_refused_before_it_is_read():
    with pytest.raises(BadAnnotation, match="more than"):
        accept_batch(b" " * ((64 << 20) + 1))


def test_a_batch_sent_again_is_kept_once(tmp_path):
    store = FolderAnnotations(tmp_path)
    first, second = (make_batch({"x": n}, frames=n).encode() for n in (1, 2))
    assert [store.append(batch) for batch in (first, second, first, second)] == [1, 2, 1, 2]
    assert store.read_all(1) == [(2, second)]
    assert (store.numbers(), store.numbers(1), store.read(1)) == ([1, 2], [2], first)


def test_fields_of_a_newer_version_are_left_alone(annotations, tmp_path):
    number = annotations.add(make_batch({"x": 1}, frames=1))
    path = tmp_path / "annotations" / f"{number:06d}.json"
    path.write_bytes(json.dumps(json.loads(path.read_bytes()) | {"mood": "good"}).encode())
    assert values(annotations, "x") == [N, 1, N, N, N, N]


def test_csv():
    batch = batch_from_csv("frame_index, laser, delay_ps, note\n0,TRUE,3,a\n\n5,,1.5,\n9,false,,b\n", by="me")
    assert {s.name: (s.starts, s.values) for s in batch.statements} == {
        "laser": ([0, 9], [True, False]),
        "delay_ps": ([0, 5], [3.0, 1.5]),
        "note": ([0, 9], ["a", "b"]),
    }
    assert (batch.key, batch.by) == ("frame_index", "me")


def test_csv_of_ranges_and_of_times(annotations):
    annotations.add(batch_from_csv("stop,laser,start\n3,true,1\n10,false,6\n"))
    assert values(annotations) == [N, T, T, N, F, F]
    annotations.add(batch_from_csv("from,to,laser\n2026-11-03T12:00:04Z,,true\n"))
    assert values(annotations) == [N, T, T, N, T, T]


BAD_TABLES = [
    ("", "frame_index"),
    ("laser\ntrue\n", "column frame_index"),
    ("frame_index\n1\n", "says nothing"),
    ("frame_index,laser\n1,\n", "says nothing"),
    ("frame_index,laser,laser\n1,true,true\n", "two columns"),
    ("frame_index,laser\n1\n", "line 2 has 1 cells for 2"),
    ("frame_index,laser\n1,true\n\nx,true\n", "line 4: frame_index is 'x'"),
    ("frame_index,laser\n-1,true\n", "not a frame index"),
    ("frame_index,a b\n1,true\n", "cannot name an annotation"),
    ("from,to,x\nnoon,,1\n", "not a time"),
    ("start,stop,x\n5,5,1\n", "is empty"),
    ("frame_index,x\n1," + "a" * 200_000, "cannot be read"),
    ("frame_index,x\n1," + "a" * 2000, "at most 1000"),
]


@pytest.mark.parametrize(("text", "words"), BAD_TABLES, ids=[t[:30] for t, _ in BAD_TABLES])
def test_bad_csv(text, words):
    with pytest.raises(BadAnnotation, match=words):
        batch_from_csv(text)


def test_a_million_values_at_once(annotations):
    n = 500_000
    annotations.add(make_batch({"delay": np.arange(n) / 10}, frames=np.arange(n)))
    column = annotations.refreshed().column("delay", ["eiger"], np.arange(n))
    assert column.to_numpy()[-1] == (n - 1) / 10
