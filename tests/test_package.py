from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import veiltune

SOURCE = Path(veiltune.__file__)
HEAVY = ("torch", "transformers", "peft", "datasets", "grpc", "pydantic")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_is_fast_and_light() -> None:
    seconds = [
        float(run("import time; t = time.perf_counter(); import veiltune; print(time.perf_counter() - t)"))
        for _ in range(3)
    ]
    assert min(seconds) < 0.5
    assert run(f"import sys, veiltune; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_the_lightness_check_can_fail() -> None:
    assert run(f"import sys, pydantic; print([name for name in {HEAVY} if name in sys.modules])") == "['pydantic']"


@pytest.mark.parametrize("name", veiltune.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(veiltune, name).__name__ == name
    assert name in dir(veiltune)


def test_the_three_lists_of_names_agree() -> None:
    assert sorted(veiltune.__all__) == sorted([*veiltune._HOMES, "VeiltuneError"])
    assert {name: f"veiltune.{home}" for name, home in veiltune._HOMES.items()} == typed_imports()


def typed_imports() -> dict[str, str | None]:
    """Name -> module as type checkers see them."""
    (block,) = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If)]
    return {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'split_modle'"):
        _ = veiltune.split_modle


def test_installed_version() -> None:
    try:
        assert version("veiltune") == veiltune.__version__
    except PackageNotFoundError:
        pytest.skip("the package is used from its source tree, not installed")


def test_types_are_shipped() -> None:
    assert (SOURCE.parent / "py.typed").exists()
