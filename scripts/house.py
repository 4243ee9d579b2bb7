"""What each chapter looks like, in figures: how long its cells and its module are, and how soon it shows something.

python scripts/house.py              a table of all chapters
python scripts/house.py 3_train      of the chapters whose path begins so
python scripts/house.py --write      a table of the parts into CONTRIBUTING.md; --check says whether it is up to date
"""

import argparse
import ast
import json
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"(?m)^#\s*\|\s*([\w-]+):?")
EXPORT = {"export", "exporti", "exports"}
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
SHOWN_EARLY = 5  # a chapter shows its result within so many cells after its title


@dataclass
class Cell:
    """One code cell: its source, its directives and whether it has a saved output."""

    source: str
    directives: set[str]
    has_output: bool
    place: int  # in the notebook, from 0

    @property
    def exported(self) -> bool:
        return bool(self.directives & EXPORT)

    @property
    def lines(self) -> int:
        """Lines that hold something, directives aside."""
        return sum(bool(line.strip()) and not line.startswith("#|") for line in self.source.splitlines())

    @property
    def definitions(self) -> list[str]:
        return [node.name for node in ast.parse(self.source).body if isinstance(node, DEFINITIONS)]

    @property
    def types(self) -> list[str]:
        """Names of types that are assigned, such as `Kind = Literal[...]`; constants are all capitals."""
        assigned = [node for node in ast.parse(self.source).body if isinstance(node, ast.Assign)]
        names = [target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)]
        return [name for name in names if name[0].isupper() and not name.isupper()]

    @property
    def only_imports(self) -> bool:
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(self.source).body)


@dataclass
class Figures:
    """The figures of one chapter."""

    name: str
    module_lines: int
    lengths: list[int]  # of exported cells that define something
    definitions: list[int]  # how many each of them defines
    shown: int | None  # the place of the first output, counted from the title
    patched: int  # methods that no editor sees


def read_cells(path: Path) -> list[Cell]:
    """The code cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        Cell(source, set(DIRECTIVE.findall(source)), bool(cell["outputs"]), place)
        for place, cell in enumerate(cells)
        if cell["cell_type"] == "code" and not (source := "".join(cell["source"])).lstrip().startswith(("%", "!"))
    ]


def chapters() -> list[Path]:
    """The numbered notebooks, in the order of their floors; faces are no chapters."""
    folders = [ROOT / "nbs", *sorted((ROOT / "nbs").glob("[0-9]_*/"))]
    return [path for folder in folders for path in sorted(folder.glob("[0-9]*.ipynb")) if path.stem != "00_index"]


def module_of(path: Path) -> str | None:
    """The module that a notebook exports, without the package's name."""
    found = (re.search(r"#\| *default_exp +(\S+)", cell.source) for cell in read_cells(path))
    return next((match[1] for match in found if match), None)


def figures(path: Path) -> Figures:
    """The figures of the chapter in one notebook."""
    cells = read_cells(path)
    defining = [cell for cell in cells if cell.exported and cell.definitions]
    exported = module_of(path)
    module = ROOT / "lora_mvp" / (exported.replace(".", "/") + ".py") if exported else None
    return Figures(
        name=path.relative_to(ROOT / "nbs").with_suffix("").as_posix(),
        module_lines=len(module.read_text(encoding="utf-8").splitlines()) if module else 0,
        lengths=[cell.lines for cell in defining],
        definitions=[len(cell.definitions) for cell in defining],
        shown=next((cell.place - 1 for cell in cells if cell.has_output and "hide" not in cell.directives), None),
        patched=sum(len(re.findall(r"(?m)^@patch", cell.source)) for cell in cells if cell.exported),
    )


def tenth(lengths: list[int]) -> int:
    """Nine of ten are not longer than this."""
    return sorted(lengths)[max(0, -(-9 * len(lengths) // 10) - 1)]


HEAD = """| {what} | module lines | cell lines: median / 9 of 10 / longest | one definition | first output in cell |
|---|---|---|---|---|"""


def row(name: str, items: list[Figures]) -> str:
    """One line of the table; of several chapters the medians."""
    lengths, counts = ([n for item in items for n in getattr(item, key)] for key in ("lengths", "definitions"))
    shown = [item.shown for item in items if item.shown is not None]
    length = f"{statistics.median(lengths):g} / {tenth(lengths)} / {max(lengths)}" if lengths else ""
    single = f"{round(100 * counts.count(1) / len(counts))} %" if counts else ""
    early = f"{statistics.median(shown):g}" if shown else "none"
    return f"| {name} | {statistics.median(i.module_lines for i in items):g} | {length} | {single} | {early} |"


def table(items: list[Figures]) -> str:
    """The figures of chapters as a Markdown table, with a last line over all."""
    used = [item for item in items if item.module_lines]
    return "\n".join([HEAD.format(what="chapter"), *(row(i.name, [i]) for i in used), row("**all** (median)", used)])


def table_of_parts(items: list[Figures]) -> str:
    """The same, a line for each part of the book."""
    parts = defaultdict(list)
    for item in items:
        if item.module_lines:
            parts[item.name.split("/")[0] if "/" in item.name else "(root)"].append(item)
    lines = [row(f"{part}, {len(found)} chapters", found) for part, found in parts.items()]
    return "\n".join([HEAD.format(what="part"), *lines, row("**all** (median)", sum(parts.values(), []))])


def in_text(text: str, new: str) -> str:
    """`text` with the table of parts between its marks."""
    begin, end = "<!-- figures of the house -->\n", "\n<!-- end of figures -->"
    head, rest = text.split(begin)
    return head + begin + new + end + rest.split(end)[1]


def names_defined_twice() -> dict[str, list[str]]:
    """Public functions, classes and types that two modules define."""
    where = defaultdict(set)
    for path in chapters():
        for cell in read_cells(path):
            if cell.exported and "@patch" not in cell.source:
                for name in (*cell.definitions, *cell.types):
                    where[name].add(path.relative_to(ROOT / "nbs").with_suffix("").as_posix())
    return {name: sorted(paths) for name, paths in where.items() if len(paths) > 1 and not name.startswith("_")}


def import_cells_unfolded(path: Path) -> list[int]:
    """Shown cells that only import and are not folded on the site."""
    return [
        cell.place
        for cell in read_cells(path)
        if not cell.directives & (EXPORT | {"hide", "default_exp", "code-fold"}) and cell.only_imports
    ]


def imports_mixed(path: Path) -> list[int]:
    """Cells that hold an import and something else: the build of the site would run all of it, out of its context."""
    imports = ast.Import | ast.ImportFrom
    return [
        cell.place
        for cell in read_cells(path)
        if not cell.directives & (EXPORT | {"exec_doc", "eval"})
        and not cell.only_imports
        and any(isinstance(node, imports) for node in ast.walk(ast.parse(cell.source)))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", nargs="?", default="", help="only chapters whose path begins so")
    parser.add_argument("--flaws", action="store_true", help="also list what the house test would name")
    parser.add_argument("--write", action="store_true", help="write the table of parts into CONTRIBUTING.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if CONTRIBUTING.md is not up to date")
    args = parser.parse_args()
    if args.write or args.check:
        file = ROOT / "CONTRIBUTING.md"
        old = file.read_text(encoding="utf-8")
        new = in_text(old, table_of_parts([figures(path) for path in chapters()]))
        if args.write:
            file.write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit("CONTRIBUTING.md is out of date; run: python scripts/house.py --write")
        return
    chosen = [path for path in chapters() if path.relative_to(ROOT / "nbs").as_posix().startswith(args.start)]
    print(table([figures(path) for path in chosen]))
    if args.flaws:
        for path in chosen:
            item = figures(path)
            name = item.name
            if item.patched:
                print(f"{name}: {item.patched} patched methods")
            if item.module_lines > 500:
                print(f"{name}: {item.module_lines} lines")
            if item.module_lines and (item.shown is None or item.shown > SHOWN_EARLY):
                print(f"{name}: first output in cell {item.shown}")
            for cell in read_cells(path):
                if cell.exported and len(cell.definitions) > 1:
                    print(f"{name} cell {cell.place}: {len(cell.definitions)} definitions, {cell.lines} lines")
                elif cell.exported and cell.lines > 25:
                    print(f"{name} cell {cell.place}: {cell.lines} lines")
            print("\n".join(f"{name} cell {place}: imports not folded" for place in import_cells_unfolded(path)))
            print("\n".join(f"{name} cell {place}: imports and other code" for place in imports_mixed(path)))
        for name, paths in sorted(names_defined_twice().items()):
            if any(path.startswith(args.start) for path in paths):
                print(f"{name}: defined in {', '.join(paths)}")


if __name__ == "__main__":
    main()
