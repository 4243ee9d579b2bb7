"""A JupyterLab of its own, with a notebook in it."""

import hashlib
import os
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
from browser import chromium, process, wait_for

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def jupyterlab(folder, cells):
    """The address of a JupyterLab in `folder` that shows a notebook with these cells of code."""
    chromium()
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    made = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), folder / "notebook.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = hashlib.sha256(os.urandom(9)).hexdigest()
    options = [f"--port={port}", "--ip=127.0.0.1", "--no-browser", "--allow-root", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    options += [
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    own = {f"JUPYTER_{name}_DIR": str(folder / "jupyter" / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "lab.log", "wb") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        with process(command, env=os.environ | own, stdout=log, stderr=log) as server:

            def answers():
                assert server.poll() is None, (folder / "lab.log").read_text()
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            wait_for(answers)
            yield f"http://127.0.0.1:{port}/doc/tree/notebook.ipynb?token={token}"


def start_all(page):
    """Begin to run all cells of the notebook that the page shows; `window.ran` becomes true when they have."""
    page.wait("window.jupyterapp && jupyterapp.shell.currentWidget?.sessionContext?.isReady")
    page.wait("jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.connectionStatus == 'connected'")
    page.js("void jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ran = true; })")


def run_all(page):
    """Run all cells of the notebook that the page shows."""
    start_all(page)
    page.wait("window.ran", 180)  # Python's heavy modules are imported meanwhile


def cell(k):
    """The output of a cell, as an expression."""
    return f"[...document.querySelectorAll('.jp-CodeCell')][{k}].querySelector('.jp-OutputArea')"


def button(k, word):
    """The button in it that says `word`."""
    return f"[...{cell(k)}.querySelectorAll('button')].find(e => e.innerText.trim() == '{word}')"


def pictures(k):
    """How many pictures of a cell can be seen."""
    return f"[...{cell(k)}.querySelectorAll('img')].filter(e => e.naturalWidth > 0).length"
