"""Recorded files sent again as a detector would send them.

miniCBF files (Pilatus) and HDF5 masters (NXmx, DECTRIS filewriter) become the same stream v2 messages
that the simulator sends. An HDF5 chunk that holds one frame as bslz4 or lz4 is passed on as it is; all
else is decoded and encoded again, which the start message declares under "source", and every frame
from a CBF file carries its original's name, digest and header text in its user_data.
"""

from streaming.replay.cbf import parse_cbf_header
from streaming.replay.send import read_files, replay
from streaming.replay.series import ReplayFrame, ReplaySeries

__all__ = ["ReplayFrame", "ReplaySeries", "parse_cbf_header", "read_files", "replay"]
