"""What `import intact` offers, what it costs, and that the documented examples run."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import intact

README = Path(__file__).parent.parent / "README.md"
NAMES = [
    "IntactError",
    "Program",
    "Recipe",
    "capture",
    "certify",
    "load",
    "quantize",
    "stages",
]
HEAVY = ["torch", "plotly", "scipy", "sklearn", "jinja2", "rich", "typer", "PIL", "pooch"]


def loaded_after(code: str) -> set[str]:
    """The modules of a fresh interpreter that has run `code`."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_importing_loads_neither_torch_nor_anything_that_draws():
    modules = loaded_after("import intact")
    assert "intact" in modules
    assert not modules & {*HEAVY, "numpy"}
    assert {name for name in modules if name.startswith("intact.")} == set()


def test_loading_and_running_a_program_needs_no_torch(tmp_path):
    path = tmp_path / "p.safetensors"
    make_program().save(path)
    modules = loaded_after(
        f"import intact, numpy\n"
        f"p = intact.load({str(path)!r})\n"
        f"assert p.run(numpy.zeros((2, 3, 8, 8), numpy.float32)).shape == (2, 5)"
    )
    assert modules & {"intact.engines.native", "intact.engines.reference"}
    assert not modules & set(HEAVY)


def test_what_is_public_is_what_is_documented():
    assert sorted(set(intact.__all__)) == sorted(intact.__all__)
    assert set(intact.__all__) == {*NAMES, "__version__"}
    assert dir(intact) == sorted(intact.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves_to_what_its_module_has(name):
    value = getattr(intact, name)
    assert value.__name__ == name
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert inspect.getdoc(value)


def test_no_submodule_hides_a_public_name():
    for module in pkgutil.walk_packages(intact.__path__, "intact."):
        importlib.import_module(module.name)
    for name in NAMES:
        assert not inspect.ismodule(getattr(intact, name)), name
    assert inspect.isfunction(intact.capture)
    assert inspect.isfunction(intact.stages)


def test_an_unknown_name_is_an_attribute_error_as_of_any_module():
    with pytest.raises(AttributeError, match=r"^module 'intact' has no attribute 'quantise'$"):
        intact.quantise  # noqa: B018
    with pytest.raises(ImportError, match="quantise"):
        exec("from intact import quantise")  # noqa: S102


def test_the_version_is_the_distributions():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{intact.__version__}"' in text


# -- documented examples -------------------------------------------------------------------------


def make_model():
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def make_batches():
    import torch

    return list(torch.randn(4, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def make_program() -> intact.Program:
    return intact.quantize(make_model(), make_batches())


def namespace() -> dict:
    """What an example may take for granted: a trained model and data."""
    batches = make_batches()
    return {
        "intact": intact,
        "model": make_model(),
        "batches": batches,
        "calibration_batches": batches,
        "x": batches[0],
    }


def test_the_example_of_the_package_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"^    (.*)$", intact.__doc__, re.MULTILINE))
    assert "intact.quantize(" in code
    names = namespace()
    exec(code, names)  # noqa: S102
    assert names["program"] == make_program()
    assert np.array_equal(names["program"].codes(names["x"]), make_program().codes(names["x"]))
    assert (tmp_path / "program.safetensors").is_file()


def test_the_python_examples_of_the_readme_run_in_order(tmp_path, monkeypatch):
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    if not examples:
        pytest.skip("README.md has no Python example")
    monkeypatch.chdir(tmp_path)
    names = namespace()
    for example in examples:
        exec(example, names)  # noqa: S102
