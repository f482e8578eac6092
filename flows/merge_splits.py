"""Which set of a divided merge each frame belongs to: by a column of the frames, or by a condition on them."""

import re
from collections.abc import Iterable

import numpy as np

from storage.errors import BadQuery
from storage.step_store import Processing
from streaming.retrieval import Run
from tasks.observations import Observations

__all__ = ["UNSET", "Labels", "file_endings", "labels_of_frames", "split_crystals"]

# Frames of which nobody said anything.
UNSET = "unset"
_A_COLUMN = re.compile(r"[\w.]+")
_MOST_SETS = 50

Labels = tuple[np.ndarray, np.ndarray]


def labels_of_frames(run: Run, processing: Processing, split: str) -> Labels:
    """Frame indices, rising, and the set of each as text.

    Parameters
    ----------
    split : a column as in `Stream.where`, such as ``laser`` or ``annotation.delay_ps``, of which each value makes a
        set; or a condition, such as ``laser AND delay_ps > 3``, which makes *true* and *false*.

    Raises
    ------
    BadQuery : neither a column nor a condition; the message lists the columns there are.
    """
    stream = run[processing.manifest.data_source]
    if _A_COLUMN.fullmatch(split):
        table = stream.where("frame_index >= 0", columns=[split], processing=processing.name).table
        texts = [_text(value) for value in table[split].to_pylist()]
        return table["frame_index"].to_numpy(), np.array(texts, dtype=object)
    every = stream.where("frame_index >= 0", processing=processing.name).indices
    is_true = np.isin(every, stream.where(split, processing=processing.name).indices)
    return every, np.where(is_true, "true", "false").astype(object)


def _text(value: object) -> str:
    if value is None or value != value:
        return UNSET
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def split_crystals(observations: Observations, labels: dict[str, Labels], split: str) -> dict[str, np.ndarray]:
    """By set, (crystal,) whether it is in it; every crystal is in one.

    Parameters
    ----------
    labels : by run, of `labels_of_frames`; crystals of other runs, and of other frames, are in the set `UNSET`.

    Raises
    ------
    BadQuery : more than 50 sets.
    """
    of_crystal = np.full(len(observations), UNSET, dtype=object)
    for number, run in enumerate(observations.runs):
        if run not in labels:
            continue
        frames, texts = labels[run]
        mine = np.flatnonzero(observations.run_number == number)
        wanted = observations.frame_index[mine]
        at = np.minimum(np.searchsorted(frames, wanted), max(len(frames) - 1, 0))
        known = frames[at] == wanted if len(frames) else np.zeros(len(mine), bool)
        of_crystal[mine[known]] = texts[at[known]]
    names = sorted(set(of_crystal))
    if len(names) > _MOST_SETS:
        raise BadQuery(
            f"{split!r} has {len(names)} values, more than {_MOST_SETS}; split by a condition, such as '{split} > 1'"
        )
    return {name: of_crystal == name for name in names}


def file_endings(split: str, names: Iterable[str]) -> dict[str, str]:
    """By set, what its files are called after the merge's name: ``laser-true``."""
    column = split.rpartition(".")[2] if _A_COLUMN.fullmatch(split) else "condition"
    endings: dict[str, str] = {}
    for name in names:
        ending = re.sub(r"[^\w.+-]", "_", f"{column}-{name}")
        while ending in endings.values():
            ending += "_"
        endings[name] = ending
    return endings
