"""A long run: does it hold more and more?

    python tests/long.py [--steps 1000]        Linux; minutes

Trains tiny at a small size in a process of its own and looks, ten times a second, at the
memory that it holds, its open files and its threads. Printed is the highest of each by
quarters of the steps; the last quarter may hold 2% more than the second.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = "--batch_size 2 --group_size 4 --pool_problems 200 --eval_n 8 --sample_rows 16"
OPTIONS += " --reflection_tokens 32 --save_every 100 --eval_every 100 --lr 1e-5"


def look(pid: int) -> dict[str, float]:
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in open(process / "status"))
    return {
        "MB": int(status["VmRSS"].split()[0]) / 1000,
        "open files": len(list((process / "fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    quarters = [{} for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), *OPTIONS.split()]
        command += ["--steps", str(steps), "--out", str(run)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                time.sleep(0.1)
                if (run / "metrics.jsonl").exists():
                    done = (run / "metrics.jsonl").read_bytes().count(b"\n")
                    try:
                        seen = look(process.pid)
                    except (OSError, KeyError):  # it has just ended
                        break
                    highest = quarters[min(3, 4 * done // steps)]
                    for name, value in seen.items():
                        highest[name] = max(highest.get(name, 0), value)
    for i, highest in enumerate(quarters, 1):
        print(f"quarter {i}: {highest}")
    growth = quarters[3]["MB"] / quarters[1]["MB"] - 1
    print(f"the last quarter's peak is {100 * growth:+.1f}% of the second's")
    sys.exit(process.returncode or growth > 0.02)


if __name__ == "__main__":
    main()
