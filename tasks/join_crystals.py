"""Crystals of many frames brought to one indexing and one scale, as far as they allow, and then merged."""

from dataclasses import dataclass

import numpy as np

from tasks.merge_crystals import Mergeable, MergeSums
from tasks.model_partiality import PartialityReport, model_partiality
from tasks.observations import Observations
from tasks.resolve_ambiguity import AmbiguityReport, resolve_ambiguity
from tasks.scale_crystals import CrystalScales, ScalingReport, merge_scaled, scale_crystals

__all__ = ["JoinedCrystals", "join_crystals"]

# With fewer, so many would be left out that a plain mean of all says more.
_FEWEST_SCALED = 0.5


@dataclass(frozen=True)
class JoinedCrystals:
    """Observations that can be merged, all of them or some crystals.

    scales : None where crystals were not scaled, and a merge is their plain mean.
    partiality, ambiguity : None where it was not modelled, or the lattice has none.
    notes : what was not done, and why, in sentences.
    """

    observations: Observations
    scales: CrystalScales | None = None
    partiality: PartialityReport | None = None
    ambiguity: AmbiguityReport | None = None
    notes: tuple[str, ...] = ()

    @property
    def scaling(self) -> ScalingReport | None:
        """In numbers for people."""
        return self.scales.report() if self.scales is not None else None

    def merged(self, which: np.ndarray | None = None) -> Mergeable:
        """The merge of some crystals, (crystal,) bool; by default of all."""
        observations = self.observations
        which = np.ones(len(observations), bool) if which is None else which
        if self.scales is not None:
            return merge_scaled(observations, self.scales, which)
        unique = observations.unique
        sums = MergeSums(unique.cell, unique.d_min, unique.friedel_mates)
        for run, table in observations.by_run(which):
            sums.add(run, table)
        sums.n_refused += int(observations.n_refused[which].sum())
        return sums


def join_crystals(
    observations: Observations, *, resolve: bool = True, scale: bool = True, partiality: bool = True
) -> JoinedCrystals:
    """Index crystals alike, scale them together, and model their partialities.

    The same observations give the same merge, in whatever order they came.

    Parameters
    ----------
    resolve : the indexing ambiguity, where the lattice has one.
    scale : give each crystal a scale and a B; unless more than half of them cannot be scaled.
    partiality : model it too, where that makes crystals more alike.
    """
    notes, report = [], None
    indexings = resolve_ambiguity(observations) if resolve else None
    if indexings is not None:
        observations, report = indexings.applied(observations), indexings.report
        notes += _about_indexing(report)
    scales = scale_crystals(observations) if scale else None
    if scales is not None and scales.is_scaled.mean() < _FEWEST_SCALED:
        notes.append(
            f"not scaled, but a plain mean: only {scales.is_scaled.sum()} of {len(observations)} crystals can be"
        )
        scales = None
    modelled = None
    if scales is not None and partiality:
        scales, modelled = model_partiality(observations, scales)
    return JoinedCrystals(observations, scales, modelled, report, tuple(notes))


def _about_indexing(report: AmbiguityReport) -> list[str]:
    if report.is_resolved:
        return []
    return [
        f"the indexing ambiguity ({'; '.join(report.operations)}) could not be resolved: indexings are mixed as in a "
        "twin; merge more crystals, or to where they still correlate"
    ]
