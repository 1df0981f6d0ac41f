"""Train a model to reflect.  python train.py [--task countdown] [--model qwen2.5-1.5b] ...

The method is in rrr.py. Here `train` tells the story, then its parts follow: failures, a
step, the optimizer, the log, checkpoints, files.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn
from tqdm import tqdm

import rrr
from config import Config, chunks, open_model, parse, plain_errors, seeded, write_page
from eval import evaluate, mean_length, percent, share_cut, table
from model import UserError, check, explain, load, read_json, resolve, save
from rrr import Episode, Rollout, Turn, make_batches, trained_logps


def train(run: Path, config: Config):
    """Collects failures, evaluates, trains, evaluates again. Goes on where `run` stands."""
    checkpoint = keep_newest(run)  # a run may have been killed before it could
    model, chat, task = open_model(replace(config, model=str(checkpoint or config.model)))
    model.checkpointing = config.checkpointing
    reference = None
    if config.kl_beta > 0:  # the KL term holds the model near its untrained self
        dtype = model.lm_head.weight.dtype
        reference, _ = load(config.model, config.device, dtype, config.context)
    optimizer = MasterAdamW(model.parameters(), config)
    start = restore(run, checkpoint, optimizer)
    rollout = Rollout(model, chat, task, config)
    test = rollout.fitting(task.problems("test", config.eval_n, 0))  # for every seed
    check(task.problems("train", 1, 0), "the data is too small: none is left to train on.")
    print(f"{'resuming' if config.resume else 'writing'} {run}")
    live = tqdm(None, "failure pool", config.steps, False, initial=start, disable=None)
    pooled = config.failures == "pool"
    schedule = failure_pool(run, rollout, config, live) if pooled else None
    if config.steps == 0:
        return
    reports = read_rows(run / "eval.jsonl")
    if reports and reports[-1]["step"] == config.steps:
        print(f"{run} is finished: there is nothing to resume.")
        return write_page(run)
    if not reports:
        keep_evaluation(run, rollout, test, 0, live)

    for step in range(start, config.steps):
        live.set_description("sampling")
        began = time.perf_counter()
        episodes, first_try = sample_step(step, rollout, config, schedule)
        live.set_description("training")
        sampled = time.perf_counter()
        batches, metrics = make_batches(episodes, config), {}
        if batches:  # else no group has signal, and there is nothing to learn from
            metrics = update(model, reference, optimizer, batches, config, step)
        seconds = {"sample": sampled - began, "train": time.perf_counter() - sampled}
        metrics = measure(step, config, episodes, batches, first_try, seconds) | metrics
        log(run, metrics, episodes, config, live)
        done = step + 1
        if config.eval_every and done % config.eval_every == 0 and done < config.steps:
            keep_evaluation(run, rollout, test[:64], done, live)
        if done % config.save_every == 0 or done == config.steps:
            save_checkpoint(run, done, model, chat, optimizer)
    keep_evaluation(run, rollout, test, config.steps, live)
    before, *_, after = read_rows(run / "eval.jsonl")
    live.write(f"\n{table({'before': before, 'after': after})}")
    live.write(f"\n{run}: model, metrics, episodes. Controls: python eval.py --model {run}")
    write_page(run)


def keep_evaluation(run: Path, rollout: Rollout, problems, step: int, live: tqdm):
    """Evaluates, appends the report to RUN/eval.jsonl and says it in a line."""
    live.set_description("evaluating")
    report, _ = evaluate(rollout, problems, 0)
    append(run / "eval.jsonl", [{"step": step} | report])
    first, second = percent(report["first_try"]), percent(report["second_try"])
    live.write(f"held out, step {step}: first try {first}, second try {second}")
    mended = report["retry_success"]
    if step == 0 and mended and mended["rate"] < 1 / 32:
        live.write("That is next to no signal: an easier --difficulty or a larger --model.")


# ---- failures ----
def failure_pool(run: Path, rollout: Rollout, config: Config, live) -> list[Episode]:
    """What the untrained model fails at (the paper's failure set), for all steps in a row.
    RUN/pool.jsonl holds all attempts and is judged when it is read."""
    path = source = run / "pool.jsonl"
    if not config.pool:
        build_pool(path, rollout, config)
    elif not path.exists():
        source = Path(config.pool)
    attempts, failures = read_failures(source, rollout)
    if source != path:
        rewrite(path, attempts)
    live.write(f"failure pool: {len(failures)} failures in {len(attempts)} attempts")
    queue = []  # epoch after epoch, each in its own order
    while len(queue) < config.steps * config.batch_size:
        rng = random.Random(f"{config.seed} epoch {len(queue) // len(failures)}")
        queue += rng.sample(failures, len(failures))
    return queue


def read_failures(source: Path, rollout: Rollout) -> tuple[list[dict], list[Episode]]:
    """All rows of a pool.jsonl, and the failures among them as they are judged today."""
    rows, failures = read_rows(source), []
    for row in rows:
        with explain(f"{source} is damaged, or not the pool.jsonl of a run", Exception):
            problem, attempt = row["problem"], Turn(**row["attempt"])
            verdict = rollout.verify(problem, attempt)
            # The model must have been asked what it would be asked today.
            same = attempt.prompt_ids == rollout.prompt(problem)
        check(same, f"{source} is of another model, task or prompt.")
        if not verdict["ok"]:
            failures.append(Episode(problem, row["group"], attempt, verdict))
    check(rows, f"{source} is empty or absent.")
    check(failures, "the model failed at none of these problems: choose harder ones.")
    return rows, failures


def build_pool(path: Path, rollout: Rollout, config: Config):
    """Attempts, appended batch by batch; an interrupted pool goes on where it stood."""
    problems = rollout.task.problems("train", config.pool_problems, config.seed)
    todo = rrr.repeat(rollout.fitting(problems), config.pool_attempts)
    rows = read_rows(path)
    end = 0
    for i, batch in enumerate(chunks(todo, config.sample_rows)):
        start, end = end, end + len(batch)
        if end <= len(rows):
            continue
        attempts, _ = rollout.attempt(batch, seeded(rollout.model, config.seed, "pool", i))
        if start <= len(rows):  # a batch in part
            rewrite(path, rows[:start])
        append(path, [asdict(episode) for episode in attempts])


# ---- one step ----
def sample_step(step: int, rollout: Rollout, config: Config, schedule):
    """The step's episodes, and the share solved at the first try (None with a pool)."""
    n, first_try, episodes = config.batch_size, None, []
    # In parts of sample_rows conversations: each failure has G reflections with R retries.
    cap = max(1, config.sample_rows // (config.group_size * config.retries_per_reflection))
    if schedule:
        attempts = schedule[step * n :][:n]
        cache, rows = rollout.reread(attempts), range(n)
    else:  # fresh problems, twice as many
        problems = rollout.task.problems("train", 2 * n, f"{config.seed} step {step}")
        problems = rollout.fitting(problems)
        generator = seeded(rollout.model, config.seed, "attempt", step)
        if config.train_on == "attempt":
            return rrr.explore_attempts(problems[:n], rollout, config, generator), None
        attempts, cache = rollout.attempt(problems, generator)
        rows = [row for row, e in enumerate(attempts) if not e.attempt_verdict["ok"]]
        first_try = 1 - len(rows) / len(attempts)
        rows = rows[:n]
    for i, part in enumerate(chunks(rows, cap)):
        generator = seeded(rollout.model, config.seed, "reflect", step, i)
        failures = [replace(attempts[row], group=row) for row in part]
        branch = cache.select(part)
        episodes += rrr.explore(failures, branch, rollout, config, generator)
    return episodes, first_try


def update(model, reference, optimizer, batches, config: Config, step: int) -> dict:
    """updates_per_batch optimizer steps on the same micro-batches. Returns metrics."""
    temperature, old_logps, ref_logps = config.temperature, None, None
    with torch.no_grad():
        if reference:
            ref_logps = [trained_logps(reference, batch, temperature) for batch in batches]
        if config.updates_per_batch > 1:  # with one, the ratio is 1 and needs none
            old_logps = [trained_logps(model, batch, temperature) for batch in batches]
    results, norms = [], []
    for _ in range(config.updates_per_batch):
        results.append(rrr.backward(model, batches, old_logps, ref_logps, config))
        norms.append(optimizer.step(learning_rate(step, config), config.max_grad_norm))
    metrics = results[0]  # the gaps are those from before the weights moved
    for name in ("loss", "kl", "clip_fraction"):
        metrics[name] = sum(result[name] for result in results) / len(results)
    metrics["grad_norm"] = norms[-1]  # before clipping; null where the update was skipped
    metrics["skipped"] = norms.count(None)  # updates left out: the gradient was not finite
    return metrics


def learning_rate(step, config) -> float:
    """Linear warm-up, then a cosine to 0 just beyond the last step; steps count from 0."""
    warm = max(1, round(config.warmup_ratio * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class MasterAdamW:
    """torch.optim.AdamW on float32 copies of the weights and gradients: most bfloat16 ones
    are too coarse for the paper's learning rate. A float32 weight is its own master."""

    def __init__(self, parameters, config):
        self.parameters, self.masters = list(parameters), []
        for p in self.parameters:
            device = "cpu" if config.optimizer_device == "cpu" else p.device
            master = nn.Parameter(p.detach().to(device, torch.float32))
            self.masters.append(master)
            p.register_post_accumulate_grad_hook(partial(self.collect, master))
        options = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
        self.adamw = torch.optim.AdamW(self.masters, config.lr, **options)

    @staticmethod
    def collect(master, p):
        """Called in the backward pass, as soon as a weight's gradient is there."""
        grad = p.grad.to(master.device)  # in the weight's dtype: half the traffic
        master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
        p.grad = None

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> float | None:
        """Clip, step, round the weights, forget the gradients. Returns the gradient's norm
        before clipping; None where it is not finite, and then nothing has moved."""
        norm = nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if math.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
            for p, master in zip(self.parameters, self.masters):
                p.copy_(master)
        self.adamw.zero_grad()
        return norm if math.isfinite(norm) else None

    @torch.no_grad()
    def restore(self, state: dict):
        pairs = zip(self.masters, state["masters"], strict=True)
        for i, (master, saved) in enumerate(pairs):
            tensors = [saved, *state["adamw"]["state"].get(i, {}).values()]
            shapes = {tensor.shape for tensor in tensors} - {torch.Size()}  # AdamW's step
            check(shapes == {master.shape}, f"tensor {i} has shapes {shapes}.")
            master.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])


# ---- what the log shows ----
def measure(step, config, episodes, batches, first_try, seconds) -> dict:
    """A line of metrics.jsonl: each metric's definition is the comment on its line, here
    and, for those of an update, in rrr.backward and update (none without signal)."""
    groups, attempts = rrr.by_group(episodes), [e.attempt for e in episodes]
    reflections = [e.reflection for e in episodes if e.reflection]
    retries = [turn for e in episodes for turn in e.retries]
    reward = sum(e.reward for e in episodes) / max(1, len(episodes))
    second_try = None if first_try is None else first_try + (1 - first_try) * reward
    sampled = sum(len(turn.ids) for turn in reflections + retries or attempts)
    distinct = len({turn.text for turn in reflections}) / max(1, len(reflections))
    passed = sum(int((batch.segments >= 0).sum()) for batch in batches)
    return {
        "step": step + 1,  # counts from 1
        "lr": learning_rate(step, config),  # cosine
        "reward": reward,  # mean of all episodes
        "first_try": first_try,  # null with a pool
        "second_try": second_try,  # by either try
        "groups": len(groups),  # failures
        "groups_with_signal": sum(map(rrr.has_signal, groups)),  # only these are trained on
        "reflection_tokens": mean_length(reflections),  # stop token included
        "distinct_reflections": distinct,  # share; near 0: they have become one text
        "truncated_attempt": share_cut(attempts),  # share that were cut at their cap
        "truncated_reflection": share_cut(reflections),  # the same of reflections
        "truncated_retry": share_cut(retries),  # cut
        "trained_tokens": sum(int(batch.mask.sum()) for batch in batches),  # under the mask
        "sampled_tokens_per_second": round(sampled / seconds["sample"]),  # of the step
        "training_tokens_per_second": round(passed / seconds["train"]),  # a prefix once
        "memory_gb": torch.cuda.max_memory_reserved() / 1e9,  # so far; 0 on a CPU
        "seconds": {stage: round(n, 3) for stage, n in seconds.items()},  # by stage
    }


def log(run: Path, metrics: dict, episodes: list[Episode], config: Config, live: tqdm):
    """To the files, and a line to the terminal, above the live one."""
    live.set_description("saving")
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            metrics[name] = None  # JSON has no infinity
    append(run / "metrics.jsonl", [metrics])
    step = metrics["step"]
    append(run / "episodes.jsonl", [{"step": step} | asdict(e) for e in episodes])
    seconds = sum(metrics["seconds"].values())
    reward = f"reward {metrics['reward']:.2f}, "
    if metrics["second_try"] is not None:
        reward += f"second try {metrics['second_try']:.2f}, "
    live.set_postfix_str(f"{reward}{metrics['sampled_tokens_per_second']:,} tokens/s")
    live.update()
    line = f"step {step}/{config.steps}: {reward}signal "
    line += f"{metrics['groups_with_signal']}/{metrics['groups']}, "
    length, distinct = metrics["reflection_tokens"], metrics["distinct_reflections"]
    line += f"reflections {length:.0f} tokens, {distinct:.0%} distinct, "
    line += f"KL {metrics.get('kl') or 0:.3f}, {seconds:.1f} s, "
    line += f"{seconds * (config.steps - step) / 60:.1f} min to go"
    if metrics.get("skipped"):
        line += "; the gradient is not finite, no update: lower --lr"
    at_first = read_rows(run / "metrics.jsonl")[0]["reflection_tokens"]
    one_text = 0 < distinct <= max(0.05, 1 / len(episodes))
    if length < at_first / 4 or one_text or metrics["truncated_reflection"] == 1:
        line += "; reflections are dying out: lower --lr or raise --kl_beta"
    live.write(line)


# ---- checkpoints and files ----
def save_checkpoint(run: Path, step: int, model, chat, optimizer):
    """RUN/step-NNNNNN, renamed when it is whole. Then the one before it goes."""
    final, beside = run / f"step-{step:06}", run / "writing"
    shutil.rmtree(beside, ignore_errors=True)
    hint = f"step {step} cannot be saved: make room, then --resume {run}"
    try:  # for a full disk torch.save has a RuntimeError
        with explain(hint, OSError, RuntimeError, UserError):
            save(model, chat, beside)
            state = {"masters": optimizer.masters, "adamw": optimizer.adamw.state_dict()}
            torch.save(state, beside / "state.pt")
            make_durable(beside)
            os.rename(beside, final)
            make_durable(run)  # before the old one goes
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    keep_newest(run)


def make_durable(folder: Path):
    """What is in it, and its list of names, survives a power cut."""
    if os.name == "posix":  # Windows opens no folder
        for path in [*folder.iterdir(), folder]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def keep_newest(run: Path) -> Path | None:
    """The newest checkpoint, if there is one; removes those before it. Only folders whose
    names are exactly step-NNNNNN are ours."""
    checkpoints = sorted(run.glob("step-" + 6 * "[0-9]"))
    for old in checkpoints[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    return checkpoints[-1] if checkpoints else None


def restore(run: Path, checkpoint: Path | None, optimizer: MasterAdamW) -> int:
    """Fills the optimizer, cuts the logs of later steps. Returns the steps done."""
    step = 0
    if checkpoint:
        path, device = checkpoint / "state.pt", optimizer.masters[0].device
        with explain(f"the checkpoint {checkpoint} is damaged", Exception):
            state = torch.load(path, map_location=device, weights_only=True)
            optimizer.restore(state)
        step = int(checkpoint.name.removeprefix("step-"))
    for name in ("metrics.jsonl", "episodes.jsonl", "eval.jsonl"):
        if (run / name).exists():
            with explain(f"{run / name} is damaged: mend or delete it", Exception):
                rows = [row for row in read_rows(run / name) if row["step"] <= step]
            rewrite(run / name, rows)
    return step


def append(path: Path, rows: list[dict]):
    """Rows of JSON, a line each, in one write. UserError where that fails."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with explain(f"{path} cannot be written", OSError), path.open("ab") as file:
        file.write("".join(lines).encode())


def rewrite(path: Path, rows: list[dict]):
    """The file anew, with these rows; it is whole at every moment."""
    beside = path.with_name("rewriting")
    beside.unlink(missing_ok=True)
    append(beside, rows)
    make_durable(path.parent)
    os.replace(beside, path)


def read_rows(path: Path) -> list[dict]:
    """The rows of such a file, if it is there, without a last line that is not whole."""
    if not path.exists():
        return []
    with explain(f"{path} cannot be read", OSError, ValueError, RecursionError):
        *lines, _ = path.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines]


def open_run(config: Config, given: set[str]) -> tuple[Path, Config]:
    """A new run's folder and options, or on --resume those of an old one."""
    if config.resume:
        run = Path(config.resume)
        # What is stored passes the same checks as what is given.
        values = read_json(run / "config.json")
        words = [f"--{name}={values[name]}" for name in values]
        stored, names = parse(words, "", "train.py")
        check("model" in names, f"{run} is not the folder of a run.")
        others = ", ".join(f"--{name}" for name in sorted(given - {"resume"}))
        check(not others, f"--resume takes the run's own options: leave out {others}.")
        return run, replace(stored, resume=config.resume)
    usual = f"runs/{config.task}-{Path(config.model).name}-s{config.seed}"
    run = Path(config.out or usual)
    check(not run.exists(), f"{run} exists: --resume {run}, or choose another --out.")
    # A name may move, and so may the working directory: what is stored may not.
    config.model = str(resolve(config.model).absolute())
    if Path(config.data).is_file():
        config.data = os.path.abspath(config.data)
    with explain(f"{run} cannot be written", OSError):
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        make_durable(run)
    return run, config


def main(argv=None):
    with plain_errors("train.py"):
        config, given = parse(sys.argv[1:] if argv is None else argv, __doc__, "train.py")
        check(config.temperature > 0, "--temperature must be above 0: siblings differ.")
        one = config.train_on == "reflection" or config.retries_per_reflection == 1
        check(one, f"--train_on {config.train_on} needs --retries_per_reflection 1.")
        pooled = config.failures == "pool"
        check(pooled or not config.pool, "--pool is for --failures pool, not for online.")
        fresh = config.train_on != "attempt" or not pooled
        check(fresh, "--train_on attempt takes fresh problems: --failures online.")
        run, config = open_run(config, given)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        lock = FileLock(run / "lock", timeout=0)
        with explain(f"another process writes {run}: wait for its end", OSError):
            lock.acquire()
        try:
            train(run, config)
        finally:
            lock.release()
            if set(os.listdir(run)) <= {"config.json", "lock"}:
                shutil.rmtree(run)  # nothing has happened


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a file shows each line at once, too
    main()
