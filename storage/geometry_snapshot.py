"""A refined geometry that belongs to a processing: from which chunk on it is in force, and what it was found from."""

from datetime import datetime

import blake3
from pydantic import Field

from storage.models import Record
from storage.panels import DetectorGeometry

__all__ = ["GeometrySnapshot"]


class GeometrySnapshot(Record):
    """``processed/<id>/geometry/<number>.json``: the detector's place as the crystals of some chunks tell it.

    Number 0 is what the recipe and the stream's header say; it is in no file.
    """

    number: int = Field(gt=0)
    from_chunk: int = Field(description="first chunk that is analysed with it")
    looked_at: tuple[int, int] = Field(description="first and last of the chunks whose crystals it is from")
    n_crystals: int
    n_spots: int
    shift: tuple[float, float] = Field(description="px, x and y: the beam centre against the snapshot before")
    shift_sigma: tuple[float, float] = Field(description="px, standard deviations of the shift")
    largest_shift: float = Field(
        description="px, of the beam centre, of the panel that is off by most, or of the outer spots by the distance"
    )
    distance: float | None = Field(None, description="m, refined against a cell that is trusted; None if it is not")
    detector: dict[str, float | DetectorGeometry] = Field(
        description="the recipe's detector values with the refined ones in place"
    )
    inputs: str = Field(description="blake3 over the step outputs that it was found from, hex")
    made_at: datetime

    @property
    def digest(self) -> str:
        """blake3 of the detector values, hex."""
        return blake3.blake3(self.model_dump_json(include={"detector"}).encode()).hexdigest()

    @property
    def words(self) -> str:
        """In one sentence, as the run page shows it."""
        x, y = self.shift
        away = "" if self.distance is None else f"; {1e3 * self.distance:.3f} mm away"
        return (
            f"geometry is off by {self.largest_shift:.2f} px (beam centre by {x:+.2f}, {y:+.2f}{away}) by "
            f"{self.n_crystals} crystals of chunks {self.looked_at[0]} to {self.looked_at[1]}: "
            f"snapshot {self.number} from chunk {self.from_chunk} on"
        )
