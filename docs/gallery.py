"""The gallery: a card for each notebook, with its heading, its first paragraph and a figure."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SHOWN = "# Shown in the index."
"""The comment of the cell whose figure is shown; without it, it is the last figure."""

CARD = """:::{{grid-item-card}} {title}
:link: {link}
:link-type: doc
:img-top: /{picture}
:img-alt: {title}

{text}
:::
"""


class Gallery(SphinxDirective):
    """Shows a card for each notebook of the folder `notebooks`, and puts them in the contents.

    Its content names notebooks to begin with, one a line. The others follow by name.
    """

    has_content = True

    def run(self) -> list[Any]:
        found = {p.stem: p for p in sorted(Path(self.env.srcdir, "notebooks").glob("*.ipynb"))}
        first = [name.strip() for name in self.content if name.strip()]
        if unknown := [name for name in first if name not in found]:
            raise self.error(f"Expected names of notebooks; got {unknown}.")
        cards, pages = [], []
        for name in dict.fromkeys([*first, *found]):
            self.env.note_dependency(str(found[name]))
            cells = json.loads(found[name].read_text(encoding="utf-8"))["cells"]
            try:
                (title, text), shown = abstract(cells), figure(cells)
            except ValueError as error:
                raise self.error(f"{name}.ipynb: {error}") from error
            picture = Path("_build", "gallery", f"{name}.png")
            path = Path(self.env.srcdir, picture)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(shown)
            pages.append(f"notebooks/{name}")
            cards.append(
                CARD.format(title=title, text=text, link=pages[-1], picture=picture.as_posix())
            )
        grid = "\n".join(["::::{grid} 1 1 2 2", ":gutter: 3", "", *cards, "::::"])
        toctree = "\n".join(["```{toctree}", ":hidden:", "", *pages, "```"])
        return self.parse_text_to_nodes(f"{grid}\n\n{toctree}\n")


def abstract(cells: list[Any]) -> tuple[str, str]:
    """Returns the heading and the paragraph that a notebook starts with.

    Arguments:
        cells: The cells of the notebook.

    Raises:
        ValueError: If it starts with something else.
    """
    start = "".join(cells[0]["source"])
    found = re.match(r"# (.+)\n\n([^#\n].*(?:\n.+)*)", start)
    if cells[0]["cell_type"] != "markdown" or found is None:
        raise ValueError(
            f"Expected a notebook to start with a heading, a paragraph; got {start!r}."
        )
    text = found[2].replace("\n", " ")
    return found[1], text if text[-1] in ".?!" else text.rstrip(",:") + "."


def figure(cells: list[Any]) -> bytes:
    """Returns the figure of a notebook that its card shows, a PNG.

    Arguments:
        cells: The cells of the notebook.

    Raises:
        ValueError: If there is none.
    """
    shown = None
    for cell in cells:
        for data in figures(cell):
            shown = data
        if shown is not None and SHOWN in "".join(cell["source"]):
            break
    if shown is None:
        raise ValueError("Expected a notebook with a figure; got one without.")
    return base64.b64decode(shown)


def figures(cell: Any) -> Iterator[str]:
    """Returns the figures that a cell is stored with, in base64.

    Arguments:
        cell: The cell.
    """
    for output in cell.get("outputs", ()):
        if "image/png" in output.get("data", {}):
            yield "".join(output["data"]["image/png"])


def outdated(app: Sphinx, env: Any, added: set[str], changed: set[str], removed: set[str]) -> Any:
    """Returns the page of the gallery, to be read again, if notebooks came or went."""
    moved = any(page.startswith("notebooks/") for page in added | removed)
    return ["notebooks"] if moved and "notebooks" in env.found_docs else []


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("gallery", Gallery)
    app.connect("env-get-outdated", outdated)
    return {"parallel_read_safe": True}
