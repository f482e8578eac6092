"""The documents say what is there: links, files, names, commands and snippets are held against the code."""

import ast
import functools
import importlib
import inspect
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import nearline
from nearline.cli import app
from nearline.demo import _Result
from streaming.simulator import simulate
from tasks.recipe import load_recipe

from .test_examples import free_detector, running_service, simulated, wait_for_end

ROOT = Path(__file__).parent.parent
DOCS = [
    p
    for p in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("deployments/*.md"),
        *ROOT.glob("examples/**/*.md"),
    )
    if p.exists()
]
PACKAGES = ("nearline", "flows", "tasks", "streaming", "storage")
# Made by running something: named in documents, but not in the repository.
GENERATED = ("build/", ".venv/")
# Their snippets need the run of their own example; they are executed in tests/examples.
EXAMPLES = ROOT / "examples"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(path: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(path))


per_document = pytest.mark.parametrize("path", DOCS, ids=name_of)


# ---- links and files ------------------------------------------------------------------------------


@per_document
def test_relative_links_resolve(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    relative = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in relative if not (path.parent / t).exists()] == []


@per_document
def test_files_named_exist(path: Path) -> None:
    folders = "|".join((*PACKAGES, "docs", "examples", "deployments", "tests", "benchmarks", "requirements"))
    named = [c for c in inline_code(path) if re.fullmatch(rf"(?:{folders})/[\w./-]+", c)]
    named += re.findall(r"(?<![\w./-])(?:examples|docs|tests)/[\w./-]+\.\w+", "\n".join(fenced(path, "bash")))
    assert [n for n in named if not n.startswith(GENERATED) and not (ROOT / n).exists()] == []


# ---- names ----------------------------------------------------------------------------------------


@functools.cache
def names_in_code() -> frozenset[str]:
    """Every class, function, constant and field of the packages and examples."""
    found: set[str] = set()
    for package in (*PACKAGES, "examples"):
        for source in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text())):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    found.add(node.name)
                elif isinstance(node, ast.AnnAssign | ast.Assign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    found |= {t.id for t in targets if isinstance(t, ast.Name)}
                    found |= {t.attr for t in targets if isinstance(t, ast.Attribute)}
    return frozenset(found)


def resolves(dotted: str) -> bool:
    """Whether ``storage.states.FrameState`` can be imported, down to the last attribute."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(found, part):
                fields = getattr(found, "model_fields", {})
                return part in fields and part == parts[-1]
            found = getattr(found, part)
        return True
    return False


@per_document
def test_dotted_names_resolve(path: Path) -> None:
    packages = "|".join(PACKAGES)
    dotted = [c.removesuffix("()") for c in inline_code(path)]
    dotted = [d for d in dotted if re.fullmatch(rf"(?:{packages})(?:\.\w+)+", d) and not d.endswith(".yaml")]
    assert [d for d in dotted if not resolves(d)] == []


@per_document
def test_classes_named_exist(path: Path) -> None:
    """`CamelCase` and `CamelCase.attribute`, in code marks or bold, are names of ours."""
    words = inline_code(path) + re.findall(r"\*\*([A-Z]\w+)\*\*", prose(path))
    camel = [w for w in words if re.fullmatch(r"[A-Z][a-z0-9]+(?:[A-Z]\w*|(?=\.))[\w]*(?:\.\w+)?", w)]
    assert [w for w in camel if not set(w.split(".")) <= names_in_code()] == []


def test_glossary_names_the_states_and_ledger_fields() -> None:
    from storage.models import RunState
    from storage.states import FrameState, StreamLedger

    text = (ROOT / "docs" / "glossary.md").read_text()
    words = [*FrameState.__members__, *RunState.__members__, *StreamLedger.model_fields]
    words = [w for w in words if w not in ("data_source", "is_terminal")]
    assert [w for w in words if f"`{w}`" not in text] == []


def test_wire_protocol_names_every_message_and_field() -> None:
    from storage.frame import FrameInfo
    from streaming import wire

    text = (ROOT / "docs" / "wire-protocol.md").read_text()
    requests = wire.Request.__subclasses__()
    replies = wire.Reply.__subclasses__()
    words = {c.__name__ for c in requests + replies}
    words |= {field for c in requests + replies for field in c.__struct_fields__}
    words |= set(FrameInfo.__struct_fields__)
    assert sorted(w for w in words if f"`{w}`" not in text) == []


def test_recipes_name_every_step_and_parameter_with_its_default() -> None:
    from dataclasses import fields

    from tasks.steps import STEPS

    text = (ROOT / "docs" / "recipes.md").read_text()
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(STEPS)
    for name, step in STEPS.items():
        documented = dict(zip(*_parameters_and_defaults(sections[name]), strict=True))
        assert set(documented) == {f.name for f in fields(step.params)}, name
        for field in fields(step.params):
            given = documented[field.name]
            if not given.startswith("the detector's"):
                assert _value(given) == field.default or _value(given) == list(field.default), (name, field.name)


def test_queries_name_every_column_and_function() -> None:
    from streaming.condition import FUNCTIONS, Condition
    from streaming.known_frames import FRAME_COLUMNS

    text = (ROOT / "docs" / "queries.md").read_text()
    functions = set(re.findall(r"`(\w+)`", text.partition("## Functions")[2])) - {"COALESCE", "CASE", "TRY"}
    assert functions == FUNCTIONS
    (columns,) = re.findall(r"^\| `frame\.` \|.*$", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", columns)) == set(FRAME_COLUMNS)
    written = [c for c in inline_code(ROOT / "docs" / "queries.md") if re.search(r" > |IS NOT TRUE|NOT laser", c)]
    assert len(written) > 5
    for condition in written:
        Condition(condition).close()


def test_demo_names_every_key_of_its_json() -> None:
    source = textwrap.dedent(inspect.getsource(_Result.as_json))
    (answer,) = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Return))
    keys = [ast.literal_eval(key) for key in answer.keys]

    section = (ROOT / "docs" / "demo.md").read_text().partition("## The JSON object")[2]
    named = [w for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for w in re.findall(r"`(\w+)`", cell)]
    assert named == keys


def _parameters_and_defaults(section: str) -> tuple[list[str], list[str]]:
    names, defaults = [], []
    for line in re.findall(r"^\| `(.+?) \| (.*?) \|", section, re.MULTILINE):
        mine = re.findall(r"\w+", line[0])
        values = [line[1]] if line[1].startswith("[") else line[1].split(", ")
        names += mine
        defaults += values if len(values) == len(mine) else values * len(mine)
    return names, defaults


def _value(text: str) -> object:
    return float("inf") if text == "∞" else ast.literal_eval(text.capitalize() if text in ("true", "false") else text)


# ---- commands -------------------------------------------------------------------------------------


def commands(path: Path) -> Iterator[list[str]]:
    """Every command line of a document: in bash blocks, and inline when it starts with ``nearline``."""
    for block in fenced(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words
    for code in inline_code(path):
        if re.match(r"nearline \w", code):
            yield shlex.split(code)


@per_document
def test_commands_exist_with_their_options(path: Path) -> None:
    problems = [problem for words in commands(path) for problem in _problems(words)]
    assert problems == []


def _problems(words: list[str]) -> list[str]:
    if words[0] == "make":
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return [f"make {word}" for word in words[1:] if word not in targets and "=" not in word]
    if Path(words[0]).name != "nearline":
        return []
    command, rest = typer.main.get_command(app), words[1:]
    while rest and hasattr(command, "commands"):
        command = command.commands.get(rest[0])
        if command is None:
            return [f"no command nearline {' '.join(words[1:])}"]
        rest = rest[1:]
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    used = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    return [f"nearline {' '.join(words[1:])} has no {option}" for option in used if option not in known]


# ---- snippets -------------------------------------------------------------------------------------

SNIPPET_RUNS = ("lysozyme/1", "lyso-2026/17")


@pytest.fixture(scope="module")
def beamline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like the one the README speaks of: finished, processed runs, and a service that has them."""
    folder = tmp_path_factory.mktemp("beamline")
    (folder / "examples").symlink_to(ROOT / "examples")
    detector = free_detector()
    with running_service(folder / "build" / "demo" / "data", detector):
        for name in SNIPPET_RUNS:
            simulate(simulated(detector, name))
            wait_for_end(name)
            nearline.process(name, ROOT / "examples" / "lysozyme.yaml", n_threads=2)
        yield folder


@pytest.mark.parametrize("path", [p for p in DOCS if fenced(p, "python") and EXAMPLES not in p.parents], ids=name_of)
def test_python_snippets_run(path: Path, beamline: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(beamline)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    namespace: dict[str, object] = {"__name__": "snippet"}
    for number, block in enumerate(fenced(path, "python")):
        exec(compile(block, f"{name_of(path)} block {number}", "exec"), namespace)


def test_recipe_in_the_documents_is_the_example(tmp_path: Path) -> None:
    copy = tmp_path / "recipe.yaml"
    copy.write_text(fenced(ROOT / "docs" / "recipes.md", "yaml")[0])

    assert load_recipe(copy) == load_recipe(ROOT / "examples" / "lysozyme.yaml")


def test_own_step_of_the_documents_works(beamline: Path, monkeypatch, tmp_path: Path) -> None:
    step, recipe = fenced(ROOT / "docs" / "recipes.md", "python")[1], fenced(ROOT / "docs" / "recipes.md", "yaml")[1]
    (tmp_path / "my_steps.py").write_text(step)
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_steps", raising=False)

    summary = nearline.process("lysozyme/1", tmp_path / "recipe.yaml", n_threads=2)

    columns = nearline.open("lysozyme/1").processings[summary["processing"]].frames.column_names
    assert "n_bright" in columns


def test_run_folder_holds_what_the_architecture_says(beamline: Path) -> None:
    run = beamline / "build" / "demo" / "data" / "lysozyme" / "1"
    nearline.open(run).annotate(start=0, stop=8, laser=True)
    (tree,) = [text for text in fenced(ROOT / "docs" / "architecture.md", "text") if text.startswith("<root>")]
    found = {re.sub(r"\d+", "0", str(p.relative_to(run))) for p in run.rglob("*")}
    names = re.findall(r"^    ((?:run|events|eiger|processed|steps|nexus|annotations)\S*)", tree, re.MULTILINE)
    assert len(names) > 10
    for name in names:
        stem = re.escape(re.sub(r"\d+", "0", name.rstrip(",/"))).replace("<digest>", r"\w+").replace(r"\ ", " ")
        stem = re.sub(r"<\w+>", r"[\\w-]+", stem)
        # Sealing takes the journals away, nothing came late, and the detector stood where it said.
        if not any(folder in name for folder in ("journal/", "amendments/", "geometry/")):
            assert any(re.fullmatch(stem, f) for f in found), name
