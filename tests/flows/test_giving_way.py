"""That a worker's niceness counts beyond its session."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GROUP = Path("/proc/self/autogroup")
SAYS = """
import os
from pathlib import Path
os.nice({niceness})
from flows.giving_way import give_way
give_way()
print(Path("/proc/self/autogroup").read_text())
"""


@pytest.mark.skipif(not GROUP.exists(), reason="this kernel does not share the processors among sessions")
@pytest.mark.parametrize(
    ("niceness", "is_leader", "expected"),
    [(7, True, min(os.nice(0) + 7, 19)), (0, True, os.nice(0)), (7, False, 0)],
    ids=["nice", "usual", "child"],
)
def test_a_session_takes_the_niceness_of_its_leader(niceness, is_leader, expected):
    """A process that does not lead its session leaves it alone: others are in it."""
    program = [sys.executable, "-c", SAYS.format(niceness=niceness)]
    if not is_leader:
        starts = f"import subprocess, sys; sys.exit(subprocess.run({program!r}).returncode)"
        program = [sys.executable, "-c", starts]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run(program, start_new_session=True, capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split()[-1] == str(expected)


def test_without_such_groups_nothing_happens():
    from flows.giving_way import give_way

    give_way()
