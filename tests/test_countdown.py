"""Countdown's verifier against exact arithmetic, and mistakes of published ones (each
named)."""

import itertools
import json
import random
import re
from fractions import Fraction

import pytest

from model import UserError
from tasks import in_test, task_class
from tasks.countdown import Countdown, evaluate

TASK = Countdown()


def verdict(answer, nums=(3, 4, 5), target=17, tags=True):
    text = f"<answer>{answer}</answer>" if tags else answer
    return TASK.verify({"nums": list(nums), "target": target}, text)


@pytest.mark.parametrize(
    "text",
    [
        "<answer>3*4+5</answer>",
        "<answer>3*4+5 = 17</answer>",  # false negative of published scorers
        "<answer>\n3 * 4\n+ 5\n</answer>",  # so is a line break
        "I think so: <answer>(3*4)+5</answer> which is 17.",  # and text behind
        "<answer>3 × 4 + 5</answer>",
        # The last one counts.
        "<answer>5+4+3</answer> no, <answer>5 − −3</answer> no, <answer>5+4*3</answer>",
        "<answer>unfinished <answer>5+4*3</answer>",
        "<answer>-3+4*5</answer>",
        "<answer>17 = 3*4+5</answer>",  # the target on the left
        "<answer>+3*+4--5</answer>",  # signs, which the prompt does not forbid
        "<answer>-3*-4+(-(-5))</answer>",
        "<answer>-(-3*4)+-(-5)</answer>",
        "<answer>5+4+3</answer></answer> <answer>5+4*3</answer></answer>",
        "<think>Is it <answer>3+4+5</answer>?</think> <answer>3*4+5</answer>",
        # The prompt may have opened the thinking.
        "is it <answer>3+4+5</answer>?</think> <answer>3*4+5</answer>",
        "<answer>3*4+5</answer><think>or <answer>3+4+5</answer>",
    ],
)
def test_right_answers_are_accepted(text):
    """Prevents: a right answer punished for how it is written."""
    assert TASK.verify({"nums": [3, 4, 5], "target": 17}, text).ok


@pytest.mark.parametrize(
    "answer, nums, target, error",
    [
        ("2.5*4", [2, 5, 4], 10, "not an equation"),  # published: digits by a pattern
        ("3**2+1", [3, 2, 1], 10, "not an equation"),  # published: eval, ** let through
        ("7//2+8", [7, 2, 8], 11, "not an equation"),
        ("97**96**95**94", [97, 96, 95, 94], 10, "not an equation"),  # published: hangs
        ("3*4+5 = 18", [3, 4, 5], 17, "not an equation"),
        ("18 = 3*4+5", [3, 4, 5], 17, "not an equation"),
        ("17 = 3*4+5 = 17", [3, 4, 5], 17, "not an equation"),
        ("17 = 17", [3, 4, 5], 17, "wrong numbers"),
        ("= 17", [3, 4, 5], 17, "not an equation"),
        ("3*4+5 =", [3, 4, 5], 17, "not an equation"),
        ("3*/4+5", [3, 4, 5], 17, "not an equation"),
        ("3*4+5-", [3, 4, 5], 17, "not an equation"),
        ("- - 3", [3], -3, "missed target"),
        ("3 4 + 5", [3, 4, 5], 39, "not an equation"),  # no juxtaposition
        ("34-5", [3, 4, 5], 29, "wrong numbers"),  # digits glued
        ("3*4+5+0", [3, 4, 5], 17, "wrong numbers"),
        ("3*4", [3, 4, 5], 12, "wrong numbers"),  # not all used
        ("4*4+1", [4, 1], 17, "wrong numbers"),  # one used twice
        ("3+4+5", [3, 4, 5], 17, "missed target"),
        ("5/(4-3-1)", [5, 4, 3, 1], 17, "not an equation"),
        ("", [3, 4, 5], 17, "not an equation"),
        ("(3*4+5", [3, 4, 5], 17, "not an equation"),
        ("3*4+5)", [3, 4, 5], 17, "not an equation"),
        ("()", [3], 3, "not an equation"),
        ("٣*4+5", [3, 4, 5], 17, "not an equation"),  # Arabic digits: int() would take them
        ("__import__('os')", [3], 17, "not an equation"),
        ("1_7", [17], 17, "not an equation"),
        ("(" * 30 + "17" + ")" * 30, [17], 17, "not an equation"),
        ("+".join(["1"] * 200), [1] * 200, 200, "not an equation"),
    ],
)
def test_wrong_answers_get_their_category(answer, nums, target, error):
    """Prevents: a wrong answer rewarded; a verifier that runs what it reads."""
    got = verdict(answer, nums, target)
    assert (got.ok, got.error) == (False, error), got


NO_ANSWER = ["", "17", "<answer>", "<answer>3*4+5", "3*4+5</answer>", "answer: 3*4+5"]
THOUGHT = [
    "<think><answer>3*4+5</answer>",  # cut while it was thinking
    "<think><answer>3*4+5</answer></think>",
    "<answer>3*4+5</answer></think>",
    "<think></think><think><answer>3*4+5</answer>",
    "<think><answer></think>3*4+5</answer>",
]


@pytest.mark.parametrize("text", NO_ANSWER + THOUGHT)
def test_no_answer(text):
    """Prevents: a reward for what a model only thought of."""
    assert TASK.verify({"nums": [3, 4, 5], "target": 17}, text).error == "no answer"


def expressions(nums):
    """Every expression, fully bracketed, with its exact value (None: division by zero)."""
    if len(nums) == 1:
        yield str(nums[0]), Fraction(nums[0])
        return
    for cut in range(1, len(nums)):
        for (a, x), (b, y) in itertools.product(
            expressions(nums[:cut]), expressions(nums[cut:])
        ):
            for operator in "+-*/":
                value = None
                if x is not None and y is not None and not (operator == "/" and y == 0):
                    values = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}
                    value = values[operator]
                yield f"({a}{operator}{b})", value


def test_every_expression_over_three_numbers_up_to_12():
    """Our verdict is exact arithmetic's for every expression over some triples, all
    orders."""
    triples = list(itertools.combinations_with_replacement(range(1, 13), 3))
    checked = 0
    for nums in random.Random(0).sample(triples, 60):
        for order in set(itertools.permutations(nums)):
            for text, value in expressions(order):
                target = int(value) if value is not None and value.denominator == 1 else 50
                got = verdict(text, nums, target)
                assert got.ok == (value == target), (text, value, target, got)
                assert not verdict(text, nums, target + 1).ok
                checked += 1
    assert checked > 9_000


def test_precedence_equals_pythons():
    """Prevents: 2-3+4 read as 2-(3+4)."""
    rng = random.Random(0)
    for _ in range(3000):
        text = str(rng.randint(1, 99))
        for _ in range(rng.randint(1, 5)):
            text += rng.choice("+-*/") + str(rng.randint(1, 99))
        tokens = re.findall(r"\d+|.", text)
        exact = eval("".join(f"Fraction({t})" if t.isdigit() else t for t in tokens))
        assert evaluate(text)[0] == exact, text


@pytest.mark.parametrize("difficulty", [None, "3x20", "3x12", "4x30"])
def test_problems_fit_the_published_set(difficulty):
    """3 to 4 numbers from 1 to 99, targets 10 to 99, solvable in integers; no key in both
    splits; repeatable."""
    task = Countdown(difficulty=difficulty)
    train, test = task.problems("train", 400, 0), task.problems("test", 100, 0)
    assert len(train) == 400 and len(test) == 100
    assert task.problems("train", 400, 0) == train != task.problems("train", 400, 1)
    keys = [p["key"] for p in train + test]
    assert len(set(keys)) == 500
    assert all(in_test(p["key"]) for p in test) and not any(
        in_test(p["key"]) for p in train
    )
    for p in train + test:
        assert 10 <= p["target"] <= 99 and all(1 <= x <= task.max_number for x in p["nums"])
        assert p["key"] == f"{','.join(map(str, sorted(p['nums'])))}={p['target']}"
    for p in test[:20]:
        orders = set(itertools.permutations(p["nums"]))
        assert any(
            value == p["target"] for order in orders for _, value in expressions(order)
        )


@pytest.mark.parametrize("difficulty", ["3x12", "3-4x99"])
def test_the_known_answer_is_one_that_verify_accepts(difficulty):
    """The ceiling of eval.py. Prevents: a wrong answer that is taken for the best hint."""
    task = task_class("countdown")("", difficulty)
    for problem in task.problems("test", 100, 0):
        assert task.verify(problem, task.answer(problem)).ok
    assert task.answer({"nums": [1, 1, 1], "target": 3}) is None  # a file's


def test_permutations_share_a_key_and_a_small_difficulty_ends():
    """Prevents: one problem in both splits; a search that never ends."""
    rows = Countdown(difficulty="3x5").problems(
        "train", 10**6, 0
    )  # must not search for ever
    assert 50 < len(rows) < 2000
    assert len({(tuple(sorted(p["nums"])), p["target"]) for p in rows}) == len(rows)


@pytest.mark.parametrize(
    "difficulty",
    ["hard", "34x20", "3-x20", "3", "x20", "3x", "1x20", "4-3x20", "3x0", "9x20", "3x2000"],
)
def test_an_unknown_difficulty_is_refused_by_name(difficulty):
    """Prevents: a typing mistake that trains on something else."""
    with pytest.raises(UserError, match="difficulty"):
        Countdown(difficulty=difficulty)


def test_a_data_file_is_read_once_for_each_problem(tmp_path):
    """Prevents: a problem that counts twice."""
    rows = [{"nums": [i, 50, 7], "target": 60 + i % 30} for i in range(100)]
    rows += [{"nums": [7, 50, 3], "target": 63}]  # row 3, permuted
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    for name, text in (("a.json", json.dumps(rows)), ("a.jsonl", lines)):
        (tmp_path / name).write_text(text)
        task = Countdown(str(tmp_path / name))
        everything = task.problems("train", 1000, 0) + task.problems("test", 1000, 0)
        assert len(everything) == 100 and 5 < len(task.problems("test", 1000, 0)) < 40


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"nums": [1, 2], "target": 3}\n{"nums": [1, 2]}\n', ["row 2", "target"]),
        ('{"nums": [1, 2], "target": 3}\n{"nums": [1, 2\n', ["line 2", "JSON"]),
        ('{"nums": "1 2", "target": 3}\n', ["row 1", "nums"]),
        ('{"nums": [1, true], "target": 3}\n', ["row 1", "nums"]),
        ('{"nums": [1, 2], "target": "3"}\n', ["row 1", "target"]),
        ('[{"nums": [1, 2], "target": 3}, 5]', ["row 2", "object"]),
        ("[", ["cannot be read as UTF-8 JSON"]),
        ("", ["empty"]),
        ("[]", ["empty"]),
        ("\n\n", ["empty"]),
    ],
)
def test_bad_rows_are_refused_by_file_and_line(tmp_path, text, words):
    """Prevents: a hunt through 490,000 rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        Countdown(str(path))
    for word in ["rows.jsonl", *words]:
        assert word in str(error.value), error.value


def test_a_missing_file_an_unknown_task_and_latin1_are_refused(tmp_path):
    """Prevents: a traceback for a typing mistake."""
    with pytest.raises(UserError, match="does not exist"):
        Countdown(str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="countdown, function_calling"):
        task_class("chess")()
    with pytest.raises(UserError, match="is no file"):
        Countdown(str(tmp_path))
    row = json.dumps({"nums": [3, 4], "target": 7})
    (tmp_path / "mark.jsonl").write_text("\ufeff" + row, encoding="utf-8")
    assert len(Countdown(str(tmp_path / "mark.jsonl")).rows) == 1
    (tmp_path / "latin.json").write_bytes(b'[{"nums": [1], "x": "\xe9"}]')
    with pytest.raises(UserError, match="UTF-8"):
        Countdown(str(tmp_path / "latin.json"))
