"""Steps as a user would write them."""

import os
import time

import numpy as np


def who_works(chunk):
    """The process that works on each frame; slow enough for two to be at it."""
    time.sleep(0.5)
    return {"pid": np.full(len(chunk), os.getpid())}


def noted(chunk):
    """Notes in the file DIARY that a chunk is begun, and two seconds later that it is done."""
    with open(os.environ["DIARY"], "a") as diary:
        print("begun", chunk.frame_index[0], file=diary, flush=True)
        time.sleep(2.0)
        print("done", chunk.frame_index[0], file=diary, flush=True)
    return {"n_rows": np.full(len(chunk), len(chunk))}


def index_of_quality(chunk):
    """A column of the name that ours have, and no crystals."""
    return {"indexed": np.zeros(len(chunk), bool)}
