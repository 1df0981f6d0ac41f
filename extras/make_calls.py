"""Here because it makes tasks/calls.jsonl.xz, the problems that come with the task.

    python -m extras.make_calls     after changing a .json here; the same bytes every time

Of easy, normal and hard, no problem for training offers, wants or mentions a tool or value
for testing. Of mini, none has a name (first and last word together), sentence (with its way
to say a time), sum or time for testing.
"""

import json
import lzma
import random
from datetime import date, timedelta
from pathlib import Path

from extras.convert import one_choice
from tasks import in_test

CATALOGUE = json.loads(Path(__file__).with_name("tools.json").read_text(encoding="utf-8"))
DOMAINS = list(CATALOGUE["domains"].values())
TOOLS = sum(DOMAINS, [])
MINI = json.loads(Path(__file__).with_name("mini.json").read_text(encoding="utf-8"))
MINI_TOOLS = {tool["name"]: tool for tools in MINI["domains"].values() for tool in tools}
ROWS = {"train": 3000, "test": 500}  # of each difficulty
# Fewest and most calls, fewest and most tools on offer.
LEVELS = {"easy": ((1, 1), (2, 2)), "normal": ((1, 3), (2, 6)), "hard": ((2, 4), (4, 6))}
SUMS = range(3, 10), (6, 8, 10, 12, 15, 20), "+-", range(2, 18)  # a, b, sign, c
TIMES = range(480, 1260, 5), "+-", range(5, 60, 5)  # minutes of a day, sign, minutes
HIDDEN = {"values", "range", "say", "words", "show", "count"}


def jsonl() -> str:
    """The file's text: all tools by name, then a problem a line, its tools as names."""
    tools = [*TOOLS, *MINI_TOOLS.values()]
    lines = [json.dumps({tool["name"]: as_offered(tool) for tool in tools})]
    for split, rows in ROWS.items():
        pools = pools_of(split)
        for difficulty in [*LEVELS, "mini"]:
            rng = random.Random(f"{split} {difficulty}")
            problems = {}
            while len(problems) < rows:
                if difficulty == "mini":
                    problem, _, _ = mini_problem(rng, split)
                else:
                    problem = make_problem(rng, split, pools, *LEVELS[difficulty])
                problem |= {"difficulty": difficulty, "split": split}
                calls = sorted(map(json.dumps, problem["answers"]))
                problems.setdefault(str(calls), problem)
            lines += map(json.dumps, problems.values())
    return "\n".join(lines) + "\n"


def pools_of(split) -> dict[str, list]:
    """The values of each pool for this split. Every fifth day and time is for testing."""
    pools = {name: values[split] for name, values in CATALOGUE["pools"].items()}
    kept = [i for i in range(731) if (i % 5 == 4) == (split == "test")]
    pools["past"] = [str(date(2024, 1, 1) + timedelta(i)) for i in kept]  # two years
    pools["date"] = [str(date(2026, 1, 1) + timedelta(i)) for i in kept if i < 730]
    pools["time"] = [clock(360 + 5 * i) for i in kept if i < 204]
    return pools


def make_problem(rng, split, pools, call_counts, tool_counts) -> dict:
    """Some calls, the words that ask for them, and other tools beside the wanted ones."""
    own = [tool for tool in TOOLS if tool.get("split", "train") == split]
    allowed = TOOLS if split == "test" else own
    domain = rng.choice(DOMAINS)
    first = rng.choice([tool for tool in domain if tool in own])
    near = [tool for tool in allowed if tool in domain and tool is not first]
    far = [tool for tool in allowed if tool not in domain]
    count = rng.randint(*tool_counts) - 1
    near_count = rng.randint(0, min(count, len(near)))
    offered = [first, *rng.sample(near, near_count), *rng.sample(far, count - near_count)]
    rng.shuffle(offered)
    wanted = [tool for tool in offered if tool in own]
    calls, request = [], ""
    for tool in rng.choices(wanted, k=rng.randint(*call_counts)):
        call, sentence = ask(rng, tool, pools)
        while call in calls:  # the same tool twice is welcome, with other values
            call, sentence = ask(rng, tool, pools)
        calls.append(call)
        request += " " + sentence[0].upper() + sentence[1:]
    return as_row(request.strip(), [tool["name"] for tool in offered], calls)


def as_row(request, offered, calls) -> dict:
    row = {"key": request.lower(), "messages": [{"role": "user", "content": request}]}
    return row | {"tools": offered, "answers": calls}


def ask(rng, tool, pools):
    """A call in the one form, and a sentence that determines it."""
    phrasing = rng.choice(tool["phrasings"])
    frame = "{}?" if phrasing.endswith("?") else rng.choice(CATALOGUE["frames"])
    sentence = phrasing.rstrip("?")
    arguments, words, used = {}, {}, set()
    for name, spec in tool["parameters"].items():
        if "say" in spec:
            if rng.random() < 0.5:
                continue
            sentence += rng.choice(spec["say"])
        arguments[name] = draw(rng, spec, pools, used)
        words[name] = in_words(spec, arguments[name])
    call = {"name": tool["name"], "arguments": one_choice(arguments)}
    return call, frame.format(sentence.format(**words))


def draw(rng, spec, pools, used):
    """A value that is not the default nor among `used` strings."""
    if "properties" in spec:
        inner = spec["properties"].items()
        return {name: draw(rng, schema, pools, used) for name, schema in inner}
    if "items" in spec:
        # Sorted, as no order is meant: copied from the request or sorted, it is right.
        items, count = spec["items"], rng.randint(*spec["count"])
        drawn = [draw(rng, items, pools, used) for _ in range(count)]
        order = items["enum"].index if "enum" in items else None
        return sorted(drawn, key=str if "properties" in items else order)
    if "range" in spec:
        low, high, step = spec["range"]
        value = round(low + step * rng.randint(0, round((high - low) / step)), 4)
        value = int(value) if value == int(value) else value
    else:
        options = pools.get(spec.get("values"), spec.get("enum", [True, False]))
        value = rng.choice([option for option in options if option not in used])
    if value == spec.get("default"):
        return draw(rng, spec, pools, used)
    if isinstance(value, str):
        used.add(value)
    return value


def in_words(spec, value):
    """How one writes a value. An object without `show` stays one: {address[city]}."""
    if "words" in spec:
        return spec["words"][json.dumps(value)]
    if "show" in spec:
        return spec["show"].format(**value)
    if "items" in spec:
        *words, last = [str(in_words(spec["items"], item)) for item in value]
        return f"{', '.join(words)} and {last}" if words else last
    return value


def as_offered(tool):
    specs = tool["parameters"]
    required = [name for name, spec in specs.items() if "say" not in spec]
    properties = {name: without_hidden(spec) for name, spec in specs.items()}
    schema = {"type": "object", "properties": properties, "required": required}
    function = {"name": tool["name"], "description": tool["description"]}
    return {"type": "function", "function": function | {"parameters": schema}}


def without_hidden(spec):
    if not isinstance(spec, dict):
        return spec
    return {key: without_hidden(spec[key]) for key in spec if key not in HIDDEN}


# ---- difficulty mini ----
def mini_problem(rng, split) -> tuple[dict, dict, dict]:
    """For a model of 1 M parameters: two tools, one call; a name to be copied, a number and
    a time to be worked out. With it, for each parameter, how, and wrong values."""
    offered = rng.sample(list(MINI_TOOLS), 2)
    tool = MINI_TOOLS[rng.choice(offered)]
    phrasings, frames, times = tool["phrasings"], MINI["frames"], MINI["times"]
    frame, phrasing, time_words = pick(rng, split, frames, phrasings, times)
    arguments, work, near, said = {}, {}, {}, {}
    for key, spec in tool["parameters"].items():
        kind = spec["values"]
        if kind == "number":
            a, b, sign, c = pick(rng, split, *SUMS)
            said[kind] = worded(tool["numbers"], sign, a=a, b=b, c=c)
            work[key], near[key] = number(a, b, sign, c)
        elif kind == "time":
            t, sign, m = pick(rng, split, *TIMES)
            said[kind] = worded(time_words, sign, m=m, t=clock(t))
            work[key], near[key] = time(t, sign, m)
        else:
            first, last = pick(rng, split, *MINI["names"][kind])
            said[kind] = work[key] = f"{first} {last}"
            near[key] = [f"{other} {last}" for other in MINI["names"][kind][0]]
        value = work[key].split("=")[-1]
        arguments[key] = int(value) if kind == "number" else value
    request = frame.format(phrasing).format(**said)
    calls = [{"name": tool["name"], "arguments": one_choice(arguments)}]
    return as_row(request, offered, calls), work, near


def pick(rng, split, *choices):
    """One of each, drawn again until the hash of them together is of this split."""
    while True:
        drawn = [rng.choice(some) for some in choices]
        if in_test(str(drawn)) == (split == "test"):
            return drawn


def worded(both, sign, **parts):
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


if __name__ == "__main__":
    packed = lzma.compress(jsonl().encode(), preset=9)
    Path("tasks/calls.jsonl.xz").write_bytes(packed)
