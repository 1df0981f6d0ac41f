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
from types import SimpleNamespace

import torch

import rrr
from config import Config, parse, plain_errors
from model import Chat, check, explain, read_json, resolve
from train import read_rows

ROOM = 3_600_000  # characters of episodes for a page, before their numbers are rounded
STEPS, SIGNAL = 12, 2  # steps of a page, and failures with signal of each


def read_run(run: Path, room: int = ROOM) -> dict:
    """All that the page shows of a run, or of a folder that eval.py wrote."""
    config, chat = open_run(run)
    metrics = read_rows(run / "metrics.jsonl")
    groups, ends = read_episodes(run, [row["step"] for row in metrics], config, room)
    page = {"name": run.resolve().name, "evals": read_rows(run / "eval.jsonl")}
    page["evaluation"] = read_json(run / "eval.json", optional=True).get("report")
    page |= describe(config, metrics)
    page["curves"] = [row | row.get("seconds", {}) for row in metrics]  # TRL's have none
    return page | {"ends": ends, "groups": groups, "vocabulary": vocabulary(groups, chat)}


def open_run(run: Path) -> tuple[Config, Chat]:
    """Its options, with the model's name in place of its folder, and its chat."""
    stored = read_json(run / "config.json", optional=True)
    stored = stored or read_json(run / "eval.json", optional=True).get("config")
    check(stored, f"{run} has no config.json and no eval.json: it is not a run.")
    config = Config(**stored)
    chat = Chat(resolve(str(run) if any(run.glob("step-*")) else config.model))
    parts = [p for p in Path(config.model).parts if not p.startswith("step-")]
    hub = [p[8:].replace("--", "/") for p in parts if p.startswith("models--")]
    config.model = (hub or parts[-1:] or ["."])[0]
    return config, chat


def describe(config: Config, metrics: list[dict]) -> dict:
    """What the run is, and (name, value, default) of the options that are not this model's
    and task's defaults. No file tells a run's machine: what is told is the page's."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.platform(terse=True)}, {os.cpu_count()} CPU cores, {gpu}, "
    machine += f"Python {platform.python_version()}, torch {torch.__version__}"
    steps = f"{len(metrics)} of {config.steps}, on {config.device} in {config.dtype}"
    facts = {"model": config.model, "task": config.task, "seed": config.seed}
    facts |= {"steps": steps, "page written on": machine}
    own, options = asdict(config), []
    asked = [f"--{name}={own[name]}" for name in ("model", "task", "data", "device")]
    usual = asdict(parse(asked, "", "train.py")[0]) | {"data": ""}
    for name in sorted(own.keys() - {"device", "dtype", "seed", "out", "resume"}):
        if own[name] != usual[name]:
            value = Path(own[name]).name if name in ("data", "pool") else own[name]
            options.append((name, str(value), str(usual[name])))
    return {"facts": facts, "options": options}


# ---- episodes ----
def read_episodes(run: Path, steps: list[int], config: Config, room: int):
    """Groups for the page, of steps spread evenly. And the reflections of the first and of
    the last step, counted. One step is in memory at a time."""
    shown = {steps[(len(steps) - 1) * i // (STEPS - 1)] for i in range(STEPS) if steps}
    rows = stream(run, shown)
    if not steps:  # by eval.py: failures, each alone, since its ids of groups come again
        failures = [e for e in read_rows(run / "eval_episodes.jsonl") if e["reflection"]]
        rows = [e | {"step": i, "group": i} for i, e in enumerate(failures[:STEPS])]
    kept, ends = [], []
    for step, of_step in groupby(rows, itemgetter("step")):
        own = list(of_step)
        if len(steps) > 1 and step in (steps[0], steps[-1]):
            ends.append(count_reflections(own))
        kept += choose(own, config)
    return kept[:: len(json.dumps(kept)) // room + 1], ends


def stream(run: Path, steps: set[int] | None = None):
    """The training episodes, or those of some steps, one by one; no unfinished line."""
    beginning = "{" if steps is None else tuple(f'{{"step": {step},' for step in steps)
    if (path := run / "episodes.jsonl").exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.startswith(beginning) and line.endswith("\n"):
                    yield json.loads(line)


def choose(rows: list[dict], config: Config) -> list[list[dict]]:
    """Groups of a step: two with signal and one without. With mask: how many ids are not
    trained, how many then are, and so on; and weight: what rrr.make_batches gives to a
    trained one, 0 where it drops the group."""
    episodes = json.loads(json.dumps(rows), object_hook=lambda row: SimpleNamespace(**row))
    for i, episode in enumerate(episodes):
        _, mask, _ = rrr.ids_and_mask(episode, config.train_on)
        rows[i] |= {"mask": [len(list(same)) for _, same in groupby(mask)], "weight": 0.0}
        episode.advantage = i  # so a batch tells whose ids it has
    for batch in rrr.make_batches(episodes, replace(config, device="cpu")):
        owners, weights = batch.advantages[batch.mask], batch.weights[batch.mask]  # (M,)
        for i, weight in zip(owners.tolist(), weights.tolist()):
            rows[i]["weight"] = weight
    groups = [list(group) for _, group in groupby(rows, itemgetter("group"))]
    groups.sort(key=lambda group: group[0]["weight"] == 0)  # first those with signal
    return groups[:SIGNAL] + groups[SIGNAL:][-1:]


def count_reflections(rows: list[dict]) -> dict:
    """Distinct ones, also whatever their numbers, the commonest, and each one's length and
    reward. They collapse where training goes wrong."""
    turns = [row["reflection"] or row["attempt"] for row in rows]
    shapes = Counter(re.sub(r"\d+", "#", turn["text"]) for turn in turns)
    [(shape, most)] = shapes.most_common(1)
    counts = {"shapes": len(shapes), "shape": shape[:500], "most": most}
    counts |= {"step": rows[0]["step"], "texts": len({turn["text"] for turn in turns})}
    lengths = [len(turn["ids"]) for turn in turns]
    return counts | {"scores": list(zip(lengths, map(itemgetter("reward"), rows)))}


def turns_of(row: dict) -> list[dict]:
    return [t for t in (row["attempt"], row["reflection"], *row["retries"]) if t]


def vocabulary(groups: list[list[dict]], chat: Chat) -> dict[int, str]:
    """The text of each id, special ones included. Some tokenizers drop the space of a first
    token: so each stands behind another."""
    decode, anchor, ids = chat.tokenizer.decode, chat.encode("a")[-1:], set()
    for turn in sum(map(turns_of, sum(groups, [])), []):
        ids.update(turn["prompt_ids"], turn["ids"])
    start = len(decode(anchor, skip_special_tokens=False))
    return {i: decode([*anchor, i], skip_special_tokens=False)[start:] for i in sorted(ids)}


# ---- the page, and the terminal ----
def write_page(runs: list[Path], out: Path | None = None) -> Path:
    out = out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    data = {"runs": [read_run(run, ROOM // len(runs)) for run in runs]}
    # Six digits make a small page; no browser's JSON knows NaN.
    short = {"parse_float": lambda number: float(f"{float(number):.6g}")}
    data = json.loads(json.dumps(data), parse_constant=lambda name: None, **short)
    # No text of a model may end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    beside = out.with_name(out.name + ".writing")  # so the page is whole, or not there
    beside.write_text(page.replace("{{data}}", text), encoding="utf-8")
    os.replace(beside, out)
    return out


def show_text(run: Path, n: int):
    """Those with the highest advantages, trained tokens in colour or between brackets."""
    has_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    on, off = ("\033[1;36m", "\033[0m") if has_colour else ("[[", "]]")
    config, chat = open_run(run)
    for row in heapq.nlargest(n, stream(run), key=itemgetter("advantage")):
        place = f"Step {row['step']}, failure {row['group']}"
        print(f"\n{place}: reward {row['reward']}, advantage {row['advantage']}")
        for i, turn in enumerate(turns_of(row)):
            text = printable(chat, turn["ids"])
            if i in rrr.TRAINED_TURNS[config.train_on]:
                text = on + text + off
            print(printable(chat, turn["prompt_ids"]) + text, end="")
        print()


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
