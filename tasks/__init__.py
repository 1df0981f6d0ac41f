"""Tasks: problems that a program can check. This file holds what they share.

A new task is one file with a subclass of `Task` and one line in TASKS.
"""

import hashlib
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

from model import UserError, check, hub_download

TASKS = {
    "countdown": "tasks.countdown:Countdown",
    "function_calling": "tasks.function_calling:FunctionCalling",
}


@dataclass(frozen=True)
class Verdict:
    """`ok`, or else `error`, one of the task's categories, and `detail`, which is for people."""

    ok: bool
    error: str = ""
    detail: str = ""


class Task:
    """What rrr.py, train.py and eval.py ask of a task. A problem is a plain dict (JSON) with a
    "key", equal for problems that are the same, so that none crosses from train to test."""

    name: str
    errors: tuple[str, ...]  # the verifier's categories
    reflect: str  # what the user says after a failure
    retry: str  # what the user says after the reflection
    generic_reflection: str  # eval.py's control: one reflection for every problem

    def __init__(self, data: str | None = None, difficulty: str | None = None):
        """`data`: what load_rows reads; without it the task makes its own problems."""

    def problems(self, split: str, n: int, seed: int) -> list[dict]:
        """At most n distinct problems of "train" or "test"; the same for the same seed."""

    def messages(self, problem: dict, native_tools: bool = False) -> list[dict]:
        """Chat messages. native_tools: the model's chat template itself shows tools(problem)."""

    def tools(self, problem: dict) -> list[dict] | None:
        """The tools on offer, if the task has any: {"type": "function", "function": SCHEMA}."""
        return None

    def verify(self, problem: dict, text: str) -> Verdict:
        """Judge an answer. Pure: no printing, no randomness, no eval; `text` is untrusted."""


def get_task(name: str, data: str | None = None, difficulty: str | None = None) -> Task:
    check(name in TASKS, f"there is no task '{name}'; the tasks are: {', '.join(TASKS)}.")
    module, cls = TASKS[name].split(":")
    return getattr(importlib.import_module(module), cls)(data, difficulty)


def in_test(key: str) -> bool:
    """One problem in five is for testing, by a hash: no list to keep, no seed to agree on."""
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def pick(problems: list[dict], split: str, n: int, seed: int) -> list[dict]:
    """n problems of one split, drawn without repetition; fewer if there are not so many."""
    some = [p for p in problems if in_test(p["key"]) == (split == "test")]
    random.Random(seed).shuffle(some)
    return some[:n]


def load_rows(data: str) -> list[tuple[str, dict]]:
    """Rows of a JSON (a list of objects), JSON Lines or .parquet file, local or a hub dataset's
    (`owner/name:path`), each with its place ("FILE, line 3"), which begins complaints about it."""
    path = Path(data)
    if not path.exists() and ":" in data and "/" in data.split(":")[0]:
        repo, inner = data.split(":", 1)
        path = hub_download(repo, [inner], repo_type="dataset") / inner
    hint = "(a hub dataset's file is named owner/name:path)"
    check(path.is_file(), f"the data file {data} does not exist {hint}.")
    kind = "parquet" if path.suffix == ".parquet" else "UTF-8 JSON"
    place, rows = str(path), []
    try:
        if kind == "parquet":
            rows = [(f"{path}, row {i}", row) for i, row in enumerate(_read_parquet(path), 1)]
        elif (text := path.read_text(encoding="utf-8")).lstrip().startswith("["):
            rows = [(f"{path}, row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        else:
            for i, line in enumerate(text.split("\n"), 1):
                place = f"{path}, line {i}"
                if line.strip():
                    rows.append((place, json.loads(line)))
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's are of these kinds, too
        raise UserError(f"{place} cannot be read as {kind}: {error}.") from None
    check(rows, f"the data file {path} is empty.")
    for place, row in rows:
        check(isinstance(row, dict), f"{place} must be an object, found {type(row).__name__}.")
    return rows


def _read_parquet(path):
    convert = "pd.read_parquet(FILE).to_json('data.jsonl', orient='records', lines=True)"
    hint = f"pip install pyarrow, or make it JSON Lines with pandas: {convert}"
    check(importlib.util.find_spec("pyarrow"), f"{path} needs pyarrow: {hint}.")
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()
