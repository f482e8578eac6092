"""What a report is put together from: sections of words, tables and pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from matplotlib.figure import Figure

from flows.figure_style import png_of

__all__ = ["Picture", "Section", "Table"]


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn when it is asked for: its file's name, what it shows for who cannot see it, a caption."""

    name: str
    draw: Callable[[], Figure]
    alt: str
    caption: str
    is_wide: bool = False

    @cached_property
    def png(self) -> bytes:
        return png_of(self.draw())


@dataclass(frozen=True)
class Table:
    """Rows of text; without a head the first column names what stands beside it."""

    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """One heading and what stands below it; ``folded`` is text behind a fold, by its title."""

    name: str
    title: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: dict[str, str] = field(default_factory=dict)
