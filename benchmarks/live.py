"""A finished run through `run_processing` from first frame to last file, with no server."""

import shutil
import time
from pathlib import Path

from benchmarks.analysis import N_THREADS, recipe_for
from benchmarks.frames import EXPERIMENT, FrameSet, Options, WorkFolder, stored_run
from benchmarks.measure import Figure, figure, rates
from flows.run_processing import ProcessRequest, run_processing

__all__ = ["measure"]

_FRAMES_PER_CHUNK = 50


def measure(options: Options) -> list[Figure]:
    n = options.choose(50, 200)
    frames = FrameSet.make(options.size, 32)
    whole, steps, export = [], [], []
    with WorkFolder(options, "live") as root:
        _process(root, frames, min(n, 20))
        for _ in range(options.choose(1, 5)):
            seconds, by_stage = _process(root, frames, n)
            whole.append(seconds)
            export.append(by_stage.pop("export"))
            steps.append(sum(by_stage.values()))
    alone = (f"its steps alone, {N_THREADS} threads", rates(n, steps))
    name = f"run_processing, {frames.hit_share(n)}, all exports"
    return [
        figure(name, "frames/s", rates(n, whole), alone, higher_is_better=True),
        figure("of it export (NeXus, CrystFEL)", "frames/s", rates(n, export), higher_is_better=True),
    ]


def _process(root: Path, frames: FrameSet, n: int) -> tuple[float, dict[str, float]]:
    """s for a new run, and s by stage; a processed run would find its results again."""
    shutil.rmtree(root / EXPERIMENT, ignore_errors=True)
    folder = stored_run(root, frames, 1, n, _FRAMES_PER_CHUNK)
    recipe = recipe_for(frames).model_dump(mode="json")
    started = time.perf_counter()
    summary = run_processing(ProcessRequest(run=str(folder.path), recipe=recipe, n_threads=N_THREADS))
    seconds = time.perf_counter() - started
    if summary["frames"] != n or not summary["indexed"]:
        raise RuntimeError(f"{summary['frames']} of {n} frames processed, {summary['indexed']} indexed")
    return seconds, dict(summary["seconds_by_stage"])
