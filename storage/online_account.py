"""What a run folder says of a stream that is in memory only: the account of its frames, without them.

The service brings it up to date about once a second, and at the end it goes into the event
`stream_finished`. So it stays known what came and is gone, also after `kill -9`, to about a second.
"""

from datetime import UTC, datetime

from pydantic import Field

from storage.files import replace
from storage.models import Record
from storage.run_folder import StreamPaths, parse_file
from storage.states import FrameState, IndexStates, StateRange

__all__ = ["IN_MEMORY_ONLY", "MADE_ROOM", "OnlineAccount", "account_of", "read_account", "write_account"]

IN_MEMORY_ONLY = "in memory only"
MADE_ROOM = "in memory only, and made room for newer frames"

_IN_MEMORY = (FrameState.buffered.name, FrameState.incomplete.name)


class OnlineAccount(Record):
    """Every announced frame of an online stream; those in memory as pruned, which for the folder they are."""

    announced: int = 0
    duplicate: int = 0
    ranges: list[StateRange] = Field(default_factory=list)
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


def account_of(states: IndexStates, duplicate: int) -> OnlineAccount:
    """The account at this moment; hold whatever keeps others from changing the states."""
    ranges = [_as_gone(part) for part in states.ranges()]
    return OnlineAccount(announced=states.announced, duplicate=duplicate, ranges=ranges)


def read_account(paths: StreamPaths) -> OnlineAccount | None:
    """The last account of a stream that has not ended; None before the first.

    Raises
    ------
    DamagedFile : it cannot be read.
    """
    try:
        return parse_file(OnlineAccount, paths.online_account)
    except FileNotFoundError:
        return None


def write_account(paths: StreamPaths, account: OnlineAccount) -> None:
    """Replace the account of a stream; OSError when the disk refuses."""
    replace(paths.online_account, account.model_dump_json().encode())


def _as_gone(part: StateRange) -> StateRange:
    if part.state not in _IN_MEMORY:
        return part
    return StateRange(state=FrameState.pruned.name, start=part.start, stop=part.stop, cause=IN_MEMORY_ONLY)
