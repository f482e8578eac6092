"""One SQL condition over a table in memory, with nothing else in its reach.

DuckDB parses the text; only what is known to be harmless is let through, by name: comparisons, logic,
arithmetic, and functions whose answer depends on their arguments alone. What runs is printed
anew from the checked tree, never the text that came, on a connection that can open no file, no
network and no extension, and under limits of memory and time.
"""

import difflib
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from storage.errors import BadQuery

__all__ = ["FUNCTIONS", "ColumnRef", "Condition"]

ColumnRef = tuple[str, ...]

_LONGEST = 10_000
_DEEPEST = 100
_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
    "temp_directory": "",
    "memory_limit": "512MB",
    "threads": "2",
    # Far more than people write, far less than what exhausts a stack.
    "max_expression_depth": "200",
}

_SIGNS = "+ - * / // % ** ^ & | << >> ~ xor @ || ->> ~~ !~~ ~~* !~~* ~~~ ^@"
# Left out on purpose: all that read settings, clocks, files or random numbers, that sleep or log, and those that make
# large values of small ones (repeat, lpad, replace, range, lists), since no limit of memory holds for a string.
_NAMES = """
    abs sign round trunc floor ceil ceiling sqrt cbrt exp ln log log2 log10 pow power mod fmod fdiv divide add subtract
    multiply sin cos tan asin acos atan atan2 sinh cosh tanh degrees radians pi
    isnan isfinite isinf greatest least nullif if bit_count even
    lower upper lcase ucase length strlen len trim ltrim rtrim left right substr substring strpos instr position
    contains starts_with ends_with prefix suffix like_escape ilike_escape not_like_escape not_ilike_escape
    regexp_matches regexp_full_match regexp_extract levenshtein hex
    json_extract json_extract_string json_extract_path json_extract_path_text json_value json_type json_array_length
    json_contains json_exists
    year month day hour minute second millisecond microsecond quarter week weekday dayofweek dayofyear isodow
    epoch epoch_ms epoch_us epoch_ns date_part datepart date_trunc datetrunc date_diff datediff
    to_seconds to_minutes to_hours to_days to_milliseconds to_microseconds make_timestamp to_timestamp
"""
_TYPE_NAMES = """
    boolean bool tinyint smallint integer int bigint hugeint utinyint usmallint uinteger ubigint uhugeint float real
    double decimal numeric varchar text string char date time timestamp timestamptz interval
"""
_COMPARISONS = """
    equal notequal lessthan greaterthan lessthanorequalto greaterthanorequalto distinct_from not_distinct_from
"""
FUNCTIONS = frozenset(_NAMES.split())
_OPERATORS = frozenset(_SIGNS.split())
_TYPES = frozenset({*_TYPE_NAMES.upper().split(), "TIMESTAMP WITH TIME ZONE"})
# Kinds of expressions in DuckDB's tree, and what each may be; what is not here is refused, as is all that is new.
_ALLOWED = {
    "COLUMN_REF": {"COLUMN_REF"},
    "CONSTANT": {"VALUE_CONSTANT"},
    "COMPARISON": {f"COMPARE_{name.upper()}" for name in _COMPARISONS.split()},
    "CONJUNCTION": {"CONJUNCTION_AND", "CONJUNCTION_OR"},
    "BETWEEN": {"COMPARE_BETWEEN", "COMPARE_NOT_BETWEEN"},
    "CASE": {"CASE_EXPR"},
    "CAST": {"OPERATOR_CAST"},
    "TYPE": {"TYPE"},
    "FUNCTION": {"FUNCTION"},
    "OPERATOR": {
        "OPERATOR_NOT",
        "OPERATOR_IS_NULL",
        "OPERATOR_IS_NOT_NULL",
        "OPERATOR_COALESCE",
        "OPERATOR_NULLIF",
        "OPERATOR_TRY",
        "COMPARE_IN",
        "COMPARE_NOT_IN",
    },
}
_HINTS = {
    "SUBQUERY": "a subquery; a condition sees the columns of one frame only (for lists write x IN (1, 2))",
    "LAMBDA": "-> ; to look into JSON write meta->>'$.key.other'",
    "STAR": "*; name the columns",
    "WINDOW": "a window over frames; a condition sees one frame at a time",
    "PARAMETER": "a placeholder; write the value",
    "COLLATE": "COLLATE; use lower()",
}
_TABLE = "frames_to_judge"
_POSITION = "position_of_frame"


class Condition:
    """A condition such as ``n_peaks > 20 AND laser``, parsed and found harmless. For one thread at a time.

    Raises
    ------
    BadQuery : it is not one SQL condition, or uses what a condition may not use.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise BadQuery(f"{text!r} is not a condition; write one such as n_peaks > 20 AND laser")
        self.text = text
        if len(text) > _LONGEST or not "".join(text.split()).isprintable():
            raise self.refused(
                f"of {len(text)} characters is longer than {_LONGEST}, or has characters that cannot be printed; "
                "write a shorter one, or annotate the frames and ask for that"
            )
        # DuckDB refuses deep nesting itself, but needs a minute for a thousand brackets that are never closed.
        if _depth(text) > _DEEPEST:
            raise self.refused(f"is nested deeper than {_DEEPEST} brackets; write it flatter")
        self._engine = _connect()
        self._select = self._parse()
        self.columns = list(dict.fromkeys(self._references()))

    def matches(self, table: pa.Table, names: Mapping[ColumnRef, str], *, time_limit_s: float) -> np.ndarray:
        """Positions of the rows for which the condition is true, rising, int64; NULL counts as false.

        Parameters
        ----------
        names : column of ``table`` for each of ``columns``.
        time_limit_s : it is interrupted after so many seconds.

        Raises
        ------
        BadQuery : types that cannot be compared, a value that cannot be converted, too much time or memory.
        """
        positions = pa.array(np.arange(len(table)), pa.int64())
        rows = table.select(list(dict.fromkeys(names.values()))).append_column(_POSITION, positions)
        query = f"SELECT {_POSITION} FROM {_TABLE} {self._where(names)}"
        alarm = threading.Timer(time_limit_s, self._engine.interrupt)
        alarm.daemon = True
        self._engine.register(_TABLE, rows)
        try:
            alarm.start()
            found = self._engine.execute(query).fetchnumpy()[_POSITION]
        except duckdb.InterruptException:
            raise self.refused(f"took more than {time_limit_s:g} s; make it simpler, or ask for more time") from None
        except duckdb.OutOfMemoryException:
            raise self.refused(f"took more than {_CONFIG['memory_limit']} of memory; make it simpler") from None
        except duckdb.Error as error:
            raise self.refused(_first_lines(error)) from None
        finally:
            alarm.cancel()
            self._engine.unregister(_TABLE)
        return np.sort(found.astype(np.int64, copy=False))

    def refused(self, why: str) -> BadQuery:
        """An error that repeats the condition."""
        return BadQuery(f"condition {_short(self.text)!r}: {why}")

    def close(self) -> None:
        self._engine.close()

    # ---- reading it ---------------------------------------------------------------------------

    def _parse(self) -> dict[str, Any]:
        """The checked tree of ``SELECT 1 WHERE (text)``."""
        tree = self._serialize(self.text)
        if tree["error"]:
            raise self.refused(tree["error_message"])
        expected = self._serialize("true")["statements"][0]["node"]
        statements = tree["statements"]
        # Whatever closes our bracket and goes on (another statement, UNION, LIMIT …) shows beside the condition.
        if len(statements) != 1 or _without_condition(statements[0]["node"]) != _without_condition(expected):
            raise self.refused("is more than one condition; write what may stand behind WHERE, and nothing else")
        for part in _parts(statements[0]["node"]["where_clause"]):
            self._check(part)
        return tree

    def _serialize(self, text: str) -> dict[str, Any]:
        query = f"SELECT 1 WHERE ({text}\n)"
        try:
            tree: dict[str, Any] = json.loads(self._ask("SELECT json_serialize_sql(?::VARCHAR)", query))
        except duckdb.Error as error:
            raise self.refused(_first_lines(error)) from None
        return tree

    def _ask(self, query: str, argument: str) -> str:
        """The one text that a query of ours gives."""
        ((answer,),) = self._engine.execute(query, [argument]).fetchall()
        return str(answer)

    def _check(self, part: dict[str, Any]) -> None:
        kind, what = part["class"], part["type"]
        if what not in _ALLOWED.get(kind, ()):
            raise self.refused(f"uses {_HINTS.get(kind, what.lower().replace('_', ' '))}")
        if kind == "FUNCTION":
            name = part["function_name"].lower()
            is_plain = not (part["schema"] or part["catalog"] or part["filter"] or part["distinct"])
            if name not in FUNCTIONS | _OPERATORS or not is_plain or part["order_bys"]["orders"]:
                raise self.refused(f"uses the function {name}, which conditions do not have{_near(name)}")
        if kind == "TYPE" and (part["type_name"].upper() not in _TYPES or part["schema"] or part["catalog"]):
            raise self.refused(f"uses the type {part['type_name']}; there are: {', '.join(sorted(_TYPES))}")

    def _references(self) -> Iterator[ColumnRef]:
        for part in _parts(self._select["statements"][0]["node"]["where_clause"]):
            if part["class"] == "COLUMN_REF":
                yield tuple(part["column_names"])

    def _where(self, names: Mapping[ColumnRef, str]) -> str:
        """``WHERE (…)`` printed from the tree, with the table's own column names."""
        tree = json.loads(json.dumps(self._select))
        for part in _parts(tree["statements"][0]["node"]["where_clause"]):
            if part["class"] == "COLUMN_REF":
                part["column_names"] = [_TABLE, names[tuple(part["column_names"])]]
        return self._ask("SELECT json_deserialize_sql(?::JSON)", json.dumps(tree)).removeprefix("SELECT 1 ")


def _connect() -> duckdb.DuckDBPyConnection:
    engine = duckdb.connect(":memory:", config=_CONFIG)
    engine.execute("SET TimeZone = 'UTC'")
    engine.execute("SET lock_configuration = true")
    return engine


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    """Every expression and type of a tree; without recursion, whatever its depth."""
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if "class" in part:
                yield part
            waiting += reversed(part.values())
        elif isinstance(part, list):
            waiting += reversed(part)


def _without_condition(node: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name != "where_clause"}


def _near(name: str) -> str:
    close = difflib.get_close_matches(name, FUNCTIONS, 3)
    return f"; near it are {', '.join(close)}" if close else "; docs/queries.md lists those there are"


def _depth(text: str) -> int:
    """How deep brackets are nested, at most; those in quotes count as well."""
    steps = ((char in "([{") - (char in ")]}") for char in text)
    return max(itertools.accumulate(steps), default=0)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _first_lines(error: duckdb.Error) -> str:
    """DuckDB's sentence, without the picture of our own query below it."""
    return str(error).partition("\n\nLINE ")[0].strip().replace("\n", " ")
