"""Real weights through the whole road, and greedy ids against transformers' own generation.

The models are looked for in $MODELS (or ~/.cache/real-models); what is missing is skipped
by name."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install transformers")

from conftest import ROOT  # noqa: E402

import train  # noqa: E402
from model import load  # noqa: E402
from sampler import KVCache  # noqa: E402

REAL = Path(os.environ.get("MODELS", Path.home() / ".cache" / "real-models"))
BFCL = Path(os.environ.get("BFCL", ROOT.parent / "shared" / "data" / "bfcl"))
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours, separated by commas, and nothing else. Think of the rainbow.",
    "What is 2+3?",
    "Write one sentence about the sea.",
]


@pytest.fixture(autouse=True)
def all_threads():
    """Real weights want them, unlike the small models of other tests."""
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(1)


def folder(name):
    if not (REAL / name / "tokenizer.json").exists():
        pytest.skip(f"{name} is not in {REAL}")
    return str(REAL / name)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_two_greedy_turns_equal_transformers_ids(name):
    """Ragged prompts, stop tokens, a second turn on the same cache: the ids that generate
    gives row by row, and text that reads as sense."""
    model, chat = load(folder(name))
    prompts = [chat.prompt([{"role": "user", "content": q}]) for q in QUESTIONS]
    auto = transformers.AutoModelForCausalLM
    reference = auto.from_pretrained(REAL / name, dtype=torch.float32)
    cache = KVCache(model, len(prompts), 400)
    cache.extend(prompts)
    texts = [list(prompt) for prompt in prompts]
    for turn in range(2):
        generator = torch.Generator().manual_seed(0)
        sampled = cache.sample(24, chat.stop_ids, generator, temperature=0)
        for text, s in zip(texts, sampled):
            expected = reference.generate(
                torch.tensor([text]),
                attention_mask=torch.ones(1, len(text), dtype=torch.long),
                max_new_tokens=24,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=sorted(chat.stop_ids),
                pad_token_id=0,
            )[0, len(text) :]
            assert s.ids == expected.tolist()
            text += s.ids
        if turn == 0:
            assert "Paris" in chat.decode(sampled[0].ids)
        glue = [chat.glue("Are you sure?", s.ids[-1]) for s in sampled]
        cache.extend(glue)
        texts = [text + piece for text, piece in zip(texts, glue)]


RUNS = {
    "smollm2-135m": [
        ["--task", "countdown", "--difficulty", "3x20"],
        ["--task", "function_calling", "--difficulty", "easy"],
        ["--task", "function_calling", "--data", str(BFCL / "BFCL_v4_simple_python.json")],
    ],
    "qwen2.5-coder-0.5b": [
        ["--task", "countdown", "--difficulty", "3x20"],
        ["--task", "function_calling", "--difficulty", "easy"],
    ],
}


CASES = [(name, options) for name, many in RUNS.items() for options in many]


@pytest.mark.parametrize("name, options", CASES)
def test_a_step_on_real_weights_logs_saves_and_resumes(
    name, options, tmp_path, monkeypatch
):
    """Two steps, the first of them before an interruption. Sampler and trainer agree on the
    log-probs of real models, and what is saved is loaded by transformers."""
    monkeypatch.chdir(tmp_path)
    if "--data" in options and not Path(options[-1]).exists():
        pytest.skip(f"{options[-1]} is not there")
    quick = "--dtype float32 --batch_size 2 --group_size 2 --pool_problems 2".split()
    quick += "--eval_n 1 --save_every 1 --steps 2".split()
    limits = "--attempt_tokens 24 --reflection_tokens 16 --retry_tokens 24".split()
    # So few tokens solve nothing: every second answer is called right, every first one
    # wrong.
    verify, calls = train.Rollout.verify, itertools.count()

    def take_turns(self, problem, turn):
        is_retry = len(turn.prompt_ids) < 60  # all that comes before it is in the cache
        return verify(self, problem, turn) | {"ok": is_retry and next(calls) % 2 == 0}

    monkeypatch.setattr(train.Rollout, "verify", take_turns)
    update, interrupted = train.update, []

    def interrupt_once(model, reference, optimizer, batches, config, step):
        if step == 1 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return update(model, reference, optimizer, batches, config, step)

    monkeypatch.setattr(train, "update", interrupt_once)
    with pytest.raises(SystemExit, match="stopped"):
        train.main(["--model", folder(name), *options, *quick, *limits, "--out", "r"])
    train.main(["--resume", "r"])
    rows = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["groups_with_signal"] == 2
        assert row["gap_max"] < 1e-3 and row["grad_norm"] > 0
    [saved] = Path("r").glob("step-*")
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    ours, _ = load("r")
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        expected = again(ids).logits
        got = ours.logits(ours(ids, torch.arange(30)[None]))
    assert (got - expected).abs().max() / expected.abs().max() < 1e-4
