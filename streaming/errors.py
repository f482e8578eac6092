"""What can go wrong on the wire, beside the errors of `storage.errors`."""

from storage.errors import ProtocolError

__all__ = ["BadMessage", "SourceBusy"]


class BadMessage(ProtocolError):
    """A detector's message that cannot be understood; it is counted and left out."""


class SourceBusy(ProtocolError):
    """A port or data source that something else is using already."""
