"""Function calling: the generator, the two data forms and the verifier. Each test names its bug."""

import copy
import json
import os
import time
from pathlib import Path

import pytest

from model import UserError
from tasks import in_test
from tasks.function_calling import MAX_CHARS, FunctionCalling, _pair, read_calls

ROOT = Path(__file__).resolve().parent.parent
BFCL = Path(os.environ.get("BFCL", ROOT.parent / "shared" / "data" / "bfcl"))
SPLITS = {"simple_python": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200}
LIMIT = 0.05  # seconds for one verdict


@pytest.fixture(scope="module")
def task():
    return FunctionCalling()


@pytest.fixture(scope="module")
def problems(task):
    return task.problems("train", 2000, seed=0)


def problem_of(properties, arguments, required=None, form="exact", name="f"):
    """A problem with one tool and one wanted call."""
    schema = {"type": "object", "properties": properties}
    schema["required"] = list(properties) if required is None else required
    function = {"name": name, "description": "", "parameters": schema}
    return {
        "key": "k",
        "messages": [{"role": "user", "content": "q"}],
        "tools": [{"type": "function", "function": function}],
        "answers": [{"name": name, "arguments": arguments}],
        "form": form,
    }


def call(name="f", **arguments):
    return {"name": name, "arguments": arguments}


def reference_answer(problem):
    """The text of a right answer; in the Berkeley form, of the first values that may be given."""

    def first(wanted):
        if isinstance(wanted, list):
            return [first(value) for value in wanted]
        if not isinstance(wanted, dict):
            return wanted
        lists = {key: v if isinstance(v, list) else [v] for key, v in wanted.items()}
        firsts = {key: next((v for v in vs if v != ""), "") for key, vs in lists.items()}
        return {key: first(value) for key, value in firsts.items() if value != ""}

    calls = problem["answers"]
    if problem["form"] == "berkeley":
        calls = [made | {"arguments": first(made["arguments"])} for made in calls]
    return "\n".join(f"<tool_call>\n{json.dumps(made)}\n</tool_call>" for made in calls)


def error_of(task, problem, answer):
    text = answer if isinstance(answer, str) else json.dumps(answer)
    verdict = task.verify(problem, text)
    assert verdict.ok == (verdict.error == "") == (verdict.detail == "")
    return verdict.error


def spec_of(problem, name):
    tools = {tool["function"]["name"]: tool["function"] for tool in problem["tools"]}
    return tools[name]["parameters"]


# The generator


def test_catalog_is_as_large_and_varied_as_promised(task):
    tools = [tool for tools in task.domains.values() for tool in tools]
    assert len(task.domains) >= 8 and len(tools) >= 40
    assert len({tool["name"] for tool in tools}) == len(tools)
    text = json.dumps([task.offers[tool["name"]] for tool in tools])
    for kind in ("string", "integer", "number", "boolean", "array", "object"):
        assert f'"type": "{kind}"' in text
    assert '"enum"' in text and '"default"' in text
    assert '"say"' not in text and '"values"' not in text  # the generator's keys are hidden
    for tool in tools:
        assert len(tool["phrasings"]) >= 3
        required = task.offers[tool["name"]]["function"]["parameters"]["required"]
        assert required
        for phrasing in tool["phrasings"]:
            assert all("{" + name in phrasing for name in required), (tool["name"], phrasing)
        for name, spec in tool["parameters"].items():  # an optional one's words hold its value
            needs = spec["type"] != "boolean"
            assert all(("{" + name in clause) == needs for clause in spec.get("say", []))


@pytest.mark.parametrize("difficulty", [None, "easy", "hard"])
def test_problems_are_distinct_disjoint_and_repeatable(difficulty):
    task = FunctionCalling(difficulty=difficulty)
    train, test = task.problems("train", 1000, seed=0), task.problems("test", 250, seed=0)
    assert len(train) == 1000 and len(test) == 250
    keys = [{p["key"] for p in train}, {p["key"] for p in test}]
    assert len(keys[0]) == 1000 and len(keys[1]) == 250 and not keys[0] & keys[1]
    assert not keys[1] & {p["key"] for p in task.problems("train", 1000, seed=1)}
    assert all(in_test(key) for key in keys[1])
    assert FunctionCalling(difficulty=difficulty).problems("train", 50, seed=0) == train[:50]
    assert task.problems("train", 50, seed=1) != train[:50]
    calls = {len(p["answers"]) for p in train}
    offered = {len(p["tools"]) for p in train}
    expected = {
        None: ({1, 2, 3}, {2, 3, 4, 5, 6}),
        "easy": ({1}, {2}),
        "hard": ({2, 3, 4}, {4, 5, 6}),
    }
    assert (calls, offered) == expected[difficulty]
    assert json.loads(json.dumps(train)) == train
    assert task.problems("train", 0, seed=0) == []


def test_unknown_difficulty_is_refused_by_name():
    with pytest.raises(UserError, match="no difficulty 'extreme'.*easy, hard"):
        FunctionCalling(difficulty="extreme")


def test_reference_answers_are_right(task, problems):
    for problem in problems:
        assert task.verify(problem, reference_answer(problem)).ok
        names = [tool["function"]["name"] for tool in task.tools(problem)]
        assert len(set(names)) == len(names)
        assert {c["name"] for c in problem["answers"]} <= set(names)


def test_every_value_stands_in_the_request(task, problems):
    """Else the request would not determine the call, and a right answer would be luck."""
    specs = {t["name"]: t["parameters"] for tools in task.domains.values() for t in tools}

    def mentioned(spec, value, text):
        if isinstance(value, dict):
            return all(mentioned(spec["properties"][k], v, text) for k, v in value.items())
        if isinstance(value, list):
            return all(mentioned(spec["items"], v, text) for v in value)
        if isinstance(value, bool):
            words = [spec["words"][json.dumps(value)]] if "words" in spec else spec["say"]
            return any(word.lower() in text for word in words)
        return str(value).lower() in text

    for problem in problems:
        text = problem["messages"][0]["content"]
        assert "{" not in text and "  " not in text and text[0].isupper() and text[-1] in ".?"
        for wanted in problem["answers"]:
            for name, value in wanted["arguments"].items():
                spec = specs[wanted["name"]][name]
                assert mentioned(spec, value, text.lower()), (wanted, text)
                assert value != spec.get("default"), "an argument that is there is no default"
                if "enum" in spec:
                    assert value in spec["enum"]


def test_messages_hold_the_tools_once(task, problems):
    problem = problems[0]
    before = copy.deepcopy(problem)
    native, words = task.messages(problem, native_tools=True), task.messages(problem)
    assert native == problem["messages"] == before["messages"]
    assert [m["role"] for m in words] == ["user"]
    for tool in task.tools(problem):
        assert json.dumps(tool["function"], ensure_ascii=False) in words[0]["content"]
    assert native[0]["content"] in words[0]["content"] and "<tool_call>" in words[0]["content"]


# The verifier: corruptions of right answers


def first_with(problem, kind):
    """Indices (call, parameter) of the first wanted argument whose schema has this type."""
    for i, wanted in enumerate(problem["answers"]):
        for name in wanted["arguments"]:
            if spec_of(problem, wanted["name"])["properties"][name]["type"] == kind:
                return i, name
    return None


def change_value(kind, change):
    def corrupt(problem, calls):
        if (found := first_with(problem, kind)) is None:
            return None
        i, name = found
        calls[i]["arguments"][name] = change(calls[i]["arguments"][name])
        return calls

    return corrupt


def change_arguments(change):
    def corrupt(problem, calls):
        change(calls[-1]["arguments"], spec_of(problem, calls[-1]["name"]))
        return calls

    return corrupt


def rename_parameter(arguments, schema):
    name = schema["required"][0]
    arguments[name + "_"] = arguments.pop(name)


def other_tool(problem, calls):
    used = {c["name"] for c in calls}
    other = [t["function"]["name"] for t in problem["tools"] if t["function"]["name"] not in used]
    calls[0]["name"] = (other or ["no_such_tool"])[0]
    return calls


def unwanted_optional(problem, calls):
    for made in calls:
        for name, spec in spec_of(problem, made["name"])["properties"].items():
            if name not in made["arguments"] and spec["type"] == "string":
                values = [v for v in spec.get("enum", ["x"]) if v != spec.get("default")]
                made["arguments"][name] = values[0]
                return calls
    return None


def drop_call(problem, calls):
    return calls[1:] if len(calls) > 1 else None


def same_twice(problem, calls):
    """All calls are there, one twice, another of the same tool not at all."""
    names = [c["name"] for c in calls]
    return [calls[0]] * len(calls) if len(names) > 1 and len(set(names)) == 1 else None


CORRUPTIONS = {
    "nothing": ("no call", lambda p, calls: ""),
    "prose": ("no call", lambda p, calls: "I would call " + calls[0]["name"] + " [see 1] {now}."),
    "empty list": ("no call", lambda p, calls: []),
    "python call": ("no call", lambda p, calls: calls[0]["name"] + "(x=1)"),
    "cut short": ("not JSON", lambda p, calls: json.dumps(calls)[:-2]),
    "single quotes": ("not JSON", lambda p, calls: str(calls)),
    "bracket too many": ("not JSON", lambda p, calls: json.dumps(calls[0]) + "}"),
    "key twice": ("not JSON", lambda p, calls: '{"name": "a", ' + json.dumps(calls[0])[1:]),
    "NaN": ("not JSON", lambda p, calls: '{"name": "a", "arguments": {"x": NaN}}'),
    "arguments a list": ("not JSON", lambda p, calls: [c | {"arguments": [1]} for c in calls]),
    "one call too many": ("wrong number of calls", lambda p, calls: calls + calls[:1]),
    "one call too few": ("wrong number of calls", drop_call),
    "another tool on offer": ("wrong tool", other_tool),
    "name in capitals": (
        "wrong tool",
        lambda p, calls: [c | {"name": c["name"].upper()} for c in calls],
    ),
    "name a number": ("wrong tool", lambda p, calls: [c | {"name": 1} for c in calls]),
    "no arguments": ("wrong parameters", change_arguments(lambda a, s: a.clear())),
    "one missing": ("wrong parameters", change_arguments(lambda a, s: a.pop(s["required"][0]))),
    "one invented": ("wrong parameters", change_arguments(lambda a, s: a.update(zzz=1))),
    "one renamed": ("wrong parameters", change_arguments(rename_parameter)),
    "one not asked for": ("wrong parameters", unwanted_optional),
    "another string": ("wrong values", change_value("string", lambda v: v + "s")),
    "string in capitals": ("wrong values", change_value("string", lambda v: v.swapcase() + ".")),
    "integer off by one": ("wrong values", change_value("integer", lambda v: v + 1)),
    "integer as string": ("wrong values", change_value("integer", str)),
    "integer as float": ("wrong values", change_value("integer", float)),
    "number as string": ("wrong values", change_value("number", str)),
    "boolean as number": ("wrong values", change_value("boolean", int)),
    "boolean as string": ("wrong values", change_value("boolean", lambda v: str(v).lower())),
    "boolean negated": ("wrong values", change_value("boolean", lambda v: not v)),
    "null": ("wrong values", change_value("string", lambda v: None)),
    "list short of one": ("wrong values", change_value("array", lambda v: v[:-1])),
    "list with one twice": ("wrong values", change_value("array", lambda v: v + v[:1])),
    "list as string": ("wrong values", change_value("array", json.dumps)),
    "object short of a key": (
        "wrong values",
        change_value("object", lambda v: dict(list(v.items())[1:])),
    ),
    "object with a new key": ("wrong values", change_value("object", lambda v: v | {"zzz": 1})),
    "one call twice": ("wrong", same_twice),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupted_answer_fails_with_its_category(task, problems, corruption):
    expected, corrupt = CORRUPTIONS[corruption]
    tried = 0
    for problem in problems[:400]:
        answer = corrupt(problem, copy.deepcopy(problem["answers"]))
        if answer is not None:
            tried += 1
            assert error_of(task, problem, answer).startswith(expected), (problem["key"], answer)
    assert tried >= 5


def test_number_parameters_take_whole_numbers_in_either_writing(task):
    problem = problem_of({"x": {"type": "number"}}, {"x": 5})
    assert error_of(task, problem, call(x=5)) == error_of(task, problem, call(x=5.0)) == ""
    assert error_of(task, problem, call(x=True)) == "wrong values"
    problem = problem_of({"x": {"type": "number"}}, {"x": 1.0})
    assert error_of(task, problem, call(x=1)) == ""
    for wrong in (True, "1", 1.5):
        assert error_of(task, problem, call(x=wrong)) == "wrong values"
    nested = {"type": "array", "items": {"type": "integer"}}
    problem = problem_of({"x": nested}, {"x": [1, 2]})
    assert error_of(task, problem, call(x=[1.0, 2])) == "wrong values"
    assert error_of(task, problem, call(x=[True, 2])) == "wrong values"


def test_a_default_may_be_said_or_left_out(task):
    properties = {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}}
    problem = problem_of(properties, {"a": 1}, required=["a"])
    assert error_of(task, problem, call(a=1, b=1)) == ""
    assert error_of(task, problem, call(a=1, b=True)) == "wrong parameters"
    assert error_of(task, problem, call(a=1, b=2)) == "wrong parameters"
    problem = problem_of(properties, {"a": 1, "b": 1}, required=["a"])
    assert error_of(task, problem, call(a=1)) == ""
    problem = problem_of(properties, {"a": 1, "b": 1}, required=["a", "b"])
    assert error_of(task, problem, call(a=1)) == "wrong parameters"


def test_an_empty_string_is_not_a_missing_one_in_the_exact_form(task):
    problem = problem_of({"a": {"type": "string"}}, {"a": ""})
    assert error_of(task, problem, call(a="")) == ""
    assert error_of(task, problem, call()) == "wrong parameters"


def test_no_text_counts_as_leaving_out_in_the_exact_form(task):
    problem = problem_of({"a": {"type": "integer"}, "b": {"type": "string"}}, {"a": 1})
    for blank in ("", "(left out)", "left out", ["left out"]):
        assert error_of(task, problem, call(a=1, b=blank)) == "wrong parameters"
        assert error_of(task, problem, call(a=1, zzz=blank)) == "wrong parameters"


def test_calls_pair_off_in_any_order_even_where_greed_fails(task):
    accepts = problem_of({"x": {"type": "integer"}}, {"x": [1, 2]}, form="berkeley")
    accepts["answers"].append(call(x=[1]))
    for first, second in ((1, 2), (2, 1), (1, 1)):
        assert error_of(task, accepts, [call(x=first), call(x=second)]) == ""
    assert error_of(task, accepts, [call(x=2), call(x=2)]) == "wrong values"
    assert len(_pair([[True, True, False], [True, False, False], [False, True, True]])) == 3
    assert len(_pair([[True, False], [True, False]])) == 1


def test_details_say_what_differs(task):
    problem = problem_of(
        {"city": {"type": "string"}, "n": {"type": "integer"}}, {"city": "Rome", "n": 2}
    )
    for answer, words in (
        (call("g", city="Rome", n=2), ("f", "g")),
        (call(city="Rome"), ("'n'", "expected 2", "nothing")),
        (call(city="Rome", n=2, x=3), ("'x'", "left out", "3")),
        (call(city="Paris", n=2), ("city", "'Rome'", "'Paris'")),
        (call(city="Rome", n="2"), ("'n'", "expected 2", "'2'")),
        ([call(), call()], ("1", "2")),
    ):
        detail = task.verify(problem, json.dumps(answer)).detail
        assert all(word in detail for word in words) and detail.endswith("."), detail


# The verifier: how calls may be written

GOOD = '{"name": "f", "arguments": {"x": 1}}'
BLOCK = f"<tool_call>\n{GOOD}\n</tool_call>"


@pytest.mark.parametrize(
    "text",
    [
        BLOCK,
        f"Sure, here it is:\n{BLOCK}\nDone.",
        f"<tool_call>{GOOD}",
        f"<tool_call>[{GOOD}]</tool_call>",
        f"Note [1] and {{x}}.\n{BLOCK} and later {{broken",
        GOOD,
        f"[{GOOD}]",
        f"```json\n{GOOD}\n```",
        f"```\n[{GOOD}]\n```\nThis calls f.",
        f'Its arguments are {{"x": 1}}, so: {GOOD}',
        f"I think [1] of {{x}}: {GOOD} ok?",
        '{"name": "f", "parameters": {"x": 1}}',
        '{"name": "f", "arguments": "{\\"x\\": 1}"}',
        '{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}',
        '{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}',
        f"<think>\n{BLOCK} or {{'no'}}?\n</think>\n\n{BLOCK}",
        f"<|python_tag|>{GOOD}",
        f"[TOOL_CALLS] [{GOOD}]",
        ' { "name" : "f" ,\n\t"arguments" : { "x" : 1 } } ',
        '{"arguments": {"x": 1}, "name": "\\u0066"}',
    ],
)
def test_writings_that_are_read(task, text):
    assert error_of(task, problem_of({"x": {"type": "integer"}}, {"x": 1}), text) == ""


@pytest.mark.parametrize(
    "text, error",
    [
        ("", "no call"),
        ("<tool_call></tool_call>", "no call"),
        ("[]", "no call"),
        ('{"x": 1}', "no call"),
        ("f(x=1)", "no call"),
        ("<tool_call>f(x=1)</tool_call>", "not JSON"),
        (f"<tool_call>{GOOD}}}</tool_call>", "not JSON"),
        (f"<tool_call>{GOOD} done</tool_call>", "not JSON"),
        (f"<tool_call>{GOOD[:-1]}</tool_call>", "not JSON"),
        (f"{BLOCK}<tool_call>{{</tool_call>", "not JSON"),
        (f"[{GOOD}", "not JSON"),
        (f"[{GOOD}, 5]", "not JSON"),
        (f"{GOOD}]", "not JSON"),
        ("{'name': 'f', 'arguments': {'x': 1}}", "not JSON"),
        ('{"name": "f", "arguments": "x=1"}', "not JSON"),
        ('{"name": "f", "arguments": {"x": 1, "x": 1}}', "not JSON"),
        ('{"name": "f", "arguments": {"x": Infinity}}', "not JSON"),
        ('{"name": "f", "arguments": {"x": 1e999}}', "wrong values"),
        ('{"name": "f"}', "wrong parameters"),
        (f"{GOOD} {GOOD}", "wrong number of calls"),
        (f"{BLOCK}\n{BLOCK}", "wrong number of calls"),
        (f"{GOOD} " * 2, "wrong number of calls"),
        (f"<tool_call>{GOOD} {{}}</tool_call>", "wrong number of calls"),
    ],
)
def test_writings_that_are_not(task, text, error):
    assert error_of(task, problem_of({"x": {"type": "integer"}}, {"x": 1}), text) == error


def test_several_calls_one_after_another(task):
    problem = problem_of({"x": {"type": "integer"}}, {"x": 1})
    problem["answers"].append(call(x=2))
    two = [json.dumps(call(x=2)), json.dumps(call(x=1))]
    for text in (
        "\n".join(two),
        ", ".join(two),
        f"<tool_call>{two[0]}</tool_call> and <tool_call>{two[1]}</tool_call>",
        f"<tool_call>{two[0]}\n{two[1]}</tool_call>",
        f"```json\n{two[0]}\n```\nand\n```json\n{two[1]}\n```",
    ):
        assert error_of(task, problem, text) == ""


# The verifier: nothing raises, nothing takes long

SIMPLE = problem_of({"x": {"type": "integer"}}, {"x": 1})
HOSTILE = {
    "open lists": "[" * 100_000,
    "open lists, short": "[" * 30_000,
    "open objects": '{"a":' * 6_000,
    "open lists of objects": "[{" * 15_000,
    "closed lists": "[" * 15_000 + "]" * 15_000,
    "deep arguments": '{"name": "f", "arguments": {"x": ' + "[" * 900 + "]" * 900 + "}}",
    "deeper arguments": '{"name": "f", "arguments": {"x": ' + "[" * 9_000 + "]" * 9_000 + "}}",
    "deep as text": '{"name": "f", "arguments": "' + "[" * 20_000 + '"}',
    "long integer": '{"name": "f", "arguments": {"x": ' + "1" * 5_000 + "}}",
    "integer at the limit": '{"name": "f", "arguments": {"x": ' + "1" * 4_300 + "}}",
    "long float": '{"name": "f", "arguments": {"x": 1.' + "1" * 30_000 + "}}",
    "large exponent": '{"name": "f", "arguments": {"x": 1e' + "9" * 4_000 + "}}",
    "many openings": "<tool_call>" * 2_900,
    "many pairs": "<tool_call></tool_call>" * 1_400,
    "many blocks": "<tool_call>{}</tool_call>" * 1_300,
    "many calls": GOOD * 880,
    "many calls in a list": "[" + ",".join([GOOD] * 850) + "]",
    "many empty objects": "[" + "{}," * 10_000 + "{}]",
    "many spaces": '{"name"' + " " * 32_000,
    "spaced brackets": "{ [ " * 8_000,
    "many spaces after": GOOD + (" " * 30_000) + "x",
    "many keys": "{" + ",".join(f'"{i}":1' for i in range(3_500)) + "}",
    "many think tags": "</think>" * 4_000,
    "lone surrogate": '{"name": "\\ud800", "arguments": {"\\udfff": "\\ud800"}}',
    "raw surrogate": '{"name": "\ud800", "arguments": {}}',
    "nul and rtl": "\x00\u202e{\u2028" + GOOD + "\u0000",
    "fullwidth": "{\uff02name\uff02: 1}",
    "backslashes": '{"name": "' + "\\" * 30_000,
    "one long string": '{"name": "' + "a" * 32_000 + '", "arguments": {}}',
    "long and over": "x" * 1_000_000,
}


def judged_in_time(task, problem, text):
    """CPU time of this thread, the better of two: the machine may be busy."""
    times = []
    for _ in range(2):
        start = time.thread_time()
        verdict = task.verify(problem, text)
        times.append(time.thread_time() - start)
        if times[-1] < LIMIT:
            break
    assert min(times) < LIMIT, (min(times), text[:60])
    assert verdict.ok or verdict.error in task.errors
    (verdict.error + verdict.detail).encode("utf-8")  # can be printed
    assert len(verdict.detail) < 2_000
    return verdict


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_neither_raise_nor_hang(task, name):
    text = HOSTILE[name]
    verdict = judged_in_time(task, SIMPLE, text)
    assert not verdict.ok or name == "nul and rtl" or name == "many spaces after"
    for wrapped in (f"<tool_call>{text}", f"<tool_call>{text}</tool_call>", f"{text}{GOOD}"):
        judged_in_time(task, SIMPLE, wrapped)


def test_no_depth_of_nesting_raises(task):
    """What the parser can just read, printing it might not."""
    for depth in range(800, 1010, 3):
        value = "[" * depth + "]" * depth
        for text in (f'{{"name": {value}}}', f'{{"name": "f", "arguments": {{"x": {value}}}}}'):
            assert task.verify(SIMPLE, text).error in ("not JSON", "wrong tool", "wrong values")


def test_long_answers_are_not_read(task):
    assert error_of(task, SIMPLE, " " * MAX_CHARS + GOOD) == "not JSON"
    assert error_of(task, SIMPLE, " " * (MAX_CHARS - len(GOOD)) + GOOD) == ""


# Data files


def write(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def xlam_row(n=1, **changes):
    tools = [
        {
            "name": "weather",
            "description": "Weather.",
            "parameters": {
                "city": {"description": "City.", "type": "str"},
                "days": {"description": "Days.", "type": "int, optional", "default": 3},
                "tags": {"description": "Tags.", "type": "List[float], optional"},
                "extra": {"description": "Any.", "type": "Union[str, int]", "default": ""},
                "type": {
                    "description": "A parameter of this name.",
                    "type": "bool",
                    "default": False,
                },
            },
        },
        {"name": "nothing", "description": "", "parameters": {}},
    ]
    answers = [{"name": "weather", "arguments": {"city": "Rome", "days": n}}]
    row = {
        "id": n,
        "query": f"Weather in Rome, {n} days",
        "tools": tools,
        "answers": answers,
    } | changes
    return {
        k: json.dumps(v) if k in ("tools", "answers") and not isinstance(v, str) else v
        for k, v in row.items()
    }


NOT_ON_OFFER = ((11, "g"), (12, ["g"]), (13, None))


def test_xlam_rows_become_problems(tmp_path):
    listed = xlam_row(9)
    listed["tools"], listed["answers"] = json.loads(listed["tools"]), json.loads(listed["answers"])
    rows = [xlam_row(n) for n in range(1, 9)] + [listed, xlam_row(3), xlam_row(10, answers=[])]
    rows += [xlam_row(n, answers=[{"name": name, "arguments": {}}]) for n, name in NOT_ON_OFFER]
    task = FunctionCalling(write(tmp_path / "xlam.jsonl", rows))
    found = task.problems("train", 100, 0) + task.problems("test", 100, 0)
    assert len(found) == 9  # left out: one repeated, one without a call, the tools not on offer
    for problem in found:
        assert error_of(task, problem, reference_answer(problem)) == ""
        assert task.messages(problem, native_tools=True)[0]["content"].startswith("Weather in Rome")
        weather, nothing = (tool["function"]["parameters"] for tool in task.tools(problem))
        assert weather["required"] == ["city"] and nothing["properties"] == {}
        kinds = {name: spec.get("type") for name, spec in weather["properties"].items()}
        assert kinds == {
            "city": "string",
            "days": "integer",
            "tags": "array",
            "extra": None,
            "type": "boolean",
        }
        days = problem["answers"][0]["arguments"]["days"]
        for city, said in (("Rome", str(days)), ("rome", days)):
            wrong = call("weather", city=city, days=said)
            assert error_of(task, problem, wrong) == "wrong values"
        left_out = error_of(task, problem, call("weather", city="Rome"))
        assert left_out == ("" if days == 3 else "wrong parameters")
    array = tmp_path / "xlam.json"
    array.write_text(json.dumps(rows))
    assert len(FunctionCalling(str(array)).rows) == 9


BERKELEY = {
    "id": "s_0",
    "question": [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
    ],
    "function": [
        {
            "name": "geo.weather",
            "description": "Weather.",
            "parameters": {
                "type": "dict",
                "properties": {
                    "city": {"type": "string", "description": "City."},
                    "wind": {"type": "float", "description": "Wind."},
                    "days": {"type": "integer", "description": "Days."},
                    "at": {"type": "tuple", "items": {"type": "float"}, "description": "Place."},
                    "any": {"type": "any", "description": "Anything."},
                    "unit": {"type": "string", "description": "Unit."},
                    "box": {
                        "type": "dict",
                        "properties": {"w": {"type": "integer"}, "name": {"type": "string"}},
                        "description": "Box.",
                    },
                },
                "required": ["city", "wind"],
            },
        }
    ],
}
TRUTH = {
    "city": ["New York, NY", "NYC"],
    "wind": ["", 3.0],
    "days": [2],
    "at": [[1.5, 2.0], [2.0, 1.5]],
    "any": ["x", ""],
    "unit": ["", "km"],
    "box": [{"w": [2], "name": ["", "Big Box"]}],
    "ghost": ["", 1],
}
RIGHT = {
    "city": "NYC",
    "wind": 3.0,
    "days": 2,
    "at": [1.5, 2.0],
    "box": {"w": 2, "name": "Big Box"},
}


def berkeley_task(folder, row=BERKELEY, truth=TRUTH, truth_id="s_0"):
    answers = {"id": truth_id, "ground_truth": [{"geo.weather": truth}]}
    write(folder / "possible_answer" / "b.json", [answers])
    return FunctionCalling(write(folder / "b.json", [row]))


def test_berkeley_types_become_json_schema(tmp_path):
    task = berkeley_task(tmp_path)
    (problem,) = task.rows
    (tool,) = task.tools(problem)
    assert tool["type"] == "function" and tool["function"]["name"] == "geo.weather"
    schema = tool["function"]["parameters"]
    assert schema["type"] == "object" and schema["required"] == ["city", "wind"]
    assert schema["properties"]["wind"]["type"] == "number"
    assert schema["properties"]["at"]["type"] == "array"
    assert schema["properties"]["at"]["items"] == {"type": "number"}
    assert (
        schema["properties"]["box"]["type"] == "object"
        and "type" not in schema["properties"]["any"]
    )
    roles = [m["role"] for m in task.messages(problem)]
    assert roles == ["system", "user"]
    assert task.messages(problem)[0]["content"] == "Be brief."
    assert "geo.weather" in task.messages(problem)[1]["content"]


@pytest.mark.parametrize(
    "changes, error",
    [
        ({}, ""),
        ({"city": "new york ny"}, ""),  # the leaderboard's strings
        ({"city": "New Jersey"}, "wrong values"),
        ({"wind": 3}, ""),
        ({"wind": "3"}, "wrong values"),
        ({"wind": None}, "wrong values"),
        ({"wind": ...}, "wrong parameters"),  # "" among its values, but required
        ({"days": 2.0}, "wrong values"),
        ({"days": True}, "wrong values"),
        ({"days": ...}, "wrong parameters"),
        ({"at": [2, 1.5]}, ""),
        ({"at": [2.0, 2.0]}, "wrong values"),
        ({"at": [1.5]}, "wrong values"),
        ({"any": "X"}, ""),
        ({"any": 1}, "wrong values"),
        ({"unit": "KM"}, ""),
        ({"unit": "miles"}, "wrong values"),
        ({"unit": ""}, ""),  # on the leaderboard, too
        ({"wind": ""}, "wrong values"),  # it may be left out, but a blank is no number
        ({"wind": "."}, "wrong values"),
        ({"day": ""}, "wrong parameters"),
        ({"box": {"w": 2, "h": ""}}, "wrong values"),
        ({"box": {"w": 2}}, ""),
        ({"box": {"name": "Big Box"}}, "wrong values"),
        ({"box": {"w": "2"}}, "wrong values"),
        ({"box": {"w": 2, "h": 1}}, "wrong values"),
        ({"box": [2]}, "wrong values"),
        ({"ghost": 1}, "wrong parameters"),
        ({"day": 2}, "wrong parameters"),
    ],
)
def test_berkeley_alternatives(tmp_path, changes, error):
    task = berkeley_task(tmp_path)
    (problem,) = task.rows
    assert error_of(task, problem, reference_answer(problem)) == ""
    arguments = {k: v for k, v in (RIGHT | changes).items() if v is not ...}
    assert error_of(task, problem, {"name": "geo.weather", "arguments": arguments}) == error


BAD_ROWS = {
    "query": (xlam_row(query=5), "request must be text"),
    "blank query": (xlam_row(query="  "), "no user message with words"),
    "tools not JSON": (xlam_row(tools="[{"), "Expecting"),
    "tools an object": (xlam_row(tools={"name": "f"}), "tools must be a list"),
    "tools null": ({**xlam_row(), "tools": None}, "tools must be a list"),
    "nameless tool": (xlam_row(tools=[{"parameters": {}}]), "tool's name must be text"),
    "parameters a list": (xlam_row(tools=[{"name": "f", "parameters": [1]}]), "parameters of f"),
    "parameter a string": (
        xlam_row(tools=[{"name": "f", "parameters": {"x": "int"}}]),
        "schema of x must be an object",
    ),
    "answers of text": (xlam_row(answers=["f"]), "each of answers must be an object"),
    "arguments a list": (
        xlam_row(answers=[{"name": "nothing", "arguments": []}]),
        "arguments of nothing",
    ),
    "other columns": (
        {"prompt": "x", "answer": "y"},
        "columns must be query.*found prompt, answer",
    ),
    "no columns": ({}, "columns must be .* found none"),
    "not an object": ([1], "must be an object"),
    "not JSON": ("{broken", "cannot be read as UTF-8 JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name):
    row, message = BAD_ROWS[name]
    data = write(tmp_path / "data.jsonl", [xlam_row(), row])
    with pytest.raises(UserError, match=rf"data\.jsonl, line 2.*{message}"):
        FunctionCalling(data)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"question": []}, "question must have one turn, found 0"),
        ({"question": "Weather?"}, "question must be a list, found 'Weather"),
        ({"question": [["Weather?"]]}, "each of question must be an object"),
        ({"question": [[{"role": "user", "content": None}]]}, "request must be text"),
        ({"question": [[{"role": "system", "content": "x"}]]}, "no user message"),
        ({"function": {}}, "function must be a list"),
        (
            {"function": [{"name": "f", "parameters": {"type": "dict", "properties": 5}}]},
            "properties must be an object, found 5",
        ),
        (
            {"function": [{"name": "f", "parameters": {"type": "dict", "required": 5}}]},
            "required must be a list, found 5",
        ),
        ({"id": "s_1"}, "possible_answer of s_1 must be a list"),
        ({"id": ["s_1"]}, "possible_answer of"),
    ],
)
def test_a_bad_berkeley_row_is_named_by_file_and_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"b\.json, line 1: .*{message}"):
        berkeley_task(tmp_path, row=BERKELEY | changes)


def test_bad_berkeley_answers_are_named(tmp_path):
    with pytest.raises(UserError, match="b.json, line 1: the accepted values of city must be"):
        berkeley_task(tmp_path, truth={"city": "NYC"})
    with pytest.raises(UserError, match="b.json, line 1: the possible_answer of s_0 must be"):
        write(tmp_path / "possible_answer" / "b.json", [{"id": "s_0"}])
        FunctionCalling(write(tmp_path / "b.json", [BERKELEY]))
    (tmp_path / "possible_answer" / "b.json").unlink()
    with pytest.raises(UserError, match="possible_answer/b.json does not exist"):
        FunctionCalling(str(tmp_path / "b.json"))


def test_a_file_without_a_usable_problem_is_refused(tmp_path):
    data = write(tmp_path / "data.jsonl", [xlam_row(answers=[])])
    with pytest.raises(UserError, match="data.jsonl holds no usable problem"):
        FunctionCalling(data)
    with pytest.raises(UserError, match="b.json holds no usable problem"):
        berkeley_task(tmp_path, row=BERKELEY | {"function": []})
    with pytest.raises(UserError, match="difficulty is for the embedded problems"):
        FunctionCalling(write(tmp_path / "data.jsonl", [xlam_row()]), difficulty="easy")


# The leaderboard's own files


@pytest.fixture(scope="module", params=SPLITS)
def bfcl(request):
    data = BFCL / f"BFCL_v4_{request.param}.json"
    if not data.is_file():
        pytest.skip(
            f"the Berkeley files are not in {BFCL}; set BFCL to their folder to run this test"
        )
    return request.param, FunctionCalling(str(data))


def test_bfcl_reference_answers_are_right(bfcl):
    split, task = bfcl
    repeated = 4 if split == "multiple" else 0  # requests that stand twice in the file
    assert len(task.rows) == SPLITS[split] - repeated
    train, test = task.problems("train", 1000, 0), task.problems("test", 1000, 0)
    assert len(train) + len(test) == len(task.rows) and len(test) > 20
    for problem in task.rows:
        verdict = task.verify(problem, reference_answer(problem))
        assert verdict.ok, (problem["key"], verdict)
        backwards = "\n".join(
            json.dumps(c) for c in read_calls(reference_answer(problem))[::-1]
        )
        assert task.verify(problem, backwards).ok
        kinds = json.dumps([tool["function"]["parameters"] for tool in task.tools(problem)])
        assert not any(f'"type": "{kind}"' in kinds for kind in ("dict", "float", "tuple", "any"))


BFCL_CORRUPTIONS = {
    "no call": lambda p, calls: "I cannot help with that.",
    "not JSON": lambda p, calls: json.dumps(calls)[:-1],
    "wrong number of calls": lambda p, calls: calls + calls[:1],
    "wrong tool": lambda p, calls: [calls[0] | {"name": calls[0]["name"] + "x"}, *calls[1:]],
    "wrong parameters": change_arguments(lambda a, s: a.update(zzz=1)),
}


def test_bfcl_corruptions_are_rejected(bfcl):
    _, task = bfcl
    for problem in task.rows:
        for expected, corrupt in BFCL_CORRUPTIONS.items():
            calls = read_calls(reference_answer(problem))
            assert error_of(task, problem, corrupt(problem, calls)) == expected


def test_bfcl_wrong_values_are_rejected(bfcl):
    """Every argument of every call in turn: another value, and its own as a string."""
    _, task = bfcl
    for problem in task.rows[::3]:
        calls = read_calls(reference_answer(problem))
        for i, made in enumerate(calls):
            for name, value in made["arguments"].items():
                wrongs = ["zzz", ["zzz"], {"zzz": 1}, 987654321]
                if isinstance(value, (bool, int)):
                    wrongs += [str(value), float(value) + 0.5]
                    wrongs.append(int(value) if isinstance(value, bool) else value == 1)
                for wrong in wrongs:
                    bad = copy.deepcopy(calls)
                    bad[i]["arguments"][name] = wrong
                    assert error_of(task, problem, bad) == "wrong values", (
                        problem["key"],
                        name,
                        wrong,
                    )
