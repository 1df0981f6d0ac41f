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
@example("<answer>" * 5000)
@example("<answer>" + "9" * 100_000 + "</answer>")
@example("<answer>" + "9*" * 90 + "9</answer>")
def test_no_text_raises_hangs_or_passes_wrongly(text):
    for wrapped in (text, f"<answer>{text}</answer>"):
        start = time.perf_counter()
        got = TASK.verify({"nums": [3, 4, 5], "target": 1000}, wrapped)
        assert time.perf_counter() - start < 0.05
        assert not got.ok and got.error in TASK.errors  # no expression of 3, 4, 5 makes 1000


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "```json", "```", "[", "]", "{", "}", '"', "'", ":", ",", "\\"]
    + ['"name"', '"arguments"', '"parameters"', '"f"', '"x"', "1", "-", "1.0", "true", "null"]
    + ["NaN", GOOD, GOOD[:-1], "\n", " ", "é", "\ud800", "</think>", '{"function":', "1" * 5_000]
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)))
def test_no_answer_with_calls_raises_or_hangs(text):
    judged_in_time(CALLING, SIMPLE, text)


SCALARS = st.sampled_from([0.0, 1.0, 1.5, -1.0, "", "1", "a"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab1"), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(JSON_VALUES, JSON_VALUES)
def test_a_value_passes_only_if_it_is_the_same(wanted, found):
    """In type, too, where the schema says nothing else: 1.0, 1, true and "1" are four values."""
    problem = problem_of({"x": {}}, {"x": wanted})
    same = json.dumps(wanted, sort_keys=True) == json.dumps(found, sort_keys=True)
    assert judged_in_time(CALLING, problem, json.dumps(call(x=found))).ok == same
    assert CALLING.verify(problem, reference_answer(problem)).ok


@settings(max_examples=80, deadline=None)
@given(JSON_VALUES, JSON_VALUES)
def test_odd_accepted_values_of_the_berkeley_form_never_raise(wanted, found):
    problem = problem_of({"x": {}}, {"x": [wanted]}, form="berkeley")
    judged_in_time(CALLING, problem, json.dumps(call(x=found)))
    judged_in_time(CALLING, problem, reference_answer(problem))
