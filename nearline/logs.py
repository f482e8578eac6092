"""What goes to standard error: text for people, or one JSON object a line for a log collector."""

import json
import logging
from datetime import UTC, datetime
from typing import Literal

from rich.console import Console
from rich.logging import RichHandler

__all__ = ["JsonFormatter", "LogFormat", "configure_logs"]

LogFormat = Literal["text", "json"]

# What a log call may say of its subject: ``extra={"run": "lyso-2026/17"}``, or a key such as ("lyso-2026", 17).
_SUBJECTS = ("run", "stream", "group", "client", "token_id")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the subject where it is known, a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        content |= {name: _words(value) for name in _SUBJECTS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


def _words(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def configure_logs(console: Console, *, log_format: LogFormat = "text", is_verbose: bool = False) -> None:
    """Say warnings of everybody and news of our own; may be called again."""
    if log_format == "json":
        handler: logging.Handler = logging.StreamHandler(console.file)
        handler.setFormatter(JsonFormatter())
    else:
        handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    for earlier in list(root.handlers):
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("nearline").setLevel(logging.DEBUG if is_verbose else logging.INFO)
