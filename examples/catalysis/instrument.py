"""A simulated XAS instrument: copper oxide reduced in hydrogen, one absorption spectrum each shot.

It shows what the program of a real instrument does: it sends each spectrum with the scalars of its shot, follows the
stream of decisions in a thread, and heats its reactor to what the newest decision says, or stops.

    python examples/catalysis/instrument.py catalysis/1
"""

import argparse
import math
import threading
import time
from dataclasses import dataclass, field

import numpy as np

import nearline
from storage.models import StreamHeader

DATA_SOURCE, LOG = "xas", "reactor"
ENERGIES = np.linspace(8940.0, 9140.0, 501)
# Copper's K edge, eV: the metal's, and that of copper(II) some eV above it.
EDGE_METAL, EDGE_OXIDE = 8979.0, 8984.0
_GAS_CONSTANT = 8.314
# Reduction of copper oxide: activation energy in J/mol, and a rate that gives 0.025 / s at 523 K. A real reactor is
# slower by a factor of about 60.
_ACTIVATION, _FREQUENCY = 80e3, 2.4e6
_THERMAL_LAG_S = 0.7
_PATIENCE_S = 60.0


def reference_spectra() -> dict[str, np.ndarray]:
    """Normalised absorption of each pure component, (501,): an edge, its white line and two waves behind it."""
    return {
        "oxidised": _spectrum(EDGE_OXIDE, white_line=0.55, shoulder=0.0, wave_ev=42.0),
        "reduced": _spectrum(EDGE_METAL, white_line=0.06, shoulder=0.18, wave_ev=31.0),
    }


def _spectrum(edge: float, white_line: float, shoulder: float, wave_ev: float) -> np.ndarray:
    above = ENERGIES - edge
    step = 0.5 + np.arctan(above / 1.6) / np.pi
    bumps = white_line * np.exp(-(((above - 12) / 6) ** 2)) + shoulder * np.exp(-(((above - 2) / 2.5) ** 2))
    wave = 0.05 * np.sin(2 * np.pi * above / wave_ev) * np.exp(-np.clip(above, 0, None) / 60)
    return step + bumps + np.where(above > 15, wave, 0.0)


@dataclass
class Reactor:
    """A bed of copper oxide in a furnace that follows its setpoint; reduced at a rate that follows Arrhenius' law.

    setpoint_k, temperature_k : K. fraction_reduced : 0 to 1.
    """

    setpoint_k: float = 453.0
    temperature_k: float = 453.0
    fraction_reduced: float = 0.0

    def wait(self, seconds: float) -> None:
        """Let time go by."""
        self.temperature_k += (self.setpoint_k - self.temperature_k) * -math.expm1(-seconds / _THERMAL_LAG_S)
        rate = _FREQUENCY * math.exp(-_ACTIVATION / (_GAS_CONSTANT * self.temperature_k))
        self.fraction_reduced += (1 - self.fraction_reduced) * -math.expm1(-rate * seconds)


class Spectrometer:
    """Takes one spectrum of what is in the beam, with the noise of its photons.

    photons : before the sample, for each energy of a shot.
    """

    def __init__(self, photons: float = 1e5, seed: int = 0) -> None:
        self._photons, self._random = photons, np.random.default_rng(seed)
        self.references = reference_spectra()

    def take(self, fraction_reduced: float) -> tuple[np.ndarray, float]:
        """Absorption ln(I0/I), (501,) float32, and the photons I0 at each energy."""
        i0 = self._photons * self._random.normal(1.0, 0.03)
        absorption = (1 - fraction_reduced) * self.references["oxidised"] + fraction_reduced * self.references[
            "reduced"
        ]
        before = self._random.poisson(i0, len(ENERGIES))
        behind = self._random.poisson(i0 * np.exp(-absorption - 0.3))
        return np.log(before / np.maximum(behind, 1)).astype(np.float32), float(i0)


@dataclass
class Listener:
    """Follows the decisions in a thread: the newest one, and how long each took.

    Each decision is noted in a table stream of the instrument's own, with the time from the shot to its arrival.
    """

    run: nearline.Run
    log: nearline.Producer
    reactor: Reactor
    taken: dict[int, float] = field(default_factory=dict)
    decided_by: int = -1
    stop: str | None = None
    heard: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None

    def start(self, results: str) -> None:
        self._thread = threading.Thread(target=self._listen, args=(results,), name="decisions", daemon=True)
        self._thread.start()

    def _listen(self, results: str) -> None:
        with self.log.run(self.run.header.run, join=True) as log:
            for row in self.run[results].follow():
                seconds = time.monotonic() - self.taken[row.frame_index]
                with self.heard:
                    self._obey(row.meta)
                    self.decided_by = row.frame_index
                    self.heard.notify_all()
                note = {"shot": row.frame_index, "latency_s": seconds, "setpoint_k": self.reactor.setpoint_k}
                log.put(meta=note, frame_index=row.frame_index)

    def _obey(self, decision: dict) -> None:
        # A shot whose fit failed has no decision: the one before it stands.
        self.reactor.setpoint_k = decision.get("next_setpoint_k", self.reactor.setpoint_k)
        self.stop = self.stop or decision.get("stop_reason")

    def wait_for(self, shot: int) -> None:
        """Wait for the decision on a shot; TimeoutError if nobody decides."""
        with self.heard:
            if not self.heard.wait_for(lambda: self.decided_by >= shot, _PATIENCE_S):
                raise TimeoutError(f"no decision on shot {shot} within {_PATIENCE_S:.0f} s; is decide.py running?")

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)


def header(experiment: str, run: int) -> StreamHeader:
    """What a reader must know before the first spectrum; the energies and the two references travel with the data."""
    spectra = {name: np.round(values, 6).tolist() for name, values in reference_spectra().items()}
    return StreamHeader(
        experiment=experiment, run=run, data_source=DATA_SOURCE, shape=ENERGIES.shape, dtype="float32",
        codec="raw", frames_per_chunk=100, user_data={"energy_ev": ENERGIES.tolist(), "references": spectra},
    )  # fmt: skip


def wait_for_decisions(run: nearline.Run, results: str) -> None:
    """No shot before somebody decides; TimeoutError if nobody comes."""
    deadline = time.monotonic() + _PATIENCE_S
    while results not in run:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no stream {results} in {run.name} within {_PATIENCE_S:.0f} s; start decide.py")
        time.sleep(0.1)


def take_shots(out, listener: Listener, rate: float, most_shots: int) -> int:
    """Shots at a fixed rate until a decision says stop, or there are enough; how many. The decisions come meanwhile."""
    spectrometer, flow = Spectrometer(), np.random.default_rng(1)
    reactor, begun = listener.reactor, time.monotonic()
    for shot in range(most_shots):
        time.sleep(max(0.0, begun + shot / rate - time.monotonic()))
        if listener.stop:
            return shot
        with listener.heard:
            meta = {"setpoint_k": reactor.setpoint_k, "decided_by": listener.decided_by}
            reactor.wait(1 / rate)
        spectrum, i0 = spectrometer.take(reactor.fraction_reduced)
        # The truth goes along to be compared with afterwards; neither the fit nor the decision looks at it.
        meta |= {"temperature_k": reactor.temperature_k, "true_fraction_reduced": reactor.fraction_reduced}
        meta |= {"i0": i0, "gas_flow_ml_min": 50 + flow.normal(0, 0.2)}
        listener.taken[shot] = time.monotonic()
        out.send(spectrum, meta=meta)
    return most_shots


def measure(name: str, rate: float, most_shots: int) -> int:
    """One run of the instrument; how many shots it took."""
    experiment, _, number = name.rpartition("/")
    with (
        nearline.producer(experiment, DATA_SOURCE) as producer,
        nearline.producer(experiment, LOG) as log,
        producer.run(int(number), sample="CuO/SiO2") as out,
    ):
        out.start(header(experiment, out.run))
        run = nearline.open(name)
        results = f"{DATA_SOURCE}.results@live"
        wait_for_decisions(run, results)
        listener = Listener(run, log, Reactor())
        listener.start(results)
        n_shots = take_shots(out, listener, rate, most_shots)
        listener.wait_for(n_shots - 1)
        out.update(stop_reason=listener.stop or f"{most_shots} shots taken")
        out.finish()
        listener.join()
    return n_shots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="experiment/number of the run to take")
    parser.add_argument("--rate", type=float, default=15.0, help="shots/s")
    parser.add_argument("--shots", type=int, default=2000, help="at most")
    arguments = parser.parse_args()
    print(f"{measure(arguments.run, arguments.rate, arguments.shots)} shots", flush=True)


if __name__ == "__main__":
    main()
