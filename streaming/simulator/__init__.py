"""A detector that is not there: simulated stills with known truth, sent as DECTRIS stream v2.

``simulate(SimulatorSettings(...))`` does everything; ``StillSimulator`` makes frames alone, and
``DectrisStreamSender`` sends any frames. Replay of recorded files uses the same sender.
"""

from streaming.simulator.crystal import SimulatedCrystal
from streaming.simulator.dectris import DectrisStreamSender, SenderSettings
from streaming.simulator.run import SeriesSent, SimulatorSettings, make_frames, simulate
from streaming.simulator.stills import FrameTruth, StillPhysics, StillSimulator, default_detector
from streaming.simulator.truth import Truth, read_truth, write_truth

__all__ = [
    "DectrisStreamSender",
    "FrameTruth",
    "SenderSettings",
    "SeriesSent",
    "SimulatedCrystal",
    "SimulatorSettings",
    "StillPhysics",
    "StillSimulator",
    "Truth",
    "default_detector",
    "make_frames",
    "read_truth",
    "simulate",
    "write_truth",
]
