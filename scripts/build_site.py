"""Build the site into _docs/ and look at every link and picture of it.

python scripts/build_site.py             process the notebooks, render all pages, check the result
python scripts/build_site.py --check     only the last

Pages are nbs/**/*.ipynb as nbdev prepares them for readers, docs/**/*.md and the two long texts of the root; which of them stand where is
said in _quarto.yml. Quarto renders them where it is installed, smalldocs (pure Python, the same _quarto.yml) elsewhere.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import yaml
from execnb.nbio import mk_cell, read_nb
from nbdev import serve_drv
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "_docs"
SETTINGS = get_config(path=ROOT)
ADDRESS = f"{SETTINGS.doc_host}{SETTINGS.doc_baseurl}/"
FILES = f"{SETTINGS.git_url}/blob/{SETTINGS.branch}/"
PICTURES = f"{SETTINGS.git_url.replace('github.com', 'raw.githubusercontent.com')}/{SETTINGS.branch}/"
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
SHOWN_AS_THEY_ARE = (".png", ".jpg", ".svg", ".json", ".css")
TITLE = re.compile(r"#\s[^\n]*\s*(?:>[^\n]*\n?)*")
BLOCK = re.compile(r"(?ms)(^```.*?^```[ ]*$)")
TO_A_NAME = re.compile(rf"\[(`[^`]+`)\]\({re.escape(ADDRESS)}[^)\s]*\)")  # written by nbdev, in blocks of code, too
TO_A_PRIVATE_NAME = re.compile(
    rf"\[(`[^`]+`)\]\({re.escape(ADDRESS)}[^)\s]*#_[^)\s]*\)"
)  # which has no place on a page
LINK = re.compile(r"(\]\(|(?:src|href)=\")(?![a-z]+:|#|/)([^)\"\s]+)")


def place(path: Path) -> PurePosixPath | None:
    """Where a file of the repository stands on the site; None: it is no part of it."""
    path = path.relative_to(ROOT)
    if path.as_posix() == "README.md":
        return PurePosixPath("index.html")
    if path.as_posix() not in ROOT_PAGES and path.parts[0] not in ("nbs", "docs"):
        return None
    inner = path.relative_to(path.parts[0]) if path.parts[0] in ("nbs", "docs") else path
    if path.suffix == ".ipynb":
        return PurePosixPath(_nbpath2html(inner).as_posix())  # nbdev's rule: no number, as in its links from names
    if path.suffix == ".md":
        return PurePosixPath(inner.with_suffix(".html").as_posix())
    return PurePosixPath(inner.as_posix()) if path.suffix in SHOWN_AS_THEY_ARE else None


def relink(text: str, folder: Path, write: Callable[[Path], str]) -> str:
    """Markdown whose links to files are written anew; `folder` is where they start, and a dead one is an error."""

    def replace(match: re.Match) -> str:
        target, hash_sign, anchor = match[2].partition("#")
        full = Path(os.path.normpath(folder / target))
        if not full.exists():
            raise SystemExit(f"{folder.relative_to(ROOT)}: link to {target}, but there is no {full.relative_to(ROOT)}")
        return match[1] + write(full) + hash_sign + anchor

    parts = BLOCK.split(text)  # code blocks stay as they are
    return "".join(part if i % 2 else LINK.sub(replace, part) for i, part in enumerate(parts))


def for_page(text: str, source: Path) -> str:
    """Markdown of one page, its links relative to where the page stands, also those that nbdev made from names."""
    folder = place(source).parent

    def write(full: Path) -> str:
        there = place(full)
        return os.path.relpath(there, folder) if there else FILES + full.relative_to(ROOT).as_posix()

    up = "".join("../" for _ in folder.parts)
    text = BLOCK.sub(lambda block: TO_A_NAME.sub(r"\1", block[0]), TO_A_PRIVATE_NAME.sub(r"\1", text))
    return relink(text, source.parent, write).replace(ADDRESS, up)


def notebook_page(source: Path, processed: Path) -> str:
    """A processed notebook with its links mended; its name is said by its place, not by its head."""
    nb = json.loads(processed.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] != "code":
            cell["source"] = re.sub(r"(?m)^output-file:.*\n", "", for_page("".join(cell["source"]), source))
        for output in cell.get("outputs", []):
            for kind in {"text/markdown", "text/html"} & set(output.get("data", {})):
                output["data"][kind] = for_page("".join(output["data"][kind]), source)
    return json.dumps(nb)


def title_apart(path: Path):
    """A notebook whose title stands alone: nbdev makes the page's head of its cell, and drops what else is in there."""
    nb = read_nb(path)
    for k, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            head = TITLE.match(cell.source)
            if head and (rest := cell.source[head.end() :].strip()):
                cell.source = head[0]
                nb.cells.insert(k + 1, mk_cell(rest, "markdown"))
            return nb
    return nb


def prepared() -> Path:
    """The folder of all notebooks as nbdev prepares them, made anew where the package or this file has changed since."""
    folder = ROOT / "_proc"
    serve_drv.read_nb = title_apart  # nbdev reads notebooks with it, in this process
    package = (ROOT / SETTINGS.lib_path.name).rglob("*.py")
    changed = max(file.stat().st_mtime for file in (*package, Path(__file__)))
    return proc_nbs(n_workers=0, force=not folder.exists() or folder.stat().st_mtime < changed)


def sources() -> list[Path]:
    """Every file that the site is made of."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "nbs", "docs", *ROOT_PAGES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    return sorted(ROOT / name for name in filter(None, tracked) if (ROOT / name).is_file() and place(ROOT / name))


def listed(entry: str | dict, files: list[Path]) -> list[str | dict]:
    """An entry of the sidebar with its patterns replaced by the pages they stand for, in the order of their numbers."""
    if isinstance(entry, dict):
        return [{**entry, "contents": [page for inner in entry["contents"] for page in listed(inner, files)]}]
    pattern = entry.split("/")
    found = []
    for file in files:
        parts = file.relative_to(ROOT).parts
        if len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)):
            found.append(place(file).with_suffix(file.suffix).as_posix())
    if not found:
        raise SystemExit(f"_quarto.yml: nothing is called {entry}")
    return found


def stage(folder: Path, processed: Path) -> None:
    """All pages as they stand on the site, and the configuration with its sidebar, for either renderer."""
    files, taken = sources(), {}
    for file in files:
        target = folder / place(file)
        if target in taken:
            raise SystemExit(f"{file} and {taken[target]} would be the same page")
        taken[target] = file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".ipynb":
            text = notebook_page(file, processed / file.relative_to(ROOT / "nbs"))
            target.with_suffix(".ipynb").write_text(text, encoding="utf-8")
        elif file.suffix == ".md":
            target.with_suffix(".md").write_text(for_page(file.read_text(encoding="utf-8"), file), encoding="utf-8")
        else:
            shutil.copy2(file, target)
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    sidebar = config["website"]["sidebar"]
    pages = [file for file in files if file.suffix in (".ipynb", ".md")]
    sidebar["contents"] = [found for entry in sidebar["contents"] for found in listed(entry, pages)]
    (folder / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def render(folder: Path) -> str:
    """Render the staged pages; returns by what, empty where neither renderer is there."""
    if quarto := shutil.which("quarto"):
        subprocess.run([quarto, "render", folder], check=True)
        return "Quarto"
    try:
        from smalldocs.cli import main as smalldocs
    except ImportError:
        return ""
    if smalldocs(["render", str(folder), "--strict", "--quiet"]):
        raise SystemExit("smalldocs gave the warnings above")
    return "smalldocs"


class Page(HTMLParser):
    """What one page points to and what can be pointed to in it."""

    def __init__(self, text: str):
        super().__init__()
        self.places, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.places |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]


def foldable(html: str) -> str:
    """A page whose long names in cells of tables may go on in the next line, behind a dot or an underscore."""

    def in_cell(cell: re.Match) -> str:
        return re.sub(r"<code>([^<]+)", lambda code: re.sub(r"(?<=\w[._])(?=\w)", "<wbr>", code[0]), cell[0])

    return re.sub(r"<td\b.*?</td>", in_cell, html, flags=re.DOTALL)


def broken_links(site: Path) -> list[str]:
    """Links and pictures of the built site that lead nowhere; other sites are not asked."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link[len(ADDRESS) :] if link.startswith(ADDRESS) else link)
            if parts.scheme or parts.netloc:
                continue
            start = site if link.startswith(ADDRESS) else file.parent
            target = Path(os.path.normpath(start / unquote(parts.path))) if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file() or not target.is_relative_to(site):
                found.append(f"{file.relative_to(site)}: {link}")
            elif anchor and target in pages and anchor not in pages[target].places:
                found.append(f"{file.relative_to(site)}: {link} (no such place on the page)")
    return sorted(set(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="build nothing; only look at what is in _docs")
    os.chdir(ROOT)
    if not parser.parse_args().check:
        processed = prepared()
        with tempfile.TemporaryDirectory(prefix="lora-mvp-site-") as temp:
            stage(Path(temp), processed)
            by = render(Path(temp))
            if not by:
                print(
                    "The pages are in order and not rendered: that takes Quarto or smalldocs, which needs Python 3.11."
                )
                return int(sys.version_info >= (3, 11))
            shutil.rmtree(OUT, ignore_errors=True)
            shutil.move(Path(temp) / "_docs", OUT)
            for page in OUT.rglob("*.html"):
                page.write_text(foldable(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{len(list(OUT.rglob('*.html')))} pages in {OUT.relative_to(ROOT)}, rendered by {by}")
    broken = broken_links(OUT)
    print("\n".join([*broken, f"{len(broken)} broken links"]))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
