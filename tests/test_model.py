"""model.py without its witness: every test is named after the bug that it prevents."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import fill
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import model as model_module
from model import Chat, Decoder, ModelConfig, UserError, load, read_json, resolve, save

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]  # ids 256, 257, 258
SMALL = dict(
    model_type="qwen2",
    vocab_size=272,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    hidden_act="silu",
    eos_token_id=258,
    torch_dtype="float32",
)


def write_chat(folder, template=CHATML, **settings):
    """A byte tokenizer (ids 0..255 are bytes) with three special tokens, and a chat
    template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings,
    }
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_config(folder, **changes):
    config = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_model(folder, **changes):
    """A whole small model folder; returns its state dict."""
    write_chat(write_config(folder, **changes))
    torch.manual_seed(0)
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    decoder = fill(Decoder(config), std=0.02, norms=0.1)
    weights = parameters_of(decoder)
    save_file(weights, folder / "model.safetensors")
    return weights


def parameters_of(decoder):
    """name -> tensor, a tied head once, as in a file."""
    return {name: p.detach().clone() for name, p in decoder.named_parameters()}


def assert_equal(some, others):
    assert some.keys() == others.keys()
    assert all(torch.equal(some[name], others[name]) for name in some)


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "m")
    return tmp_path / "m"


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def run(decoder, ids, attend=model_module.attention):
    ids = torch.tensor(ids)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return decoder.logits(decoder(ids, positions, attend))


# ---- config.json


OLD = dict(original_max_position_embeddings=64)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **OLD)
LONGROPE = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4, **OLD)


@pytest.mark.parametrize(
    "old, new",
    [
        (
            dict(rope_theta=5e5),
            dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)),
        ),
        (
            dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **LLAMA3)),
            dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3)),
        ),
        (
            dict(rope_theta=5e5, rope_scaling=dict(type="longrope", **LONGROPE)),
            dict(rope_parameters=dict(rope_type="longrope", rope_theta=5e5, **LONGROPE)),
        ),
    ],
)
def test_older_and_newer_rope_forms_give_the_same_tables(old, new):
    base = {k: v for k, v in SMALL.items() if k != "rope_theta"}
    configs = [ModelConfig.from_dict({**base, **rope}) for rope in (old, new)]
    tables = [model_module.rope_tables(config, 300) for config in configs]
    plain = model_module.rope_tables(ModelConfig.from_dict(SMALL), 300)
    assert torch.equal(tables[0][0], tables[1][0]) and torch.equal(
        tables[0][1], tables[1][1]
    )
    assert not torch.allclose(tables[0][0], plain[0])


def test_longrope_scales_by_its_own_factor_if_it_has_one():
    rope = dict(type="longrope", factor=64.0, **LONGROPE)
    source = {**SMALL, "head_dim": 8, "rope_scaling": rope}
    cos, _ = model_module.rope_tables(ModelConfig.from_dict(source), 4)
    assert cos[0, 0].item() == pytest.approx((1 + math.log(64) / math.log(64)) ** 0.5)


def test_original_length_beside_the_rope_numbers_is_found():
    """Phi-3.5 writes original_max_position_embeddings at the top of config.json."""
    rope = {k: v for k, v in LONGROPE.items() if k != "original_max_position_embeddings"}
    source = {**SMALL, "rope_scaling": dict(type="longrope", **rope), **OLD}
    config = ModelConfig.from_dict(source)
    short, long = model_module.rope_tables(config, 64), model_module.rope_tables(config, 65)
    assert not torch.allclose(short[0], long[0][:64])


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(model_type="gemma3"), "gemma3"),
        (dict(model_type=None), "None"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(use_sliding_window=True, sliding_window=64), "sliding"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding"),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "yarn"),
        (dict(rope_scaling={"type": "linear", "factor": 4.0}), "linear"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope"),
        (dict(rope_scaling={"rope_type": "llama3", **OLD}), "low_freq_factor"),
        (
            dict(rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, **OLD}),
            "long_factor",
        ),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(hidden_size=None), "hidden_size"),
        (dict(num_hidden_layers="two"), "damaged"),
        (dict(num_attention_heads=0), "damaged"),
        (dict(num_key_value_heads=3), "3 key heads"),
    ],
)
def test_config_asks_for_more_than_the_decoder_does_and_gets_garbage(
    tmp_path, changes, word
):
    """Refused, what is not supported by name, before a byte of weights: here are none."""
    write_chat(write_config(tmp_path / "m", **changes))
    sentence = refusal(load, str(tmp_path / "m"))
    assert word in sentence and "config.json" in sentence


BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}[A]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_special_tokens_map_is_read(tmp_path):
    """f08: older folders name bos and eos there alone. Prevents: turns without an end."""
    write_chat(write_config(tmp_path / "m"), BRACKETS)
    settings = tmp_path / "m" / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": BRACKETS}))
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "m" / name).unlink(missing_ok=True)
    assert "no token ends a turn" in refusal(Chat, tmp_path / "m")
    names = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "m" / "special_tokens_map.json").write_text(json.dumps(names))
    chat = Chat(tmp_path / "m")
    ids = chat.prompt([{"role": "user", "content": "hi"}])
    text = chat.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>[U]hi[A]"
    assert chat.stop_ids == {chat.tokenizer.token_to_id("<|im_end|>")}


def test_special_tokens_of_an_answer_reach_the_verifier(tmp_path):
    """f02: in some tokenizers <answer> and </think> are special. Prevents: an answer that
    no verifier ever sees, and thoughts that count."""
    write_chat(write_config(tmp_path / "m"), CHATML)
    tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<answer>", "</answer>", "<think>", "</think>"])
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    chat = Chat(tmp_path / "m")
    text = "<think>no</think><answer>3*4+5</answer>"
    [stop] = chat.stop_ids
    assert chat.decode([*chat.encode(text), stop]) == text


def test_context_beyond_the_model_reads_garbage_positions(folder):
    assert "beyond the 512" in refusal(load, str(folder), context=513)
    decoder, _ = load(str(folder))
    assert decoder.context == 512 and decoder.cos.shape == (512, 8)
    assert "513" in refusal(decoder.set_context, 513)


def test_mistral_is_usable_up_to_its_window_only():
    config = ModelConfig.from_dict({**SMALL, "model_type": "mistral", "sliding_window": 64})
    decoder = Decoder(config)
    assert decoder.context == 64
    assert "beyond the 64" in refusal(decoder.set_context, 65)


# ---- the decoder


def test_rope_tables_do_not_lose_precision_with_the_weights(folder):
    decoder, _ = load(str(folder), dtype=torch.bfloat16)
    assert (
        decoder.cos.dtype == torch.float32
        and decoder.model.norm.weight.dtype == torch.bfloat16
    )
    hidden = decoder(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))
    assert hidden.dtype == torch.bfloat16 and decoder.logits(hidden).dtype == torch.float32


def test_a_token_sees_what_comes_after_it(folder):
    decoder, _ = load(str(folder))
    one, two = run(decoder, [[1, 2, 3, 4]]), run(decoder, [[1, 2, 3, 9]])
    assert torch.equal(one[:, :3], two[:, :3]) and not torch.allclose(one[:, 3], two[:, 3])


def test_a_short_row_padded_on_the_right_is_what_it_is_alone(folder):
    decoder, _ = load(str(folder))
    alone, padded = (
        run(decoder, [[5, 6, 7]]),
        run(decoder, [[5, 6, 7, 0, 0], [9, 8, 7, 6, 5]]),
    )
    torch.testing.assert_close(padded[:1, :3], alone)


def test_attention_knows_only_relative_positions(folder):
    """Rope applied wrongly to q or k shows as a dependence on where a row begins."""
    decoder, _ = load(str(folder))
    ids = torch.tensor([[5, 6, 7, 8]])
    near, far = (decoder(ids, torch.arange(4)[None] + start) for start in (0, 300))
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)


def test_attention_on_a_gpu_comes_in_another_layout(folder, monkeypatch):
    """The kernel that takes a mask there returns (B, T, heads, D) turned round: view failed
    on the first GPU this met, and nothing on a CPU could tell."""
    decoder, _ = load(str(folder))
    expected = run(decoder, [[5, 6, 7], [9, 8, 7]])
    attend = torch.nn.functional.scaled_dot_product_attention

    def turned(*args):
        return attend(*args).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", turned)
    assert torch.equal(run(decoder, [[5, 6, 7], [9, 8, 7]]), expected)


def test_strategy_gets_each_layer_once_with_the_shapes_it_was_promised(folder):
    decoder, _ = load(str(folder))
    seen = []

    def spy(layer, q, k, v):
        seen.append((layer, q.shape, k.shape, v.shape))
        return model_module.attention(layer, q, k, v)

    assert torch.equal(run(decoder, [[1, 2, 3]], spy), run(decoder, [[1, 2, 3]]))
    assert seen == [(i, (1, 4, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)) for i in range(2)]


def test_checkpointing_changes_the_gradient(folder):
    gradients = []
    for checkpointing in (False, True):
        decoder, _ = load(str(folder))
        decoder.checkpointing = checkpointing
        hidden = decoder(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]))
        decoder.logits(hidden).square().sum().backward()
        gradients.append([p.grad for p in decoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ---- load


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


def test_missing_tensor_stays_random(folder):
    rewrite(folder, lambda w: w.pop(NORM))
    assert NORM in refusal(load, str(folder))


def test_unknown_tensor_is_dropped_in_silence(folder):
    rewrite(folder, lambda w: w.update({"model.layers.2.extra.weight": torch.zeros(3)}))
    assert "model.layers.2.extra.weight" in refusal(load, str(folder))


def test_misshapen_tensor_is_broadcast(folder):
    rewrite(folder, lambda w: w.update({NORM: torch.ones(1)}))
    sentence = refusal(load, str(folder))
    assert NORM in sentence and "[32]" in sentence and "[1]" in sentence


def test_quantised_tensor_is_taken_for_floats(folder):
    rewrite(folder, lambda w: w.update({NORM: torch.ones(32, dtype=torch.int8)}))
    sentence = refusal(load, str(folder))
    assert NORM in sentence and "int8" in sentence


def test_rotary_table_of_older_files_is_no_stranger(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda w: w.update({name: torch.ones(4)}))
    load(str(folder))


@pytest.mark.parametrize("keep", [0, 4, 200, -100])
def test_download_that_was_cut_short(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "damaged" in refusal(load, str(folder))


def test_garbage_for_weights(folder):
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    assert "damaged" in refusal(load, str(folder))


def test_tied_head_that_is_in_the_file_too(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda w: w.update({"lm_head.weight": embedding.clone()}))
    decoder, _ = load(str(folder), dtype=torch.bfloat16)
    assert "lm_head.weight" not in parameters_of(decoder)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert torch.equal(decoder.model.embed_tokens.weight, embedding.bfloat16())


def test_untied_head_that_is_not_in_the_file(folder):
    write_config(folder, tie_word_embeddings=False)
    assert "lm_head.weight" in refusal(load, str(folder))


def shard(folder):
    """Splits the weights into two files and an index, under names that no pattern would
    guess."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: weights[n] for n in part}, folder / file)
    where = {n: file for file, part in halves.items() for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return weights


def test_shards_are_read_by_the_index_and_not_by_pattern(folder):
    weights = shard(folder)
    save_file(
        {NORM: torch.zeros(32)}, folder / "model-00009-of-00009.safetensors"
    )  # a leftover
    for file in ("a.safetensors", "b.safetensors"):  # and copies in both shards
        part = load_file(folder / file)
        save_file({NORM: torch.zeros(32), **part}, folder / file)
    decoder, _ = load(str(folder))
    assert_equal(parameters_of(decoder), weights)


def test_lacking_shard_is_named(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors" in refusal(load, str(folder))


def test_index_without_a_map(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors" in refusal(load, str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_half_a_folder(folder, file):
    (folder / file).unlink()
    assert file in refusal(load, str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1, 2]", b"\xff\xfe"])
def test_damaged_text_file_is_named(folder, file, content):
    (folder / file).write_bytes(content)
    assert file in refusal(load, str(folder))


@pytest.mark.parametrize("where", [[1], {NORM: 7}, {NORM: "../m/model.safetensors"}])
def test_hostile_index_is_followed_or_a_traceback(folder, where):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    refusal(load, str(folder))


def test_size_that_no_memory_holds_is_a_traceback(folder):
    write_config(folder, head_dim=10**9)
    refusal(load, str(folder))


def test_pickle_is_never_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in refusal(load, str(folder))


def test_tokenizer_of_another_model(folder):
    write_model(folder, vocab_size=200)
    sentence = refusal(load, str(folder))
    assert "200" in sentence and "259 ids" in sentence


def test_cuda_without_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda" in refusal(load, str(folder), device="cuda")


# ---- save


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"model_type": "phi3", "eos_token_id": [1, 2]}],
)
def test_saved_model_is_not_the_one_that_was_trained(
    tmp_path, monkeypatch, changes, shard_bytes
):
    in_shards = partial(save_torch_state_dict, max_shard_size=shard_bytes)
    monkeypatch.setattr(model_module, "save_torch_state_dict", in_shards)
    weights = write_model(tmp_path / "m", **changes)
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [258, 256]}')
    decoder, chat = load(str(tmp_path / "m"))
    save(decoder, chat, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (
        shard_bytes == 20_000
    )
    again, chat_again = load(str(tmp_path / "saved"))
    assert_equal(parameters_of(again), weights)
    assert chat_again.stop_ids == chat.stop_ids and chat_again.files == chat.files
    assert torch.equal(run(decoder, [[1, 2, 3]]), run(again, [[1, 2, 3]]))


def test_saved_config_contradicts_the_weights(folder, tmp_path):
    decoder, chat = load(str(folder))
    save(decoder.to(torch.bfloat16), chat, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == {
        **json.loads((folder / "config.json").read_text()),
        "torch_dtype": "bfloat16",
    }
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert decoder.model.norm.weight.dtype == torch.bfloat16  # left as it was


def test_save_survives_that_its_source_is_gone(folder, tmp_path):
    decoder, chat = load(str(folder))
    for file in folder.iterdir():
        file.unlink()
    save(decoder, chat, tmp_path / "saved")
    load(str(tmp_path / "saved"))


def test_save_overwrites_a_folder(folder):
    decoder, chat = load(str(folder))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "cannot be written" in refusal(save, decoder, chat, folder)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


# ---- names


def test_unknown_name_leaves_one_guessing():
    sentence = refusal(resolve, "qwen2.5-1.5")
    assert "'qwen2.5-1.5'" in sentence
    assert all(name in sentence for name in ("tiny", "qwen2.5-1.5b", "smollm2-135m"))


def test_path_that_is_not_there_is_taken_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/typo", str(tmp_path / "typo"), "./typo/x"):
        assert name in refusal(resolve, name)


def test_run_folder_means_its_last_step(tmp_path):
    for name in ("step-000020", "step-000100", "step-000100.tmp", "episodes", "step-x"):
        (tmp_path / name).mkdir()
    assert resolve(str(tmp_path)) == tmp_path / "step-000100"
    assert resolve(str(tmp_path / "step-000020")) == tmp_path / "step-000020"


def test_tiny_is_beside_the_code_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == Path(model_module.__file__).resolve().parent / "tiny"


HUB = """
import sys
sys.path.insert(0, sys.argv[1])
from model import UserError, resolve
try:
    resolve(sys.argv[2])
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("name, offline", [("qwen2.5-0.5b", "0"), ("owner/name", "1")])
def test_hub_out_of_reach_is_a_traceback(tmp_path, name, offline):
    """A process of its own, since huggingface_hub reads the environment when it is
    imported."""
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens there
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_OFFLINE": offline,
        "PATH": "/usr/bin",
    }
    root = str(Path(model_module.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", HUB, root, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    lines = done.stdout.strip().split("\n")
    assert len(lines) == 1 and "from http://127.0.0.1:9" in lines[0]
    assert "network" in lines[0]


# ---- the chat


def chat_of(tmp_path, template=CHATML, generation=None, settings=None, **config):
    folder = write_config(
        write_chat(tmp_path / "c", template, **(settings or {})), **config
    )
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return Chat(folder)


def text_of(chat, ids):
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


USER = [{"role": "user", "content": "2+3?"}]
GLUE = "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def test_prompt_lacks_the_assistants_header(tmp_path):
    chat = chat_of(tmp_path)
    ids = chat.prompt(USER)
    assert text_of(chat, ids) == "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
    # What is decoded for people and verifiers lacks only what begins, ends or pads.
    assert ids[0] == 257 and chat.decode(ids) == text_of(chat, ids).replace(
        "<|im_end|>", ""
    )


def test_end_of_turn_is_doubled_or_lost(tmp_path):
    chat = chat_of(tmp_path)
    assert text_of(chat, chat.glue("Why?", last_id=258)) == GLUE.removeprefix("<|im_end|>")
    assert text_of(chat, chat.glue("Why?", last_id=65)) == GLUE  # cut by the length cap
    assert text_of(chat, chat.glue("Why?", last_id=256)) == GLUE  # another stop token


def test_conversation_by_glue_is_the_templates_conversation(tmp_path):
    chat = chat_of(tmp_path)
    answer = {"role": "assistant", "content": "6 <b>&</b>"}
    ids = chat.prompt(USER) + chat.encode(answer["content"]) + [258]
    ids += chat.glue("Why?", ids[-1])
    assert ids == chat.prompt([*USER, answer, {"role": "user", "content": "Why?"}])


def test_template_with_a_blank_before_the_end_of_turn(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    chat = chat_of(tmp_path, template)
    assert text_of(chat, chat.glue("Why?", last_id=258)) == "[Why?]"
    assert text_of(chat, chat.glue("Why?", last_id=65)) == " <|im_end|>[Why?]"


def test_template_that_ends_turns_with_words(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    )
    chat = chat_of(tmp_path, template)
    assert text_of(chat, chat.glue("Why?", last_id=258)) == "\nuser: Why?\nassistant: "
    assert chat.stop_ids == {258}


def test_template_that_drops_answers(tmp_path):
    assert "drops" in refusal(chat_of, tmp_path, "{{ messages[-1].content }}")


@pytest.mark.parametrize(
    "generation, config, settings, stops",
    [
        (None, {}, {}, {258}),
        ({"eos_token_id": [256, 257]}, {}, {}, {256, 257, 258}),
        ({"eos_token_id": 256}, {"eos_token_id": [70]}, {}, {256, 70, 258}),
        (None, {"eos_token_id": None}, {"eos_token": {"content": "<|end|>"}}, {256, 258}),
        (None, {"eos_token_id": None}, {"eos_token": None}, {258}),
    ],
)
def test_one_of_several_stop_tokens_is_forgotten(
    tmp_path, generation, config, settings, stops
):
    assert chat_of(tmp_path, CHATML, generation, settings, **config).stop_ids == stops


def test_folder_without_a_template(tmp_path):
    assert "chat template" in refusal(chat_of, tmp_path, None)


def test_broken_template(tmp_path):
    assert "chat template" in refusal(chat_of, tmp_path, "{% for m in messages %}")


def test_template_may_refuse_messages(tmp_path):
    refuse = "{{ raise_exception('no system here') }}"
    template = CHATML + "{% if messages[0].role == 'system' %}" + refuse + "{% endif %}"
    chat = chat_of(tmp_path, template)
    assert "no system here" in refusal(chat.prompt, [{"role": "system", "content": "x"}])


def test_template_in_a_file_of_its_own_wins(tmp_path):
    folder = write_config(write_chat(tmp_path / "c", "{{ broken"))
    (folder / "chat_template.jinja").write_text(CHATML)
    assert Chat(folder).prompt(USER) == chat_of(tmp_path / "other").prompt(USER)


TURN = "{{ m.role }}: {{ m.content }}<|im_end|>\n"
OF_THE_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and 'tools' in m %}"
    "{{ m['tools'] }}<|im_end|>{% else %}" + TURN + "{% endif %}{% endfor %}"
)
IN_A_REMARK = "{# no tools here #}{% for m in messages %}" + TURN + "{% endfor %}"


@pytest.mark.parametrize("template", [OF_THE_SYSTEM, IN_A_REMARK])
def test_tools_are_promised_but_not_shown(tmp_path, template):
    """f07: the word stands in the template, but no tool in the prompt. Prevents: a model
    that is asked to call what it never saw."""
    assert not chat_of(tmp_path, template).native_tools


def test_tools_are_escaped_for_html(tmp_path):
    chat = chat_of(tmp_path)
    ids = chat.prompt(USER, tools=[{"text": "<é & 'è'>"}])
    assert '[{"text": "<é & \'è\'>"}]' in text_of(chat, ids)


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}WRITTEN{% endfor %}"
CALLS += "{% endfor %}"
FUNCTION = "{{ c.function | tojson }}"
ARGUMENTS = "{{ c.function.arguments | tojson }}"
NAME = "{{ c.function.name }}"


@pytest.mark.parametrize(
    "written, native",
    [
        ("<tool_call>\n" + FUNCTION + "\n</tool_call>", True),  # Qwen
        ('{"name": "' + NAME + '", "parameters": ' + ARGUMENTS + "}", True),  # Llama 3
        ("[TOOL_CALLS] [" + FUNCTION + "]", True),  # Mistral
        ("<function=" + NAME + ">" + ARGUMENTS + "</function>", False),
        ("[" + NAME + "(x=1)]", False),
        ("[TOOL_CALLS]" + NAME + "[ARGS]" + ARGUMENTS, False),
        ("", False),
    ],
)
def test_tools_are_native_where_calls_are_json(tmp_path, written, native):
    """f15. Prevents: a model that is told another syntax than the verifier reads; one whose
    template has tools, but shows none."""
    template = CHATML + CALLS.replace("WRITTEN", written)
    assert chat_of(tmp_path / "a", template).native_tools == native
    silent = template.replace("{% if tools", "{% if other")
    assert not chat_of(tmp_path / "b", silent).native_tools


def test_prompt_depends_on_the_day(tmp_path):
    chat = chat_of(tmp_path, "{{ strftime_now('%d %b %Y') }} " + CHATML)
    assert text_of(chat, chat.prompt(USER)).startswith("26 Jul 2024 ")


def test_what_templates_of_the_ecosystem_use(tmp_path):
    """Trimmed blocks, loop controls, thinking off, unset tokens undefined."""
    template = (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {{- m.content }}|\n"
        "{%- endfor %}\n    {% if true %}\n{% endif %}\n"
        "{% if bos_token is defined %}B{% endif %}"
        "{% if not enable_thinking %}quick{% endif %}"
    )
    chat = chat_of(tmp_path, template)
    assert (
        text_of(chat, chat.prompt(USER + [{"role": "tool", "content": "x"}]))
        == "2+3?|quick"
    )
