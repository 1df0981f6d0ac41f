"""Here because it makes tasks/calls.jsonl.xz, the problems that come with the task.

    python -m extras.make_calls     after changing tools.json; the same bytes every time

tools.json says what its keys mean. No problem for training offers, wants or mentions a tool
or a value for testing.
"""

import json
import lzma
import random
from datetime import date, timedelta
from pathlib import Path

from extras import make_mini
from extras.convert import one_choice

ROOT = Path(__file__).resolve().parent.parent
ROWS = {"train": 3000, "test": 500}  # of each difficulty
# Fewest and most calls, fewest and most tools on offer.
LEVELS = {"easy": (1, 1, 2, 2), "normal": (1, 3, 2, 6), "hard": (2, 4, 4, 6)}
FRAMES = ("{}.", "Please {}.", "Could you {}?", "Can you {}?", "I need you to {}.")
HIDDEN = {"values", "range", "say", "words", "show", "count"}


def jsonl() -> str:
    """The file's text: all tools by name, then a problem a line, its tools as names."""
    catalogue = json.loads((ROOT / "extras" / "tools.json").read_text(encoding="utf-8"))
    domains = catalogue["domains"]
    tools = sum(domains.values(), [])
    all_tools = [*tools, *make_mini.TOOLS.values()]
    lines = [json.dumps({tool["name"]: as_offered(tool) for tool in all_tools})]
    for split, rows in ROWS.items():
        pools = pools_of(catalogue, split)
        for difficulty in [*LEVELS, "mini"]:
            rng = random.Random(f"{split} {difficulty}")
            problems = {}
            while len(problems) < rows:
                if difficulty == "mini":
                    problem, _, _ = make_mini.make_problem(rng, split)
                else:
                    level = LEVELS[difficulty]
                    problem = make_problem(rng, domains, pools, split, level)
                problem |= {"difficulty": difficulty, "split": split}
                calls = sorted(map(json.dumps, problem["answers"]))
                problems.setdefault(str(calls), problem)
            lines += map(json.dumps, problems.values())
    return "\n".join(lines) + "\n"


def pools_of(catalogue, split) -> dict[str, list]:
    """The values of each pool for this split. Every fifth day and time is for testing."""
    days = [str(date(2024, 1, 1) + timedelta(i)) for i in range(1461)]
    times = [f"{minute // 60:02}:{minute % 60:02}" for minute in range(360, 1380, 5)]
    pools = {name: values[split] for name, values in catalogue["pools"].items()}
    for name, values in {"past": days[:731], "date": days[731:], "time": times}.items():
        test = values[4::5]
        pools[name] = test if split == "test" else [v for v in values if v not in test]
    return pools


def make_problem(rng, domains, pools, split, level) -> dict:
    """Some calls, the words that ask for them, and other tools beside the wanted ones."""
    min_calls, max_calls, min_tools, max_tools = level
    tools = sum(domains.values(), [])
    own = [tool for tool in tools if tool.get("split", "train") == split]
    domain = rng.choice(list(domains.values()))
    first = rng.choice([tool for tool in domain if tool in own])
    allowed = tools if split == "test" else own
    near = [tool for tool in allowed if tool in domain and tool is not first]
    far = [tool for tool in allowed if tool not in domain]
    count = rng.randint(min_tools, max_tools) - 1
    near_count = rng.randint(0, min(count, len(near)))
    offered = [first, *rng.sample(near, near_count), *rng.sample(far, count - near_count)]
    rng.shuffle(offered)
    wanted = [tool for tool in offered if tool in own]
    calls, request = [], ""
    for tool in rng.choices(wanted, k=rng.randint(min_calls, max_calls)):
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
    frame = "{}?" if phrasing.endswith("?") else rng.choice(FRAMES)
    sentence, used = phrasing.rstrip("?"), set()
    arguments, words = {}, {}
    for name, spec in tool["parameters"].items():
        if "say" in spec:
            if rng.random() < 0.5:
                continue
            sentence += rng.choice(spec["say"])
        arguments[name], words[name] = draw(rng, spec, pools, used)
    call = {"name": tool["name"], "arguments": one_choice(arguments)}
    return call, frame.format(sentence.format(**words))


def draw(rng, spec, pools, used):
    """A value that is not the default nor among `used` strings, and how one writes it."""
    if spec["type"] == "object":
        value, words = {}, {}
        for name, inner in spec["properties"].items():
            value[name], words[name] = draw(rng, inner, pools, used)
        return value, spec["show"].format(**words) if "show" in spec else words
    if spec["type"] == "array":
        return draw_list(rng, spec, pools, used)
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
    return value, spec["words"][json.dumps(value)] if "words" in spec else str(value)


def draw_list(rng, spec, pools, used):
    """Sorted, as no order is meant: copied from the request or sorted, it is right."""
    items, count = spec["items"], rng.randint(*spec["count"])
    drawn = [draw(rng, items, pools, used) for _ in range(count)]
    if "enum" in items:  # weekdays, in their order
        drawn.sort(key=lambda pair: items["enum"].index(pair[0]))
    else:
        is_object = items["type"] == "object"  # sorted by its first value
        drawn.sort(key=lambda pair: str(pair[0]) if is_object else pair[0])
    *words, last = [words for _, words in drawn]
    text = f"{', '.join(words)} and {last}" if words else last
    return [value for value, _ in drawn], text


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
    (ROOT / "tasks" / "calls.jsonl.xz").write_bytes(packed)
