"""A folder that we save, opened by vLLM: the same greedy ids and text.

Needs vLLM's CPU build (or a GPU and vLLM), and real weights in $MODELS (or
~/.cache/real-models). vLLM writes the ids of its own tokenizer and template for chat
messages, so these are compared, too."""

import os
from pathlib import Path

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vllm is not installed: pip install vllm")

from model import load, save  # noqa: E402
from sampler import KVCache  # noqa: E402

REAL = Path(os.environ.get("MODELS", Path.home() / ".cache" / "real-models"))
QUESTIONS = [
    "What is the capital of France?",
    "What is 2+3?",
    "Write one sentence about the sea.",
]
NEW_TOKENS = 24


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_vllm_writes_the_same_from_a_saved_folder(name, tmp_path, monkeypatch):
    """Prevents: a checkpoint that loads, but with another tie, config, template, tokenizer
    or stop token. The weights are moved first, as training would: the source is not what is
    read."""
    if not (REAL / name / "tokenizer.json").is_file():
        pytest.skip(f"{name} is not in {REAL}")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model, chat = load(str(REAL / name))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3 * p.std().nan_to_num(0) * torch.randn(p.shape))
    save(model, chat, tmp_path / "saved")
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [chat.prompt(some) for some in messages]
    cache = KVCache(model, len(prompts), 200)
    cache.extend(prompts)
    generator = torch.Generator().manual_seed(0)
    ours = cache.sample(NEW_TOKENS, chat.stop_ids, generator, temperature=0)

    settings = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    theirs = vllm.LLM(str(tmp_path / "saved"), disable_log_stats=True, **settings)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    for output, prompt, sampled in zip(theirs.chat(messages, greedy), prompts, ours):
        assert output.prompt_token_ids == prompt
        written = list(output.outputs[0].token_ids)
        assert written == sampled.ids[: len(written)]
        assert set(sampled.ids[len(written) :]) <= chat.stop_ids
        assert output.outputs[0].text.strip() == chat.decode(sampled.ids).strip()
