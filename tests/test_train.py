"""train.py and eval.py as a user meets them, on the embedded model: whole runs, every
refusal."""

import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest
import safetensors.torch
import torch
from conftest import ROOT, close
from filelock import FileLock
from tqdm import tqdm

import eval as evaluation
import rrr
import train
from config import Config, open_model, parse
from model import Chat, UserError
from rrr import Episode, Turn
from tasks import task_class

QUICK = "--steps 3 --batch_size 4 --group_size 4 --pool_problems 24 --eval_n 12".split()
QUICK += "--save_every 2 --lr 1e-3 --sample_rows 16 --reflection_tokens 24".split()
QUICK += "--eval_every 2".split()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(metrics):
    timed = {"seconds", "memory_gb"}
    timed |= {"sampled_tokens_per_second", "training_tokens_per_second"}
    return [{k: v for k, v in row.items() if k not in timed} for row in metrics]


def assert_same_run(a, b):
    """Bit for bit: pool, log, episodes, evaluations, weights."""
    assert without_times(rows(f"{a}/metrics.jsonl")) == without_times(
        rows(f"{b}/metrics.jsonl")
    )
    for name in ("pool.jsonl", "episodes.jsonl", "eval.jsonl"):
        assert Path(a, name).exists() == Path(b, name).exists()
        if Path(a, name).exists():
            assert rows(Path(a, name)) == rows(Path(b, name)), name
    whole, broken = weights(a), weights(b)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def weights(run):
    [step] = Path(run).glob("step-*")
    return safetensors.torch.load_file(step / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run, for those that were broken."""
    run = tmp_path_factory.mktemp("unbroken") / "whole"
    train.main([*QUICK, "--out", str(run)])
    return run


def refusal(capsys, main, argv):
    """The one sentence of a refusal: a non-zero exit, no traceback."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code not in (0, None)
    return stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err


def interrupt_at(monkeypatch, step):
    original = train.sample_step

    def interrupted(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return original(now, *rest)

    monkeypatch.setattr(train, "sample_step", interrupted)


@pytest.mark.parametrize("failures", ["pool", "online"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    failures, whole, monkeypatch, capsys
):
    """Prevents: an optimizer, a schedule, a seed or a data position missing in the
    checkpoint."""
    options = [*QUICK, "--failures", failures]
    if failures == "online":
        whole = "whole"
        train.main([*options, "--out", whole])
        assert "second try" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        said = refusal(capsys, train.main, [*options, "--out", "broken"])
    assert "--resume" in said
    assert [row["step"] for row in rows("broken/metrics.jsonl")] == [1, 2]
    # What a crash after the checkpoint leaves in the logs is cut, a half-written line too.
    with open("broken/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "reward": 9}) + '\n{"step": 4, "rew')
    train.main(["--resume", "broken"])
    assert_same_run(whole, "broken")
    start = safetensors.torch.load_file(ROOT / "tiny" / "model.safetensors")
    assert any(not torch.equal(w, start[name]) for name, w in weights(whole).items())


@pytest.mark.parametrize("where", ["pool", "evaluation", "first steps"])
def test_a_run_is_resumed_before_any_checkpoint(where, whole, monkeypatch, capsys):
    """The user stops it while it collects failures, evaluates, or in its first steps.
    Prevents: a run that must begin anew, and rows in the log of steps that are done once
    more."""
    stops = []

    def at_the_second_call(original):
        def stopping(*arguments, **named):
            stops.append(True)
            if len(stops) == 2 or where == "evaluation":
                raise KeyboardInterrupt
            return original(*arguments, **named)

        return stopping

    owner, name = {
        "pool": (rrr.Rollout, "attempt"),
        "evaluation": (train, "evaluate"),
        "first steps": (train, "update"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_the_second_call(getattr(owner, name)))
        said = refusal(capsys, train.main, [*QUICK, "--save_every", "9", "--out", "b"])
    assert not list(Path("b").glob("step-*"))
    assert "--resume" in said
    for name in ("metrics", "episodes", "eval"):  # half a line, as a full disk leaves it
        with open(f"b/{name}.jsonl", "a") as file:
            file.write('{"step": 0, "first')
    train.main(["--resume", "b"])
    assert_same_run(whole, "b")


@pytest.mark.parametrize(
    "cut", ["in a line", "behind a batch", "in the first line", "rows"]
)
def test_a_pool_that_was_cut_goes_on(cut, capsys):
    """Prevents: half a line that the next attempt is glued to, attempts lost or drawn
    twice."""
    quick = ["--steps", "0", "--pool_problems", "24", "--sample_rows", "6"]
    train.main([*quick, "--out", "r"])
    pool = Path("r/pool.jsonl")
    whole = pool.read_bytes()
    lines = whole.splitlines(keepends=True)
    pieces = {
        "in a line": [*lines[:14], lines[14][:-40]],  # of the third batch
        "behind a batch": [*lines[:12], lines[12][:40]],
        "in the first line": [lines[0][:40]],
        "rows": lines[:15],
    }
    pool.write_bytes(b"".join(pieces[cut]))
    train.main(["--resume", "r"])
    assert pool.read_bytes() == whole


def test_steps_0_builds_the_pool_and_nothing_else(capsys):
    """pool.jsonl holds every attempt; another run takes it and is the run that it would
    have been. Readers judge again. Prevents: verdicts of an older verifier, a pool of
    failures only."""
    train.main([*QUICK, "--steps", "0", "--out", "p"])
    out = capsys.readouterr().out
    files = {path.name for path in Path("p").iterdir()}
    assert files == {"config.json", "pool.jsonl", "lock"}
    attempts, task = rows("p/pool.jsonl"), task_class("countdown")()
    right = [task.verify(e["problem"], e["attempt"]["text"]).ok for e in attempts]
    assert len(attempts) == 24 and 0 < sum(right) < 24
    assert [e["attempt_verdict"]["ok"] for e in attempts] == right
    assert f"{24 - sum(right)} failures in 24 attempts" in out

    train.main([*QUICK, "--steps", "1", "--out", "own"])
    for attempt in attempts:  # as a verifier with a fault would have judged
        attempt["attempt_verdict"] = {"ok": attempt["group"] % 2 == 0, "error": "x"}
    Path("old.jsonl").write_text("".join(json.dumps(e) + "\n" for e in attempts))
    train.main([*QUICK, "--steps", "1", "--pool", "old.jsonl", "--out", "taken"])
    assert rows("taken/pool.jsonl") == attempts
    shutil.copy("own/pool.jsonl", "taken/pool.jsonl")
    assert_same_run("own", "taken")
    failed = {json.dumps(e["problem"]) for e, ok in zip(attempts, right) if not ok}
    assert {json.dumps(e["problem"]) for e in rows("own/episodes.jsonl")} <= failed


def test_a_pool_of_other_prompts_is_refused(monkeypatch, capsys):
    """Prevents: training on another model's mistakes, or on those at other words."""
    train.main(["--steps", "0", "--pool_problems", "12", "--out", "p"])
    Path("rows.jsonl").write_text('{"problem": {}}\n["x"]\n"text"\n')
    Path("text.jsonl").write_text('"text"\n')
    Path("empty.jsonl").write_text("")
    for name in ("rows", "text", "empty", "nowhere"):
        said = refusal(capsys, train.main, ["--pool", f"{name}.jsonl", "--out", "r"])
        assert f"{name}.jsonl" in said and not Path("r").exists()
    pool = ["--pool", "p/pool.jsonl", "--out", "r"]
    other = ["--task", "function_calling", "--difficulty", "easy"]
    said = refusal(capsys, train.main, [*pool, *other])
    assert "p/pool.jsonl" in said and not Path("r").exists()
    task = task_class("countdown")
    messages = task.messages

    def other_words(self, *arguments, **named):
        first, *rest = messages(self, *arguments, **named)
        return [first | {"content": first["content"] + " Hurry."}, *rest]

    monkeypatch.setattr(task, "messages", other_words)
    said = refusal(capsys, train.main, pool)
    assert "another model, task or prompt" in said and not Path("r").exists()


def test_a_step_without_failures_goes_on(monkeypatch):
    """All first tries right, as can happen online with a batch of 1. Prevents: a run that
    ends there, a division by zero in its figures, a step of the optimizer without a
    gradient."""
    monkeypatch.setattr(rrr.Rollout, "verify", lambda *_: {"ok": True, "error": ""})
    options = [*QUICK, "--failures", "online", "--batch_size", "1"]
    train.main([*options, "--out", "r"])
    for row in rows("r/metrics.jsonl"):
        assert row["first_try"] == row["second_try"] == 1
        assert row["groups"] == row["trained_tokens"] == 0 and "loss" not in row
    start = safetensors.torch.load_file(ROOT / "tiny" / "model.safetensors")
    assert all(torch.equal(w, start[name]) for name, w in weights("r").items())
    before, between, after = rows("r/eval.jsonl")
    assert [row["step"] for row in (before, between, after)] == [0, 2, 3]
    assert before["first_try"]["rate"] == 1 and after["retry_success"] is None


def test_data_without_training_problems_is_refused(capsys):
    """Prevents: a traceback where all rows happen to be in the test split, or none is."""
    task = task_class("countdown")("", "3x12")
    for split, words in (("test", "train on"), ("train", "test on")):
        [problem] = task.problems(split, 1, 0)
        row = {"nums": problem["nums"], "target": problem["target"]}
        Path("one.jsonl").write_text(json.dumps(row) + "\n")
        for failures in ("pool", "online"):
            options = ["--data", "one.jsonl", "--failures", failures, "--out"]
            said = refusal(capsys, train.main, [*options, f"{split} {failures}"])
            assert words in said


@pytest.mark.parametrize(
    "options",
    [
        "--kl_beta 0",
        "--updates_per_batch 3 --clip_high 0.28",
        "--retries_per_reflection 2",
        "--train_on reflection+retry",
        "--train_on everything --failures online",
        "--train_on attempt --failures online --sample_rows 24",
        "--loss_norm sequence --scale_advantages false",
        "--loss_norm constant --checkpointing true --micro_batch_tokens 1",
        "--dtype bfloat16 --optimizer_device cpu",
    ],
)
def test_every_choice_of_the_method_runs_and_is_logged(options, whole):
    pool = ["--pool", f"{whole}/pool.jsonl"] if "online" not in options else []
    train.main([*QUICK, *pool, "--steps", "2", "--out", "r", *options.split()])
    able = [row for row in rows("r/metrics.jsonl") if row["groups_with_signal"]]
    assert able, "no step of the two has signal: choose another seed for this test"
    for row in able:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["skipped"] == 0
        limit = 0.3 if "bfloat16" in options else 1e-3
        assert row["gap_max"] < limit, "sampler and trainer must agree on the log-probs"
        episodes = [e for e in rows("r/episodes.jsonl") if e["step"] == row["step"]]
        mean = sum(e["reward"] for e in episodes) / 16
        assert len(episodes) == 16 and abs(row["reward"] - mean) < 1e-6


def test_every_metric_is_defined_on_its_line():
    """In the code: the comment on the line of train.py or rrr.py that fills it."""
    train.main([*QUICK, "--steps", "1", "--failures", "online", "--out", "r"])
    lines = [line for file in (train, rrr) for line in Path(file.__file__).open()]
    missing = []
    for name in rows("r/metrics.jsonl")[0]:
        filled = [line for line in lines if re.match(rf' +(\w+\[)?"{name}"[\]:]', line)]
        if not any(re.search(r"  # \w+", line) for line in filled):
            missing.append(name)
    assert not missing


# ---- options ----


@pytest.mark.parametrize("module, program", [(train, "train.py"), (evaluation, "eval.py")])
def test_help_shows_every_option_as_it_stands_in_the_code(module, program, capsys):
    """With its section, type, default and what it is. Prevents: an option without help."""
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert f"usage: python {program}" in text and "    # the method\n" in text
    for field in fields(Config):
        assert re.search(rf"^    {field.name}: .+ = .+  # \w+", text, re.M), field.name


KINDS = {field.name: field.type for field in fields(Config)}


def test_every_option_has_a_range_or_choices_or_is_free_text():
    bare = {name for name, kind in KINDS.items() if kind in (int, float)}
    assert not bare
    for kind in KINDS.values():
        assert kind in (bool, str) or get_origin(kind) in (Annotated, Literal)


@pytest.mark.parametrize("name", KINDS)
def test_values_of_another_kind_or_range_are_refused_by_name(name):
    """And those at the ends of the range are taken. Prevents: NaN, a rate that is text."""
    kind = KINDS[name]
    if kind is str:
        return
    bad, good = ["", "x"], []
    if kind is int or get_origin(kind) is Annotated:
        kind, low, high = get_args(kind) or (int, -math.inf, math.inf)
        bad += ["nan", "inf", "-inf"] + ["1.5"] * (kind is int)
        for end, outward in ((low, -1), (high, 1)):
            if abs(end) < math.inf:
                bad.append(str(end + outward * (1 if kind is int else 0.01)))
                good.append(str(end))
        good += ["9" * 400] * (kind is int and high == math.inf)  # beyond float's range
    else:
        good += get_args(kind) or ["true", "false", "True"]  # as Python writes it
        bad += ["1", good[0] + "s"]
    for text in bad:
        with pytest.raises(UserError, match=f"--{name} must be .*, found "):
            parse([f"--{name}={text}"], "", "train.py")
    for text in good:
        config, given = parse([f"--{name}", text], "", "train.py")
        assert given == {name}
        if text != "auto":  # which becomes one of the others
            assert str(getattr(config, name)).lower() == text.lower()


@pytest.mark.parametrize(
    "option, nearest",
    [
        ("--clip", "--clip_low"),
        ("--step", "--steps"),
        ("--loss_norms=token", "--loss_norm"),
        ("--group-size", "--group_size"),
        ("--xyz", "--help"),
    ],
)
def test_an_unknown_option_names_the_nearest(option, nearest, capsys):
    """Prevents: an option that is dropped in silence, or taken for one that begins like
    it."""
    for main in (train.main, evaluation.main):
        said = refusal(capsys, main, [option, "3"])
        assert option in said
    assert nearest in refusal(capsys, train.main, [option, "3"])


@pytest.mark.parametrize(
    "options, words",
    [
        ("--learning_rate 1", ["--learning_rate"]),
        ("--step 3", ["--step", "did you mean --steps?"]),
        ("--top_k 20", ["--top_k"]),
        ("--pool_dir x", ["--pool_dir"]),
        ("--lr", ["--lr"]),
        ("--lr fast", ["--lr", "fast"]),
        ("--task chess", ["chess", "countdown"]),
        ("--model qwen2.5-1.5", ["qwen2.5-1.5", "qwen2.5-1.5b"]),
        ("--model ./nowhere", ["nowhere"]),
        ("--data absent.json", ["absent.json"]),
        ("--data bad.jsonl", ["bad.jsonl", "row 2", "target"]),
        ("--difficulty hard", ["hard", "3x12"]),
        ("--failures pools", ["--failures", "pool or online"]),
        ("--train_on retry", ["--train_on", "reflection+retry"]),
        ("--loss_norm mean", ["--loss_norm", "sequence"]),
        ("--group_size 1", ["--group_size"]),
        ("--steps -1", ["--steps", "from 0"]),
        ("--clip_low 1.5", ["--clip_low", "from 0.0 to 1.0"]),
        ("--eval_n 0", ["--eval_n", "from 1"]),
        ("--temperature 0", ["--temperature"]),
        ("--scale_advantages maybe", ["--scale_advantages", "maybe"]),
        ("--train_on everything --retries_per_reflection 2", ["--retries_per_reflection"]),
        ("--device gpu", ["--device", "gpu"]),
        ("--dtype float16", ["--dtype", "float16"]),
        ("--out taken", ["taken", "exists"]),
        ("--out file/run", ["file/run"]),
        ("--reflection_tokens 5000", ["--context", "4096", "caps"]),
        ("--context 9000", ["9000", "4096"]),
        ("--resume taken", ["taken"]),
        ("--resume nowhere", ["nowhere"]),
        ("--failures online --pool x.jsonl", ["--pool", "online"]),
    ],
)
def test_bad_input_is_refused_in_a_sentence_and_nothing_is_left(options, words, capsys):
    Path("bad.jsonl").write_text('{"nums": [1, 2], "target": 3}\n{"nums": [1, 2]}\n')
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("precious")
    Path("file").write_text("")
    few = ["--pool_problems", "4", "--eval_n", "2"]
    said = refusal(capsys, train.main, [*few, *options.split()])
    for word in words:
        assert word in said, said
    assert "Traceback" not in said
    assert Path("taken/mine.txt").read_text() == "precious"
    left = {path.name for path in [*Path(".").iterdir(), *Path(".").glob("runs/*")]}
    assert left <= {"bad.jsonl", "taken", "file", "runs"}, left


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert "--device cpu" in refusal(capsys, train.main, ["--device", "cuda"])


def test_resuming_with_another_option_names_it(capsys):
    train.main([*QUICK, "--steps", "1", "--out", "r"])
    others = {"--model": "smollm2-135m", "--task": "function_calling", "--lr": "0.5"}
    for option, value in others.items():
        said = refusal(capsys, train.main, ["--resume", "r", option, value])
        assert option in said and "the run's own options" in said


def test_a_full_disk_loses_nothing(monkeypatch, capsys):
    train.main([*QUICK, "--steps", "2", "--out", "r"])
    saved = weights("r")
    config = json.loads(Path("r/config.json").read_text())
    Path("r/config.json").write_text(json.dumps(config | {"steps": 4}))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    said = refusal(capsys, train.main, ["--resume", "r"])
    assert "No space left" in said and not list(Path("r").glob("writing-*"))
    assert all(torch.equal(saved[name], w) for name, w in weights("r").items())


@pytest.mark.parametrize("tokens, named", [(1, True), (24, False)])
def test_reflections_that_are_all_cut_are_not_named(capsys, tokens, named):
    """A model that has died goes on for hours, and each line looks like a hard step."""
    train.main([*QUICK, "--steps", "1", "--reflection_tokens", str(tokens), "--out", "r"])
    assert ("reflections are dying out" in capsys.readouterr().out) == named


@pytest.mark.parametrize(
    "words, named", [("a b c d", True), ("a b c d e f", False), ("one text", True)]
)
def test_reflections_that_shrink_or_become_one_text_are_named(words, named, capsys):
    """To a quarter of the first step's. Prevents: 20 steps of decay that nobody is told."""
    texts = ["all the same"] * 16 if words == "one text" else map(str, range(30))
    length = 20 if words == "one text" else len(words.split())
    turns = [Turn(list(range(length)), [], True, [], text) for text in texts]
    verdict = {"ok": False, "error": "", "detail": ""}
    episodes = [
        Episode({}, 0, turn, verdict, turn, [turn], [verdict], 0.0) for turn in turns
    ]
    seconds = {"sample": 1, "train": 1}
    config = Config(steps=9)
    Path("r").mkdir()
    first = {"reflection_tokens": 20, "step": 1}
    Path("r/metrics.jsonl").write_text(json.dumps(first) + "\n")
    metrics = train.measure(3, config, episodes, [], None, seconds)
    train.log(Path("r"), metrics, episodes, config, tqdm(disable=True))
    out = capsys.readouterr().out
    assert ("reflections are dying out" in out) == named
    assert f"reflections {length} tokens" in out and "0.2 min to go" in out


def test_a_bfloat16_run_changes_the_last_bits_of_the_next_one():
    """In the same process its products' precision stayed on, which shows on processors that
    are fast in bfloat16."""
    for dtype, precision in ("bfloat16", "medium"), ("float32", "highest"):
        open_model(Config(device="cpu", dtype=dtype))
        assert torch.get_float32_matmul_precision() == precision


def test_a_damaged_checkpoint_is_refused(capsys):
    train.main([*QUICK, "--steps", "1", "--out", "r"])
    shutil.copytree("r", "s")
    for path, file in (("r", "state.pt"), ("s", "model.safetensors")):
        target = Path(path) / "step-000001" / file
        target.write_bytes(target.read_bytes()[:1000])
        assert "damaged" in refusal(capsys, train.main, ["--resume", path])


def test_updates_that_are_not_finite_are_skipped_and_told(monkeypatch, capsys):
    """Prevents: one bad batch that turns every weight into NaN, in silence."""
    original = rrr.trained_logps
    monkeypatch.setattr(rrr, "trained_logps", lambda *a: original(*a) * float("nan"))
    train.main([*QUICK, "--steps", "1", "--out", "r"])
    assert "no update: lower --lr" in capsys.readouterr().out
    [row] = rows("r/metrics.jsonl")
    assert row["skipped"] == 1 and row["grad_norm"] is None
    start = safetensors.torch.load_file(ROOT / "tiny" / "model.safetensors")
    assert all(torch.equal(w, start[name]) for name, w in weights("r").items())


def test_a_model_that_is_not_finite_is_told(tmp_path, capsys):
    """Prevents: NaN as log-probs in the files, or an index that is out of bounds."""
    shutil.copytree(ROOT / "tiny", "m")
    weights = safetensors.torch.load_file("m/model.safetensors")
    broken = {name: w * float("nan") for name, w in weights.items()}
    safetensors.torch.save_file(broken, "m/model.safetensors", {"format": "pt"})
    for main in (train.main, evaluation.main):
        said = refusal(capsys, main, ["--model", "m", *"--eval_n 4 --out r".split()])
        assert "the model's numbers are not finite" in said and "--lr" in said


def test_metrics_are_strict_json(monkeypatch):
    """Prevents: Infinity or NaN, which most readers of JSON refuse."""
    original = rrr.backward

    def infinite(*rest):
        return original(*rest) | {"kl": math.inf, "loss": math.nan, "gap_max": -math.inf}

    monkeypatch.setattr(rrr, "backward", infinite)
    train.main([*QUICK, "--steps", "1", "--out", "r"])
    text = Path("r/metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert row["kl"] is row["loss"] is row["gap_max"] is None and row["reward"] >= 0


def test_the_live_line_tells_the_truth(monkeypatch):
    """On a terminal. Prevents: an hour without a sign, a stage that is not at work."""
    terminal, stages = io.StringIO(), []
    terminal.isatty = lambda: True
    monkeypatch.setattr(train, "tqdm", partial(tqdm, file=terminal, mininterval=0))

    def noted(name, function):
        def call(*rest, **more):
            line = terminal.getvalue().split("\r")[-1]
            stages.append((name, re.sub(r" *:.*", "", line)))
            return function(*rest, **more)

        return call

    for name in ("build_pool", "evaluate", "sample_step", "update", "append"):
        monkeypatch.setattr(train, name, noted(name, getattr(train, name)))
    train.main([*QUICK, "--failures", "pool", "--out", "r"])
    assert ("build_pool", "failure pool") in stages and ("evaluate", "evaluating") in stages
    assert ("sample_step", "sampling") in stages and ("update", "training") in stages
    assert stages.count(("append", "saving")) == 6  # metrics and episodes of three steps
    last = rows("r/metrics.jsonl")[-1]
    assert f"reward {last['reward']:.2f}, " in terminal.getvalue()
    assert f"{last['sampled_tokens_per_second']:,} tokens/s" in terminal.getvalue()
    assert "2/3" in terminal.getvalue()


def test_a_closed_pipe_ends_quietly_and_the_run_goes_on(whole):
    """`python train.py | head -1`. Prevents: a traceback for it."""
    command = [sys.executable, "-u", str(ROOT / "train.py"), *QUICK, "--out", "r"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith(b"failure pool"):
        pass
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
    train.main(["--resume", "r"])
    assert_same_run(whole, "r")


def test_the_reference_stays_though_its_name_moves(monkeypatch, capsys):
    """Prevents: a resumed half that is held to other weights than the first, since the run
    that --model named has gone on; data that another working directory does not have."""
    shutil.copytree(ROOT / "tiny", "a/step-000001")
    data = [json.dumps({"nums": [i, 2, 3], "target": 5 + i}) for i in range(60)]
    Path("d.jsonl").write_text("\n".join(data))
    options = [*QUICK, "--model", "a", "--data", "d.jsonl", "--out", "b"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0)
        assert "stopped" in refusal(capsys, train.main, options)
    stored = json.loads(Path("b/config.json").read_text())
    assert stored["model"] == str(Path("a/step-000001").absolute())
    assert stored["data"] == str(Path("d.jsonl").absolute())
    Path("a/step-000001").rename("a/step-000002")  # `a` goes on
    said = refusal(capsys, train.main, ["--resume", "b"])
    assert "there is no model" in said and "step-000001" in said


def test_adamw_with_masters_equals_torchs_in_float32_for_100_steps():
    """And with bfloat16 weights at the paper's rate the masters move as float32 weights do.
    Prevents: weights that are rounded back to where they were."""
    torch.manual_seed(0)
    start = (torch.randn(64, 64) * 0.02).bfloat16().float()  # representable in both
    ours32, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours16 = torch.nn.Parameter(start.bfloat16())
    lr = 5e-7
    config = Config(lr=lr)
    a, c = (train.MasterAdamW([p], config) for p in (ours32, ours16))
    b = torch.optim.AdamW([theirs], lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
    plain = start.bfloat16()
    for i in range(100):
        generator = torch.Generator().manual_seed(i // 10)
        gradient = torch.randn(64, 64, generator=generator) * 1e-3
        for p in (ours32, theirs, ours16):
            (p * gradient.to(p.dtype)).sum().backward()
        assert ours32.grad is None and ours16.grad is None, "the masters took them over"
        for optimizer in (a, c):
            optimizer.step(lr, 1e9)
        b.step()
        b.zero_grad()
        plain = (plain - lr * gradient.sign().bfloat16()).bfloat16()
    difference = ((ours32 - theirs) / theirs).abs().max()
    close("AdamW with masters and torch.optim.AdamW, 100 steps", difference, 1e-6)
    moved = (c.masters[0] - start).norm() / (theirs - start).norm()
    assert 0.98 < moved < 1.02
    assert torch.equal(ours16, c.masters[0].bfloat16())
    # Without masters hardly a weight moves.
    assert (plain != start.bfloat16()).float().mean() < 0.1


def test_evaluation_with_controls(capsys):
    evaluation.main(["--eval_n", "40", "--out", "a"])
    out = capsys.readouterr().out
    report = json.loads(Path("a/eval.json").read_text())["report"]
    controls = report["controls"]
    names = {"no reflection", "generic reflection", "another's reflection"}
    names |= {"the right answer", "a fresh attempt"}
    assert set(controls) == names
    first, second = report["first_try"]["rate"], report["second_try"]["rate"]
    assert first <= second
    assert all(control["rate"] >= first for control in controls.values())
    assert sum(report["first_errors"].values()) == round(40 * (1 - first))
    episodes = rows("a/eval_episodes.jsonl")
    solved = [e["attempt_verdict"]["ok"] or e["reward"] == 1 for e in episodes]
    assert sum(solved) == round(40 * second)
    for words in ("first try", "no reflection", "missed target", "truncated: attempt"):
        assert words in out
    evaluation.main(["--eval_n", "40", "--temperature", "0", "--out", "b"])
    short = ["--reflection_tokens", "4"]  # shorter than the generic reflection
    evaluation.main(["--eval_n", "8", *short, "--out", "c"])


@pytest.mark.parametrize("right", ["wrong", "answer"])
def test_what_to_expect_is_said_before_hours_are_spent(right, monkeypatch, capsys):
    """Once, before the first step. Prevents: a run of hours in which no retry succeeds."""
    verify = rrr.Rollout.verify

    def judge(rollout, problem, turn):
        is_retry = "again" in rollout.chat.decode(turn.prompt_ids)
        return {"ok": is_retry and right == "answer", "error": "no answer", "detail": ""}

    monkeypatch.setattr(rrr.Rollout, "verify", judge)
    train.main([*QUICK, "--steps", "1", "--out", "r"])
    assert ("next to no signal" in capsys.readouterr().out) == (right == "wrong")
    monkeypatch.setattr(rrr.Rollout, "verify", verify)


def test_plain_grpo_trains_each_attempt_by_its_own_verdict():
    """Prevents: siblings of several problems in one group where sample_rows cuts a step, a
    reflection that is trained all the same; a pool whose failures would be the problems."""
    options = ["--train_on", "attempt", "--failures", "online", "--sample_rows", "16"]
    train.main([*QUICK, *options, "--steps", "2", "--out", "r"])
    episodes = rows("r/episodes.jsonl")
    for e in episodes:
        assert e["reflection"] is None and e["retries"] == []
        assert e["reward"] == e["attempt_verdict"]["ok"]
    groups = {}
    for e in episodes:
        groups.setdefault((e["step"], e["group"]), []).append(e)
    assert len(groups) == 8 and not Path("r/pool.jsonl").exists()
    for group in groups.values():
        assert len(group) == 4 and len({e["problem"]["key"] for e in group}) == 1
        assert abs(sum(e["advantage"] for e in group)) < 1e-3
    for row in rows("r/metrics.jsonl"):
        able = [g for (step, _), g in groups.items() if step == row["step"]]
        able = [e for g in able if len({e["reward"] for e in g}) > 1 for e in g]
        assert row["trained_tokens"] == sum(len(e["attempt"]["ids"]) for e in able)
        assert row["reflection_tokens"] == 0


def test_plain_grpo_takes_fresh_problems(capsys):
    said = refusal(capsys, train.main, ["--train_on", "attempt", "--out", "r"])
    assert "--failures online" in said and not Path("r").exists()


@pytest.mark.parametrize("option, value", [("eval_n", "many"), ("temperature", [1])])
def test_an_evaluation_checks_what_a_run_stored(option, value, whole, capsys):
    """Prevents: a traceback for a config.json that somebody has written in."""
    shutil.copytree(whole, "r")
    stored = json.loads(Path("r/config.json").read_text())
    Path("r/config.json").write_text(json.dumps(stored | {option: value}))
    said = refusal(capsys, evaluation.main, ["--model", "r"])
    assert f"--{option} must be a" in said


def test_the_instructions_are_part_of_a_run(capsys):
    """Prevents: an evaluation with other words than those that a run was trained with; the
    words of one task for another."""
    train.main([*QUICK, "--steps", "1", "--reflect", "Why?", "--out", "r"])
    stored = json.loads(Path("r/config.json").read_text())
    countdown, calls = task_class("countdown"), task_class("function_calling")
    assert (stored["reflect"], stored["retry"]) == ("Why?", countdown.retry)
    (episode, *_), chat = rows("r/episodes.jsonl"), Chat(ROOT / "tiny")
    assert "Why?" in chat.decode(episode["reflection"]["prompt_ids"])
    config, _ = parse(["--model", "r"], "", "eval.py")
    assert (config.reflect, config.retry) == ("Why?", countdown.retry)
    other = ["--model", "r", "--task", "function_calling", "--difficulty", "mini"]
    config, _ = parse(other, "", "eval.py")
    assert (config.reflect, config.retry) == (calls.reflect, calls.retry)


def test_two_processes_on_one_run_and_an_old_checkpoint(whole, capsys):
    """Prevents: logs that two write to; a checkpoint that a killed run left for ever."""
    train.main([*QUICK, "--steps", "2", "--out", "r"])
    shutil.copytree("r/step-000002", "r/step-000001")
    with FileLock("r/lock"):
        said = refusal(capsys, train.main, ["--resume", "r"])
    assert "another process writes r" in said
    train.main(["--resume", "r"])
    assert [path.name for path in Path("r").glob("step-*")] == ["step-000002"]


def test_sigterm_ends_as_ctrl_c_does(tmp_path):
    """One sentence, a non-zero exit, and the run goes on. Prevents: a traceback, or a run
    that a cluster's end has lost."""
    options = [*QUICK, "--out", str(tmp_path / "r")]
    command = [sys.executable, str(ROOT / "train.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith(b"failure pool"):
            break
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 1
    assert (
        said.decode() == "train.py: stopped. A run that was begun goes on with --resume.\n"
    )
    train.main(["--resume", str(tmp_path / "r")])
    assert len(rows(tmp_path / "r" / "metrics.jsonl")) == 3


@pytest.mark.parametrize("failures", ["pool", "online"])
def test_a_prompt_that_is_too_long_is_left_out(failures, capsys):
    """f01: one long row. Prevents: a run that ends at it after some steps, and for good."""
    rows_of_data = []
    for i in range(60):
        long = "note: " + "word " * 4000 if i % 10 == 0 else ""
        tool = {"name": "f", "parameters": {"x": {"type": "int"}}}
        row = {"query": f"{long}call f with {i}", "tools": json.dumps([tool])}
        row["answers"] = json.dumps([{"name": "f", "arguments": {"x": i}}])
        rows_of_data.append(json.dumps(row))
    Path("d.jsonl").write_text("\n".join(rows_of_data))
    options = "--task function_calling --data d.jsonl --steps 2 --batch_size 4 --eval_n 9"
    options += f" --group_size 2 --failures {failures} --kl_beta 0 --out r"
    options += " --attempt_tokens 8 --reflection_tokens 8 --retry_tokens 8"
    train.main(options.split())
    assert len(rows("r/metrics.jsonl")) == 2
    assert "left out: beyond --context" in capsys.readouterr().out


def test_what_a_template_makes_the_model_think_is_no_answer(tmp_path):
    """f10: the prompt opens <think>, and the turn is cut. Prevents: a thought that counts
    as the answer, in both tasks."""
    folder = Path(shutil.copytree(ROOT / "tiny", tmp_path / "m"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = settings["chat_template"].replace("assistant\n", "assistant\n<think>\n")
    (folder / "chat_template.jinja").write_text(template)
    config, _ = parse(["--model", str(folder)], "", "eval.py")
    model, chat, task = open_model(config)
    assert chat.thinks
    rollout = rrr.Rollout(model, chat, task, config)
    problem = {"nums": [3, 4, 5], "target": 17}
    for text, ok in (
        ("<answer>3*4+5</answer>", False),
        ("</think><answer>3*4+5</answer>", True),
    ):
        turn = rrr.Turn([], [], False, [], text)
        assert rollout.verify(problem, turn)["ok"] == ok


def test_tools_in_words_whatever_the_template_has(tmp_path):
    """--tools words. Prevents: an option that only a template without tools obeys."""
    folder = Path(shutil.copytree(ROOT / "tiny", tmp_path / "m"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    _, _, template = settings["chat_template"].partition("{% endif %}")  # tiny's own tools
    with_tools = "{% for tool in tools or [] %}NATIVE {{ tool | tojson }}{% endfor %}"
    with_tools += "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    with_tools += "{{ c.function | tojson }}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(with_tools + template)
    texts = {}
    for tools in ("auto", "words"):
        options = ["--model", str(folder), "--task", "function_calling", "--tools", tools]
        config, _ = parse(options, "", "eval.py")
        model, chat, task = open_model(config)
        rollout = rrr.Rollout(model, chat, task, config)
        texts[tools] = chat.decode(rollout.prompt(task.problems("test", 1, 0)[0]))
    assert "NATIVE" in texts["auto"] and "You can call these tools" not in texts["auto"]
    assert "NATIVE" not in texts["words"] and "You can call these tools" in texts["words"]


def test_intervals_are_wilsons():
    """Values of R's binom::binom.confint(method = "wilson")."""
    got = evaluation.interval(8, 20)
    assert (round(got["low"], 4), round(got["high"], 4)) == (0.2188, 0.6134)
    nothing = evaluation.interval(0, 10)
    assert nothing["low"] == 0 and round(nothing["high"], 4) == 0.2775
    assert evaluation.interval(0, 0) is None


def test_the_schedule_rises_then_falls():
    config = train.Config(steps=100, lr=1.0, warmup_ratio=0.1)
    rates = [train.learning_rate(step, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[99] < 0.01
    assert all(a <= b for a, b in zip(rates[:9], rates[1:10]))
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_the_readmes_task_is_a_whole_one(monkeypatch):
    """The example of README.md, as it stands there, trains and evaluates."""
    import types

    import tasks

    readme = (ROOT / "README.md").read_text()
    [source] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    module = types.ModuleType("reverse")
    exec(source, module.__dict__)  # our own text
    monkeypatch.setitem(sys.modules, "reverse", module)
    monkeypatch.setitem(tasks.TASKS, "reverse", "reverse:Reverse")
    task = tasks.task_class("reverse")()
    [problem] = [p for p in task.problems("train", 99, 0) if p["word"] == "planet"]
    assert task.verify(problem, "Let me see.\ntenalp").ok
    assert task.verify(problem, "planet").error == "wrong letters"
    assert task.verify(problem, " \n ").error == "no answer"
    train.main([*QUICK, "--steps", "1", "--task", "reverse", "--out", "r"])
    assert rows("r/eval.jsonl")[1]["first_try"]["n"] >= 1


def test_an_evaluation_of_tiny_leaves_its_folder_alone(monkeypatch):
    """From the repository's root `tiny` is a folder, too. Prevents: results among the
    weights."""
    before = set(os.listdir(ROOT / "tiny"))
    Path("tiny").symlink_to(ROOT / "tiny")
    evaluation.main(["--eval_n", "4"])
    assert Path("eval-tiny/eval.json").exists() and set(os.listdir(ROOT / "tiny")) == before


def test_a_run_goes_on_where_extras_are_absent():
    """Prevents: a road that cannot do without what stands beside it."""
    ignore = shutil.ignore_patterns(".*", "*cache*", "extras", "tests", "results", "runs")
    shutil.copytree(ROOT, "copy", ignore=ignore)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    train_it = ["train.py", *QUICK, "--steps", "3", "--out", "run"]
    for command in (train_it, ["eval.py", "--model", "run", "--eval_n", "12"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd="copy",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "second try" in done.stdout
    assert [row["step"] for row in rows("copy/run/metrics.jsonl")] == [1, 2, 3]
    assert Path("copy/run/eval.json").exists()
