"""The cache folder, and files that are created only once."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffbench.core import tensors
from diffbench.core.errors import UserError
from diffbench.core.files import cache_folder, cached, locked, write_text


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIFFBENCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


def test_a_user_without_a_home_is_told_to_set_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    no_home(monkeypatch)
    with pytest.raises(UserError, match=r"^no home folder for the cache; set DIFFBENCH_CACHE=FOLDER$"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/diffbench")
    monkeypatch.setenv("DIFFBENCH_CACHE", "/y")
    assert cache_folder() == Path("/y")
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("DIFFBENCH_CACHE", "~/y")
    assert cache_folder() == Path("/h/y")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(UserError, match=r"/\.lock: cannot lock this folder \(No locks available\); choose another"),
        locked(tmp_path),
    ):
        pass


def test_concurrent_processes_create_a_cached_file_once(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from diffbench.core.files import cached, write_text\n"
        "path, log = map(pathlib.Path, sys.argv[1:])\n"
        "def make():\n"
        "    log.open('a').write('made\\n'); time.sleep(0.2); write_text(path, 'x')\n"
        "assert cached(path, make).read_text() == 'x'\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "f"), str(tmp_path / "log")]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_an_existing_cached_file_is_not_created_again(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "x")
    assert cached(tmp_path / "f", pytest.fail) == tmp_path / "f"
    assert not (tmp_path / ".f.lock").exists()


def test_tensors_that_share_memory_are_written_separately(tmp_path: Path) -> None:
    tied, path = torch.arange(6.0).view(2, 3), tmp_path / "a.safetensors"
    tensors.write(path, {"a": tied, "b": tied, "c": tied[:1], "d": tied[1:], "empty": torch.zeros(0)})
    found, _ = tensors.read(path)
    wanted = {"a": tied, "b": tied, "c": tied[:1], "d": tied[1:], "empty": torch.zeros(0)}
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()) and len(found) == 5
