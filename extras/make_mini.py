"""Here because a model of 0.9 M parameters needs problems of its size: difficulty "mini".

mini.json has the tools and words. Two tools are on offer, one is wanted: a name to be
copied, a number and a time to be worked out. Training never sees the names (first and last
word together), sentences (with their way to say a time), sums and times for testing.
"""

import json
from pathlib import Path

from extras.convert import one_choice
from tasks import in_test

WORDS = json.loads(Path(__file__).with_name("mini.json").read_text(encoding="utf-8"))
TOOLS = {tool["name"]: tool for tools in WORDS["domains"].values() for tool in tools}
SUMS = range(3, 10), (6, 8, 10, 12, 15, 20), "+-", range(2, 18)  # a, b, sign, c
TIMES = range(480, 1260, 5), "+-", range(5, 60, 5)  # minutes of a day, sign, minutes


def make_problem(rng, split) -> tuple[dict, dict, dict]:
    """A problem, and for each parameter how its value is worked out, and wrong values."""
    offered = rng.sample(list(TOOLS), 2)
    tool = TOOLS[rng.choice(offered)]
    phrasings, frames, times = tool["phrasings"], WORDS["frames"], WORDS["times"]
    frame, phrasing, time_words = pick(rng, split, frames, phrasings, times)
    arguments, work, near, said = {}, {}, {}, {}
    for key, spec in tool["parameters"].items():
        kind = spec["values"]
        if kind == "number":
            a, b, sign, c = pick(rng, split, *SUMS)
            said[kind] = in_words(tool["numbers"], sign, a=a, b=b, c=c)
            work[key], near[key] = number(a, b, sign, c)
        elif kind == "time":
            t, sign, m = pick(rng, split, *TIMES)
            said[kind] = in_words(time_words, sign, m=m, t=clock(t))
            work[key], near[key] = time(t, sign, m)
        else:
            first, last = pick(rng, split, *WORDS["names"][kind])
            said[kind] = work[key] = f"{first} {last}"
            near[key] = [f"{other} {last}" for other in WORDS["names"][kind][0]]
        value = work[key].split("=")[-1]
        arguments[key] = int(value) if kind == "number" else value
    request = frame.format(phrasing).format(**said)
    problem = {
        "key": request.lower(),
        "messages": [{"role": "user", "content": request}],
        "tools": offered,
        "answers": [{"name": tool["name"], "arguments": one_choice(arguments)}],
    }
    return problem, work, near


def pick(rng, split, *choices):
    """One of each, drawn again until the hash of them together is of this split."""
    while True:
        drawn = [rng.choice(some) for some in choices]
        if in_test(str(drawn)) == (split == "test"):
            return drawn


def in_words(both, sign, **parts):
    return both["+-".index(sign)].format(**parts)


def number(a, b, sign, c):
    """How it is worked out, and what one gets by mistakes."""
    change = c if sign == "+" else -c
    value, other = a * b + change, a * b - change
    return f"{a}*{b}={a * b}{sign}{c}={value}", [a * b, other, value + 10, value - 1]


def time(t, sign, m):
    """The same of a time. 13:35-45 is worked out as 12:95-45, and 13:35+45 as 13:80."""
    change = m if sign == "+" else -m
    hour, minute = divmod(t, 60)
    work = clock(t)
    if minute + change < 0:
        work += f"={hour - 1:02}:{minute + 60}"
    work += f"{sign}{m:02}"
    if minute + change >= 60:
        work += f"={hour:02}:{minute + m}"
    near = [clock(t), clock(t - change), clock(t + change + 60)]
    return f"{work}={clock(t + change)}", near


def clock(minutes):
    return f"{minutes // 60:02}:{minutes % 60:02}"
