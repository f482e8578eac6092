"""``python -m benchmarks [--quick] [--full] [names…]``"""

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks import (
    analysis,
    catalysis_loop,
    codec,
    crystallography,
    flow,
    live,
    merging,
    read,
    report,
    small,
    stall,
    store,
    wire,
)
from benchmarks.frames import Options
from benchmarks.measure import Figure

BENCHMARKS: dict[str, Callable[[Options], list[Figure]]] = {
    "codec": codec.measure,
    "store": store.measure,
    "read": read.measure,
    "wire": wire.measure,
    "small": small.measure,
    "stall": stall.measure,
    "analysis": analysis.measure,
    "live": live.measure,
    "flow": flow.measure,
    "catalysis-loop": catalysis_loop.measure,
}
# What takes minutes each, or tens of gigabytes of disk: by name, or all of it with --full.
LONG: dict[str, Callable[[Options], list[Figure]]] = {
    "wire-16M": wire.measure_large,
    "wire-60s": wire.measure_long,
    "wire-16M-60s": wire.measure_large_long,
    "stall-10GB": stall.measure_long,
    "analysis-sizes": analysis.measure_sizes,
    "crystallography": crystallography.measure,
    "merging": merging.measure,
    "flow-30min": flow.measure_long,
    "flow-beside": flow.measure_beside,
    "flow-4M": flow.measure_fast,
    "flow-50000": flow.measure_many,
}
BUILD = Path(__file__).parents[1] / "build" / "bench"
log = logging.getLogger("benchmarks")


def main() -> None:
    known = BENCHMARKS | LONG
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"which of {', '.join(known)}; if none is named, {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--quick", action="store_true", help="fewer frames and rounds, to see that it works")
    parser.add_argument("--full", action="store_true", help=f"if none is named, also {', '.join(LONG)}")
    parser.add_argument("--size", default="4M", help="detector: 512, 1M, 4M, 9M, 16M")
    parser.add_argument("--folder", type=Path, default=BUILD, help="for JSON files, and work files on the disk to test")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(known)}")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    options = Options(arguments.folder / "work", arguments.size, arguments.quick)
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    names = arguments.names or list(known if arguments.full else BENCHMARKS)
    results = {name: _measure(name, known[name], options, arguments.folder, command) for name in names}
    # A log file has no width of its own; the table needs this much to keep its rows on one line.
    screen = Console(width=None if sys.stdout.isatty() else 200)
    screen.print(report.table(results))
    what = report.machine()
    screen.print(
        f"{what['cores']} cores, {what['cpu']}, {what['memory_gib']} GiB, {what['kernel']}; {command}", highlight=False
    )
    screen.print("of limit: 1 is at the limit, above 1 is faster than the peer", highlight=False)


def _measure(
    name: str, measure: Callable[[Options], list[Figure]], options: Options, folder: Path, command: str
) -> list[Figure]:
    """One benchmark's figures, which are on disk before the next one begins."""
    before, started = report.machine(), time.monotonic()
    log.info("%s …", name)
    figures = measure(options)
    report.write_json(folder, name, figures, command, before)
    log.info("%s took %.0f s", name, time.monotonic() - started)
    return figures


if __name__ == "__main__":
    main()
