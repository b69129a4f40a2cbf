"""One rank of a job that `core.distributed.launch` started: `python -m diffbench.runs.worker WHAT ...`.

The launcher has checked the config, holds the run folder, and says what happens.
"""

import json
import sys
from pathlib import Path

from diffbench.config.load import change
from diffbench.config.sections import SampleConfig
from diffbench.core import distributed
from diffbench.core.distributed import EXIT_LOST, end_with_parent
from diffbench.core.errors import LostError, report
from diffbench.runs import drawing
from diffbench.runs.build import device_of
from diffbench.runs.folder import read_config
from diffbench.runs.lifecycle import KINDS, encode, load, train_here


def train(folder: str, checkpoint: str | None = None) -> None:
    """Trains the run of a folder with the other ranks, from a checkpoint where one is named."""
    config = read_config(Path(folder))
    kind = KINDS[config.kind]
    start = None if checkpoint else kind.start(config)
    train_here(kind(Path(folder), config), Path(checkpoint) if checkpoint else None, start)


def draw(folder: str, settings: str) -> None:
    """Draws this rank's part of a run's samples; see `drawing.draw`."""
    wanted = json.loads(settings)
    run = load(folder, wanted["ema"])
    if wanted["snapshot"] == "best":
        run.use_best()
    config = change(run.config, {"seeds": {"sample": wanted["seed"]}, "evaluate": {"count": wanted["count"]}})
    run.network.to(device_of(config.trainer.accelerator))
    how = SampleConfig(**wanted["sample"])
    drawing.draw(run, how, drawing.samples_of(run, config, how), wanted["seed"], *distributed.place())


def main(what: str, *arguments: str) -> int:
    end_with_parent()
    try:
        if what == "train":
            train(*arguments)
        elif what == "encode":
            encode(arguments[0], arguments[1:])
        else:
            draw(*arguments)
    except LostError as e:
        if distributed.place()[0]:  # what rank 0 says is seen at once, before the error of the rank that it lost
            print(f"error: {e}", file=sys.stderr)
        return EXIT_LOST
    except KeyboardInterrupt:  # before training listens
        return 130
    except Exception as e:
        return report(e)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
