"""No text raises, hangs or passes wrongly: the verifiers under hypothesis."""

import time

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tasks.countdown import Countdown  # noqa: E402

TASK = Countdown()


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/()= <>answer/.×−\n", max_size=300) | st.text(max_size=300))
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
