"""Sampling from a published DiT: python examples/published_dit.py [STEPS] [CHECKPOINT].

CHECKPOINT is, for example, DiT-XL-2-256x256.pt. Without one, a small DiT with random weights is sampled.
"""

import sys

import torch

from diffbench import VP, VPConfig, from_preset, sample
from diffbench.denoisers import from_reference
from diffbench.denoisers.flops import parameters
from diffbench.denoisers.pretrained.convert import infer

torch.manual_seed(0)
steps = sys.argv[1] if sys.argv[1:] else "50"
if sys.argv[2:]:
    weights = torch.load(sys.argv[2], map_location="cpu", weights_only=True)
    network = from_reference("dit", infer("dit", weights, {}), weights)
else:
    network = from_preset("DiT-S/2", image_size=32)
network.to("cuda" if torch.cuda.is_available() else "cpu")
process = VP(VPConfig(variance="learned_range", loss="hybrid"))
print(f"{parameters(network):,} parameters, input {network.shape}, classes {network.num_classes}")

latents = sample(network, process, labels=[207, 360], steps=steps, guidance=4.0)
print(f"latents {tuple(latents.shape)}, mean {latents.mean():.3f}, standard deviation {latents.std():.3f}")
torch.save(latents, "latents.pt")  # an autoencoder such as stabilityai/sd-vae-ft-ema decodes latents / 0.18215
