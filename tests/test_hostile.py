"""A part of tests/hostile.py, which tries them all, and what it found."""

import copy
import json
from pathlib import Path

import hostile
import pytest
import torch
from hostile import ROW

from config import Config, parse
from model import UserError
from rrr import Rollout
from tasks import task_class
from tasks.function_calling import FunctionCalling
from train import MasterAdamW, failure_pool, open_run, restore

posix = pytest.mark.skipif(not hasattr(hostile.os, "fork"), reason="it forks")


@posix
def test_damaged_files_end_in_a_traceback(tmp_path):
    """Of a model's folder and of data; every 16th of them; runs are below."""
    cases = list(hostile.all_cases(tmp_path, ["model", "data"]))[::16]
    outcomes = {name: hostile.outcome(attempt, tmp_path) for name, attempt in cases}
    assert {said for said in outcomes.values() if said.startswith("fault")} == set()
    refused = sum(said.startswith("refused") for said in outcomes.values())
    assert len(cases) > 50 and refused > 25


def refused(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.fixture
def run(tmp_path):
    config, _ = parse(
        ["--out", str(tmp_path / "r"), "--pool_problems", "6"], "", "train.py"
    )
    path, _ = open_run(config, set())
    return path


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("lr", "x", "--lr"),
        ("lr", -1, "--lr"),
        ("dtype", "x", "--dtype"),
        ("steps", None, ""),
    ]
    + [("batch_size", 10**12, "--batch_size"), ("eval_n", float("inf"), "--eval_n")],
)
def test_a_runs_options_are_believed(run, name, value, word):
    """Prevents: a traceback for a changed config.json, or memory for 10**12 failures."""
    options = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(options | {name: value}))
    assert word in refused(open_run, Config(resume=str(run)), {"resume"})


def test_a_folder_without_options_is_taken_for_a_run(run):
    (run / "config.json").write_text("{}")
    assert "not the folder of a run" in refused(open_run, Config(resume=str(run)), set())


@pytest.mark.parametrize("line", ["{}", "[]", "null", '{"step": "x"}', "[" * 50_000])
@pytest.mark.parametrize("name", ["metrics.jsonl", "episodes.jsonl", "eval.jsonl"])
def test_a_damaged_log_is_a_traceback(run, name, line):
    (run / name).write_text(line + "\n")
    assert name in refused(restore, run, None, None)


class Nothing:
    """A rollout that has attempted all there is."""

    task = task_class("countdown")()
    fitting = staticmethod(lambda problems: [])
    verify = staticmethod(lambda problem, turn: {"ok": False})
    prompt = Rollout.prompt


@pytest.mark.parametrize("line", ["{}", "[]", "null", '{"problem": {}, "attempt": {}}'])
def test_a_damaged_pool_is_a_traceback(run, line):
    (run / "pool.jsonl").write_text(line + "\n")
    parts = run, Nothing(), Config(), None
    assert "pool.jsonl is damaged" in refused(failure_pool, *parts)


def test_a_moment_of_another_shape_ends_the_process():
    """AdamW's fused kernel believes what it is given."""
    optimizer = MasterAdamW([torch.nn.Parameter(torch.ones(2, 3))], Config())
    optimizer.parameters[0].sum().backward()
    optimizer.step(0.1, 1.0)
    state = {"masters": optimizer.masters, "adamw": optimizer.adamw.state_dict()}
    state = copy.deepcopy(state)
    optimizer.restore(copy.deepcopy(state))
    for tensors, key in ((state["adamw"]["state"][0], "exp_avg"), (state["masters"], 0)):
        kept, tensors[key] = tensors[key], torch.zeros(3)
        assert "shapes" in refused(optimizer.restore, state)
        tensors[key] = kept
    state["masters"].append(torch.zeros(1))
    with pytest.raises(ValueError):  # which train.restore explains
        optimizer.restore(state)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"key": 7}, "malformed"),
        ({"messages": []}, "malformed"),
        ({"messages": [{"role": "user"}]}, "malformed"),
        ({"answers": [{"name": "g", "arguments": {}}]}, "malformed"),
        ({"answers": [{"name": "f", "arguments": {"a": []}}]}, "own answers do not pass"),
    ],
)
def test_a_row_that_fails_in_the_middle_of_a_run(tmp_path, change, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | change))
    sentence = refused(FunctionCalling, str(tmp_path / "rows.jsonl"))
    assert "row 2" in sentence and said in sentence


def test_an_accepted_value_without_a_list_has_no_first_choice(tmp_path):
    """Arrow's null, and a plain value in an object that is a default."""
    row = copy.deepcopy(ROW)
    row["answers"][0]["arguments"]["a"] = [{"c": None}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    task = FunctionCalling(str(tmp_path / "rows.jsonl"))
    assert task.verify(row, task.answer(row)).ok


def test_what_the_fuzzer_found_is_judged():
    """tests/fuzz.py steered these inputs by what the verifiers do with them."""
    import fuzz

    found = json.loads(Path(__file__).with_name("fuzzed.json").read_text())
    for name, texts in found.items():
        assert len(texts) > 20
        for text in texts:
            fuzz.CHECKS[name](text)
    for name, seeds in fuzz.SEEDS.items():
        for seed in seeds:
            fuzz.CHECKS[name](seed)
