"""Your own network and data, trained in plain Lightning: python examples/own_network.py [STEPS]."""

import sys

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diffbench import EMA, VP, DiffusionModule, SampleGrid
from diffbench.config.sections import SampleConfig


class ConvNet(nn.Module):
    """A network that predicts the noise in x (B, 1, 8, 8) at time t (B,), given class y (B,)."""

    num_classes = 10

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(10, width)
        self.enter, self.leave = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        layers = [
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in "1234"
        ]
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.enter(x) + (self.time(t[:, None] / 1000) + self.label(y))[:, :, None, None]
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h)


digits = load_digits()
images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]  # 0..16 to -1..1
data = TensorDataset(images, torch.tensor(digits.target))
train, held_out = torch.utils.data.random_split(data, [1500, 297])
grid = SampleGrid(every=12_800, settings=SampleConfig(sampler="ddim", steps="50"))
trainer = L.Trainer(max_steps=int(sys.argv[1]) if sys.argv[1:] else 1000, callbacks=[EMA(0.99), grid])
module = DiffusionModule(ConvNet(), VP(), lr=1e-3)
trainer.fit(module, DataLoader(train, 128, shuffle=True, drop_last=True), DataLoader(held_out, 297))
trainer.test(module, DataLoader(held_out, 297))
