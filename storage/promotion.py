"""Which of a run's processings is meant when nobody names one: the promoted one, else the newest of the whole run.

``processed/default.json`` says which, who said so, when and why; it is replaced in one step, and no processing
is changed by it.
"""

import getpass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from storage.errors import BadName, DamagedFile, RunNotFound
from storage.files import replace
from storage.models import Record
from storage.step_store import Processing, find_processings

__all__ = ["Promotion", "default_processing", "promote", "read_promotion"]


class Promotion(Record):
    """A processing made the default of its run."""

    processing: str
    at: datetime
    by: str = Field("", description="who")
    why: str = ""
    previous: str | None = Field(None, description="processing that was promoted before")


def promote(run: Path, processing: str, *, by: str | None = None, why: str = "") -> Promotion:
    """Make a processing the default of its run.

    Parameters
    ----------
    run : the run's folder.
    by : who says so; by default the user of this program.

    Raises
    ------
    RunNotFound : there is no such processing; the message lists those there are.
    BadName : it is a canary's, and covers a part of the run only.
    """
    found = find_processings(run)
    if processing not in found:
        raise RunNotFound(f"{run} has no processing {processing!r}; it has: {', '.join(found) or 'none yet'}")
    if found[processing].manifest.part is not None:
        raise BadName(
            f"{processing} is a canary and covers only a part of {run}; reprocess the run with its recipe, "
            "and promote that"
        )
    before = read_promotion(run)
    promotion = Promotion(
        processing=processing,
        at=datetime.now(UTC),
        by=by or _user(),
        why=why,
        previous=before.processing if before else None,
    )
    replace(_path(run), promotion.model_dump_json(indent=1).encode())
    return promotion


def read_promotion(run: Path) -> Promotion | None:
    """What was promoted last; None if nothing ever was, or that processing is gone.

    Raises
    ------
    DamagedFile : the file cannot be read.
    """
    path = _path(run)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        promotion = Promotion.model_validate_json(content)
    except ValidationError as error:
        raise DamagedFile(f"{path} is damaged: {error.errors()[0]['msg']}; `nearline promote` writes it anew") from None
    return promotion if (run / "processed" / promotion.processing / "manifest.json").exists() else None


def default_processing(run: Path, *, data_source: str | None = None) -> Processing | None:
    """The promoted processing, else the newest finished one of the whole run, else the newest, else None.

    Parameters
    ----------
    data_source : only processings of it.
    """
    manifests = {name: (found, found.manifest) for name, found in find_processings(run).items()}
    mine = {n: p for n, (p, m) in manifests.items() if data_source in (None, m.data_source) and m.part is None}
    promotion = read_promotion(run)
    if promotion is not None and promotion.processing in mine:
        return mine[promotion.processing]
    finished = [processing for processing in mine.values() if processing.is_finished]
    return next(reversed(finished or list(mine.values())), None)


def _path(run: Path) -> Path:
    return run / "processed" / "default.json"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""
