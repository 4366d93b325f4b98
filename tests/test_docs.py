"""The pages of the documentation: their code runs, and what the build is checked for is found."""

import doctest
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
    run(path)


def test_sessions_are_checked(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("```python\nx = 1\n```\n\n```pycon\n>>> x + 1\n3\n```\n")
    with pytest.raises(AssertionError):
        run(path)
