"""What a training run needs, by count, and what a small one took.

    python tests/memory.py            README's table: models, options and GB on one GPU
    python tests/memory.py --check    four small steps on a CPU, against the count

A run writes what it took into metrics.jsonl (memory_gb). GB are 10**9 bytes.
"""

import sys

import bench

from config import Config, parse
from model import ModelConfig
from rrr import HEAD_CHUNK
from sampler import BUCKET, PREFILL_TOKENS, round_up

PROMPT = 210  # tokens of a problem (150) and of the two instructions
TABLE = [  # model, options, GB that the GPU has
    ("qwen2.5-0.5b", "", 80),
    ("qwen2.5-1.5b", "", 80),
    ("qwen2.5-3b", "--sample_rows 128", 80),
    ("qwen2.5-7b", "--sample_rows 128 --optimizer_device cpu", 80),
    ("qwen2.5-1.5b", "--sample_rows 96 --optimizer_device cpu", 24),
]


def count(config: Config, model: ModelConfig, prompt: int) -> tuple[dict, dict, dict]:
    """Bytes on the device by what takes them: always, while sampling, while training. Turns
    are as long as their caps allow. What an allocator loses between tensors is not in
    it."""
    cuda, size = config.device == "cuda", 2 if config.dtype == "bfloat16" else 4
    C, inner, V = model.hidden_size, model.intermediate_size, model.vocab_size
    L, D = model.num_hidden_layers, model.head_dim
    H, KV = model.num_attention_heads, model.num_key_value_heads
    layers = L * C * (2 * (H + KV) * D + 3 * inner)
    weights = layers + V * C * (1 if model.tie_word_embeddings else 2)
    optimizer_here = config.optimizer_device == "same"

    steady = {"weights": size * weights}
    if config.kl_beta > 0:
        steady["reference"] = size * weights
    if optimizer_here:  # two moments; float32 weights are their own masters
        steady["masters and moments"] = weights * (12 if size == 2 else 8)
    if not cuda:
        steady["packed weights"] = size * (layers + V * C)

    # A conversation's cache, and for an evaluation's reflections those of its attempts.
    rows, bucket = config.sample_rows, BUCKET[config.device]
    S = prompt + config.attempt_tokens + config.reflection_tokens + config.retry_tokens
    S = round_up(S, bucket)
    token = rows * 2 * L * KV * D * size
    logits = 3 * rows * V * 4  # their probabilities and those summed up, too
    per_row = size * (3 * H * S + 4 * C + 3 * inner)  # of a token that passes a layer
    sampling = {
        "caches": token * S,
        "attempts' caches": token * round_up(prompt + config.attempt_tokens, bucket),
        "logits": logits,
        "prefill": PREFILL_TOKENS[config.device] * per_row,
    }
    graphs = {}
    if cuda:  # one static cache, and one pool, in which a whole step has its place
        graphs["graphs' cache"] = token * S
        graphs["graphs' pool"] = logits + rows * per_row

    # A micro-batch: N groups, each a row of T ids.
    own = config.reflection_tokens + 1
    T = prompt + config.attempt_tokens + config.group_size * own
    N = max(1, config.micro_batch_tokens // T)
    per_id = size * (6 * C + 5 * H * D + 6 * KV * D + 5 * inner) + 8 * C  # of one layer
    # visible is bool; attention repeats it for the query heads that share a key head, turns
    # it round, and keeps a bias in the weights' dtype for the backward pass.
    pairs = N * T * T
    bias = pairs * (H // KV) * size
    activations = N * T * per_id + bias
    if config.checkpointing:
        activations += N * T * L * C * size
    else:
        activations *= L
    # Logits, log-softmax and gradient of a chunk; or a gradient, and in float32 the head's
    # copy, its gradient and, in its own dtype, that gradient and the sum so far.
    chunk = 4 * V * min(HEAD_CHUNK, N * config.group_size * config.reflection_tokens)
    copy = 4 * V * C if size == 2 else 0
    training = {
        "gradients": 4 * weights if optimizer_here else 0,
        "activations": activations,
        "backward": N * T * size * (3 * inner + 2 * C),  # of what it works on
        "mask": pairs + 2 * pairs * (H // KV),
        "head": max(3 * chunk + copy, chunk + copy + V * C * (4 + 2 * size)),
    }
    return steady, sampling | graphs, training | graphs


def total(parts: dict, *more: dict) -> float:
    return sum(sum(some.values()) for some in (parts, *more)) / 1e9


def table() -> None:
    print(
        "GB of one GPU's memory: computed, not measured. Countdown, prompts of 150 tokens,"
    )
    print("turns at their caps; the larger number is the need.\n")
    print("| model | options | GPU | sampling | training |\n|---|---|---|---|---|")
    details = []
    for name, options, gpu in TABLE:
        arguments = ["--model", name, "--device", "cuda", *options.split()]
        config, _ = parse(arguments, "", "train.py")
        parts = count(config, bench.model_config(bench.SHAPES[f"{name}-shapes"]), PROMPT)
        steady, sampling, training = parts
        peaks = f"{total(steady, sampling):.0f} | {total(steady, training):.0f}"
        print(f"| {name} | {f'`{options}`' if options else ''} | {gpu} | {peaks} |")
        details.append(f"\n{name} {options}")
        for when, some in zip(("always", "sampling", "training"), parts):
            words = [f"{what} {size / 1e9:.1f}" for what, size in some.items()]
            details.append(f"  {when:9} {', '.join(words)}")
    print("\n".join(details))


def used_by_a_step(options, shape) -> tuple[float, float, float]:
    """GB: counted while sampling, counted while training, and what a step adds to a process
    that has only opened its libraries."""
    empty = bench.peak_memory("cpu")
    model, chat = bench.open_model(options, bench.model_config(shape))
    work = bench.Step(model, chat, options)
    work.run()
    used = (bench.peak_memory("cpu") - empty) / 1e9
    prompt = len(work.pool[0].attempt.prompt_ids)
    for instruction in (bench.Alternating.reflect, bench.Alternating.retry):
        prompt += len(chat.glue(instruction, -1))
    steady, sampling, training = count(work.config, model.config, prompt)
    return total(steady, sampling), total(steady, training), used


def check() -> None:
    rows = []
    sizes = "--device cpu --prefix 256 --reflection 32 --retry 4 --failures 8 --group 8"
    small, large_head = bench.SMALL, (*bench.SMALL[:6], 60000, True)
    for name, shape, micro in (("activations", small, 4096), ("head", large_head, 1024)):
        for more in ("", " --checkpointing"):
            options = bench.parse(f"{sizes} --micro {micro}{more}".split())
            sampling, training, used = bench.alone(used_by_a_step, options, shape)
            row = {"large": name + more, "sampling": sampling, "training": training}
            row |= {"used": used, "of counted": used / max(sampling, training)}
            rows.append(row)
    bench.show("GB that a small step takes: the two counted peaks, and what was used", rows)


if __name__ == "__main__":
    check() if sys.argv[1:] == ["--check"] else table()
