"""One rank of a job started by `core.distributed.launch`: `python -m diffbench.runs.worker JOB ...`.

The launching process has checked the config, locks the run folder, and prints progress.
"""

import json
import sys
from pathlib import Path

from diffbench.config.load import change
from diffbench.config.sections import SampleConfig
from diffbench.core import distributed
from diffbench.core.distributed import EXIT_LOST_RANK, end_with_parent
from diffbench.core.errors import LostError, report
from diffbench.runs import drawing
from diffbench.runs.build import device_of
from diffbench.runs.folder import read_config
from diffbench.runs.lifecycle import KINDS, encode, load, train_here


def train(folder: str, checkpoint: str | None = None) -> None:
    """Train the run in a folder together with the other ranks, from a checkpoint if one is given."""
    config = read_config(Path(folder))
    kind = KINDS[config.kind]
    start = None if checkpoint else kind.start(config)
    train_here(kind(Path(folder), config), Path(checkpoint) if checkpoint else None, start)


def draw(folder: str, settings: str) -> None:
    """Draw this rank's part of a run's samples; see `drawing.draw`."""
    request = json.loads(settings)
    run = load(folder, request["ema"])
    if request["snapshot"] == "best":
        run.use_best()
    config = change(run.config, {"seeds": {"sample": request["seed"]}, "evaluate": {"count": request["count"]}})
    run.network.to(device_of(config.trainer.accelerator))
    how = SampleConfig(**request["sample"])
    drawing.draw(run, how, drawing.samples_of(run, config, how), request["seed"], *distributed.rank_and_world())


def main(job: str, *arguments: str) -> int:
    end_with_parent()
    try:
        if job == "train":
            train(*arguments)
        elif job == "encode":
            encode(arguments[0], arguments[1:])
        else:
            draw(*arguments)
    except LostError as e:
        # Rank 0 stays silent: its line would appear before the error of the lost rank.
        if distributed.rank_and_world()[0]:
            print(f"error: {e}", file=sys.stderr)
        return EXIT_LOST_RANK
    except KeyboardInterrupt:  # before training handles signals
        return 130
    except Exception as e:
        return report(e)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
