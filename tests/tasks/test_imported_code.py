"""What a user's module rests on: seen in what it imports, and a reason to compute again."""

import importlib
import sys
from importlib.metadata import version

import pytest

from storage import codec
from tasks.imported_code import imported_code
from tasks.user_steps import user_step

FILES = {
    "my_steps_1": "import json\nimport numpy as np\nfrom my_fit_1 import fit\nfrom storage import codec\n"
    "from dateutil.parser import parse\ndef step(chunk):\n    return {'a': fit(np.zeros(len(chunk)))}\n",
    "my_fit_1": "import my_shape_1\nimport my_steps_1\ndef fit(x):\n    return my_shape_1.shape(x)\n",
    "my_shape_1": "def shape(x):\n    return x\n",
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    forget()


def forget() -> None:
    for name in FILES:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def test_modules_of_ones_own_and_versions_of_libraries_are_found(written):
    found = imported_code(importlib.import_module("my_steps_1"))
    names = [module.__name__ for module in found.modules]
    assert names == ["my_fit_1", "my_shape_1", "storage.codec"], "the standard library is left out"
    assert codec in found.modules
    assert found.versions == {"numpy": version("numpy"), "python-dateutil": version("python-dateutil")}


def test_a_change_in_what_is_imported_makes_another_step(written):
    before = user_step("my_steps_1:step").identity
    assert before["python-dateutil"] == version("python-dateutil")
    assert user_step("my_steps_1:step").identity == before
    (written / "my_shape_1.py").write_text("def shape(x):\n    return 2.0 * x\n")
    forget()
    after = user_step("my_steps_1:step").identity
    assert after["source"] != before["source"]
    assert {k: v for k, v in after.items() if k != "source"} == {k: v for k, v in before.items() if k != "source"}
