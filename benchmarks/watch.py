"""`python -m benchmarks.watch OUT.json VERB ...`: run a diffbench command, and say where its CPU seconds go.

Every few milliseconds of CPU time the stack is looked at, and the time since goes to the innermost stage on it.
"""

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STAGES = {
    "_find_and_load": "imports",
    "read_layers": "config",
    "from_layers": "config",
    "load_data": "data",
    "DenoiserRun.check": "checks",
    "cost_of": "checks",
    "timed": "time estimates",
    "_TrainingEpochLoop.advance": "training",
    "ValidationError.act": "validation",
    "FrechetDistance.run": "distances in training",
    "SampleGrid.act": "grids in training",
    "SaveState.save": "checkpoints",
    "newest": "checkpoints",
    "export": "averages",
    "Run.use_average": "averages",
    "cached_network": "feature extractor",
    "run_scorer": "statistics of real images",
    "Samples.fill": "samples",
    "Scorer.scores": "scores",
    "DenoiserRun.sample_tensor": "final grid",
    "save_grid": "final grid",
    "show_scores": "records",
    "run_table": "table",
    "run_facts": "table",
}
"""Function, by its qualified name -> the stage that it makes."""
INTERVAL = 0.01
"""CPU seconds between two looks."""


class Watch:
    """Share out the CPU seconds of this process from its start on; `first_step` is when training began."""

    def __init__(self) -> None:
        self.spent, self.first_step = dict[str, float](), 0.0
        self.last = time.process_time()
        self.spent["interpreter"] = self.last
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)

    def stop(self) -> None:
        """Look no more."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._look(0, None)

    def _look(self, number: int, frame: FrameType | None) -> None:
        stage = None
        while frame is not None and stage is None:
            code = frame.f_code
            if "diffbench" in code.co_filename or "lightning" in code.co_filename or code.co_name == "_find_and_load":
                stage = STAGES.get(code.co_qualname)
            frame = frame.f_back
        now = time.process_time()
        if stage == "training" and not self.first_step:
            self.first_step = now
        self.spent[stage or "rest"] = self.spent.get(stage or "rest", 0.0) + now - self.last
        self.last = now


def main(out: str, words: list[str]) -> None:
    """Run the command of `words`, write stage -> CPU seconds to `out`, and exit with its code."""
    watch = Watch()
    from diffbench.__main__ import run

    sys.argv[1:] = words
    try:
        run()
    finally:  # by SystemExit
        watch.stop()
        Path(out).write_text(json.dumps({"first_step": watch.first_step, "spent": watch.spent}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
