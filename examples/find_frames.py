"""Say afterwards which frames the laser was on for, and find the pumped and the dark hits.

python examples/find_frames.py lyso-2026/17
"""

import sys

import nearline

run = nearline.open(sys.argv[1])
detector = run.detector

# Every second block of four frames was pumped; in real life this comes from the laser's log.
for start in range(0, len(detector), 8):
    run.annotate(start=start, stop=start + 4, laser=True, delay_ps=3.0)

pumped = detector.where("hit AND laser")
dark = detector.where("hit AND laser IS NOT TRUE", columns=["n_peaks"])
print(f"{len(pumped)} pumped and {len(dark)} dark hits in {len(detector)} frames")
for frame in pumped:
    print(f"frame {frame.frame_index} was pumped: {frame.blob.nbytes} bytes")
for row in dark.table.to_pylist():
    print(f"frame {row['frame_index']} was dark: {row['n_peaks']} peaks")
