"""Tasks: problems that a program can check. A new one is a file and a line in TASKS."""

import hashlib
import importlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from model import check, explain, hub_download

TASKS = {
    "countdown": "tasks.countdown:Countdown",
    "function_calling": "tasks.function_calling:FunctionCalling",
}


@dataclass(frozen=True)
class Verdict:
    """`ok`, or else `error`, one of the task's categories, and `detail`, for people."""

    ok: bool
    error: str = ""
    detail: str = ""


class Task:
    """What training and evaluation ask of a task, beside its `name` and `errors` (the
    verifier's categories), and what the user says: `reflect` after a failure, `retry` after
    the reflection. `generic_reflection` is eval.py's control: one for every problem. A
    problem is a plain dict (JSON). Its "key" is the same for problems that are the same."""

    def problems(self, split: str, n: int, seed: int) -> list[dict]:
        """At most n problems of "train" or "test", one of each key; the same for the same
        seed. A problem may name its split."""
        chosen = {}
        for row in self.rows:
            by_hash = "test" if in_test(row["key"]) else "train"
            if (row.get("split") or by_hash) == split:
                chosen.setdefault(row["key"], row)
        chosen = list(chosen.values())
        random.Random(seed).shuffle(chosen)
        return chosen[:n]

    def messages(self, problem: dict, native_tools: bool = False) -> list[dict]:
        """Chat messages. native_tools: the chat template itself shows tools(problem)."""

    def tools(self, problem: dict) -> list[dict] | None:
        """[{"type": "function", "function": SCHEMA}], if the task has tools."""
        return problem.get("tools")

    def answer(self, problem) -> str | None:
        """A text that verify accepts, for eval.py's ceiling; None where none is known."""

    def verify(self, problem: dict, text: str) -> Verdict:
        """Judge an answer. `text` is untrusted: whatever it holds, this raises nothing."""


def task_class(name: str) -> type[Task]:
    """To be called with data and difficulty. UserError if there is no such task."""
    check(name in TASKS, f"there is no task '{name}'; the tasks are: {', '.join(TASKS)}.")
    module, task = TASKS[name].split(":")
    return getattr(importlib.import_module(module), task)


def in_test(key: str) -> bool:
    """One problem in five is for testing, by a hash: no list of them, no seed."""
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def without_thinking(text: str) -> str:
    """What a model says after its thoughts, which the prompt may have opened."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def without_surrogates(rows):
    """Half an emoji, which JSON may hold, cannot be encoded: it becomes a question mark."""
    return json.loads(json.dumps(rows, ensure_ascii=False).encode("utf-8", "replace"))


def load_rows(data: str) -> list[dict]:
    """The rows of a JSON, JSON Lines or .parquet file, or of one in a hub dataset."""
    path = Path(data)
    repo, _, inner = data.partition(":")
    if not path.exists() and "/" in repo and inner:
        path = hub_download(repo, [inner], repo_type="dataset") / inner
    check(path.is_file(), f"{data} does not exist or is no file (a hub's: NAME:PATH).")
    with explain(f"{data} cannot be read as UTF-8 JSON or parquet", Exception):
        if path.suffix == ".parquet":
            import pyarrow.parquet  # not in requirements.txt: few have such files

            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8-sig")
            if not text.lstrip().startswith("["):  # a row on each line, as errors name it
                lines = text.split("\n")  # not splitlines(): a string may hold U+2028
                text = "[" + ",\n".join(filter(str.strip, lines)) + "]"
            rows = without_surrogates(json.loads(text))
    check(rows, f"the file {data} is empty.")
    for number, row in enumerate(rows, 1):
        check(isinstance(row, dict), f"{data}, row {number} is no object: {row!r:.40}.")
    return rows
