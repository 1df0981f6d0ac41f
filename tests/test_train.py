"""train.py and eval.py as a user meets them, on the embedded model: whole runs, every refusal."""

import errno
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import eval as evaluation
import train
from conftest import ROOT, close
from rrr import Episode

QUICK = "--steps 4 --batch_size 4 --group_size 4 --pool_problems 24 --eval_n 12".split()
QUICK += ["--save_every", "2", "--lr", "1e-3"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(metrics):
    timed = ("seconds", "memory_gb", "sampled_tokens_per_second", "training_tokens_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in metrics]


def weights(run):
    [step] = Path(run).glob("step-*")
    return safetensors.torch.load_file(step / "model.safetensors")


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
            os.kill(os.getpid(), signal.SIGINT)
        return original(now, *rest)

    monkeypatch.setattr(train, "sample_step", interrupted)


@pytest.mark.parametrize("failures", ["pool", "online"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(failures, monkeypatch, capsys):
    """Prevents: an optimizer, a schedule, a seed or a data position missing in the checkpoint."""
    options = [*QUICK, "--failures", failures]
    train.main([*options, "--out", "whole"])
    assert "second try" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        said = refusal(capsys, train.main, [*options, "--out", "broken"])
    assert "--resume broken" in said
    assert [row["step"] for row in rows("broken/metrics.jsonl")] == [1, 2]
    # What a crash after the checkpoint leaves in the logs is cut, a half-written line too.
    with open("broken/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "reward": 9}) + '\n{"step": 4, "rew')
    train.main(["--resume", "broken"])
    assert without_times(rows("whole/metrics.jsonl")) == without_times(rows("broken/metrics.jsonl"))
    assert rows("whole/episodes.jsonl") == rows("broken/episodes.jsonl")
    assert rows("whole/eval.jsonl") == rows("broken/eval.jsonl")
    whole, broken = weights("whole"), weights("broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    start = safetensors.torch.load_file(ROOT / "tiny" / "model.safetensors")
    assert any(not torch.equal(whole[name], start[name]) for name in whole), "nothing was trained"


def test_the_pool_is_reused_and_goes_on_where_it_was_cut(monkeypatch, capsys):
    train.main([*QUICK, "--steps", "1", "--sample_rows", "6", "--out", "a"])
    [pool] = Path("runs/pools").glob("*.jsonl")
    whole = pool.read_text()
    assert "24 attempts" in capsys.readouterr().out
    pool.write_text(
        "".join(whole.splitlines(keepends=True)[:15])[:-40]
    )  # cut within a line of the third batch
    train.main([*QUICK, "--steps", "1", "--sample_rows", "6", "--out", "b"])
    assert pool.read_text() == whole
    assert rows("a/pool.jsonl") == rows("b/pool.jsonl")
    assert all(
        not Episode.from_json(line).attempt_verdict["ok"]
        for line in Path("a/pool.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize(
    "options",
    [
        "--kl_beta 0",
        "--updates_per_batch 3 --clip_high 0.28",
        "--retries_per_reflection 2",
        "--train_on reflection+retry",
        "--train_on everything --failures online",
        "--loss_norm sequence --scale_advantages false",
        "--loss_norm constant --checkpointing true --micro_batch_tokens 1",
        "--dtype bfloat16 --optimizer_device cpu --weight_decay 0.1",
    ],
)
def test_every_choice_of_the_method_runs_and_is_logged(options):
    train.main([*QUICK, *options.split(), "--steps", "2", "--out", "r"])
    for row in rows("r/metrics.jsonl"):
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["skipped"] == 0
        limit = 0.3 if "bfloat16" in options else 1e-3
        assert row["gap_max"] < limit, "sampler and trainer must agree on the log-probs"
        assert (
            abs(
                row["reward"]
                - sum(e["reward"] for e in rows("r/episodes.jsonl") if e["step"] == row["step"])
                / 16
            )
            < 1e-6
        )


def test_every_metric_is_defined_in_the_readme():
    train.main([*QUICK, "--steps", "1", "--failures", "online", "--out", "r"])
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in rows("r/metrics.jsonl")[0] if f"`{name}`" not in readme]
    assert not missing


def test_every_option_has_a_help_line(capsys):
    for module in (train, evaluation):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        text = capsys.readouterr().out
        for name in module.Config.__dataclass_fields__:
            assert re.search(rf"--{name}\b[^\n]*\s+\S", text), name
            assert name in text


@pytest.mark.parametrize(
    "options, words",
    [
        ("--learning_rate 1", ["--learning_rate"]),
        ("--step 3", ["--step"]),
        ("--lr fast", ["--lr", "fast"]),
        ("--task chess", ["chess", "countdown"]),
        ("--model qwen2.5-1.5", ["qwen2.5-1.5", "qwen2.5-1.5b"]),
        ("--model ./nowhere", ["nowhere"]),
        ("--data absent.json", ["absent.json"]),
        ("--data bad.jsonl", ["bad.jsonl", "line 2", "target"]),
        ("--difficulty hard", ["hard", "3x12"]),
        ("--failures pools", ["--failures", "pool or online"]),
        ("--train_on retry", ["--train_on", "reflection+retry"]),
        ("--loss_norm mean", ["--loss_norm", "sequence"]),
        ("--group_size 1", ["--group_size"]),
        ("--steps 0", ["--steps"]),
        ("--temperature 0", ["--temperature"]),
        ("--scale_advantages maybe", ["--scale_advantages", "maybe"]),
        ("--train_on everything --retries_per_reflection 2", ["--retries_per_reflection"]),
        ("--device gpu", ["--device", "gpu"]),
        ("--dtype float16", ["--dtype", "float16"]),
        ("--out taken", ["taken", "exists"]),
        ("--out file/run", ["file/run"]),
        ("--reflection_tokens 5000", ["context", "--reflection_tokens"]),
        ("--context 9000", ["9000", "4096"]),
        ("--resume taken", ["taken"]),
        ("--resume nowhere", ["nowhere"]),
    ],
)
def test_bad_input_is_refused_in_a_sentence_and_nothing_is_left(options, words, capsys):
    Path("bad.jsonl").write_text('{"nums": [1, 2], "target": 3}\n{"nums": [1, 2]}\n')
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("precious")
    Path("file").write_text("")
    said = refusal(capsys, train.main, ["--pool_problems", "4", "--eval_n", "2", *options.split()])
    for word in words:
        assert word in said, said
    assert "Traceback" not in said
    assert Path("taken/mine.txt").read_text() == "precious"
    left = {path.name for path in Path(".").iterdir()} | {
        path.name for path in Path(".").glob("runs/*")
    }
    assert left <= {"bad.jsonl", "taken", "file", "runs", "pools"}, left


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert "--device cpu" in refusal(capsys, train.main, ["--device", "cuda"])


def test_resuming_with_another_option_names_it(capsys):
    train.main([*QUICK, "--steps", "1", "--out", "r"])
    for option, value in (
        ("--model", "smollm2-135m"),
        ("--task", "function_calling"),
        ("--lr", "0.5"),
    ):
        said = refusal(capsys, train.main, ["--resume", "r", option, value])
        assert option in said and value in said and "r was started with" in said
    train.main(["--resume", "r", "--lr", "1e-3"])  # the run's own value is no change


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


def test_a_damaged_checkpoint_is_refused(capsys):
    train.main([*QUICK, "--steps", "1", "--out", "r"])
    shutil.copytree("r", "s")
    for path, file in (("r", "state.pt"), ("s", "model.safetensors")):
        target = Path(path) / "step-000001" / file
        target.write_bytes(target.read_bytes()[:1000])
        assert "damaged" in refusal(capsys, train.main, ["--resume", path])


def test_updates_that_are_not_finite_are_skipped_and_ten_stop_the_run(monkeypatch, capsys):
    """Prevents: one bad batch that turns every weight into NaN."""
    original = train.trained_logps
    monkeypatch.setattr(train, "trained_logps", lambda *a: original(*a) * float("nan"))
    said = refusal(
        capsys, train.main, [*QUICK, "--steps", "30", "--save_every", "100", "--out", "r"]
    )
    assert "ten steps in a row" in said
    assert sum(row.get("skipped", 0) for row in rows("r/metrics.jsonl")) == 10


def test_adamw_with_masters_equals_torchs_in_float32_for_100_steps():
    """And with bfloat16 weights at the paper's rate the masters move as float32 weights do.
    Prevents: weights that are rounded back to where they were."""
    torch.manual_seed(0)
    start = (torch.randn(64, 64) * 0.02).bfloat16().float()  # representable in both
    ours32, theirs, ours16 = (
        torch.nn.Parameter(start.clone().to(t))
        for t in (torch.float32, torch.float32, torch.bfloat16)
    )
    lr = 5e-7
    a, c = (train.MasterAdamW([p], lr, 0.1) for p in (ours32, ours16))
    b = torch.optim.AdamW([theirs], lr=lr, weight_decay=0.1, betas=(0.9, 0.99))
    plain = start.bfloat16()
    for i in range(100):
        gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(i // 10)) * 1e-3
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
    assert (plain != start.bfloat16()).float().mean() < 0.1, "without masters hardly a weight moves"


def test_evaluation_with_controls_and_comparison(capsys):
    evaluation.main(["--eval_n", "40", "--out", "a"])
    out = capsys.readouterr().out
    report = json.loads(Path("a/eval.json").read_text())["report"]
    assert set(report["controls"]) == set(evaluation.CONTROLS)
    first, second = report["first_try"]["rate"], report["second_try"]["rate"]
    assert first <= second and all(
        control["rate"] >= first for control in report["controls"].values()
    )
    assert sum(report["first_errors"].values()) == round(40 * (1 - first))
    episodes = rows("a/eval_episodes.jsonl")
    assert sum(e["attempt_verdict"]["ok"] or e["reward"] == 1 for e in episodes) == round(
        40 * second
    )
    for words in ("first try", "second try, no reflection", "missed target", "cut at its cap"):
        assert words in out
    evaluation.main(["--eval_n", "40", "--temperature", "0", "--out", "b"])
    evaluation.main(["--eval_n", "8", "--reflection_tokens", "4", "--out", "c"])  # a short cap
    evaluation.main(["--compare", "a", "b"])
    assert re.search(r"second try +\d+\.\d% .* +\d+\.\d%", capsys.readouterr().out)
    assert "eval.json" in refusal(capsys, evaluation.main, ["--compare", "a", "nowhere"])


def test_intervals_are_wilsons():
    """Values of R's binom::binom.confint(method = "wilson")."""
    got = evaluation.interval(8, 20)
    assert (round(got["low"], 4), round(got["high"], 4)) == (0.2188, 0.6134)
    assert (
        evaluation.interval(0, 10)["low"] == 0
        and round(evaluation.interval(0, 10)["high"], 4) == 0.2775
    )


def test_the_schedule_rises_then_falls():
    config = train.Config(steps=100, lr=1.0, warmup_ratio=0.1)
    rates = [train.learning_rate(step, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[99] < 0.01
    assert all(a <= b for a, b in zip(rates[:9], rates[1:10])) and all(
        a >= b for a, b in zip(rates[10:], rates[11:])
    )


def test_the_readmes_task_is_a_whole_one(monkeypatch):
    """The example of README.md, as it stands there, trains and evaluates."""
    import types

    import tasks

    source = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    module = types.ModuleType("reverse")
    exec(source, module.__dict__)  # our own text
    monkeypatch.setitem(sys.modules, "reverse", module)
    monkeypatch.setitem(tasks.TASKS, "reverse", "reverse:Reverse")
    task = tasks.get_task("reverse")
    [problem] = [p for p in task.problems("train", 99, 0) if p["word"] == "planet"]
    assert task.verify(problem, "Let me see.\ntenalp").ok
    assert task.verify(problem, "planet").error == "wrong letters"
    assert task.verify(problem, " \n ").error == "no answer"
    train.main([*QUICK, "--steps", "1", "--task", "reverse", "--out", "r"])
    assert json.loads(Path("r/eval.jsonl").read_text().splitlines()[1])["first_try"]["n"] >= 1


def test_an_evaluation_of_tiny_leaves_its_folder_alone(monkeypatch):
    """From the repository's root `tiny` is a folder, too. Prevents: results among the weights."""
    before = set(os.listdir(ROOT / "tiny"))
    Path("tiny").symlink_to(ROOT / "tiny")
    evaluation.main(["--eval_n", "4"])
    assert Path("eval-tiny/eval.json").exists() and set(os.listdir(ROOT / "tiny")) == before
