"""digits-cnn for a data set of digits: from the cache, or trained in seconds."""

import hashlib
import inspect

from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import interpolate

from diffbench.core.errors import UserError
from diffbench.core.files import atomic, cache_folder
from diffbench.data.sources import ImageSet
from diffbench.evaluation import digits_cnn
from diffbench.evaluation.digits_cnn import DigitsCNN, train_digits_cnn


def reduced(images: Tensor) -> Tensor:
    """Digits (N, 1, S, S), 0 to 255, as digits-cnn reads them: (N, 1, 8, 8), the mean of the pixels under each."""
    return images if images.shape[-1] == 8 else interpolate(images.float(), size=8, mode="area")


def judge_name(images: Tensor) -> str:
    """What digits-cnn is called for such digits: the way to another size is part of a metric's name."""
    return "digits-cnn" if images.shape[-1] == 8 else "digits-cnn-area8"


def load_digits_cnn(train_set: ImageSet) -> DigitsCNN:
    """digits-cnn for a training set: from the cache, or trained in seconds and cached under a key of data and code.

    Raises:
        UserError: if the images are not digits, (1, S, S) with S of 8 or more.
    """
    channels, height, width = train_set.images.shape[1:]
    if channels != 1 or height != width or height < 8 or train_set.num_classes != 10:
        raise UserError(
            f"evaluate.extractor: digits-cnn scores grey digits of 8x8 or more in ten classes, not {channels}x{height}"
            f"x{width} in {train_set.num_classes}"
        )
    code = hashlib.sha256(inspect.getsource(digits_cnn).encode()).hexdigest()[:8]
    path = cache_folder() / f"{judge_name(train_set.images)}-{train_set.fingerprint()}-{code}.safetensors"
    if not path.exists():
        print(f"training digits-cnn, the judge of the samples, once (kept in {path})", flush=True)
        net = train_digits_cnn(reduced(train_set.images), train_set.labels)
        with atomic(path) as file:
            file.write(save(net.state_dict()))
    net = DigitsCNN()
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False)
