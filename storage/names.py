"""Names that become folders, validated once at the boundary."""

import re

from storage.errors import BadName

__all__ = ["check_name", "check_run", "parse_run_key", "run_key"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can be a folder name everywhere, else raise.

    Letters, digits and ``. _ - @ +``, starting with a letter or digit, at most 100 characters; no
    path separators, so a name can never lead out of its folder.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise BadName(
            f"{what} {str(name)[:120]!r} is not usable as a name; "
            "use letters, digits and . _ - @ +, starting with a letter or digit"
        )
    return name


def check_run(run: int) -> int:
    """Return a run number from 0 to 10⁹, else raise."""
    if isinstance(run, bool) or not isinstance(run, int) or not 0 <= run <= 1_000_000_000:
        raise BadName(f"run {str(run)[:40]!r} is not a run number; use a whole number from 0")
    return run


def run_key(experiment: str, run: int) -> str:
    """The way people write a run: ``lyso-2026/17``."""
    return f"{experiment}/{run}"


def parse_run_key(text: str) -> tuple[str, int]:
    """Split ``lyso-2026/17`` into its experiment and run number."""
    experiment, slash, run = text.rpartition("/")
    if not slash or not run.isdecimal():
        raise BadName(f"{text[:120]!r} does not name a run; write experiment/number, for example lyso-2026/17")
    return check_name(experiment, "experiment"), check_run(int(run))
