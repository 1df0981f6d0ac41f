"""Train a model to reflect.  python train.py [--task countdown] [--model qwen2.5-1.5b] [--resume RUN] ...

Read `run` first: it is the whole story, in a dozen steps. The method itself is in rrr.py.
"""

import errno
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
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from eval import Common, chunks, evaluate, held_out, open_model, parse, percent, seeded, table
from model import UserError, load, save
from rrr import TRAINED_TURNS, Episode, Method, Rollout, assign_advantages, grpo_loss, make_batches, trained_logps


@dataclass
class Config(Common, Method):
    failures: str = "pool"  # pool: failed attempts of the untrained model (the paper); online: fresh ones each step
    pool_problems: int = 2000  # training problems that the pool attempts
    pool_attempts: int = 1  # attempts at each of them (the paper: up to 64)
    pool_dir: str = "runs/pools"  # pools are kept here, for later runs of the same model and task
    steps: int = 200  # training steps, each a batch of failures
    batch_size: int = 32  # failures in a step (the paper: 256)
    lr: float = 5e-7  # peak learning rate of AdamW (the paper's)
    warmup_ratio: float = 0.03  # share of the steps in which the rate rises; then it falls as a cosine
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    optimizer_device: str = "same"  # same, or cpu: masters and moments in main memory (for GPUs of 24 GB)
    micro_batch_tokens: int = 16384  # ids of a forward and backward pass, padding included
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about 1.3 x the time
    save_every: int = 50  # steps between checkpoints (one is always written at the end)
    out: str | None = None  # the run's folder, which must not exist (default: runs/TASK-MODEL-sSEED, numbered)
    resume: str | None = None  # go on with a run's folder; other options must be the run's own


# ---- AdamW with float32 masters ----


class MasterAdamW:
    """torch.optim.AdamW on float32 copies of the weights. At the paper's learning rate (5e-7) a step is less
    than half a unit in the last place of most bfloat16 weights, and rounded to nearest they would never move.
    Gradients are summed in float32 too. Where the weights are float32 on the same device they are the masters."""

    def __init__(self, parameters, lr, weight_decay, device="same"):
        self.parameters = list(parameters)
        self.masters = []
        for p in self.parameters:
            master = p.detach().to("cpu" if device == "cpu" else p.device, torch.float32)
            self.masters.append(torch.nn.Parameter(master))
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))

    def collect(self):
        """After a backward pass: add the weights' gradients to the masters', and free them."""
        for p, master in zip(self.parameters, self.masters):
            if p.grad is not None:
                grad = p.grad.to(master.device, torch.float32)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                p.grad = None

    def step(self, lr, max_norm) -> float | None:
        """Clip, step, round the weights, forget the gradients. The gradient's norm before clipping; None, and
        nothing has moved, where it is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if math.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
            with torch.no_grad():
                for p, master in zip(self.parameters, self.masters):
                    p.copy_(master)  # the same memory where the weights are float32
        self.adamw.zero_grad(set_to_none=True)
        return norm if math.isfinite(norm) else None

    def tensors(self) -> dict:
        state = self.adamw.state
        named = {f"master.{i}": m.data for i, m in enumerate(self.masters)}
        for i, master in enumerate(self.masters):
            named |= {f"{key}.{i}": value.contiguous() for key, value in state[master].items()}
        return named

    def restore(self, named: dict):
        state = {}
        for name, tensor in named.items():
            key, i = name.split(".")
            if key == "master":
                self.masters[int(i)].data.copy_(tensor)
            else:
                state.setdefault(int(i), {})[key] = tensor
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": state, "param_groups": groups})


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine to 0 just beyond the last step. `step` counts from 0."""
    warm = max(1, round(config.warmup_ratio * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


# ---- failures ----


def build_pool(rollout: Rollout, config: Config, stopping: list) -> list[Episode]:
    """The paper's failure set: attempts of the untrained model at training problems, the failures kept. Saved
    chunk by chunk in pool_dir under a name that tells model, task and sampling apart, so that it can be
    interrupted, and is reused."""
    weights = hashlib.sha256()
    for p in rollout.model.parameters():
        weights.update(p.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    keys = ("task", "data", "difficulty", "pool_problems", "pool_attempts", "attempt_tokens", "temperature", "seed")
    identity = {key: getattr(config, key) for key in keys} | {"weights": weights.hexdigest()}
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    path = Path(config.pool_dir) / f"{config.task}-{Path(config.model).name}-{name}.jsonl"

    problems = rollout.task.problems("train", config.pool_problems, config.seed)
    if not problems:
        raise UserError("there is no training problem (four in five, by a hash of its key): the data is too small.")
    todo = chunks([p for p in problems for _ in range(config.pool_attempts)], config.sample_rows)
    episodes = []
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # an unfinished last line has no end
        episodes = [Episode.from_json(line) for line in lines]
    ready = 0
    while ready < len(todo) and len(todo[ready]) <= len(episodes) - sum(map(len, todo[:ready])):
        ready += 1
    episodes = episodes[: sum(map(len, todo[:ready]))]
    if ready < len(todo):
        write(path, "".join(episode.to_json() + "\n" for episode in episodes))
    for i in tqdm(range(ready, len(todo)), "failure pool", unit="batch", disable=None, leave=False):
        new, _ = rollout.attempt(todo[i], seeded(rollout.model, config.seed, "pool", i))
        write(path, "".join(episode.to_json() + "\n" for episode in new), append=True)
        episodes += new
        if stopping:
            sys.exit(f"stopped; {len(episodes)} of {len(problems) * config.pool_attempts} attempts are kept in {path}.")
    failures = [episode for episode in episodes if not episode.attempt_verdict["ok"]]
    print(f"failure pool: {len(failures)} failures in {len(episodes)} attempts at {len(problems)} problems ({path})")
    solved = {}
    for episode in episodes:
        solved.setdefault(episode.problem["key"], []).append(episode.attempt_verdict["ok"])
    histogram = [0] * (config.pool_attempts + 1)
    for verdicts in solved.values():
        histogram[min(sum(verdicts), config.pool_attempts)] += 1
    for k, count in enumerate(histogram):
        if count:
            print(f"  solved {k} of {config.pool_attempts}: {count:5} problems {'#' * math.ceil(40 * count / len(solved))}")
    if not failures:
        raise UserError("the model failed at none of these problems: choose a harder task or --difficulty.")
    return failures


def failures_of_step(step: int, rollout: Rollout, config: Config, pool: list[Episode] | None):
    """The step's failed attempts with their conversations, and the first-try rate (online only)."""
    if config.failures == "pool":
        chosen = []
        for i in range(step * config.batch_size, (step + 1) * config.batch_size):
            epoch, place = divmod(i, len(pool))
            order = list(range(len(pool)))
            random.Random(f"{config.seed} epoch {epoch}").shuffle(order)
            chosen.append(pool[order[place]])
        return chosen, rollout.reread(chosen), None
    problems = rollout.task.problems("train", 2 * config.batch_size, seed=f"{config.seed} step {step}")
    episodes, conversations = rollout.attempt(problems, seeded(rollout.model, config.seed, "attempt", step))
    rows = [row for row, episode in enumerate(episodes) if not episode.attempt_verdict["ok"]]
    first_try = 1 - len(rows) / len(episodes)
    rows = rows[: config.batch_size]
    return [episodes[row] for row in rows], conversations.select(rows) if rows else None, first_try


# ---- one step ----


def update(model, reference, optimizer, batches, config: Config, step: int) -> dict:
    """updates_per_batch optimizer steps on the micro-batches; returns what the log wants to know."""
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in batches]
    with torch.no_grad():
        refs = [reference and trained_logps(reference, batch, config.temperature) for batch in batches]
        # One update needs no log-probs from before it: the ratio is 1.
        once = config.updates_per_batch == 1
        olds = [None if once else trained_logps(model, batch, config.temperature) for batch in batches]
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    sums = dict.fromkeys(("kl", "clip_fraction", "gap_mean", "gap_kl"), 0.0)
    result = {"loss": 0.0, "grad_norm": None, "skipped": 0, "gap_max": 0.0}
    for i in range(config.updates_per_batch):
        for batch, ref, old in zip(batches, refs, olds):
            logps = trained_logps(model, batch, config.temperature)  # (N, G, R)
            loss, seen = grpo_loss(
                logps,
                logps.detach() if old is None else old,
                batch.advantages,
                batch.weights,
                ref,
                config.kl_beta,
                config.clip_low,
                config.clip_high,
            )
            loss.backward()
            optimizer.collect()
            result["loss"] += loss.item() / config.updates_per_batch
            if i == 0:  # before the weights move, trainer and sampler should agree
                gap = (logps.detach() - batch.sampled_logps)[batch.mask]
                seen |= {"gap_mean": gap.abs(), "gap_kl": -gap}
                result["gap_max"] = max(result["gap_max"], gap.abs().max().item())
            for name, values in seen.items():
                values = values[batch.mask] if values.shape == batch.mask.shape else values
                sums[name] += values.sum().item() / tokens
        norm = optimizer.step(learning_rate(step, config), config.max_grad_norm)
        result["skipped"] += norm is None
        result["grad_norm"] = norm
    for name in ("kl", "clip_fraction"):
        sums[name] /= config.updates_per_batch
    return result | sums | {"trained_tokens": tokens}


def describe(episodes: list[Episode], first_try) -> dict:
    """What the step's episodes show, before the update."""
    groups = {}
    for episode in episodes:
        groups.setdefault(episode.group, set()).add(episode.reward)
    turns = {
        "attempt": [episode.attempt for episode in episodes],
        "reflection": [episode.reflection for episode in episodes],
        "retry": [turn for episode in episodes for turn in episode.retries],
    }
    reward = sum(episode.reward for episode in episodes) / len(episodes)
    return {
        "reward": reward,
        "first_try": first_try,
        "second_try": None if first_try is None else first_try + (1 - first_try) * reward,
        "groups": len(groups),
        "groups_with_signal": sum(len(rewards) > 1 for rewards in groups.values()),
        "reflection_tokens": sum(len(turn.ids) for turn in turns["reflection"]) / len(episodes),
    } | {f"truncated_{k}": sum(not turn.stopped for turn in some) / len(some) for k, some in turns.items()}


# ---- files ----


def write(path: Path, text: str, append=False):
    """Text to a file, its folder made; a sentence where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a" if append else "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); mend that and go on with --resume.") from None


def save_checkpoint(run: Path, step: int, model, chat, optimizer, skipped: int):
    """RUN/step-NNNNNN: a Hugging Face folder with the optimizer's tensors and the step beside the weights. Written
    beside and renamed, so that it is there whole or not at all; then older ones go."""
    final, beside = run / f"step-{step:06}", run / f"writing-{step:06}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        save(model, chat, beside)
        safetensors.torch.save_file(optimizer.tensors(), beside / "optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps({"step": step, "skipped_in_a_row": skipped}))
        os.rename(beside, final)
    except (OSError, safetensors.SafetensorError, UserError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        raise UserError(
            f"the checkpoint of step {step} cannot be written to {run} ({'the disk is full' if full else error}); "
            "what was saved before is untouched."
        ) from None
    for old in run.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def restore_checkpoint(run: Path, optimizer) -> tuple[int, int]:
    """Fills the optimizer from the last checkpoint and cuts what the log says of later steps."""
    folder = max(run.glob("step-*"))
    try:
        state = json.loads((folder / "state.json").read_text())
        optimizer.restore(safetensors.torch.load_file(folder / "optimizer.safetensors"))
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"the checkpoint {folder} is damaged ({error}); it cannot be resumed.") from None
    for name in ("metrics.jsonl", "episodes.jsonl"):
        path = run / name
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= state["step"]]
            write(path, "".join(line + "\n" for line in kept))
    return state["step"], state["skipped_in_a_row"]


def open_run(config: Config, given: set) -> tuple[Path, Config, bool]:
    """The run's folder, new, or on --resume an old one with its own options. Raises UserError before anything
    is lost: where the folder exists already, or the options are not those of the run."""
    if config.resume:
        run = Path(config.resume)
        try:
            stored = json.loads((run / "config.json").read_text(encoding="utf-8"))
            old = Config(**stored)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{run} is not the folder of a run ({error}).") from None
        for name in sorted(given - {"resume"}):
            if getattr(config, name) != stored[name]:
                raise UserError(
                    f"--{name} {getattr(config, name)} is not what {run} was started with ({stored[name]}): "
                    "resume it without that option, or start a new run."
                )
        if not any(run.glob("step-*")):
            raise UserError(f"{run} has no checkpoint to resume from; start it again with another --out.")
        return run, old, True
    if config.out:
        run = Path(config.out)
    else:
        base = f"runs/{config.task}-{Path(config.model).name}-s{config.seed}"
        run = Path(base)
        for i in range(2, 10_000):
            if not run.exists():
                break
            run = Path(f"{base}-{i}")
    if run.exists():
        raise UserError(f"{run} exists already: choose another --out, or go on with it: --resume {run}.")
    write(run / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    return run, config, False


def check(config: Config):
    """Refuse what cannot work, by name, before any time is spent."""
    choices = {
        "failures": ("pool", "online"),
        "train_on": tuple(TRAINED_TURNS),
        "loss_norm": ("token", "sequence", "constant"),
        "optimizer_device": ("same", "cpu"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"--{name} must be one of {', '.join(allowed)}, found '{getattr(config, name)}'.")
    for name in ("steps", "batch_size", "retries_per_reflection", "updates_per_batch", "pool_problems", "pool_attempts"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, found {getattr(config, name)}.")
    for name in ("save_every", "micro_batch_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, found {getattr(config, name)}.")
    if config.group_size < 2:
        raise UserError("--group_size must be at least 2: a reflection is judged against its siblings.")
    if config.temperature <= 0:
        raise UserError("--temperature must be above 0 in training: greedy reflections would all be equal.")
    if config.train_on != "reflection" and config.retries_per_reflection > 1:
        raise UserError(f"--train_on {config.train_on} needs --retries_per_reflection 1: which retry would be trained?")


# ---- the run ----


@contextmanager
def stage(name, seconds):
    """Measures a stage, and names it and what to lower where it runs out of memory."""
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError:
        lower = {"train": "--micro_batch_tokens, set --checkpointing true or --optimizer_device cpu"}
        raise UserError(
            f"out of GPU memory in the stage '{name}': lower {lower.get(name, '--sample_rows or the --*_tokens limits')}."
        ) from None
    seconds[name] = time.perf_counter() - start


def sample_step(step, rollout, config, pool):
    """One step's episodes: failures, G reflections each, retries, advantages. In parts of sample_rows rows."""
    failures, conversations, first_try = failures_of_step(step, rollout, config, pool)
    episodes = []
    size = max(1, config.sample_rows // (config.group_size * config.retries_per_reflection))
    for i, rows in enumerate(chunks(list(range(len(failures))), size) if failures else []):
        generator = seeded(rollout.model, config.seed, "reflect", step, i)
        some = [failures[row] for row in rows]
        reflected, branch = rollout.reflect(some, conversations.select(rows), config.group_size, generator)
        rollout.retry(reflected, branch, config.retries_per_reflection, generator)
        for episode in reflected:
            episode.group += rows[0]
        episodes += reflected
    assign_advantages(episodes, config.scale_advantages)
    return episodes, first_try


def run(config: Config, given: set) -> None:
    check(config)
    folder, config, resumed = open_run(config, given)
    stopping = []  # filled by the first Ctrl-C; the second one stops at once

    def interrupt(*_):
        if stopping:
            raise KeyboardInterrupt
        stopping.append(True)
        print("\nwill save after this step and stop; Ctrl-C again to stop at once.", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, interrupt)
    try:
        train(folder, config, resumed, stopping)
    except BaseException:
        if not resumed and not any(folder.glob("step-*")) and not (folder / "metrics.jsonl").exists():
            shutil.rmtree(folder, ignore_errors=True)  # nothing has happened yet
        raise


def train(run: Path, config: Config, resumed: bool, stopping: list) -> None:
    """The whole story: open, failures, evaluate, then step by step: sample, reward, update, log, save; evaluate."""
    seconds = {}
    with stage("load", seconds):
        model, chat, task = open_model(replace(config, model=str(run)) if resumed else config)
        reference = None
        if config.kl_beta > 0:
            device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
            reference, _ = load(config.model, device, dtype, config.context)
        model.checkpointing = config.checkpointing
        optimizer = MasterAdamW(model.parameters(), config.lr, config.weight_decay, config.optimizer_device)
    rollout = Rollout(model, chat, task, config)
    test = held_out(task, config)
    start, skipped = restore_checkpoint(run, optimizer) if resumed else (0, 0)
    print(f"{'resuming' if resumed else 'writing'} {run}", flush=True)

    pool = None
    if config.failures == "pool":
        with stage("pool", seconds):
            pool = [Episode.from_json(line) for line in read(run / "pool.jsonl")] if resumed else None
            if not pool:
                pool = build_pool(rollout, config, stopping)
                write(run / "pool.jsonl", "".join(episode.to_json() + "\n" for episode in pool))
    if not resumed:
        with stage("evaluate", seconds):
            report, _ = evaluate(rollout, test, 0, desc="before")
        write(run / "eval.jsonl", json.dumps({"step": 0} | report) + "\n")
        print(f"before: first try {percent(report['first_try'])}, second try {percent(report['second_try'])}", flush=True)

    bar = tqdm(range(start, config.steps), "training", config.steps, initial=start, unit="step", disable=None)
    for step in bar:
        seconds = {}
        with stage("sample", seconds):
            episodes, first_try = sample_step(step, rollout, config, pool)
        metrics = describe(episodes, first_try) | {"lr": learning_rate(step, config)}
        batches = make_batches(
            episodes, config.train_on, config.loss_norm, config.reflection_tokens, config.micro_batch_tokens
        )
        with stage("train", seconds):
            if batches:  # else no group has signal, and there is no step to make
                metrics |= update(model, reference, optimizer, batches, config, step)
        skipped = skipped + 1 if metrics.get("skipped") else 0
        metrics |= speeds(episodes, batches, seconds)
        write(run / "metrics.jsonl", json.dumps({"step": step + 1} | metrics) + "\n", append=True)
        lines = [json.dumps({"step": step + 1} | json.loads(episode.to_json())) + "\n" for episode in episodes]
        write(run / "episodes.jsonl", "".join(lines), append=True)

        figures = f"reward {metrics['reward']:.2f}, signal {metrics['groups_with_signal']}/{metrics['groups']}"
        bar.set_postfix_str(figures)
        if bar.disable and (step + 1) % max(1, config.steps // 10) == 0:
            print(f"step {step + 1}/{config.steps}: {figures}, {metrics['reflection_tokens']:.0f} tokens a reflection")
        if metrics.get("skipped"):
            bar.write(f"step {step + 1}: the gradient was not finite, the update was skipped ({skipped} in a row).")
        if skipped == 10:
            raise UserError("ten updates in a row had gradients that were not finite: lower --lr, or use float32.")
        if stopping or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            with stage("save", seconds):
                save_checkpoint(run, step + 1, model, chat, optimizer, skipped)
        if stopping:
            bar.close()
            sys.exit(f"stopped and saved after step {step + 1}; go on with: python train.py --resume {run}")

    report, _ = evaluate(rollout, test, 0, desc="after")
    write(run / "eval.jsonl", json.dumps({"step": config.steps} | report) + "\n", append=True)
    before = json.loads(read(run / "eval.jsonl")[0])
    show(max(episodes, key=lambda episode: (episode.reward, episode.advantage)))
    print(table({"before": before, "after": report}, task.errors))
    print(f"\n{run} holds the model, metrics.jsonl and episodes.jsonl; controls: python eval.py --model {run}")


def speeds(episodes, batches, seconds) -> dict:
    """Tokens a second of both halves of a step, memory, and the seconds of each stage."""
    sampled = sum(len(e.reflection.ids) + sum(len(turn.ids) for turn in e.retries) for e in episodes)
    passed = sum(int(batch.prefix_lengths.sum()) + int(batch.mask.sum()) for batch in batches)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    return {
        "sampled_tokens_per_second": round(sampled / seconds["sample"]),
        "training_tokens_per_second": round(passed / seconds["train"]),
        "memory_gb": round(memory / 1e9, 2),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def show(episode: Episode) -> None:
    """One episode for the eye, the trained tokens between brackets."""
    texts = [("attempt", episode.attempt.text), ("REFLECTION", f"[[ {episode.reflection.text} ]]  <- trained")]
    texts += [("retry", turn.text) for turn in episode.retries]
    print(f"\nan episode of the last step (reward {episode.reward:.2f}, advantage {episode.advantage:+.2f}):")
    print(f"  {'problem':12}{ {k: v for k, v in episode.problem.items() if k != 'key'} }"[:300])
    for name, text in texts:
        print(f"  {name:12}{text[:600]}")
    print()


def read(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def main(argv=None):
    try:
        run(*parse(Config, sys.argv[1:] if argv is None else argv, __doc__))
    except UserError as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped at once; what was saved before is untouched.")


if __name__ == "__main__":
    main()
