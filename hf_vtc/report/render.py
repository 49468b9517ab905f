"""Numbers, units and tables of a report, for terminals and for plain text."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

# an ideal speed-up below this is not worth a user's time, and a report says so
WORTHWHILE = 1.1


def count(value: float) -> str:
    """With separators of thousands."""
    return f"{value:,}"


def binary_bytes(value: float) -> str:
    """In units of 1024."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 2**10:.1f} KiB"


def flops(value: float) -> str:
    """In units of 1000."""
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """In seconds or in milliseconds."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def as_text(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], notes: list[str]) -> str:
    """Title, table and notes for `print`."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    body = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        body.append("  ".join(cells).rstrip())
    return "\n".join([title, *body, *notes])


def as_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], notes: list[str]) -> Group:
    """Title, table and notes for a rich console."""
    table = Table()
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return Group(Text(title, style="bold"), table, *map(Text, notes))
