"""Run chapters as nbdev_test does, and name shown cells that say something here but have no saved output.

    python scripts/notebooks.py                    all
    python scripts/notebooks.py 'nbs/1_data/*'     these

A page is built from saved outputs, so a cell that prints and has none is a hole in the book: `python scripts/outputs.py`
fills it.
"""

import sys

import nbdev.test
from execnb.shell import CaptureShell
from outputs import keep

HIDDEN = {"export", "exporti", "exports", "hide", "default_exp"}


class Unsaved(AssertionError):
    """Cells that print or draw have no saved output."""


class WatchingShell(CaptureShell):
    """A shell that compares what cells say with what the notebook holds."""

    def run_all(self, nb, exc_stop=False, preproc=lambda cell: False, **kwargs):
        """Run the cells; raise `Unsaved` when a shown one has said something of which nothing is saved."""
        saved = {cell.idx_: bool(cell.get("outputs")) for cell in nb.cells}
        silent = []

        def compare(cell):
            shown = cell.cell_type == "code" and not HIDDEN & set(cell.directives_)
            if shown and not saved[cell.idx_] and any(keep(output) for output in cell.get("outputs", [])):
                silent.append(f"cell {cell.idx_}: {cell.source.strip().splitlines()[-1]}")

        super().run_all(nb, exc_stop=exc_stop, preproc=preproc, postproc=compare, **kwargs)
        if silent:
            self.exc = Unsaved("these cells say something and have no saved output:\n" + "\n".join(silent))
            raise self.exc


if __name__ == "__main__":
    nbdev.test.CaptureShell = WatchingShell
    path = sys.argv[1] if len(sys.argv) > 1 else None
    nbdev.test.nbdev_test(path=path, n_workers=2 if path is None else None, timing=True)
