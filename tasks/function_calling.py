"""Function calling: turn a request into calls of the tools on offer.

A problem is {"key", "messages" (the request), "tools" (JSON schemas), "answers" (the wanted calls
[{"name", "arguments"}]), "form"}. The form says how the wanted arguments are written:
- "exact": {parameter: value}; the embedded problems (tools.json) and xLAM-60k's.
- "berkeley": {parameter: [accepted values]}, "" among them: it may be left out. Dicts inside hold
  such lists again, lists inside hold plain values.

An answer is right if its calls and the wanted ones pair off one to one, in any order. Types count:
true is not 1, "1" is not 1, and 1.0 is 1 only if the schema says number. In the exact form, a
parameter left out and one given at its schema's default are the same. In the Berkeley form, strings
compare as on the leaderboard (case, spaces and ,./-_*^ do not count, ' equals "), because its
accepted values were written for that.
"""

import json
import random
import re
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

from model import UserError, check
from tasks import Task, Verdict, in_test, load_rows, pick

LEVELS = {None: (1, 3, 2, 6), "easy": (1, 1, 2, 2), "hard": (2, 4, 4, 6)}  # from, to: calls, tools
FRAMES = ["{}.", "Please {}.", "Could you {}?", "Can you {}?", "I need you to {}."]
ANSWER = """Answer with one call for each thing requested, each in this form:
<tool_call>
{"name": "TOOL", "arguments": {"PARAMETER": VALUE}}
</tool_call>"""
HIDDEN = {"say", "values", "range", "count", "words", "show"}  # tools.json's keys for the generator
JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
JSON_TYPES |= {"dict": "object", "list": "array", "tuple": "array", "set": "array"}
KINDS = {str: "text", list: "a list", dict: "an object"}
LEFT_OUT = ("left out",)  # in the exact form: no value, no default; a tuple equals no JSON
MAX_CHARS = 32_768  # of an answer: a longer one is not read, so that none takes long
NOT_SPACE, CLOSER = re.compile(r"\S"), re.compile(r"\s*[]}]")
JSON_START = re.compile(r"""\{\s*["']|\[\s*\{""")  # but not "[1]" or "{x}" in prose


class FunctionCalling(Task):
    name = "function_calling"
    errors = ("no call", "not JSON", "wrong number of calls")
    errors += ("wrong tool", "wrong parameters", "wrong values")  # what _compare's 0, 1, 2 mean
    reflect = (
        "You tried this and did not produce the correct tool call. Reflect on what went wrong: the "
        "tool, the number of calls, the parameters or their values? Write a short explanation that "
        "will help you do better next time."
    )
    retry = "Now try again: answer the same request with tool calls, in the same format."
    generic_reflection = (
        "I should choose the tool that fits each part of the request, make exactly one call for "
        "each, copy every value in the type that its schema asks for, and add nothing else."
    )

    def __init__(self, data=None, difficulty=None):
        known = f"has no difficulty '{difficulty}', but: {', '.join(filter(None, LEVELS))}"
        check(difficulty in LEVELS, f"function_calling {known}.")
        check(not (data and difficulty), "difficulty is for the embedded problems, not for data.")
        self.level = LEVELS[difficulty]
        self.rows = _load(data) if data else []
        catalog = json.loads(Path(__file__).with_name("tools.json").read_text(encoding="utf-8"))
        self.domains = catalog["domains"]  # {domain: [tool]}
        self.offers = {t["name"]: _tool(t) for tools in self.domains.values() for t in tools}
        days = [str(date(2024, 1, 1) + timedelta(i)) for i in range(1461)]
        times = [f"{hour:02}:{minute:02}" for hour in range(6, 23) for minute in range(0, 60, 5)]
        self.pools = catalog["pools"] | {"past": days[:731], "date": days[731:], "time": times}

    def problems(self, split, n, seed):
        if self.rows:
            return pick(self.rows, split, n, seed)
        rng, found = random.Random(f"{self.name} {seed}"), {}
        for _ in range(50 * n):
            problem = self._make(rng)
            if in_test(problem["key"]) == (split == "test"):
                found.setdefault(problem["key"], problem)
            if len(found) == n:
                break
        return list(found.values())

    def messages(self, problem, native_tools=False):
        """The request; without native_tools, the tools in words before its first user message."""
        messages = [dict(message) for message in problem["messages"]]
        if not native_tools:
            user = next(message for message in messages if message.get("role") == "user")
            tools = [json.dumps(tool["function"], ensure_ascii=False) for tool in problem["tools"]]
            offer = "\n".join(["You can call these tools:", *tools])
            user["content"] = f"{offer}\n\nRequest: {user['content']}\n\n{ANSWER}"
        return messages

    def tools(self, problem):
        return problem["tools"]

    def verify(self, problem, text):
        """The category is that of the wanted call which the answer's calls come least near."""
        wanted, berkeley = problem["answers"], problem["form"] == "berkeley"
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in problem["tools"]}
        try:
            calls = read_calls(text)
            if len(calls) != len(wanted):
                error = "wrong number of calls" if calls else "no call"
                return Verdict(False, error, f"expected calls: {len(wanted)}, found: {len(calls)}.")
            table = [[_compare(w, c, schemas[w["name"]], berkeley) for c in calls] for w in wanted]
        except (UserError, ValueError, RecursionError) as error:  # also from printing a deep value
            return Verdict(False, "not JSON", f"the calls cannot be read: {error}.")
        pairs = _pair([[right == 3 for right, _ in row] for row in table])
        left = [row for i, row in enumerate(table) if i not in pairs.values()]
        if not left:
            return Verdict(True)
        right, detail = min(max(row[i] for i in range(len(row)) if i not in pairs) for row in left)
        return Verdict(False, self.errors[3 + right], detail)

    def _make(self, rng):
        """One embedded problem: some calls, the words that ask for them, and other tools beside."""
        domain = rng.choice(list(self.domains.values()))
        others = [t for tools in self.domains.values() if tools is not domain for t in tools]
        count = rng.randint(*self.level[2:])
        near = rng.randint(1, count - 1)  # of the same domain, which are easier to confuse
        offered = rng.sample(domain, near) + rng.sample(others, count - near)
        rng.shuffle(offered)
        calls, sentences = [], []
        for tool in rng.choices(offered, k=rng.randint(*self.level[:2])):
            call, sentence = self._ask(rng, tool)
            while call in calls:  # the same tool twice is welcome, with other values
                call, sentence = self._ask(rng, tool)
            calls.append(call)
            sentences.append(sentence[0].upper() + sentence[1:])
        return {
            "key": "; ".join(sorted(json.dumps(call, sort_keys=True) for call in calls)),
            "messages": [{"role": "user", "content": " ".join(sentences)}],
            "tools": [self.offers[tool["name"]] for tool in offered],
            "answers": calls,
            "form": "exact",
        }

    def _ask(self, rng, tool):
        """A call and a sentence that determines it."""
        words, specs = rng.choice(tool["phrasings"]), tool["parameters"]
        frame = "{}?" if words.endswith("?") else rng.choice(FRAMES)
        arguments, said = self._draw(rng, {"type": "object", "properties": specs}, set())
        clauses = [rng.choice(specs[key].get("say", [""])) for key in arguments]
        words = (words.rstrip("?") + "".join(clauses)).format(**vars(said))
        return {"name": tool["name"], "arguments": arguments}, frame.format(words)

    def _draw(self, rng, spec, used):
        """A value, not the default, and what a person would write for it: an object's words go into
        its "show", or are attributes. `used`: strings, each at most once in a call."""
        if spec["type"] == "object":  # what is optional has words of its own, and is there or not
            specs = spec["properties"].items()
            some = [(key, s) for key, s in specs if "say" not in s or rng.random() < 0.5]
            drawn = {key: self._draw(rng, s, used) for key, s in some}
            said = {key: words for key, (_, words) in drawn.items()}
            words = spec["show"].format(**said) if "show" in spec else SimpleNamespace(**said)
            return {key: value for key, (value, _) in drawn.items()}, words
        if spec["type"] == "array":
            count = rng.randint(*spec["count"])
            values, words = zip(*[self._draw(rng, spec["items"], used) for _ in range(count)])
            *items, last = words
            return list(values), f"{', '.join(items)} and {last}" if items else last
        options = self.pools.get(spec.get("values"), spec.get("enum", [True, False]))
        if "range" in spec:
            low, high, step = spec["range"]
            options = [round(low + step * i, 4) for i in range(round((high - low) / step) + 1)]
        value = rng.choice([v for v in options if v not in used and v != spec.get("default")])
        used.update([value] if isinstance(value, str) else [])
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        return value, spec["words"][json.dumps(value)] if "words" in spec else str(value)


def read_calls(text: str) -> list[dict]:
    """The calls [{"name", "arguments"}] of an answer. Raises UserError, ValueError, RecursionError.

    If there are <tool_call> blocks they alone count, and hold JSON only (the last may be unclosed).
    Else every list or object with a "name" counts, fenced or bare, whatever the text around it.
    A call may say "parameters", give its arguments as JSON text, leave them out if there are none,
    and be wrapped as {"function": CALL}. Python's f(x=1) is no call: the prompt asks for JSON.
    What a reasoning model thinks, up to </think>, is no part of the answer.
    """
    text = text.rsplit("</think>", 1)[-1]
    check(len(text) <= MAX_CHARS, f"the answer has more than {MAX_CHARS} characters")
    pieces = [block.split("</tool_call>")[0] for block in text.split("<tool_call>")[1:]]
    start = NOT_SPACE if pieces else JSON_START
    calls = []
    for piece in pieces or [text]:
        at = 0
        while match := start.search(piece, at):  # the first value that fails is the last: linear
            value, at = STRICT_JSON.raw_decode(piece, match.start())
            check(not CLOSER.match(piece, at), "there is a closing bracket too many")
            if pieces or isinstance(value, list) or value.keys() & {"name", "function"}:
                calls += value if isinstance(value, list) else [value]
    return [_call(value) for value in calls]


def _call(value):
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    value = _must(value, dict, "a call")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = STRICT_JSON.decode(arguments)
    return {"name": value.get("name"), "arguments": _must(arguments, dict, "arguments")}


def _unique(pairs):
    check(len(dict(pairs)) == len(pairs), "a key stands twice in one object")
    return dict(pairs)


# int is handed "NaN" or "Infinity", which JSON does not have, and fails
STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=int)


def _must(value, kind, what):
    check(isinstance(value, kind), f"{what} must be {KINDS[kind]}, found {value!r:.60}")
    return value


def _compare(wanted, call, schema, berkeley):
    """(how much is right, what differs): 0 another tool, 1 the tool, 2 its parameters, 3 all."""
    name = wanted["name"]
    if call["name"] != name:
        return 0, f"expected the tool {name}, found {call['name']!r:.80}."
    differences = _differences(wanted["arguments"], call["arguments"], schema, berkeley)
    right, detail = min(differences, default=(3, ""))
    return right, f"{name}, {detail}."


def _differences(wanted, given, schema, berkeley):
    """Of two dicts: (1, in words) for a key missing or not wanted, (2, in words) for a value."""
    for key in wanted | given:
        spec = schema.get("properties", {}).get(key, {})
        default = "" if berkeley else spec.get("default", LEFT_OUT)
        accepted = wanted.get(key, default)
        accepted = accepted if berkeley and isinstance(accepted, list) else [accepted]
        missing = key not in given
        # "" among Berkeley's values allows leaving out; as a value it is right only for a string
        text = key in wanted and spec.get("type", "string") == "string"
        some = [value for value in accepted if value != "" or text or missing or not berkeley]
        right = any(_same(value, given.get(key, default), spec, berkeley) for value in some)
        if not right or (missing and key in schema.get("required", [])):
            expected = " or ".join(f"{value!r:.80}" for value in accepted)
            found = "nothing" if missing else f"{given[key]!r:.80}"
            level = 1 if missing or key not in wanted else 2
            yield level, f"{key!r:.80}: expected {expected}, found {found}"


def _same(wanted, value, schema, berkeley):
    """Whether it counts as the wanted value; only `wanted` decides how deep this looks."""
    if isinstance(wanted, dict) and isinstance(value, dict):
        return not any(_differences(wanted, value, schema, berkeley))
    if isinstance(wanted, list) and isinstance(value, list):
        pairs, spec = zip(wanted, value), schema.get("items", {})
        return len(wanted) == len(value) and all(_same(*pair, spec, berkeley) for pair in pairs)
    if berkeley and isinstance(wanted, str) and isinstance(value, str):
        plain = [re.sub(r"[ ,./\-_*^]", "", text).lower() for text in (wanted, value)]
        return plain[0].replace("'", '"') == plain[1].replace("'", '"')
    numbers = schema.get("type") == "number" and {type(wanted), type(value)} <= {int, float}
    return (numbers or type(wanted) is type(value)) and wanted == value


def _pair(fits):
    """Kuhn's matching, {call: wanted}: as many pairs as fits[wanted][call] allows."""
    pairs = {}

    def place(wanted, tried):
        for call, fit in enumerate(fits[wanted]):
            if fit and call not in tried:
                tried.add(call)
                if call not in pairs or place(pairs[call], tried):
                    pairs[call] = wanted
                    return True

    for wanted in range(len(fits)):
        place(wanted, set())
    return pairs


def _load(data):
    """The problems of a file. Rows that want no call or one of a tool that is not on offer, and
    repeated requests, are left out."""
    problems, rows, truths = {}, load_rows(data), {}
    if any("function" in row for _, row in rows):
        beside = re.sub(r"[^/:]+$", r"possible_answer/\g<0>", data)  # as the leaderboard has it
        truths = {str(row.get("id")): row.get("ground_truth") for _, row in load_rows(beside)}
    for place, row in rows:
        try:
            problem = _problem(row, truths)
        except (UserError, ValueError, RecursionError) as error:
            raise UserError(f"{place}: {error}.") from None
        if problem:
            problems.setdefault(problem["key"], problem)
    check(problems, f"{data} holds no usable problem: no row wants a call of a tool on offer.")
    return list(problems.values())


def _problem(row, truths):
    """A row as a problem, if it has one."""
    if {"query", "tools", "answers"} <= row.keys():
        form, messages = "exact", [{"role": "user", "content": row["query"]}]
        functions, answers = _objects(row["tools"], "tools"), _objects(row["answers"], "answers")
    else:
        wants = "query, tools, answers (xLAM) or id, question, function (Berkeley)"
        found = f"the columns must be {wants}, found {', '.join(row) or 'none'}"
        check({"id", "question", "function"} <= row.keys(), found)
        form, turns = "berkeley", _must(row["question"], list, "question")
        check(len(turns) == 1, f"question must have one turn, found {len(turns)}")
        messages, functions = _objects(turns[0], "question"), _objects(row["function"], "function")
        truth = _objects(truths.get(str(row["id"])), f"the possible_answer of {row['id']}")
        answers = [{"name": k, "arguments": v} for call in truth for k, v in call.items()]
    texts = [_must(message.get("content"), str, "the request") for message in messages]
    asked = any(m.get("role") == "user" and m["content"].strip() for m in messages)
    check(asked, "the request has no user message with words")
    tools = {function.get("name"): _tool(function) for function in functions}
    if not answers or any(call.get("name") not in list(tools) for call in answers):
        return None
    for call in answers:
        call["arguments"] = _must(call.get("arguments"), dict, f"the arguments of {call['name']}")
        if form == "berkeley":  # its rows may list parameters that the tool lacks, as omittable
            known = tools[call["name"]]["function"]["parameters"].get("properties", {})
            for key, accepted in list(call["arguments"].items()):
                _must(accepted, list, f"the accepted values of {key}")
                if key not in known and "" in accepted:
                    del call["arguments"][key]
    key = " ".join(" ".join(texts).lower().split())
    tools = list(tools.values())
    return {"key": key, "messages": messages, "tools": tools, "answers": answers, "form": form}


def _objects(value, what):
    """A list of objects; xLAM's columns hold it as JSON text."""
    value = json.loads(value) if isinstance(value, str) else value
    return [_must(item, dict, f"each of {what}") for item in _must(value, list, what)]


def _tool(function):
    """A tool as the model sees it. Its parameters come as a JSON schema, or as xLAM's
    {name: schema}, where a default or "optional" in the type means that it need not be given."""
    name = _must(function.get("name"), str, "a tool's name")
    schema = _must(function.get("parameters") or {}, dict, f"the parameters of {name}")
    if not isinstance(schema.get("type"), str):
        specs = {key: _must(spec, dict, f"the schema of {key}") for key, spec in schema.items()}
        optional = [key for key, spec in specs.items() if {"default", "say"} & spec.keys()]
        optional += [k for k, s in specs.items() if "optional" in str(s.get("type")).lower()]
        required = [key for key in specs if key not in optional]
        schema = {"type": "object", "properties": specs, "required": required}
    described = {"name": name, "description": function.get("description", "")}
    return {"type": "function", "function": {**described, "parameters": _schema(schema)}}


def _schema(spec):
    """JSON schema for one that may use Python's types: "dict", "float", "List[int]", "any"."""
    schema = {k: v for k, v in _must(spec, dict, "a schema").items() if k not in HIDDEN}
    word = re.match(r"\w*", str(schema.pop("type", "")).lower())[0]
    kind = JSON_TYPES.get(word, word)
    if kind in JSON_TYPES.values():  # others, like "any" and "Union", leave the type open
        schema = {"type": kind} | schema
    _must(schema.get("required", []), list, "required")
    if "items" in schema:
        schema["items"] = _schema(schema["items"])
    if "properties" in schema:
        specs = _must(schema["properties"], dict, "properties")
        schema["properties"] = {key: _schema(s) for key, s in specs.items()}
    return schema
