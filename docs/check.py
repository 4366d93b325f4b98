"""Checks a built site: links, figures, notebooks, names, and that it needs no network.

`python docs/check.py docs/_build/html` prints what is wrong, and fails if anything is.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "pyro_bayes",
    "pyro_bayes.likelihoods",
    "pyro_bayes.training",
    "pyro_bayes.evaluation",
    "pyro_bayes.evaluation.plots",
    "pyro_bayes.priors",
)
"""The modules whose public names have an entry in the reference."""


class Page(HTMLParser):
    """A page: what it can be linked to at, what it links to, what it loads, and its figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.images: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "link" and found.get("href") and found.get("rel") != "canonical":
            self.loads.append(found["href"])
        if tag == "img":
            self.images.append(found.get("src", ""))
        if tag in ("img", "script", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"])


def problems_of_links(site: Path) -> Iterator[str]:
    """Returns links to pages or anchors that do not exist, files that are missing or elsewhere.

    Arguments:
        site: The folder of the site.
    """
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site)
        for target in page.loads:
            parts = urlsplit(target)
            if parts.scheme in ("http", "https") or parts.netloc:
                yield f"{name} loads {target} from a network"
            elif parts.path and not (path.parent / unquote(parts.path)).is_file():
                yield f"{name} misses {target}"
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            linked = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not linked.is_file():
                yield f"{name} links to {target}, which is not there"
                continue
            anchors = pages[linked].anchors if linked in pages else set()
            if parts.fragment and unquote(parts.fragment) not in anchors:
                yield f"{name} links to {target}, which has no such place"


def problems_of_notebooks(site: Path, folder: Path) -> Iterator[str]:
    """Returns notebooks that have no page or no card, or whose page lacks figures.

    Arguments:
        site: The folder of the site.
        folder: The folder of the notebooks.
    """
    gallery = Page((site / "notebooks.html").read_text(encoding="utf-8"))
    for path in sorted(folder.glob("*.ipynb")):
        target = f"notebooks/{path.stem}.html"
        if target not in gallery.links:
            yield f"{path.name} has no card in the gallery"
        if not (site / target).is_file():
            yield f"{path.name} has no page"
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        stored = sum(
            any(kind.startswith("image/") for kind in output.get("data", {}))
            for cell in cells
            for output in cell.get("outputs", ())
        )
        shown = [
            source
            for source in Page((site / target).read_text(encoding="utf-8")).images
            if "_images/" in source
        ]
        if len(shown) < stored:
            yield f"{path.name} is stored with {stored} figures; its page has {len(shown)}"


def problems_of_names(site: Path) -> Iterator[str]:
    """Returns public names that the reference does not have.

    Arguments:
        site: The folder of the site.
    """
    anchors: set[str] = set()
    for path in site.glob("api/*.html"):
        anchors |= Page(path.read_text(encoding="utf-8")).anchors
    anchors |= {anchor.removeprefix("module-") for anchor in anchors}
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            if f"{module}.{name}" not in anchors and f"pyro_bayes.{name}" not in anchors:
                yield f"{module}.{name} is not in the reference"


def problems(site: Path) -> Iterator[str]:
    """Returns all that is wrong with a site.

    Arguments:
        site: The folder of the site.
    """
    yield from problems_of_links(site)
    yield from problems_of_notebooks(site, ROOT / "notebooks")
    yield from problems_of_names(site)


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1]).resolve()))
    sys.exit("\n".join(found) or None)
