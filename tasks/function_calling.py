"""Function calling: turn a request into calls of the tools on offer.

A problem is {"key", "messages" (the request), "tools" (JSON schemas), "answers" (the wanted calls
[{"name", "arguments"}]), "form"}. The form says how the wanted arguments are written:
- "exact": {parameter: value}; the embedded problems (tools.json) and xLAM-60k's.
- "berkeley": {parameter: [accepted values]}, "" among them: it may be left out. Dicts inside hold
  such lists again, lists inside hold plain values.

An answer is right if its calls and the wanted ones pair off one to one, in any order. Types count:
true is not 1, "1" is not 1; 1 is right for 1.0, but 1.0 for 1 only if the schema says number. In
the exact form, a parameter left out and one given at its schema's default are the same. In the
Berkeley form, strings compare as on the leaderboard (case, spaces and ,./-_*^ do not count, '
equals "), because its accepted values were written for that.
"""

import json
import random
import re
from datetime import date, timedelta
from pathlib import Path

from model import UserError
from tasks import Task, Verdict, in_test, load_rows, pick

LEVELS = {None: (1, 3, 2, 6), "easy": (1, 1, 2, 2), "hard": (2, 4, 4, 6)}  # from, to: calls, tools
FIRST = ["{X}.", "Please {x}.", "Could you {x}?", "Can you {x}?", "I need you to {x}."]
LATER = ["Also, {x}.", "Then {x}.", "Next, {x}.", "Please also {x}.", "After that, {x}."]
CALL_FORM = '<tool_call>\n{"name": "TOOL", "arguments": {"PARAMETER": VALUE}}\n</tool_call>'
HIDDEN = {"say", "values", "range", "count", "words", "show"}  # tools.json's keys for the generator
JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "double": "number"}
JSON_TYPES |= {"bool": "boolean", "list": "array", "tuple": "array", "set": "array"}
JSON_TYPES |= {"dict": "object"} | {kind: kind for kind in [*JSON_TYPES.values(), "object"]}
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

    def __init__(self, data: str | None = None, difficulty: str | None = None):
        if difficulty not in LEVELS:
            known = ", ".join(filter(None, LEVELS))
            raise UserError(f"function_calling has no difficulty '{difficulty}', but: {known}.")
        if data and difficulty:
            raise UserError("difficulty is for the embedded problems, not for a data file's.")
        self.level = LEVELS[difficulty]
        self.rows = _load(data) if data else None
        catalog = json.loads(Path(__file__).with_name("tools.json").read_text(encoding="utf-8"))
        self.domains = catalog["domains"]  # {domain: [tool]}
        self.offers = {t["name"]: _tool(t) for tools in self.domains.values() for t in tools}
        days = [str(date(2024, 1, 1) + timedelta(i)) for i in range(1461)]
        times = [f"{i // 60:02}:{i % 60:02}" for i in range(360, 1380, 5)]
        self.pools = catalog["pools"] | {"past": days[:731], "date": days[731:], "time": times}

    def problems(self, split: str, n: int, seed: int) -> list[dict]:
        if self.rows is not None:
            return pick(self.rows, split, n, seed)
        rng, found = random.Random(f"{self.name} {seed}"), {}
        for _ in range(50 * n):
            problem = self._make(rng)
            if in_test(problem["key"]) == (split == "test"):
                found.setdefault(problem["key"], problem)
            if len(found) == n:
                break
        return list(found.values())

    def messages(self, problem: dict, native_tools: bool = False) -> list[dict]:
        """The request; without native_tools, the tools in words before its first user message."""
        messages = [dict(message) for message in problem["messages"]]
        if not native_tools:
            user = next(message for message in messages if message["role"] == "user")
            tools = [json.dumps(tool["function"], ensure_ascii=False) for tool in problem["tools"]]
            user["content"] = "\n".join(
                ["You can call these tools:", *tools, "", f"Request: {user['content']}", ""]
                + ["Answer with one call for each thing requested, each in this form:", CALL_FORM]
            )
        return messages

    def tools(self, problem: dict) -> list[dict]:
        return problem["tools"]

    def reference_answer(self, problem: dict) -> str:
        """The text of a right answer; in the Berkeley form, of the first accepted values."""
        calls = problem["answers"]
        if problem["form"] == "berkeley":
            calls = [{**call, "arguments": _first_accepted(call["arguments"])} for call in calls]
        texts = [json.dumps(call, ensure_ascii=False) for call in calls]
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)

    def verify(self, problem: dict, text: str) -> Verdict:
        """The first of `errors` that the answer makes; read_calls says what is read as a call."""
        try:
            return self._judge(problem, read_calls(text))
        except (ValueError, RecursionError) as error:  # also from printing a deep value
            return Verdict(False, "not JSON", f"the calls cannot be read: {error}.")

    def _judge(self, problem, calls):
        wanted, loose = problem["answers"], problem["form"] == "berkeley"
        if len(calls) != len(wanted):
            error = "wrong number of calls" if calls else "no call"
            return Verdict(False, error, f"expected calls: {len(wanted)}, found: {len(calls)}.")
        schemas = _schemas(problem["tools"])
        table = [[_compare(w, call, schemas[w["name"]], loose) for call in calls] for w in wanted]
        for level, error in enumerate(self.errors[3:]):
            pairs = _pair([[right > level for right, _ in row] for row in table])
            left = [row for i, row in enumerate(table) if i not in pairs.values()]
            if left:  # say how the nearest of the pairs differs that could not be made
                near = max(row[i] for row in left for i in range(len(row)) if i not in pairs)
                return Verdict(False, error, near[1])
        return Verdict(True)

    def _make(self, rng):
        """One embedded problem: some calls, the words that ask for them, and other tools beside."""
        everything = sum(self.domains.values(), [])
        chosen = rng.sample(everything, rng.randint(*self.level[:2]))
        calls, sentences = [], []
        for i in range(len(chosen)):
            if i and rng.random() < 0.3:
                chosen[i] = chosen[i - 1]  # the same tool twice, with other values
            call, words = self._ask(rng, chosen[i])
            while call in calls:
                call, words = self._ask(rng, chosen[i])
            frame = rng.choice(LATER if i else FIRST)
            if words.endswith("?"):
                frame = "Also, {x}" if i else "{X}"
            sentences.append(frame.format(x=words, X=words[0].upper() + words[1:]))
            calls.append(call)
        near = [tool for tools in self.domains.values() if chosen[0] in tools for tool in tools]
        offered, count = {tool["name"] for tool in chosen}, rng.randint(*self.level[2:])
        while len(offered) < count:
            offered.add(rng.choice(near if rng.random() < 0.5 else everything)["name"])
        return {
            "key": "; ".join(sorted(json.dumps(call, sort_keys=True) for call in calls)),
            "messages": [{"role": "user", "content": " ".join(sentences)}],
            "tools": [self.offers[name] for name in rng.sample(sorted(offered), len(offered))],
            "answers": calls,
            "form": "exact",
        }

    def _ask(self, rng, tool):
        """A call and words that determine it. Half of the optional parameters are mentioned."""
        arguments, used, words, clauses = {}, set(), rng.choice(tool["phrasings"]), ""
        for name, spec in tool["parameters"].items():
            if "say" not in spec or rng.random() < 0.5:  # an optional parameter has its own words
                arguments[name] = self._draw(rng, spec, used)
                clauses += rng.choice(spec.get("say", [""]))
        words = words[:-1] + clauses + "?" if words.endswith("?") else words + clauses
        words = _fill(words, tool["parameters"], arguments)
        return {"name": tool["name"], "arguments": arguments}, words

    def _draw(self, rng, spec, used):
        """A value, not the default. `used`: its strings, each at most once in a call."""
        if spec["type"] == "object":
            return {key: self._draw(rng, s, used) for key, s in spec["properties"].items()}
        if spec["type"] == "array":
            count = rng.randint(*spec["count"])
            return [self._draw(rng, spec["items"], used) for _ in range(count)]
        if "range" in spec:
            low, high, step = spec["range"]
            value = round(low + step * rng.randint(0, round((high - low) / step)), 4)
            value = int(value) if value == int(value) else value
            return value if value != spec.get("default") else self._draw(rng, spec, used)
        options = self.pools.get(spec.get("values"), spec.get("enum", [True, False]))
        value = rng.choice([v for v in options if v not in used and v != spec.get("default")])
        used.update([value] if isinstance(value, str) else [])
        return value


def _fill(words, specs, values):
    """The words with what a person would write in place of {parameter} and {parameter.key}."""

    def say(spec, value):
        if "show" in spec:
            return _fill(spec["show"], spec["properties"], value)
        if isinstance(value, list):
            *items, last = [say(spec["items"], item) for item in value]
            return f"{', '.join(items)} and {last}" if items else last
        return spec["words"][json.dumps(value)] if "words" in spec else str(value)

    def slot(match):
        name, _, key = match[1].partition(".")
        return say(specs[name], values[name][key] if key else values[name])

    return re.sub(r"\{([\w.]+)\}", slot, words)


def read_calls(text: str) -> list[dict]:
    """The calls [{"name", "arguments"}] of an answer; ValueError or RecursionError if unreadable.

    If there are <tool_call> blocks they alone count, and hold JSON only (the last may be unclosed).
    Else every list or object with a "name" counts, fenced or bare, whatever the text around it.
    A call may say "parameters", give its arguments as JSON text, leave them out if there are none,
    and be wrapped as {"function": CALL}. Python's f(x=1) is no call: the prompt asks for JSON.
    What a reasoning model thinks, up to </think>, is no part of the answer.
    """
    text = text.rsplit("</think>", 1)[-1]
    _check(len(text) <= MAX_CHARS, f"the answer has more than {MAX_CHARS} characters")
    pieces = [block.split("</tool_call>")[0] for block in text.split("<tool_call>")[1:]]
    start = NOT_SPACE if pieces else JSON_START
    calls = []
    for piece in pieces or [text]:
        at = 0
        while match := start.search(piece, at):  # the first value that fails is the last: linear
            value, at = STRICT_JSON.raw_decode(piece, match.start())
            _check(not CLOSER.match(piece, at), "there is a closing bracket too many")
            if pieces or isinstance(value, list) or value.keys() & {"name", "function"}:
                calls += value if isinstance(value, list) else [value]
    return [_call(value) for value in calls]


def _call(value):
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    _check(isinstance(value, dict), "a call must be a JSON object")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = STRICT_JSON.decode(arguments)
    _check(isinstance(arguments, dict), "arguments must be a JSON object")
    return {"name": value.get("name"), "arguments": arguments}


def _check(condition, message):
    if not condition:
        raise ValueError(message)


def _unique(pairs):
    _check(len(dict(pairs)) == len(pairs), "a key stands twice in one object")
    return dict(pairs)


STRICT_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=lambda name: _check(False, f"{name} is not JSON")
)


def _compare(wanted, call, schema, loose):
    """(how much is right, what differs first): 0 another tool, 1 the tool, 2 the keys, 3 all."""
    if call["name"] != wanted["name"]:
        return 0, f"expected the tool {wanted['name']}, found {call['name']!r:.80}."
    right, detail = _compare_dicts(wanted["arguments"], call["arguments"], schema, loose)
    return right, f"{wanted['name']}: {detail}"


def _compare_dicts(wanted, given, schema, loose):
    """The same for arguments, or any dict: 1, 2 or 3."""
    schemas = schema.get("properties", {})

    def is_default(key, value):
        spec = schemas.get(key, {})
        return not loose and "default" in spec and _same(spec["default"], value, spec, loose)

    def expected(key):
        return " or ".join(f"{value!r:.80}" for value in wanted[key])

    wanted = {key: v if loose and isinstance(v, list) else [v] for key, v in wanted.items()}
    for key, value in given.items():
        if key not in wanted and not is_default(key, value):
            return 1, f"{key!r:.80} is not wanted, found {value!r:.80}."
    for key, accepted in wanted.items():
        may_miss = "" in accepted if loose else is_default(key, accepted[0])
        if key not in given and (key in schema.get("required", []) or not may_miss):
            return 1, f"{key} is missing, expected {expected(key)}."
    for key in [key for key in wanted if key in given]:  # in the same order each time
        if not any(_same(v, given[key], schemas.get(key, {}), loose) for v in wanted[key]):
            return 2, f"{key} must be {expected(key)}, found {given[key]!r:.80}."
    return 3, ""


def _same(wanted, value, schema, loose):
    """Whether it is the wanted value, type and all; only `wanted` decides how deep this looks."""
    if isinstance(wanted, dict):
        return isinstance(value, dict) and _compare_dicts(wanted, value, schema, loose)[0] == 3
    if isinstance(wanted, list):
        if not isinstance(value, list) or len(value) != len(wanted):
            return False
        return all(_same(w, v, schema.get("items", {}), loose) for w, v in zip(wanted, value))
    if loose and isinstance(wanted, str) and isinstance(value, str):
        texts = [re.sub(r"[ ,./\-_*^]", "", text).lower() for text in (wanted, value)]
        return texts[0].replace("'", '"') == texts[1].replace("'", '"')
    types = type(wanted), type(value)
    number = types == (float, int) or (types == (int, float) and schema.get("type") == "number")
    return (number or types[0] is types[1]) and wanted == value


def _pair(fits):
    """Kuhn's matching: {call: wanted}, as many pairs as fits[wanted][call] allows."""
    pairs = {}

    def place(wanted, tried):
        for call, fit in enumerate(fits[wanted]):
            if fit and call not in tried:
                tried.add(call)
                if call not in pairs or place(pairs[call], tried):
                    pairs[call] = wanted
                    return True
        return False

    for wanted in range(len(fits)):
        place(wanted, set())
    return pairs


def _first_accepted(wanted):
    """A Berkeley value with the first that may be given at every level of it."""
    if isinstance(wanted, list):
        return [_first_accepted(value) for value in wanted]
    if not isinstance(wanted, dict):
        return wanted
    lists = {key: v if isinstance(v, list) else [v] for key, v in wanted.items()}
    firsts = {key: next((v for v in accepted if v != ""), "") for key, accepted in lists.items()}
    return {key: _first_accepted(value) for key, value in firsts.items() if value != ""}


def _load(data):
    """The problems of a file. Rows that want no call, and repeated requests, are left out."""
    problems, truths = {}, None
    for place, row in load_rows(data):
        if "function" in row and truths is None:  # DIR/NAME goes with DIR/possible_answer/NAME
            repo, colon, inner = ("", "", data) if Path(data).exists() else data.partition(":")
            path = Path(inner).parent / "possible_answer" / Path(inner).name
            rows = load_rows(repo + colon + path.as_posix())
            truths = {str(truth.get("id")): truth.get("ground_truth") for _, truth in rows}
        try:
            problem = _problem(row, truths)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: {error}.") from None
        if problem["answers"]:
            problems.setdefault(problem["key"], problem)
    if not problems:
        raise UserError(f"{data} holds no usable problem: no row wants a call.")
    return list(problems.values())


def _problem(row, truths):
    """A row as a problem; ValueError for what is wrong with it."""
    if {"query", "tools", "answers"} <= row.keys():
        form, messages = "exact", [{"role": "user", "content": row["query"]}]
        functions, answers = _objects(row["tools"], "tools"), _objects(row["answers"], "answers")
    elif {"id", "question", "function"} <= row.keys():
        form, turns, id_ = "berkeley", row["question"], str(row["id"])
        _check(isinstance(turns, list) and len(turns) == 1, "question must be a list of one turn")
        messages, functions = _objects(turns[0], "question"), _objects(row["function"], "function")
        _check(id_ in truths, f"possible_answer has no row with the id {id_}")
        truth = _objects(truths[id_], "ground_truth")
        answers = [{"name": k, "arguments": v} for call in truth for k, v in call.items()]
    else:
        wants = "query, tools, answers (xLAM) or id, question, function (Berkeley)"
        raise ValueError(f"the columns must be {wants}, found {', '.join(row) or 'none'}")
    texts = [message.get("content") for message in messages]
    _check(all(isinstance(t, str) and t.strip() for t in texts), "the request must be text")
    _check("user" in [m.get("role") for m in messages], "the request has no user message")
    tools = [_tool(function) for function in functions]
    schemas = _schemas(tools)
    for call in answers:
        name, arguments = call.get("name"), call.get("arguments")
        _check(name in list(schemas), f"the answer calls {name!r}, which is not on offer")
        _check(isinstance(arguments, dict), f"the arguments of {name} must be an object")
        if form == "berkeley":
            lists = all(isinstance(v, list) for v in arguments.values())
            _check(lists, f"the arguments of {name} must be lists of accepted values")
            known = schemas[name].get("properties", {})  # some rows list others, as omittable
            call["arguments"] = {k: v for k, v in arguments.items() if k in known or "" not in v}
    key = " ".join(" ".join(texts).lower().split())
    return {"key": key, "messages": messages, "tools": tools, "answers": answers, "form": form}


def _schemas(tools):
    return {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}


def _objects(value, name):
    """A list of objects; xLAM's columns hold it as JSON text."""
    value = json.loads(value) if isinstance(value, str) else value
    right = isinstance(value, list) and all(isinstance(v, dict) for v in value)
    _check(right, f"{name} must be a list of objects")
    return value


def _tool(function):
    """A tool as the model sees it. Its parameters come as a JSON schema, or as xLAM's
    {name: schema}, where a default or "optional" in the type means that it need not be given."""
    name, given = function.get("name"), function.get("parameters") or {}
    _check(isinstance(name, str) and name, "a tool has no name")
    _check(isinstance(given, dict), f"the parameters of {name} must be an object")
    if not isinstance(given.get("type"), str):
        schemas = {key: _schema(spec) for key, spec in given.items()}
        optional = {k for k, s in given.items() if {"default", "say"} & s.keys()}
        optional |= {k for k, s in given.items() if "optional" in str(s.get("type")).lower()}
        required = [key for key in schemas if key not in optional]
        given = {"type": "object", "properties": schemas, "required": required}
    described = {"name": name, "description": function.get("description", "")}
    return {"type": "function", "function": {**described, "parameters": _schema(given)}}


def _schema(spec):
    """JSON schema for one that may use Python's types: "dict", "float", "List[int]", "any"."""
    _check(isinstance(spec, dict), "the schema of a parameter must be an object")
    schema = {key: value for key, value in spec.items() if key not in HIDDEN}
    if isinstance(spec.get("type"), str):
        words = [w for w in re.findall(r"\w+", schema.pop("type").lower()) if w != "optional"]
        if words and words[0] in JSON_TYPES:  # what is left, like "any" and "Union", stays open
            schema = {"type": JSON_TYPES[words[0]]} | schema
            if words[1:] and schema["type"] == "array":
                schema.setdefault("items", {"type": " ".join(words[1:])})
    for key, kind in (("required", list), ("items", dict), ("properties", dict)):
        _check(isinstance(schema.get(key, kind()), kind), f"{key} in a schema has the wrong type")
    if "items" in schema:
        schema["items"] = _schema(schema["items"])
    if "properties" in schema:
        schema["properties"] = {key: _schema(s) for key, s in schema["properties"].items()}
    return schema
