"""Nearline: the data system of a beamline. Frames go in once; one API serves them, live and later.

    import nearline

    run = nearline.open("lyso-2026/17")
    for frame in run["eiger"].follow():
        print(frame.frame_index, frame.data.sum())

The same lines work while the run is taken, when it has finished, and on a run folder with no
service running.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from storage.kernels import use_compiled_kernels
    from streaming.producer import Producer
    from streaming.retrieval import Chunk, Frame, Run, Stream
    from streaming.wire import AckLevel

__all__ = [
    "Chunk",
    "Frame",
    "Producer",
    "Run",
    "Stream",
    "errors",
    "explain",
    "find_cell",
    "merge",
    "open",
    "process",
    "process_live",
    "producer",
    "provenance",
    "refine_detector",
    "report",
    "reprocess",
    "start_run",
    "stop_run",
    "tune",
    "use_compiled_kernels",
    "wait_until",
]  # fmt: skip

# Loaded when first asked for, so that `import nearline` stays quick.
_HOMES = {
    "Chunk": "streaming.retrieval",
    "Frame": "streaming.retrieval",
    "Producer": "streaming.producer",
    "Run": "streaming.retrieval",
    "Stream": "streaming.retrieval",
    "use_compiled_kernels": "storage.kernels",
}


def open(
    run: str | Path,
    *,
    service: str | None = None,
    root: str | Path | None = None,
    wait: float = 0.0,
) -> Run:
    """Open a run, live or finished.

    Parameters
    ----------
    run : ``experiment/number``; ``tcp://host:port/experiment/number``; the path of a run folder, or its URL, such as
        ``s3://bucket/lyso-2026/17`` (address and credentials as for any S3 client: ``AWS_ENDPOINT_URL`` …).
    service : address of the service to ask; by default ``NEARLINE_SERVICE``, or the one on this machine.
    root : data folder to look in when no service answers; by default ``NEARLINE_ROOT``.
    wait : seconds to wait for a run that has not begun yet.
    """
    from storage.errors import RunNotFound, ServiceUnavailable
    from streaming.retrieval import open_run

    service = service or os.environ.get("NEARLINE_SERVICE")
    deadline = time.monotonic() + wait
    while True:
        try:
            return open_run(run, service=service, root=root or _root_from_environment())
        except (RunNotFound, ServiceUnavailable):
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


def producer(
    experiment: str,
    data_source: str,
    *,
    service: str | None = None,
    ack: AckLevel | None = None,
    name: str | None = None,
    token: str | None = None,
    persistence: Literal["stored", "online"] = "stored",
) -> Producer:
    """A source of frames: ``with nearline.producer("lyso-2026", "cam").run() as out: out.send(array)``.

    ``out.send`` waits for the acknowledgement of each frame, ``out.put`` does not and gives a future.

    Parameters
    ----------
    service : its address; by default ``NEARLINE_SERVICE``, or the one on this machine.
    ack : when a frame counts as acknowledged: the service has it in memory (``buffered``), in its journal
        (``stored``, the default), where `kill -9` of everything cannot take it, or on the disk (``durable``), where a
        power loss cannot.
    name : how this producer is known in the frame table; must be its own among those that fill one stream. Made up
        if left out.
    token : what to show to a service that wants a token; by default ``NEARLINE_TOKEN``, or the credentials file.
    persistence : ``online`` keeps frames in the service's memory only, until newer ones need the room; the ledger says
        what has gone. They are acknowledged as ``buffered``.
    """
    from streaming.producer import Producer

    return Producer(
        _service_address(service), experiment, data_source, ack=ack, persistence=persistence, name=name, token=token
    )


def start_run(
    experiment: str,
    run: int | None = None,
    *,
    sample: str | None = None,
    user_data: dict[str, Any] | None = None,
    service: str | None = None,
) -> int:
    """Open a run that takes every detector series of the experiment until `stop_run`; its number.

    Parameters
    ----------
    run : its number; by default the next free one.
    user_data : what is known of the run already; readers find it in `Run.metadata`.
    service : its address; by default ``NEARLINE_SERVICE``, or the one on this machine.

    Raises
    ------
    BadName : a run of this experiment is open already, or that number is taken.
    """
    from streaming.control import start_run

    return start_run(experiment, run, service=_service_address(service), sample=sample, user_data=user_data)


def stop_run(experiment: str, run: int, *, aborted: str | None = None, service: str | None = None) -> None:
    """End a run of `start_run`; returns when its last chunk is sealed.

    Parameters
    ----------
    aborted : why, when this is not a regular end.
    """
    from streaming.control import stop_run

    stop_run(experiment, run, service=_service_address(service), aborted=aborted)


def process(
    run: str | Path,
    recipe: Any,
    *,
    wait: bool = True,
    deployment: str | bool | None = None,
    timeout: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Process a run with a recipe (a file, a dict or a Recipe); its summary.

    In this process and with no Prefect server, unless a deployment is asked for: then a worker does it.

    Parameters
    ----------
    wait : False returns as soon as the flow run is handed over, with its ``flow_run_id`` and ``flow_run_url``; only a
        worker can do that, so ``deployment`` is then True unless given.
    deployment : True for the experiment's own (process-run/<experiment>-again for a run that has ended, else
        process-run/<experiment>), or ``flow/deployment`` by name; the server is that of ``PREFECT_API_URL``.
    timeout : s to wait for a worker's result.
    options : fields of `flows.run_processing.ProcessRequest`: ``data_source``, ``service``, ``root``, ``n_threads``.

    Raises
    ------
    DeploymentNotFound, ServiceUnavailable, FlowRunFailed : of a deployment.
    """
    from tasks.recipe import load_recipe

    options.setdefault("service", os.environ.get("NEARLINE_SERVICE"))
    options.setdefault("root", _root_from_environment())
    content = load_recipe(recipe).model_dump(mode="json")
    if deployment or (deployment is None and not wait):
        from flows.calls import process_deployed

        named = deployment if isinstance(deployment, str) else None
        return process_deployed(str(run), content, options, deployment=named, wait=wait, timeout=timeout)
    if not wait:
        raise ValueError("wait=False needs a worker: leave out deployment=False")
    from flows.run_processing import ProcessRequest, run_processing

    return run_processing(ProcessRequest(run=str(run), recipe=content, **options))


def process_live(
    run: str | Path,
    recipe: Any,
    *,
    data_source: str | None = None,
    name: str = "live",
    decide: Any = None,
    service: str | None = None,
    timeout: float | None = None,
    stop: Any = None,
    wait: float = 60.0,
) -> dict[str, Any]:
    """Carry out a recipe on each frame as it is stored, with the results in a stream; for decisions within a second.

    The columns of each frame are a row of ``<data source>.results@<name>`` some milliseconds after the frame was
    stored: follow that stream, or ask ``where`` of the data source. `process` works by chunks and keeps its tables.

    Parameters
    ----------
    decide : ``decide(frame, columns)`` returns further columns for the row, such as what to do next.
    timeout : end after so many seconds without a new frame; None waits until the run has ended.
    stop : a `threading.Event` that ends it when set.
    wait : seconds to wait for the run, and for its data source, to begin.
    """
    from flows.live_steps import process_live, wait_for_stream
    from tasks.recipe import load_recipe

    loaded = load_recipe(recipe)
    opened = open(run, service=_service_address(service), wait=wait)
    stream = wait_for_stream(opened, data_source, wait)
    return process_live(opened, stream, loaded, name=name, decide=decide, timeout=timeout, stop=stop)


def reprocess(
    runs: str | Sequence[str],
    recipe: Any,
    *,
    where: str | None = None,
    parallel: int = 1,
    again: bool = False,
    wait: bool = True,
    deployment: str | bool | None = None,
    timeout: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Process finished runs again with another recipe; old processings stay, only what changed is computed.

    Parameters
    ----------
    runs : ``lyso-2026/3``, ranges ``lyso-2026/3-9``, whole experiments ``lyso-2026/*``, or run folders.
    where : SQL condition over runs, such as ``sample = 'lysozyme' AND indexing_rate < 0.3``.
    parallel : so many runs at a time.
    again : process also runs that have a finished processing with this very recipe and code.
    wait, deployment, timeout, options : as in `process`; the deployment is reprocess-runs/<experiment>.

    Returns
    -------
    The summary: ``runs`` with what became of each, ``failed`` with the reason for each run that failed. Without
    waiting: ``flow_run_id`` and ``flow_run_url``.

    Raises
    ------
    RunNotFound, BadQuery : no run is meant.
    DeploymentNotFound, ServiceUnavailable, FlowRunFailed : of a deployment.
    """
    from tasks.recipe import load_recipe

    options.setdefault("service", os.environ.get("NEARLINE_SERVICE"))
    options.setdefault("root", _root_from_environment())
    texts = [runs] if isinstance(runs, str) else [str(run) for run in runs]
    loaded = load_recipe(recipe)
    if deployment or (deployment is None and not wait):
        from flows.calls import reprocess_deployed

        given = {"where": where, "parallel": parallel, "again": again, **options}
        named = deployment if isinstance(deployment, str) else None
        content = loaded.model_dump(mode="json")
        return reprocess_deployed(texts, content, given, deployment=named, wait=wait, timeout=timeout)
    if not wait:
        raise ValueError("wait=False needs a worker: leave out deployment=False")
    from flows.reprocessing import reprocess_here

    return reprocess_here(texts, loaded, where=where, parallel=parallel, again=again, **options)


def wait_until(
    run: str | Path,
    criterion: str,
    *,
    processing: str | None = None,
    timeout: float | None = None,
    service: str | None = None,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Return once a stop criterion is met by what has been processed of a run; the values it rests on.

    Parameters
    ----------
    criterion : such as ``completeness > 0.98``, ``n_indexed >= 1000 and cc_half > 0.5`` or ``sample: minutes > 30``.
    processing : whose results; by default the promoted one, else the newest. It may not have begun.
    timeout : s; None to wait as long as it takes.

    Raises
    ------
    NotEnough : the processing has finished, or the time is over, and it is not met; the message gives the values.
    BadCriterion : it cannot be read; the message lists what there is.
    """
    from flows.waiting import wait_until

    opened = open(run, service=service, root=root)
    return wait_until(opened, criterion, processing=processing, timeout=timeout).model_dump(mode="json")


def merge(runs: str | Sequence[str], output: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Merge the reflections of some runs: statistics by resolution shell, and MTZ, CrystFEL ``.hkl`` and a picture.

    Parameters
    ----------
    runs : ``lyso-2026/3``, ranges ``lyso-2026/3-9``, whole experiments ``lyso-2026/*``, or run folders.
    output : folder for the files; None to write none.
    options : fields of `flows.merging.MergeRequest`: ``where``, ``processing``, ``d_min`` (Å), ``friedel_mates``,
        ``scale``, ``partiality``, ``resolve``, ``polarisation``, ``split``, ``n_shells``, ``name``, ``service``,
        ``root``.

    Raises
    ------
    RunNotFound : none of them has reflections. BadRecipe : their cells differ.
    """
    from pathlib import Path

    from flows.merging import MergeRequest, merge_runs

    options.setdefault("service", os.environ.get("NEARLINE_SERVICE"))
    options.setdefault("root", _root_from_environment())
    texts = (runs,) if isinstance(runs, str) else tuple(str(run) for run in runs)
    return merge_runs(MergeRequest(runs=texts, **options), Path(output) if output else None).model_dump(mode="json")


def find_cell(
    run: str | Path,
    *,
    n_hits: int = 200,
    processing: str | None = None,
    data_source: str | None = None,
    timeout: float | None = 30.0,
    service: str | None = None,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Find the unit cell of an unknown sample from the first hits of a run, live or finished.

    Parameters
    ----------
    n_hits : hits to try, at most.
    processing : whose peaks; by default the newest that has some, else they are searched for here.
    timeout : s without a new frame after which a live run is taken as it is.

    Returns
    -------
    The fields of `flows.finding_cell.CellReport`; ``cell`` is None, and ``why`` says why, where hits do not agree.

    Raises
    ------
    RunNotFound : there is no such processing. BadFrame : the detector told no distance or wavelength.
    """
    from flows import finding_cell

    opened = open(run, service=service, root=root)
    found = finding_cell.find_cell(
        opened, n_hits=n_hits, processing=processing, data_source=data_source, timeout=timeout
    )
    return found.model_dump(mode="json")


def tune(
    run: str | Path,
    *,
    n_frames: int = 300,
    recipe: str | Path | None = None,
    data_source: str | None = None,
    service: str | None = None,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Propose threshold, mask and hit cut of the peak search from frames of a run, live or finished.

    Parameters
    ----------
    n_frames : looked at, at most, spread over the run.
    recipe : file of what is in use now.

    Returns
    -------
    The fields of `flows.tuning.TuneReport`.

    Raises
    ------
    BadRecipe : fewer than twenty frames.
    """
    from flows import tuning
    from tasks.recipe import load_recipe

    loaded = load_recipe(recipe) if recipe is not None else None
    opened = open(run, service=service, root=root)
    report, _ = tuning.tune(opened, data_source=data_source, n_frames=n_frames, recipe=loaded)
    return report.model_dump(mode="json")


def refine_detector(
    run: str, *, trust_cell: bool = False, service: str | None = None, root: str | Path | None = None
) -> dict[str, Any]:
    """Say where the detector stands, from the crystals of a processing.

    Parameters
    ----------
    run : ``lyso-2026/17``, or with a processing ``lyso-2026/17:p2``; it must have indexed.
    trust_cell : the recipe's cell is known better than the distance, which is refined too.

    Returns
    -------
    The fields of `flows.detector_refinement.DetectorFindings`.

    Raises
    ------
    BadRecipe : it has fewer than ten crystals.
    """
    from flows.comparison import open_processing
    from flows.detector_refinement import detector_of

    root = root or _root_from_environment()
    service = service or os.environ.get("NEARLINE_SERVICE")
    processing = open_processing(run, service=service, root=str(root) if root else None)
    return detector_of(processing, trust_cell=trust_cell)[0].model_dump(mode="json")


def report(
    runs: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    *,
    sample: str | None = None,
    processing: str | None = None,
    pictures: str | Path | None = None,
    service: str | None = None,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Write the report of a run, live or finished, or of several of a sample: one HTML file that needs nothing else.

    Parameters
    ----------
    runs : ``lyso-2026/3``, ranges ``lyso-2026/3-9``, whole experiments ``lyso-2026/*``, or run folders.
    out : the file; by default ``report-<run>-<processing>.html`` in this folder.
    sample : only runs of this sample; without ``runs`` of all there are.
    processing : whose results; by default each run's promoted one, else the newest.
    pictures : folder to write each picture into, too, as PNG.

    Returns
    -------
    The fields of `flows.report.writing.ReportResult`: ``path``, ``figures`` and what was left out.

    Raises
    ------
    RunNotFound : there is no such run, or none that is processed. BadRecipe : the runs' cells differ.
    """
    from pathlib import Path

    from flows.report import ReportRequest, write_report

    root = root or _root_from_environment()
    texts = (runs,) if isinstance(runs, (str, Path)) else tuple(runs)
    request = ReportRequest(
        runs=tuple(map(str, texts)),
        sample=sample,
        processing=processing,
        service=service or os.environ.get("NEARLINE_SERVICE"),
        root=str(root) if root else None,
    )
    written = write_report(request, Path(out) if out else None, Path(pictures) if pictures else None)
    return written.model_dump(mode="json")


def explain(
    run: str | Path,
    frame: int,
    *,
    peak: int | None = None,
    reflection: tuple[int, int, int] | None = None,
    processing: str | None = None,
    data_source: str | None = None,
    replay: bool = False,
    service: str | None = None,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Walk back from a frame, one of its peaks or one of its reflections to bytes, parameters and code.

    Parameters
    ----------
    peak : of the frame, from 0.
    reflection : Miller indices (h, k, l).
    processing : whose results; by default the newest.
    replay : also compute it again from the bytes, with nothing reused, and compare.

    Returns
    -------
    The fields of `flows.explaining.Explanation`; with ``replay`` those of `flows.replaying.Replay` under that name.

    Raises
    ------
    RunNotFound : the folder is not visible here, or there is no such processing.
    BadQuery, FrameMissing : no such peak or reflection; the run never had such a frame. With ``replay`` also of a
        frame that is not there any more; without, ``why`` says what became of it.
    """
    from flows import explaining, replaying

    opened = open(run, service=service, root=root)
    found = explaining.explain(
        opened, frame, peak=peak, reflection=reflection, processing=processing, data_source=data_source
    )
    again = {"replay": replaying.replay(opened, found).model_dump(mode="json")} if replay else {}
    return found.model_dump(mode="json") | again


def provenance(
    run: str | Path,
    *,
    processing: str | None = None,
    service: str | None = None,
    root: str | Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """What was made of a run, of what and by whom: ``activities``, ``entities``, ``agents`` and ``relations``.

    Parameters
    ----------
    processing : only this one; by default all.

    Raises
    ------
    RunNotFound : the folder is not visible here, or there is no such processing.
    """
    from storage.errors import RunNotFound
    from storage.provenance import provenance_of

    opened = open(run, service=service, root=root)
    folder = opened.visible_folder
    if folder is None:
        raise RunNotFound(f"the folder {opened.folder} of run {opened.name} is not visible here; ask on its machine")
    return provenance_of(folder.path, processing).as_records()


def _service_address(service: str | None) -> str:
    from streaming.wire import DEFAULT_ADDRESS

    return service or os.environ.get("NEARLINE_SERVICE") or DEFAULT_ADDRESS


def _root_from_environment() -> str | None:
    # A service that is named is asked first; a data folder alone means: no service.
    return None if os.environ.get("NEARLINE_SERVICE") else os.environ.get("NEARLINE_ROOT")


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("storage.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nearline' has no attribute {name!r}")
