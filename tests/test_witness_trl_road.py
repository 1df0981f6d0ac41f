"""extras/train_trl.py, the method on TRL's own road: what its engine is asked, what is
trained, what is rewarded, and that two processes are one. Runs where trl is installed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0")
from conftest import ROOT, close  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_model import write_chat  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from config import parse  # noqa: E402
from extras import train_trl  # noqa: E402
from model import load  # noqa: E402

# Of trl and transformers, about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
SGD = (
    "--optim sgd --learning_rate 0.1 --max_grad_norm 0".split()
)  # AdamW would hide a factor


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    run = tmp_path_factory.mktemp("road") / "pool"
    words = "--steps 0 --pool_problems 60 --batch_size 3 --group_size 4 --warmup_ratio 0 "
    words += "--reflection_tokens 20 --retry_tokens 24"
    train.main([*words.split(), "--out", str(run)])
    return run / "pool.jsonl"


def command(pool, out, rows, *more):
    """Two steps of three failures with four reflections each; each cap cuts some turns."""
    words = f"--pool {pool} --output_dir {out} --max_steps 2 --save_strategy no "
    return [*words.split(), "--per_device_train_batch_size", str(rows), *more]


def test_two_steps_train_the_reflections_alone(pool, tmp_path, monkeypatch):
    """Prevents: a prompt that is not the pool's ids, a retry among the trained tokens, one
    cap for both turns, a reward that is not the verifier's, a reflection beside another's
    retry."""
    asked, trained = [], []
    write = train_trl.write

    def keep(trainer, conversations, cap, siblings):
        turns, logps = write(trainer, conversations, cap, siblings)
        asked.append((conversations, turns))
        return turns, logps

    monkeypatch.setattr(train_trl, "write", keep)
    trainer = train_trl.make_trainer(*train_trl.options(command(pool, tmp_path / "run", 6)))
    score = trainer._generate_and_score_completions

    def keep_batch(inputs):
        batch = score(inputs)
        trained.append(([row["prompt"] for row in inputs], batch))
        return batch

    trainer._generate_and_score_completions = keep_batch
    trainer.train()

    failures, rollout = trainer.rollout_func.args
    chat, task = rollout.chat, rollout.task
    rewards, reflections, retries = [], [], []
    assert len(trained) == 2 and len(asked) == 4
    for step, (indices, batch) in enumerate(trained):
        (before_reflection, reflected), (before_retry, retried) = asked[2 * step :][:2]
        of_step = []
        for i, index in enumerate(indices):
            e, ids = failures[int(index)], reflected[i]
            prompt = e.attempt.prompt_ids + e.attempt.ids
            prompt = prompt + chat.glue(task.reflect, e.attempt.ids[-1])
            assert before_reflection[i] == prompt
            assert before_retry[i] == prompt + ids + chat.glue(task.retry, ids[-1])
            in_prompt = batch["prompt_mask"][i].bool()
            assert batch["prompt_ids"][i][in_prompt].tolist() == prompt
            is_trained = batch["completion_mask"][i].bool()
            assert batch["completion_ids"][i][is_trained].tolist() == ids
            assert not set(ids[:-1]) & chat.stop_ids
            of_step.append(task.verify(e.problem, chat.decode(retried[i])).ok)
        assert all(len(set(indices[k : k + 4])) == 1 for k in range(0, 12, 4))
        groups = torch.tensor(of_step).float().view(3, 4)
        advantages = groups - groups.mean(1, keepdim=True)
        advantages /= groups.std(1, keepdim=True) + 1e-4
        difference = (advantages.flatten() - batch["advantages"]).abs().max()
        close("TRL's road, advantages of our verdicts", difference, 1e-5)
        rewards += of_step
        reflections += reflected
        retries += retried
    assert 0 < sum(rewards) < len(rewards)
    for turns, cap in ((reflections, 20), (retries, 24)):
        cut = [ids[-1] not in chat.stop_ids for ids in turns]
        assert 0 < sum(cut) < len(cut)
        assert all(len(ids) == cap for ids, is_cut in zip(turns, cut) if is_cut)
        assert max(map(len, turns)) == cap
    logged = sum(row["reward"] for row in trainer.state.log_history[:-1]) / 2
    assert logged == pytest.approx(sum(rewards) / len(rewards))


DRIVER = """
import json, os, sys
from extras import train_trl

explore = train_trl.explore

def keep(failures, rollout, prompts, trainer):
    rows = explore(failures, rollout, prompts, trainer)
    with open(sys.argv[1] + os.environ["RANK"], "a") as file:
        file.write(json.dumps(rows | {"prompts": prompts}) + "\\n")
    return rows

train_trl.explore = keep
train_trl.main(sys.argv[2:])
"""


def test_two_processes_are_one(pool, tmp_path):
    """The rollouts of two processes, whose groups lie across them, in two micro-batches
    each, replayed in one process in one. Prevents: siblings that are compared with others,
    a denominator of one process, a second process that samples what the first does, one
    that is not there. The folder is a run for eval.py, with the source's own tokenizer."""
    run = tmp_path / "two"
    (tmp_path / "driver.py").write_text(DRIVER)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc_per_node", "2", tmp_path / "driver.py", tmp_path / "rank"]
    start += command(pool, run, 3, "--processes", "2", *SGD)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(start, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{run}: 2 processes, 2 steps" in done.stdout

    ranks = []
    for rank in "01":
        lines = (tmp_path / f"rank{rank}").read_text().splitlines()
        ranks.append([json.loads(line) for line in lines])
    steps, halves = [], ([], [])
    for first, second in zip(*ranks, strict=True):
        steps.append({name: first[name] + second[name] for name in first if first[name]})
        prompts = steps[-1].pop("prompts")
        assert len(first["prompts"]) == 6 and prompts[4] == prompts[7]  # across the two
        assert all(len(set(prompts[i : i + 4])) == 1 for i in (0, 4, 8))
        halves[0].append(first["completion_ids"][4:])
        halves[1].append(second["completion_ids"][:2])
    assert len(steps) == 2 and halves[0] != halves[1]

    trainer = train_trl.make_trainer(
        *train_trl.options(command(pool, tmp_path / "one", 12, *SGD))
    )
    replay = iter(steps)
    trainer.rollout_func = lambda prompts, trainer: next(replay) | {"logprobs": None}
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    two = load_file(run / "step-000002" / "model.safetensors")
    apart = moved = 0.0
    for name, p in trainer.model.named_parameters():
        apart += (p - two[name]).square().sum().item()
        moved += (start[name] - two[name]).square().sum().item()
    assert moved > 1e-5
    close("TRL's road, weights of one and two processes", (apart / moved) ** 0.5, 1e-4)

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (run / "step-000002" / name).read_bytes() == (
            ROOT / "tiny" / name
        ).read_bytes()
    model, chat = load(str(run))
    assert torch.equal(model.state_dict()["model.norm.weight"], two["model.norm.weight"])
    config, _ = parse(["--model", str(run)], "", "eval.py")
    assert (config.reflection_tokens, config.difficulty) == (20, "3x12")
    assert (config.steps, config.lr) == (2, 0.1)  # as TRL was told, not as the pool's run
    rewards = [row["reward"] for row in train.read_rows(run / "metrics.jsonl")]
    sampled = [sum(step["retry_reward"]) / 12 for step in steps]
    assert rewards == pytest.approx(sampled)
    evaluation.main(["--model", str(run), "--eval_n", "4"])
    assert (run / "eval.json").exists()


def test_a_step_has_as_many_failures_whatever_the_siblings(pool, tmp_path):
    """Prevents: --num_generations that changes how many failures a step has."""
    words = command(pool, tmp_path / "run", 6, "--num_generations", "2")
    _, config, settings = train_trl.options(words)
    assert (settings.generation_batch_size, config.group_size) == (3 * 2, 2)


def test_what_is_wrong_is_said_in_a_sentence(pool, tmp_path):
    """Prevents: a pool of other prompts that trains, processes that are missing (accelerate
    launch --cpu starts one for two), a run that is written over."""
    (tmp_path / "old").mkdir()
    (tmp_path / "other").mkdir()
    config = json.loads((pool.parent / "config.json").read_text())
    config["model"] = str(write_chat(tmp_path / "other" / "model"))
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    copied = shutil.copy(pool, tmp_path / "other")
    rows, new = "--per_device_train_batch_size", str(tmp_path / "new")
    new = ["--output_dir", new, rows, "12", "--max_steps", "1"]
    mine = ["--pool", str(pool), *new]
    wrong = {
        "is no file: train.py --steps 0": [],
        "is of another model": ["--pool", copied, *new],
        "--processes 2, but 1 run": [*mine, "--processes", "2"],
        "do not divide into 1 processes": [*mine, rows, "7"],
        "exists: choose another": [*mine, "--output_dir", str(tmp_path / "old")],
        "TRL refuses these options": [*mine, "--train_on", "everything"],
        "has no steps: say --max_steps": mine[:-2],
    }
    for sentence, words in wrong.items():
        with pytest.raises(SystemExit, match=sentence):
            train_trl.main(words)
    assert not (tmp_path / "new").exists()
