"""First and second tries of a model.  python eval.py --task countdown --model NAME_OR_RUN

Answers each problem once; where that fails, reflects and tries again. "Second try" counts problems
solved by either. The controls show whether it is the reflection that helps: from the same failed
attempts, a retry without one, with a fixed generic one, and with another problem's.
"""

import argparse
import inspect
import json
import math
import re
import sys
import types
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path

import torch

from model import UserError, check, explain, load, read_json, resolve
from rrr import Episode, Rollout, Sampling
from tasks import get_task

CONTROLS = ("no reflection", "generic reflection", "another's reflection")


@dataclass
class Common(Sampling):
    """The options that train.py and eval.py share."""

    model: str = "tiny"  # tiny, a name such as qwen2.5-1.5b, a hub id owner/name, a folder, a run
    task: str = "countdown"  # countdown or function_calling
    data: str | None = None  # problems from a .json, .jsonl or .parquet file, or owner/name:path
    difficulty: str | None = None  # of generated problems; countdown's 3x12: 3 numbers up to 12
    device: str = "auto"  # cpu or cuda; auto takes a GPU where there is one
    dtype: str = "auto"  # float32 or bfloat16; auto is bfloat16 where the processor computes in it
    context: int | None = None  # tokens of a whole conversation (default: the model's, up to 4096)
    seed: int = 0  # of problems and sampling
    eval_n: int = 500  # held-out problems of an evaluation


@dataclass
class Config(Common):
    top_k: int = 0  # sample from the k likeliest ids only (0: from all)
    top_p: float = 1.0  # sample from the likeliest ids that hold this share of the probability
    out: str | None = None  # folder for the results (default: the run's, or eval-MODEL)
    compare: list | None = None  # two folders with results: show them side by side, do nothing else


# ---- options, devices, seeds ----


def profile(model: str, cuda: bool) -> dict:
    """Defaults that depend on the model and the device, so that no flag is needed."""
    small = model == "tiny"
    with suppress(OSError, UserError, KeyError, TypeError):  # load() will say what is wrong
        if Path(model).is_dir():
            small = read_json(resolve(model) / "config.json")["hidden_size"] <= 256
    if small:
        turns = {"attempt_tokens": 48, "reflection_tokens": 160, "retry_tokens": 48}
        much = {"sample_rows": 512, "micro_batch_tokens": 4096, "dtype": "float32"}
        return turns | much | {"difficulty": "3x12", "steps": 45, "lr": 3e-4}
    if cuda:  # 1.5B with masters, moments, gradients and reference takes about 50 GB so
        return {"checkpointing": True, "micro_batch_tokens": 8192}
    turns = {"attempt_tokens": 128, "reflection_tokens": 96, "retry_tokens": 128}
    much = {"sample_rows": 32, "pool_problems": 16, "micro_batch_tokens": 2048, "eval_n": 16}
    return turns | much | {"steps": 10, "batch_size": 4, "group_size": 4, "save_every": 5}


def parse(cls, argv: list[str], description: str):
    """A dataclass as a command line: an option for each field, its comment the help; unknown ones
    are refused. Returns the options and the names of those that were given."""
    helps = {}
    for base in reversed(cls.__mro__[:-1]):
        helps |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE)

    def flag(text):
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"expected true or false, found '{text}'")
        return text.lower() == "true"

    more = "tiny, and any model on a CPU, have other defaults: `profile` in eval.py."
    parser = argparse.ArgumentParser(description=description, epilog=more, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for f in fields(cls):
        kind = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type
        how = {"type": flag if kind is bool else kind}
        if kind is list:
            how = {"nargs": 2, "metavar": ("A", "B")}
        words = helps[f.name] + ("" if f.default is None else f" [{f.default}]")
        parser.add_argument(f"--{f.name}", default=f.default, help=words.replace("%", "%%"), **how)
    config = cls(**vars(parser.parse_args(argv)))
    given = {f.name for f in fields(cls) if any(a.split("=")[0] == f"--{f.name}" for a in argv)}
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    for name, value in profile(config.model, cuda).items():
        own = name != "difficulty" or (config.task == "countdown" and not config.data)
        if hasattr(config, name) and name not in given and own:
            setattr(config, name, value)
    return config, given


def pick_device_and_dtype(config: Common) -> tuple[str, str]:
    """What `auto` stands for: a GPU where there is one; bfloat16 where it is computed in."""
    device, dtype = config.device, config.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        amx, avx512_bf16 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if device == "cuda" or amx or avx512_bf16 else "float32"
    choices = "auto, float32 or bfloat16"
    check(device in ("cpu", "cuda"), f"--device must be auto, cpu or cuda, found '{device}'.")
    check(dtype in ("float32", "bfloat16"), f"--dtype must be {choices}, found '{dtype}'.")
    return device, dtype


def open_model(config: Common):
    """(model, chat, task) as the options ask for; prints what was chosen."""
    device, dtype = pick_device_and_dtype(config)
    for name in ("attempt_tokens", "reflection_tokens", "retry_tokens", "sample_rows", "eval_n"):
        found = getattr(config, name)
        check(found >= 1, f"--{name} must be at least 1, found {found}.")
    task = get_task(config.task, config.data, config.difficulty)
    if dtype == "bfloat16":  # the head's float32 product of bfloat16 factors stays exact in it
        torch.set_float32_matmul_precision("medium")
    model, chat = load(config.model, device, getattr(torch, dtype), config.context)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{config.model}: {millions:,.1f} M parameters, {dtype} on {device}; {config.task}")
    return model, chat, task


def seeded(model, *names) -> torch.Generator:
    """A generator whose seed is a function of `names` alone. A step's draws do not depend on the
    steps before it: a resumed run repeats an unbroken one without any stored generator state."""
    seed = int.from_bytes(sha256(repr(names).encode()).digest()[:7])
    return torch.Generator(device=next(model.parameters()).device).manual_seed(seed)


def chunks(items: list, size: int) -> list[list]:
    """Parts of at most `size` items and about equal length."""
    n, parts = len(items), math.ceil(len(items) / size)
    return [items[n * i // parts : n * (i + 1) // parts] for i in range(parts)]


def held_out(task, config: Common) -> list[dict]:
    """The test problems: the same for every seed, so that runs are compared on one set."""
    problems = task.problems("test", config.eval_n, 0)
    check(problems, "the data is too small: no problem is left to test on (one in five is).")
    return problems


# ---- evaluation ----


def interval(k: int, n: int) -> dict:
    """The share k of n with its 95% Wilson interval."""
    z, p = 1.96, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"n": n, "rate": p, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def is_mended(episode: Episode) -> bool:
    """By the verdict, not the reward, which an ablation may change."""
    return bool(episode.retry_verdicts) and episode.retry_verdicts[0]["ok"]


def evaluate(rollout: Rollout, problems: list[dict], seed: int, controls=(), desc="evaluation"):
    """First and second tries on the problems. Returns a report (JSON) and the episodes."""
    episodes, mended_by = [], Counter()
    for i, chunk in enumerate(chunks(problems, rollout.settings.sample_rows)):
        generator = seeded(rollout.model, seed, "evaluate", i)
        attempts, start = rollout.attempt(chunk, generator, f"{desc}: attempts")
        rows = [row for row, e in enumerate(attempts) if not e.attempt_verdict["ok"]]
        failures, start = [attempts[row] for row in rows], start.select(rows)
        if rows:
            branch = start.fork(1) if controls else start
            told, branch = rollout.reflect(failures, branch, 1, generator, f"{desc}: reflections")
            rollout.retry(told, branch, 1, generator, f"{desc}: retries")
            for row, episode in zip(rows, told):
                attempts[row] = episode
            generic = rollout.chat.encode(rollout.task.generic_reflection)
            own = [episode.reflection.ids for episode in told]
            given = (None, [generic] * len(own), own[1:] + own[:1])  # one for each of CONTROLS
            for name, ids in [pair for pair in zip(CONTROLS, given) if pair[0] in controls]:
                branch, told = start.fork(1), [replace(episode) for episode in failures]
                if ids:
                    told = rollout.quote(failures, branch, ids)
                rollout.retry(told, branch, 1, generator, f"{desc}: {name}")
                mended_by[name] += sum(map(is_mended, told))
        episodes += attempts

    n, failed = len(episodes), [e for e in episodes if not e.attempt_verdict["ok"]]
    first, mended = n - len(failed), sum(map(is_mended, failed))
    turns = {
        "attempt": [e.attempt for e in episodes],
        "reflection": [e.reflection for e in failed],
        "retry": [e.retries[0] for e in failed],
    }
    cut = {name: sum(not t.stopped for t in some) for name, some in turns.items()}
    report = {
        "first_try": interval(first, n),
        "second_try": interval(first + mended, n),
        "retry_success": interval(mended, len(failed)) if failed else None,
        "first_errors": Counter(e.attempt_verdict["error"] for e in failed),
        "second_errors": Counter(e.retry_verdicts[0]["error"] for e in failed if not is_mended(e)),
        "reflection_tokens": sum(len(t.ids) for t in turns["reflection"]) / max(1, len(failed)),
        "truncated": {name: count / max(1, len(turns[name])) for name, count in cut.items()},
        "controls": {name: interval(first + mended_by[name], n) for name in controls},
    }
    return report, episodes


# ---- showing it ----


def percent(share: dict | None) -> str:
    if share is None:
        return "-"
    return "{:5.1f}% ({:.1f} to {:.1f})".format(*(100 * share[k] for k in ("rate", "low", "high")))


def table(reports: dict[str, dict], errors: list[str]) -> str:
    """Reports side by side, a column each; shares with 95% intervals, errors as shares of all."""
    n = [report["first_try"]["n"] for report in reports.values()]
    rows = [["", *reports], ["problems", *map(str, n)]]

    def row(name, cell):
        rows.append([name, *(cell(report) for report in reports.values())])

    for key in ("first_try", "second_try", "retry_success"):
        row(key.replace("_", " "), lambda r: percent(r[key]))
    for name in CONTROLS:
        if any(name in report["controls"] for report in reports.values()):
            row(f"  second try, {name}", lambda r: percent(r["controls"].get(name)))
    for which in ("first", "second"):
        for error in errors:
            counts = (report[f"{which}_errors"].get(error, 0) for report in reports.values())
            shares = [f"{100 * count / all_:5.1f}%" for count, all_ in zip(counts, n)]
            rows.append([f"  {which} try: {error}", *shares])
    row("reflection tokens", lambda r: f"{r['reflection_tokens']:5.1f}")
    for turn in ("attempt", "reflection", "retry"):
        row(f"  {turn} cut at its cap", lambda r: f"{100 * r['truncated'][turn]:5.1f}%")
    lines = [f"{name:36}" + "".join(f"{cell:24}" for cell in cells) for name, *cells in rows]
    return "\n".join(line.rstrip() for line in lines)


def compare(folders: list[str]) -> None:
    reports = {}
    for folder in folders:
        with explain(f"{folder} has no eval.json to read", OSError, ValueError, KeyError):
            content = json.loads((Path(folder) / "eval.json").read_text())
            reports[folder], errors = content["report"], content["errors"]
    print(table(reports, errors))


def run(config: Config) -> None:
    check(config.temperature >= 0, f"--temperature must be 0 or more, found {config.temperature}.")
    model, chat, task = open_model(config)
    narrowed = {"top_k": config.top_k, "top_p": config.top_p}
    rollout = Rollout(model, chat, task, config, **narrowed)
    report, episodes = evaluate(rollout, held_out(task, config), config.seed, CONTROLS)
    folder = Path(config.model)
    is_run = folder.is_dir() and resolve(config.model).parent == folder
    out = Path(config.out or (config.model if is_run else f"eval-{Path(config.model).name}"))
    content = {"config": asdict(config), "errors": task.errors, "report": report}
    with explain(f"the evaluation cannot be written to {out}", OSError):
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval.json").write_text(json.dumps(content, indent=2) + "\n")
        lines = [episode.to_json() + "\n" for episode in episodes]
        (out / "eval_episodes.jsonl").write_text("".join(lines))
    print(table({config.model: report}, task.errors))
    print(f"\n{out}/eval.json and {out}/eval_episodes.jsonl")


def main(argv=None) -> None:
    try:
        config, _ = parse(Config, sys.argv[1:] if argv is None else argv, __doc__)
        compare(config.compare) if config.compare else run(config)
    except UserError as error:
        sys.exit(f"eval.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("eval.py: out of GPU memory: lower --sample_rows or the --*_tokens limits.")
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped; nothing was written.")


if __name__ == "__main__":
    main()
