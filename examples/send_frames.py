"""Send arrays with metadata into a running service, as a camera's own program would.

nearline serve &
python examples/send_frames.py lyso-2026
"""

import sys

import numpy as np

import nearline


def send_frames(experiment: str, n_frames: int = 20) -> str:
    """Send noise as the data source ``camera`` of a new run; the run's name, such as lyso-2026/1."""
    random = np.random.default_rng(0)
    with (
        nearline.producer(experiment, "camera") as producer,
        producer.run(sample="dark", planned=n_frames) as out,
    ):
        for index in range(n_frames):
            picture = random.poisson(3.0, (480, 640)).astype(np.uint16)
            # Metadata is plain JSON. Numbers, strings and booleans become columns of the frame table.
            out.send(picture, meta={"laser_on": index % 2 == 0, "stage_x_mm": 0.05 * index})
    return f"{experiment}/{out.run}"


if __name__ == "__main__":
    name = send_frames(sys.argv[1])
    camera = nearline.open(name)["camera"]
    print(f"{name}: {len(camera)} frames, the last one with {camera[-1].meta}")
