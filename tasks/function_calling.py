"""Function calling: turn a request into calls of the tools on offer.

A problem is {"key", "messages", "tools", "answers"}: chat messages, the tools as {"type":
"function", "function": SCHEMA}, and the wanted calls. Each argument has the list of its
accepted values, and so has each key of an object inside. "" there: it may be left out.

    {"name": "weather", "arguments": {"city": ["Rome", "Roma"], "days": [3, ""]}}

An answer is right if each wanted call finds a call of its own, in any order, and none is
left over. Strings are equal without regard to case and outer spaces. Types count: true and
"1" are not 1, and 1.0 is only where the schema says number. For an optional parameter null,
"", the schema's default and leaving it out are the same.
"""

import json
import lzma
import re
from pathlib import Path

from model import check, explain
from tasks import Task, Verdict, in_test, load_rows, without_thinking

ANSWER = """Answer with a call for each thing requested, adding nothing, each in this form:
<tool_call>
{"name": "TOOL", "arguments": {"PARAMETER": VALUE}}
</tool_call>"""
KEYS = {"name", "function", "tool_calls"}
MAX_CHARS = 32_768  # of an answer: a longer one is not read, so that none takes long
CALLS_START = re.compile(r"""\{\s*["']|\[\s*\{""")  # but not "[1]" or "{x}" in prose
ANYTHING = re.compile(r"\S")
JSON = json.JSONDecoder()
FENCES = re.compile(r"^\s*```(json)?|```\s*$")


class FunctionCalling(Task):
    name = "function_calling"
    errors = ("no call", "not JSON", "wrong number of calls")
    errors += ("wrong tool", "wrong parameters", "wrong values")
    reflect = (
        "You tried this and did not produce the correct tool call. Reflect on what "
        "went wrong: the tool, the number of calls, the parameters or their values? "
        "Write a short explanation that will help you do better next time."
    )
    retry = "Now try again: answer the same request with tool calls, in the same format."
    generic_reflection = (
        "I should choose the tool that fits each part of the request, make exactly "
        "one call for each, copy every value in the type that its schema asks for, "
        "and add nothing else."
    )

    def __init__(self, data="", difficulty=""):
        """difficulty of our own problems: easy, normal (the default), hard or mini."""
        self.rows = load(self, data) if data else load_embedded(difficulty or "normal")
        check(self.rows, f"no difficulty '{difficulty}': 'easy', 'normal', 'hard', 'mini'.")

    def messages(self, problem, native_tools=False):
        """The request; without native_tools, the tools in words before it."""
        if native_tools:
            return problem["messages"]
        *before, last = problem["messages"]
        content = "You can call these tools:"
        for tool in problem["tools"]:
            content += "\n" + json.dumps(tool["function"], ensure_ascii=False)
        content += f"\n\nRequest: {last['content']}\n\n{ANSWER}"
        return [*before, {"role": "user", "content": content}]

    def answer(self, problem):
        blocks = []
        for call in problem["answers"]:
            plain = call | {"arguments": first_choice(call["arguments"])}
            text = json.dumps(plain, ensure_ascii=False)
            blocks.append(f"<tool_call>\n{text}\n</tool_call>")
        return "\n".join(blocks)

    def verify(self, problem, text):
        try:
            return judge(problem, read_calls(text))
        except (ValueError, RecursionError) as error:  # also from printing a deep value
            return Verdict(False, "not JSON", f"the calls cannot be read: {error}.")


def load_embedded(level):
    """The problems that extras/make_calls.py made; the first line has the tools by name."""
    path = Path(__file__).with_name("calls.jsonl.xz")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        tools, *problems = [json.loads(line) for line in file]
    for problem in problems:
        problem["tools"] = [tools[name] for name in problem["tools"]]
    return [problem for problem in problems if problem["difficulty"] == level]


def load(task, data):
    """A user's file; extras/ knows other forms than ours."""
    rows = load_rows(data)
    ours = {"key", "messages", "tools", "answers"}
    if any(ours <= row.keys() for row in rows):
        for number, problem in enumerate(rows, 1):  # used once: none fails in a run
            check(ours <= problem.keys(), f"{data}, row {number} lacks one of {ours}.")
            with explain(f"{data}, row {number} is malformed", Exception):
                in_test(problem["key"]), task.messages(problem)
                right = task.verify(problem, task.answer(problem)).ok
            check(right, f"{data}, row {number}: its own answers do not pass.")
        return rows
    with explain(f"{data} needs extras/convert.py", ImportError):
        from extras.convert import convert
    return convert(data, rows)


def judge(problem, calls):
    """The verdict on calls [{"name", "arguments"}]. Each wanted call takes the first that
    is right for it; [Apple] before [Microsoft or Apple], which might take its only one."""
    wanted = sorted(
        problem["answers"],
        key=lambda call: sum(len(values or []) for values in call["arguments"].values()),
    )
    if len(calls) != len(wanted):
        error = "wrong number of calls" if calls else "no call"
        return Verdict(False, error, f"expected calls: {len(wanted)}, found: {len(calls)}.")
    schemas, left, unmet = {}, list(calls), None
    for tool in problem["tools"]:
        schemas[tool["function"]["name"]] = tool["function"]["parameters"]
    for answer in wanted:
        right = [compare(answer, call, schemas).ok for call in left]
        if True in right:
            del left[right.index(True)]
        else:
            unmet = answer
    if unmet is None:
        return Verdict(True)
    nearest = max(left, key=lambda call: call["name"] == unmet["name"])
    return compare(unmet, nearest, schemas)


def first_choice(accepted):
    """A plain value that is right."""
    if isinstance(accepted, list):
        return [first_choice(value) for value in accepted]
    if not isinstance(accepted, dict):
        return accepted
    value = {}
    for key, choices in accepted.items():
        choices = choices if isinstance(choices, list) else [choices]
        present = [choice for choice in choices if choice != ""]
        value[key] = first_choice(present[0]) if present else ""
    return value


def compare(wanted, call, schemas):
    name = wanted["name"]
    if call["name"] == name:
        return compare_arguments(wanted["arguments"], call["arguments"], schemas[name])
    return Verdict(False, "wrong tool", f"expected {name}, found {call['name']!r:.80}.")


def compare_arguments(wanted, given, schema):
    """Given {"city": "Rome"} where {"city": ["Rome", "Roma"], "days": [3, ""]} is wanted:
    right, if the schema does not require days. Wrong names are told before wrong values."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    in_both = wanted.keys() & given.keys()
    for key in sorted(wanted | given | dict.fromkeys(required), key=lambda k: k in in_both):
        spec, value = properties.get(key) or {}, given.get(key)
        # What nobody asked for may be given only as if it had been left out.
        accepted = wanted.get(key, [""] if key in properties else [])
        if not isinstance(accepted, list):  # in an object that is a default; null by Arrow
            accepted = [accepted]
        if key not in required:
            value, accepted = fill(value, spec), [fill(choice, spec) for choice in accepted]
        lacks = key in required and key not in given
        if lacks or not any(same(choice, value, spec) for choice in accepted):
            error = "wrong values" if key in in_both else "wrong parameters"
            detail = f"{key!r:.80}: expected {accepted!r:.200}, found {value!r:.80}."
            return Verdict(False, error, detail)
    return Verdict(True)


def fill(value, spec):
    """For an optional parameter null and "" are its default, or null if it has none."""
    return spec.get("default") if value is None or value == "" else value


def same(wanted, value, spec):
    """Whether a value counts as the wanted one, looking no deeper than that one goes."""
    types = {type(wanted), type(value)}
    if types == {dict}:
        return compare_arguments(wanted, value, spec).ok
    if types == {list}:
        items, pairs = spec.get("items") or {}, zip(wanted, value)
        return len(wanted) == len(value) and all(same(w, v, items) for w, v in pairs)
    if types == {str}:
        return wanted.strip().casefold() == value.strip().casefold()
    mixed = "number" in (spec.get("type") or "") and types == {int, float}
    return (mixed or len(types) == 1) and wanted == value


def read_calls(text: str) -> list[dict]:
    """The calls [{"name", "arguments"}] of an answer. Raises ValueError, RecursionError.
    <tool_call> blocks, if there are any, alone count and hold JSON only, perhaps fenced
    (the last may be unclosed). Else every object with a name counts: Llama's are bare."""
    text = without_thinking(text)
    if len(text) > MAX_CHARS:
        raise ValueError(f"there are more than {MAX_CHARS} characters")
    blocks = text.split("<tool_call>")[1:]
    if not blocks:
        return find_calls(text, CALLS_START)
    calls = []
    for block in blocks:
        block = FENCES.sub("", block.partition("</tool_call>")[0])
        calls += find_calls(block, ANYTHING)
    return calls


def find_calls(text, start):
    """The calls in JSON values that begin like this; ValueError where one is no JSON."""
    calls, end = [], 0
    while match := start.search(text, end):
        value, end = JSON.raw_decode(text, match.start())
        if isinstance(value, dict):
            if start is CALLS_START and not value.keys() & KEYS:
                continue  # an object in prose
            value = value.get("tool_calls", [value])
        calls += map(read_call, value if isinstance(value, list) else [value])
    return calls


def read_call(value):
    """OpenAI's may be in {"function": ...}, arguments as text; Llama's say "parameters"."""
    call = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(call, dict):
        raise ValueError(f"a call must be an object, found {call!r:.60}")
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = JSON.decode(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments must be an object, found {arguments!r:.60}")
    return {"name": call.get("name"), "arguments": arguments}
