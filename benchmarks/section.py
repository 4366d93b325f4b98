"""Tables in Markdown, and the sections of a file that a script writes between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """A part of a Markdown file, between `<!-- name -->` and `<!-- /name -->`.

    Arguments:
        path: The file.
        name: The name in the marks.
    """

    path: Path
    name: str

    @property
    def marks(self) -> tuple[str, str]:
        """The lines in front of the section and behind it."""
        return f"<!-- {self.name} -->", f"<!-- /{self.name} -->"

    def surroundings(self) -> tuple[str, str]:
        """Returns what the file has in front of the first mark, and behind the second.

        Raises:
            ValueError: If the file does not have both marks.
        """
        start, end = self.marks
        before, found_start, rest = self.path.read_text(encoding="utf-8").partition(start)
        _, found_end, after = rest.partition(end)
        if not (found_start and found_end):
            raise ValueError(f"Expected {self.path} to have the marks {start} and {end}.")
        return before, after

    def write(self, parts: Sequence[str]) -> None:
        """Replaces what is between the marks.

        Arguments:
            parts: The new paragraphs and tables.
        """
        before, after = self.surroundings()
        start, end = self.marks
        text = "\n\n".join(parts)
        self.path.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def publish(parts: Iterable[str], section: Section | None) -> None:
    """Prints the parts of a report as they come, and writes them to a section in the end.

    Arguments:
        parts: The paragraphs and tables.
        section: Where to write them, if anywhere.
    """
    known = []
    for part in parts:
        print(part, end="\n\n", flush=True)
        known.append(part)
    if section:
        section.write(known)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int = 1) -> str:
    """Returns a table in Markdown, and below it why some cells have no number.

    Arguments:
        header: The titles of the columns.
        rows: The cells of each row. What follows a cell's `cannot: ` goes below the table.
        labels: The number of columns that are text; the others are aligned to the right.
    """
    ruler = ["---"] * labels + ["---:"] * (len(header) - labels)
    short = [[cell.partition(": ")[0] if "cannot: " in cell else cell for cell in r] for r in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ruler, *short)]
    reasons: dict[str, dict[str, list[str]]] = {}
    for i, title in enumerate(header):
        for row in rows:
            _, cannot, reason = row[i].partition("cannot: ")
            if cannot:
                reasons.setdefault(reason, {}).setdefault(title, []).append(row[0])
    for reason, columns in reasons.items():
        where = " / ".join(f"{title}: {'; '.join(names)}" for title, names in columns.items())
        lines += ["", f"*cannot*: {reason} ({where})."]
    return "\n".join(lines)
