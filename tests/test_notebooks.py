"""The notebooks run, and what is stored with them is clean."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from jupyter_client.kernelspec import KernelSpec  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
LOCAL_PATH = re.compile(
    "|".join(re.escape(str(path)) for path in (ROOT, Path.home(), Path(sys.prefix)) if path.name)
    + r"|/(?:home|root|tmp|Users)/|[A-Za-z]:\\+Users"
)

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class SamePython(AsyncKernelManager):
    """Runs each kernel with the Python of the tests, whatever is installed under its name."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def problems(notebook) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            # An image in base64 may spell anything.
            data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            text = json.dumps({**output, "data": data}, ensure_ascii=False)
            if output.output_type == "error":
                yield f"cell {number} failed: {text}"
            if output.get("name") == "stderr":
                yield f"cell {number} wrote to stderr: {text}"
            if LOCAL_PATH.search(text):
                yield f"cell {number} shows a local path: {text}"


def test_there_are_notebooks():
    assert NOTEBOOKS


@notebooks
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        kernel_manager_class=SamePython,
        resources={"metadata": {"path": str(work)}},
        timeout=120,
    )
    asyncio.run(client.async_execute())
    assert list(problems(notebook)) == []
    assert list(work.iterdir()) == []


@notebooks
def test_stored_outputs_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert list(problems(notebook)) == []


@notebooks
def test_stored_file_is_tidy(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)
    assert path.stat().st_size < 400_000
