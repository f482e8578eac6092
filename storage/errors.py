"""What can go wrong, named for the person who reads it.

Every message carries the offending value and ends with what to do next.
"""

__all__ = [
    "BadFrame",
    "BadName",
    "BadRecipe",
    "BufferFull",
    "CorruptFrame",
    "FrameMissing",
    "FrameNotYetAvailable",
    "FrameTooLate",
    "GroupNeedsService",
    "IndexConflict",
    "NearlineError",
    "ProtocolError",
    "RunNotFound",
    "ServiceUnavailable",
    "ShapeMismatch",
    "StaleLease",
    "StorageFull",
    "StreamNotFound",
]


class NearlineError(Exception):
    """Base of every error that Nearline raises on purpose."""


class BadName(NearlineError, ValueError):
    """A name of an experiment, run, data source or group that cannot be a folder name."""


class BadFrame(NearlineError, ValueError):
    """A frame whose bytes, shape or dtype contradict its stream's header."""


class BadRecipe(NearlineError, ValueError):
    """A recipe that does not parse, or names a step that cannot be imported."""


class ShapeMismatch(NearlineError, ValueError):
    """Two arrays that should cover the same pixels do not."""


class CorruptFrame(NearlineError):
    """Stored bytes that fail their checksum; the message names the frame and the file."""


class FrameMissing(NearlineError, LookupError):
    """A frame index of the run that was never received; the message gives the cause."""


class FrameNotYetAvailable(NearlineError, LookupError):
    """A frame index that the live run has not reached."""


class FrameTooLate(NearlineError):
    """A frame that came after its chunk was sealed without it; the ledger counts it as late."""


class RunNotFound(NearlineError, LookupError):
    """No such run where one was looked for."""


class StreamNotFound(NearlineError, LookupError):
    """The run has no data source of that name."""


class GroupNeedsService(NearlineError):
    """Consumer groups share frames through a service; a bare run folder has none."""


class ServiceUnavailable(NearlineError, ConnectionError):
    """The streaming service did not answer."""


class ProtocolError(NearlineError, ValueError):
    """A message that does not follow the wire protocol."""


class BufferFull(NearlineError):
    """The memory buffer is full and the storage behind it does not keep up."""


class IndexConflict(NearlineError):
    """The same frame index was sent twice with different content."""


class StaleLease(NearlineError):
    """An acknowledgement for a frame that has meanwhile been leased to another member."""


class StorageFull(NearlineError, OSError):
    """The disk refused a write; nothing that was acknowledged as stored is affected."""
