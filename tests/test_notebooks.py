"""The notebooks run, what is stored with them is clean, and the index has all of them."""

from __future__ import annotations

import base64
import io

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


FORGET = nbformat.v4.new_code_cell("""
import pyro
pyro.clear_param_store()
get_ipython().run_line_magic("reset", "-s -f")
""")


def test_notebooks_run(tmp_path):
    """In small, one after the other in one process: most of their time goes into imports."""
    sources = [cell.source for path in NOTEBOOKS for cell in (*code(read(path)), FORGET)]
    cells = map(nbformat.v4.new_code_cell, sources)
    notebook = execute.execute(write(tmp_path / "all.ipynb", *cells), smoke=True)
    assert list(execute.problems(notebook)) == []


@notebooks
def test_notebook_follows_the_conventions(path):
    first, *others = code(read(path))
    assert 'SMOKE = "PYRO_BAYES_SMOKE" in os.environ' in first.source
    # Above, only the first of them imports Pyro and would warn.
    assert 'warnings.filterwarnings("ignore", message="IProgress not found")' in first.source
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


def write(path, *cells):
    path.write_text(execute.write(execute.tidy(nbformat.v4.new_notebook(cells=cells))))
    return path


def drawing(source, *colours):
    cell = nbformat.v4.new_code_cell(source)
    for colour in colours:
        file = io.BytesIO()
        Image.new("RGB", (20, 10), colour).save(file, "png")
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        cell.outputs.append(nbformat.v4.new_output("display_data", data=data))
    return cell


@pytest.mark.parametrize(("mark", "shown"), [(True, (0, 255, 0)), (False, (0, 0, 255))])
def test_picture_is_the_marked_figure_or_the_last(tmp_path, mark, shown):
    marked = drawing("# Shown in the index.\nf()" if mark else "f()", "lime")
    path = write(tmp_path / "a.ipynb", drawing("f()", "red"), marked, drawing("f()", "red", "blue"))
    picture = execute.picture(path).convert("RGB")
    assert picture.size == (execute.PICTURE_WIDTH, execute.PICTURE_WIDTH // 2)
    assert picture.getpixel((0, 0)) == shown


def test_abstract_is_the_heading_and_the_first_paragraph(tmp_path):
    text = "# A title\n\nOne line\nand another.\n\nThe rest."
    path = write(tmp_path / "a.ipynb", nbformat.v4.new_markdown_cell(text))
    assert execute.abstract(path) == ("A title", "One line and another.")


@pytest.mark.parametrize("text", ["No heading", "# A title", "# A title\n\n## Another"])
def test_what_the_index_lacks_is_an_error(tmp_path, text):
    path = write(tmp_path / "a.ipynb", nbformat.v4.new_markdown_cell(text))
    with pytest.raises(ValueError, match=r"Expected a\.ipynb to start with"):
        execute.abstract(path)
    with pytest.raises(ValueError, match=r"Expected a\.ipynb to have a figure"):
        execute.picture(path)


@pytest.mark.parametrize("smoke", [False, True])
def test_full_is_full_whatever_the_environment(tmp_path, monkeypatch, smoke):
    monkeypatch.setenv("PYRO_BAYES_SMOKE", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = """
    import os
    print("PYRO_BAYES_SMOKE" in os.environ, os.environ.get("MPLBACKEND") == "agg")
    """
    path = write(tmp_path / "a.ipynb", nbformat.v4.new_code_cell(code))
    (cell,) = execute.execute(path, smoke=smoke).cells
    assert cell.outputs[0].text == f"{smoke} False\n"


def test_files_left_behind_are_an_error(tmp_path):
    path = write(tmp_path / "a.ipynb", nbformat.v4.new_code_cell('open("left.txt", "w").close()'))
    with pytest.raises(ValueError, match=r"no files behind; got \['left.txt'\]"):
        execute.execute(path, smoke=True)


def test_a_notebook_without_a_place_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "other.ipynb")
    monkeypatch.setattr(execute, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"place in ORDER; got \['other'\]"):
        execute.paths()


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
