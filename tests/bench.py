"""How fast it is, how near to what the machine can do, and against its peers.

    python tests/bench.py                                    a minute or two on two cores
    python tests/bench.py --model qwen2.5-1.5b-shapes        random weights in real shapes
    python tests/bench.py --model FOLDER --dtype bfloat16    real weights
    python tests/bench.py --against transformers --against vllm --peer_python PYTHON

Prints tables and writes them to a JSON file; asserts nothing about speed, downloads
nothing. Times are those of the fastest of --runs runs; against a peer, medians of --rounds
alternations. Peak memory is that of a process which does nothing else.
"""

import argparse
import contextlib
import copy
import datetime
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rrr
import sampler
import train
from config import Config, seeded
from config import parse as parse_config
from model import Chat, Decoder, ModelConfig, load, resolve, save
from rrr import Batch, Episode, Rollout, Turn
from sampler import KVCache
from tasks import Verdict
from tasks.countdown import Countdown

TINY = Path(__file__).resolve().parent.parent / "tiny"

# ---- models ----

KEYS = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads vocab_size tie_word_embeddings"
).split()
SHAPES = {
    "smollm2-135m-shapes": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "qwen2.5-0.5b-shapes": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b-shapes": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b-shapes": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b-shapes": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
}
SMALL = ("qwen2", 256, 768, 4, 4, 2, 8192, True)  # of the section `growth`


def model_config(shape: tuple, **changes) -> ModelConfig:
    source = dict(zip(KEYS, shape)) | {
        "architectures": [shape[0].capitalize() + "ForCausalLM"],  # for the peers
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "torch_dtype": "float32",
    }
    return ModelConfig.from_dict(source | changes)


def random_model(config: ModelConfig, options) -> Decoder:
    """Random weights, made where and as they are needed: no other copy raises the peak."""
    with torch.device("meta"):
        model = Decoder(config).to(getattr(torch, options.dtype))
    model.to_empty(device=options.device)
    if config.tie_word_embeddings:  # which to_empty undid
        model.lm_head.weight = model.model.embed_tokens.weight
    torch.manual_seed(options.seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=0.02)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    model.set_context(model.context)
    return model


def open_model(options, config: ModelConfig | None = None) -> tuple[Decoder, Chat]:
    """The model to measure, made ready as config.open_model does. Random weights talk by
    tiny's chat, whose ids fit any vocabulary."""
    fast = options.dtype == "bfloat16"
    torch.set_float32_matmul_precision("medium" if fast else "highest")
    torch.backends.cuda.enable_cudnn_sdp(False)
    if config is None and options.model in SHAPES:
        config = model_config(SHAPES[options.model])
    if config:
        model, chat = random_model(config, options), Chat(TINY)
    else:
        model, chat = load(options.model, options.device, getattr(torch, options.dtype))
    with contextlib.suppress(ImportError):
        from extras import cuda_graphs, fast_cpu

        use = fast_cpu.pack if options.device == "cpu" else cuda_graphs.sample_by_graphs
        use(model)
    model.checkpointing = options.checkpointing
    return model, chat


@contextlib.contextmanager
def folder_of(model: Decoder, chat: Chat, options):
    """The folder from which a peer loads the same weights; one made for it goes again."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if options.model in SHAPES:
            save(model, chat, folder)
        else:
            folder = resolve(options.model).absolute()
        yield str(folder)


def random_prompts(n: int, length: int, vocab: int, *seed) -> list[list[int]]:
    rng, most = random.Random(repr(seed)), min(40_000, vocab)
    return [[rng.randrange(100, most) for _ in range(length)] for _ in range(n)]


# ---- time and memory ----


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a GPU works behind our back
    return time.perf_counter()


def best(runs: int, work) -> float:
    """Seconds of the fastest of so many calls."""
    times = [now()]
    for _ in range(runs):
        work()
        times.append(now())
    return min(after - before for before, after in itertools.pairwise(times))


class Clock:
    """Seconds by name, spent in the functions that it wraps."""

    def __init__(self):
        self.seconds = {}

    def wrap(self, name, function):
        def call(*args, **more):
            start = now()
            result = function(*args, **more)
            self.seconds[name] = self.seconds.get(name, 0.0) + now() - start
            return result

        return call


def alone(function, *args):
    """function(*args) in a process of its own, whose peak memory is nobody else's."""
    torch.cuda.empty_cache()  # it needs the room
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(device: str) -> int:
    """Bytes. On a GPU: what PyTorch reserved. Else: resident, Python and PyTorch (about 0.3
    GB) included. On Linux a parent's peak is handed on to ru_maxrss of its children, not to
    VmHWM."""
    status = Path("/proc/self/status")
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- what the machine can do ----


def step_weights(model: Decoder) -> list[torch.Tensor]:
    """The matrices (out, in) that each token meets: the layers' in order, then the
    head's."""
    embedding = model.model.embed_tokens.weight
    layers = [p for p in model.model.parameters() if p.dim() == 2 and p is not embedding]
    return [w.detach() for w in [*layers, model.lm_head.weight]]


def floor(model: Decoder, batch: int, length: int, options) -> tuple[float, float]:
    """Seconds below which a decoding step of `batch` rows of `length` tokens cannot go: for
    the products with the weights alone, and with attention's products with keys and values
    as well.

    On a CPU these products are timed, in order and with every layer's own weights, keys and
    values, so that caches meet real traffic; weights plain or laid out for oneDNN
    beforehand, whichever is faster. On a GPU it is the time in which their bytes can be
    read, at the bandwidth of a big copy, which reads and writes."""
    config, weights, runs = model.config, step_weights(model), max(3, options.runs)
    KV, D, L = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    head = weights[-1]
    if head.is_cuda:
        source = torch.empty(2**30, dtype=torch.uint8, device=head.device)
        target = torch.empty_like(source)
        bandwidth = 2 * len(source) / best(10, lambda: target.copy_(source))
        bytes_of_weights = sum(w.numel() for w in weights) * head.element_size()
        bytes_of_cache = 2 * L * batch * length * KV * D * head.element_size()
        least = bytes_of_weights / bandwidth
        return least, least + bytes_of_cache / bandwidth

    inputs = [head.new_ones(batch, w.shape[1]) for w in weights]
    query = head.new_ones(batch * KV, config.num_attention_heads // KV, D)
    keys = [head.new_ones(batch * KV, D, length) for _ in range(L)]
    values = [head.new_ones(batch * KV, length, D) for _ in range(L)]

    def plain():
        for x, w in zip(inputs, weights):
            F.linear(x, w)

    def onednn():
        for x, w in zip(inputs, packed):
            torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    def attend():
        for k, v in zip(keys, values):
            torch.bmm(torch.bmm(query, k), v)

    products = best(runs, plain)
    with contextlib.suppress(RuntimeError):  # no oneDNN, or not in this dtype
        packed = [torch.ops.mkldnn._reorder_linear_weight(w) for w in weights]
        products = min(products, best(runs, onednn))
    return products, products + best(runs, attend)


def peak_flops(options) -> float:
    """FLOP/s of the best of ten products of two large square matrices in the model's
    dtype."""
    n = 8192 if options.device == "cuda" else 2048
    a = torch.ones(n, n, dtype=getattr(torch, options.dtype), device=options.device)
    return 2 * n**3 / best(10, lambda: a @ a)


# ---- sampling ----

NO_STOP = frozenset()  # turns have a fixed length


def sample(model, prompts, new: int, runs=1) -> tuple[float, float]:
    """The fastest of some samplings: seconds of reading the prompts and of writing."""
    done = []
    for _ in range(runs):
        start = now()
        cache = KVCache(model, len(prompts), len(prompts[0]) + new)
        cache.extend(prompts)
        read = now()
        cache.sample(new, NO_STOP, seeded(model, "bench"))
        done.append((read - start, now() - read))
    return min(done, key=sum)


def sampling_row(options, batch: int) -> dict:
    model, _ = open_model(options)
    new, vocab = options.new, model.config.vocab_size
    prompts = random_prompts(batch, options.prompt, vocab)
    sample(model, prompts[:2], 4)  # warm-up
    read, write = sample(model, prompts, new, options.runs)
    memory = peak_memory(options.device)
    least, with_kv = floor(model, batch, options.prompt + new // 2, options)
    steps = new - 1  # whole ones: the first token needs the head alone
    return {
        "batch": batch,
        "prefill s": read,
        "step ms": 1000 * write / new,
        "tok/s": batch * new / (read + write),
        "decode tok/s": batch * new / write,
        "floor ms": 1000 * least,
        "share": least * steps / write,
        "floor+kv ms": 1000 * with_kv,
        "share+kv": with_kv * steps / write,
        "peak GB": memory / 1e9,
    }


def sampling(options) -> list[dict]:
    """Random prompts, a fixed number of new tokens, no stop ids. tok/s: new tokens over all
    the time, prefill included. share: the floor's time over ours, with keys and values and
    without."""
    return [alone(sampling_row, options, batch) for batch in options.batches]


def uneven(options) -> list[dict]:
    """What uneven lengths cost: half of the turns, by lot, end after a tenth of --new
    tokens and the others after 1.9 times as many (with --new 210: 21 and 399), against as
    many turns that all end after --new. The same prompts, whose prefill is not counted, and
    the same number of tokens. Rows that have finished leave the batch; none comes in for
    them, since a step of training samples all its rows from the start and keeps their
    caches for the retries."""
    model, _ = open_model(options)
    new, rows, plain_draw = options.new, [], sampler.DecodingState.draw
    # One tensor throughout: recorded steps remember its address.
    lengths = torch.zeros(max(options.batches), dtype=torch.long, device=options.device)

    def draw(state, n):
        """Whatever is drawn, a row ends at its length."""
        plain_draw(state, n)
        state.alive[:n] &= state.counts[:n] < lengths[state.rows[:n]]

    def run(cache, wanted) -> float:
        lengths[: len(wanted)] = torch.tensor(wanted)
        fresh = cache.fork(1)
        with mock.patch.object(sampler.DecodingState, "draw", draw):
            start = now()
            turns = fresh.sample(2 * new, NO_STOP, seeded(model, "bench"))
            seconds = now() - start
        assert [len(turn.ids) for turn in turns] == wanted
        return seconds

    for batch in options.batches:
        prompts = random_prompts(batch, options.prompt, model.config.vocab_size)
        cache = KVCache(model, batch, options.prompt + 2 * new)
        cache.extend(prompts)
        short, least = random.Random(0).sample(range(batch), batch // 2), max(1, new // 10)
        wanted = {"even": [new] * batch}
        wanted["uneven"] = [least if i in short else 2 * new - least for i in range(batch)]
        seconds = {name: math.inf for name in wanted}
        for _ in range(options.runs):  # in alternation
            for name in wanted:
                seconds[name] = min(seconds[name], run(cache, wanted[name]))
        for name in wanted:
            row = {"batch": batch, "lengths": name}
            row |= {"min": min(wanted[name]), "max": max(wanted[name])}
            row |= {"seconds": seconds[name], "tok/s": batch * new / seconds[name]}
            rows.append(row)
        rows[-1]["tok/s, of even"] = seconds["even"] / seconds["uneven"]
    return rows


# ---- the training pass ----


def random_failures(n: int, options, vocab: int) -> list[Episode]:
    """Failed attempts whose prompt and answer are together --prefix random ids."""
    failures, cut = [], 2 * options.prefix // 3
    for i, ids in enumerate(random_prompts(n, options.prefix, vocab, options.seed)):
        attempt = Turn(ids[cut:], [0.0] * len(ids[cut:]), True, ids[:cut], "")
        failures.append(Episode({"key": str(i)}, i, attempt, {"ok": False}))
    return failures


def unshare(batch: Batch) -> Batch:
    """The plain pass's batch: each episode in a row of its own, behind a copy of its
    prefix."""
    rows = {name: [] for name in vars(batch)}
    for n, segments in enumerate(batch.segments):
        for g in range(1, int(segments.max()) + 1):
            own = (segments == 0) | (segments == g)
            for name, tensor in vars(batch).items():
                rows[name].append(tensor[n][own])
    return Batch(**{name: torch.stack(tensors) for name, tensors in rows.items()})


def useful_flops(model: Decoder, batches: list[Batch]) -> int:
    """Of forward and backward, which is twice the forward: the layers' products for every
    id, the head's for every trained one, attention's two for every query and key that may
    meet. What is computed twice counts once."""
    config, (*layers, head) = model.config, step_weights(model)
    ids = sum(int((batch.segments >= 0).sum()) for batch in batches)
    trained = sum(int(batch.mask.sum()) for batch in batches)
    pairs = 0
    for batch in batches:
        for segments in batch.segments:
            prefix, *own = torch.bincount(segments[segments >= 0]).tolist()
            pairs += sum(n * (n + 1) // 2 for n in [prefix, *own]) + prefix * sum(own)
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    forward = 2 * ids * sum(w.numel() for w in layers) + 2 * trained * head.numel()
    return 3 * (forward + 4 * width * pairs)


def training_batches(options, vocab: int, config: Config) -> list[Batch]:
    """Groups of 8 random reflections, with signal."""
    rng, episodes = random.Random(options.seed), []
    for failure in random_failures(options.groups, options, vocab):
        prompts = random_prompts(8, options.reflection, vocab, rng.random())
        for g, ids in enumerate(prompts):
            # They serve as the reference's, too, or the loss would be about 0.
            turn = Turn(ids, [-10 - rng.random() for _ in ids], True, [], "")
            episodes.append(replace(failure, reflection=turn, reward=float(g % 2)))
    rrr.assign_advantages(episodes)
    return rrr.make_batches(episodes, config)


def training_row(options, name: str) -> tuple[dict, list[float], float]:
    """One of the two passes: its figures, the log-probs of the trained tokens, and the
    loss."""
    config = Config(kl_beta=0.01, micro_batch_tokens=options.micro, device=options.device)
    model, _ = open_model(options)
    batches = training_batches(options, model.config.vocab_size, config)
    with contextlib.ExitStack() as patches:
        if name == "plain":  # with one episode a row, plain causal attention sees the same
            batches = [unshare(batch) for batch in batches]
            patches.enter_context(mock.patch.object(rrr, "visible", lambda segments: None))
        reference = [batch.sampled_logps for batch in batches]

        figures, logps = {}, []

        def work():
            figures.update(rrr.backward(model, batches, None, reference, config))
            model.zero_grad()

        seconds, memory = best(options.runs, work), peak_memory(options.device)
        with torch.no_grad():
            for batch in batches:
                logps += rrr.trained_logps(model, batch, 1.0)[batch.mask].tolist()
    flops, ids = useful_flops(model, batches), sum(batch.ids.numel() for batch in batches)
    row = {
        "pass": name,
        "ids": ids,
        "trained": len(logps),
        "seconds": seconds,
        "ids/s": ids / seconds,
        "trained/s": len(logps) / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "MFU": flops / seconds / peak_flops(options),
        "peak GB": memory / 1e9,
    }
    return row, logps, figures["loss"]


def training(options) -> list[dict]:
    """trained_logps, grpo_loss and backward for groups of 8: the shared prefix against the
    plain pass, which runs the prefix once for each reflection; as many groups at a time in
    both. MFU: useful FLOP/s over those of a large square product. Both must find the same
    log-probs."""
    shared, ours, loss = alone(training_row, options, "shared prefix")
    plain, theirs, its_loss = alone(training_row, options, "plain")
    plain["time, of shared"] = plain["seconds"] / shared["seconds"]
    plain["memory, of shared"] = plain["peak GB"] / shared["peak GB"]
    plain["worst logp gap"] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    plain["loss gap"] = abs(its_loss / loss - 1)
    return [shared, plain]


# ---- a whole step ----


class Alternating(Countdown):
    """Random weights solve nothing: every second answer is called right, so all groups have
    signal. The instructions are Countdown's."""

    def __init__(self):
        self.calls = itertools.count()

    def verify(self, problem, text):
        return Verdict(next(self.calls) % 2 == 0, "wrong")


class Step:
    """A training step of the program, again and again, on random failures and with turns of
    fixed lengths: there is no stop id."""

    def __init__(self, model: Decoder, chat: Chat, options, optimizer_device="same"):
        self.pool = random_failures(options.failures, options, model.config.vocab_size)
        self.config = Config(
            batch_size=options.failures,
            group_size=options.group,
            attempt_tokens=len(self.pool[0].attempt.ids),
            reflection_tokens=options.reflection,
            retry_tokens=options.retry,
            sample_rows=options.failures * options.group,
            micro_batch_tokens=options.micro,
            checkpointing=options.checkpointing,
            optimizer_device=optimizer_device,
            device=options.device,
            dtype=options.dtype,
            seed=options.seed,
        )
        self.model, self.reference = model, copy.deepcopy(model)
        self.optimizer = train.MasterAdamW(model.parameters(), self.config)
        chat.stop_ids = NO_STOP
        self.rollout = Rollout(model, chat, Alternating(), self.config)

    def run(self) -> dict[str, float]:
        """Seconds by stage. The program's own sample_step, make_batches and update run; a
        clock is wrapped around what they call."""
        model, optimizer, config = self.model, self.optimizer, self.config
        clock, start = Clock(), now()
        with contextlib.ExitStack() as patches:

            def watch(owner, function, name=None):
                timed = clock.wrap(name or function, getattr(owner, function))
                patches.enter_context(mock.patch.object(owner, function, timed))

            for stage in ("read", "reflect", "retry"):
                watch(self.rollout, stage)
            watch(optimizer, "step", "optimizer")
            # Only the reference's: rrr.backward knows the function by another name.
            watch(train, "trained_logps", "reference")
            episodes, _ = train.sample_step(0, self.rollout, config, self.pool)
            batches = clock.wrap("batch", rrr.make_batches)(episodes, config)
            update = clock.wrap("update", train.update)
            self.figures = update(model, self.reference, optimizer, batches, config, 0)
        self.largest = max(batch.ids.numel() for batch in batches)
        total, seconds = now() - start, clock.seconds
        rest = seconds.pop("update") - seconds["reference"] - seconds["optimizer"]
        seconds["forward+backward"] = rest
        return seconds | {"other": total - sum(seconds.values())}


def step(options) -> list[dict]:
    """A training step by stage: read (prefill of the failures), reflect and retry (read
    the instruction, fork, write, verify), batch, the reference's log-probs, the optimizer's
    step on its float32 masters, forward and backward (which hands the gradients to the
    masters). The gap is between the sampler's log-probs and the trainer's."""
    work = Step(*open_model(options), options)
    runs = [work.run() for _ in range(options.runs)]
    stages = min(runs, key=lambda run: sum(run.values()))
    total, count = sum(stages.values()), options.failures * options.group
    rows = [{"stage": k, "seconds": v, "share": v / total} for k, v in stages.items()]
    sampled = count * (options.reflection + options.retry)
    last = {"stage": "all", "seconds": total, "share": 1.0, "episodes": count}
    last["sampled tok/s"] = sampled / (stages["reflect"] + stages["retry"])
    last["worst gap"] = work.figures["gap_max"]
    return [*rows, last]


def growth(options) -> list[dict]:
    """How a step's seconds grow on a small random model (256 wide, 4 layers) when one size
    doubles and the others stay (4 failures x 4, prefix 64, turns of 16); x: over the line
    before."""
    base = {"failures": 4, "group": 4, "prefix": 64, "layers": 4}
    base |= {"reflection": 16, "retry": 16}
    axes = {
        "group": (2, 4, 8, 16),
        "failures": (2, 4, 8, 16),
        "prefix": (64, 128, 256, 512),
        "reflection": (16, 32, 64),
        "layers": (4, 8),
    }

    def small_step(sizes) -> Step:
        sizes = argparse.Namespace(**vars(options) | sizes)
        config = model_config(SMALL, num_hidden_layers=sizes.layers)
        return Step(*open_model(sizes, config), sizes)

    rows = []
    small_step(base).run()  # warm-up
    for axis, values in axes.items():
        before = {}
        for value in values:
            work = small_step(base | {axis: value})
            runs = [work.run() for _ in range(options.runs)]
            row = {"size": axis, "value": value}
            for name in ("reflect", "retry", "forward+backward"):
                row[name] = min(run[name] for run in runs)
                row[f"{name} x"] = row[name] / before[name] if before else None
            rows.append(row)
            before = row
    return rows


# ---- peers ----


def medians(rows: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows)]


def alternate(options, model: Decoder, peer: str, theirs) -> list[dict]:
    """We and theirs(prompts, new), which returns seconds, take turns. Each round has
    prompts of its own: a peer that remembers prefixes shall gain nothing by it. A short
    round comes first."""
    rows, new, vocab = [], options.new, model.config.vocab_size
    for batch in options.batches:
        rates = []
        for i in range(options.rounds + 1):
            prompts = random_prompts(batch, options.prompt, vocab, options.seed, i)
            if i == 0:
                sample(model, prompts, 4)
                theirs(prompts, 4)
                continue
            ours = batch * new / sum(sample(model, prompts, new))
            rates.append([ours, batch * new / theirs(prompts, new)])
        for name, (a, b) in enumerate([*rates, medians(rates)], start=1):
            name = name if name <= options.rounds else "median"
            rows.append(
                {"batch": batch, "round": name, "ours tok/s": a, f"{peer} tok/s": b}
            )
        rows[-1]["ours, of peer"] = a / b
    return rows


def against_transformers(options) -> list[dict]:
    """transformers' generate in this process, on the same weights and prompts: new tokens a
    second, prefill included, in alternation."""
    import transformers

    model, chat = open_model(options)
    with folder_of(model, chat, options) as folder:
        dtype = getattr(torch, options.dtype)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    peer = peer.to(options.device).eval()
    drawing = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    drawing |= {"repetition_penalty": 1.0, "pad_token_id": 0}

    def theirs(prompts, new):
        ids, lengths = torch.tensor(prompts), {"max_new_tokens": new, "min_new_tokens": new}
        start, ids = now(), ids.to(options.device)
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), **drawing, **lengths)
        seconds = now() - start
        assert out.shape[1] == ids.shape[1] + new
        return seconds

    return alternate(options, model, f"transformers {transformers.__version__}", theirs)


MARK = "BENCH "  # begins our lines on vLLM's stdout, for vLLM prints there, too


def serve_vllm(options) -> None:
    """Runs in vLLM's own interpreter: opens the folder once, then answers each line of JSON
    on stdin by one on stdout."""
    import vllm

    # On a GPU we are there, too.
    share = {"gpu_memory_utilization": 0.5} if options.device == "cuda" else {}
    llm = vllm.LLM(
        options.serve_vllm,
        dtype=options.dtype,
        max_model_len=max(1024, options.prompt + options.new),
        max_num_seqs=max(options.batches),
        enforce_eager=options.eager,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **share,
    )
    print(MARK + json.dumps(vllm.__version__), flush=True)
    for line in sys.stdin:
        prompts, new = json.loads(line)
        how = {"max_tokens": new, "ignore_eos": True, "detokenize": False}
        start = time.perf_counter()
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        done = llm.generate(
            inputs, vllm.SamplingParams(temperature=1.0, **how), use_tqdm=False
        )
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == new for output in done)
        print(MARK + json.dumps(seconds), flush=True)


def against_vllm(options) -> list[dict]:
    """vLLM in a process of its own, with as many threads as we have, compiled unless
    --eager: new tokens a second, prefill included, in alternation. Like ours, its threads
    are not bound to cores; by default (VLLM_CPU_OMP_THREADS_BIND=auto) it binds them and
    leaves one core out."""
    model, chat = open_model(options)
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    environment |= {**os.environ, "HF_HUB_OFFLINE": "1"}
    with folder_of(model, chat, options) as folder:
        command = [options.peer_python, __file__, "--serve_vllm", folder]
        for name in ("dtype", "device", "prompt", "new"):
            command += [f"--{name}", str(getattr(options, name))]
        command += ["--batches", *map(str, options.batches), *["--eager"] * options.eager]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:

            def answer():
                for line in process.stdout:
                    if line.startswith(MARK):
                        return json.loads(line.removeprefix(MARK))
                sys.exit("vLLM ended early; what it said is above.")

            def theirs(prompts, new):
                print(json.dumps([prompts, new]), file=process.stdin, flush=True)
                return answer()

            rows = alternate(options, model, f"vLLM {answer()}", theirs)
            process.communicate()  # the end of its stdin ends it; it is left its time
            return rows


def against_trl(options) -> list[dict]:
    """A whole step of ours against an optimizer step of TRL's GRPOTrainer, in alternation
    after one of each to warm up: the same prefixes, group size and reflection length,
    rewards that alternate, a reference model. TRL has neither retries nor verification, so
    our step without its retries stands beside; it runs each prefix once for each
    reflection, we once for a group. Its micro-batches are of one group, ours of --micro
    ids. In bfloat16 its AdamW moves bfloat16 weights, ours float32 masters."""
    import transformers
    import trl
    from datasets import Dataset

    model, chat = open_model(options)
    work, seconds, lengths = Step(model, chat, options), [], set()
    prompts = []
    for failure in work.pool:
        ids = failure.attempt.prompt_ids + failure.attempt.ids
        prompts.append(ids + chat.glue(Alternating.reflect, ids[-1]))

    def reward(completion_ids, **_):
        lengths.update(len(ids) for ids in completion_ids)
        return [float(i % 2) for i in range(len(completion_ids))]

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = now()

        def on_step_end(self, *_, **__):
            theirs, ours = now() - self.start, work.run()
            total = sum(ours.values())
            seconds.append([total, total - ours["retry"], theirs])

    dtype = getattr(torch, options.dtype)
    with folder_of(model, chat, options) as folder, tempfile.TemporaryDirectory() as out:
        settings = trl.GRPOConfig(
            output_dir=out,
            use_cpu=options.device == "cpu",
            bf16=options.dtype == "bfloat16",
            beta=work.config.kl_beta,
            learning_rate=work.config.lr,
            temperature=1.0,
            num_generations=options.group,
            max_completion_length=options.reflection,
            generation_kwargs={"min_new_tokens": options.reflection},
            num_iterations=1,
            per_device_train_batch_size=options.group,
            gradient_accumulation_steps=options.failures,
            gradient_checkpointing=options.checkpointing,
            max_steps=options.rounds + 1,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        )
        trainer = trl.GRPOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            reward,
            args=settings,
            train_dataset=Dataset.from_dict(
                {"prompt": [str(i) for i in range(len(prompts))]}
            ),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[Turns],
        )

        def tokenize(numbers):  # the very ids of our prefixes, which no text would give
            return [prompts[int(number)] for number in numbers], None, {}

        with mock.patch.object(trainer, "_tokenize_prompts", side_effect=tokenize):
            trainer.train()
    assert lengths == {options.reflection}
    rows, timed = [], seconds[1:]
    for name, (ours, bare, theirs) in enumerate([*timed, medians(timed)], start=1):
        row = {"round": name if name <= len(timed) else "median"}
        row |= {"ours s": ours, "ours without retries s": bare}
        rows.append(row | {f"TRL {trl.__version__} s": theirs})
    rows[-1] |= {"TRL, of ours": theirs / ours, "of ours without retries": theirs / bare}
    return rows


# ---- tables ----


SECTIONS = {f.__name__: f for f in (sampling, uneven, training, step, growth)}
PEERS = {"transformers": against_transformers, "vllm": against_vllm, "trl": against_trl}
SIZES = {  # option -> default, default with a peer or on a GPU, help
    "new": (32, 128, "tokens that a row samples"),
    "failures": (2, 8, "of a step"),
    "group": (4, 8, "reflections on each failure of a step"),
    "prefix": (96, 300, "tokens before a reflection"),
    "reflection": (32, 100, "tokens of a reflection"),
    "retry": (32, 100, "tokens of a retry"),
}
LOADS = {  # option -> default on a CPU, default on a GPU, help
    "runs": (2, 5, "runs of which the fastest counts"),
    "groups": (1, 8, "groups of the training pass"),
    "micro": (2048, 8192, "ids of a training pass, at most"),
}


def show(title: str, rows: list[dict]) -> None:
    """Aligned text: a column for each key that a row has, in the order in which they
    come."""

    def cell(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns] + [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{textwrap.fill(title, 100)}\n")
    for line in lines:
        cells = (text.rjust(width) for text, width in zip(line, widths))
        print("  " + "  ".join(cells).rstrip(), flush=True)


def about(options) -> dict:
    machine = platform.processor()
    with contextlib.suppress(OSError, TypeError):
        machine = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    machine = torch.cuda.get_device_name() if options.device == "cuda" else machine
    facts = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return facts | vars(options)


def parse(argv) -> argparse.Namespace:
    summary = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    add, default = parser.add_argument, "smollm2-135m-shapes"
    add("--model", default=default, help=f"random: {', '.join(SHAPES)}; or a folder")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--only", nargs="+", choices=SECTIONS, help="sections [all; with a peer none]")
    add("--against", action="append", choices=PEERS, default=[], help="may be repeated")
    add("--peer_python", default=sys.executable, help="the interpreter that has vLLM")
    add("--eager", action="store_true", help="vLLM does not compile")
    add("--rounds", type=int, default=3, help="alternations with a peer [3]")
    add("--batches", type=int, nargs="+", help="rows to sample [8 32; on a GPU 32 128]")
    add("--prompt", type=int, default=100, help="tokens of a sampled row's prompt [100]")
    for name, (small, real, words) in SIZES.items():
        words += f" [{small}; with a peer or on a GPU {real}]"
        add(f"--{name}", type=int, help=words)
    for name, (cpu, cuda, words) in LOADS.items():
        add(f"--{name}", type=int, help=f"{words} [{cpu}; on a GPU {cuda}]")
    add("--checkpointing", action="store_true", help="recompute activations in backward")
    add("--seed", type=int, default=0)
    add("--out", default="bench.json", help="[bench.json]")
    add("--serve_vllm", help=argparse.SUPPRESS)  # how --against vllm starts its peer

    options = parser.parse_args(argv)
    resolve_auto(options)
    on_gpu = options.device == "cuda"
    options.batches = options.batches or ([32, 128] if on_gpu else [8, 32])
    for table, larger in ((SIZES, on_gpu or bool(options.against)), (LOADS, on_gpu)):
        for name in table:
            if getattr(options, name) is None:
                setattr(options, name, table[name][larger])
    return options


def resolve_auto(options):
    """--device and --dtype as train.py takes them."""
    words = ["--device", options.device, "--dtype", options.dtype]
    chosen, _ = parse_config(words, "", "bench.py")
    options.device, options.dtype = chosen.device, chosen.dtype


def main(argv=None) -> None:
    options = parse(argv)
    if options.serve_vllm:
        serve_vllm(options)
        return
    content = {"about": about(options), "tables": {}}
    for key in ("date", "command", "model", "dtype", "machine", "threads", "torch"):
        print(f"{key:8} {content['about'][key]}")
    names = options.only or ([] if options.against else SECTIONS)
    chosen = {name: SECTIONS[name] for name in names}
    chosen |= {f"against {name}": PEERS[name] for name in options.against}
    for name, section in chosen.items():
        try:
            rows = section(options)
        except torch.OutOfMemoryError as error:  # on a GPU; the other sections may fit
            rows = [{"out of memory": str(error).partition(". ")[0]}]
        show(f"{name}: {' '.join(section.__doc__.split())}", rows)
        content["tables"][name] = rows
        # At once, since a later section may fail.
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
