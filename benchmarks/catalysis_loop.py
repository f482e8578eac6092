"""How long a decision takes, from a shot to its arrival at the instrument, beside a bare ZeroMQ loop with the same fit.

The experiment of `examples/catalysis` with a reactor that ignores the decisions: both loops see the same spectra.
This process is the instrument. ``python -m benchmarks.catalysis_loop PULL PUSH`` is the peer's other side.
"""

import json
import os
import queue
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from benchmarks.frames import EXPERIMENT, FramesLost, Options, WorkFolder
from benchmarks.measure import Figure, Target, figure, in_rounds, percentile
from nearline.children import Children, free_port
from streaming.client import is_reachable
from streaming.producer import Producer, RunProducer
from streaming.retrieval import Run, open_run

__all__ = ["measure"]

_ROOT = Path(__file__).parents[1]
_EXAMPLE = _ROOT / "examples" / "catalysis"
_RATE = 20.0
_PATIENCE_S = 60.0
_REACTION_RATE = 1 / 600
_PEER = "ZMQ PUSH, fit, decide, PUSH; nothing stored"
_P99 = Target("at most", 1000.0)


@dataclass(frozen=True)
class _Shot:
    """One spectrum, (energy,) float32, and the scalars that go with it."""

    spectrum: np.ndarray
    meta: dict[str, Any]


def measure(options: Options) -> list[Figure]:
    n, repeats = options.choose(20, 200), options.choose(1, 5)
    shots = _spectra(n * (repeats + 1))
    with WorkFolder(options, "catalysis-loop") as folder, ExitStack() as stack:
        children = Children(folder / "logs")
        stack.callback(children.stop_all)
        loops = {
            "ours": stack.enter_context(_through_nearline(folder, children)),
            "bare": stack.enter_context(_through_zmq(children)),
        }
        ms: dict[str, list[list[float]]] = {name: [] for name in loops}
        for number in in_rounds(repeats + 1):
            mine = shots[n * number : n * (number + 1)]
            for name in list(loops)[:: 1 if number % 2 else -1]:
                ms[name].append(loops[name].series(mine))
            # What is loaded and compiled at the first shots belongs to starting.
            if number == 0:
                ms = {name: [] for name in loops}
    return [_figure(percent, ms) for percent in (50, 99)]


def _figure(percent: int, ms: dict[str, list[list[float]]]) -> Figure:
    ours, bare = ([percentile(one, percent) for one in ms[name]] for name in ("ours", "bare"))
    name = f"shot to decision at {_RATE:.0f} shots/s, p{percent}"
    target = _P99 if percent == 99 else None
    return figure(name, "ms", ours, (_PEER, bare), higher_is_better=False, target=target)


def _spectra(n: int) -> list[_Shot]:
    """What the example's instrument sees while the copper is reduced."""
    spectrometer = _example("instrument")["Spectrometer"]()
    taken = (spectrometer.take(number / n) for number in range(n))
    return [_Shot(spectrum, {"i0": i0, "temperature_k": 523.0}) for spectrum, i0 in taken]


def _example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(_EXAMPLE / f"{name}.py"))


class _Loop:
    """Sends a shot and waits for its decision; a subclass says how."""

    def series(self, shots: list[_Shot]) -> list[float]:
        """ms from each shot to its decision, the shots on a schedule."""
        begun, latencies = time.monotonic(), []
        for number, shot in enumerate(shots):
            time.sleep(max(0.0, begun + number / _RATE - time.monotonic()))
            started = time.monotonic()
            latencies.append(1e3 * (self.decided(shot) - started))
        return latencies

    def decided(self, shot: _Shot) -> float:
        """Send; the time.monotonic() at which the decision was here."""
        raise NotImplementedError


class _Nearline(_Loop):
    """Through the service: the spectrum is stored, the decision is a row of a stream that is stored too."""

    def __init__(self, out: RunProducer, run: Run, results: str) -> None:
        self._out, self._run, self._results = out, run, results
        self._arrived: queue.Queue[tuple[int, float, dict[str, Any]]] = queue.Queue()
        self._thread = threading.Thread(target=self._listen, name="decisions", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        for row in self._run[self._results].follow():
            self._arrived.put((row.frame_index, time.monotonic(), row.meta))

    def decided(self, shot: _Shot) -> float:
        index = self._out.send(shot.spectrum, meta=shot.meta)
        try:
            found, at, row = self._arrived.get(timeout=_PATIENCE_S)
        except queue.Empty:
            raise FramesLost(f"no decision on shot {index} within {_PATIENCE_S:.0f} s; see decide.log") from None
        _require_decision(row, found == index)
        return at

    def join(self) -> None:
        self._thread.join(_PATIENCE_S)


@contextmanager
def _through_nearline(folder: Path, children: Children) -> Iterator[_Nearline]:
    """Service and decisions as processes, as the example starts them."""
    address, nobody = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    environment = _environment() | {"NEARLINE_SERVICE": address}
    serve = ["nearline.cli", "serve", "--root", str(folder / "data"), "--bind", address, "--source", f"none={nobody}"]
    children.start("service", serve, environment)
    _wait_until(lambda: is_reachable(address))
    with Producer(address, EXPERIMENT, "xas") as producer, producer.run(1) as out:
        out.start(_example("instrument")["header"](EXPERIMENT, 1))
        children.start("decide", ["decide", f"{EXPERIMENT}/1", "--reaction-rate", str(_REACTION_RATE)], environment)
        run, results = open_run(f"{EXPERIMENT}/1", service=address), "xas.results@live"
        _wait_until(lambda: results in run)
        loop = _Nearline(out, run, results)
        yield loop
        out.finish()
        loop.join()


class _Zmq(_Loop):
    """One PUSH/PULL hop to the fit, and one back."""

    def __init__(self, push: "zmq.Socket[bytes]", pull: "zmq.Socket[bytes]") -> None:
        self._push, self._pull = push, pull

    def decided(self, shot: _Shot) -> float:
        self._push.send_multipart([json.dumps(shot.meta).encode(), shot.spectrum.tobytes()])
        row = json.loads(self._pull.recv())
        at = time.monotonic()
        _require_decision(row, True)
        return at


@contextmanager
def _through_zmq(children: Children) -> Iterator[_Zmq]:
    ends = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with closing(context.socket(zmq.PUSH)) as push, closing(context.socket(zmq.PULL)) as pull:
        for socket, end in ((push, ends[0]), (pull, ends[1])):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, int(1e3 * _PATIENCE_S))
            socket.bind(end)
        children.start("peer", ["benchmarks.catalysis_loop", *ends], _environment())
        yield _Zmq(push, pull)


def _answer_shots(pull_from: str, push_to: str) -> None:
    """The peer's other side: the example's own fit and decision, without anything between."""
    steps, decide = _example("steps"), _example("decide")["ConstantRate"](_REACTION_RATE)
    known = _example("instrument")
    energy, references = known["ENERGIES"], known["reference_spectra"]()
    used = (energy >= 8960) & (energy <= 9080)
    model = np.column_stack([references["oxidised"][used], references["reduced"][used], np.ones(used.sum())])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with closing(context.socket(zmq.PULL)) as pull, closing(context.socket(zmq.PUSH)) as push:
        pull.connect(pull_from)
        push.connect(push_to)
        for shot in range(sys.maxsize):
            meta, blob = pull.recv_multipart()
            spectrum = np.frombuffer(blob, np.float32)[used].astype(float)
            fit = steps["fit_one"](model, spectrum, steps["photon_sigma"](spectrum, json.loads(meta)["i0"]))
            fitted = dict(zip(("fraction_reduced", "fraction_sigma", "edge_step", "chi2_red"), fit, strict=True))
            push.send(json.dumps(fitted | decide.after(shot, *fit[:2])).encode())


def _environment() -> dict[str, str]:
    paths = [str(_ROOT), str(_EXAMPLE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _require_decision(row: dict[str, Any], is_of_shot: bool) -> None:
    if not is_of_shot or "next_setpoint_k" not in row:
        raise FramesLost(f"a shot was answered by {row}, which is no decision on it; see the logs of the benchmark")


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise FramesLost(f"the loop was not ready within {_PATIENCE_S:.0f} s; see the logs of the benchmark")
        time.sleep(0.05)


if __name__ == "__main__":
    _answer_shots(*sys.argv[1:])
