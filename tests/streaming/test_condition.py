"""One condition and nothing else: what is allowed works, all else is refused before anything runs."""

import os
import subprocess
import sys
import time

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from storage.errors import BadQuery
from streaming.condition import FUNCTIONS, Condition

TIMES = pa.array([1767225600_000000, 1767225661_500000, None], pa.timestamp("us", tz="UTC"))
TABLE = pa.table(
    {
        "n": pa.array([1, 25, None], pa.int64()),
        "x": pa.array([0.5, -1.5, 2.0]),
        "flag": pa.array([True, None, False]),
        "text": pa.array(["ice", "Salt ring", None]),
        "meta": pa.array(['{"a":{"b":1},"c":"x"}', "{}", '{"a":{"b":3}}']),
        "utc": TIMES,
        "never": pa.nulls(3),
        'odd "name': pa.array([1, 2, 3]),
    }
)


def matches(text, time_limit_s=20.0):
    condition = Condition(text)
    try:
        names = {ref: ref[-1] for ref in condition.columns}
        return condition.matches(TABLE, names, time_limit_s=time_limit_s).tolist()
    finally:
        condition.close()


ALLOWED = [
    ("n > 20", [1]),
    ("n > 20 AND flag", []),
    ("n > 0 OR NOT flag", [0, 1, 2]),
    ("flag", [0]),
    ("NOT flag", [2]),
    ("flag IS NOT TRUE", [1, 2]),
    ("flag IS NULL", [1]),
    ("n IS DISTINCT FROM 1", [1, 2]),
    ("x BETWEEN -2 AND 0.5", [0, 1]),
    ("x NOT BETWEEN -2 AND 0.5", [2]),
    ("n IN (1, 2, 3)", [0]),
    ("n NOT IN (1, 2, 3)", [1]),
    ("n % 2 = 1 AND abs(x) + 1 > 1", [0, 1]),
    ("coalesce(n, 0) = 0", [2]),
    ("CASE WHEN n > 1 THEN x ELSE 0 END < 0", [1]),
    ("CAST(n AS DOUBLE) / 2 > 1.5", [1]),
    ("TRY_CAST(text AS INTEGER) IS NULL", [0, 1, 2]),
    ("text LIKE 'Salt%'", [1]),
    ("text ILIKE '%ICE%'", [0]),
    ("text NOT LIKE 'i%'", [1]),
    ("regexp_matches(text, 'r.ng$')", [1]),
    ("text SIMILAR TO 'i.e'", [0]),
    ("starts_with(lower(text), 'salt') AND length(text) = 9", [1]),
    ("text || '!' = 'ice!'", [0]),
    ("meta->>'$.a.b' = '3'", [2]),
    ("(meta->>'$.a.b')::int > 1", [2]),
    ("json_extract_string(meta, 'c') = 'x'", [0]),
    ("utc >= '2026-01-01T00:01:00Z'", [1]),
    ("utc < TIMESTAMPTZ '2026-01-01T01:01:00+01:00'", [0]),
    ("extract(minute FROM utc) = 1 AND utc - INTERVAL 1 minute > '2026-01-01'", [1]),
    ("never > 3 OR never = 'text' OR never", []),
    ("never IS NULL", [0, 1, 2]),
    ('"odd ""name" = 2', [1]),
    ("sqrt(greatest(x, 0)) > 1 -- a comment", [2]),
    ("n /* inside */ = 1", [0]),
    ("n = 1) OR (n = 25", [0, 1]),
    ("true", [0, 1, 2]),
    ("1 = 0", []),
    ("NULL", []),
    # What is not part of the condition is not run: only the condition is printed anew.
    ("n = 1) WINDOW w AS (ORDER BY n", [0]),
    ("n = 1 --", [0]),
    # Not-a-number that a calculation makes is larger than every number, as DuckDB orders them.
    ("sqrt(x) > 5", [1]),
]


@pytest.mark.parametrize(("text", "expected"), ALLOWED, ids=[text for text, _ in ALLOWED])
def test_allowed(text, expected):
    assert matches(text) == expected


SECRET = "/etc/passwd"
REFUSED = [
    # more than a condition
    "",
    "   ",
    "n >",
    "n = 1; SELECT 2",
    "1=1; ATTACH 'stolen.db'",
    "1=1); ATTACH 'stolen.db' AS x; SELECT (1",
    "1=1); DROP TABLE frames_to_judge; SELECT 1 WHERE (1=1",
    "1=1); COPY (SELECT 1) TO 'stolen.csv'; SELECT 1 WHERE (1=1",
    "1=1); INSTALL httpfs; SELECT 1 WHERE (1=1",
    "1=1); LOAD httpfs; SELECT 1 WHERE (1=1",
    "1=1); SET enable_external_access=true; SELECT 1 WHERE (1=1",
    "1=1); PRAGMA version; SELECT 1 WHERE (1=1",
    "1=1); CREATE TABLE t AS SELECT 1 WHERE (1=1",
    "1=1); CALL pragma_version(); SELECT 1 WHERE (1=1",
    "1=1); EXPORT DATABASE 'stolen'; SELECT 1 WHERE (1=1",
    "1=1); SELECT 1 WHERE (1=1",
    f"1=1) UNION ALL SELECT * FROM read_text('{SECRET}') WHERE (1=1",
    "1=1) LIMIT (1",
    "1=1) ORDER BY (1",
    "1=1) GROUP BY (n",
    "1=1) HAVING (n > 1",
    "1=1) QUALIFY (n > 1",
    "1=1) INTERSECT (SELECT 1",
    "1=1) --",
    "1=1 /*",
    "n AS m",
    "n, x",
    "n > 1 USING SAMPLE 1",
    "COPY n TO 'stolen.csv'",
    "ATTACH 'stolen.db'",
    "$1",
    "n = $1",
    "n = ?",
    "n = :name",
    # looking elsewhere
    "(SELECT 1)",
    "n IN (SELECT 1)",
    "n = ANY([1, 2])",
    "n > ALL(SELECT 1)",
    "EXISTS (SELECT 1)",
    f"EXISTS (SELECT * FROM read_csv('{SECRET}'))",
    f"EXISTS (SELECT * FROM '{SECRET}')",
    f"EXISTS (FROM read_blob('{SECRET}'))",
    "EXISTS (SELECT * FROM duckdb_settings())",
    "EXISTS (WITH s AS (SELECT 1) SELECT * FROM s)",
    f"read_text('{SECRET}') = 'x'",
    f"read_csv('{SECRET}') = 'x'",
    "glob('*') = 'x'",
    "query('SELECT 1') = 1",
    "query_table('frames_to_judge') = 1",
    # functions that are none of pure arithmetic
    "getenv('HOME') = 'x'",
    "current_setting('temp_directory') = 'x'",
    "getvariable('x') = 1",
    "version() = 'x'",
    "current_database() = 'x'",
    "now() > utc",
    "random() > 0.5",
    "uuid() = 'x'",
    "setseed(0.5) IS NULL",
    "nextval('s') = 1",
    "sleep_ms(100000) = 1",
    "pg_sleep(100) = 1",
    "write_log('x') IS NULL",
    "error('x')",
    "json_serialize_sql('SELECT 1') = 'x'",
    "json_execute_serialized_sql('x') = 'x'",
    "main.abs(n) = 1",
    "system.main.abs(n) = 1",
    "abs(DISTINCT n) = 1",
    "sum(n) > 1",
    "count(*) > 1",
    "sum(n) FILTER (n > 1) > 1",
    "row_number() OVER () = 1",
    "n = lag(n) OVER (ORDER BY n)",
    # little into large
    "length(repeat('x', 1000000000)) > 1",
    "lpad('x', 1000000000, 'x') = 'x'",
    "replace(text, 'a', 'aaaaaaaaaa') = 'x'",
    "list_contains(range(1000000000), n)",
    "[1] = [1]",
    "list_transform([1], y -> y) = [1]",
    "{'a': n} IS NULL",
    "MAP {'a': n} IS NULL",
    "text[1] = 'i'",
    "text[1:2] = 'ic'",
    "meta->'a' = 1",
    "unnest([1, 2]) = 1",
    # other names for things
    "*",
    "COLUMNS(*) > 1",
    "COLUMNS('n') > 1",
    "n::blob = 'x'",
    "n::json IS NULL",
    "n::main.int = 1",
    "'frames_to_judge'::regclass = 1",
    "n::STRUCT(a INT) IS NULL",
    "n::int[] IS NULL",
    "text COLLATE nocase = 'ice'",
    "GROUPING(n) = 1",
    "DEFAULT = 1",
    # too much, or not text
    "(" * 300 + "1" + ")" * 300,
    "NOT " * 300 + "flag",
    "1" + " + 1" * 300 + " > n",
    "abs(" * 300 + "n" + ")" * 300 + " > 1",
    "n > 1 OR " * 2000 + "n > 1",
    "n = 'a\0b'",
    "n = '\x1b[31m'",
    "n = '\ud800'",
    "n\u202e = 1",
    "'",
    '"',
    "n = 'a",
    "\\",
    "🧿 🧿",
]


@pytest.mark.parametrize("text", REFUSED, ids=[repr(text[:60]) for text in REFUSED])
def test_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(BadQuery, match=r"condition") as refusal:
        matches(text)
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []
    if text.strip() and len(text) < 100 and text.isprintable():
        assert repr(text) in str(refusal.value), "the message repeats the condition"


@pytest.mark.parametrize("text", [None, 7, b"n > 1", ["n > 1"]], ids=str)
def test_what_is_no_text(text):
    with pytest.raises(BadQuery, match="is not a condition"):
        Condition(text)


FAILING = [
    ("n = 'many'", "Could not convert string 'many'"),
    ("meta->>'$.a.b' > 0", "explicit cast is required"),
    ("n % 0 = 1", "Division by zero"),
    ("text", "Could not convert string"),
    ("abs(text) > 1", "No function matches"),
    ("utc > 'yesterday'", "invalid timestamp"),
]


@pytest.mark.parametrize(("text", "words"), FAILING, ids=[text for text, _ in FAILING])
def test_what_fails_says_so_in_a_sentence(text, words):
    with pytest.raises(BadQuery, match=f"(?i){words}") as failure:
        matches(text)
    assert "\n" not in str(failure.value)
    assert "frames_to_judge" not in str(failure.value)


def test_time_is_limited():
    rows = pa.table({"s": pa.array(np.arange(3_000_000)).cast(pa.string())})
    condition = Condition("regexp_matches(s || s || s || s || s, '(a|b|1*2*3*4*)*z') OR sqrt(length(s)) > 99")
    started = time.monotonic()
    with pytest.raises(BadQuery, match=r"took more than 0\.2 s"):
        condition.matches(rows, {("s",): "s"}, time_limit_s=0.2)
    assert time.monotonic() - started < 3
    assert condition.matches(rows.slice(0, 10), {("s",): "s"}, time_limit_s=20).tolist() == []


def test_the_engine_has_no_way_out():
    """Behind the check of the text there is a second wall: the connection itself."""
    engine = Condition("true")._engine
    for text in (
        f"SELECT * FROM read_text('{SECRET}')",
        f"FROM '{SECRET}'",
        "COPY (SELECT 1) TO 'stolen.csv'",
        "ATTACH 'stolen.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET memory_limit = '1TB'",
        "SET lock_configuration = false",
        "SELECT * FROM TABLE_OF_THIS_FUNCTION",
    ):
        with pytest.raises(duckdb.Error):
            engine.execute(text)


TABLE_OF_THIS_FUNCTION = pa.table({"a": [1]})


def test_every_function_offered_exists():
    known = {name for (name,) in duckdb.connect().execute("SELECT function_name FROM duckdb_functions()").fetchall()}
    assert known >= FUNCTIONS


DEEP = {
    "brackets": "(" * 9000,
    "not": "NOT " * 2400 + "x",
    "lists": "[" * 9000,
    "cases": "CASE WHEN " * 900,
    "signs": "- " * 4500 + "1",
    "casts": "x" + "::int" * 1900,
    "dots": "x." * 4000 + "x",
    "sums": "1" + "+1" * 4500,
    "ors": "x or " * 1900 + "x",
    "calls": "abs(" * 90 + "x" + ")" * 90,
    "quotes": "'" * 9999,
}


def test_deep_conditions_neither_end_the_process_nor_hold_it_up():
    script = f"""
import time
from storage.errors import BadQuery
from streaming.condition import Condition
for name, text in {DEEP!r}.items():
    started = time.monotonic()
    try:
        Condition(text).close()
    except BadQuery as error:
        assert len(str(error)) < 600, error
    print(name, time.monotonic() - started < 5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for name in DEEP for word in (name, "True")]
