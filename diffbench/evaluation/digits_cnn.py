"""digits-cnn: a small classifier of 8x8 digits, the judge and the feature extractor of the digits experiments."""

import torch
from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """64 features and 10 logits of (B, 1, 8, 8) uint8 images; 73,000 parameters."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) uint8 to (B, 64) float32."""
        out: Tensor = self.body(images.float() / 127.5 - 1)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) uint8 to (B, 10) logits."""
        out: Tensor = self.head(self.features(images))
        return out


def train_digits_cnn(images: Tensor, labels: Tensor, epochs: int = 60, batch: int = 64) -> DigitsCNN:
    """Trains the network on (N, 1, 8, 8) uint8 digits; the same result each time on one machine.

    Adam, cosine decay, label smoothing 0.05, shifts by up to one pixel. The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DigitsCNN().train()
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        total = epochs * (len(images) // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        loss_fn = nn.CrossEntropyLoss(label_smoothing=0.05)
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
                dy, dx = torch.randint(-1, 2, (2,)).tolist()
                shifted = torch.roll(images[index], (dy, dx), dims=(2, 3))
                loss = loss_fn(net(shifted), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval().requires_grad_(False)
