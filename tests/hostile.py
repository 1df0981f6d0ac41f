"""Damaged and hostile files: each must be read or refused in one sentence.

    python tests/hostile.py [model|data|run]        all of them, or one kind

Each file is tried in a process of its own, which may take 8 GB and 25 seconds (POSIX only).
What comes out is a count of: read, refused, and faults (a traceback, a death, more than a
line). tests/test_hostile.py tries every 16th.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from model import UserError, load  # noqa: E402
from tasks import task_class  # noqa: E402

GARBAGE = [b"", b"\0" * 100, b"[]", b"null", b"7", b"{", b'"x"', b"\xff\xfe", b"{}"]
GARBAGE += [b"[" * 50_000, b'{"a":' * 5000]
VALUES = [None, -1, 0, 7, 1.5, 1e308, 10**12, 10**18, True, "", "x", [], [None], [[]], {}]
VALUES += [{"a": None}, {"": ""}]
DELETE = object()

# ---- changes: what is done to a folder ----


def write(name: str, content: bytes, folder: Path):
    path = folder / name
    if path.is_dir():
        path.rmdir()
    path.write_bytes(content)


def make_folder(name: str, folder: Path):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


def remove(name: str, folder: Path):
    (folder / name).unlink(missing_ok=True)


def put(name: str, where: tuple, value, folder: Path):
    """Changes one place in a file of JSON, or in the first line of one of JSON lines."""
    first, *rest = (folder / name).read_text().split("\n" if "jsonl" in name else "\0")
    changed = replaced(json.loads(first), where, value)
    (folder / name).write_text("\n".join([json.dumps(changed), *rest]))


def replaced(tree, where: tuple, value):
    """A copy of a tree of JSON with another value at one place."""
    if not where:
        return {} if value is DELETE else value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in where[:-1]:
        inner = inner[key]
    if value is DELETE:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return tree


def places(tree, where=()):
    """Each place in a tree of JSON."""
    yield where
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*where, key))


def tensors_file(header) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"0" * 64


# ---- models ----

TEXTS = "config.json tokenizer.json tokenizer_config.json chat_template.jinja"
TEXTS += " special_tokens_map.json generation_config.json model.safetensors.index.json"
LLAMA3 = {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 1}
SETTINGS = {
    "rope_scaling": [{"type": "llama3"}, LLAMA3, {"rope_type": "longrope"}, {"type": []}],
    "eos_token_id": [[None], 10**9],
    "source": [1],
    "from_dict": [1],
}
HEADERS = [struct.pack("<Q", 2**63), struct.pack("<Q", 4 << 30) + b"{}"]
for dtype, shape, end in [
    ("F32", [10**9], 4 * 10**9),
    ("F32", [-1], 4),
    ("F32", [2**40, 2**40], 4),
    ("F8_E4M3", [4], 4),
    ("I64", [4], 32),
]:
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    HEADERS.append(tensors_file({"model.norm.weight": tensor}))
TEMPLATES = [
    "{{ 1 / 0 }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ 'x' * 10 ** 11 }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{{ a.b.c }}",
    "{{ raise_exception('x\\ny') }}",
    "{% for m in messages %}{% endfor %}",
]
INDEXES = [{"a": "../../x"}, {"a": "/etc/passwd"}, [], {"a": 7}, {"a": None}, {}, "x"]


def model_changes():
    config = json.loads((ROOT / "tiny" / "config.json").read_text())
    for key in config.keys() | SETTINGS.keys():
        for value in VALUES[::2] + SETTINGS.get(key, []):
            yield f"{key} = {value!r}", partial(put, "config.json", (key,), value)
    for name in [*TEXTS.split(), "model.safetensors"]:
        for content in GARBAGE:
            yield f"{name} is {content[:9]!r}", partial(write, name, content)
        yield f"{name} is a folder", partial(make_folder, name)
        yield f"{name} is gone", partial(remove, name)
    for i, content in enumerate(HEADERS):
        yield f"header {i}", partial(write, "model.safetensors", content)
    for text in TEMPLATES:
        yield f"template {text}", partial(write, "chat_template.jinja", text.encode())
    for files in INDEXES:
        text = json.dumps({"weight_map": files}).encode()
        yield f"index {files}", partial(write, "model.safetensors.index.json", text)


def try_model(change, work: Path):
    shutil.copytree(ROOT / "tiny", work / "model")
    change(work / "model")
    load(str(work / "model"))


# ---- data ----

PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "", "parameters": PARAMETERS}
ROW = {
    "key": "k",
    "messages": [{"role": "user", "content": "x"}],
    "tools": [{"type": "function", "function": FUNCTION}],
    "answers": [{"name": "f", "arguments": {"a": ["b", {"c": ["d"]}]}}],
}
XLAM = {
    "query": "q",
    "tools": '[{"name": "f", "description": "", "parameters": {"a": {"type": "str"}}}]',
    "answers": '[{"name": "f", "arguments": {"a": "b"}}]',
}
TEXT_ROWS = ["7", "[7]", "[null]", "[{}]", '[{"name": 7}]', '[{"name": "f"}]', "[" * 9999]
TEXT_ROWS += [
    '[{"name": "f", "parameters": {"a": 7}}]',
    '[{"name": "f", "arguments": "{"}]',
]
NUMBERS = {"nums": [3, 4], "target": 7}
LINES = [
    '{"nums": [NaN, 1], "target": NaN}',
    '{"nums": [' + "9" * 5000 + ', 1], "target": 10}',
    '{"nums": [1.0, 2], "target": 3}',
    '{"nums": [' + "1, " * 3000 + '1], "target": 3}',
    '{"nums": [1, 2], "target": 3, "key": "\\ud800"}',
    '{"key": 7, "split": "x", "nums": [1, 2], "target": 3}',
]


def data_changes():
    for task, row in ("countdown", NUMBERS), ("function_calling", ROW):
        for content in GARBAGE + [line.encode() for line in LINES]:
            yield f"{task}: {content[:40]!r}", (task, ".jsonl", content)
        yield f"{task}: no parquet", (task, ".parquet", b"PAR1" + bytes(50))
        for where in places(row):
            for value in [*VALUES, DELETE]:
                rows = [replaced(row, where, value), row | {"key": "another"}]
                text = "\n".join(map(json.dumps, rows)).encode()
                yield f"{task}: {where} = {value!r}", (task, ".jsonl", text)
    for key in XLAM:
        for value in VALUES + TEXT_ROWS:
            rows = [XLAM | {key: value}, XLAM | {"query": "another"}]
            text = "\n".join(map(json.dumps, rows)).encode()
            yield f"xlam: {key} = {value!r:.40}", ("function_calling", ".jsonl", text)


def try_data(change, work: Path):
    name, suffix, content = change
    path = work / f"data{suffix}"
    path.write_bytes(content)
    task = task_class(name)(str(path))
    for problem in task.problems("train", 9, 0) + task.problems("test", 9, 0):
        task.messages(problem)
        if len(problem.get("nums", "")) < 6:  # the search is for short ones
            task.verify(problem, task.answer(problem) or "")


# ---- runs ----

OPTIONS = "--steps 2 --batch_size 2 --group_size 4 --pool_problems 8 --eval_n 2 --lr 1e-3"
OPTIONS += " --save_every 1 --sample_rows 8 --attempt_tokens 24 --reflection_tokens 24"
OPTIONS += " --retry_tokens 24"
LOGS = "metrics.jsonl episodes.jsonl eval.jsonl pool.jsonl config.json lock".split()
STATES = {
    "a moment": lambda state: moments_of(state).update(exp_avg=torch.zeros(3)),
    "a moment's kind": lambda state: moments_of(state).update(exp_avg=torch.ones(1).bool()),
    "a master": lambda state: state["masters"].__setitem__(0, torch.zeros(1)),
    "one master too few": lambda state: state["masters"].pop(),
    "no masters": lambda state: state.pop("masters"),
    "no adamw": lambda state: state.pop("adamw"),
    "no groups": lambda state: state["adamw"].pop("param_groups"),
    "betas": lambda state: state["adamw"]["param_groups"][0].update(betas=None),
}


def moments_of(state) -> dict:
    return state["adamw"]["state"].setdefault(0, {})


class Malice:
    def __reduce__(self):
        return os.system, ("exit 1",)


def spoil_state(change, run: Path):
    path = run / "step-000002" / "state.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def run_changes(run: Path):
    state = "step-000002/state.pt"
    for name in [*LOGS, state, "step-000002/config.json", "step-000002/model.safetensors"]:
        for content in GARBAGE:
            yield f"{name} is {content[:9]!r}", partial(write, name, content + b"\n")
        yield f"{name} is gone", partial(remove, name)
        yield f"{name} is a folder", partial(make_folder, name)
    for key in json.loads((run / "config.json").read_text()):
        if key not in ("pool_problems", "pool_attempts", "batch_size", "steps", "eval_n"):
            for value in [*VALUES[::3], float("inf")]:  # those are only large
                yield f"{key} = {value!r}", partial(put, "config.json", (key,), value)
    for name, change in STATES.items():
        yield f"state: {name}", partial(spoil_state, change)
    yield "state: a pickle", partial(write, state, pickle.dumps(Malice()))
    row = json.loads((run / "pool.jsonl").read_text().split("\n")[0])
    for where in places(row):
        if len(where) <= 2:
            for value in [*VALUES[::4], DELETE]:
                yield (
                    f"pool: {where} = {value!r}",
                    partial(put, "pool.jsonl", where, value),
                )


def try_run(change, work: Path):
    run = work / "run"
    shutil.copytree(work.parent / "whole", run)
    lines = (run / "eval.jsonl").read_text().split("\n")
    (run / "eval.jsonl").write_text(lines[0] + "\n")  # the last evaluation is to come
    change(run)
    train.main(["--resume", str(run)])


# ---- trying them ----


def all_cases(folder: Path, kinds: list[str]):
    """(name, a function that tries it in a folder). `folder` gets a whole run."""
    if "model" in kinds:
        for name, change in model_changes():
            yield f"model {name}", partial(try_model, change)
    if "data" in kinds:
        for name, change in data_changes():
            yield f"data {name}", partial(try_data, change)
    if "run" in kinds:
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([*OPTIONS.split(), "--out", str(folder / "whole")])
        for name, change in run_changes(folder / "whole"):
            yield f"run {name}", partial(try_run, change)


def outcome(attempt, folder: Path) -> str:
    """Of one case, in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, said_by(attempt, folder).encode("utf-8", "replace")[:2000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    return said or f"fault: died, status {status}"


def said_by(attempt, folder: Path) -> str:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    signal.alarm(25)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        attempt(work)
        return "read"
    except (UserError, SystemExit) as error:
        return f"fault: {error}" if "\n" in str(error) else f"refused: {error}"
    except BaseException:
        return f"fault: {traceback.format_exc()[-900:]}"
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main():
    torch.set_num_threads(1)  # or a forked process waits for threads that are not there
    kinds, counts = sys.argv[1:] or ["model", "data", "run"], Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, attempt in all_cases(Path(folder), kinds):
            said = outcome(attempt, Path(folder))
            kind = said.partition(":")[0]
            counts[name.split()[0], kind] += 1
            if kind == "fault":
                print(f"{name}\n{said}\n", flush=True)
    for (what, kind), count in sorted(counts.items()):
        print(f"{what:6} {kind:8} {count}")
    sys.exit(any(kind == "fault" for _, kind in counts))


if __name__ == "__main__":
    main()
