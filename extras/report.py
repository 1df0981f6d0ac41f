"""Here because training needs no page, but whoever looks at a run does.

    python -m extras.report RUN [RUN...] [--out FILE]   writes RUN/report.html
    python -m extras.report RUN --text N                N episodes in the terminal

What is shown stands here, how in report_page.html. Mask and weights are rrr.py's own.
"""

import argparse
import heapq
import json
import math
import os
import platform
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import torch

import rrr
from config import Config, defaults_for, plain_errors
from model import Chat, check, explain, read_json, resolve
from tasks import task_class

ROOM = 1_800_000  # bytes of episodes in a page
STEPS, SIGNAL = 16, 3  # steps of a page, and failures with signal of each
ENDS = 5  # steps at either end whose reflections are counted


# ---- what a run is ----
def read_run(run: Path, room: int = ROOM) -> dict:
    """All that the page shows of a run, or of a folder that eval.py wrote."""
    config, chat, evaluation = open_run(run)
    metrics = list(read_rows(run / "metrics.jsonl"))
    groups, ends = sample(run, metrics, config, room)
    page = {"name": run.resolve().name, "model": model_name(config), "task": config.task}
    page |= {"facts": facts(config, metrics), "options": options(config)}
    page |= {"evals": list(read_rows(run / "eval.jsonl")), "evaluation": evaluation}
    page["curves"] = [curve_row(row) for row in metrics[:: len(metrics) // 1000 + 1]]
    page["ends"] = [count_reflections(*end, ends) for end in ends if end[1]]
    return page | {"groups": groups, "vocabulary": vocabulary(groups, chat)}


def open_run(run: Path):
    """Its options, its chat, and what eval.py reported of it."""
    evaluated = read_json(run / "eval.json", optional=True)
    stored = read_json(run / "config.json", optional=True) or evaluated.get("config")
    check(stored, f"{run} has no config.json and no eval.json: it is not a run.")
    config = Config(**stored)
    chat = Chat(resolve(str(run) if any(run.glob("step-*")) else config.model))
    return config, chat, evaluated.get("report")


def read_rows(path: Path, beginning: str | tuple = "{"):
    """Those whose line begins so; no last one that is still being written."""
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.startswith(beginning) and line.endswith("\n"):
                    yield json.loads(line)


def model_name(config: Config) -> str:
    """Without the folders of one machine; of the hub's cache, the repository."""
    parts = [p for p in Path(config.model).parts if not p.startswith("step-")]
    hub = [p[8:].replace("--", "/") for p in parts if p.startswith("models--")]
    return (hub or parts[-1:] or ["."])[0]


def facts(config: Config, metrics: list[dict]) -> list:
    """No file of a run tells its machine: what is told is where the page was written."""
    minutes = sum(sum(row["seconds"].values()) for row in metrics) / 60
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    ran = f"{len(metrics)} of {config.steps}, {minutes:.1f} minutes on {config.device}"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {gpu}"
    machine += f"; Python {platform.python_version()}, torch {torch.__version__}"
    rows = {"model": model_name(config), "task": config.task, "seed": config.seed}
    rows |= {"steps": f"{ran} in {config.dtype}", "page written on": machine}
    return list(rows.items())


def options(config: Config) -> list:
    """(name, value, default) of those that differ from this model's and task's defaults."""
    own, rows = asdict(config) | {"model": model_name(config)}, []
    asked = Config(**{name: own[name] for name in ("model", "task", "data", "device")})
    usual = asdict(asked) | defaults_for(asked) | {"data": ""}
    for name in ("reflect", "retry"):
        usual[name] = getattr(task_class(config.task), name)
        own[name] = own[name] or usual[name]  # a run from before they were stored
    for name in sorted(own.keys() - {"device", "dtype", "seed", "out", "resume"}):
        if own[name] != usual[name]:
            value = str(own[name]).split("/")[-1]  # of a file, its name
            rows.append((name, value, str(usual[name])))
    return rows


def curve_row(metrics: dict) -> dict:
    numbers = metrics | metrics["seconds"]
    return {name: brief(n) for name, n in numbers.items() if name != "seconds"}


def brief(number: float | None) -> float | None:
    """Few digits for a small page; JSON has no infinity."""
    if isinstance(number, float):
        return float(f"{number:.4g}") if math.isfinite(number) else None
    return number


# ---- episodes ----
def sample(run: Path, metrics: list[dict], config: Config, room: int):
    """Groups for the page: of steps spread evenly, the first with signal and the first
    without. And the reflections of the first and last steps: [(steps, [(turn, reward)])].
    One step is in memory at a time; the lines of others are not parsed."""
    steps, path = [row["step"] for row in metrics], run / "episodes.jsonl"
    spread = {steps[(len(steps) - 1) * i // (STEPS - 1)] for i in range(STEPS) if steps}
    n = min(ENDS, len(steps) // 2)
    ends = [(steps[:n], []), (steps[len(steps) - n :], [])]
    read = tuple(f'{{"step": {step},' for step in spread.union(*(end[0] for end in ends)))
    if not path.exists():  # only evaluated
        path, spread, read = run / "eval_episodes.jsonl", {0}, "{"
    kept, left = [], 0
    for step, rows in groupby(read_rows(path, read), lambda row: row.pop("step", 0)):
        episodes = [to_episode(row) for row in rows]
        for chosen, reflections in ends:
            wrote = [(e.reflection or e.attempt, e.reward) for e in episodes]
            reflections += wrote if step in chosen else []
        if step in spread:
            left += room // len(spread)
            weights = weights_of(episodes, config) if steps else {}
            for group in choose(episodes, bool(steps)):
                own = weights if rrr.has_signal(group) else {}
                packed = pack(step, group, own, config)
                if (size := len(json.dumps(packed))) <= left:
                    kept.append(packed)
                    left -= size
    return kept, ends


def to_episode(row: dict) -> rrr.Episode:
    for name in ("attempt", "reflection"):
        row[name] = row[name] and rrr.Turn(**row[name])
    row["retries"] = [rrr.Turn(**turn) for turn in row["retries"]]
    return rrr.Episode(**row)


def choose(episodes: list, trained: bool) -> list:
    if not trained:  # an evaluation: no siblings, and ids of groups that come again
        failures = [[replace(e, group=i)] for i, e in enumerate(episodes) if e.reflection]
        return failures[: STEPS * SIGNAL]
    groups = rrr.by_group(episodes)
    able = [group for group in groups if rrr.has_signal(group)]
    return able[:SIGNAL] + [group for group in groups if not rrr.has_signal(group)][:1]


def weights_of(episodes: list, config: Config) -> dict:
    """The weight that rrr.make_batches gives to a reflection's tokens, by their ids."""
    weights = {}
    for batch in rrr.make_batches(episodes, Config(**asdict(config) | {"device": "cpu"})):
        for i, segments in enumerate(batch.segments):  # (T,)
            for segment in range(1, segments.max() + 1):
                own = batch.mask[i] & (segments == segment)  # (T,)
                trained = tuple(batch.targets[i][own].tolist())
                weights[trained] = batch.weights[i][own][0].item()
    return weights


def pack(step: int, group: list, weights: dict, config: Config) -> dict:
    """A failure and its reflections; what siblings share is there once."""
    first, episodes = group[0], []
    shared = piece("attempt", first.attempt, first.attempt_verdict)
    if config.train_on == "attempt":  # then each sibling has one of its own
        shared = shared[:1]
    for e in group:
        turns = piece("attempt", e.attempt, e.attempt_verdict)[len(shared) :]
        turns += piece("reflection", e.reflection) if e.reflection else []
        for turn, verdict in zip(e.retries, e.retry_verdicts):
            turns += piece("retry", turn, verdict)
        ids, mask, _ = rrr.ids_and_mask(e, config.train_on)
        weight = weights.get(tuple(i for i, m in zip(ids, mask) if m), 0.0)
        scores = {"reward": brief(e.reward), "advantage": brief(e.advantage)}
        trained = [] if e.advantage is None else spans(mask, brief(weight))
        episodes.append({"turns": turns, "trained": trained} | scores)
    place = {"step": step, "group": first.group, "key": first.problem["key"][:500]}
    return place | {"turns": shared, "episodes": episodes}


def piece(kind: str, turn: rrr.Turn, verdict: dict | None = None) -> list[dict]:
    """What the model read, and what it wrote."""
    before = "prompt" if kind == "attempt" else "instruction"
    wrote = {"kind": kind, "ids": turn.ids, "logps": [brief(logp) for logp in turn.logps]}
    wrote |= {"cut": not turn.stopped, "verdict": verdict}
    return [{"kind": before, "ids": turn.prompt_ids}, wrote]


def spans(mask: list[bool], weight: float) -> list:
    """[start, end, weight] of the conversation's trained tokens."""
    found, end = [], 0
    for is_trained, same in groupby(mask):
        start, end = end, end + len(list(same))
        found += [[start, end, weight]] * is_trained
    return found


def vocabulary(groups: list[dict], chat: Chat) -> dict[int, str]:
    """The text of each id, special ones included. Some tokenizers drop the space of a first
    token: so each stands behind another."""
    decode, anchor, ids = chat.tokenizer.decode, chat.encode("a")[-1:], set()
    for group in groups:
        for part in [group, *group["episodes"]]:
            ids.update(*(turn["ids"] for turn in part["turns"]))
    start = len(decode(anchor, skip_special_tokens=False))
    return {i: decode([*anchor, i], skip_special_tokens=False)[start:] for i in sorted(ids)}


# ---- what training chose ----
def count_reflections(steps: list[int], reflections: list, ends: list) -> dict:
    """How many are distinct, also once numbers are masked; length; reward by length."""
    turns, rewards = zip(*reflections)
    shapes = Counter(re.sub(r"\d+", "#", turn.text) for turn in turns)
    lengths = sorted(len(turn.ids) for end in ends for turn, _ in end[1])
    edges = sorted({lengths[len(lengths) * i // 5] for i in range(5)})  # fifths of both
    by_length = []
    for low, high in zip(edges, [*edges[1:], lengths[-1] + 1]):
        some = [reward for turn, reward in reflections if low <= len(turn.ids) < high]
        by_length.append([low, high - 1, len(some), brief(sum(some) / max(1, len(some)))])
    n, (shape, most) = len(turns), shapes.most_common(1)[0]
    counts = {"steps": f"{steps[0]} to {steps[-1]}", "n": n, "by_length": by_length}
    counts["distinct"] = len({turn.text for turn in turns}) / n
    counts |= {"shapes": len(shapes) / n, "shape": shape[:500], "most": most / n}
    counts["length"] = brief(sum(len(turn.ids) for turn in turns) / n)
    return counts | {"reward": brief(sum(rewards) / n)}


# ---- the page, and the terminal ----
def write_page(runs: list[Path], out: Path | None = None) -> Path:
    """Whole, or not at all."""
    out = out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    data = {"runs": [read_run(run, ROOM // len(runs)) for run in runs]}
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # no text of a model ends the script element
    page = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    beside = out.with_name(out.name + ".writing")
    try:
        beside.write_text(page.replace("{{data}}", text), encoding="utf-8")
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    return out


def show_text(run: Path, n: int):
    """Those with the highest advantages, trained tokens in colour or between brackets."""
    has_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    on, off = ("\033[1;36m", "\033[0m") if has_colour else ("[[", "]]")
    config, chat, _ = open_run(run)
    rows = read_rows(run / "episodes.jsonl")
    for row in heapq.nlargest(n, rows, key=lambda row: row["advantage"]):
        place = f"Step {row.pop('step')}, failure {row['group']}"
        print(f"\n{place}: reward {row['reward']}, advantage {row['advantage']}")
        e, trained_turns = to_episode(row), rrr.TRAINED_TURNS[config.train_on]
        turns = [e.attempt, e.reflection, *e.retries] if e.reflection else [e.attempt]
        for i, turn in enumerate(turns):
            text = printable(chat, turn.ids)
            text = f"{on}{text}{off}" if i in trained_turns else text
            print(printable(chat, turn.prompt_ids) + text, end="")
        print(f"\n({'; '.join(v['error'] or 'right' for v in e.retry_verdicts)})")


def printable(chat: Chat, ids: list[int]) -> str:
    """What would steer the terminal is shown, not obeyed."""
    text = chat.tokenizer.decode(ids, skip_special_tokens=False)
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def at_the_end(run: Path):
    """For train.py and eval.py, whose work is done: what fails here is told, no more."""
    try:
        print(f"To look at it: {write_page([run])}", flush=True)
    except Exception as error:
        print(f"There is no page of {run}: {type(error).__name__}: {error}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser("extras.report", usage=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--text", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    with plain_errors("extras.report"), explain("this cannot be shown", Exception):
        if given.text is not None:
            return show_text(given.runs[0], given.text)
        print(write_page(given.runs, given.out))


if __name__ == "__main__":
    main()
