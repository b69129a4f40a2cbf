"""Speed and memory of networks, training loop, sampling, data and scoring on this machine: `python -m benchmarks`."""

import os

from diffbench.__main__ import wait_briefly

wait_briefly()
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read as torch is imported: its profiler prints as it starts and stops
