"""Any folder of images or weights file either works or gives a one-line error that names it, with no partial output."""

import io
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from test_fuzz import LONG, SHORT, ends_well, text, try_all

from diffbench.core.errors import UserError
from diffbench.data.images import images
from diffbench.data.places import ImagesConfig


def any_images(files: dict[str, bytes], channels: int, skip: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image_files = Path(folder) / "pictures"
        image_files.mkdir()
        for name, content in files.items():
            (image_files / name).write_bytes(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIFFBENCH_CACHE", f"{folder}/cache")
            try:
                sets = images(ImagesConfig(str(image_files), 8, channels, skip_broken=skip))
            except (UserError, ValueError) as e:
                assert str(e).startswith("data.") and len(str(e).splitlines()) == 1
            else:
                assert all(len(part) and part.images.shape[1:] == (channels, 8, 8) for part in sets)
        ends_well("evaluate", str(image_files), "--against", str(image_files), "evaluate.extractor=digits-cnn")


def any_state(state: dict[str, torch.Tensor], source: str, safe: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("w.safetensors" if safe else "w.pt")
        if safe:
            save_file(state, path)
        else:
            torch.save(state, path)
        out = Path(folder) / "out"
        code = ends_well("import", source, str(path), str(out), "arguments.num_heads=3")
        assert out.exists() == (code == 0)


def encode_image(mode: str, size: tuple[int, int], kind: str) -> bytes:
    data = io.BytesIO()
    Image.new(mode, size).save(data, kind)
    return data.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def empty_png(width: int, height: int) -> bytes:
    """Return a PNG whose header has these sides and which has no pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


sides = st.tuples(st.integers(1, 40), st.integers(1, 40))
valid = st.builds(encode_image, st.sampled_from(["1", "L", "P", "RGB"]), sides, st.sampled_from(["PNG", "GIF", "TIFF"]))
odd = st.builds(encode_image, st.sampled_from(["RGBA", "LA", "I;16"]), sides, st.just("PNG"))
truncated = st.tuples(valid | odd, st.integers(0, 60)).map(lambda t: t[0][: t[1]])
huge = st.builds(empty_png, st.integers(0, 2**31), st.integers(0, 2**31))
names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=20)
image_files = st.dictionaries(
    names.map(lambda n: n.lstrip(".") + "x.png"), st.one_of(valid, odd, truncated, huge, st.binary()), max_size=5
)
tensors = st.builds(
    lambda shape, kind: torch.zeros(shape, dtype=kind),
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]),
)
PARTS = ["x_embedder.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "final_layer.linear.weight", "y_embedder"]
PARTS += ["input_blocks.0.0.weight", "model.map_layer0.weight", "t_embedder.mlp.0.weight", "blocks.1.mlp.fc1.bias"]
states = st.dictionaries(st.sampled_from(PARTS) | text, tensors, max_size=6)

CASES: dict[str, Any] = {
    "images": (any_images, {"files": image_files, "channels": st.sampled_from([1, 3]), "skip": st.booleans()}),
    "states": (
        any_state,
        {"state": states, "source": st.sampled_from(["dit", "sit", "adm", "ddpmpp"]), "safe": st.booleans()},
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_thirty_random_files(what: str) -> None:
    try_all(CASES[what], SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
def test_a_thousand_random_files(what: str) -> None:
    try_all(CASES[what], LONG)
