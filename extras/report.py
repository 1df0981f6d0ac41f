"""Here because training needs no page, but whoever looks at a run does.

    python -m extras.report RUN [RUN...] [--out FILE]   writes RUN/report.html
    python -m extras.report RUN --text N                N episodes in the terminal

What is shown stands here, how in report_page.html. Mask and weights are rrr.py's own.
"""

import argparse
import heapq
import json
import os
import platform
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch

import rrr
from config import Config, parse, plain_errors
from model import Chat, check, explain, read_json, resolve

ROOM = 1_800_000  # bytes of episodes in a page
STEPS, SIGNAL = 16, 3  # steps of a page, and failures with signal of each
ENDS = 5  # steps at either end whose reflections are counted


# ---- what a run is ----
def read_run(run: Path, room: int = ROOM) -> dict:
    """All that the page shows of a run, or of a folder that eval.py wrote."""
    config, chat = open_run(run)
    metrics = list(read_rows(run / "metrics.jsonl"))
    steps = [row["step"] for row in metrics]
    groups = sample(run, steps, config, room)
    few = metrics[:: len(metrics) // 1000 + 1]
    page = {"name": run.resolve().name, "evals": list(read_rows(run / "eval.jsonl"))}
    page["evaluation"] = read_json(run / "eval.json", optional=True).get("report")
    page |= {"facts": facts(config, metrics), "options": options(config)}
    page["curves"] = [row | row.get("seconds", {}) for row in few]  # TRL's have none
    n = min(ENDS, len(steps) // 2)
    ends = [steps[:n], steps[-n:]] if n else []
    counts = [count_reflections(run, end) for end in ends]
    page["ends"] = [count for count in counts if count["scores"]]
    return page | {"groups": groups, "vocabulary": vocabulary(groups, chat)}


def open_run(run: Path) -> tuple[Config, Chat]:
    evaluated = read_json(run / "eval.json", optional=True)
    stored = read_json(run / "config.json", optional=True) or evaluated.get("config")
    check(stored, f"{run} has no config.json and no eval.json: it is not a run.")
    config = Config(**stored)
    return config, Chat(resolve(str(run) if any(run.glob("step-*")) else config.model))


def read_rows(path: Path, steps: set[int] | None = None):
    """All, or those of some steps. No last one that is still being written."""
    beginning = "{" if steps is None else tuple(f'{{"step": {step},' for step in steps)
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.startswith(beginning) and line.endswith("\n"):
                    yield json.loads(line, parse_float=four_digits)


def four_digits(number: str) -> float:
    """They make a small page."""
    return float(f"{float(number):.4g}")


def model_name(config: Config) -> str:
    """Without the folders of one machine; of the hub's cache, the repository."""
    parts = [p for p in Path(config.model).parts if not p.startswith("step-")]
    hub = [p[8:].replace("--", "/") for p in parts if p.startswith("models--")]
    return (hub or parts[-1:] or ["."])[0]


def facts(config: Config, metrics: list[dict]) -> dict:
    """No file of a run tells its machine: what is told is where the page was written."""
    minutes = sum(sum(row.get("seconds", {}).values()) for row in metrics) / 60
    ran = f"{len(metrics)} of {config.steps}, {minutes:.1f} minutes on {config.device}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {gpu}"
    machine += f"; Python {platform.python_version()}, torch {torch.__version__}"
    rows = {"model": model_name(config), "task": config.task, "seed": config.seed}
    return rows | {"steps": f"{ran} in {config.dtype}", "page written on": machine}


def options(config: Config) -> list:
    """(name, value, default) of those that differ from this model's and task's defaults."""
    own = asdict(config) | {"model": model_name(config)}
    asked = [f"--{name}={own[name]}" for name in ("model", "task", "data", "device")]
    usual = asdict(parse(asked, "", "train.py")[0]) | {"data": ""}
    rows = []
    for name in sorted(own.keys() - {"device", "dtype", "seed", "out", "resume"}):
        if own[name] != usual[name]:
            value = str(own[name]).split("/")[-1]  # of a file, its name
            rows.append((name, value, str(usual[name])))
    return rows


# ---- episodes ----
def sample(run: Path, steps: list[int], config: Config, room: int) -> list[list[dict]]:
    """Groups for the page, as they are in the file: of steps spread evenly, three with
    signal and one without. One step is in memory at a time."""
    spread = {steps[(len(steps) - 1) * i // (STEPS - 1)] for i in range(STEPS) if steps}
    rows = read_rows(run / "episodes.jsonl", spread)
    if not steps:  # by eval.py: failures, each alone, since its ids of groups come again
        failures = [e for e in read_rows(run / "eval_episodes.jsonl") if e["reflection"]]
        rows = [e | {"step": i, "group": i} for i, e in enumerate(failures[:STEPS])]
    kept, left = [], 0
    for _, own in groupby(rows, itemgetter("step")):
        own = add_mask_and_weight(list(own), config)
        groups = [list(group) for _, group in groupby(own, itemgetter("group"))]
        groups.sort(key=lambda group: group[0]["weight"] == 0)  # first those with signal
        left += room // STEPS
        for group in groups[:SIGNAL] + groups[SIGNAL:][-1:]:
            for row in group[1:]:
                for name in ("problem", "attempt"):
                    if row[name] == group[0][name]:
                        del row[name]  # what siblings share is there once
            if (size := len(json.dumps(group))) <= left:
                kept.append(group)
                left -= size
    return kept


def add_mask_and_weight(rows: list[dict], config: Config) -> list[dict]:
    """mask: how many ids are not trained, how many then are, and so on. weight: what
    rrr.make_batches gives to a trained one; 0 where a group has no signal."""
    episodes = []
    for i, row in enumerate(rows):
        episode = to_episode(row)
        _, mask, _ = rrr.ids_and_mask(episode, config.train_on)
        row["mask"] = [len(list(same)) for _, same in groupby(mask)]
        row["weight"] = 0.0
        episodes.append(replace(episode, advantage=i))  # so a batch tells whose ids it has
    for batch in rrr.make_batches(episodes, replace(config, device="cpu")):
        owners, weights = batch.advantages[batch.mask], batch.weights[batch.mask]  # (M,)
        for i, weight in zip(owners.tolist(), weights.tolist()):
            rows[i]["weight"] = weight
    return rows


def to_episode(row: dict) -> rrr.Episode:
    row = row | {"retries": [rrr.Turn(**turn) for turn in row["retries"]]}
    for name in ("attempt", "reflection"):
        row[name] = row[name] and rrr.Turn(**row[name])
    row.pop("step", None)
    return rrr.Episode(**row)


def count_reflections(run: Path, steps: list[int]) -> dict:
    """Of all reflections of these steps: distinct ones, also once numbers are masked, the
    commonest, and each one's length and reward. They collapse where training goes wrong."""
    texts, shapes, scores = Counter(), Counter(), []
    for row in read_rows(run / "episodes.jsonl", set(steps)):
        turn = row["reflection"] or row["attempt"]
        texts[turn["text"]] += 1
        shapes[re.sub(r"\d+", "#", turn["text"])] += 1
        scores.append((len(turn["ids"]), row["reward"]))
    shape = max(shapes, key=shapes.get, default="")
    counts = {"shape": shape[:500], "most": shapes[shape]}
    counts["steps"] = f"{steps[0]} to {steps[-1]}"
    return counts | {"texts": len(texts), "shapes": len(shapes), "scores": scores}


def vocabulary(groups: list[list[dict]], chat: Chat) -> dict[int, str]:
    """The text of each id, special ones included. Some tokenizers drop the space of a first
    token: so each stands behind another."""
    decode, anchor, ids = chat.tokenizer.decode, chat.encode("a")[-1:], set()
    for row in sum(groups, []):
        turns = [row.get("attempt"), row["reflection"], *row["retries"]]
        for turn in filter(None, turns):
            ids.update(turn["prompt_ids"], turn["ids"])
    start = len(decode(anchor, skip_special_tokens=False))
    return {i: decode([*anchor, i], skip_special_tokens=False)[start:] for i in sorted(ids)}


# ---- the page, and the terminal ----
def write_page(runs: list[Path], out: Path | None = None) -> Path:
    """Whole, or not at all."""
    out = out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    data = {"runs": [read_run(run, ROOM // len(runs)) for run in runs]}
    # No browser's JSON knows NaN, and no text of a model may end the script element.
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    beside = out.with_name(out.name + ".writing")
    beside.write_text(page.replace("{{data}}", text), encoding="utf-8")
    os.replace(beside, out)
    return out


def show_text(run: Path, n: int):
    """Those with the highest advantages, trained tokens in colour or between brackets."""
    has_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    on, off = ("\033[1;36m", "\033[0m") if has_colour else ("[[", "]]")
    config, chat = open_run(run)
    rows = read_rows(run / "episodes.jsonl")
    for row in heapq.nlargest(n, rows, key=itemgetter("advantage")):
        place = f"Step {row['step']}, failure {row['group']}"
        print(f"\n{place}: reward {row['reward']}, advantage {row['advantage']}")
        turns = [row["attempt"], row["reflection"], *row["retries"]]
        for i, turn in enumerate(filter(None, turns)):
            text = printable(chat, turn["ids"])
            if i in rrr.TRAINED_TURNS[config.train_on]:
                text = on + text + off
            print(printable(chat, turn["prompt_ids"]) + text, end="")
        print(f"\n({'; '.join(v['error'] or 'right' for v in row['retry_verdicts'])})")


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
