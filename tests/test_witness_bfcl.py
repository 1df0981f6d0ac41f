"""The function-calling verifier against bfcl-eval, the Berkeley leaderboard's own checker.

Both judge the same calls for all 1000 rows of the four Berkeley files: the reference
answers, with every accepted value in turn, and these answers corrupted in one place, at
every place where the corruption applies. Where the two disagree, DISAGREEMENTS says how
often, who is wrong, and why.

Runs where bfcl-eval is installed; of its many dependencies the checker needs none:
pip install --no-deps bfcl-eval==2026.3.23
"""

import copy
import importlib
import json
import re
import sys
from collections import Counter, namedtuple
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest

pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval==2026.3.23")

from test_function_calling import BFCL, LEFT_OUT, SPLITS  # noqa: E402

from extras.convert import problem_of  # noqa: E402
from model import UserError  # noqa: E402
from tasks import load_rows  # noqa: E402
from tasks.function_calling import FunctionCalling  # noqa: E402

# The checker asks the table of models one thing: whether the dots in the names of a model's
# tools became underscores. That table imports the clients of two dozen vendors; this one
# stands in.
MODELS = ModuleType("bfcl_eval.constants.model_config")
MODELS.MODEL_CONFIG_MAPPING = {"a model": SimpleNamespace(underscore_to_dot=False)}
with patch.dict(sys.modules, {MODELS.__name__: MODELS}):
    CHECKER = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")

TASK = FunctionCalling()
Row = namedtuple("Row", "split id tools truth problem variants calls")
OMIT = object()  # among the values of a parameter: that it is left out


@pytest.fixture(scope="module")
def rows():
    """Every row that our form takes, also those whose request stands twice, which
    FunctionCalling(data) merges."""
    made = []
    for split in SPLITS:
        data = BFCL / f"BFCL_v4_{split}.json"
        if not data.is_file():
            pytest.skip(f"the Berkeley files are not in {BFCL}; set BFCL to their folder")
        answers = load_rows(str(BFCL / "possible_answer" / data.name))
        truths = {row["id"]: row["ground_truth"] for row in answers}
        for row in load_rows(str(data)):
            try:
                problem = problem_of(copy.deepcopy(row), copy.deepcopy(truths))
            except UserError:  # counted below
                continue
            variants = []  # of each call
            for wanted in problem["answers"]:
                required = set(specs(row["function"], wanted["name"])["required"])
                some = [v for v in values_of(wanted["arguments"]) if required <= v.keys()]
                variants.append([{"name": wanted["name"], "arguments": v} for v in some])
            calls = [some[0] for some in variants]
            truth = truths[row["id"]]
            made.append(
                Row(split, row["id"], row["function"], truth, problem, variants, calls)
            )
    return made


def specs(tools, name):
    return next(tool["parameters"] for tool in tools if tool["name"] == name)


def values_of(wanted):
    """What may be given for a wanted value: its first choices, then each other choice in
    turn. A dict holds lists of accepted values, a list plain values or such dicts."""
    if isinstance(wanted, dict):
        made = one_at_a_time({key: accepted(values) for key, values in wanted.items()})
        return [{k: v for k, v in some.items() if v is not OMIT} for some in made]
    if isinstance(wanted, list):
        made = one_at_a_time({i: values_of(item) for i, item in enumerate(wanted)})
        return [list(some.values()) for some in made]
    return [wanted]


def accepted(values):
    some = [value for wanted in values if wanted != "" for value in values_of(wanted)]
    return some + [OMIT] * ("" in values)


def one_at_a_time(choices):
    first = {key: values[0] for key, values in choices.items()}
    return [first, *(first | {k: v} for k, values in choices.items() for v in values[1:])]


def verdicts(row, calls):
    """Whether the calls are right: what we say, and what they say."""
    theirs = CHECKER.ast_checker(
        row.tools,
        [{call["name"]: call["arguments"]} for call in calls],
        row.truth,
        CHECKER.Language.PYTHON,
        row.split,
        "a model",
    )
    return TASK.verify(row.problem, json.dumps(calls)).ok, theirs["valid"]


# Corruptions: each makes of a row's reference answer every answer with one thing changed.


def put(value, path, new):
    """The value, with another one at the path."""
    if not path:
        return new
    made = copy.copy(value)
    made[path[0]] = put(value[path[0]], path[1:], new)
    return made


def places(value, path):
    """(path, value) of the value itself and of all inside."""
    yield path, value
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def whole(change):
    """All calls at once."""
    return lambda row: change(row.calls)


def each(change):
    """Every call."""

    def corrupt(row):
        for i, call in enumerate(row.calls):
            for new in change(row, call):
                yield put(row.calls, (i,), call | new)

    return corrupt


def value(kind, change):
    """Every value of this type, however deep; for dict, the arguments of a call are one,
    too."""

    def corrupt(row):
        for i, call in enumerate(row.calls):
            found = list(places(call["arguments"], (i, "arguments")))
            for path, old in found if kind is dict else found[1:]:
                if type(old) is kind or kind is object:
                    for new in change(old):
                        yield put(row.calls, path, new)

    return corrupt


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


def drop_parameter(required):
    def change(row, call):
        for key in call["arguments"]:
            if (key in specs(row.tools, call["name"])["required"]) == required:
                yield {"arguments": without(call["arguments"], key)}

    return change


BLANK = ["", "."]  # equal for the leaderboard, which overlooks punctuation
SAMPLES = {"string": "x", "any": "x", "integer": 1, "float": 1.5, "boolean": True}
SAMPLES |= {"array": [], "tuple": [], "dict": {}}


def add_parameter(samples):
    """Every one that the tool knows and the call leaves out."""

    def change(row, call):
        for key, spec in specs(row.tools, call["name"])["properties"].items():
            for sample in samples(spec["type"]) if key not in call["arguments"] else []:
                yield {"arguments": call["arguments"] | {key: sample}}

    return change


def swap_arguments(row, call):
    arguments = call["arguments"]
    for a in arguments:
        for b in arguments:
            if a < b:
                yield {"arguments": arguments | {a: arguments[b], b: arguments[a]}}


def exchange_between_calls(calls):
    """One argument of two calls of the same tool."""
    for i, one in enumerate(calls):
        for j, other in enumerate(calls[:i]):
            for key in one["arguments"].keys() & other["arguments"].keys():
                if one["name"] == other["name"]:
                    made = put(calls, (i, "arguments", key), other["arguments"][key])
                    yield put(made, (j, "arguments", key), one["arguments"][key])


def other_tool(row, call):
    return [{"name": tool["name"]} for tool in row.tools]


def digits(text):
    return [json.loads(text)] if re.fullmatch(r"[1-9]\d*(\.\d+)?", text) else []


N = range
CORRUPTIONS = {
    "calls reversed": whole(lambda calls: [calls[::-1]]),
    "calls rotated": whole(lambda calls: [calls[i:] + calls[:i] for i in N(len(calls))]),
    "no call": whole(lambda calls: [[]]),
    "call dropped": whole(
        lambda calls: [calls[:i] + calls[i + 1 :] for i in N(len(calls))]
    ),
    "call duplicated": whole(lambda calls: [[*calls, call] for call in calls]),
    "call in place of another": whole(
        lambda calls: [put(calls, (i,), call) for call in calls for i in N(len(calls))]
    ),
    "argument exchanged between calls": whole(exchange_between_calls),
    "another tool on offer": each(other_tool),
    "tool name changed": each(lambda row, call: [{"name": call["name"] + "x"}]),
    "tool name in other case": each(lambda row, call: [{"name": call["name"].swapcase()}]),
    "tool name with _ for .": each(
        lambda row, call: [{"name": call["name"].replace(".", "_")}]
    ),
    "required parameter missing": each(drop_parameter(required=True)),
    "optional parameter left out": each(drop_parameter(required=False)),
    "unasked parameter": each(add_parameter(lambda kind: [SAMPLES[kind]])),
    "unasked parameter, blank": each(add_parameter(lambda kind: BLANK)),
    "unasked parameter, null": each(add_parameter(lambda kind: [None])),
    "arguments swapped": each(swap_arguments),
    "unknown key": value(dict, lambda d: [d | {"zzz": 1}]),
    "unknown key, blank": value(dict, lambda d: [d | {"zzz": blank} for blank in BLANK]),
    "unknown key, null": value(dict, lambda d: [d | {"zzz": None}]),
    "key in other case": value(
        dict, lambda d: [without(d, k) | {k.swapcase(): d[k]} for k in d]
    ),
    "key dropped": value(dict, lambda d: [without(d, k) for k in d]),
    "keys in other order": value(dict, lambda d: [dict(reversed(d.items()))]),
    "list reversed": value(list, lambda v: [v[::-1]]),
    "list emptied": value(list, lambda v: [[]]),
    "item dropped": value(list, lambda v: [v[:i] + v[i + 1 :] for i in N(len(v))]),
    "item doubled": value(list, lambda v: [v[:i] + v[i - 1 :] for i in N(1, len(v) + 1)]),
    "only item unwrapped": value(list, lambda v: v if len(v) == 1 else []),
    "list as text": value(list, lambda v: [json.dumps(v)]),
    "int as string": value(int, lambda n: [str(n)]),
    "int as float": value(int, lambda n: [float(n)]),
    "0 or 1 as bool": value(int, lambda n: [bool(n)] if n in (0, 1) else []),
    "int changed": value(int, lambda n: [n + 1, -n]),
    "float as string": value(float, lambda x: [str(x)]),
    "float as int": value(float, lambda x: [int(x)]),
    "float changed": value(float, lambda x: [x + 0.5, -x]),
    "bool as int": value(bool, lambda b: [int(b)]),
    "bool as string": value(bool, lambda b: [str(b), str(b).lower()]),
    "bool negated": value(bool, lambda b: [not b]),
    "string in other case": value(str, lambda s: [s.swapcase()]),
    "string's punctuation and spaces": value(str, lambda s: [f"-{s.replace(' ', '_')}."]),
    "string's quotes": value(str, lambda s: [s.replace("'", '"'), s.replace('"', "'")]),
    "string longer": value(str, lambda s: [s + "s", s + "\n"]),
    "string shorter": value(str, lambda s: [s[1:], s[:-1]]),
    "digits as number": value(str, digits),
    "null": value(object, lambda v: [None]),
    "blank string": value(object, lambda v: BLANK),
    "wrapped in a list": value(object, lambda v: [[v]]),
    "wrapped in a dict": value(object, lambda v: [{"value": v}]),
}

# Where the two disagree on these. we_say: that the answer is right. `times` counts by row,
# {corruption: {row: n}}; where there are hundreds, `cause` is a test of each single answer,
# and `times` is {corruption: (answers, rows)}.


def changed(value, change):
    """The value with its strings and the values of its objects changed; DROP drops one."""
    if isinstance(value, list):
        return [changed(item, change) for item in value]
    if isinstance(value, dict):
        items = {
            k: DROP if change(v) is DROP else changed(v, change) for k, v in value.items()
        }
        return {k: v for k, v in items.items() if v is not DROP}
    return change(value) if isinstance(value, str) else value


DROP = object()


def overlook(value):
    """A string as the leaderboard compares it."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')


def right_if_punctuation_is_overlooked(row, calls):
    problem = dict(row.problem)
    problem["answers"] = [
        wanted | {"arguments": changed(wanted["arguments"], overlook)}
        for wanted in problem["answers"]
    ]
    return TASK.verify(problem, json.dumps(edit(calls, overlook))).ok


def edit(calls, change):
    return [call | {"arguments": changed(call["arguments"], change)} for call in calls]


def right_if_nothing_is_left_out(row, calls):
    present = edit(calls, lambda value: DROP if value in (None, "") else value)
    return verdicts(row, present) == (True, True)


def right_if_stripped(row, calls):
    stripped = edit(calls, lambda v: v.strip() if isinstance(v, str) else v)
    return verdicts(row, stripped) == (True, True)


Disagreement = namedtuple("Disagreement", "why we_say times cause", defaults=[None])
DEFAULTS = {"simple_python_120": 1, "parallel_84": 1, "parallel_multiple_179": 1}
DISAGREEMENTS = [
    # Our one rule for strings: equal but for case and outer spaces.
    Disagreement(
        "We are right: bfcl-eval drops spaces and ,./-_*^ and takes ' for \", so that "
        "3x**2 is 3x*2, -5 is 5, 1.5 is 15 and a lone full stop is an empty string",
        we_say=False,
        times={
            "string's punctuation and spaces": (2699, 764),
            "string shorter": (28, 24),  # the character was a full stop or the like
            "string's quotes": (3, 3),
            "blank string": (302, 230),
            "unasked parameter, blank": (40, 30),
            "argument exchanged between calls": (2, 1),
        },
        cause=right_if_punctuation_is_overlooked,
    ),
    Disagreement(
        "Neither is wrong: we strip a line break at a string's end, bfcl-eval only spaces",
        we_say=True,
        times={"string longer": (2722, 764)},
        cause=right_if_stripped,
    ),
    Disagreement(
        "bfcl-eval is wrong: it overlooks the case of strings, also in a list and in a "
        "dict, but not in a list in a dict",
        we_say=True,
        times={
            "string in other case": {"simple_python_337": 8, "parallel_multiple_135": 15}
        },
    ),
    # Our one rule for optional parameters: null, "", the default and nothing are the same.
    Disagreement(
        "We are laxer, on purpose: null or an empty string for a parameter that may be "
        "left out are how many models leave it out; bfcl-eval wants its type",
        we_say=True,
        times={
            "null": (558, 403),
            "blank string": (256, 186),
            "unasked parameter, null": (56, 45),
            "unasked parameter, blank": (18, 17),
        },
        cause=right_if_nothing_is_left_out,
    ),
    Disagreement(
        "bfcl-eval is wrong: the value that is wanted is the schema's default, and the "
        "parameter is not required, so that a call without it does the same",
        we_say=True,
        times={
            "optional parameter left out": DEFAULTS,
            "key dropped": DEFAULTS,
            "null": DEFAULTS,
            "blank string": DEFAULTS,
        },
    ),
    Disagreement(
        "We are right: here an empty string is among the accepted values of a parameter "
        "that is required, so it can neither leave it out nor say what league is meant",
        we_say=False,
        times={"blank string": {"parallel_multiple_119": 2}},
    ),
    # Pairs, types and lists.
    Disagreement(
        "bfcl-eval is wrong: it gives each wanted call the first answer that fits, and "
        "takes none back. One call of this row may be for Microsoft or Apple, others must "
        "be for Apple",
        we_say=True,
        times={
            "calls reversed": {"parallel_178": 1},
            "calls rotated": {"parallel_178": 2},
            "argument exchanged between calls": {"parallel_178": 1},
        },
    ),
    Disagreement(
        "bfcl-eval is wrong: where a float is wanted it takes 3 for 3.0, but not in a list",
        we_say=True,
        times={
            "float as int": {
                "simple_python_13": 2,
                "simple_python_82": 7,
                "simple_python_87": 5,
                "simple_python_103": 5,
                "parallel_multiple_67": 5,
            }
        },
    ),
    Disagreement(
        "bfcl-eval is wrong: in a dict and in a list of lists it checks no types but "
        "compares with ==, so that 20.0 is an integer and True a number of people",
        we_say=False,
        times={
            "int as float": {"simple_python_260": 3, "simple_python_122": 4},
            "0 or 1 as bool": {"parallel_29": 4},
        },
    ),
    Disagreement(
        "Neither is wrong: no schema says what these dicts hold. We keep to the type of "
        "the wanted value; bfcl-eval, by the same ==, takes 90.0 for 90",
        we_say=False,
        times={
            "int as float": {"multiple_9": 4, "parallel_29": 6, "parallel_multiple_66": 15}
        },
    ),
    Disagreement(
        "bfcl-eval is wrong: where a list may be left out, which an empty string among the "
        "accepted values says, it compares the list with the letters of that string, so "
        "that [] is right",
        we_say=False,
        times={
            "list emptied": {
                "simple_python_178": 1,
                "parallel_44": 2,
                "parallel_52": 1,
                "parallel_multiple_117": 1,
                "parallel_multiple_126": 1,
                "parallel_multiple_132": 1,
            },
            "item dropped": {  # the only one
                "parallel_44": 2,
                "parallel_52": 1,
                "parallel_multiple_117": 1,
                "parallel_multiple_126": 1,
            },
            "unasked parameter": {  # a list, of which "" is all that is accepted
                "simple_python_335": 1,
                "simple_python_353": 1,
                "simple_python_354": 1,
                "multiple_178": 1,
                "parallel_multiple_189": 1,
                "parallel_multiple_191": 1,
            },
        },
    ),
]


def counted(kind):
    """{(row, we_say): n} of the disagreements that are told row by row."""
    table = Counter()
    for entry in DISAGREEMENTS:
        if entry.cause is None:
            for row, n in entry.times.get(kind, {}).items():
                table[row, entry.we_say] += n
    return table


def test_every_row_becomes_a_problem(rows):
    """Prevents: rows dropped by the loader, which all tests below would then pass over."""
    assert Counter(row.split for row in rows) == Counter(SPLITS) - Counter(LEFT_OUT)
    assert all(row.problem for row in rows)


def test_reference_answers_are_right_for_both(rows):
    """Prevents: an accepted value that the verifier refuses, so that a right answer is
    punished."""
    tried = 0
    for row in rows:
        for i, variants in enumerate(row.variants):
            for call in variants:
                tried += 1
                assert verdicts(row, put(row.calls, (i,), call)) == (True, True), (
                    row.id,
                    call,
                )
    assert tried == 3650


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupted_answers_are_judged_alike(rows, kind):
    """Prevents: a verifier stricter or laxer than the leaderboard's where nobody meant it
    to be."""
    tried, differing, examples = 0, Counter(), {}
    by_cause = {i: Counter() for i, entry in enumerate(DISAGREEMENTS) if entry.cause}
    for row in rows:
        unchanged = json.dumps(row.calls)
        for calls in CORRUPTIONS[kind](row):
            if json.dumps(calls) == unchanged:
                continue
            tried += 1
            ours, theirs = verdicts(row, calls)
            if ours == theirs:
                continue
            for i, counter in by_cause.items():
                entry = DISAGREEMENTS[i]
                if entry.we_say == ours and entry.cause(row, calls):
                    counter[row.id] += 1
                    break
            else:
                differing[row.id, ours] += 1
                examples[row.id, ours] = calls
    assert tried >= (4 if kind == "string's quotes" else 5)
    for key in differing.keys() | counted(kind).keys():
        assert differing[key] == counted(kind)[key], (key, examples.get(key))
    for i, counter in by_cause.items():
        entry = DISAGREEMENTS[i]
        assert (counter.total(), len(counter)) == entry.times.get(kind, (0, 0)), entry.why


def test_the_table_names_corruptions_that_are_tried():
    """Prevents: an explanation that is never checked, as its corruption was renamed."""
    assert {kind for entry in DISAGREEMENTS for kind in entry.times} <= CORRUPTIONS.keys()
