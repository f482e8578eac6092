"""``python -m benchmarks [--quick] [--full] [names…]``"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks import analysis, codec, live, read, report, small, stall, store, wire
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
}
BUILD = Path(__file__).parents[1] / "build" / "bench"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which; all if none is named: {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="fewer frames and rounds, to see that it works")
    parser.add_argument(
        "--full", action="store_true", help="1M and 16M detectors, 60 s without a pause, 10 GB past a stalled group"
    )
    parser.add_argument("--size", default="4M", help="detector: 512, 1M, 4M, 9M, 16M")
    parser.add_argument("--folder", type=Path, default=BUILD, help="for JSON files, and work files on the disk to test")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    logging.basicConfig(level=logging.WARNING)
    options = Options(arguments.folder / "work", arguments.size, arguments.quick, arguments.full)
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    # A log file has no width of its own; the table needs this much to keep its rows on one line.
    screen, results = Console(width=None if sys.stdout.isatty() else 200), {}
    for name in arguments.names or BENCHMARKS:
        before = report.machine()
        with screen.status(f"measuring {name} …"):
            results[name] = BENCHMARKS[name](options)
        report.write_json(arguments.folder, name, results[name], command, before)
    screen.print(report.table(results))
    what = report.machine()
    screen.print(
        f"{what['cores']} cores, {what['cpu']}, {what['memory_gib']} GiB, {what['kernel']}; {command}", highlight=False
    )
    screen.print("of limit: 1 is at the limit, above 1 is faster than the peer", highlight=False)


if __name__ == "__main__":
    main()
