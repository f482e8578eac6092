"""What can go wrong, named for the person who reads it.

Every message carries the offending value and ends with what to do next.
"""

from typing import Any

__all__ = [
    "AccessDenied",
    "BadAnnotation",
    "BadCriterion",
    "BadExperiment",
    "BadFrame",
    "BadGeometry",
    "BadMessage",
    "BadName",
    "BadQuery",
    "BadRecipe",
    "BufferFull",
    "CorruptFrame",
    "CredentialsUnusable",
    "DamagedFile",
    "DamagedOutput",
    "DeploymentNotFound",
    "EngineFailed",
    "EngineMissing",
    "FlowRunFailed",
    "FrameMissing",
    "FrameNotYetAvailable",
    "FrameTooLate",
    "GroupNeedsService",
    "IndexConflict",
    "Interrupted",
    "NearlineError",
    "NewerFile",
    "NotStored",
    "OutputExists",
    "PlaceUnavailable",
    "ProcessingBusy",
    "ProtocolError",
    "RunBusy",
    "RunNotFound",
    "RunsFailed",
    "ServiceUnavailable",
    "ShapeMismatch",
    "SourceBusy",
    "StaleLease",
    "StateUnreadable",
    "StorageFull",
    "StreamNotFound",
    "StreamNotOpen",
    "StreamOwned",
    "UploadConflict",
    "VetoRefused",
]


class NearlineError(Exception):
    """Base of every error that Nearline raises on purpose."""


class BadName(NearlineError, ValueError):
    """A name of an experiment, run, data source or group that cannot be a folder name."""


class BadAnnotation(NearlineError, ValueError):
    """A fact about frames that cannot be kept, or a stored one that cannot be read."""


class BadExperiment(NearlineError, ValueError):
    """An experiment file that does not say what it must, or contradicts itself; the message names file and field."""


class BadFrame(NearlineError, ValueError):
    """A frame whose bytes, shape or dtype contradict its stream's header."""


class BadGeometry(NearlineError, ValueError):
    """A geometry file that cannot be read, or a detector that its format has no words for; names line or key."""


class BadCriterion(NearlineError, ValueError):
    """A stop criterion that cannot be read, or names what nothing is known of; the message lists what there is."""


class NotEnough(NearlineError):
    """A stop criterion that was waited for is not met; the message gives the values."""


class BadQuery(NearlineError, ValueError):
    """A condition that is not one, names no column there is, or took too much; the message repeats it."""


class BadRecipe(NearlineError, ValueError):
    """A recipe that does not parse, or names a step that cannot be imported."""


class EngineMissing(BadRecipe):
    """A recipe that wants a program for indexing which is not on this machine."""


class EngineFailed(NearlineError, RuntimeError):
    """A program for indexing that does not start, or that ends or hangs whatever frame it is given."""


class ShapeMismatch(NearlineError, ValueError):
    """Two arrays that should cover the same pixels do not."""


class CorruptFrame(NearlineError):
    """Stored bytes that fail their checksum; the message names the frame and the file."""


class DamagedFile(NearlineError, ValueError):
    """A header, event or commit of a run that cannot be read; the message names the file."""


class FrameMissing(NearlineError, LookupError):
    """A frame index of the run that was never received; the message gives the cause."""


class FrameNotYetAvailable(NearlineError, LookupError):
    """A frame index that the live run has not reached."""


class FrameTooLate(NearlineError):
    """A frame that came after its chunk was sealed without it; the ledger counts it as late."""


class RunBusy(NearlineError):
    """A run that is live, where only one that has ended will do."""


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


class StreamNotOpen(ProtocolError):
    """Frames for a stream that this service does not have open for writing; start it (again) first."""


class BadMessage(ProtocolError):
    """A detector's message that cannot be understood; it is counted and left out."""


class BufferFull(NearlineError):
    """The memory buffer is full and the storage behind it does not keep up."""


class IndexConflict(NearlineError):
    """The same frame index was sent twice with different content."""


class Interrupted(NearlineError):
    """Another thread asked whoever waits here to stop."""


class StaleLease(NearlineError):
    """An acknowledgement for a frame that has meanwhile been leased to another member."""


class StateUnreadable(NearlineError):
    """The service's own state (consumer groups) cannot be read at the moment."""


class StorageFull(NearlineError, OSError):
    """The disk refused a write; nothing that was acknowledged as stored is affected."""


class StreamOwned(NearlineError):
    """Another live process holds this stream for writing."""


class PlaceUnavailable(NearlineError, ConnectionError):
    """An object store, or another place behind a URL, that does not answer."""


class DamagedOutput(NearlineError):
    """An output of a step that cannot be read back; it can be computed again."""


class ProcessingBusy(NearlineError):
    """Another process works on this processing; the message says which one."""


class SourceBusy(NearlineError, OSError):
    """A port that something else is using already, or that may not be used."""


class NewerFile(NearlineError):
    """A file of the service's state that a later version of this program wrote."""


class NotStored(NearlineError):
    """A stream that is in memory only, where frames on disk are needed."""


class OutputExists(NearlineError, FileExistsError):
    """A file that would have to be replaced; say so to replace it."""


class AccessDenied(NearlineError):
    """No token, a token that is not valid here, or one that does not reach so far."""


class CredentialsUnusable(NearlineError):
    """A file with a key or token that is missing, damaged, or open to other users."""


class UploadConflict(NearlineError):
    """The target of an upload holds something else under the name of this run or chunk."""


class VetoRefused(NearlineError):
    """Frames that cannot be vetoed, or not yet, or a veto that cannot be taken back any more."""


class DeploymentNotFound(NearlineError, LookupError):
    """A flow that the Prefect server knows no deployment of."""


class FlowRunFailed(NearlineError, RuntimeError):
    """A flow run that ended otherwise than completed, or not in time."""


class RunsFailed(NearlineError, RuntimeError):
    """Some runs of a bulk reprocessing failed; ``summary`` says what became of each."""

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary
