"""Kills short runs, resumes them, and compares them with an unbroken one, bit for bit.

    python tests/crash.py --kills 10 --full_disks
    python tests/crash.py --kills 0 --power_cuts 10         as root, on Linux

The kills come at random moments (some are SIGTERM or SIGHUP) and, in turn, at the points
below; the second one of a run may come while it resumes. Compared are the weights, the
optimizer, the logs without times, the pool, the evaluations, and which files there are.
--full_disks ends runs at the first write beyond a size of a file (RLIMIT_FSIZE): in the
pool, the weights, the optimizer; each must end in a sentence, and the next command go on.
--power_cuts writes to a file system in an image and goes on from a copy of that image, made
while the run goes: it has what was synced, and of the rest what happened to be written.
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rrr  # noqa: E402
import train  # noqa: E402

OPTIONS = "--steps 4 --batch_size 2 --group_size 4 --pool_problems 24 --eval_n 8 --lr 1e-3"
OPTIONS += " --save_every 1 --eval_every 2 --sample_rows 8 --reflection_tokens 24"
POINTS = {  # name -> what is called there; the kill comes before it
    "pool": (train, "append"),
    "evaluation": (train, "evaluate"),
    "sampling": (rrr.Rollout, "reflect"),
    "training": (rrr, "backward"),
    "inside a checkpoint": (torch, "save"),
    "before the rename": (train.os, "rename"),
    "between rename and deletion": (train.shutil, "rmtree"),
    "while resuming": (train, "restore"),
    "while a log is cut": (train.os, "replace"),
    "at the very end": (train, "table"),
}
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGHUP")  # the last: a closed terminal
FULL = (3_000, 8_000, 15_000, 2_000_000, 6_000_000)  # bytes that a file may have
TIMES = ("seconds", "memory_gb", "sampled_tokens_per_second", "training_tokens_per_second")


def die_at(point: str, count: int, arguments: list[str]):
    """Runs train.py in this process, which kills itself at a call of this number."""
    owner, name = POINTS[point]
    original, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args, **more):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **more)

    with mock.patch.object(owner, name, deadly):
        train.main(arguments)


def start(arguments: list[str], point=None, count=1, limit=None) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    if point:
        command = [sys.executable, __file__, "--die", point, str(count), *arguments]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}

    def limited():
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(command, **streams, preexec_fn=limited)


def begin(run: Path) -> list[str]:
    """The arguments of a first start, or of one that goes on."""
    if (run / "config.json").exists():
        return ["--resume", str(run)]
    return [*OPTIONS.split(), "--out", str(run)]


def finish(run: Path):
    """Goes on until the run is done."""
    process = start(begin(run))
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{run} does not go on: {said.decode()}")


def kill(run: Path, rng: random.Random, seconds: float, point: str | None) -> str:
    """One death. Returns what happened."""
    if point is None:
        after, process = rng.uniform(0, seconds), start(begin(run))
        try:
            process.wait(after)
            return "was done before the kill"
        except subprocess.TimeoutExpired:
            name = rng.choice(SIGNALS)
            process.send_signal(signal.Signals[name])
        process.communicate()
        return f"{name} after {after:.1f} s"
    count = rng.randint(1, 3)
    if point.startswith("while"):  # there must be something to go on from
        start(begin(run), "training", 3).communicate()
        count = 1
    process = start(begin(run), point, count)
    process.communicate()
    was = "killed" if process.returncode == -signal.SIGKILL else "not reached"
    return f"{point}, call {count}: {was}"


def fill_the_disk(run: Path, limit: int) -> str:
    """One run that may write no more. Returns what it said."""
    process = start(begin(run), limit=limit)
    _, said = process.communicate()
    said = said.decode().strip()
    if process.returncode != 1 or "\n" in said or "cannot be" not in said:
        raise SystemExit(f"{limit} bytes: exit {process.returncode}, no sentence: {said}")
    return f"files of {limit:,} bytes: {said.replace(str(run), 'RUN')[:70]}..."


def cut_the_power(whole: Path, work: Path, after: float) -> bool:
    """One run on a disk of its own, which is copied in the middle; the copy goes on."""
    work.mkdir()
    disk, image, copy = work / "disk", work / "image", work / "copy"
    disk.mkdir()
    command("truncate", "--size=200M", image)
    command("mkfs.ext4", "-q", image)
    command("mount", "-o", "loop", image, disk)
    process = start(begin(disk / "run"))
    time.sleep(after)
    process.send_signal(signal.SIGSTOP)
    shutil.copyfile(image, copy)
    process.kill()
    process.communicate()
    command("umount", disk)
    command("mount", "-o", "loop", copy, disk)  # replays the journal, as after a cut
    found = sorted(path.name for path in (disk / "run").glob("*"))
    try:
        return goes_on(whole, disk / "run", f"power cut after {after:.1f} s, left {found}")
    finally:
        command("umount", disk)
        shutil.rmtree(work)


def command(*words):
    subprocess.run([str(word) for word in words], check=True)


def rows_of(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same(a, b) -> bool:
    """Whether two trees of tensors and numbers are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(a: Path, b: Path) -> list[str]:
    """What is not the same in two runs."""
    names = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (a, b)]
    wrong = [f"only in one: {name}" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        one, other = a / name, b / name
        if one.is_dir() or name in ("lock", "report.html"):
            continue
        if name.endswith(".jsonl"):
            equal = rows_of(one) == rows_of(other)
        elif name.endswith("state.pt"):
            equal = same(*(torch.load(path, weights_only=True) for path in (one, other)))
        elif name == "config.json":
            one, other = (json.loads(path.read_text()) for path in (one, other))
            equal = one | {"out": ""} == other | {"out": ""}
        else:
            equal = one.read_bytes() == other.read_bytes()
        if not equal:
            wrong.append(f"different: {name}")
    return wrong


def goes_on(whole: Path, run: Path, said: str) -> bool:
    """Finishes the run. Prints what happened to it, and whether it equals the whole one."""
    finish(run)
    wrong = differences(whole, run)
    print(f"{said}: {', '.join(wrong) or 'equal'}", flush=True)
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--full_disks", action="store_true")
    parser.add_argument("--power_cuts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, bad = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        whole, began = Path(folder) / "whole", time.monotonic()
        finish(whole)
        seconds = time.monotonic() - began
        print(f"an unbroken run takes {seconds:.1f} s", flush=True)
        for limit in FULL if options.full_disks else ():
            run = Path(folder) / f"full-{limit}"
            bad += not goes_on(whole, run, fill_the_disk(run, limit))
        for cut in range(options.power_cuts):
            after = rng.uniform(0.3, 1.0) * seconds
            bad += not cut_the_power(whole, Path(folder) / f"cut-{cut}", after)
        points, done = itertools.cycle([None, *POINTS]), 0
        while done < options.kills:
            run, deaths = Path(folder) / f"killed-{done}", []
            for _ in range(min(rng.randint(1, 3), options.kills - done)):
                deaths.append(kill(run, rng, seconds, next(points)))
                done += 1
            bad += not goes_on(whole, run, "; ".join(deaths))
    print(f"{done} kills, {bad} runs that are not equal")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--die"]:
        die_at(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        main()
