"""No text raises, hangs or passes wrongly: the verifiers under hypothesis."""

import json
import time

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_function_calling import (  # noqa: E402
    GOOD,
    SIMPLE,
    accepting,
    call,
    judged_in_time,
    problem_of,
    reference_answer,
)

from tasks.countdown import Countdown  # noqa: E402
from tasks.function_calling import FunctionCalling  # noqa: E402

TASK = Countdown()
CALLING = FunctionCalling()


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789+-*/()= <>answer/.×−\n", max_size=300) | st.text(max_size=300))
@example("(" * 200)
@example("-" * 200)
@example("-" * 199 + "3")
@example("(" * 20 + "+-" * 80)
@example("3" * 200)
@example("()()")
@example("3 (4)")
@example("<think>" * 10_000)
@example("<answer>" * 5000)
@example("<answer>" + "9" * 100_000 + "</answer>")
@example("<answer>" + "9*" * 90 + "9</answer>")
def test_no_text_raises_hangs_or_passes_wrongly(text):
    for wrapped in (text, f"<answer>{text}</answer>"):
        start = time.perf_counter()
        got = TASK.verify({"nums": [3, 4, 5], "target": 1000}, wrapped)
        assert time.perf_counter() - start < 0.05
        assert not got.ok and got.error in TASK.errors  # 3, 4 and 5 make no 1000


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "```json",
        "```",
        "[",
        "]",
        "{",
        "}",
        '"',
        "'",
        ":",
        ",",
        "\\",
    ]
    + [
        '"name"',
        '"arguments"',
        '"parameters"',
        '"f"',
        '"x"',
        "1",
        "-",
        "1.0",
        "true",
        "null",
    ]
    + [
        "NaN",
        GOOD,
        GOOD[:-1],
        "\n",
        " ",
        "é",
        "\ud800",
        "</think>",
        "<think>",
        '{"tool_calls":',
        '{"function":',
        "1" * 5_000,
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)))
def test_no_answer_with_calls_raises_or_hangs(text):
    judged_in_time(CALLING, SIMPLE, text)


SCALARS = st.sampled_from([0.0, 1.0, 1.5, -1.0, "", "1", "a"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("ab1"), inner, max_size=3)
    ),
    max_leaves=6,
)


def folded(value):
    """What the one rule for strings overlooks."""
    if isinstance(value, list):
        return [folded(item) for item in value]
    if isinstance(value, dict):
        return {key: folded(item) for key, item in value.items()}
    return value.strip().casefold() if isinstance(value, str) else value


def present(value):
    """And for what may be left out: a key of an object, as no schema here requires one."""
    if isinstance(value, list):
        return [present(item) for item in value]
    if isinstance(value, dict):
        return {k: present(v) for k, v in value.items() if v is not None and v != ""}
    return value


@settings(max_examples=200, deadline=None)
@given(JSON_VALUES, JSON_VALUES)
@example("A ", "a")
@example({"a": None}, {})
@example([1], [True])
@example([{"a": [1.0]}], [{"a": [1]}])
def test_a_value_passes_only_if_it_is_the_same(wanted, given_value):
    """In type, too, where the schema says nothing else: 1.0, 1, true and "1" are four
    values. Prevents: a comparison by Python's ==."""
    problem = problem_of({"x": {}}, {"x": wanted})
    texts = [json.dumps(present(folded(v)), sort_keys=True) for v in (wanted, given_value)]
    verdict = judged_in_time(CALLING, problem, json.dumps(call(x=given_value)))
    unknown = isinstance(wanted, (dict, list)) and has_new_key(wanted, given_value)
    assert verdict.ok == (texts[0] == texts[1] and not unknown)
    assert CALLING.verify(problem, reference_answer(problem)).ok


def has_new_key(wanted, value):
    """Even a null is wrong for a key that nobody knows."""
    if isinstance(wanted, list) and isinstance(value, list):
        return any(has_new_key(w, v) for w, v in zip(wanted, value))
    if isinstance(wanted, dict) and isinstance(value, dict):
        shared = wanted.keys() & value.keys()
        return bool(value.keys() - wanted.keys()) or any(
            has_new_key(wanted[key], value[key]) for key in shared
        )
    return False


@settings(max_examples=80, deadline=None)
@given(JSON_VALUES, JSON_VALUES)
def test_odd_accepted_values_never_raise(wanted, given_value):
    """Prevents: an accepted object whose keys have no lists, met in the middle of a run."""
    problem = accepting({"x": {}}, {"x": [wanted]})
    judged_in_time(CALLING, problem, json.dumps(call(x=given_value)))
    judged_in_time(CALLING, problem, json.dumps(call(x=wanted)))
