"""`nearline groups`, `nearline dead-letters`, `nearline start-run`: what they show, change and refuse."""

import json

import pytest
import typer
from typer.testing import CliRunner

from nearline.cli import app
from nearline.group_commands import read_frames
from storage.errors import BadName, GroupNeedsService
from streaming.retrieval import open_run

from ..streaming.harness import record_run, serving


@pytest.fixture
def address(tmp_path, monkeypatch):
    with serving(tmp_path) as service:
        monkeypatch.setenv("NEARLINE_SERVICE", service.address)
        record_run(service.address, range(10))
        yield service.address


@pytest.fixture
def stream(address):
    return open_run(f"{address}/lyso/1")["eiger"]


def nearline(*arguments, **options):
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"}, **options)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def as_json(*arguments):
    return json.loads(nearline(*arguments, "--json").stdout)


def spoil(stream, *indices, group="mine"):
    """A group that has done everything but these frames, which became dead letters."""
    for frame in stream.follow(group, max_deliveries=2, timeout=5):
        if frame.frame_index in indices:
            frame.retry_later()


def test_groups_are_listed(stream):
    spoil(stream, 3, 7)
    found = as_json("groups", "list", "lyso/1")
    assert {key: found["mine"][key] for key in ("cursor", "lag", "n_unacknowledged", "n_dead_letters")} == {
        "cursor": 10, "lag": 0, "n_unacknowledged": 0, "n_dead_letters": 2,
    }  # fmt: skip
    follower = stream.follow("busy", lease_s=30)
    next(follower)
    shown = nearline("groups", "list", "lyso/1", "--source", "eiger").stdout
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in _rows(shown)}
    follower.close()
    assert rows == {"busy": ["1", "10", "1", "1", "0", "0"], "mine": ["10", "0", "0", "0", "2", "0"]}


def _rows(shown):
    return [line for line in shown.splitlines() if line.startswith("│")]


def test_nothing_to_show(address):
    assert "lyso/1/eiger has no consumer groups" in nearline("groups", "list", "lyso/1").stdout
    assert "lyso/1/eiger has no dead letters" in nearline("dead-letters", "list", "lyso/1").stdout


def test_dead_letters_are_shown_retried_and_dropped(stream):
    spoil(stream, 1, 3, 7)
    rows = as_json("dead-letters", "list", "lyso/1", "--group", "mine", "--frames", "0-4")
    assert [(row["group"], row["frame_index"], row["delivery"]) for row in rows] == [("mine", 1, 2), ("mine", 3, 2)]
    assert as_json("dead-letters", "retry", "lyso/1", "--group", "mine", "--frames", "3-4")["frames"] == [3]
    assert [frame.frame_index for frame in stream.follow("mine", timeout=5)] == [3]
    shown = nearline("dead-letters", "drop", "lyso/1", "--group", "mine", "--frames", "1,2")
    assert shown.stdout == "1 frames are given up in group mine; 1 of those named were no dead letters\n"
    assert as_json("dead-letters", "drop", "lyso/1", "--group", "mine")["frames"] == [7]
    assert as_json("dead-letters", "list", "lyso/1") == []
    assert list(stream.follow("mine", timeout=5)) == []


@pytest.mark.parametrize(("to", "left"), [("start", range(10)), ("6", range(6, 10)), ("end", range(0))])
def test_seek(stream, to, left):
    spoil(stream)
    said = nearline("groups", "seek", "lyso/1", "--group", "mine", "--to", to, "--yes").stdout
    assert said == f"group mine goes on at frame {10 - len(left)}\n"
    assert [frame.frame_index for frame in stream.follow("mine", timeout=5)] == list(left)


def test_seek_asks_first(stream):
    spoil(stream)
    no = nearline("groups", "seek", "lyso/1", "--group", "mine", "--to", "2", input="n\n")
    assert (no.exit_code, stream.groups["mine"]["cursor"]) == (1, 10)
    assert "is at frame 10; go to 2, that is, back: what lies between is delivered again?" in no.output
    assert nearline("groups", "seek", "lyso/1", "--group", "mine", "--to", "2", input="y\n").exit_code == 0
    assert stream.groups["mine"]["cursor"] == 2


WRONG = {
    "seek far": (["groups", "seek", "lyso/1", "--group", "mine", "--to", "11"], "a frame index of 0 to 10"),
    "seek word": (["groups", "seek", "lyso/1", "--group", "mine", "--to", "-1"], "a frame index of 0 to 10"),
    "no such group": (["groups", "seek", "lyso/1", "--group", "yours", "--to", "0"], "no group 'yours'; it has: mine"),
    "drop of nobody": (["dead-letters", "drop", "lyso/1", "--group", "yours"], "no group 'yours'; it has: mine"),
    "no group named": (["dead-letters", "drop", "lyso/1"], "--group"),
    "frames": (["dead-letters", "retry", "lyso/1", "--group", "mine", "--frames", "9-5"], "such as 1,5-9"),
}


def test_what_makes_no_sense_is_refused(stream):
    spoil(stream, 3)
    for name, (arguments, why) in WRONG.items():
        done = nearline(*arguments)
        assert done.exit_code == 2, name
        assert why in " ".join(done.output.replace("│", " ").split()), name
    assert stream.groups["mine"]["n_dead_letters"] == 1


def test_a_folder_has_no_groups(stream):
    with pytest.raises(GroupNeedsService, match="nearline serve"):
        nearline("groups", "list", str(stream.run.folder))


@pytest.mark.parametrize(("text", "frames"), [("1,5-9", [1, 5, 6, 7, 8, 9]), ("4", [4]), ("2-2, 0", [2, 0])])
def test_frames_option(text, frames):
    assert read_frames(text) == frames


@pytest.mark.parametrize("text", ["", "a", "5-", "9-5", "-1", "1,,2", "0-9999999999", "1:5"])
def test_frames_option_that_is_none(text):
    with pytest.raises(typer.BadParameter, match=r"such as 1,5-9"):
        read_frames(text)


def test_a_run_is_opened_and_stopped(address):
    assert nearline("start-run", "lyso", "--sample", "insulin").stdout == "lyso/2\n"
    with pytest.raises(BadName, match="run lyso/2 is open"):
        nearline("start-run", "lyso")
    opened = open_run(f"{address}/lyso/2")
    assert (opened.header.sample, opened.state) == ("insulin", "live")
    assert as_json("stop-run", "lyso/2", "--aborted", "beam lost") == {"run": "lyso/2", "state": "aborted"}
    assert opened.events("run_finished")[0].payload["cause"] == "beam lost"
    assert as_json("start-run", "lyso", "--run", "7") == {"experiment": "lyso", "run": 7}
