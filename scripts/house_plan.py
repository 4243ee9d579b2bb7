"""Draw which part of the package imports which, and say whether an import points up: docs/house.png.

grimp reads the imports, inside functions too; matplotlib draws them.
"""

import argparse
from collections import Counter
from pathlib import Path

import grimp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from house import ROOT, chapters, module_of  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

PARTS = ("root", "1_data", "2_models", "3_train", "4_infer", "5_eval", "6_api", "7_doors")
LINE, GAP, WIDTH = 0.34, 0.4, 9.4


def rooms() -> dict[str, list[str]]:
    """The modules of each part, in the order of their floors."""
    found = {part: [] for part in PARTS}
    for path in chapters():
        module = module_of(path)
        if module and not module.endswith("__init__"):
            found["root" if path.parent.name == "nbs" else path.parent.name].append(module)
    return found


def arrows(found: dict[str, list[str]]) -> Counter:
    """How many imports lead from one part to another."""
    graph = grimp.build_graph("lora_mvp", exclude_type_checking_imports=True)
    part_of = {f"lora_mvp.{module}": part for part, modules in found.items() for module in modules}
    pairs = [(a, b) for a in part_of for b in graph.find_modules_directly_imported_by(a) if b in part_of]
    return Counter((part_of[a], part_of[b]) for a, b in pairs if part_of[a] != part_of[b])


def wrapped(names: list[str], width: int = 86) -> str:
    """Names of a room on as many lines as they need."""
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += name + "   "
    return "\n".join(line.strip() for line in lines)


def draw(found: dict[str, list[str]], count: Counter, file: Path) -> None:
    """Rooms from the ground up; an arrow is as thick as it is often used."""
    names = {part: wrapped([module.split(".")[-1] for module in found[part]]) for part in PARTS}
    rows = {part: LINE * (1.5 + names[part].count("\n")) for part in PARTS}
    height = sum(rows.values()) + GAP * len(PARTS)
    figure = plt.figure(figsize=(11, height * 0.62), dpi=90)
    axes = figure.add_axes((0, 0, 1, 1))
    middle, y = {}, 0.0
    for part in PARTS:
        row = rows[part]
        middle[part] = y + row / 2
        axes.add_patch(
            FancyBboxPatch((0, y), WIDTH, row, "round,pad=0.02,rounding_size=0.08", fc="#f4f6f8", ec="#8a97a3")
        )
        axes.text(0.15, y + row / 2, part, va="center", weight="bold", size=11)
        axes.text(1.5, y + row / 2, names[part], va="center", size=8.5, family="monospace", linespacing=1.5)
        y += row + GAP
    for place, ((a, b), n) in enumerate(sorted(count.items(), key=lambda item: PARTS.index(item[0][0]))):
        span = PARTS.index(a) - PARTS.index(b)
        x = WIDTH + 0.05
        colour = "#c0392b" if span < 0 else plt.cm.viridis(PARTS.index(b) / len(PARTS))
        axes.add_patch(
            FancyArrowPatch(
                (x, middle[a] - 0.25 + 0.06 * (place % 5)),
                (x, middle[b] + 0.2),
                connectionstyle=f"arc3,rad={-0.32 - 0.03 * abs(span)}",
                arrowstyle="-|>",
                mutation_scale=9,
                lw=0.6 + n / 8,
                color=colour,
                alpha=0.75,
            )
        )
    said = "an arrow leads to what a part imports, the thicker the more it imports"
    axes.text(0, -0.3, said, va="center", size=9, color="#56616b")
    axes.set(xlim=(-0.1, WIDTH + 2.7), ylim=(-0.5, height - GAP + 0.15))
    axes.axis("off")
    figure.savefig(file, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "house.png")
    out = parser.parse_args().out
    found = rooms()
    count = arrows(found)
    draw(found, count, out)
    up = [(a, b) for a, b in count if PARTS.index(a) < PARTS.index(b)]
    modules = sum(map(len, found.values()))
    print(f"{modules} modules in {len(PARTS)} parts, {len(count)} arrows between parts, {len(up)} point up {up or ''}")


if __name__ == "__main__":
    main()
