"""Every check of this project, in order; stops at the first that fails. Name some to run only those.

python scripts/check.py              all of them
python scripts/check.py drift lint   these two
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import nbformat
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STEPS = {}
TOGETHER = [("tests", "wheel"), ("outputs", "readme", "site")]  # side by side: each waits a lot for files and processes
IN_A_KERNEL = ("tutorials/*.ipynb", "index.ipynb")  # every chapter runs in the `notebooks` step
# Tutorials that train and draw for a minute of a core do a quarter of it here, or less. Saved outputs are of the whole.
SHORTER = [
    ("config = demo_folder(work)", "config = demo_folder(work)\nconfig.training.max_train_steps = 20"),
    ("e = config.evaluation\n", "e = config.evaluation\ne.num_inference_steps = 5\n"),
    ("num_inference_steps: 8", "num_inference_steps: 2"),
    ("training.max_train_steps=120", "training.max_train_steps=4"),
    ("training.checkpointing_steps=40", "training.checkpointing_steps=4"),
    ("evaluation.num_inference_steps=12", "evaluation.num_inference_steps=1"),
    ('"max_train_steps": 24, "checkpointing_steps": 12', '"max_train_steps": 4, "checkpointing_steps": 4'),
    ('"evaluation.num_inference_steps": 6', '"evaluation.num_inference_steps": 1'),
    ('"evaluation.num_inference_steps": 4', '"evaluation.num_inference_steps": 1'),
]
# What a user does with the package, in short, in one process; tests/test_demo.py runs the demo in full.
WHOLE_JOB = """
from lora_mvp.cli import main
from lora_mvp.demo import demo_folder

demo_folder("demo")
quick = ["--config", "demo/config.yaml"]
for setting in ("training.max_train_steps=4", "evaluation.num_inference_steps=2"):
    quick += ["--set", setting]
adapter = ["--model-path", "demo/lora"]
for command in (
    ["prepare-data", *quick],
    ["train", "--manifest", "demo/processed/manifest.json", *quick],
    ["generate", *adapter, "--prompt", "a picture of fox face", "--out", "pictures", *quick],
    ["evaluate", *adapter, "--real-glob", "demo/heldout/*/*.png", *quick],
):
    assert main(command) == 0, command
"""


class Failed(Exception):
    """A step failed; the text is what to show."""


def step(function):
    """Register `function` as a check under its own name."""
    STEPS[function.__name__] = function
    return function


def run(*command, cwd=ROOT, **env) -> str:
    """Run a command and return its output; raise `Failed` with that output when it fails."""
    command = [str(part) for part in command]
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    done = subprocess.run(
        command,
        cwd=cwd,
        # Without bytecode every process that a test starts would compile what it imports.
        env={**os.environ, "PATH": path, "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise Failed(f"{done.stdout}\nexit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def python(*arguments, **options) -> str:
    return run(sys.executable, *arguments, **options)


@step
def drift():
    """The notebooks are clean, and exporting them again gives exactly the committed package."""
    run(BIN / "nbdev_clean")
    for module in (ROOT / "lora_mvp").rglob("*.py"):
        if "assets" not in module.parts:
            module.unlink()  # a module whose notebook is gone must not stay
    run(BIN / "nbdev_export")
    changed = run("git", "status", "--porcelain", "--", "lora_mvp", "nbs")
    if changed:
        raise Failed(f"{changed}\nThese differ from the last commit after clean and export. Look, then commit them.")


@step
def lint():
    """ruff: rules everywhere, format in what people write."""
    run(BIN / "ruff", "check", ".")
    run(BIN / "ruff", "format", "--check", ".")


@step
def notebooks():
    """Every chapter runs top to bottom, and what it shows is saved; tutorials run in the `outputs` step."""
    python("scripts/notebooks.py", OMP_NUM_THREADS="1")


@step
def tests():
    """Plain pytest: what a notebook cannot show. Three workers for two cores, since many tests wait for processes."""
    python(
        "-m", "pytest", "-q", "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "tests", OMP_NUM_THREADS="1"
    )


@step
def outputs():
    """Tutorials and the front page in a real Jupyter kernel, as a reader runs them."""
    with tempfile.TemporaryDirectory(prefix="lora-mvp-notebooks-") as temp:
        copy = Path(shutil.copytree(ROOT / "nbs", Path(temp) / "nbs"))
        chosen = [path for pattern in IN_A_KERNEL for path in sorted(copy.glob(pattern))]
        for path in chosen:
            nb = nbformat.read(path, as_version=4)
            for number, cell in enumerate(nb.cells, 1):
                for shorter in SHORTER:
                    cell.source = cell.source.replace(*shorter)
                if cell.cell_type == "code":
                    cell.execution_count = number  # nbdev_clean removes it, nbval takes its absence for an unrun cell
            nbformat.write(nb, path)
        workers = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
        nbval = ("--nbval-lax", "--nbval-current-env")
        python("-m", "pytest", "-q", *workers, *nbval, *chosen, OMP_NUM_THREADS="1")


@step
def readme():
    """README.md is what nbs/index.ipynb says, docs/API.md what the routes say, CONTRIBUTING.md what chapters look like."""
    python("scripts/readme.py", "--check")
    python("scripts/api_docs.py", "--check")
    python("scripts/house.py", "--check")


def link_requirements(site: Path) -> None:
    """Link into the folder `site` what this package's requirements name, and theirs, and nothing else.

    The same files as an installation would put there from the same versions, without unpacking torch a second time.
    """
    here, seen = Path(sysconfig.get_path("purelib")), set()

    def follow(name: str, extras: frozenset):
        if (name, extras) in seen:
            return
        seen.add((name, extras))
        distribution = metadata.distribution(name)
        for text in distribution.requires or ():
            wanted = Requirement(text)
            if not wanted.marker or any(wanted.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                follow(canonicalize_name(wanted.name), frozenset(wanted.extras))
        if name == "lora-mvp":
            return  # it comes as the wheel
        for file in distribution.files or ():  # with the bytecode that pip made of them
            if ".." not in file.parts and (here / file).is_file():
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    link(here / file, target)

    follow("lora-mvp", frozenset())


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@step
def site():
    """Every page goes through nbdev and a renderer into _docs/, where no link and no picture is broken."""
    python("scripts/build_site.py", OMP_NUM_THREADS="1")


@step
def wheel():
    """The wheel, alone in a second environment outside the checkout, does the whole job, in a shorter training."""
    with tempfile.TemporaryDirectory(prefix="lora-mvp-wheel-") as temp:
        folder = Path(temp)
        source = folder / "source"
        tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        for name in filter(lambda name: name and (ROOT / name).is_file(), tracked):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
        python("-m", "build", "--outdir", folder / "dist", source)  # its environment holds setuptools only
        (built,) = (folder / "dist").glob("*.whl")
        missing = {name for name in tracked if name.startswith("lora_mvp/")} - set(ZipFile(built).namelist())
        if missing:
            raise Failed(f"these files of the package are not in the wheel: {', '.join(sorted(missing))}")
        venv.create(folder / "venv", with_pip=True)
        scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        link_requirements(Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})))
        # No index: what the wheel asks for and its requirements do not name is an error here.
        pip = (scripts / "python", "-m", "pip")
        run(*pip, "install", "-q", "--no-index", "-c", ROOT / "constraints.txt", built, cwd=folder)
        run(*pip, "check", cwd=folder)
        here = {"cwd": folder, "PATH": os.defpath, "PYTHONPATH": ""}
        run(scripts / "lora-mvp", "--version", **here)
        run(scripts / "python", "-c", WHOLE_JOB, **here)
        for command, extra in (("serve", "service"), ("lab", "notebook")):
            try:
                run(scripts / "lora-mvp", command, **here)
            except Failed as refused:
                if f"pip install 'lora-mvp[{extra}]'" in str(refused):
                    continue
                raise
            raise Failed(f"lora-mvp {command} ran without the extra {extra}")
        if not any((folder / "pictures").rglob("*.png")):
            raise Failed("the whole job ended well, but there is no picture")


def say(text: str) -> None:
    """Print in one go, so that lines of steps that run side by side stay whole."""
    print(f"{text}\n", end="", flush=True)


def attempt(name: str) -> bool:
    """Run one step and say how it went."""
    say(f"{name:<10} {STEPS[name].__doc__.splitlines()[0]}")
    start = time.monotonic()
    try:
        STEPS[name]()
    except Failed as failure:
        say(f"{failure}\n{name} FAILED after {time.monotonic() - start:.1f} s")
        return False
    say(f"{name:<10} ok, {time.monotonic() - start:.1f} s")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="step", help="of: " + ", ".join(STEPS))
    chosen = parser.parse_args().steps or list(STEPS)
    unknown = [name for name in chosen if name not in STEPS]
    if unknown:
        parser.error(f"no step named {', '.join(unknown)}; there are: {', '.join(STEPS)}")
    begin = time.monotonic()
    groups = [next((group for group in TOGETHER if name in group), (name,)) for name in chosen]
    for group in dict.fromkeys(groups):
        names = [name for name in chosen if name in group]
        with ThreadPoolExecutor(len(names)) as pool:
            if not all(list(pool.map(attempt, names))):
                return 1
    print(f"all {len(chosen)} checks passed in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
