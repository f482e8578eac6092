"""The whole experiment on this machine: a service, the instrument and the decisions, each a process of its own.

python examples/catalysis/run.py                 # about a minute; then look at catalysis-data/catalysis-1.png
python examples/catalysis/run.py --reaction-rate 0.02 --gain 4 --rate 20   # some seconds
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import nearline

HERE = Path(__file__).parent
EXPERIMENT = "catalysis"
_LONGEST_S = 600.0
_STARTS_WITHIN_S = 60.0


@contextmanager
def process(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A Python process that does not outlive the block; what it says goes into ``log``, or to the terminal."""
    with open(log, "wb") if log else nullcontext() as output:
        running = subprocess.Popen(
            [sys.executable, *arguments], env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def free_address() -> str:
    """A TCP address on loopback that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


def wait_for_service(address: str, service: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the service takes connections: programs that find none give up."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while service.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the service did not start; its log {log} ends:\n{log.read_text()[-2000:]}")


def wait_for_end(**processes: "subprocess.Popen[bytes]") -> None:
    """Wait until all have ended well; RuntimeError names the first that has not."""
    deadline = time.monotonic() + _LONGEST_S
    while any(one.poll() is None for one in processes.values()):
        for name, one in processes.items():
            if one.poll() not in (None, 0):
                raise RuntimeError(f"{name}.py ended with exit code {one.returncode}; what it said is above")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run has not ended within {_LONGEST_S:.0f} s; make --reaction-rate larger")
        time.sleep(0.1)


def next_name(root: Path) -> str:
    """The run after those in the data folder."""
    numbers = [int(folder.name) for folder in root.glob(f"{EXPERIMENT}/*") if folder.name.isdigit()]
    return f"{EXPERIMENT}/{max(numbers, default=0) + 1}"


def take_run(root: Path, arguments: argparse.Namespace) -> Path:
    """Start the three processes, and wait until the loop has closed itself; the folder of the run."""
    name, address = next_name(root), free_address()
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"NEARLINE_SERVICE": address, "PYTHONPATH": os.pathsep.join(paths)}
    decisions = ["--reaction-rate", str(arguments.reaction_rate), "--gain", str(arguments.gain)]
    shots = ["--rate", str(arguments.rate), "--shots", str(arguments.shots)]
    # A service listens to a detector beside its programs. Here is none: an address where nobody sends.
    serve = [
        "-m",
        "nearline.cli",
        "serve",
        "--root",
        str(root),
        "--bind",
        address,
        "--source",
        f"none={free_address()}",
    ]
    root.mkdir(parents=True, exist_ok=True)
    log = root / "service.log"
    with process(serve, environment, log) as service:
        wait_for_service(address, service, log)
        with (
            process([str(HERE / "instrument.py"), name, *shots], environment) as instrument,
            process([str(HERE / "decide.py"), name, *decisions], environment) as decide,
        ):
            wait_for_end(instrument=instrument, decide=decide)
    return root / name


@dataclass(frozen=True)
class Story:
    """What happened, shot by shot: each (shot,)."""

    shot: np.ndarray
    fraction: np.ndarray
    sigma: np.ndarray
    truth: np.ndarray
    temperature_k: np.ndarray
    setpoint_k: np.ndarray
    latency_s: np.ndarray

    @classmethod
    def of(cls, run: nearline.Run) -> "Story":
        """From the three streams of a run: spectra, fits with decisions, and the instrument's own log."""
        shots, fits, log = ([row.meta for row in run[name]] for name in ("xas", "xas.results@live", "reactor"))

        def column(rows: list[dict], name: str) -> np.ndarray:
            # Null, or not there at all where a fit failed.
            return np.array([row.get(name) for row in rows], float)

        return cls(
            np.arange(len(shots)),
            column(fits, "fraction_reduced"),
            column(fits, "fraction_sigma"),
            column(shots, "true_fraction_reduced"),
            column(shots, "temperature_k"),
            column(shots, "setpoint_k"),
            column(log, "latency_s"),
        )


def draw(story: Story, path: Path) -> None:
    """Fraction, its error, temperature and latency over shots, as a PNG."""
    figure = Figure(figsize=(8, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    fraction, error, heat, latency = figure.subplots(4, 1, sharex=True)
    fraction.plot(story.shot, story.fraction, ".", markersize=3, color="#1f77b4", label="fitted")
    fraction.plot(story.shot, story.truth, color="#d62728", linewidth=1, label="simulated truth")
    fraction.set_ylabel("fraction reduced")
    bars = {"fmt": ".", "markersize": 3, "elinewidth": 0.6, "color": "#1f77b4", "alpha": 0.6}
    error.errorbar(story.shot, story.fraction - story.truth, story.sigma, label="fitted - truth, ±σ", **bars)
    error.axhline(0, color="#d62728", linewidth=1)
    error.set_ylabel("error of the fit")
    heat.plot(story.shot, story.setpoint_k, color="#888888", linewidth=1, label="setpoint decided")
    heat.plot(story.shot, story.temperature_k, color="#d62728", linewidth=1.2, label="reactor")
    heat.set_ylabel("temperature, K")
    latency.semilogy(story.shot, 1e3 * story.latency_s, ".", markersize=3, color="#2ca02c", label="shot to decision")
    latency.axhline(1e3, color="#888888", linestyle="--", linewidth=1, label="1 s")
    latency.set(ylabel="latency, ms", xlabel="shot")
    for axes in (fraction, error, heat, latency):
        axes.legend(loc="best", fontsize=8)
    figure.savefig(path)


def tell(run: nearline.Run, story: Story) -> None:
    """What came of it, in words."""
    p50, p99 = np.percentile(1e3 * story.latency_s, [50, 99])
    pull = (story.fraction - story.truth) / story.sigma
    print(f"{run.name}: {len(story.shot)} shots; {run.metadata['stop_reason']}")
    print(f"  shot to decision, received by the instrument: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print(f"  fitted fraction against the truth: {np.mean(np.abs(pull) < 1):.0%} of shots within 1 σ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("catalysis-data"), help="data folder")
    parser.add_argument("--rate", type=float, default=15.0, help="shots/s")
    parser.add_argument("--shots", type=int, default=2000, help="at most")
    parser.add_argument("--reaction-rate", type=float, default=1 / 600, help="wanted, fraction reduced per shot")
    parser.add_argument("--gain", type=float, default=0.8, help="K per shot")
    arguments = parser.parse_args()
    folder = take_run(arguments.root, arguments)
    run = nearline.open(folder)
    story = Story.of(run)
    picture = arguments.root / f"{EXPERIMENT}-{folder.name}.png"
    draw(story, picture)
    tell(run, story)
    print(f"  {picture}")


if __name__ == "__main__":
    main()
