"""Other programs that index, behind one interface: each a module, each in a process of its own.

A program gets the spots of the frames and where the detector stands, never our memory, and gives back orientation
matrices. What they explain is counted by `tasks.index_frame`, as for our own lattices, so that all that follows
(integration, merging, queries) sees the same table.
"""

from tasks.engines.engine import Answer, Engine, EngineJob, Lattice, Spots

__all__ = ["Answer", "Engine", "EngineJob", "Lattice", "Spots"]
