"""A service that sends what it seals to an object store, and is killed meanwhile."""

import contextlib
import os
import subprocess
import sys

import nearline
from nearline.children import free_port
from storage.files import file_sizes, to_path
from storage.models import StreamHeader
from streaming.client import is_reachable
from streaming.producer import Producer
from tests.streaming.harness import SHAPE, pixels, wait_for

N_BEFORE, N = 60, 100


@contextlib.contextmanager
def serving(root, address, target, log):
    """The command itself; killed at the end if it still runs."""
    source = f"eiger=tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "nearline.cli", "serve", "--root", str(root), "--bind", address]
    command += ["--source", source, "--upload-to", target, "--remove-uploaded"]
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ)
    try:
        wait_for(lambda: is_reachable(address), 60)
        yield process
    finally:
        process.kill()
        process.wait(20)


def test_all_that_was_stored_gets_there_whatever_is_killed(bucket, tmp_path):
    target, root, log = f"{bucket}/beamline", tmp_path / "data", tmp_path / "service.log"
    address = f"tcp://127.0.0.1:{free_port()}"
    header = {"shape": SHAPE, "dtype": "uint16", "frames_per_chunk": 10, "data_source": "cam"}
    with serving(root, address, target, log) as process, Producer(address, "lyso", "cam") as producer:
        out = producer.run()
        out.start(StreamHeader(experiment="lyso", run=out.run, **header))
        for index in range(N_BEFORE):
            out.send(pixels(index))
        wait_for(lambda: any("cam" in str(name) for name in file_sizes(to_path(target))), 60)
        process.kill()
        process.wait(20)
        with serving(root, address, target, log):
            for index in range(N_BEFORE, N):
                out.send(pixels(index))
            out.finish()
            folder = root / "lyso" / str(out.run)
            data = folder / "cam.zarr" / "data" / "c"
            # The last thing that is done.
            wait_for(lambda: not any(path.is_file() for path in data.rglob("*")), 60)
    cam = nearline.open(f"{target}/lyso/{out.run}")["cam"]
    assert [frame.frame_index for frame in cam] == list(range(N))
    assert all((cam[index].data == pixels(index)).all() for index in (0, N_BEFORE, N - 1))
    assert cam.ledger().stored == N
    assert cam.ledger().is_balanced
    # Its folder here knows where its frames are.
    assert (nearline.open(folder)["cam"][7].data == pixels(7)).all()
