"""Here because training needs no page, but whoever looks at a run does.

    python -m extras.report RUN [RUN...] [--out FILE]   writes RUN/report.html
    python -m extras.report RUN --text N                N episodes in the terminal

What is shown stands here, how in report_page.html. Mask and weights are rrr.py's own.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
from collections import Counter
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch

import rrr
from config import Config, defaults_for, plain_errors
from model import Chat, check, explain, read_json, resolve

ROOM = 1_800_000  # bytes of episodes in a page
STEPS, SIGNAL = 16, 3  # steps of a page, and failures with signal of each
ENDS = 5  # steps at either end whose reflections are counted
CURVES = "step reward first_try second_try reflection_tokens".split()
CURVES += "groups groups_with_signal kl gap_mean".split()


# ---- what a run is ----
def read_run(run: Path, room: int = ROOM) -> dict:
    """All that the page shows of a run, or of a folder that eval.py wrote."""
    evaluation = read_json(run / "eval.json", optional=True)
    stored = read_json(run / "config.json", optional=True) or evaluation.get("config")
    check(stored, f"{run} has no config.json and no eval.json: it is not a run.")
    config = Config(**stored)
    chat = Chat(resolve(str(run) if any(run.glob("step-*")) else config.model))
    metrics = list(read_rows(run / "metrics.jsonl"))
    groups, ends, how = sample(run, metrics, config, room)
    shown = {"name": run.resolve().name, "model": model_name(config), "task": config.task}
    shown |= {"options": options(config), "evals": list(read_rows(run / "eval.jsonl"))}
    shown |= {"facts": facts(config, metrics), "evaluation": evaluation.get("report")}
    shown["curves"] = [curve_row(row) for row in metrics[:: len(metrics) // 1000 + 1]]
    shown["ends"] = [count_reflections(*end, ends) for end in ends if end[1]]
    return shown | {"groups": groups, "how": how, "vocabulary": vocabulary(groups, chat)}


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
    rows = {"model": model_name(config), "task": config.task, "seed": config.seed}
    rows["steps"] = f"{len(metrics)} of {config.steps}, {minutes:.1f} minutes on "
    rows["steps"] += f"{config.device} in {config.dtype}"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {gpu}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return [*rows.items(), ("page written on", f"{machine}; {versions}")]


def options(config: Config) -> list:
    """(name, value, default) of those that differ from this model's and task's defaults."""
    own, rows = asdict(config) | {"model": model_name(config)}, []
    asked = Config(**{name: own[name] for name in ("model", "task", "data", "device")})
    usual = asdict(asked) | defaults_for(asked) | {"data": ""}
    for name in sorted(own.keys() - {"device", "dtype", "seed", "out", "resume"}):
        if own[name] != usual[name]:
            value = str(own[name]).split("/")[-1]  # of a file, its name
            rows.append((name, value, str(usual[name])))
    return rows


def curve_row(metrics: dict) -> dict:
    row = {name: brief(metrics.get(name)) for name in CURVES}
    return row | {stage: brief(n) for stage, n in metrics["seconds"].items()}


def brief(number: float | None) -> float | None:
    """Few digits for a small page; JSON has no infinity."""
    if isinstance(number, float):
        return float(f"{number:.4g}") if math.isfinite(number) else None
    return number


# ---- episodes ----
def sample(run: Path, metrics: list[dict], config: Config, room: int):
    """(groups for the page; first and last steps, with their reflections; how I chose).
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
        for i, e in enumerate(episodes):
            e.group = e.group if steps else i  # an evaluation has no siblings
        for chosen, reflections in ends:
            reflections += [(e.reflection, e.reward) for e in episodes if step in chosen]
        if step in spread:
            left += room // len(spread)
            weights = weights_of(episodes, config)
            for group in choose(rrr.by_group(episodes)):
                own = weights if rrr.has_signal(group) else {}
                packed = pack(step, group, own, config)
                if (size := len(json.dumps(packed))) <= left:
                    kept.append(packed)
                    left -= size
    how = f"Shown are failures of {len(spread)} steps, spread evenly: of each the first "
    how += f"{SIGNAL} with signal and the first without (of an evaluation, the first ones)."
    return kept, ends, how


def to_episode(row: dict) -> rrr.Episode:
    for name in ("attempt", "reflection"):
        row[name] = row[name] and rrr.Turn(**row[name])
    row["retries"] = [rrr.Turn(**turn) for turn in row["retries"]]
    return rrr.Episode(**row)


def choose(groups: list) -> list:
    if len(groups[0]) == 1:  # an evaluation: there are no siblings
        return [group for group in groups if group[0].reflection][: STEPS * SIGNAL]
    able = [group for group in groups if rrr.has_signal(group)]
    return able[:SIGNAL] + [group for group in groups if not rrr.has_signal(group)][:1]


def weights_of(episodes: list, config: Config) -> dict:
    """The weights of the trained tokens in rrr.make_batches, by these tokens' ids."""
    weights = {}
    for batch in rrr.make_batches(episodes, Config(**asdict(config) | {"device": "cpu"})):
        for i, segments in enumerate(batch.segments):  # (T,)
            for segment in range(1, segments.max() + 1):
                own = batch.mask[i] & (segments == segment)  # (T,)
                trained = tuple(batch.targets[i][own].tolist())
                weights[trained] = batch.weights[i][own].tolist()
    return weights


def pack(step: int, group: list, weights: dict, config: Config) -> dict:
    """A failure and its reflections; what siblings share is there once."""
    first, episodes = group[0], []
    for e in group:
        turns = piece("reflection", e.reflection) if e.reflection else []
        for turn, verdict in zip(e.retries, e.retry_verdicts):
            turns += piece("retry", turn, verdict)
        trained = [] if e.advantage is None else trained_spans(e, weights, config)
        scores = {"reward": brief(e.reward), "advantage": brief(e.advantage)}
        episodes.append({"turns": turns, "trained": trained} | scores)
    shared = piece("attempt", first.attempt, first.attempt_verdict)
    place = {"step": step, "group": first.group, "key": first.problem["key"][:500]}
    return place | {"turns": shared, "episodes": episodes}


def piece(kind: str, turn: rrr.Turn, verdict: dict | None = None) -> list[dict]:
    """What the model read, and what it wrote."""
    before = "prompt" if kind == "attempt" else "instruction"
    logps = [brief(logp) for logp in turn.logps]
    wrote = {"kind": kind, "ids": turn.ids, "logps": logps, "cut": not turn.stopped}
    return [{"kind": before, "ids": turn.prompt_ids}, wrote | {"verdict": verdict}]


def trained_spans(e: rrr.Episode, weights: dict, config: Config) -> list:
    """[start, end, weight] of the conversation's tokens under rrr.py's mask. A group
    without signal is in no batch: its weights are 0."""
    ids, mask, _ = rrr.ids_and_mask(e, config.train_on)
    trained = tuple(i for i, is_trained in zip(ids, mask) if is_trained)
    own = iter(weights.get(trained, [0.0] * len(trained)))
    spans, start = [], 0
    for weight, same in groupby(next(own) if is_trained else None for is_trained in mask):
        end = start + len(list(same))
        spans += [] if weight is None else [[start, end, brief(weight)]]
        start = end
    return spans


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
    data = read_run(run)
    pairs = [(group, e) for group in data["groups"] for e in group["episodes"]]
    pairs.sort(key=lambda pair: -(pair[1]["advantage"] or 0))
    for group, e in pairs[:n]:
        on = "\033[1;36m" if (e["advantage"] or 0) >= 0 else "\033[1;33m"
        marks = (on, "\033[0m") if has_colour else ("[[", "]]")
        place = f"Step {group['step']}, failure {group['group']}"
        print(f"\n{place}: reward {e['reward']}, advantage {e['advantage']}", end="")
        print(as_text(group, e, data["vocabulary"], *marks))


def as_text(group: dict, e: dict, vocabulary: dict, on: str, off: str) -> str:
    starts, ends = {span[0] for span in e["trained"]}, {span[1] for span in e["trained"]}
    text, position = "", 0
    for turn in group["turns"] + e["turns"]:
        text += f"\n{turn['kind']:12}"
        for i in turn["ids"]:
            text += on * (position in starts) + printable(vocabulary[i])
            position += 1
            text += off * (position in ends)
        if verdict := turn.get("verdict"):
            text += f"   ({'right' if verdict['ok'] else printable(verdict['detail'])})"
    return text


def printable(text: str) -> str:
    """What would steer the terminal is shown, not obeyed."""
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
