"""The notebooks run, what is stored with them is clean, and the index has all of them."""

from __future__ import annotations

import pytest

for module in ("PIL", "ipykernel", "matplotlib", "nbclient", "nbformat", "rich", "sklearn"):
    pytest.importorskip(module)

import execute  # noqa: E402
import nbformat  # noqa: E402
from PIL import Image, ImageChops, ImageStat  # noqa: E402

NOTEBOOKS = execute.paths()

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@notebooks
def test_notebook_runs(path):
    notebook = execute.execute(path, smoke=True)
    assert list(execute.problems(notebook)) == []


@notebooks
def test_notebook_follows_the_conventions(path):
    first, *others = code(read(path))
    assert 'SMOKE = "PYRO_BAYES_SMOKE" in os.environ' in first.source
    sizes = [cell.source for cell in others if "SMOKE" in cell.source]
    assert len(sizes) <= 1, "sizes are chosen in one place"
    for cell in (first, *others):
        lines = cell.source.splitlines()
        assert len(lines) <= 20, cell.source
        assert max(map(len, lines)) <= 100, cell.source


@notebooks
def test_stored_file_is_tidy(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert list(execute.problems(notebook)) == []
    assert path.read_text(encoding="utf-8") == execute.write(execute.tidy(notebook))
    assert path.stat().st_size < 400_000


@notebooks
def test_picture_is_a_figure_of_the_notebook(path):
    file = execute.picture_path(path)
    assert file.stat().st_size < 60_000
    shown, expected = (image.convert("RGB") for image in (Image.open(file), execute.picture(path)))
    assert shown.size == expected.size
    difference = ImageStat.Stat(ImageChops.difference(shown, expected))
    assert max(difference.mean) < 1  # of 255, by other versions of the library that scales


def test_every_picture_has_a_notebook():
    pictures = {path.stem for path in (execute.FOLDER / "pictures").iterdir()}
    assert pictures == {path.stem for path in NOTEBOOKS}


def test_index_has_every_notebook():
    _, stored, _ = execute.surroundings()
    assert stored == execute.index()
    for path in execute.FOLDER.glob("*.ipynb"):
        assert f"](notebooks/{path.name})" in stored
        assert f'src="notebooks/pictures/{path.stem}.png"' in stored
    assert all(len(execute.abstract(path)[1]) < 320 for path in NOTEBOOKS)


def test_outputs_are_tidied():
    stream = {"output_type": "stream", "name": "stdout", "text": "a\n"}
    figure = {
        "output_type": "display_data",
        "data": {"image/png": "0x12345678"},
        "metadata": {"image/png": {"width": 1}},
    }
    cell = nbformat.v4.new_code_cell("print()", execution_count=7, metadata={"time": 1})
    cell.outputs = [nbformat.from_dict(o) for o in (stream, {**stream, "text": "b\n"}, figure)]
    notebook = execute.tidy(nbformat.v4.new_notebook(cells=[cell], metadata={"signature": 1}))
    nbformat.validate(notebook)
    (cell,) = notebook.cells
    assert (cell.id, cell.execution_count, cell.metadata) == ("cell-00", 1, {})
    text, image = cell.outputs
    assert text.text == "a\nb\n"
    assert image.metadata == {}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert list(execute.problems(notebook)) == []


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ({"output_type": "stream", "name": "stderr", "text": "careful"}, "stderr"),
        ({"output_type": "stream", "name": "stdout", "text": "in /home/someone/x"}, "path"),
        ({"output_type": "stream", "name": "stdout", "text": "<f at 0x7f3b2c>"}, "address"),
        ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, "failed"),
    ],
    ids=["stderr", "path", "address", "error"],
)
def test_problems_are_found(output, problem):
    cell = nbformat.v4.new_code_cell("f()")
    cell.outputs = [nbformat.from_dict(output)]
    (found,) = execute.problems(nbformat.v4.new_notebook(cells=[cell]))
    assert problem in found
