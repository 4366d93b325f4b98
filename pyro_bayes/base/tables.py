"""Tables on a terminal, plain or by `rich`."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_bayes.base.extras import require


def text_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str]
) -> str:
    """Returns a table as plain text, without a line break at the end.

    Arguments:
        headers: The names of the columns.
        rows: The entries of each row.
        right: The columns whose entries are aligned on the right.

    Example:
        >>> print(text_table(["name", "size"], [["a", "10"], ["b", "5"]], right=["size"]))
        name  size
        a       10
        b        5
    """
    lines = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [">" if header in right else "<" for header in headers]
    return "\n".join(
        "  ".join(
            f"{entry:{side}{width}}" for entry, side, width in zip(line, sides, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def print_table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str]
) -> None:
    """Prints a table. Entries are never cut: a line that is too long may wrap.

    Arguments:
        title: The line above the table.
        headers: The names of the columns.
        rows: The entries of each row.
        right: The columns whose entries are aligned on the right.

    Raises:
        ImportError: If the extra `rich` is not installed.
    """
    require("rich", extra="rich")
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    wide = console.options.update(max_width=10_000)
    needed = console.measure(table, options=wide).maximum
    console.width = max(console.width, needed, len(title))
    console.print(title, table, sep="\n")
