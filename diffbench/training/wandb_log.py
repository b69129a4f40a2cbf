"""Weights & Biases logging of a run's numbers and images."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffbench.core.files import write_text

ID = "wandb-id.txt"
"""File in the run folder with the run's W&B id, so that a resumed run continues the same W&B run."""


class WandbLog:
    """A W&B run that receives numbers and images, over images seen.

    Without a login, or if W&B does not respond, everything is written to `wandb/` in the run folder for a later
    `wandb sync`; WANDB_MODE, WANDB_PROJECT and the like work as W&B documents them.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        if not (folder / ID).exists():
            write_text(folder / ID, uuid.uuid4().hex[:12])
        known = {"id": (folder / ID).read_text().strip(), "resume": "allow", "dir": str(folder), "config": dict(config)}
        known |= {
            "project": os.environ.get("WANDB_PROJECT", "diffbench"),
            "name": f"{folder.parent.name}/{folder.name}",
        }
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        try:
            self._run = wandb.init(mode=mode, **known)
        except (wandb.Error, OSError) as e:
            print(
                f"warning: W&B does not respond ({' '.join(str(e).split())}); logging to {folder / 'wandb'}", flush=True
            )
            self._run = wandb.init(mode="offline", **known)
        self._image = wandb.Image
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")

    def record(self, values: Mapping[str, float], images: int) -> None:
        self._run.log({"images": images, **values})

    def show_image(self, tag: str, image: np.ndarray, images: int) -> None:
        self._run.log({"images": images, tag: self._image(image)})

    def flush(self) -> None:
        """Do nothing: W&B uploads on its own."""

    def close(self) -> None:
        self._run.finish()
