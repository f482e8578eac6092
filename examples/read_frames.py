"""Print what is on each frame: the same lines for a run being taken, a finished one, or a bare run folder.

python examples/read_frames.py lyso-2026/17
python examples/read_frames.py nearline-data/lyso-2026/17
"""

import sys

import nearline

run = nearline.open(sys.argv[1])
detector = run.detector
print(f"{run.name} is {run.state}, {len(detector)} frames so far")
for frame in detector.follow():
    usable = frame.image if detector.pixel_mask is None else frame.image[detector.pixel_mask == 0]
    print(f"frame {frame.frame_index}: mean {usable.mean():.3f} counts, {frame.blob.nbytes} bytes compressed")
print("the ledger balances" if detector.ledger().is_balanced else detector.ledger().problems)
