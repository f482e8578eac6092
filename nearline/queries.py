"""`nearline query` and `nearline annotate`: arguments into calls, selections and annotations into tables."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

    from streaming.query import Selection
    from streaming.retrieval import Run, Stream

__all__ = ["annotate_run", "list_annotations", "list_columns", "read_frames_option", "read_values", "show_selection"]

_MOST_TABLE_BYTES = 64 << 20
# On a screen a table of more columns cannot be read.
_WIDE = 12


def read_values(arguments: list[str]) -> dict[str, Any]:
    """``laser=true delay_ps=3`` as names and values: true, false, null, numbers, else text."""
    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise typer.BadParameter(f"{argument!r} is not NAME=VALUE, such as laser=true or delay_ps=3")
        values[name.strip()] = _read_value(text.strip())
    return values


def _read_value(text: str) -> Any:
    if text.lower() in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[text.lower()]
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text) else text


def read_frames_option(text: str) -> Any:
    """``100:200``, ``100:``, ``7`` or ``3,5,8`` as a slice or a list of frame indices."""
    if match := re.fullmatch(r"(\d{0,18}):(\d{0,18})", text):
        start, stop = (int(part) if part else None for part in match.groups())
        return slice(start, stop)
    if re.fullmatch(r"\d{1,18}(,\d{1,18})*", text):
        return [int(part) for part in text.split(",")]
    raise typer.BadParameter(f"--frames {text!r} is not START:STOP (without STOP), an index, or indices 3,5,8")


def annotate_run(run: "Run", values: dict[str, Any], table: Path | None, where: dict[str, Any]) -> int:
    """Keep annotations from the command line or from a CSV table; the number of the batch."""
    if table is None:
        return run.annotate(values=values, **where)
    from storage.annotations import batch_from_csv

    given = [name for name in ("frames", "from_time", "to_time") if where[name] is not None]
    if values or given:
        raise typer.BadParameter("--csv brings frames, names and values; leave NAME=VALUE, --frames, --from, --to out")
    if table.stat().st_size > _MOST_TABLE_BYTES:
        raise typer.BadParameter(f"{table} is larger than {_MOST_TABLE_BYTES >> 20} MiB; split it")
    text = table.read_text(encoding="utf-8-sig", errors="replace")
    return run.add_annotations(batch_from_csv(text, data_source=where["data_source"], by=where["by"]))


def list_annotations(console: Console, run: "Run", as_json: bool) -> None:
    """Show all that was said of a run's frames, in the order it was said."""
    history = run.annotations
    if as_json:
        print(json.dumps([{**row, "value": json.loads(row["value"])} for row in history.to_pylist()], default=str))
        return
    table = Table("batch", "said", "by", "data source", "frames or time", "name", "value")
    for row in history.to_pylist():
        said = f"{row['at']:%Y-%m-%d %H:%M:%S}"
        table.add_row(
            str(row["batch"]), said, row["by"], row["data_source"] or "all", _extent(row), row["name"], row["value"]
        )
    console.print(table if len(history) else f"nothing is annotated in {run.name}; `nearline annotate` does")


def list_columns(console: Console, stream: "Stream", processing: str | None, as_json: bool) -> None:
    """Show what can be asked of a stream."""
    found = stream.columns(processing)
    if as_json:
        print(json.dumps(found))
        return
    console.print(f"a condition on {stream.name} can use, with or without the prefix:", highlight=False)
    table = Table("prefix", "columns")
    for prefix, names in found.items():
        table.add_row(f"{prefix}.", ", ".join(names) or "none yet")
    console.print(table)


def show_selection(console: Console, selection: "Selection", limit: int | None, *, as_json: bool, as_csv: bool) -> None:
    """Show the rows of a selection, at most ``limit`` of them."""
    n_shown = len(selection) if limit is None else min(limit, len(selection))
    rows = selection.table.slice(0, n_shown)
    if as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(rows.column_names)
        writer.writerows(_texts(rows))
    elif as_json:
        counts = {"matching": len(selection), "considered": selection.n_considered}
        print(json.dumps({"condition": selection.condition, **counts, "rows": rows.to_pylist()}, default=_plain))
    else:
        table = Table(*rows.column_names[:_WIDE])
        for row in _texts(rows):
            table.add_row(*row[:_WIDE])
        if n_shown:
            console.print(table)
        more = f"; the first {n_shown} are shown, --limit shows more" if n_shown < len(selection) else ""
        console.print(f"{len(selection)} of {selection.n_considered} frames match{more}", highlight=False)


def _texts(rows: "pa.Table") -> Iterator[list[str]]:
    for row in rows.to_pylist():
        yield ["" if value is None else str(_plain(value)) for value in row.values()]


def _plain(value: Any) -> Any:
    """Bytes as hexadecimal digits, times as ISO 8601, anything else as it is."""
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else value


def _extent(row: dict[str, Any]) -> str:
    if row["start"] is not None:
        stop = row["stop"]
        return str(row["start"]) if stop == row["start"] + 1 else f"{row['start']}:{'' if stop is None else stop}"
    limits = [row["from_time"], row["to_time"]]
    return " to ".join("…" if time is None else f"{time:%Y-%m-%d %H:%M:%S}" for time in limits)
