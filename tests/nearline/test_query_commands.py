"""`nearline annotate` and `nearline query` on a bare folder: what they print, keep and refuse."""

import csv
import io
import json

import pytest
from typer.testing import CliRunner

from nearline import queries
from nearline.cli import app
from storage.errors import NearlineError

from ..storage.stores import new_store, put


@pytest.fixture
def run(tmp_path):
    """A finished run of six frames, frame 3 missing; metadata ``delay`` is a tenth of the index."""
    store = new_store(tmp_path)
    put(store, 0, 1, 2, 4, 5)
    store.finish(6, "not received")
    store.close()
    return str(store.folder.path)


def nearline(*arguments):
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def rows(run, condition, *options):
    done = nearline("query", run, condition, "--json", *options)
    return json.loads(done.stdout)


def test_annotate_then_query(run):
    done = nearline("annotate", run, "laser=true", "delay_ps=3", "--frames", "1:5")
    assert "batch 1 of lyso/1" in done.stdout
    assert json.loads(nearline("annotate", run, "laser=false", "--frames", "4", "--json").stdout) == {"batch": 2}
    assert rows(run, "laser AND delay > 0.1") == {
        "condition": "laser AND delay > 0.1",
        "matching": 1,
        "considered": 5,
        "rows": [{"frame_index": 2, "laser": True, "delay": 0.2}],
    }


def test_a_table_on_the_screen(run):
    shown = nearline("query", run, "delay >= 0.1", "--columns", "delay, meta", "--limit", "2").stdout
    assert "frame_index" in shown
    assert '{"delay":0.1}' in shown
    assert "0.4" not in shown
    assert "4 of 5 frames match; the first 2 are shown, --limit shows more" in shown
    assert nearline("query", run, "delay > 9").stdout == "0 of 5 frames match\n"


def test_csv_for_a_spreadsheet(run):
    text = nearline("query", run, "delay > 0.1", "--csv", "--columns", "delay,digest,utc", "--limit", "1").stdout
    header, row = csv.reader(io.StringIO(text))
    assert header == ["frame_index", "delay", "digest", "utc"]
    assert row[:2] == ["2", "0.2"]
    assert len(row[2]) == 32
    assert row[3].startswith("1970-01-01T00:00:00")


def test_columns_without_a_condition(run):
    shown = nearline("query", run).stdout
    assert "results." in shown
    assert "delay" in shown
    found = json.loads(nearline("query", run, "--json").stdout)
    assert (found["meta"], found["results"]) == (["delay"], [])


def test_tables_and_times(run, tmp_path):
    table = tmp_path / "laser.csv"
    table.write_text("\ufeffframe_index,well,x_um\n0,A1,1.5\n5,B2,\n", encoding="utf-8")
    nearline("annotate", run, "--csv", str(table), "--source", "eiger", "--by", "alice")
    nearline("annotate", run, "note=an ice ring", "--from", "1960-01-01T00:00:00Z", "--to", "1980-01-01T00:00:00+01:00")
    assert rows(run, "well IN ('A1', 'B2')", "--columns", "well,x_um,note")["rows"] == [
        {"frame_index": 0, "well": "A1", "x_um": 1.5, "note": "an ice ring"},
        {"frame_index": 5, "well": "B2", "x_um": None, "note": "an ice ring"},
    ]


def test_list(run):
    assert "nothing is annotated in lyso/1" in nearline("annotate", run, "--list").stdout
    nearline("annotate", run, "laser=true", "--frames", "3:", "--by", "alice")
    nearline("annotate", run, "laser=null", "x=-1.5e3", "--frames", "1,5", "--source", "eiger")
    nearline("annotate", run, "laser=true", "--to", "2030-01-01T00:00:00Z")
    shown = nearline("annotate", run, "--list").stdout
    for words in ("alice", "3:", "null", "-1500.0", "2030-01-01", "eiger", "all"):
        assert words in shown
    listed = json.loads(nearline("annotate", run, "--list", "--json").stdout)
    assert [(row["batch"], row["name"], row["start"], row["value"]) for row in listed] == [
        (1, "laser", 3, True),
        (2, "laser", 1, None),
        (2, "laser", 5, None),
        (2, "x", 1, -1500.0),
        (2, "x", 5, -1500.0),
        (3, "laser", None, True),
    ]


USAGE = [
    (["laser"], "NAME=VALUE"),
    (["laser=1", "--frames", "1-5"], "START:STOP"),
    (["laser=1", "--frames", "a:b"], "START:STOP"),
    (["laser=1", "--csv", "TABLE"], "brings frames, names and values"),
    (["--csv", "TABLE", "--frames", "1"], "brings frames, names and values"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE, ids=[" ".join(a) for a, _ in USAGE])
def test_usage(run, tmp_path, arguments, words):
    (tmp_path / "TABLE").write_text("frame_index,x\n1,1\n")
    done = nearline("annotate", run, *[str(tmp_path / a) if a == "TABLE" else a for a in arguments])
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


ERRORS = [
    (["annotate", "laser=1"], "in one way"),
    (["annotate", "--frames", "1"], "nothing is said"),
    (["annotate", "2x=1", "--frames", "1"], "cannot name an annotation"),
    (["annotate", "x=1", "--from", "noon"], "not a time"),
    (["annotate", "x=1", "--frames", "1", "--source", "camera"], "it has: eiger"),
    (["query", "dleay > 1"], "did you mean meta.delay"),
    (["query", "delay > 1; DROP TABLE x"], "syntax error"),
    (["query", "delay > 1", "--columns", "nothing"], "no column 'nothing'"),
    (["query", "delay > 1", "--processing", "p7"], "no processing 'p7'"),
]


@pytest.mark.parametrize(("arguments", "words"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_errors(run, arguments, words):
    with pytest.raises(NearlineError, match=words):
        nearline(arguments[0], run, *arguments[1:])


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("False", False), ("null", None), ("3", 3), ("-3", -3), ("1e3", 1000.0), (".5", 0.5), ("A1", "A1"),
     ("", ""), ("nan", "nan"), ("1e999999", "1e999999"), ("a=b", "a=b"), ("9" * 19, float("9" * 19))],
)  # fmt: skip
def test_values(text, value):
    read = queries.read_values([f"x={text}"])["x"]
    assert (type(read), read) == (type(value), value)
