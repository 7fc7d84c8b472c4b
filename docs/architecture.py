"""Draws docs/architecture.svg from the code's own imports: `python docs/architecture.py`.

A room is a sub-package, or a module that stands beside them. An arrow says that a room imports another; where one way
leads over a third room, the direct arrow is left out. Rooms stand above all that they import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
HOUSES = ("coordinator", "edge_client", "converters", "oneround")
ALONE = {"converters", "oneround"}  # houses that are one room
SHARED = "modules"

WIDTH, GAP, HEIGHT, STEP = 118, 14, 38, 82  # of a room, in pixels; between rooms, and from floor to floor
COLOURS = {"coordinator": "#2b6cb0", "edge_client": "#2f855a", "converters": "#b7791f", "oneround": "#4a5568"}

Rooms = Mapping[str, set[str]]  # rooms that each room imports


def folder(house: str) -> Path:
    """Where a house's files lie."""
    return ROOT / "proto" / house if house == "oneround" else ROOT / house


def room(module: str) -> str:
    """The room that a module of ours is in, as `coordinator.auth`; empty for a module that is not ours."""
    house, _, rest = module.partition(".")
    if house not in HOUSES:
        return ""
    first = rest.partition(".")[0]
    return f"{house}.{SHARED}" if house in ALONE or not first else f"{house}.{first}"


def imported(file: Path) -> Iterator[str]:
    """The modules that a file names in its imports."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module(file: Path) -> str:
    """A file's dotted name."""
    below = file.relative_to(ROOT / "proto" if "proto" in file.relative_to(ROOT).parts else ROOT)
    return ".".join(below.with_suffix("").parts).removesuffix(".__init__")


def rooms() -> dict[str, set[str]]:
    """Every room, and the rooms that it imports."""
    arrows: dict[str, set[str]] = {}
    for house in HOUSES:
        for file in sorted(folder(house).rglob("*.py")):
            if file.read_text("utf-8").strip():
                here = room(module(file))
                targets = {room(name) for name in imported(file)} - {"", here}
                arrows.setdefault(here, set()).update(targets)
    arrows.pop("coordinator.modules", None)
    arrows.pop("edge_client.modules", None)
    return {name: {target for target in targets if target in arrows} for name, targets in arrows.items()}


def floors(arrows: Rooms) -> dict[str, int]:
    """The floor of each room: 0 where it imports nothing, else one above the highest that it imports.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    heights: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise ValueError(f"a circle of imports: {' -> '.join((*above[above.index(name) :], name))}")
        if name not in heights:
            heights[name] = max((height(target, (*above, name)) + 1 for target in arrows[name]), default=0)
        return heights[name]

    for name in arrows:
        height(name, ())
    return heights


def direct(arrows: Rooms) -> dict[str, set[str]]:
    """The arrows that no way over a third room stands for."""
    reach: dict[str, set[str]] = {}
    for name in sorted(arrows, key=floors(arrows).__getitem__):
        reach[name] = arrows[name].union(*(reach[target] for target in arrows[name]))
    return {
        name: {target for target in targets if not any(target in reach[other] for other in targets - {target})}
        for name, targets in arrows.items()
    }


def places(arrows: Rooms) -> dict[str, tuple[int, int]]:
    """Left upper corners: the two programs side by side, each house's rooms by floor, what they share below."""
    heights = floors(arrows)
    corners: dict[str, tuple[int, int]] = {}
    below = 0
    for group in (("oneround",), ("converters",), ("coordinator", "edge_client")):
        left, tallest = 0, 0
        for house in group:
            levels = sorted({heights[name] for name in arrows if name.startswith(f"{house}.")})
            widest = 0
            for level, height in enumerate(levels):
                row = sorted(name for name in arrows if name.startswith(f"{house}.") and heights[name] == height)
                widest = max(widest, len(row))
                for column, name in enumerate(row):
                    corners[name] = (left + column * (WIDTH + GAP), -(below + level) * STEP)
            left += widest * (WIDTH + GAP) + 4 * GAP
            tallest = max(tallest, len(levels))
        below += tallest
    top, right = min(y for _, y in corners.values()), max(x for x, _ in corners.values()) + WIDTH
    centred = {}
    for name, (x, y) in corners.items():
        shift = 0
        if name.split(".")[0] in ALONE:
            row = [other for other, (_, level) in corners.items() if level == y]
            shift = (right - len(row) * (WIDTH + GAP)) // 2
        centred[name] = (x + shift + GAP, y - top + 3 * GAP)
    return centred


def svg() -> str:
    """The picture."""
    arrows = rooms()
    corners = places(arrows)
    width = max(x for x, _ in corners.values()) + WIDTH + GAP
    height = max(y for _, y in corners.values()) + HEIGHT + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="12">',
        "<title>The rooms of oneround and what they import</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for name, targets in sorted(direct(arrows).items()):
        for target in sorted(targets):
            parts.append(_arrow(corners[name], corners[target], COLOURS[name.split(".")[0]]))
    for name, (x, y) in sorted(corners.items()):
        house, _, label = name.partition(".")
        text = house if label == SHARED else label
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="white" stroke="{COLOURS[house]}"'
            f' stroke-width="1.5"/><text x="{x + WIDTH // 2}" y="{y + 23}" text-anchor="middle">{escape(text)}</text>'
        )
    for house in ("coordinator", "edge_client"):
        left = min(x for name, (x, _) in corners.items() if name.startswith(f"{house}."))
        parts.append(
            f'<text x="{left}" y="22" font-size="15" font-weight="bold" fill="{COLOURS[house]}">{house}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(start: tuple[int, int], end: tuple[int, int], colour: str) -> str:
    """From the bottom of a room to the top of another, bent so that it leaves and arrives upright."""
    x, y, to_x, to_y = start[0] + WIDTH // 2, start[1] + HEIGHT, end[0] + WIDTH // 2, end[1]
    bend = (to_y - y) // 2
    return (
        f'<path d="M{x} {y} C{x} {y + bend} {to_x} {to_y - bend} {to_x} {to_y}" fill="none" stroke="{colour}"'
        ' stroke-opacity="0.45"/>'
    )


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(svg())
