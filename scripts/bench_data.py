"""Time the survey of many pictures against a plain loop over the same files, in turns, then the writing; print JSON.

python scripts/bench_data.py --n 5000
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from lora_mvp.config import load_config
from lora_mvp.data import looks, prepare
from lora_mvp.data.storage import state_file
from lora_mvp.data.survey import survey

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=500, help="pictures of 1024 x 1024; one in ten is a PNG")
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--slice", type=int, default=100, help="files between two turns")


def draw(folder: Path, n: int) -> list[Path]:
    """Pictures with the detail of photographs: smooth colours, edges and a little noise, shifted each time."""
    rng = np.random.default_rng(0)
    bases = []
    for _ in range(4):
        smooth = cv2.resize(
            rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), (1024, 1024), interpolation=cv2.INTER_CUBIC
        )
        for _ in range(60):
            centre, size, colour = rng.integers(0, 1024, 2), int(rng.integers(5, 120)), rng.integers(0, 256, 3)
            cv2.circle(smooth, centre.tolist(), size, colour.tolist(), -1, cv2.LINE_AA)
        bases.append(smooth.astype(np.int16))
    noise = rng.normal(0, 5, (1024, 1024, 3)).astype(np.int16)

    def one(i: int) -> Path:
        picture = np.roll(bases[i % len(bases)], 17 * i, axis=1) + np.roll(noise, 31 * i, axis=0)
        picture = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
        path = folder / f"{i:05}.{'png' if i % 10 == 9 else 'jpg'}"
        picture.save(path, **({"compress_level": 1} if i % 10 == 9 else {"quality": 90}))
        return path

    return [one(i) for i in range(n)]


def plain(path: Path) -> tuple:
    """What a script of ten lines would do."""
    im = Image.open(path).convert("RGB")
    grey = np.asarray(im.convert("L"))
    return cv2.Laplacian(grey, cv2.CV_64F).var(), looks.perceptual_hashes(im)


def peak_of(pid: int | str) -> float:
    """The most memory that a process ever held, MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)
    except OSError:
        return 0.0


def peaks() -> list[float]:
    """Of this process and each of its workers, MB."""
    return [peak_of(pid) for pid in ["self", *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]]


def timed(function) -> tuple[float, object, float]:
    """Seconds, what came out, and seconds of processor time."""
    start, cpu = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - start, result, time.process_time() - cpu


def written(raw: Path, out: Path, kept: Path | None, workers: int) -> dict[str, float]:
    """What it takes to write the pictures of a folder that has been looked at, with so many workers (0: none)."""
    places = {"data.raw_data_dir": str(raw), "data.processed_dir": str(out)}
    state_file(out, "").mkdir(parents=True)
    if kept:
        shutil.copy(kept, state_file(out, "inspection"))
    prepare.makers = lambda tasks, targets: workers
    before = children_cpu()
    took, manifest, cpu = timed(lambda: prepare.prepare_data(load_config(overrides=places)))
    size = sum(manifest.path_of(row).stat().st_size for row in manifest.images)
    cpu += children_cpu() - before
    n = len(manifest.images)
    return {"images_per_s": round(n / took, 1), "cpu_ms_per_image": round(1000 * cpu / n, 1), "mb": round(size / 1e6)}


def children_cpu() -> float:
    """Processor time of the children that have ended, seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    args = parser.parse_args()
    cv2.setNumThreads(1)  # of the plain loop; each worker sets its own
    with tempfile.TemporaryDirectory(prefix="bench-data-") as temp:
        raw = Path(temp) / "raw"
        (raw / "drawing").mkdir(parents=True)
        with ProcessPoolExecutor(1) as pool:  # its memory is not ours
            paths = pool.submit(draw, raw / "drawing", args.n).result()
        cache = Path(temp) / "inspection.jsonl"
        time.sleep(3)  # a file that has just changed is hashed again
        stream, memory, turns, before = survey(paths, cache, workers=args.workers), [], [], children_cpu()
        for i in range(0, args.n, args.slice):  # in turns, so that both meet the same load of the machine
            part = paths[i : i + args.slice]
            surveyed = timed(lambda part=part: [next(stream) for _ in part])
            memory.append(peaks())
            assert all(look.facts for look in surveyed[1])
            plainly = timed(lambda part=part: [plain(path) for path in part])
            turns.append((surveyed[0], plainly[0], surveyed[2], plainly[2]))
        stream.close()
        first, loop, parent_cpu, plain_cpu = map(sum, zip(*turns))
        cpu = {"survey": parent_cpu + children_cpu() - before, "plain": plain_cpu}
        again, looks, _ = timed(
            lambda: sum(look.facts is not None for look in survey(paths, cache, workers=args.workers))
        )
        assert looks == args.n
        result = {
            "images": args.n,
            "workers": args.workers,
            "megabytes_on_disk": round(sum(path.stat().st_size for path in paths) / 1e6),
            "survey_images_per_s": round(args.n / first, 1),
            "plain_images_per_s": round(args.n / loop, 1),
            "ratio": round(loop / first, 2),
            "first_turn_s": [round(t, 2) for t in turns[0][:2]],  # with the start of the workers
            "cpu_ms_per_image": {k: round(1000 * t / args.n, 1) for k, t in cpu.items()},  # fair on a busy machine too
            "peak_mb_parent_and_workers": [round(m) for m in max(memory, key=sum)],
            "peak_mb": round(max(map(sum, memory))),
            "again_s": round(again, 3),
            "again_times_faster": round(first / again, 1),
            "cache_mb": round(cache.stat().st_size / 1e6, 2),
        }
        written(raw, Path(temp) / "first", None, args.workers)  # looks at them again, with the settings of prepare-data
        seen = state_file(Path(temp) / "first", "inspection")
        result["write"] = {f"{n} workers": written(raw, Path(temp) / f"out{n}", seen, n) for n in (0, args.workers)}
    print(json.dumps(result, indent=1))
