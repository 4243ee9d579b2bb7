"""Write README.md from nbs/index.ipynb without Quarto, its links absolute; `--check` only says whether it is up to date."""

import argparse
import difflib
import json
import os
import re
import sys
from pathlib import Path

from build_site import ADDRESS, FILES, PICTURES, place, relink
from execnb.nbio import dict2nb, read_nb
from nbconvert import MarkdownExporter
from nbdev.processors import FilterDefaults, add_links, insert_warning
from nbformat import from_dict

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
NOTE = "<!-- Written by scripts/readme.py from nbs/index.ipynb: edit that notebook, not this file. -->\n\n"


class ReadmeFilter(FilterDefaults):
    """nbdev's own steps, less its links to the rendered site (a README says addresses in full) and its note (ours says more)."""

    def base_procs(self):
        return [proc for proc in super().base_procs() if proc not in (add_links, insert_warning)]


def front_matter(raw: str) -> str:
    """The title and the one-line description that nbdev moved into the first raw cell, as Markdown."""
    found = {
        key: json.loads(value) if value.startswith('"') else value.strip("'")
        for key, value in re.findall(r"(?m)^(title|description): *(.+?) *$", raw)
    }
    title = f"# {found['title']}\n\n"
    return title + (f"> {found['description']}\n\n" if found.get("description") else "")


def absolute(file: Path) -> str:
    """The address of a file for readers who are elsewhere, on the page of the package say."""
    on_site = place(file)
    if file.suffix in (".png", ".svg"):
        return PICTURES + file.relative_to(ROOT).as_posix()
    return (
        ADDRESS + on_site.as_posix().removesuffix("index.html")
        if on_site
        else FILES + file.relative_to(ROOT).as_posix()
    )


def render(index: Path) -> str:
    """The Markdown of one notebook."""
    os.environ["IN_TEST"] = "1"
    nb = read_nb(index)
    ReadmeFilter()(nb)
    cells = [dict(cell) for cell in nb.cells]
    head = front_matter(cells.pop(0)["source"]) if cells[0]["cell_type"] == "raw" else ""
    clean = json.loads(json.dumps(dict2nb(dict(nb, cells=cells)), default=dict))
    clean["metadata"] = {"language_info": {"name": "python"}}
    body, resources = MarkdownExporter().from_notebook_node(from_dict(clean))
    if resources.get("outputs"):
        raise SystemExit("index.ipynb has a picture among its outputs: save it under nbs/images and link it instead")
    body = re.sub(r"\n{3,}", "\n\n", relink(body, index.parent, absolute)).strip()
    return NOTE + head + body + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md is out of date")
    check = parser.parse_args().check
    os.chdir(ROOT)
    new, old = render(INDEX), README.read_text(encoding="utf-8") if README.exists() else ""
    if new == old:
        print("README.md is up to date")
        return 0
    if check:
        print("README.md is out of date; run: python scripts/readme.py")
        print(
            "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "index.ipynb", lineterm=""))
        )
        return 1
    README.write_text(new, encoding="utf-8")
    print("wrote README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
