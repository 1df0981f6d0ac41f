"""How fast it is, how near to what the machine can do, and against its peers.

    python tests/bench.py                                    a minute or two on two cores
    python tests/bench.py --model qwen2.5-1.5b-shapes        random weights in real shapes
    python tests/bench.py --model FOLDER --dtype bfloat16    real weights
    python tests/bench.py --against transformers --against vllm --peer_python PYTHON

Prints tables and writes them to a JSON file; asserts nothing about speed, downloads nothing. Times
are those of the fastest of --runs runs; against a peer, medians of --rounds alternations. Peak
memory is that of a process which does nothing else.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rrr
import sampler
import train
from eval import pick_device_and_dtype, seeded
from model import Chat, Decoder, ModelConfig, load, resolve, save
from rrr import Batch, Episode, Rollout, Turn
from sampler import Conversations
from tasks import Verdict
from tasks.countdown import Countdown

# ---- models ----

KEYS = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
KEYS = (KEYS + "num_key_value_heads vocab_size tie_word_embeddings").split()
SHAPES = {
    "smollm2-135m-shapes": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "qwen2.5-0.5b-shapes": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b-shapes": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b-shapes": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b-shapes": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
}
SMALL = ("qwen2", 256, 768, 4, 4, 2, 8192, True)  # of the section `growth`


def random_model(shape: tuple, options, **changes) -> Decoder:
    """Random weights, made where and as they are needed: no other copy raises the peak."""
    source = {**dict(zip(KEYS, shape)), "hidden_act": "silu", "rms_norm_eps": 1e-6} | changes
    source |= {"max_position_embeddings": 8192, "rope_theta": 100000.0, "torch_dtype": "float32"}
    source["architectures"] = [shape[0].capitalize() + "ForCausalLM"]  # for the peers
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_dict(source)).to(getattr(torch, options.dtype))
    model.to_empty(device=options.device)
    torch.manual_seed(options.seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=0.02)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    model.set_context(model.context)
    return model


def open_model(options) -> tuple[Decoder, Chat]:
    """The model to measure. Random weights talk by tiny's chat, whose ids fit any vocabulary."""
    if options.dtype == "bfloat16":  # as in eval.open_model
        torch.set_float32_matmul_precision("medium")
    if options.model in SHAPES:
        model, chat = random_model(SHAPES[options.model], options), Chat(ROOT / "tiny")
    else:
        model, chat = load(options.model, options.device, getattr(torch, options.dtype))
    model.checkpointing = options.checkpointing
    return model, chat


@contextlib.contextmanager
def folder_of(model: Decoder, chat: Chat, options):
    """The folder from which a peer loads the same weights; one that is made for it goes again."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if options.model in SHAPES:
            save(model, chat, folder)
        else:
            folder = resolve(options.model).absolute()
        yield str(folder)


def random_prompts(n: int, length: int, vocab: int, *seed) -> list[list[int]]:
    rng = random.Random(repr(seed))
    return [[rng.randrange(100, min(40_000, vocab)) for _ in range(length)] for _ in range(n)]


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
    """Bytes. On a GPU: of its tensors. Else: resident, Python and PyTorch (about 0.3 GB) included.
    On Linux a parent's peak is handed on to ru_maxrss of its children, not to VmHWM."""
    status = Path("/proc/self/status")
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- what the machine can do ----


def step_weights(model: Decoder) -> list[torch.Tensor]:
    """The matrices (out, in) that each token meets: the layers' in order, and the head's."""
    embedding = model.model.embed_tokens.weight
    layers = [p for p in model.model.parameters() if p.dim() == 2 and p is not embedding]
    return [w.detach() for w in [*layers, model.head.weight]]


def floor(model: Decoder, batch: int, length: int, options) -> tuple[float, float]:
    """Seconds below which a decoding step of `batch` rows of `length` tokens cannot go: for the
    products with the weights alone, and with attention's products with keys and values as well.

    On a CPU these products are timed, in order and with every layer's own weights, keys and values,
    so that caches meet real traffic; weights plain or laid out for oneDNN beforehand, whichever is
    faster. On a GPU it is the time in which their bytes can be read, at the bandwidth of a big
    copy, which reads and writes."""
    config, weights, runs = model.config, step_weights(model), max(3, options.runs)
    weight, KV, D = weights[-1], config.num_key_value_heads, config.head_dim
    layers = range(config.num_hidden_layers)
    if weight.is_cuda:
        source = torch.empty(2**30, dtype=torch.uint8, device=weight.device)
        target = torch.empty_like(source)
        rate = 2 * len(source) / best(10, lambda: target.copy_(source)) / weight.element_size()
        read = sum(w.numel() for w in weights)
        return read / rate, (read + 2 * len(layers) * batch * length * KV * D) / rate

    inputs = [weight.new_ones(batch, w.shape[1]) for w in weights]
    query = weight.new_ones(batch * KV, config.num_attention_heads // KV, D)
    keys = [weight.new_ones(batch * KV, D, length) for _ in layers]
    values = [weight.new_ones(batch * KV, length, D) for _ in layers]

    def plain():
        for x, w in zip(inputs, weights):
            F.linear(x, w)

    def onednn():
        for x, w in zip(inputs, laid_out):
            torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    def attend():
        for k, v in zip(keys, values):
            torch.bmm(torch.bmm(query, k), v)

    products = best(runs, plain)
    if torch.backends.mkldnn.is_available():
        laid_out = [torch.ops.mkldnn._reorder_linear_weight(w) for w in weights]
        products = min(products, best(runs, onednn))
    return products, products + best(runs, attend)


def peak_flops(options) -> float:
    """FLOP/s of the best of ten products of two large square matrices in the model's dtype."""
    n = 8192 if options.device == "cuda" else 2048
    a = torch.ones(n, n, dtype=getattr(torch, options.dtype), device=options.device)
    return 2 * n**3 / best(10, lambda: a @ a)


# ---- sampling ----

NO_STOP = frozenset([-1])  # no id: turns have a fixed length


def sample(model, prompts, new: int, runs=1) -> tuple[float, float]:
    """The fastest of some samplings: seconds of reading the prompts and of writing."""
    done = []
    for _ in range(runs):
        start = now()
        conversations = Conversations(model, len(prompts), len(prompts[0]) + new)
        conversations.extend(prompts)
        read = now()
        conversations.sample(new, NO_STOP, seeded(model, "bench"))
        done.append((read - start, now() - read))
    return min(done, key=sum)


def sampling_row(options, batch: int) -> dict:
    model, _ = open_model(options)
    new, prompts = options.new, random_prompts(batch, options.prompt, model.config.vocab_size)
    sample(model, prompts[:2], 4)  # warm-up
    read, write = sample(model, prompts, new, options.runs)
    memory = peak_memory(options.device)
    least, with_kv = floor(model, batch, options.prompt + new // 2, options)
    steps = new - 1  # whole ones: the first token needs the head alone
    row = {"batch": batch, "prefill s": read, "step ms": 1000 * write / new}
    row |= {"tok/s": batch * new / (read + write), "decode tok/s": batch * new / write}
    row |= {"floor ms": 1000 * least, "share": least * steps / write}
    row |= {"floor+kv ms": 1000 * with_kv, "share+kv": with_kv * steps / write}
    return row | {"peak GB": memory / 1e9}


def sampling(options) -> list[dict]:
    """Random prompts, a fixed number of new tokens, no stop ids. tok/s: new tokens over all the
    time, prefill included. share: the floor's time over ours, with keys and values and without."""
    return [alone(sampling_row, options, batch) for batch in options.batches]


def uneven(options) -> list[dict]:
    """What uneven lengths cost: half of the turns, by lot, end after a tenth of --new tokens and
    the others after 1.9 times as many (with --new 210: 21 and 399), against as many turns that all
    end after --new. The same prompts, whose prefill is not counted, and the same number of tokens.
    Rows that have finished leave the batch; none comes in for them, since a step of training
    samples all its rows from the start and keeps their caches for the retries."""
    model, _ = open_model(options)
    new, rows = options.new, []

    class Ending(sampler.Desk):
        """Whatever is drawn, a row ends at its length."""

        def draw(self, n):
            super().draw(n)
            self.alive[:n] &= self.counts[:n] < lengths[self.rows[:n]]

    for batch in options.batches:
        prompts = random_prompts(batch, options.prompt, model.config.vocab_size)
        conversations = Conversations(model, batch, options.prompt + 2 * new)
        conversations.extend(prompts)
        short = random.Random(0).sample(range(batch), batch // 2)
        least = max(1, new // 10)
        mixed = [least if i in short else 2 * new - least for i in range(batch)]
        seconds = {"even": [], "uneven": []}
        for _ in range(options.runs):  # in alternation
            for name, wanted in (("even", [new] * batch), ("uneven", mixed)):
                lengths, fresh = torch.tensor(wanted, device=options.device), conversations.fork(1)
                with mock.patch.object(sampler, "Desk", Ending):
                    start = now()
                    turns = fresh.sample(2 * new, NO_STOP, seeded(model, "bench"))
                    seconds[name].append(now() - start)
                assert [len(turn.ids) for turn in turns] == wanted
        for name, wanted in (("even", [new]), ("uneven", mixed)):
            row = {"batch": batch, "lengths": name, "min": min(wanted), "max": max(wanted)}
            row |= {"seconds": min(seconds[name]), "tok/s": batch * new / min(seconds[name])}
            rows.append(row)
        rows[-1]["tok/s, of even"] = min(seconds["even"]) / min(seconds["uneven"])
    return rows


# ---- the training pass ----


def random_failures(n: int, options, vocab: int) -> list[Episode]:
    """Failed attempts whose prompt and answer are together --prefix random ids."""
    failures, cut = [], 2 * options.prefix // 3
    for i, ids in enumerate(random_prompts(n, options.prefix, vocab, options.seed)):
        attempt = Turn(ids[:cut], ids[cut:], [0.0] * len(ids[cut:]), "", True)
        failures.append(Episode({"key": str(i)}, i, attempt, {"ok": False}))
    return failures


def unshare(batch: Batch) -> Batch:
    """The plain pass's batch: each episode in a row of its own, behind a copy of its prefix."""
    rows = []
    for n, segments in enumerate(batch.segments):
        for g in range(1, int(segments.max()) + 1):
            own = (segments == 0) | (segments == g)
            rows.append([tensor[n][own] for tensor in vars(batch).values()])
    return Batch(*map(torch.stack, zip(*rows)))


class Plain:
    """A model that attends causally, whatever mask it is given: with one episode a row that is what
    the mask says, and a plain pass would have none."""

    def __init__(self, model: Decoder):
        self.decoder = model

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def __call__(self, ids, positions, attend):
        return self.decoder(ids, positions)


def useful_flops(model: Decoder, batches: list[Batch]) -> int:
    """Of forward and backward, which is twice the forward: the layers' products for every id, the
    head's for every trained one, attention's two for every query and key that may meet. What is
    computed twice counts once."""
    config, (*layers, head) = model.config, step_weights(model)
    ids = sum(int((batch.segments >= 0).sum()) for batch in batches)
    trained = sum(int(batch.mask.sum()) for batch in batches)
    pairs = 0
    for segments in itertools.chain.from_iterable(batch.segments for batch in batches):
        prefix, *own = torch.bincount(segments[segments >= 0]).tolist()
        pairs += sum(n * (n + 1) // 2 for n in [prefix, *own]) + prefix * sum(own)
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    forward = 2 * ids * sum(w.numel() for w in layers) + 2 * trained * head.numel()
    return 3 * (forward + 4 * width * pairs)


def training_row(options, name: str) -> tuple[dict, list[float], float]:
    """One of the two passes: its figures, the log-probs of the trained tokens, and the loss."""
    model, _ = open_model(options)
    rng, vocab = random.Random(options.seed), model.config.vocab_size
    episodes, n = [], options.reflection
    for failure in random_failures(options.groups, options, vocab):
        for g, ids in enumerate(random_prompts(8, n, vocab, rng.random())):
            # The sampler's log-probs serve as the reference's, or the loss would be about 0.
            turn = Turn([], ids, [-10 - rng.random() for _ in ids], "", True)
            episodes.append(replace(failure, reflection=turn, reward=float(g % 2)))
    rrr.assign_advantages(episodes)
    batches = rrr.make_batches(episodes, "reflection", "token", 0, options.micro)
    batches = [unshare(batch) if name == "plain" else batch for batch in batches]
    batches = [batch.to(options.device) for batch in batches]
    runner, seen = Plain(model) if name == "plain" else model, []

    def work():
        seen.clear()
        for batch in batches:
            logps = rrr.trained_logps(runner, batch, 1.0)
            old, ref = logps.detach(), batch.sampled_logps
            loss, _ = rrr.grpo_loss(logps, old, batch.advantages, batch.weights, ref, 0.01)
            loss.backward()
            seen.append((old[batch.mask].tolist(), loss.item()))
        model.zero_grad()

    seconds, memory = best(options.runs, work), peak_memory(options.device)
    trained, flops = len(episodes) * n, useful_flops(model, batches)
    ids = sum(batch.ids.numel() for batch in batches)
    row = {"pass": name, "ids": ids, "trained": trained, "seconds": seconds, "ids/s": ids / seconds}
    row |= {"trained/s": trained / seconds, "TFLOP/s": flops / seconds / 1e12}
    row |= {"MFU": flops / seconds / peak_flops(options), "peak GB": memory / 1e9}
    return row, [logp for logps, _ in seen for logp in logps], sum(loss for _, loss in seen)


def training(options) -> list[dict]:
    """trained_logps, grpo_loss and backward for groups of 8: the shared prefix against the plain
    pass, which runs the prefix once for each reflection; as many groups at a time in both. MFU:
    useful FLOP/s over those of a large square product. Both must find the same log-probs."""
    shared, ours, loss = alone(training_row, options, "shared prefix")
    plain, theirs, its_loss = alone(training_row, options, "plain")
    plain["time, of shared"] = plain["seconds"] / shared["seconds"]
    plain["memory, of shared"] = plain["peak GB"] / shared["peak GB"]
    plain["worst logp gap"] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    plain["loss gap"] = abs(its_loss / loss - 1)
    return [shared, plain]


# ---- a whole step ----


class Alternating(Countdown):
    """Random weights solve nothing: every second answer is called right, so all groups have signal.
    The instructions are Countdown's."""

    def __init__(self):
        self.calls = itertools.count()

    def verify(self, problem, text):
        return Verdict(next(self.calls) % 2 == 0, "wrong")


class Step:
    """A training step of the program, again and again, on random failures and with turns of fixed
    lengths: there is no stop id."""

    def __init__(self, model: Decoder, chat: Chat, options):
        self.pool = random_failures(options.failures, options, model.config.vocab_size)
        sizes = {"batch_size": options.failures, "group_size": options.group}
        sizes |= {"reflection_tokens": options.reflection, "retry_tokens": options.retry}
        sizes |= {"attempt_tokens": len(self.pool[0].attempt.ids)}
        sizes |= {"sample_rows": options.failures * options.group}
        sizes |= {"micro_batch_tokens": options.micro, "checkpointing": options.checkpointing}
        where = {"device": options.device, "dtype": options.dtype, "seed": options.seed}
        self.config = train.Config(**sizes, **where)
        self.model, self.reference = model, copy.deepcopy(model)
        self.optimizer = train.MasterAdamW(model.parameters(), self.config.lr, 0.0)
        chat.stop_ids = NO_STOP
        self.rollout = Rollout(model, chat, Alternating(), self.config)

    def run(self) -> dict[str, float]:
        """Seconds by stage. The program's own sample_step, make_batches and update run; a clock is
        wrapped around what they call."""
        config, optimizer, clock, start = self.config, self.optimizer, Clock(), now()
        of_reference = clock.wrap("reference", rrr.trained_logps)

        def logps(model, *rest):
            return (of_reference if model is self.reference else rrr.trained_logps)(model, *rest)

        with contextlib.ExitStack() as patches:
            for name in ("reread", "reflect", "retry"):
                timed = clock.wrap(name, getattr(self.rollout, name))
                patches.enter_context(mock.patch.object(self.rollout, name, timed))
            timed = clock.wrap("optimizer", optimizer.step)
            patches.enter_context(mock.patch.object(optimizer, "step", timed))
            patches.enter_context(mock.patch.object(train, "trained_logps", logps))
            episodes, _ = train.sample_step(0, self.rollout, config, self.pool)
            cap, budget = config.reflection_tokens, config.micro_batch_tokens
            how = config.train_on, config.loss_norm, cap, budget
            batches = clock.wrap("batch", rrr.make_batches)(episodes, *how)
            self.largest = max(batch.ids.numel() for batch in batches)
            update = clock.wrap("update", train.update)
            self.figures = update(self.model, self.reference, optimizer, batches, config, 0)
        total, seconds = now() - start, clock.seconds
        rest = seconds.pop("update") - seconds["reference"] - seconds["optimizer"]
        seconds["forward+backward"] = rest
        return seconds | {"other": total - sum(seconds.values())}


def step(options) -> list[dict]:
    """A training step by stage: reread (prefill of the failures), reflect and retry (read the
    instruction, fork, write, verify), batch, the reference's log-probs, the optimizer's step on its
    float32 masters, forward and backward (which hands the gradients to the masters). The gap is
    between the sampler's log-probs and the trainer's."""
    work = Step(*open_model(options), options)
    stages = min((work.run() for _ in range(options.runs)), key=lambda run: sum(run.values()))
    total, count = sum(stages.values()), options.failures * options.group
    rows = [{"stage": k, "seconds": v, "share": v / total} for k, v in stages.items()]
    sampled = count * (options.reflection + options.retry) / (stages["reflect"] + stages["retry"])
    all_ = {"stage": "all", "seconds": total, "share": 1.0, "episodes": count}
    return [*rows, {**all_, "sampled tok/s": sampled, "worst gap": work.figures["gap_max"]}]


def growth(options) -> list[dict]:
    """How a step's seconds grow on a small random model (256 wide, 4 layers) when one size doubles
    and the others stay (4 failures x 4, prefix 64, turns of 16); x: over the line before."""
    base = {"failures": 4, "group": 4, "prefix": 64, "reflection": 16, "retry": 16, "layers": 4}
    axes = {"group": (2, 4, 8, 16), "failures": (2, 4, 8, 16), "prefix": (64, 128, 256, 512)}
    rows = []
    Step(random_model(SMALL, options), Chat(ROOT / "tiny"), options).run()  # warm-up
    for axis, values in {**axes, "reflection": (16, 32, 64), "layers": (4, 8)}.items():
        before = {}
        for value in values:
            sizes = base | {axis: value}
            model = random_model(SMALL, options, num_hidden_layers=sizes["layers"])
            sizes = argparse.Namespace(**{**vars(options), **sizes})
            work = Step(model, Chat(ROOT / "tiny"), sizes)
            runs = [work.run() for _ in range(options.runs)]
            row = {"size": axis, "value": value}
            for name in ("reflect", "retry", "forward+backward"):
                row[name] = min(run[name] for run in runs)
                row[f"{name} x"] = row[name] / before[name] if before else None
            rows.append(row)
            before = row
    return rows


def memory_of_a_step(options) -> tuple[dict[str, float], float]:
    """Predicted GB by name, and the peak in GB that a step adds to an empty process."""
    empty = peak_memory(options.device)
    work = Step(*open_model(options), options)
    work.run()
    used = peak_memory(options.device) - empty
    config = replace(work.config, micro_batch_tokens=work.largest)  # what it was, not its limit
    prompt = len(work.pool[0].attempt.prompt_ids)
    return train.predict_memory(config, work.model.config, prompt), used / 1e9


def memory(options) -> list[dict]:
    """train.predict_memory for the step above, against what such a step took in a process of its
    own: the GPU's tensors, or resident memory beyond that of the empty process. `sampling` and
    `training` are the two peaks that are predicted; the larger is compared."""
    predicted, used = alone(memory_of_a_step, options)
    rows = [{"what": name, "GB": size} for name, size in predicted.items()]
    peak = max(predicted["sampling"], predicted["training"])
    return [*rows, {"what": "used", "GB": used, "of predicted": used / peak}]


# ---- peers ----


def alternate(options, model: Decoder, peer: str, theirs) -> list[dict]:
    """We and theirs(prompts, new), which returns seconds, take turns. Each round has prompts of its
    own: a peer that remembers prefixes shall gain nothing by it. A short round comes first."""
    rows, new = [], options.new
    for batch in options.batches:
        rates = []
        for i in range(options.rounds + 1):
            some = random_prompts(batch, options.prompt, model.config.vocab_size, options.seed, i)
            if i == 0:
                sample(model, some, 4)
                theirs(some, 4)
            else:
                rates.append([batch * new / sum(sample(model, some, new))])
                rates[-1].append(batch * new / theirs(some, new))
        rounds = dict(enumerate(rates, start=1))
        a, b = rounds["median"] = [statistics.median(column) for column in zip(*rates)]
        for name, (ours, its) in rounds.items():
            rows.append({"batch": batch, "round": name, "ours tok/s": ours, f"{peer} tok/s": its})
        rows[-1]["ours, of peer"] = a / b
    return rows


def against_transformers(options) -> list[dict]:
    """transformers' generate in this process, on the same weights and prompts: new tokens a second,
    prefill included, in alternation."""
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


def serve_vllm(options) -> None:
    """Runs in vLLM's own interpreter: opens the folder once, then answers each line of JSON on
    stdin by one on stdout, which is marked, for vLLM prints there, too."""
    import vllm

    more = {"gpu_memory_utilization": 0.5} if options.device == "cuda" else {}  # we are there too
    llm = vllm.LLM(
        options.serve_vllm,
        dtype=options.dtype,
        max_model_len=max(1024, options.prompt + options.new),
        max_num_seqs=max(options.batches),
        enforce_eager=options.eager,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **more,
    )
    print(MARK + json.dumps(vllm.__version__), flush=True)
    for line in sys.stdin:
        prompts, new = json.loads(line)
        how = {"max_tokens": new, "ignore_eos": True, "detokenize": False}
        start = time.perf_counter()
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        done = llm.generate(inputs, vllm.SamplingParams(temperature=1.0, **how), use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == new for output in done)
        print(MARK + json.dumps(seconds), flush=True)


MARK = "BENCH "


def against_vllm(options) -> list[dict]:
    """vLLM in a process of its own, with as many threads as we have, compiled unless --eager: new
    tokens a second, prefill included, in alternation. Like ours, its threads are not bound to
    cores; by default (VLLM_CPU_OMP_THREADS_BIND=auto) it binds them and leaves one core out."""
    model, chat = open_model(options)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {
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
    """A whole step of ours against an optimizer step of TRL's GRPOTrainer, in alternation after one
    of each to warm up: the same prefixes, group size and reflection length, rewards that alternate,
    a reference model. TRL has neither retries nor verification, so our step without its retries
    stands beside; it runs each prefix once for each reflection, we once for a group. Its
    micro-batches are of one group, ours of --micro ids. In bfloat16 its AdamW moves bfloat16
    weights, ours float32 masters."""
    import transformers
    import trl
    from datasets import Dataset

    model, chat = open_model(options)
    work, seconds, lengths = Step(model, chat, options), [], set()
    read = [failure.attempt.prompt_ids + failure.attempt.ids for failure in work.pool]
    prompts = [ids + chat.glue(Alternating.reflect, ids[-1]) for ids in read]

    def reward(completion_ids, **_):
        lengths.update(map(len, completion_ids))
        return [float(i % 2) for i in range(len(completion_ids))]

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = now()

        def on_step_end(self, *_, **__):
            theirs, ours = now() - self.start, work.run()
            seconds.append([sum(ours.values()), sum(ours.values()) - ours["retry"], theirs])

    settings = {"use_cpu": options.device == "cpu", "bf16": options.dtype == "bfloat16"}
    settings |= {"beta": work.config.kl_beta, "learning_rate": work.config.lr, "temperature": 1.0}
    settings |= {"num_generations": options.group, "max_completion_length": options.reflection}
    settings |= {"generation_kwargs": {"min_new_tokens": options.reflection}, "num_iterations": 1}
    settings |= {"per_device_train_batch_size": options.group}
    settings |= {"gradient_checkpointing": options.checkpointing}
    settings |= {"gradient_accumulation_steps": options.failures, "max_steps": options.rounds + 1}
    settings |= {"logging_strategy": "no", "save_strategy": "no", "report_to": "none"}
    with folder_of(model, chat, options) as folder, tempfile.TemporaryDirectory() as out:
        dtype = getattr(torch, options.dtype)
        trainer = trl.GRPOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            reward,
            args=trl.GRPOConfig(output_dir=out, disable_tqdm=True, **settings),
            train_dataset=Dataset.from_dict({"prompt": list(map(str, range(len(prompts))))}),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[Turns],
        )
        # The very ids of our prefixes, which no text would give.
        ids = {"side_effect": lambda some: ([prompts[int(p)] for p in some], None, {})}
        with mock.patch.object(trainer, "_tokenize_prompts", **ids):
            trainer.train()
    assert lengths == {options.reflection}
    rounds = dict(enumerate(seconds[1:], start=1))
    rounds["median"] = [statistics.median(column) for column in zip(*seconds[1:])]
    keys = ["ours s", "ours without retries s", f"TRL {trl.__version__} s"]
    rows = [{"round": name, **dict(zip(keys, some))} for name, some in rounds.items()]
    ours, bare, theirs = rounds["median"]
    rows[-1] |= {"TRL, of ours": theirs / ours, "of ours without retries": theirs / bare}
    return rows


# ---- tables ----


SECTIONS = {f.__name__: f for f in (sampling, uneven, training, step, growth, memory)}
PEERS = {"transformers": against_transformers, "vllm": against_vllm, "trl": against_trl}
SIZES = {  # of options that are not given; with a peer, or on a GPU, those of a real step
    "small": {"new": 32, "failures": 2, "group": 4, "prefix": 96, "reflection": 32, "retry": 32},
    "real": {"new": 128, "failures": 8, "group": 8, "prefix": 300, "reflection": 100, "retry": 100},
    "cpu": {"batches": [8, 32], "groups": 1, "runs": 2, "micro": 2048},
    "cuda": {"batches": [32, 128], "groups": 8, "runs": 5, "micro": 8192},
}


def show(title: str, rows: list[dict]) -> None:
    """Aligned text: a column for each key that a row has, in the order in which they come."""

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
    date = datetime.datetime.now().isoformat(timespec="seconds")
    told = {"date": date, "command": " ".join(sys.argv), "machine": machine}
    told |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return told | vars(options)


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, real = parser.add_argument, "; with a peer or on a GPU"
    add("--model", default="smollm2-135m-shapes", help=f"random: {', '.join(SHAPES)}; or a folder")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--only", nargs="+", choices=SECTIONS, help="sections to run [all; with a peer none]")
    add("--against", action="append", choices=PEERS, default=[], help="a peer; may be repeated")
    add("--peer_python", default=sys.executable, help="the interpreter in which vLLM is installed")
    add("--eager", action="store_true", help="vLLM does not compile")
    add("--rounds", type=int, default=3, help="alternations with a peer [3]")
    add("--runs", type=int, help="runs of which the fastest counts [2; on a GPU 5]")
    add("--batches", type=int, nargs="+", help="rows that are sampled [8 32; on a GPU 32 128]")
    add("--prompt", type=int, default=100, help="tokens of a sampled row's prompt [100]")
    add("--new", type=int, help=f"tokens that a row samples [32{real} 128]")
    add("--failures", type=int, help=f"of a step [2{real} 8]")
    add("--group", type=int, help=f"reflections on each failure of a step [4{real} 8]")
    add("--prefix", type=int, help=f"tokens before a reflection [96{real} 300]")
    add("--reflection", type=int, help=f"tokens of a reflection [32{real} 100]")
    add("--retry", type=int, help=f"tokens of a retry [32{real} 100]")
    add("--groups", type=int, help="groups of the training pass [1; on a GPU 8]")
    add("--micro", type=int, help="ids of a training pass, at most [2048; on a GPU 8192]")
    add("--checkpointing", action="store_true", help="recompute activations in backward passes")
    add("--seed", type=int, default=0)
    add("--out", default="bench.json", help="[bench.json]")
    add("--serve_vllm", help=argparse.SUPPRESS)  # how --against vllm starts its peer
    options = parser.parse_args(argv)
    options.device, options.dtype = pick_device_and_dtype(options)
    size = "real" if options.against or options.device == "cuda" else "small"
    for name, value in {**SIZES[size], **SIZES[options.device]}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(argv=None) -> None:
    options = parse(argv)
    if options.serve_vllm:
        serve_vllm(options)
        return
    content = {"about": about(options), "tables": {}}
    told = ("date", "command", "model", "dtype", "machine", "threads", "torch")
    print("\n".join(f"{key:8} {content['about'][key]}" for key in told))
    chosen = {name: SECTIONS[name] for name in options.only or ([], SECTIONS)[not options.against]}
    chosen |= {f"against {name}": PEERS[name] for name in options.against}
    for name, section in chosen.items():
        try:
            rows = section(options)
        except torch.OutOfMemoryError as error:  # on a GPU; the other sections may fit
            rows = [{"out of memory": str(error).partition(". ")[0]}]
        show(f"{name}: {' '.join(section.__doc__.split())}", rows)
        content["tables"][name] = rows
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n")  # a later one may fail
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
