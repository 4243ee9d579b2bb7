"""The rules of the house that one notebook alone cannot hold; docs/architecture.md says why they are there."""

import ast
import importlib
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import house  # scripts/house.py: what a chapter looks like, in figures
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lora_mvp"
EXPORT = {"export", "exporti", "exports"}
DIRECTIVE = re.compile(r"(?m)^#\s*\|\s*(\S+)(?:\s+(\S+))?")


class Chapter:
    """One numbered notebook: its floor, its module and its exported source."""

    def __init__(self, path: Path):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        directives = [dict(DIRECTIVE.findall(source)) for source in sources]
        self.name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        part = path.parent.name.split("_")[0] if path.parent != ROOT / "nbs" else "0"  # root chapters lie lowest
        self.floor = (int(part), path.stem.split("_")[0])  # the part, then the floor within it
        self.module = next((found["default_exp"] for found in directives if "default_exp" in found), None)
        self.is_face = bool(self.module) and self.module.split(".")[-1] == "__init__"
        self.exported = [source for source, found in zip(sources, directives, strict=True) if EXPORT & set(found)]

    def imports(self) -> set[str]:
        """Every module that an exported cell imports, at its top or inside a function, as a full dotted name."""
        found = set()
        for source in self.exported:
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, (
                        f"{self.name}: relative import in line {node.lineno}; nbdev cannot export it"
                    )
                    found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        return found


FOLDERS = [ROOT / "nbs", *sorted((ROOT / "nbs").glob("[0-9]_*/"))]
CHAPTERS = [Chapter(path) for folder in FOLDERS for path in sorted(folder.glob("[0-9]*.ipynb"))]
FACES = [chapter for chapter in CHAPTERS if chapter.is_face]
EXPORTING = [chapter for chapter in CHAPTERS if chapter.module and not chapter.is_face]
FLOORS = {f"{PACKAGE}.{chapter.module}": chapter.floor for chapter in EXPORTING}


def outside_imports() -> set[str]:
    """The top-level names that the package imports from elsewhere, the standard library aside."""
    names = {name.split(".")[0] for chapter in EXPORTING for name in chapter.imports()}
    return names - set(sys.stdlib_module_names) - {PACKAGE}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(key: str = "requirements") -> set[str]:
    """The names of the requirements in settings.ini."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return {normal(re.match(r"[\w.-]+", text)[0]) for text in settings["DEFAULT"][key].split()}


EXTRAS = [f"{name}_requirements" for name in ("service", "notebook", "ray", "heic", "optimizers", "eval_offline")]


def modules_after(code: str) -> set[str]:
    """The top-level modules that are loaded after `code` ran in a fresh interpreter."""
    code += "\nimport sys\nprint('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_no_two_chapters_share_a_floor_or_a_module():
    floors = [chapter.floor for chapter in CHAPTERS]
    assert len(set(floors)) == len(floors)
    assert len(FLOORS) == len(EXPORTING)


@pytest.mark.parametrize("chapter", EXPORTING, ids=lambda chapter: chapter.name)
def test_imports_point_down(chapter):
    for name in chapter.imports():
        if name in FLOORS:
            assert FLOORS[name] < chapter.floor, f"{chapter.name} imports {name}, which is not on a lower floor"


@pytest.mark.parametrize("chapter", EXPORTING, ids=lambda chapter: chapter.name)
def test_every_chapter_has_its_title_and_its_module(chapter):
    assert (ROOT / PACKAGE / (chapter.module.replace(".", "/") + ".py")).is_file(), "run nbdev_export"


def test_chapters_do_not_go_through_doors():
    """A face opens upward as well as downward; a chapter that used one would hide what it imports."""
    faces = {f"{PACKAGE}.{chapter.module}".removesuffix(".__init__") for chapter in FACES} - {PACKAGE}
    for chapter in EXPORTING:
        for name in chapter.imports() - set(FLOORS):
            assert name.rpartition(".")[0] not in faces or name in faces, f"{chapter.name} imports {name} by a door"


def doors_of(chapter) -> dict[str, str]:
    """The doors of a face and where each leads."""
    return importlib.import_module(f"{PACKAGE}.{chapter.module}".removesuffix(".__init__"))._DOORS


@pytest.mark.parametrize("chapter", FACES, ids=lambda chapter: chapter.name)
def test_a_face_says_the_same_to_programs_and_to_editors(chapter):
    doors = doors_of(chapter)
    face = importlib.import_module(f"{PACKAGE}.{chapter.module}".removesuffix(".__init__"))
    assert sorted(doors) == sorted(face.__all__)
    block = next(node for source in chapter.exported for node in ast.parse(source).body if isinstance(node, ast.If))
    told = {
        alias.asname or alias.name: node.module + (f":{alias.name}" if alias.asname else "")
        for node in block.body
        for alias in node.names
    }
    assert told == doors


def test_every_door_opens_when_every_module_is_loaded():
    """A module with the name of a door would stand in its place once it is loaded."""
    code = f"""
import importlib, pkgutil, inspect, {PACKAGE}
for module in pkgutil.walk_packages({PACKAGE}.__path__, "{PACKAGE}."):
    importlib.import_module(module.name)
for face in {[f"{PACKAGE}.{chapter.module}".removesuffix(".__init__") for chapter in FACES]}:
    face = importlib.import_module(face)
    for name in face.__all__:
        assert not inspect.ismodule(getattr(face, name)), (face, name)
assert callable({PACKAGE}.train.train) and callable({PACKAGE}.data.prepare_data)
"""
    modules_after(code)


def test_a_part_is_reached_through_the_package():
    loaded = modules_after("import lora_mvp\nlora_mvp.train, lora_mvp.data, lora_mvp.eval")
    assert "lora_mvp" in loaded and not loaded & HEAVY


def test_every_module_has_its_chapter():
    generated = {path for path in (ROOT / PACKAGE).rglob("*.py") if not {"assets", "__pycache__"} & set(path.parts)}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in generated}
    left_over = {name for name in names if name.rsplit(".", 1)[1] not in ("__init__", "_modidx")} - set(FLOORS)
    assert not left_over, f"no notebook exports {left_over}"


def test_nothing_imports_torchvision():
    for path in [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("scripts/*.py"), *ROOT.glob("examples/*.py")]:
        assert not re.search(r"(?:import|from) +torchvision", path.read_text(encoding="utf-8")), path


def test_every_import_is_declared():
    owners, known = (
        packages_distributions(),
        declared().union(*map(declared, EXTRAS)),
    )
    for name in outside_imports():
        assert {normal(owner) for owner in owners.get(name, [name])} & known, f"{name} is not in settings.ini"


def test_every_requirement_is_pinned_in_constraints():
    pinned = {
        normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert declared() | declared("service_requirements") | declared("notebook_requirements") <= pinned


HEAVY = {"ray", "torch", "diffusers", "transformers", "peft", "accelerate", "cv2", "matplotlib"}


def test_config_is_light():
    assert not modules_after("import lora_mvp, lora_mvp.config") & HEAVY


def test_a_light_chapter_of_a_part_loads_nothing_of_the_others():
    loaded = modules_after("import lora_mvp.data.splits")
    assert "numpy" in loaded and not loaded & (HEAVY | {"PIL", "pydantic", "yaml", "scipy"})


def test_the_service_and_what_watches_over_trainings_are_light():
    assert not modules_after("import lora_mvp.api.main, lora_mvp.api.runner, lora_mvp.api.work") & HEAVY


@pytest.mark.skipif(f"{PACKAGE}.cli" not in FLOORS, reason="the command line is not written yet")
def test_help_is_light():
    code = (
        "from lora_mvp.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert not modules_after(code) & HEAVY


FIGURES = {item.name: item for item in map(house.figures, house.chapters()) if item.module_lines}
LONG_CELLS = {
    "2_models/kinds",
    "2_models/unets",
    "2_models/flows",
    "3_train/flow",
    "6_api/sql_store",
    "3_train/loop",
    "6_api/client",
    "6_api/events",
    "1_data/handover",
    "7_doors/widgets",
    "6_api/reporter",
    "1_data/workers",
    "5_eval/extractors",
    "1_data/captioners",
    "6_api/attempts",
    "6_api/service",
    "3_train/watch",
    "3_train/cache",
    "6_api/json_store",
    "5_eval/scores",
    "5_eval/verdicts",
    "5_eval/features",
    "6_api/runner",
    "6_api/folders",
    "3_train/updates",
    "1_data/survey",
    "6_api/connection",
    "6_api/records",
    "6_api/downloads",
    "3_train/latents",
    "6_api/tokens",
    "1_data/steps",
    "1_data/curator",
    "6_api/backend",
    "5_eval/selection",
}  # chapters around a class that is longer than a screen; the list may only become shorter


@pytest.fixture(scope="module", autouse=True)
def printed_figures():
    """The table of the figures, above what fails in this file and with `pytest -s`."""
    print("\n" + house.table(list(FIGURES.values())))


@pytest.mark.parametrize("figures", FIGURES.values(), ids=FIGURES)
def test_a_room_holds_one_thing(figures):
    assert figures.module_lines <= 500
    assert not figures.patched, "an editor does not see a method that is added to its class from outside"


@pytest.mark.parametrize("figures", [item for item in FIGURES.values() if item.lengths], ids=lambda item: item.name)
def test_a_reader_can_follow_the_cells(figures):
    name = re.sub(r"/\d+[a-z]?_", "/", figures.name)
    assert (house.tenth(figures.lengths) > 25) == (name in LONG_CELLS)
    assert figures.definitions.count(1) >= 0.8 * len(figures.definitions)


def test_the_book_as_a_whole_is_short_celled():
    lengths = [length for item in FIGURES.values() for length in item.lengths]
    counts = [count for item in FIGURES.values() for count in item.definitions]
    assert house.tenth(lengths) <= 25 and counts.count(1) >= 0.95 * len(counts)


@pytest.mark.parametrize("figures", FIGURES.values(), ids=FIGURES)
def test_a_chapter_shows_its_result_early(figures):
    assert figures.shown is not None and figures.shown <= house.SHOWN_EARLY


@pytest.mark.parametrize("path", house.chapters(), ids=lambda path: path.stem)
def test_cells_that_only_import_are_folded(path):
    assert not house.import_cells_unfolded(path)


@pytest.mark.parametrize("path", house.chapters(), ids=lambda path: path.stem)
def test_a_cell_imports_or_does_something(path):
    assert not house.imports_mixed(path)


def test_no_public_name_is_defined_in_two_modules():
    assert not house.names_defined_twice()


def test_what_is_promised_is_a_door_or_used_by_the_name_of_its_module():
    """`__all__` of a chapter holds what the package or its part offers, and what a part without a face is for."""
    by_module = {"config", "errors", "infer", "widgets", "demo", "cli", "api.main", "api.client"}
    opened = {target.partition(":")[2] or name for face in FACES for name, target in doors_of(face).items()}
    promised = {chapter.module: importlib.import_module(f"{PACKAGE}.{chapter.module}").__all__ for chapter in EXPORTING}
    assert {name for module, names in promised.items() if module not in by_module for name in names} <= opened
    assert sum(map(len, promised.values())) + sum(len(doors_of(face)) for face in FACES) <= 126


def test_every_chapter_is_on_the_map():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for chapter in EXPORTING:
        assert chapter.module.split(".")[-1].replace("_", " ") in text, f"{chapter.name} is not in docs/architecture.md"


def test_links_between_pages_are_alive():
    for path in [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            alive = target.startswith(("http", "mailto:")) or (path.parent / target).exists()
            assert alive, f"{path.relative_to(ROOT)} links to {target}"
