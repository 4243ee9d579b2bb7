"""Run notebooks and keep their outputs, so that the pages read well without a kernel.

    python scripts/outputs.py nbs/3_train/13_loop.ipynb ...      default: all chapters and tutorials

What changes from run to run is left out: widget state (a static picture stands beside each widget) and what libraries
print to stderr. Afterwards `nbdev_clean` has nothing to do.
"""

import argparse
import base64
import io
import re
import tempfile
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor
from nbdev.clean import nbdev_clean
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
TEMP = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp[^/\s'\"]*")


def skipped(cell) -> bool:
    """A cell that the tests do not run either."""
    return bool(re.search(r"(?m)^#\s*\|\s*eval: false|^#\s*\|\s*(slow|cuda|net)\s*$", cell.source))


def keep(output) -> bool:
    """Outputs that say something to a reader without a kernel."""
    return output.get("name") != "stderr" and WIDGET not in output.get("data", {})


def shrink(data: dict) -> None:
    """Jupyter keeps a Pillow picture twice; the smaller form is enough, and a large plot reads as well as a JPEG."""
    if len(data.get("image/png", "")) > 200_000 and "image/jpeg" not in data:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB").save(buffer, "JPEG", quality=85)
        data["image/jpeg"] = base64.b64encode(buffer.getvalue()).decode()
    if {"image/png", "image/jpeg"} <= set(data):
        del data[max("image/png", "image/jpeg", key=lambda kind: len(data[kind]))]


def hide_temp(holder: dict, key: str) -> None:
    """Names of temporary folders differ at every run."""
    if key in holder:
        holder[key] = TEMP.sub("TEMP", holder[key])


def execute(path: Path) -> None:
    """Run one notebook in its folder and write it back with stable outputs."""
    nb = nbformat.read(path, as_version=4)
    runnable = [cell for cell in nb.cells if cell.cell_type != "code" or not skipped(cell)]
    part = nbformat.v4.new_notebook(cells=runnable, metadata=nb.metadata)
    runner = ExecutePreprocessor(timeout=900, kernel_name="python3", coalesce_streams=True)
    runner.preprocess(part, {"metadata": {"path": str(path.parent)}})
    for cell in runnable:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if keep(output)]
            for output in cell.outputs:
                shrink(output.get("data", {}))
                hide_temp(output.get("data", {}), "text/plain")
                hide_temp(output, "text")
    nb.metadata.pop("widgets", None)
    nbformat.write(nb, path)
    nbdev_clean(fname=str(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    default = [p for p in sorted((ROOT / "nbs").rglob("[0-9]*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    for notebook in parser.parse_args().notebooks or default:
        execute(notebook)
        print(f"{notebook.name:24} {notebook.stat().st_size // 1024} KB", flush=True)
