"""Benchmarks of networks, the training loop, sampling, data and whole commands: `python -m benchmarks`."""

import os

from diffbench.__main__ import wait_briefly

wait_briefly()
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read on torch's import; silences its profiler
