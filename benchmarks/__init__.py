"""What Nearline costs, each figure beside a limit or a peer taken in the same run.

``python -m benchmarks [--quick] [names…]`` prints one table and writes ``build/bench/<name>.json``.
A module per benchmark: its ``measure(options)`` returns figures. `measure` interleaves what is
compared (A B A B …) and takes medians, since other programs use the machine too.
"""
