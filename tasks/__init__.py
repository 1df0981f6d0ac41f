"""Tasks: problems that a program can check. A task is small (see `Task`); this file holds what they share.

A new task is one file with a subclass of `Task` and one line in TASKS.
"""

import hashlib
import importlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from model import UserError, hub_download

TASKS = {
    "countdown": "tasks.countdown:Countdown",
    "function_calling": "tasks.function_calling:FunctionCalling",
}


@dataclass(frozen=True)
class Verdict:
    """What a verifier says: `ok`; else `error`, one of the task's categories, and `detail` for people."""

    ok: bool
    error: str = ""
    detail: str = ""


class Task:
    """What rrr.py, train.py and eval.py ask of a task. A problem is a plain dict (JSON) with a "key",
    which is equal for problems that are the same, so that none crosses from train to test."""

    name: str
    errors: tuple[str, ...]  # the verifier's categories
    reflect: str  # what the user says after a failure
    retry: str  # what the user says after the reflection
    generic_reflection: str  # eval.py's control: one reflection for every problem

    def __init__(self, data: str | None = None, difficulty: str | None = None):
        """`data`: FILE or owner/name:path on the hub; without it the task makes its own problems."""
        raise NotImplementedError

    def problems(self, split: str, n: int, seed: int) -> list[dict]:
        """At most n distinct problems of "train" or "test"; the same for the same seed."""
        raise NotImplementedError

    def messages(self, problem: dict, native_tools: bool = False) -> list[dict]:
        """Chat messages ({"role", "content"}). native_tools: the chat template itself shows tools(problem)."""
        raise NotImplementedError

    def tools(self, problem: dict) -> list[dict] | None:
        """The tools on offer as JSON schemas ({"type": "function", "function": {...}}), if the task has any."""
        return None

    def verify(self, problem: dict, text: str) -> Verdict:
        """Judge an answer. Pure: no printing, no randomness, no eval; `text` is untrusted."""
        raise NotImplementedError


def get_task(name: str, data: str | None = None, difficulty: str | None = None) -> Task:
    if name not in TASKS:
        raise UserError(f"there is no task '{name}'; the tasks are: {', '.join(TASKS)}.")
    module, cls = TASKS[name].split(":")
    return getattr(importlib.import_module(module), cls)(data, difficulty)


def in_test(key: str) -> bool:
    """One problem in five is a test problem, by a hash of its key: no list to keep, no seed to agree on."""
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def pick(problems: list[dict], split: str, n: int, seed: int) -> list[dict]:
    """n problems of one split, drawn without repetition; fewer if there are not so many."""
    some = [p for p in problems if in_test(p["key"]) == (split == "test")]
    random.Random(seed).shuffle(some)
    return some[:n]


def load_rows(data: str) -> list[tuple[str, dict]]:
    """Rows of a .json (a list of objects), .jsonl (or JSON Lines under any name) or .parquet file, local or
    `owner/name:path` of a hub dataset, each with its place ("FILE, line 3") for error messages.
    Raises UserError, naming file and line, for whatever cannot be read."""
    path = Path(data)
    if not path.exists() and ":" in data and "/" in data.split(":")[0]:
        repo, inner = data.split(":", 1)
        path = hub_download(repo, [inner], repo_type="dataset") / inner
    if not path.is_file():
        raise UserError(f"the data file {data} does not exist (a hub dataset's file is named owner/name:path).")
    if path.suffix == ".parquet":
        return list(_parquet_rows(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the data file {path} cannot be read as UTF-8 text: {error}.") from None
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{path}, row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}.") from None
    else:
        rows = []
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((f"{path}, line {i}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {i} is not JSON: {error}.") from None
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place} must be a JSON object, found {type(row).__name__}.")
    if not rows:
        raise UserError(f"the data file {path} is empty.")
    return rows


def _parquet_rows(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} is a parquet file, which needs pyarrow: pip install pyarrow, or convert it to JSON Lines with "
            "pandas: pd.read_parquet(FILE).to_json('data.jsonl', orient='records', lines=True)."
        ) from None
    try:
        for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
            yield f"{path}, row {i}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as parquet: {error}.") from None
