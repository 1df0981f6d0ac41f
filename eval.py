"""First and second tries of a model.  python eval.py --task countdown --model NAME_OR_RUN

Answers each problem once; where that fails, reflects and tries again. "Second try" counts
problems solved by either. The controls, from the same failed attempts: a retry without a
reflection, with a fixed one, with another problem's, with the right answer; and a fresh
attempt, which does not see the failed one.
"""

import json
import math
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from config import chunks, open_model, parse, plain_errors, seeded, write_page
from model import explain
from rrr import Episode, Rollout


def evaluate(rollout: Rollout, problems: list[dict], seed: int, controls=False):
    """First and second tries on the problems. Returns a report (JSON) and the episodes."""
    episodes, mended_by = [], Counter()
    for i, chunk in enumerate(chunks(problems, rollout.config.sample_rows)):
        generator = seeded(rollout.model, seed, "evaluate", i)
        attempts, cache = rollout.attempt(chunk, generator)
        rows = [row for row, e in enumerate(attempts) if not e.attempt_verdict["ok"]]
        if rows:
            failures, cache = [attempts[row] for row in rows], cache.select(rows)
            own = cache.fork(1) if controls else cache  # a copy: the controls need it, too
            tries, own = rollout.reflect(failures, own, 1, generator)
            tries, _ = rollout.retry(tries, own, 1, generator)
            for row, episode in zip(rows, tries):
                attempts[row] = episode
            if controls:
                mended_by.update(try_controls(rollout, failures, cache, tries, generator))
        episodes += attempts
    return make_report(rollout.task, episodes, mended_by), episodes


def try_controls(rollout: Rollout, failures, cache, tries, generator) -> dict[str, int]:
    """How many failures (rows of cache) a retry mends without the reflection of `tries`."""
    cap = rollout.config.reflection_tokens
    generic = rollout.chat.encode(rollout.task.generic_reflection)[:cap]
    own = [episode.reflection.ids for episode in tries]
    controls = {
        "no reflection": None,
        "generic reflection": [generic] * len(failures),
        "another's reflection": own[1:] + own[:1],
    }
    answers = [rollout.task.answer(episode.problem) for episode in failures]
    if all(answers):  # the ceiling: what the model makes of the best of reflections
        controls["the right answer"] = [rollout.chat.encode(a)[:cap] for a in answers]
    mended_by = {}
    for name, reflections in controls.items():
        episodes, copied = failures, cache.fork(1)
        if reflections:
            episodes, copied = rollout.give(failures, copied, reflections)
        episodes, _ = rollout.retry(episodes, copied, 1, generator)
        mended_by[name] = sum(is_mended(episode) for episode in episodes)
    fresh, _ = rollout.attempt([e.problem for e in failures], generator)
    mended_by["a fresh attempt"] = sum(e.attempt_verdict["ok"] for e in fresh)
    return mended_by


def is_mended(episode: Episode) -> bool:
    """By the verdict, not the reward, which an ablation may change."""
    return bool(episode.retry_verdicts) and episode.retry_verdicts[0]["ok"]


def make_report(task, episodes: list[Episode], mended_by: dict[str, int]) -> dict:
    """Shares of all problems, with intervals; errors as counts."""
    errors = dict.fromkeys(task.errors, 0)
    n, failed = len(episodes), [e for e in episodes if not e.attempt_verdict["ok"]]
    unmended = [e for e in failed if not is_mended(e)]
    first, mended = n - len(failed), len(failed) - len(unmended)
    attempts, reflections = [e.attempt for e in episodes], [e.reflection for e in failed]
    retries = [e.retries[0] for e in failed]
    return {
        "problems": n,
        "first_try": interval(first, n),
        "second_try": interval(first + mended, n),
        "retry_success": interval(mended, len(failed)),
        "first_errors": errors | Counter(e.attempt_verdict["error"] for e in failed),
        "second_errors": errors | Counter(e.retry_verdicts[0]["error"] for e in unmended),
        "reflection_tokens": mean_length(reflections),
        "truncated": {
            "attempt": share_cut(attempts),
            "reflection": share_cut(reflections),
            "retry": share_cut(retries),
        },
        "controls": {name: interval(first + k, n) for name, k in mended_by.items()},
    }


def interval(k: int, n: int) -> dict | None:
    """The share k of n with its 95% Wilson interval; None of nothing."""
    if n == 0:
        return None
    z, p = 1.96, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"n": n, "rate": p, "low": low, "high": high}


def mean_length(turns: list) -> float:
    return sum(len(turn.ids) for turn in turns) / max(1, len(turns))


def share_cut(turns: list) -> float:
    return sum(not turn.stopped for turn in turns) / max(1, len(turns))


# ---- showing it ----
def percent(share: dict | None) -> str:
    if share is None:
        return "-"
    rate, low, high = (100 * share[key] for key in ("rate", "low", "high"))
    return f"{rate:5.1f}% ({low:.1f} to {high:.1f})"


def table(reports: dict[str, dict]) -> str:
    """Reports side by side: shares with 95% intervals, errors as counts."""
    columns = [dict(cells(report)) for report in reports.values()]
    lines = [" " * 36 + "".join(f"{name:24}" for name in reports)]
    for label in columns[0]:
        values = "".join(f"{column[label]:24}" for column in columns)
        lines.append(f"{label:36}{values}")
    return "\n".join(map(str.rstrip, lines))


def cells(report: dict, prefix: str = ""):
    """(label, text) of each figure in a report."""
    for name, value in report.items():
        label = prefix + name.replace("_", " ")
        if isinstance(value, dict) and "rate" not in value:
            yield from cells(value, f"  {label}: ")
        else:
            is_number = isinstance(value, int | float)
            yield label, f"{value:5.4g}" if is_number else percent(value)


def main(argv=None):
    with plain_errors("eval.py"):
        config, _ = parse(sys.argv[1:] if argv is None else argv, __doc__, "eval.py")
        model, chat, task = open_model(config)
        rollout = Rollout(model, chat, task, config)
        problems = rollout.fitting(task.problems("test", config.eval_n, 0))
        report, episodes = evaluate(rollout, problems, config.seed, controls=True)
        folder = Path(config.model)
        is_run = (folder / "metrics.jsonl").exists()
        out = Path(config.out or (folder if is_run else f"eval-{folder.name}"))
        content = {"config": asdict(config), "report": report}
        lines = [json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in episodes]
        with explain(f"the evaluation cannot be written to {out}", OSError):
            out.mkdir(parents=True, exist_ok=True)
            (out / "eval.json").write_text(json.dumps(content, indent=2) + "\n")
            (out / "eval_episodes.jsonl").write_text("".join(lines), encoding="utf-8")
        print(table({config.model: report}))
        print(f"\n{out}/eval.json and {out}/eval_episodes.jsonl")
        write_page(out)


if __name__ == "__main__":
    main()
