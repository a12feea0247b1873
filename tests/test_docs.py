"""The documentation is true: its examples run, its output is theirs, its lists are complete.

Of the Markdown pages in `docs/`

* every `python` block runs, the blocks of a page in order and in one namespace;
* every line of a `sh` block that starts `intact` runs, or, if it would take long, is at least a
  command line that `intact` understands; `python -c` runs too;
* a `text` block right after one of these is what it prints. Figures are left out of the comparison,
  as the last digits of a float depend on the machine; everything else must be equal;
* every `toml` block is a recipe.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import linecache
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from intact.arithmetic import QParams
from intact.certificate import KINDS, Certificate
from intact.cli import app
from intact.ops import Op
from intact.program import QTensor
from intact.recipe import PRESETS, Recipe
from intact.report import Report

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
LONG = re.compile(
    r"intact (certify .*|(evaluate|run) net/.*"
    r"|(train|.*--(data cifar10|data folder|weights|recipe)) .*)"
)


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and the number of its first line."""

    kind: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [
        Block(m.group(1), m.group(2), PAGES[page].count("\n", 0, m.start(2)) + 1) for m in found
    ]


def run_python(source: str, names: dict[str, Any]) -> str:
    """What a block prints; its source is there for messages that quote it."""
    linecache.cache["example.py"] = (len(source), None, source.splitlines(True), "example.py")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, "example.py", "exec"), names)  # noqa: S102
    return out.getvalue()


def run_shell(commands: str, done: dict[str, str]) -> str:
    """What the commands of a block print; "" for those that would take long.

    done  what commands printed that have run before, in the same folder
    """
    printed = []
    for line in commands.replace("\\\n", " ").splitlines():
        command = line.partition("  #")[0].strip()
        if command not in done:
            done[command] = _run_command(command)
        printed.append(done[command])
    return "".join(printed)


def _run_command(command: str) -> str:
    words = shlex.split(command)
    if words[0] == "intact":
        long = LONG.fullmatch(command)
        result = CliRunner().invoke(app, [*words[1:], *(["--help"] if long else [])])
        assert result.exit_code == 0, (command, result.output, result.exception)
        return "" if long else result.stdout
    if words[:2] == ["python", "-c"]:
        return subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, check=True
        ).stdout
    assert words[0] in {".", "pip", "git", "cd", "make", "python", "torchrun"}, command
    return ""


def masked(text: str) -> str:
    """Text without its figures, and without the spaces that depend on their width."""
    return " ".join(re.sub(r"[-+]?\d[\d.,]*(e[-+]\d+)?", "#", text).split())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder that all pages share, and what commands printed in it."""
    return tmp_path_factory.mktemp("docs"), {}


@pytest.fixture
def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells a process about the others, here none."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("page", PAGES)
def test_every_example_runs_and_prints_what_the_page_says(
    page, workspace, single_process, monkeypatch
):
    folder, done = workspace
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        where = f"{page}, line {block.line}"
        if named := re.match(r"# (\w+\.py)\n", block.text):
            Path(named[1]).write_text(block.text, encoding="utf-8")
        if block.kind == "python":
            printed = run_python(block.text, names)
        elif block.kind == "sh":
            printed = run_shell(block.text, done)
        elif block.kind == "text" and printed:
            assert masked(printed) == masked(block.text), where
            printed = ""
        elif block.kind == "toml":
            Recipe.from_toml(block.text, where)


def test_every_block_says_what_it_is():
    kinds = {block.kind for page in PAGES for block in blocks(page)}
    assert kinds <= {"python", "sh", "text", "toml", "json"}
    for page, text in PAGES.items():
        assert text.count("\n```") == 2 * len(blocks(page)), page


def test_the_comparison_of_output_sees_a_changed_word_and_no_figure():
    assert masked("p = 0.85: noise,  12 images") == masked("p = 1e-05: noise, 3 images")
    assert masked("p = 0.85: noise, 12 images") != masked("p = 0.85: noise, 12 pictures")


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_stand_in_the_recipes_page_as_they_are(name):
    presets = [b.text for b in blocks("recipes.md") if b.text.startswith(f'name = "{name}"\n')]
    assert presets == [PRESETS[name].to_toml()]


def test_the_recipes_page_names_every_key_and_default():
    for section, value in Recipe().to_dict().items():
        keys = value if isinstance(value, dict) else {section: value}
        for key, default in keys.items():
            shown = json.dumps(default)
            row = rf"^\| `(\w+\.)?{key}` \|.*{re.escape(shown)}.*\|$"
            assert re.search(row, PAGES["recipes.md"], re.MULTILINE) or section == "name", key


def test_the_pages_name_every_field_and_every_rule():
    shown = PAGES["program-format.md"]
    for cls in (*get_args(Op), QParams, QTensor):
        assert cls in (QParams, QTensor) or f"`{cls.__name__}`" in shown
        for field in fields(cls):
            assert f"`{field.name}`" in shown, field.name
    for name in _field_names(Report):
        assert f"`{name}`" in PAGES["results.md"], name
    for name in _field_names(Certificate):
        assert f"`{name}`" in PAGES["certificate.md"], name
    for kind in KINDS:
        assert f"| `{kind}` |" in PAGES["certificate.md"], kind
    source = (DOCS.parent / "src/intact/diagnosis.py").read_text(encoding="utf-8")
    rules = set(re.findall(r'Finding\(\s*"([\w-]+)"', source))
    assert len(rules) == 11
    for rule in rules:
        assert f"`{rule}`" in PAGES["guide.md"], rule


def _field_names(kind: Any) -> set[str]:
    """All fields of a dataclass and of those that it holds."""
    if not is_dataclass(kind):
        return set().union(*(_field_names(part) for part in get_args(kind)))
    hints = get_type_hints(kind)
    return set(hints).union(*(_field_names(hint) for hint in hints.values()))


def test_the_map_lists_every_page_and_every_link_leads_somewhere():
    for page in PAGES:
        assert page == "index.md" or f"]({page})" in PAGES["index.md"], page
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            linked = DOCS / path if path else DOCS / page
            assert linked.exists(), (page, target)
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in slugs, (page, target)


# -- the reader of the program format -------------------------------------------------------------


def _reader() -> str:
    (source,) = (b.text for b in blocks("program-format.md") if "def read" in b.text)
    return source


def test_the_independent_reader_is_short_and_needs_neither_intact_nor_safetensors():
    names = {a.name for n in ast.walk(ast.parse(_reader())) if isinstance(n, ast.Import)
             for a in n.names}  # fmt: skip
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(_reader())))
    assert names == {"hashlib", "json", "struct", "numpy"}
    assert len(_reader().splitlines()) <= 30


def test_the_independent_reader_reads_what_intact_wrote_and_sees_every_flipped_bit(
    workspace, monkeypatch
):
    import numpy as np

    import intact

    folder, done = workspace
    monkeypatch.chdir(folder)
    run_shell("intact lenet --data digits -o demo", done)
    names: dict[str, Any] = {}
    run_python(_reader(), names)
    path = folder / "demo" / "program.safetensors"
    program = intact.load(path)
    structure, arrays = names["read"](path)
    assert [op["name"] for op in structure["ops"]] == [op.name for op in program.ops]
    assert set(arrays) == set(program.parameters)
    for name, array in program.parameters.items():
        assert np.array_equal(arrays[name], array), name
        assert arrays[name].dtype == array.dtype, name
    data = path.read_bytes()
    damaged = folder / "damaged.safetensors"
    for place in (60, 1000, len(data) // 2, len(data) - 1):  # in the digest, structure, and arrays
        damaged.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            names["read"](damaged)


@pytest.mark.slow
def test_the_script_for_many_processes_gives_the_program_of_one(tmp_path):
    (script,) = (b.text for b in blocks("guide.md") if "torch.distributed" in b.text)
    (tmp_path / "share.py").write_text(script, encoding="utf-8")
    hashes = set()
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
        result = subprocess.run(
            [*command, "share.py"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        lines = result.stdout.splitlines()
        assert len(lines) == int(processes)
        hashes |= {line.split()[-1] for line in lines}
    assert len(hashes) == 1
