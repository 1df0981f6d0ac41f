"""model.py against transformers, the reference library: the same logits, files and prompts.

Runs where transformers is installed; the real models are looked for in $MODELS (or
~/.cache/real-models).
"""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from conftest import ROOT, close  # noqa: E402
from huggingface_hub import save_torch_state_dict  # noqa: E402
from make_golden import ROPES  # noqa: E402
from test_model import CHATML, write_chat  # noqa: E402

from model import load, save  # noqa: E402
from tasks import task_class  # noqa: E402

REAL = Path(os.environ.get("MODELS", Path.home() / ".cache" / "real-models"))
COMMON = dict(
    vocab_size=272,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16384,
    initializer_range=0.15,  # attention must matter, or an error in it would not show
    bos_token_id=256,
    eos_token_id=258,
    pad_token_id=256,
)
FAMILIES = {
    "qwen2": ("Qwen2", dict(rope_parameters=ROPES["plain"])),
    "qwen3": ("Qwen3", dict(head_dim=32, rope_parameters=ROPES["plain"])),
    "llama": ("Llama", dict(rope_parameters=ROPES["llama3"], rms_norm_eps=1e-5)),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=32)),
    "phi3": (
        "Phi3",
        dict(
            rope_parameters=ROPES["longrope"],
            original_max_position_embeddings=256,
            num_key_value_heads=4,
        ),
    ),
}


def write(folder, family, tied):
    """A random model of transformers, with norms and biases that are not the neutral
    ones."""
    name, extra = FAMILIES[family]
    torch.manual_seed(1)
    settings = {**COMMON, **extra, "tie_word_embeddings": tied}
    config = getattr(transformers, name + "Config")(**settings)
    reference = getattr(transformers, name + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    reference.save_pretrained(folder)
    write_chat(folder)
    return reference


@torch.no_grad()
def compare(ours, reference, ids, start=0, what="random weights"):
    positions = torch.arange(ids.shape[1])[None] + start
    ours = ours.logits(ours(ids, positions))
    theirs = reference(ids, position_ids=positions, use_cache=False).logits
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    close(f"logits, {what}", difference, 1e-4)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(tmp_path, family, tied):
    """Short prompts hide errors in the rope scaling, so far positions too. Phi-3 turns to
    its long factors beyond its original length, in transformers by the positions at hand,
    here by the context asked for."""
    reference = write(tmp_path / "m", family, tied)
    ids = torch.randint(0, 256, (2, 200), generator=torch.Generator().manual_seed(0))
    ours, _ = load(str(tmp_path / "m"), context=256)
    compare(ours, reference, ids)
    ours, _ = load(str(tmp_path / "m"), context=16384)
    for start in (300, 5000, 16000):
        compare(ours, reference, ids, start)
    if family != "phi3":
        compare(ours, reference, ids)


def test_older_config_of_the_hub_is_the_same_model(tmp_path):
    """Llama 3.2 and Phi-3.5 on the hub have rope_theta and rope_scaling; transformers now
    writes rope_parameters."""
    for family, key in (("llama", "rope_type"), ("phi3", "type")):
        folder = tmp_path / family
        reference = write(folder, family, False)
        config = json.loads((folder / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = {key: rope.pop("rope_type"), **rope}
        config["torch_dtype"] = config.pop("dtype")
        (folder / "config.json").write_text(json.dumps(config))
        ours, _ = load(str(folder), context=4096)
        compare(ours, reference, torch.randint(0, 256, (1, 300)), start=300)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_loads_in_transformers(tmp_path, monkeypatch, family, tied):
    write(tmp_path / "m", family, tied)
    ours, chat = load(str(tmp_path / "m"), context=256)
    with torch.no_grad():
        for parameter in ours.parameters():  # as training would
            parameter.add_(0.01 * torch.randn(parameter.shape))
    ids = torch.randint(0, 256, (1, 100))
    for name, shard_bytes in (("one", 5 * 10**9), ("many", 100_000)):
        in_shards = partial(save_torch_state_dict, max_shard_size=shard_bytes)
        monkeypatch.setattr("model.save_torch_state_dict", in_shards)
        save(ours, chat, tmp_path / name)
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype="auto", output_loading_info=True
        )
        assert not any(info.values()), info
        compare(ours, theirs.eval(), ids)
        assert (
            transformers.AutoTokenizer.from_pretrained(tmp_path / name).chat_template
            == CHATML
        )
    save(ours.to(torch.bfloat16), chat, tmp_path / "half")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "half", dtype="auto"
    )
    assert theirs.dtype == torch.bfloat16


CONVERSATIONS = {
    "user": [
        {
            "role": "user",
            "content": "Use [3, 7, 25] for 46.\n  <answer> 3 & 7 </answer> é 你好",
        }
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 2+3? "},
    ],
    "turns": [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": "6"},
        {"role": "user", "content": "Why was that wrong?"},
    ],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a <city> & its surroundings, e.g. 'Zürich'",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@pytest.mark.parametrize(
    "task, level", [("countdown", "3x12"), ("function_calling", "mini")]
)
def test_the_embedded_model_is_the_same_to_transformers(task, level):
    """Ids of prompts with tools, answers and instructions, then logits. Prevents: a
    model_type for which AutoTokenizer builds its own tokenizer (as it does for qwen2)."""
    folder = ROOT / "tiny"
    ours, chat = load("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    task = task_class(task)("", level)
    for problem in task.problems("test", 50, 0):
        messages, tools = task.messages(problem, True), task.tools(problem)
        ids = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert chat.prompt(messages, tools) == ids
        answer = {"role": "assistant", "content": task.answer(problem)}
        messages = [*messages, answer, {"role": "user", "content": task.reflect}]
        text = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
        whole = tokenizer(text, add_special_tokens=False).input_ids
        assert whole == chat.prompt(messages, tools)
        assert whole == ids + chat.encode(task.answer(problem)) + chat.glue(task.reflect)
        assert tokenizer.decode(whole) == chat.tokenizer.decode(whole, False) == text
        compare(ours, theirs.eval(), torch.tensor([whole]), what="tiny")


def real(name):
    if not (REAL / name / "config.json").is_file():
        pytest.skip(f"no real weights at {REAL / name} (set MODELS)")
    return str(REAL / name)


@pytest.fixture(params=["smollm2-135m", "qwen2.5-coder-0.5b"], scope="module")
def pair(request):
    name = real(request.param)
    ours, chat = load(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32
    ).eval()
    return ours, chat, theirs, transformers.AutoTokenizer.from_pretrained(name), name


def test_real_prompts(pair):
    _, chat, _, tokenizer, _ = pair
    for messages in CONVERSATIONS.values():
        for tools in (None, [TOOL]):
            text = tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert chat.prompt(messages, tools) == ids
    turns = CONVERSATIONS["turns"]
    for last in (chat.encode("<|im_end|>"), []):
        ids = chat.prompt(turns[:1]) + chat.encode("6") + last
        assert ids + chat.glue(turns[2]["content"], ids[-1]) == chat.prompt(turns)
    assert tokenizer.eos_token_id in chat.stop_ids


def test_real_logits(pair):
    ours, chat, theirs, _, _ = pair
    ids = torch.tensor([chat.prompt(CONVERSATIONS["user"])])
    compare(ours, theirs, ids, what="real weights")
    compare(ours, theirs, ids, 3000, what="real weights from position 3000")


def test_real_round_trip_is_bit_equal(pair, tmp_path):
    *_, name = pair
    if "smollm2" not in name:
        pytest.skip("the smaller model will do")
    ours, chat = load(name, dtype=torch.bfloat16)
    save(ours, chat, tmp_path / "saved")
    again, _ = load(str(tmp_path / "saved"), dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype="auto"
    )
    reference = theirs.state_dict()
    before = dict(ours.named_parameters())
    for name, tensor in again.named_parameters():
        assert torch.equal(tensor, before[name])
        assert torch.equal(tensor, reference[name])
