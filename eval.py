"""How good are a model's first and second tries?  python eval.py --task countdown --model NAME_OR_RUN

Answers each problem once; where that fails, reflects and tries again. Second try counts the problems solved by
either. With the controls that show whether it is the reflection that helps: a retry without one, with a fixed
generic one, and with another problem's. The controls start from the same failed attempts.
"""

import argparse
import inspect
import json
import math
import re
import sys
import types
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path

import torch

from model import UserError, load, resolve
from rrr import Rollout, Sampling
from tasks import get_task

CONTROLS = ("no reflection", "generic reflection", "another's reflection")


@dataclass
class Common(Sampling):
    """The options that train.py and eval.py share."""

    model: str = "tiny"  # tiny, a short name such as qwen2.5-1.5b, a hub id owner/name, a folder, or a run
    task: str = "countdown"  # countdown or function_calling
    data: str | None = None  # a file of problems (.json, .jsonl, .parquet), or owner/name:path on the hub
    difficulty: str | None = None  # of the task's own problems; countdown: 3x20 is 3 numbers up to 20
    device: str = "auto"  # cpu or cuda; auto takes a GPU where there is one
    dtype: str = "auto"  # float32 or bfloat16; auto is bfloat16 on a GPU, float32 on a CPU
    context: int | None = None  # tokens of a whole conversation at most (default: the model's, up to 4096)
    seed: int = 0  # of problems and sampling
    eval_n: int = 500  # held-out problems of an evaluation


@dataclass
class Config(Common):
    top_k: int = 0  # sample from the k likeliest ids only (0: from all)
    top_p: float = 1.0  # sample from the likeliest ids that hold this share of the probability
    out: str | None = None  # folder for eval.json and episodes.jsonl (default: the run's folder, or eval-MODEL)
    compare: list | None = None  # two evaluated folders, A B: show their eval.json side by side and do nothing else


# ---- options, devices, seeds ----


def profile(model: str, cuda: bool) -> dict:
    """Defaults that depend on the model and the device, so that no flag is needed."""
    folder = Path(model) if Path(model).is_dir() else None
    small = model == "tiny"
    if folder and not small:
        try:
            small = json.loads((resolve(model) / "config.json").read_text())["hidden_size"] <= 256
        except (OSError, ValueError, KeyError, UserError):
            pass  # load() will say what is wrong with it
    if small:
        return dict(
            **dict(difficulty="3x20", attempt_tokens=48, reflection_tokens=112, retry_tokens=48, sample_rows=512),
            **dict(steps=60, batch_size=32, lr=1e-4, kl_beta=0.001, pool_problems=1000, save_every=50),
        )
    if cuda:
        return {}
    return dict(  # a real model on a CPU: small enough to watch
        **dict(attempt_tokens=128, reflection_tokens=96, retry_tokens=128, sample_rows=32, eval_n=24),
        **dict(steps=10, batch_size=4, group_size=4, pool_problems=32, save_every=5, micro_batch_tokens=2048),
    )


def parse(cls, argv, description):
    """A dataclass as a command line: one option a field, its comment the help; unknown options are refused.
    Returns the options, with the model's and device's defaults filled in, and the names that were given."""
    helps = {}
    for base in reversed(cls.__mro__[:-1]):
        helps.update(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE))

    def flag(text):
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"expected true or false, found '{text}'")
        return text.lower() == "true"

    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for f in fields(cls):
        kind = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type
        many = {"nargs": 2, "metavar": ("A", "B")} if kind is list else {"type": flag if kind is bool else kind}
        shown = "" if f.default is None else f" [{f.default}]"
        parser.add_argument(f"--{f.name}", help=(helps[f.name] + shown).replace("%", "%%"), default=f.default, **many)
    given = {f.name for f in fields(cls) if any(a.split("=")[0] == f"--{f.name}" for a in argv)}
    first = parser.parse_args(argv)
    cuda = first.device == "cuda" or (first.device == "auto" and torch.cuda.is_available())
    names = {f.name for f in fields(cls)}
    parser.set_defaults(**{k: v for k, v in profile(first.model, cuda).items() if k in names})
    config = cls(**vars(parser.parse_args(argv)))
    if (first.task != "countdown" or first.data) and "difficulty" not in given:
        config.difficulty = None  # the profile's is for countdown's own problems
    return config, given


def open_model(config: Common):
    """(model, chat, task, device) as the options ask for; prints what was chosen."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, found '{device}'.")
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(config.dtype, config.dtype)
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be auto, float32 or bfloat16, found '{config.dtype}'.")
    for name in ("attempt_tokens", "reflection_tokens", "retry_tokens", "sample_rows", "eval_n"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1, found {getattr(config, name)}.")
    if config.temperature < 0:
        raise UserError(f"--temperature must not be negative, found {config.temperature}.")
    task = get_task(config.task, config.data, config.difficulty)
    model, chat = load(config.model, device, getattr(torch, dtype), config.context)
    count = sum(p.numel() for p in model.parameters())
    print(f"{config.model}: {count / 1e6:,.1f} M parameters, {dtype} on {device}; task {config.task}", flush=True)
    return model, chat, task


def seeded(model, *names) -> torch.Generator:
    """A generator whose seed is a function of `names` alone: a step's draws do not depend on the steps before
    it, so a resumed run repeats an unbroken one without any stored generator state."""
    seed = int.from_bytes(sha256(repr(names).encode()).digest()[:7])
    return torch.Generator(device=next(model.parameters()).device).manual_seed(seed)


def chunks(items: list, size: int) -> list[list]:
    """Parts of at most `size` items and about equal length."""
    parts = math.ceil(len(items) / size)
    return [items[len(items) * i // parts : len(items) * (i + 1) // parts] for i in range(parts)]


def held_out(task, config) -> list[dict]:
    problems = task.problems("test", config.eval_n, seed=0)  # the same for every run: seeds share one test set
    if not problems:
        raise UserError("there is no held-out problem (one in five, by a hash of its key): the data is too small.")
    return problems


# ---- evaluation ----


def interval(k: int, n: int) -> dict:
    """Share k of n with its 95% Wilson interval."""
    z, p = 1.96, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"n": n, "rate": p, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def evaluate(rollout: Rollout, problems: list[dict], seed: int, controls=(), desc="evaluation"):
    """First and second tries on the problems: a report (JSON), and the episodes."""
    episodes, solved_by = [], Counter()
    failed = 0
    for i, chunk in enumerate(chunks(problems, rollout.settings.sample_rows)):
        label = f"{desc} {i + 1}/{math.ceil(len(problems) / rollout.settings.sample_rows)}"
        generator = seeded(rollout.model, seed, "evaluate", i)
        attempts, conversations = rollout.attempt(chunk, generator, f"{label}: attempts")
        rows = [row for row, episode in enumerate(attempts) if not episode.attempt_verdict["ok"]]
        failures = [attempts[row] for row in rows]
        failed += len(failures)
        if failures:
            start = conversations.select(rows)
            branch = start.fork(1)
            reflected, branch = rollout.reflect(failures, branch, 1, generator, f"{label}: reflections")
            rollout.retry(reflected, branch, 1, generator, f"{label}: retries")
            for row, episode in zip(rows, reflected):
                attempts[row] = episode
            generic = rollout.chat.encode(rollout.task.generic_reflection)
            own = [episode.reflection.ids for episode in reflected]
            for name, given in zip(CONTROLS, (None, [generic] * len(own), own[1:] + own[:1])):
                if name in controls:
                    branch = start.fork(1)
                    told = rollout.quote(failures, branch, given) if given else [replace(e) for e in failures]
                    rollout.retry(told, branch, 1, generator, f"{label}: {name}")
                    solved_by[name] += sum(episode.reward for episode in told)
        episodes += attempts
    n, first = len(problems), len(problems) - failed
    second = first + int(sum(episode.reward or 0 for episode in episodes))
    reflections = [episode.reflection for episode in episodes if episode.reflection]
    retries = [(turn, verdict) for e in episodes for turn, verdict in zip(e.retries, e.retry_verdicts)]

    def share(turns):
        return sum(not turn.stopped for turn in turns) / len(turns) if turns else 0.0

    report = {
        "first_try": interval(first, n),
        "second_try": interval(second, n),
        "retry_success": interval(second - first, failed) if failed else None,
        "first_errors": Counter(e.attempt_verdict["error"] for e in episodes if not e.attempt_verdict["ok"]),
        "second_errors": Counter(verdict["error"] for _, verdict in retries if not verdict["ok"]),
        "reflection_tokens": sum(len(turn.ids) for turn in reflections) / max(1, len(reflections)),
        "truncated": {
            "attempt": share([episode.attempt for episode in episodes]),
            "reflection": share(reflections),
            "retry": share([turn for turn, _ in retries]),
        },
        "controls": {name: interval(first + int(solved_by[name]), n) for name in controls},
    }
    return report, episodes


# ---- showing it ----


def percent(share: dict | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share['rate']:5.1f}% ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def table(reports: dict[str, dict], errors) -> str:
    """Reports side by side, one column each."""
    rows = [("", list(reports))]
    every = list(reports.values())
    rows.append(("problems", [str(r["first_try"]["n"]) for r in every]))
    for key in ("first_try", "second_try", "retry_success"):
        rows.append((key.replace("_", " "), [percent(r[key]) for r in every]))
    for name in CONTROLS:
        if any(name in r["controls"] for r in every):
            rows.append((f"  second try, {name}", [percent(r["controls"].get(name)) for r in every]))
    for which in ("first", "second"):
        for error in errors:
            counts = [r[f"{which}_errors"].get(error, 0) for r in every]
            rows.append((f"  {which} try: {error}", [f"{100 * c / r['first_try']['n']:5.1f}%" for c, r in zip(counts, every)]))
    rows.append(("reflection tokens", [f"{r['reflection_tokens']:5.1f}" for r in every]))
    for turn in ("attempt", "reflection", "retry"):
        rows.append((f"  {turn} cut at its cap", [f"{100 * r['truncated'][turn]:5.1f}%" for r in every]))
    return "\n".join(f"{name:38}" + "".join(f"{cell:26}" for cell in cells).rstrip() for name, cells in rows)


def run(config: Config) -> None:
    if config.compare:
        reports = {}
        for folder in config.compare:
            try:
                reports[folder] = json.loads((Path(folder) / "eval.json").read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"{folder} has no readable eval.json ({error}); run eval.py --model {folder}.") from None
        print(table({k: v["report"] for k, v in reports.items()}, next(iter(reports.values()))["errors"]))
        return
    model, chat, task = open_model(config)
    drawing = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    rollout = Rollout(model, chat, task, config, **drawing)
    report, episodes = evaluate(rollout, held_out(task, config), config.seed, CONTROLS)
    is_run = Path(config.model).is_dir() and resolve(config.model) != Path(config.model)
    out = Path(config.out or (config.model if is_run else f"eval-{Path(config.model).name}"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        content = {"config": asdict(config), "errors": task.errors, "report": report}
        (out / "eval.json").write_text(json.dumps(content, indent=2) + "\n")
        (out / "eval_episodes.jsonl").write_text("".join(episode.to_json() + "\n" for episode in episodes))
    except OSError as error:
        raise UserError(f"the evaluation cannot be written to {out} ({error}).") from None
    print(table({config.model: report}, task.errors))
    print(f"\n{out}/eval.json, {out}/eval_episodes.jsonl")


def main(argv=None):
    try:
        run(parse(Config, sys.argv[1:] if argv is None else argv, __doc__)[0])
    except UserError as error:
        sys.exit(f"eval.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("eval.py: out of GPU memory: lower --sample_rows or the --*_tokens limits.")


if __name__ == "__main__":
    main()
