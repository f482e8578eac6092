"""What processes of tests have from their birth: imported in the process that they are forked from."""

import importlib

from storage.kernels import use_compiled_kernels

for name in ("streaming.retrieval", "tests.streaming.harness"):
    importlib.import_module(name)
use_compiled_kernels()
