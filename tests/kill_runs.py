"""Kill a tiny run (SIGKILL) many times, each time finishing it with the same command; run as a separate process.

    python tests/kill_runs.py train|score|schedules writes|moments MOST FOLDER [I/N]

`train` trains with validation, distances and checkpoints; `score` draws chunks of samples and appends records.
`writes` kills in the middle of writes and before flushes, renames, truncations and removals: the first and last of each
kind of call on each kind of file, then others spread evenly, MOST in all (0 for every one). `moments` kills MOST times
shortly after a forward pass, spread over training, validation and distances. `schedules` trains with ten orders of the
five intervals, in which each comes before each other and each is once too long to occur, and kills MOST times in each.
Prints JSON: what was tried, and which runs did not end bit for bit like an uninterrupted run. With I/N, only the I-th
of every N kills or schedules.
"""

import builtins
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning  # noqa: F401  imported once here, not in each fork
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffbench.denoisers.dit import DiT
from diffbench.evaluation import records, samples, validation_error
from diffbench.runs import evaluate
from diffbench.runs.lifecycle import load, train
from diffbench.training import distances, trainer  # noqa: F401

RUN = [
    "trainer.batch_size=8",
    "trainer.max_images=96",  # 12 steps
    "trainer.log_images=24",
    "trainer.validate_images=40",
    "trainer.checkpoint_images=32",
    "trainer.sample_images=48",
    "evaluate.every_images=40",
    "evaluate.every_count=20",
    "evaluate.count=20",
    "evaluate.best=fd",
    "ema.decays=[0.9]",
    "data.held_out=40",
    "sample.steps='2'",
    "denoiser.hidden_size=16",
    "denoiser.depth=1",
    "denoiser.num_heads=2",
    "denoiser.dropout=0.1",
]
INTERVALS = ["trainer.log", "trainer.checkpoint", "trainer.validate", "trainer.sample", "evaluate.every"]
ORDERS = [INTERVALS[i:] + INTERVALS[:i] for i in range(5)] + [(INTERVALS[i:] + INTERVALS[:i])[::-1] for i in range(5)]
Point = tuple[str, int]
"""A kind of call on a kind of file, or a phase of the run; and its number, counted from 1."""


def unnumbered(name: Any) -> str:
    """Return a file's name without its numbers and hashes, the same for all files of one kind."""
    name = os.readlink(f"/proc/self/fd/{name}") if isinstance(name, int) else os.fspath(name)
    name = Path(name).name
    if "tfevents" in name:
        return "events"
    return re.sub(r"[0-9a-f]{16}|\d+", "#", re.sub(r"\.[^.]*\.tmp$", "", name)).lstrip(".")


class Killer:
    """A counter of calls of each kind that kills this process at one of them."""

    def __init__(self, point: Point | None, folder: Path) -> None:
        self.point, self.folder, self.counts = point, str(folder), Counter[str]()

    def at(self, kind: str, name: Any, torn: Callable[[], Any] = lambda: None) -> None:
        what = f"{kind} {unnumbered(name)}"
        self.counts[what] += 1
        if self.point == (what, self.counts[what]):
            torn()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_files(self) -> None:
        """Count every file operation under the folder from here on; a write that is hit leaves half its bytes."""
        real_open = io.open

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            found = real_open(file, mode, *arguments, **options)
            where = os.readlink(f"/proc/self/fd/{found.fileno()}")
            return Watched(found, self) if set(mode) & set("wa+x") and where.startswith(self.folder) else found

        builtins.open = io.open = opened  # type: ignore[assignment]
        for kind in ("fsync", "replace", "truncate", "unlink"):
            setattr(os, kind, self._hooked(kind, getattr(os, kind)))

    def _hooked(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            name = arguments[1] if kind == "replace" else arguments[0]
            where = os.readlink(f"/proc/self/fd/{name}") if isinstance(name, int) else os.fspath(name)
            if where.startswith(self.folder):
                self.at(kind, name)
            return call(*arguments, **options)

        return run

    def watch_network(self, seed: int) -> None:
        """Count forward passes by phase from here on; the process dies up to 20 ms after the one that is hit."""
        phases, real_forward = ["training"], DiT.forward

        def forward(net: DiT, *arguments: Any, **options: Any) -> Any:
            self.counts[phases[-1]] += 1
            if self.point == (phases[-1], self.counts[phases[-1]]):
                delay = random.Random(seed).random() * 0.02
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return real_forward(net, *arguments, **options)

        def within(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                phases.append(name)
                try:
                    return call(*arguments, **options)
                finally:
                    phases.pop()

            return run

        DiT.forward = forward  # type: ignore[method-assign]
        validation_error.error_sums = within("validation", validation_error.error_sums)
        distances.FrechetDistance.measure = within("distance", distances.FrechetDistance.measure)  # type: ignore[method-assign]


class Watched:
    """A file whose writes and flushes are counted."""

    def __init__(self, file: Any, killer: Killer) -> None:
        self.__dict__.update(file=file, killer=killer)

    def write(self, data: Any) -> Any:
        def torn() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.killer.at("write", self.file.fileno(), torn)
        return self.file.write(data)

    def flush(self) -> None:
        self.killer.at("flush", self.file.fileno())
        self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def start(work: Callable[[], Any], watch: Callable[[Killer], None], killer: Killer) -> tuple[int, Counter[str]]:
    """Fork a child that does the work; return its wait status and the calls it counted."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            watch(killer)
            work()
            os.write(writer, json.dumps(killer.counts).encode())
            code = 0
        except BaseException as e:
            os.write(2, f"{killer.point}: {type(e).__name__}: {e}\n".encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        report = file.read()
    return os.waitpid(pid, 0)[1], Counter(json.loads(report or "{}"))


def digest(value: Any) -> str:
    """Return a hash of nested tensors and plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return [str(value.dtype), list(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()]
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return hashlib.sha256(json.dumps(plain(value)).encode()).hexdigest()[:12]


def outcome(run: Path) -> dict[str, str]:
    """Return hashes of all that must be equal at the end: states, weights, images, series and leftover files."""
    (state,) = [torch.load(path, weights_only=True) for path in sorted(run.glob("checkpoints/step-12.ckpt"))]
    parts = {p: state[p] for p in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ImageDataModule")}
    parts |= {name: state["callbacks"][name] for name in ("EMA", "NonFiniteGuard", "FrechetDistance")}
    parts["metrics"] = [{k: v for k, v in line.items() if k[:5] != "perf/"} for line in records.metrics(run)]
    scalars = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = sorted(t for t in scalars.Tags()["scalars"] if t[:5] != "perf/")
    parts["scalars"] = {tag: [(e.step, e.value) for e in scalars.Scalars(tag)] for tag in tags}
    for path in sorted(run.rglob("*.safetensors")):
        parts[str(path.relative_to(run))] = load_file(path)
    for path in sorted(run.rglob("*.png")):
        parts[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    if (run / "results.jsonl").exists():  # scoring again may log a point twice
        parts["scalars"] = {tag: sorted(set(points)) for tag, points in parts["scalars"].items()}
    newest = {record["guidance"]: records.values(record) for record in records.results(run)}
    parts["records"] = [newest[guidance] for guidance in sorted(newest)]
    parts["left over"] = sorted(p.name for p in run.rglob(".*") if p.name != ".lock")
    return {name: digest(value) for name, value in parts.items()}


def schedule(order: list[str]) -> list[str]:
    """Return overrides that make the five intervals first occur in this order, and the last one never."""
    return [f"{key}_images={images}" for key, images in zip(order, (8, 24, 40, 72, 10**9), strict=True)]


def works(
    what: str, folder: Path, overrides: list[str]
) -> tuple[Callable[[Path], Callable[[], Any]], Callable[[Path], Path]]:
    """Return two functions of a folder: the command's work there, and the path of the run it makes there."""
    trained = folder / "begun"

    def trains(place: Path) -> Callable[[], Any]:
        def work() -> None:
            os.environ["DIFFBENCH_CACHE"] = str(place / "cache")
            train("experiments/digits/dit.yaml", [*RUN, *overrides, "tag=run", f"runs_dir={place}"])

        return work

    def scores(place: Path) -> Callable[[], Any]:
        def work() -> None:
            samples.SIZE = 7
            if not (place / "digits").exists():
                shutil.copytree(trained / "digits", place / "digits")
            os.environ["DIFFBENCH_CACHE"] = str(place / "cache")
            run = load(place / "digits" / "dit-run-s0")
            evaluate.evaluate(run, ["sample.guidance=1.5"])

        return work

    if what == "score" and not trained.exists():
        assert start(trains(trained), lambda _: None, Killer(None, trained))[0] == 0
    return (scores if what == "score" else trains), lambda place: place / "digits" / "dit-run-s0"


def chosen(counts: Counter[str], most: int) -> list[Point]:
    """Choose the first and last call of each kind, then others spread evenly."""
    every = [(what, i) for what in sorted(counts) for i in range(1, counts[what] + 1)]
    if not most:
        return every
    ends = [p for p in every if p[1] == 1] + [p for p in every if p[1] == counts[p[0]] > 1]
    rest = [p for p in every if p not in ends]
    random.Random(0).shuffle(ends)
    more = max(0, most - len(ends))
    return [*ends, *(rest[len(rest) * i // more] for i in range(min(more, len(rest))))][:most]


def scattered(counts: Counter[str], most: int) -> list[Point]:
    """Choose calls at random, cycling through the kinds."""
    kinds = sorted(counts)
    random.Random(sum(counts.values())).shuffle(kinds)
    tried = [(kinds[i % len(kinds)], random.Random(i)) for i in range(most)]
    return [(kind, r.randint(1, counts[kind])) for kind, r in tried]


def copy_extractor(old: Path, new: Path) -> None:
    """Copy the feature extractor, which takes seconds to train, from one cache to another."""
    new.mkdir(parents=True)
    for path in old.glob("digits-cnn-*.safetensors"):
        shutil.copy(path, new)


def main(what: str, how: str, most: int, folder: Path, share: str = "1/1") -> dict[str, Any]:
    torch.set_num_threads(1)
    first, of = map(int, share.split("/"))
    if what != "schedules":
        return killed(what, how, most, folder, [], (first, of))
    reports = [
        killed("train", how, most, folder / str(i), schedule(ORDERS[i]), at=scattered) for i in range(first - 1, 10, of)
    ]
    together: dict[str, Any] = {key: sum(r[key] for r in reports) for key in ("calls", "kills")}
    together |= {"unkilled": [point for r in reports for point in r["unkilled"]]}
    return together | {"wrong": {str(i): r["wrong"] for i, r in enumerate(reports) if r["wrong"]}}


def killed(
    what: str,
    how: str,
    most: int,
    folder: Path,
    overrides: list[str],
    share: tuple[int, int] = (1, 1),
    at: Callable[[Counter[str], int], list[Point]] = chosen,
) -> dict[str, Any]:
    """Run one series of kills at the points that `at` chooses, and return its report."""
    work, run_of = works(what, folder, overrides)

    def watch(killer: Killer) -> None:
        killer.watch_files() if how == "writes" else killer.watch_network(sum(map(ord, str(killer.point))))

    cached = folder.parent / "0" / "whole" / "cache"  # the first schedule's cache
    if cached.is_dir() and not folder.exists():
        copy_extractor(cached, folder / "whole" / "cache")
    status, counts = start(work(folder / "whole"), watch, Killer(None, folder))
    assert status == 0, "the unbroken run failed"
    whole = outcome(run_of(folder / "whole"))
    points = (scattered if how == "moments" else at)(counts, most)[share[0] - 1 :: share[1]]
    wrong, unkilled = {}, []
    for number, point in enumerate(points):
        place = folder / f"killed-{number}"
        if "digits-cnn" not in point[0] and point[0] != "fsync cache":  # unless the kill hits its own writing
            copy_extractor(folder / "whole" / "cache", place / "cache")
        status, _ = start(work(place), watch, Killer(point, folder))
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            unkilled.append(point)
        again, _ = start(work(place), lambda _: None, Killer(None, folder))
        now = {} if again else outcome(run_of(place))
        if now != whole:
            wrong[str(point)] = sorted(k for k in whole | now if whole.get(k) != now.get(k)) if now else "no end"
        else:
            shutil.rmtree(place)
    kinds = dict(Counter(what for what, _ in points))
    return {"calls": sum(counts.values()), "kills": len(points), "unkilled": unkilled, "wrong": wrong, "kinds": kinds}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]).resolve(), *sys.argv[5:])))
