"""Executes the notebooks, and makes their index in the project's README.

Each notebook is run from scratch, and written back with its outputs in a tidy form, so that a
change of it is a readable change of the file. What the index says is taken from the notebooks: the
heading and the paragraph that each starts with, and a figure. That is the one of the code cell with
the comment `# Shown in the index.`, or else the last.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
README = ROOT / "README.md"
ORDER = ("regression", "svi", "flows", "selective", "continual", "estimators", "sbi")
"""The names of the notebooks, in the order in which to read them."""

SMOKE = "PYRO_BAYES_SMOKE"
"""The environment variable that makes the notebooks small."""

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MARKS = "<!-- notebooks -->", "<!-- /notebooks -->"
SHOWN = "# Shown in the index."
PICTURE_WIDTH = 600
PICTURE_COLOURS = 96
_NOT_REPRODUCED = re.compile(
    "|".join(re.escape(str(path)) for path in (ROOT, Path.home(), Path(sys.prefix)) if path.name)
    + r"|/(?:home|root|tmp|Users)/|[A-Za-z]:\\+Users|\b0x[0-9a-f]{6,}"
)


class SamePython(AsyncKernelManager):
    """Runs each kernel with the Python of this process, whatever is installed under its name."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def paths() -> list[Path]:
    """Returns the notebooks that there are, in the order in which to read them.

    Raises:
        ValueError: If there is one that has no place in it.
    """
    found = {path.stem: path for path in FOLDER.glob("*.ipynb")}
    if others := sorted(set(found) - set(ORDER)):
        raise ValueError(f"Expected notebooks with a place in ORDER; got {others} too.")
    return [found[name] for name in ORDER if name in found]


def execute(path: Path, *, smoke: bool = False) -> NotebookNode:
    """Runs a notebook from scratch, in an empty folder that it must leave empty.

    Arguments:
        path: The file.
        smoke: Whether to run it in small.

    Returns:
        The notebook with its outputs, tidy.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
        ValueError: If it leaves files behind.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch, "work")
        work.mkdir()
        env = {k: v for k, v in os.environ.items() if k not in (SMOKE, "MPLBACKEND")}
        env["IPYTHONDIR"] = str(Path(scratch, "ipython"))
        # The package of this checkout, whatever is installed.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        client = NotebookClient(
            notebook,
            kernel_manager_class=SamePython,
            resources={"metadata": {"path": str(work)}},
            timeout=600,
        )
        asyncio.run(client.async_execute(env=env | ({SMOKE: "1"} if smoke else {})))
        if left := sorted(file.name for file in work.iterdir()):
            raise ValueError(f"Expected {path.name} to leave no files behind; got {left}.")
    return tidy(notebook)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Returns a notebook without what differs from run to run, and whose cells are numbered."""
    cells, count = [], 0
    for number, cell in enumerate(notebook.cells):
        clean = NotebookNode(cell, id=f"cell-{number:02d}", metadata={})
        if cell.cell_type == "code":
            count += 1
            clean.update(execution_count=count, outputs=_tidy_outputs(cell.outputs, count))
        cells.append(clean)
    metadata = nbformat.from_dict(METADATA)
    return NotebookNode(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)


def _tidy_outputs(outputs: Sequence[NotebookNode], count: int) -> list[NotebookNode]:
    clean: list[NotebookNode] = []
    for output in outputs:
        output = NotebookNode(output)
        if output.output_type == "stream":
            # Streams come in pieces that depend on the time.
            if clean and clean[-1].get("name") == output.name:
                clean[-1].text += output.text
                continue
        elif output.output_type != "error":
            output["metadata"] = {}
        if "execution_count" in output:
            output["execution_count"] = count
        clean.append(output)
    return clean


def write(notebook: NotebookNode) -> str:
    """Returns the text of a notebook's file."""
    return f"{nbformat.writes(notebook)}\n"


def problems(notebook: NotebookNode) -> Iterator[str]:
    """Returns what must not be in outputs: errors, warnings, and what no other machine shows."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            # An image in base64 may spell anything.
            data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            text = json.dumps({**output, "data": data}, ensure_ascii=False)
            if output.output_type == "error":
                yield f"cell {number} failed: {text}"
            if output.get("name") == "stderr":
                yield f"cell {number} wrote to stderr: {text}"
            if _NOT_REPRODUCED.search(text):
                yield f"cell {number} shows a local path or an address: {text}"


def picture(path: Path) -> Image.Image:
    """Returns the figure of a notebook that the index shows, in small.

    Raises:
        ValueError: If there is none.
    """
    shown: list[str] = []
    for cell in nbformat.read(path, as_version=4).cells:
        images = [
            output.data["image/png"]
            for output in cell.get("outputs", ())
            if "image/png" in output.get("data", {})
        ]
        if images:
            shown = images[-1:]
            if SHOWN in cell.source:
                break
    if not shown:
        raise ValueError(f"Expected {path.name} to have a figure; got none: execute it.")
    image = Image.open(io.BytesIO(base64.b64decode(shown[0]))).convert("RGB")
    height = round(image.height * PICTURE_WIDTH / image.width)
    small = image.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    return small.quantize(PICTURE_COLOURS, dither=Image.Dither.NONE)


def picture_path(path: Path) -> Path:
    """Returns where the picture of a notebook is."""
    return path.parent / "pictures" / f"{path.stem}.png"


def abstract(path: Path) -> tuple[str, str]:
    """Returns the heading and the paragraph that a notebook starts with.

    Raises:
        ValueError: If it starts with something else.
    """
    first = nbformat.read(path, as_version=4).cells[0]
    found = re.match(r"# (.+)\n\n([^#\n].*(?:\n.+)*)", first.source)
    if found is None:
        raise ValueError(
            f"Expected {path.name} to start with a heading and a paragraph; got {first.source!r}."
        )
    return found[1], found[2].replace("\n", " ")


def index() -> str:
    """Returns the index of the notebooks that there are, in Markdown."""
    rows = ["| | |", "|---|---|"]
    for path in paths():
        title, text = abstract(path)
        link, image = (p.relative_to(ROOT).as_posix() for p in (path, picture_path(path)))
        shown = f'<a href="{link}"><img src="{image}" width="300" alt="{title}"></a>'
        rows.append(f"| {shown} | **[{title}]({link})**<br>{text} |")
    return "\n".join(rows)


def surroundings() -> tuple[str, str, str]:
    """Returns the README in three parts: up to the index, the index, and the rest.

    Raises:
        ValueError: If its marks are not there.
    """
    before, start, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    inside, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise ValueError(f"Expected {README.name} to have the marks {MARKS}.")
    return before + start, inside.strip("\n"), end + after


def write_index() -> None:
    """Writes the pictures of the stored notebooks, and the index."""
    before, _, after = surroundings()
    for path in paths():
        target = picture_path(path)
        target.parent.mkdir(exist_ok=True)
        picture(path).save(target, optimize=True)
    README.write_text(f"{before}\n{index()}\n{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Executes notebooks and writes them, or checks that they run."""
    parser = argparse.ArgumentParser(description="Execute the notebooks and make their index.")
    parser.add_argument("names", nargs="*", help="the notebooks to execute; by default, all")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--check", action="store_true", help="run them in small, write nothing")
    kind.add_argument("--index", action="store_true", help="run none, make the index only")
    options = parser.parse_args(arguments)
    chosen = {path.stem: path for path in paths()}
    if unknown := sorted(set(options.names) - set(chosen)):
        parser.error(f"Expected names among {list(chosen)}; got {unknown}.")
    found = []
    for name in () if options.index else options.names or chosen:
        start = time.perf_counter()
        notebook = execute(chosen[name], smoke=options.check)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        found += [f"{name}: {problem}" for problem in problems(notebook)]
        if not options.check:
            chosen[name].write_text(write(notebook), encoding="utf-8")
    if not options.check:
        write_index()
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
