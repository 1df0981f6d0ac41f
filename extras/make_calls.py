"""Here because it makes tasks/calls.jsonl.xz, the problems that come with the task.

    python -m extras.make_calls     after changing tools.json; the same bytes every time

No problem for training offers, wants or mentions a tool or a value for testing.
"""

import json
import lzma
import random
from datetime import date, timedelta
from pathlib import Path

from extras import make_mini
from extras.convert import one_choice

CATALOGUE = json.loads(Path(__file__).with_name("tools.json").read_text(encoding="utf-8"))
DOMAINS = list(CATALOGUE["domains"].values())
TOOLS = sum(DOMAINS, [])
ROWS = {"train": 3000, "test": 500}  # of each difficulty
# Fewest and most calls, fewest and most tools on offer.
LEVELS = {"easy": ((1, 1), (2, 2)), "normal": ((1, 3), (2, 6)), "hard": ((2, 4), (4, 6))}
HIDDEN = {"values", "range", "say", "words", "show", "count"}


def jsonl() -> str:
    """The file's text: all tools by name, then a problem a line, its tools as names."""
    tools = [*TOOLS, *make_mini.TOOLS.values()]
    lines = [json.dumps({tool["name"]: as_offered(tool) for tool in tools})]
    for split, rows in ROWS.items():
        pools = pools_of(split)
        for difficulty in [*LEVELS, "mini"]:
            rng = random.Random(f"{split} {difficulty}")
            problems = {}
            while len(problems) < rows:
                if difficulty == "mini":
                    problem, _, _ = make_mini.make_problem(rng, split)
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
    pools["time"] = [make_mini.clock(360 + 5 * i) for i in kept if i < 204]
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
    return {
        "key": request.strip().lower(),
        "messages": [{"role": "user", "content": request.strip()}],
        "tools": [tool["name"] for tool in offered],
        "answers": calls,
    }


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


if __name__ == "__main__":
    packed = lzma.compress(jsonl().encode(), preset=9)
    Path("tasks/calls.jsonl.xz").write_bytes(packed)
