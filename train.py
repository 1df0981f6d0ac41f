"""Train a model to reflect.  python train.py [--task countdown] [--model qwen2.5-1.5b] ...

`train`, at the end, is the whole story in a dozen steps. The method itself is in rrr.py.
"""

import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from eval import (
    Common,
    chunks,
    evaluate,
    held_out,
    is_mended,
    open_model,
    parse,
    percent,
    pick_device_and_dtype,
    seeded,
    table,
)
from model import ModelConfig, UserError, check, explain, load, save
from rrr import (
    HEAD_CHUNK,
    TRAINED_TURNS,
    Episode,
    Method,
    Rollout,
    assign_advantages,
    grpo_loss,
    make_batches,
    trained_logps,
)


@dataclass
class Config(Common, Method):
    failures: str = "pool"  # pool: the untrained model's (the paper); online: fresh ones each step
    pool_problems: int = 2000  # training problems that the pool attempts
    pool_attempts: int = 1  # attempts at each of them (the paper: up to 64)
    pool_dir: str = "runs/pools"  # pools are kept here, for later runs of the same model and task
    steps: int = 200  # training steps, each a batch of failures
    batch_size: int = 32  # failures in a step (the paper: 256)
    lr: float = 5e-7  # peak learning rate of AdamW (the paper's)
    warmup_ratio: float = 0.03  # share of the steps in which the rate rises, before its cosine fall
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    optimizer_device: str = "same"  # same, or cpu: masters, moments, gradients in main memory
    micro_batch_tokens: int = 16384  # ids of one forward and backward pass, padding included
    checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    save_every: int = 50  # steps between checkpoints (one is always written at the end)
    out: str | None = None  # the run's folder, a new one (default: runs/TASK-MODEL-sSEED, numbered)
    resume: str | None = None  # go on with a run's folder; other options must be the run's own

    def validate(self) -> None:
        """Raises UserError for what cannot work, by name, before any time is spent."""
        choices = {
            "failures": ("pool", "online"),
            "train_on": tuple(TRAINED_TURNS),
            "loss_norm": ("token", "sequence", "constant"),
            "optimizer_device": ("same", "cpu"),
        }
        for name, allowed in choices.items():
            found = getattr(self, name)
            check(found in allowed, f"--{name} must be {' or '.join(allowed)}, found '{found}'.")
        at_least_one = "steps batch_size pool_problems pool_attempts save_every micro_batch_tokens"
        for name in [*at_least_one.split(), "retries_per_reflection", "updates_per_batch"]:
            found = getattr(self, name)
            check(found >= 1, f"--{name} must be at least 1, found {found}.")
        check(self.group_size >= 2, "--group_size must be at least 2: siblings are compared.")
        check(self.temperature > 0, "--temperature must be above 0: siblings must differ.")
        check(
            self.train_on == "reflection" or self.retries_per_reflection == 1,
            f"--train_on {self.train_on} needs --retries_per_reflection 1 (which to train?).",
        )


# ---- AdamW with float32 masters ----


class MasterAdamW:
    """torch.optim.AdamW on float32 copies of the weights. At the paper's learning rate (5e-7) a
    step is less than half a unit in the last place of most bfloat16 weights: rounded to nearest,
    they would never move. Gradients are summed in float32 too, each taken over in the backward pass
    (the weights' `grad` stays empty). Float32 weights are their own masters."""

    def __init__(self, parameters, lr, weight_decay, device="same"):
        self.parameters = list(parameters)
        where = [device if device == "cpu" else p.device for p in self.parameters]
        masters = [p.detach().to(d, torch.float32) for p, d in zip(self.parameters, where)]
        self.masters = [torch.nn.Parameter(master) for master in masters]
        settings = {"betas": (0.9, 0.99), "weight_decay": weight_decay, "fused": True}
        self.adamw = torch.optim.AdamW(self.masters, lr, **settings)

        def collect(master, p):  # during the backward pass, as soon as it is there
            grad = p.grad.to(master.device, torch.float32)
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            p.grad = None

        for p, master in zip(self.parameters, self.masters):
            p.register_post_accumulate_grad_hook(partial(collect, master))

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> float | None:
        """Clip, step, round the weights, forget the gradients. Returns the gradient's norm before
        clipping; None where it is not finite, and then nothing has moved."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if math.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
            for p, master in zip(self.parameters, self.masters):
                p.copy_(master)
        self.adamw.zero_grad()
        return norm if math.isfinite(norm) else None

    def state(self) -> dict:
        masters = [master.detach() for master in self.masters]
        return {"masters": masters, "adamw": self.adamw.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine to 0 just beyond the last step. `step` counts from 0."""
    warm = max(1, round(config.warmup_ratio * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ---- failures ----


def build_pool(rollout: Rollout, config: Config, stopping: list) -> list[Episode]:
    """The paper's failure set: attempts of the untrained model at training problems, the failures
    kept. Saved batch by batch, under a name that tells model, task and sampling apart, so that an
    interrupted pool goes on and a whole one is reused."""
    weights = hashlib.sha256()
    for p in rollout.model.parameters():
        weights.update(p.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    keys = "task data difficulty pool_problems pool_attempts attempt_tokens temperature seed"
    options = [getattr(config, key) for key in ["sample_rows", *keys.split()]]
    problems = rollout.task.problems("train", config.pool_problems, config.seed)
    check(problems, "the data is too small: no problem is left to train on (four in five are).")
    identity = [weights.hexdigest(), rollout.prompt(problems[0]), *options]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    path = Path(config.pool_dir) / f"{config.task}-{Path(config.model).name}-{name}.jsonl"

    todo = chunks([p for p in problems for _ in range(config.pool_attempts)], config.sample_rows)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    episodes, batch = [], 0
    while batch < len(todo) and len(episodes) + len(todo[batch]) <= len(lines):  # whole batches
        some = lines[len(episodes) : len(episodes) + len(todo[batch])]
        episodes += [Episode.from_json(line) for line in some]
        batch += 1
    write(path, "".join(line + "\n" for line in lines[: len(episodes)]))
    for i in tqdm(range(batch, len(todo)), "failure pool", unit="batch", disable=None, leave=False):
        new, _ = rollout.attempt(todo[i], seeded(rollout.model, config.seed, "pool", i))
        write(path, "".join(episode.to_json() + "\n" for episode in new), append=True)
        episodes += new
        if stopping:
            sys.exit(f"stopped; {path} keeps {len(episodes)} attempts, for the next run to go on.")

    failures = [episode for episode in episodes if not episode.attempt_verdict["ok"]]
    print(f"failure pool: {len(failures)} failures in {len(episodes)} attempts ({path})")
    solved = dict.fromkeys((problem["key"] for problem in problems), 0)
    for episode in episodes:
        solved[episode.problem["key"]] += episode.attempt_verdict["ok"]
    for k in range(config.pool_attempts + 1):
        count = list(solved.values()).count(k)
        bar = "#" * math.ceil(40 * count / len(solved))
        print(f"  solved {k:2} times of {config.pool_attempts}: {count:5} problems {bar}")
    check(failures, "the model failed at none of these problems: choose harder ones.")
    return failures


def failures_of_step(step: int, rollout: Rollout, config: Config, pool: list[Episode] | None):
    """The step's failed attempts, their conversations, and (online) the first-try rate."""
    if pool:  # epoch after epoch, each in its own order
        failures, orders = [], {}
        for i in range(step * config.batch_size, (step + 1) * config.batch_size):
            epoch, place = divmod(i, len(pool))
            if epoch not in orders:
                rng = random.Random(f"{config.seed} epoch {epoch}")
                orders[epoch] = rng.sample(range(len(pool)), len(pool))
            failures.append(pool[orders[epoch][place]])
        return failures, rollout.reread(failures), None
    problems = rollout.task.problems("train", 2 * config.batch_size, f"{config.seed} step {step}")
    generator = seeded(rollout.model, config.seed, "attempt", step)
    episodes, conversations = rollout.attempt(problems, generator)
    rows = [i for i, episode in enumerate(episodes) if not episode.attempt_verdict["ok"]]
    first_try = 1 - len(rows) / len(episodes)
    rows = rows[: config.batch_size]
    return [episodes[row] for row in rows], conversations.select(rows), first_try


# ---- one step ----


def sample_step(step: int, rollout: Rollout, config: Config, pool):
    """The step's episodes, rewarded, in parts of sample_rows conversations; the first-try rate."""
    failures, conversations, first_try = failures_of_step(step, rollout, config, pool)
    episodes = []
    size = max(1, config.sample_rows // (config.group_size * config.retries_per_reflection))
    for i, rows in enumerate(chunks(list(range(len(failures))), size)):
        generator = seeded(rollout.model, config.seed, "reflect", step, i)
        some, branch = [failures[row] for row in rows], conversations.select(rows)
        reflected, branch = rollout.reflect(some, branch, config.group_size, generator)
        rollout.retry(reflected, branch, config.retries_per_reflection, generator)
        for episode in reflected:
            episode.group += rows[0]
        episodes += reflected
    assign_advantages(episodes, config.scale_advantages)
    return episodes, first_try


def update(model, reference, optimizer, batches, config: Config, step: int) -> dict:
    """updates_per_batch optimizer steps on the same micro-batches. Returns figures for the log."""
    batches = [batch.to(next(model.parameters()).device) for batch in batches]
    T, updates = config.temperature, config.updates_per_batch
    with torch.no_grad():
        refs = [trained_logps(reference, b, T) if reference else None for b in batches]
        # One update needs no log-probs from before it: its ratio is 1.
        olds = [trained_logps(model, b, T) if updates > 1 else None for b in batches]
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    sums = dict.fromkeys(("kl", "clip_fraction", "gap_mean", "gap_kl"), 0.0)
    loss_sum, gap_max, norms = 0.0, 0.0, []
    for i in range(updates):
        for batch, ref, old in zip(batches, refs, olds):
            logps = trained_logps(model, batch, T)  # (N, T)
            old = logps.detach() if old is None else old
            how = ref, config.kl_beta, config.clip_low, config.clip_high
            loss, seen = grpo_loss(logps, old, batch.advantages, batch.weights, *how)
            loss.backward()
            loss_sum += loss.item() / updates
            seen = {name: values / updates for name, values in seen.items()}
            if i == 0:  # before the weights move, trainer and sampler should agree
                gap = logps.detach() - batch.sampled_logps
                seen |= {"gap_mean": gap.abs(), "gap_kl": -gap}
                gap_max = max(gap_max, gap[batch.mask].abs().max().item())
            for name, values in seen.items():
                sums[name] += values[batch.mask].sum().item() / tokens
        norms.append(optimizer.step(learning_rate(step, config), config.max_grad_norm))
    result = {"loss": loss_sum, "grad_norm": norms[-1], "skipped": norms.count(None)}
    return result | sums | {"gap_max": gap_max, "trained_tokens": tokens}


def measure(episodes: list[Episode], batches, first_try, seconds: dict) -> dict:
    """What a step's episodes show, and how fast it was."""
    groups, turns = {}, {"attempt": [], "reflection": [], "retry": []}
    for episode in episodes:
        groups.setdefault(episode.group, set()).add(episode.reward)
        turns["attempt"].append(episode.attempt)
        turns["reflection"].append(episode.reflection)
        turns["retry"] += episode.retries
    n = max(1, len(episodes))
    reward = sum(episode.reward for episode in episodes) / n
    lengths = {name: sum(len(turn.ids) for turn in some) for name, some in turns.items()}
    passed = sum(int((batch.segments >= 0).sum()) for batch in batches)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    sampled = (lengths["reflection"] + lengths["retry"]) / seconds["sample"]
    cut = {k: sum(not t.stopped for t in some) / max(1, len(some)) for k, some in turns.items()}
    return {
        "reward": reward,
        "first_try": first_try,
        "second_try": None if first_try is None else first_try + (1 - first_try) * reward,
        "groups": len(groups),
        "groups_with_signal": sum(len(rewards) > 1 for rewards in groups.values()),
        "reflection_tokens": lengths["reflection"] / n,
        **{f"truncated_{name}": share for name, share in cut.items()},
        "sampled_tokens_per_second": round(sampled),
        "training_tokens_per_second": round(passed / seconds["train"]),
        "memory_gb": round(memory / 1e9, 2),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


# ---- memory, before it is used ----


def predict_memory(config: Config, model: ModelConfig, prompt: int) -> dict[str, float]:
    """GB on the device by what takes them, for prompts of that many tokens: by count, before a run
    starts. `sampling` and `training` are the two peaks; the largest turn caps are assumed."""
    device, dtype = pick_device_and_dtype(config)
    cuda, size = device == "cuda", 2 if dtype == "bfloat16" else 4
    C, inner, V, D = model.hidden_size, model.intermediate_size, model.vocab_size, model.head_dim
    L, H, KV = model.num_hidden_layers, model.num_attention_heads, model.num_key_value_heads
    weights = L * C * ((2 * H + 2 * KV) * D + 3 * inner) + (2 - model.tie_word_embeddings) * V * C
    here = config.optimizer_device == "same"
    kept = 12 if size == 2 else 8  # bytes by weight: moments, and masters (float32 are their own)
    steady = {
        "weights": size * weights,
        "reference": size * weights * (config.kl_beta > 0),
        "masters and moments": kept * weights * here,
    }
    prefix, own = prompt + config.attempt_tokens, config.reflection_tokens
    token = config.sample_rows * 2 * L * KV * D * size  # of every conversation
    cache = token * (prefix + own + config.retry_tokens)
    # While an evaluation reflects, its attempts' cache is still there. On a GPU there is the fixed
    # memory of CUDA graphs, too, and on a CPU the blocked weights.
    sampling = {"cache": cache * (2 if cuda else 1) + token * prefix}
    sampling["logits"] = 3 * config.sample_rows * V * 4
    sampling["blocked weights"] = 0 if cuda else size * weights
    tokens = max(config.micro_batch_tokens, prefix + config.group_size * own)
    keys = (prefix + own) / own  # for each trained token: a reflection's, and its prefix's again
    inside = size * (6 * C + 5 * H * D + (6 + 2 * keys) * KV * D + 5 * inner) + 8 * C  # a layer's
    training = {
        "gradients": 4 * weights * here,
        "activations": tokens * (L * C * size + inside if config.checkpointing else L * inside),
        "mask": tokens * (prefix + own) * (H // KV) * size,
        "head": min(HEAD_CHUNK, tokens) * V * 8 + V * C * (size + 4 * (not cuda)),
        "kept by graphs": cache if cuda else 0,
    }
    parts = steady | sampling | training
    total = sum(steady.values())
    parts["sampling"] = total + sum(sampling.values())
    parts["training"] = total + sum(training.values())
    return {name: value / 1e9 for name, value in parts.items()}


# ---- files ----


def write(path: Path, text: str, append: bool = False) -> None:
    """Text to a file, in a folder that is made if need be; UserError where that fails."""
    with explain(f"{path} cannot be written", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a" if append else "w", encoding="utf-8") as file:
            file.write(text)


def read(path: Path) -> list[str]:
    with explain(f"{path} cannot be read", OSError, UnicodeDecodeError):
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def save_checkpoint(run: Path, step: int, model, chat, optimizer, skipped: int) -> None:
    """RUN/step-NNNNNN: a Hugging Face folder, with the optimizer's tensors and the step beside the
    weights. Written beside and renamed, so that it is there whole or not at all; then the one
    before it goes."""
    final, beside = run / f"step-{step:06}", run / f"writing-{step:06}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        save(model, chat, beside)
        state = {"step": step, "skipped_in_a_row": skipped, "optimizer": optimizer.state()}
        torch.save(state, beside / "state.pt")
        os.rename(beside, final)
    except (OSError, RuntimeError, UserError) as error:  # torch.save's full disk is a RuntimeError
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} cannot be written to {run} ({error}): make room, then "
            "--resume; what was saved before is untouched."
        ) from None
    for old in run.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def restore_checkpoint(run: Path, optimizer) -> tuple[int, int]:
    """Fills the optimizer from the last checkpoint, and cuts what the logs say of later steps.
    Returns the step and the number of updates skipped in a row."""
    folder = max(run.glob("step-*"))
    device = next(iter(optimizer.masters)).device
    with explain(f"the checkpoint {folder} is damaged", Exception):  # whatever torch.load raises
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
        optimizer.restore(state["optimizer"])
    for path in (run / "metrics.jsonl", run / "episodes.jsonl"):
        lines = [line for line in read(path) if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= state["step"]]
        write(path, "".join(line + "\n" for line in kept))
    return state["step"], state["skipped_in_a_row"]


def open_run(config: Config, given: set) -> tuple[Path, Config]:
    """The run's folder: a new one, or on --resume an old one with its own options. Raises UserError
    where the folder exists already, or a given option is not the run's."""
    if config.resume:
        run = Path(config.resume)
        with explain(f"{run} is not the folder of a run", OSError, ValueError, TypeError):
            stored = json.loads((run / "config.json").read_text(encoding="utf-8"))
            old = Config(**stored)
        for name in sorted(given - {"resume"}):
            check(
                getattr(config, name) == stored[name],
                f"--{name} {getattr(config, name)} is not what {run} was started with "
                f"({stored[name]}): resume it without that option, or start a new run.",
            )
        check(any(run.glob("step-*")), f"{run} has no checkpoint to resume from; start a new run.")
        return run, old
    base = f"runs/{config.task}-{Path(config.model).name}-s{config.seed}"
    names = [config.out] if config.out else [base, *(f"{base}-{i}" for i in range(2, 1000))]
    run = next((Path(name) for name in names if not Path(name).exists()), None)
    check(run, f"{names[-1]} exists already: choose another --out, or --resume {names[-1]}.")
    write(run / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    return run, config


# ---- the run ----


@contextmanager
def stage(name: str, seconds: dict):
    """Times a stage; where it runs out of memory, says which it was and what to lower."""
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError:
        lower = "lower --sample_rows, or the --attempt_tokens, --reflection_tokens, --retry_tokens"
        if name == "train":
            lower = "lower --micro_batch_tokens, set --checkpointing true or --optimizer_device cpu"
        raise UserError(f"out of GPU memory in the stage '{name}': {lower}.") from None
    seconds[name] = time.perf_counter() - start


def train(run: Path, config: Config, stopping: list, resumed: bool) -> None:
    """Open, collect failures, evaluate; sample, reward, update, log, save, again; evaluate."""
    seconds = {}
    with stage("load", seconds):
        model, chat, task = open_model(replace(config, model=str(run)) if resumed else config)
        weight, reference = next(model.parameters()), None
        if config.kl_beta > 0:
            reference, _ = load(config.model, weight.device, weight.dtype, config.context)
        model.checkpointing = config.checkpointing
        optimizer = MasterAdamW(
            model.parameters(), config.lr, config.weight_decay, config.optimizer_device
        )
    rollout, test = Rollout(model, chat, task, config), held_out(task, config)
    start, skipped = restore_checkpoint(run, optimizer) if resumed else (0, 0)
    print(f"{'resuming' if resumed else 'writing'} {run}", flush=True)
    longest = max(len(rollout.prompt(problem)) for problem in test)
    memory = predict_memory(config, model.config, longest)
    print("memory: {sampling:.1f} GB sampling, {training:.1f} training, predicted".format(**memory))

    pool = None
    with stage("pool", seconds):
        if config.failures == "pool" and resumed:
            pool = [Episode.from_json(line) for line in read(run / "pool.jsonl")]
        elif config.failures == "pool":
            pool = build_pool(rollout, config, stopping)
            write(run / "pool.jsonl", "".join(episode.to_json() + "\n" for episode in pool))
    with stage("evaluate", seconds):
        if not resumed:
            before, _ = evaluate(rollout, test, 0, desc="before")
            write(run / "eval.jsonl", json.dumps({"step": 0} | before) + "\n")
    before = json.loads(read(run / "eval.jsonl")[0])
    first, second = percent(before["first_try"]), percent(before["second_try"])
    print(f"before: first try {first}, second try {second}", flush=True)

    steps = range(start, config.steps)
    bar = tqdm(steps, "training", config.steps, initial=start, unit="step", disable=None)
    for step in bar:
        seconds = {}
        with stage("sample", seconds):
            episodes, first_try = sample_step(step, rollout, config, pool)
        cap, budget = config.reflection_tokens, config.micro_batch_tokens
        batches = make_batches(episodes, config.train_on, config.loss_norm, cap, budget)
        metrics = {"step": step + 1, "lr": learning_rate(step, config)}
        with stage("train", seconds):
            if batches:  # else no group has signal, and there is no step to make
                metrics |= update(model, reference, optimizer, batches, config, step)
        metrics |= measure(episodes, batches, first_try, seconds)
        write(run / "metrics.jsonl", json.dumps(metrics) + "\n", append=True)
        lines = [f'{{"step": {step + 1}, {episode.to_json()[1:]}\n' for episode in episodes]
        write(run / "episodes.jsonl", "".join(lines), append=True)

        figures = "reward {reward:.2f}, signal {groups_with_signal}/{groups}".format(**metrics)
        bar.set_postfix_str(figures)
        if bar.disable and (step + 1) % math.ceil(config.steps / 10) == 0:
            print(f"step {step + 1}/{config.steps}: {figures}", flush=True)
        skipped = skipped + 1 if metrics.get("skipped") else 0
        if skipped:
            bar.write(f"step {step + 1}: loss or gradient not finite, update skipped ({skipped}).")
        check(skipped < 10, "ten steps in a row were not finite: lower --lr, or use float32.")
        if stopping or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            with stage("save", seconds):
                save_checkpoint(run, step + 1, model, chat, optimizer, skipped)
        if stopping:
            bar.close()
            sys.exit(f"saved after step {step + 1}; go on with: python train.py --resume {run}")

    after, episodes = evaluate(rollout, test, 0, desc="after")
    write(run / "eval.jsonl", json.dumps({"step": config.steps} | after) + "\n", append=True)
    for episode in [episode for episode in episodes if is_mended(episode)][:3]:
        show(episode)
    used = json.loads(read(run / "metrics.jsonl")[-1])["memory_gb"]
    print(f"memory: {used:.1f} GB used at the peak")
    print(table({"before": before, "after": after}, task.errors))
    same = {"task": config.task, "data": config.data, "difficulty": config.difficulty}
    options = "".join(f" --{name} {value}" for name, value in same.items() if value)
    print(f"\n{run}: the model, metrics, episodes. Controls: python eval.py --model {run}{options}")


def show(episode: Episode) -> None:
    """One episode for the eye, the tokens that training would reward between brackets."""
    problem = {key: value for key, value in episode.problem.items() if key != "key"}
    print(f"\nA failure that was mended, {json.dumps(problem, ensure_ascii=False)[:300]}:")
    print(f"  attempt     {episode.attempt.text[:500]}   ({episode.attempt_verdict['detail']})")
    print(f"  reflection  [[ {episode.reflection.text[:500]} ]]")
    print(f"  retry       {episode.retries[0].text[:500]}\n")


def main(argv=None) -> None:
    stopping = []  # filled by the first Ctrl-C; the second one stops at once

    def interrupt(*_):
        if stopping:
            raise KeyboardInterrupt
        stopping.append(True)
        print("\nwill stop after this step, and save; Ctrl-C again: at once.", file=sys.stderr)

    try:
        config, given = parse(Config, sys.argv[1:] if argv is None else argv, __doc__)
        config.validate()
        run, config = open_run(config, given)
        signal.signal(signal.SIGINT, interrupt)
        try:
            train(run, config, stopping, "resume" in given)
        finally:
            if not any(run.glob("step-*")) and not (run / "metrics.jsonl").exists():
                shutil.rmtree(run, ignore_errors=True)  # nothing has happened yet
    except UserError as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped at once; what was saved before is untouched.")


if __name__ == "__main__":
    main()
