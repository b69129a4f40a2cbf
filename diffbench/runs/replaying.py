"""The batch that ended a run, once more: python -m diffbench.runs.replaying RUN/nonfinite-000000320.safetensors"""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffbench.core import tensors as sealed
from diffbench.core.errors import UserError
from diffbench.runs.build import device_of
from diffbench.runs.folder import read_config
from diffbench.runs.lifecycle import KINDS

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def replay(path: Path) -> dict[str, Any]:
    """Loss and gradient of a saved batch with the weights that were saved beside it.

    Args:
        path: a nonfinite-*.safetensors in its run folder, whose config.yaml says the rest.

    Returns:
        "losses" of its micro-batches, "grad_norm" (of what fp16 would scale), and "first", the name of the first layer
        whose output was not finite, or None.

    Raises:
        UserError: if the file is damaged, or lies in no run folder.
    """
    config = read_config(path.parent)
    tensors, told = sealed.read(path)
    if "micro_batches" not in told:
        raise UserError(f"{path}: holds no batch; name a nonfinite-*.safetensors of a run folder")
    parts = int(told["micro_batches"])
    module, device = KINDS[config.kind](path.parent, config).module(), device_of(config.trainer.accelerator)
    module.to(device, torch.float64 if config.trainer.precision == "64-true" else None)
    weights = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
    module.network.load_state_dict(weights, strict=True)
    bad: list[str] = []
    for name, layer in module.network.named_modules():
        layer.register_forward_hook(_watch(name, bad))
    losses = []
    for i in range(parts):
        batch = {name: tensors[name].chunk(parts)[i].to(device) for name in ("x0", "position", "label")}
        dtype = AUTOCAST.get(config.trainer.precision)
        context: AbstractContextManager[Any] = torch.autocast(device.type, dtype) if dtype else nullcontext()
        with context:
            loss = module.training_step(batch, i)
        assert isinstance(loss, Tensor)
        (loss / parts).backward()
        losses.append(float(loss.detach()))
    norm = nn.utils.get_total_norm([p.grad for p in module.network.parameters() if p.grad is not None])
    return {"losses": losses, "grad_norm": float(norm), "first": bad[0] if bad else None}


def _watch(name: str, bad: list[str]) -> Any:
    def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            bad.append(name or "the network")

    return hook


if __name__ == "__main__":
    try:
        found = replay(Path(sys.argv[1]))
    except (UserError, IndexError) as e:
        sys.exit(f"error: {e if isinstance(e, UserError) else 'name a nonfinite-*.safetensors of a run folder'}")
    print(f"loss {found['losses']}, gradient norm {found['grad_norm']}, first layer not finite: {found['first']}")
