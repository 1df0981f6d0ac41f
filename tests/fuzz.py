"""Fuzzes a verifier: text steered by what the code does with it (atheris, libFuzzer).

    pip install atheris
    python tests/fuzz.py countdown -max_total_time=1200 FOLDER           inputs go there
    python tests/fuzz.py function_calling -max_total_time=1200 FOLDER
    python tests/fuzz.py keep FOLDER FOLDER                  the small ones, for the tests

Whatever a model writes, verify answers, in time, and never passes what another reading
refuses. Options are libFuzzer's; tests/fuzzed.json holds what was found.
"""

import json
import re
import sys
import time
from fractions import Fraction
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NUMS, TARGET = [3, 5, 9], 30
SEEDS = {
    "countdown": [
        "(9-3)*5",
        "9-3=6 <answer>30 = 5*(9-3)",
        "<think>3+5</think><answer>−(3−9)×5",
        "9/3</answer> <answer>3+5*9/3**2--1",
    ],
    "function_calling": [
        '<tool_call>\n{"name": "trip", "arguments": {"to": "Rome"}}\n</tool_call>',
        '```json\n[{"name": "trip", "parameters": {"to": "rome ", "days": 3}}]\n```',
        '{"tool_calls": [{"function": {"name": "trip", "arguments": "{}"}}]}',
        '<think>{"name"</think>{"name": "trip", "arguments": {"to": "Rome", "stops": []}}',
    ],
}
TRIP = {
    "to": {"type": "string"},
    "days": {"type": "integer", "default": 3},
    "stops": {"type": "array", "items": {"type": "object"}},
}
SCHEMA = {"type": "object", "properties": TRIP, "required": ["to"]}
PROBLEM = {
    "tools": [{"type": "function", "function": {"name": "trip", "parameters": SCHEMA}}],
    "answers": [{"name": "trip", "arguments": {"to": ["Rome", "Roma"], "days": [3, ""]}}],
}
EXTRA = '</tool_call><tool_call>{"name": "trip", "arguments": {"to": "Paris"}}</tool_call>'


def value_of(tokens: list[str]) -> Fraction:
    """Another reading of arithmetic than the verifier's: by precedence, from the left."""

    def take(level: int) -> Fraction:
        token = tokens.pop(0)
        if token in "+-":
            value = take(3) * (1 if token == "+" else -1)
        elif token == "(":
            value = take(1)
            assert tokens.pop(0) == ")"
        else:
            value = Fraction(int(token))
        while tokens and {"+": 1, "-": 1, "*": 2, "/": 2}.get(tokens[0], 0) >= level:
            symbol = tokens.pop(0)
            other = take(2 if symbol in "+-" else 3)
            if symbol in "+-":
                value += other if symbol == "+" else -other
            else:
                value = value * other if symbol == "*" else value / other
        return value

    value = take(1)
    assert not tokens
    return value


def check_countdown(text: str):
    from tasks.countdown import TYPESET, Countdown

    problem = {"nums": NUMS, "target": TARGET}
    judge(Countdown(), problem, text)
    text = f"<answer>{text}</answer>"
    if judge(Countdown(), problem, text).ok:
        answer = re.findall("<answer>([^<]*)</answer>", spoken(text))[-1]
        sides = answer.translate(TYPESET).split("=")
        left = [side for side in sides if side.strip() != str(TARGET)]
        assert len(left) == 1 and len(sides) <= 2, text
        tokens = re.findall(r"[0-9]+|\S", left[0])
        assert sorted(int(t) for t in tokens if t.isdigit()) == NUMS, text
        assert value_of(tokens) == TARGET, text


@cache
def function_calling():
    """Opened once, though thousands of texts are judged: it unpacks 14,000 problems."""
    from tasks.function_calling import FunctionCalling  # not before atheris is there

    return FunctionCalling()


def check_function_calling(text: str):
    task = function_calling()
    verdict = judge(task, PROBLEM, text)
    if verdict.ok:
        assert "trip" in text or "\\u" in text, text
        assert re.search("rom[ea]|\\\\u", text.casefold()), text
        if "<tool_call>" in spoken(text):
            assert not task.verify(PROBLEM, spoken(text) + EXTRA).ok, text


def spoken(text: str) -> str:
    """What is not thinking."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def judge(task, problem: dict, text: str):
    start = time.perf_counter()
    verdict = task.verify(problem, text)
    assert time.perf_counter() - start < 2, f"slow: {text[:200]!r}"
    assert verdict.ok or verdict.error in task.errors, text
    assert len(verdict.detail) < 5000, text
    return verdict


CHECKS = {"countdown": check_countdown, "function_calling": check_function_calling}


def fuzz(name: str, arguments: list[str]):
    import atheris

    with atheris.instrument_imports(include=["tasks"]):
        import tasks.countdown
        import tasks.function_calling  # noqa: F401

    folder = next((Path(a) for a in arguments if not a.startswith("-")), None)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(SEEDS[name]):
            (folder / f"seed{i}").write_text(seed, encoding="utf-8")
    atheris.Setup([sys.argv[0], *arguments], lambda data: CHECKS[name](decoded(data)))
    atheris.Fuzz()


def decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def keep(folders: list[str]):
    """The 60 shortest inputs of each kind, in tests/fuzzed.json."""
    kept = {}
    for name, folder in zip(CHECKS, folders, strict=True):
        found = [decoded(path.read_bytes()) for path in Path(folder).iterdir()]
        small = sorted({text for text in found if len(text) < 300}, key=len)
        step = max(1, len(small) // 60)
        kept[name] = small[step - 1 :: step][:60]
    path = Path(__file__).with_name("fuzzed.json")
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(path, {name: len(texts) for name, texts in kept.items()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(sys.argv[2:])
    else:
        fuzz(sys.argv[1], sys.argv[2:])
