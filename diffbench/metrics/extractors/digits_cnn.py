"""digits-cnn: a small classifier of 8x8 digits, the feature extractor of the digits experiments."""

import hashlib
import inspect

import torch
from torch import Tensor, nn

from diffbench.metrics.extractors.base import Extractor, Features, Request, state_hash
from diffbench.metrics.extractors.resize import area


class DigitsCNN(nn.Module):
    """64 features and 10 logits of (B, 1, 8, 8) uint8 images; 73,000 parameters."""

    num_features, num_classes = 64, 10

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
        self.head = nn.Linear(self.num_features, self.num_classes)

    def features(self, images: Tensor) -> Tensor:
        out: Tensor = self.body(images.float() / 127.5 - 1)
        return out

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(images))
        return out


def train_digits_cnn(images: Tensor, labels: Tensor, epochs: int = 60, batch: int = 64) -> DigitsCNN:
    """Trains the network on (N, 1, 8, 8) digits, 0 to 255; the same result each time on one machine.

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


def build(request: Request) -> Extractor:
    """Make the extractor; trained in seconds on first use. Larger digits are reduced to 8x8, and its name says so."""
    assert request.training is not None
    images, labels, fingerprint = request.training()
    name = "digits-cnn" if request.shape[1:] == (8, 8) else "digits-cnn-area8"
    code = hashlib.sha256((inspect.getsource(DigitsCNN) + inspect.getsource(train_digits_cnn)).encode()).hexdigest()[:8]

    def train() -> dict[str, Tensor]:
        return train_digits_cnn(area(images, 8), labels).state_dict()

    net = DigitsCNN()
    net.load_state_dict(request.cached(f"{name}-{fingerprint}-{code}", train))
    net.eval().requires_grad_(False)

    def run(images: Tensor) -> Features:
        pooled = net.features(images)
        return Features(pooled, net.head(pooled))

    return Extractor(
        name=name,
        network=net,
        run=run,
        dim=net.num_features,
        weights=state_hash(net),
        licence="trained here",
        channels=1,
        prepare=lambda images: area(images, 8),
        classes=net.num_classes,
        predicts_labels=True,
    )


def check(request: Request) -> None:
    """Check that the images can be digits."""
    channels, height, width = request.shape
    digits = request.training is not None and request.classes in (None, DigitsCNN.num_classes)
    if not digits or channels != 1 or height != width or height < 8:
        raise ValueError(f"digits-cnn scores square grey digits in ten classes, 8x8 or larger, not {request.shape}")
