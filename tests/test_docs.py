"""The pages of the documentation: their code runs, and what the build is checked for is found."""

import doctest
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, picture = script("check"), script("picture")
PAGES = sorted(ROOT.glob("docs/*.md"))
FENCE = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(path):
    """Runs the blocks of a page in one scope: code as it is, sessions as doctests."""
    scope = {}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for kind, code in FENCE.findall(path.read_text()):
        if kind == "python":
            exec(compile(code, path.name, "exec"), scope)
        else:
            session = parser.get_doctest(code, scope, path.name, path.name, 0)
            runner.run(session, clear_globs=False)
            scope.update(session.globs)
    assert runner.failures == 0
    return scope


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = run(path)
    if path.stem == "index":
        picture.draw(scope, tmp_path)
        pictures = {file.name for file in tmp_path.iterdir()}
        assert pictures == {"regression-dark.svg", "regression-light.svg"}
    if path.stem == "priors":
        picture.draw_priors(scope, tmp_path)
        pictures = {file.name for file in tmp_path.iterdir()}
        assert pictures == {"priors-dark.svg", "priors-light.svg"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_code_is_left_out(path):
    text = path.read_text()
    fences = re.findall(r"`{3,}\s*([a-z]+)", text)
    assert set(fences) <= {"python", "pycon", "sh"}
    assert len(FENCE.findall(text)) == len([kind for kind in fences if kind != "sh"])


def test_sessions_are_checked(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("```python\nx = 1\n```\n\n```pycon\n>>> x + 1\n3\n```\n")
    with pytest.raises(AssertionError):
        run(path)


def site(folder, **pages):
    for name, body in pages.items():
        folder.joinpath(f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    return folder


@pytest.mark.parametrize(
    ("body", "found"),
    {
        "page": ('<a href="none.html">x</a>', "links to none.html"),
        "anchor": ('<a href="other.html#none">x</a>', "no such place"),
        "own anchor": ('<a href="#none">x</a>', "no such place"),
        "figure": ('<img src="none.png">', "misses none.png"),
        "network": ('<script src="https://example.org/a.js"></script>', "from a network"),
        "sound": ('<a href="other.html#there">x</a><a href="https://example.org">y</a>', None),
    }.values(),
)
def test_broken_links_are_found(tmp_path, body, found):
    site(tmp_path, page=body, other='<p id="there">z</p>')
    problems = list(check.problems_of_links(tmp_path))
    assert [found in problem for problem in problems] == [True] * (found is not None)


def test_missing_notebooks_are_found(tmp_path):
    (tmp_path / "notebooks").mkdir()
    output = {"data": {"image/png": ""}}
    text = json.dumps({"cells": [{"outputs": [output, output]}, {"source": "# Text"}]})
    for name in ("one", "two", "three"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(text)
    cards = '<a href="notebooks/one.html">1</a><a href="notebooks/two.html">2</a>'
    site(tmp_path, notebooks=cards)
    site(tmp_path / "notebooks", one='<img src="../_images/a.png">' * 2)
    site(tmp_path / "notebooks", three='<img src="../_images/a.png"><img src="logo.png">')
    assert list(check.problems_of_notebooks(tmp_path, tmp_path / "notebooks")) == [
        "three.ipynb has no card in the gallery",
        "three.ipynb is stored with 2 figures; its page has 1",
        "two.ipynb has no page",
    ]


def test_missing_names_are_found(tmp_path):
    (tmp_path / "api").mkdir()
    names = {name for module in check.MODULES for name in importlib.import_module(module).__all__}
    anchors = [f"{m}.{n}" for m in check.MODULES for n in names if (m, n) != (m, "diagnose")]
    site(tmp_path / "api", page="".join(f'<p id="{anchor}"></p>' for anchor in anchors))
    missing = ["pyro_bayes.training.diagnose is not in the reference"]
    assert list(check.problems_of_names(tmp_path)) == missing
