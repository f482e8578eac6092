"""Names that become folders."""

import pytest

from storage.errors import BadName
from storage.names import check_name, check_run, parse_run_key


@pytest.mark.parametrize("name", ["lyso-2026", "eiger.threshold_2", "eiger.binned@p3", "A", "9", "a" * 100])
def test_usable_names(name):
    assert check_name(name, "name") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc",
        "-rf",
        ".hidden",
        "a..b",
        "a b",
        "a\0",
        "a\n",
        "ä",
        "a" * 101,
        7,
        None,
    ],
    ids=repr,
)
def test_unusable_names(name):
    with pytest.raises(BadName, match="not usable as a name"):
        check_name(name, "name")


@pytest.mark.parametrize("run", [-1, 10**9 + 1, True, 1.0, "1", None, 10**400], ids=lambda r: str(r)[:12])
def test_unusable_runs(run):
    with pytest.raises(BadName):
        check_run(run)


def test_run_key():
    assert parse_run_key("lyso-2026/17") == ("lyso-2026", 17)


@pytest.mark.parametrize("text", ["", "lyso", "lyso/", "/17", "lyso/x", "lyso/-1", "../17", "a/b/3", "lyso/²"])
def test_what_is_not_a_run_key(text):
    with pytest.raises(BadName):
        parse_run_key(text)
