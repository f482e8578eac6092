"""Becomes another program: ``python -m benchmarks.program redis-server …``.

`nearline.children.Children` starts Python modules only, and ends them for sure; what is started
through this module keeps process id, group and that certainty.
"""

import os
import shutil
import sys

__all__ = ["find_program"]

_SYSTEM_PATHS = "/usr/sbin:/usr/local/sbin"


def find_program(name: str) -> str | None:
    """Path of a program; Debian keeps some servers where only root looks for them."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATHS}")


if __name__ == "__main__":
    os.execv(find_program(sys.argv[1]) or sys.argv[1], sys.argv[1:])
