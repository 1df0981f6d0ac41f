"""Countdown: reach a target from a few numbers, each used once, with + - * / and parentheses.

The published set (Jiayi-Pan/Countdown-Tasks-3to4) has 3 to 4 numbers from 1 to 99 and targets from
10 to 99; `problems` makes the same kind. Two problems are the same when their sorted numbers and
target are: the key.
"""

import random
import re
from fractions import Fraction

from model import UserError, check
from tasks import Task, Verdict, in_test, load_rows, pick

MAX_LENGTH = 200  # characters of an expression; a longer one is "not an equation"
MAX_DEPTH = 20  # nested parentheses
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
FORGIVEN = str.maketrans("×∗⋅·÷∕⁄−–—（）＝", "****///---()=")


class Countdown(Task):
    name = "countdown"
    errors = ("no answer", "not an equation", "wrong numbers", "missed target")
    reflect = (
        "Your answer is wrong. Reflect on what went wrong: write a short explanation "
        "that will help you to do better next time."
    )
    retry = "Now solve the same problem again. End with the expression in <answer> tags."
    generic_reflection = (
        "I should use every number exactly once, calculate each step with care, "
        "and check that the result is the target before I answer."
    )

    def __init__(self, data=None, difficulty=None):
        """difficulty: "3-4x99" (the default), 3 to 4 numbers from 1 to 99; "3x12", 3 up to 12."""
        check(not (data and difficulty), "difficulty is for countdown's own problems, not data.")
        match = re.fullmatch(r"([2-6])(?:-([2-6]))?x([0-9]{1,3})", difficulty or "3-4x99")
        low, high, largest = [int(x or match[1]) for x in match.groups()] if match else (0, 0, 0)
        form = "write COUNTxMAX, with 2 to 6 numbers and MAX from 5 to 999, such as 3x12 or 3-4x99"
        known = low <= high and largest >= 5
        check(known, f"countdown has no difficulty '{difficulty}': {form}.")
        self.counts, self.max_number = range(low, high + 1), largest
        rows = [_problem(row, place) for place, row in load_rows(data)] if data else []
        self.rows = list({p["key"]: p for p in rows}.values())  # the published set repeats itself

    def problems(self, split, n, seed):
        if self.rows:
            return pick(self.rows, split, n, seed)
        rng = random.Random(f"countdown {split} {seed}")
        found, misses = {}, 0
        while len(found) < n and misses < 2000:  # a small difficulty runs out of new problems
            nums = [rng.randint(1, self.max_number) for _ in range(rng.choice(self.counts))]
            target = _random_result(nums, rng)
            key = _key(nums, target)
            misses += 1
            if 10 <= target <= 99 and key not in found and in_test(key) == (split == "test"):
                found[key] = {"key": key, "nums": nums, "target": target}
                misses = 0
        return list(found.values())

    def messages(self, problem, native_tools=False):
        content = (
            f"Use the numbers {', '.join(map(str, problem['nums']))} to write an expression that "
            f"equals {problem['target']}. Use each number exactly once, with + - * / and "
            "parentheses. Show your steps in short, then write the expression as "
            "<answer>(1+2)*3</answer>."
        )
        return [{"role": "user", "content": content}]

    def verify(self, problem, text):
        """The last <answer> counts. Unicode operators, line breaks and "= target" are forgiven."""
        answers = ANSWER.findall(text)
        if not answers:
            return Verdict(False, "no answer", "there is no <answer>...</answer>")
        nums, target = problem["nums"], problem["target"]
        expression, equals, claim = answers[-1].translate(FORGIVEN).strip().partition("=")
        try:
            right_claim = not equals or claim.strip() == str(target)
            check(right_claim, f"'= {claim.strip()[:20]}' is not the target {target}")
            value, used = evaluate(expression)
        except UserError as error:
            return Verdict(False, "not an equation", str(error))
        if sorted(used) != sorted(nums):
            return Verdict(False, "wrong numbers", f"used {used}, was given {nums}")
        if value != target:
            return Verdict(False, "missed target", f"it gives {value}, not {target}")
        return Verdict(True)


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of integers, + - * / and parentheses (a minus may also open
    an expression or a parenthesis), and the integers in it. Bounded in length and depth.
    UserError, for a person to read, for anything else."""
    check(len(expression) <= MAX_LENGTH, f"the expression is longer than {MAX_LENGTH} characters")
    tokens, end, used = [], 0, []
    while match := TOKEN.match(expression, end):
        tokens.append(match[1])
        end = match.end()
    rest = expression[end:].strip()
    check(not rest, f"cannot read '{rest[:20]}'")
    tokens.append("end")

    def number_or_group(depth):
        token = tokens.pop(0)
        if token.isdigit():
            used.append(int(token))
            return Fraction(int(token))
        check(token == "(", f"expected a number, found '{token}'")
        check(depth < MAX_DEPTH, f"more than {MAX_DEPTH} nested parentheses")
        value = sum_of_terms(depth + 1)
        token = tokens.pop(0)
        check(token == ")", f"expected ')', found '{token}'")
        return value

    def product_of_factors(depth):
        value = number_or_group(depth)
        while tokens[0] in ("*", "/"):
            operator, factor = tokens.pop(0), number_or_group(depth)
            check(operator == "*" or factor, "division by zero")
            value = value * factor if operator == "*" else value / factor
        return value

    def sum_of_terms(depth):
        sign = -1 if tokens[0] == "-" and tokens.pop(0) else 1
        value = sign * product_of_factors(depth)
        while tokens[0] in ("+", "-"):
            sign = 1 if tokens.pop(0) == "+" else -1
            value += sign * product_of_factors(depth)
        return value

    value = sum_of_terms(0)
    check(tokens == ["end"], f"unexpected '{tokens[0]}'")
    return value, used


def _key(nums, target):
    return f"{','.join(map(str, sorted(nums)))}={target}"


def _random_result(nums, rng):
    """Combine the numbers two by two with random operators, whole positive results only."""
    nums = list(nums)
    while len(nums) > 1:
        rng.shuffle(nums)
        a, b = nums.pop(), nums.pop()
        results = [a + b, a * b] + [a - b] * (a > b) + [a // b] * (a % b == 0)
        nums.append(rng.choice(results))
    return nums[0]


def _problem(row, place):
    """One row of a data file, checked."""
    nums, target = row.get("nums"), row.get("target")
    right = isinstance(nums, list) and all(type(x) is int and x >= 0 for x in nums)
    words = f"'nums' must be a list of 2 to 6 whole numbers, found {nums!r:.60}"
    check(right and 2 <= len(nums) <= 6, f"{place}: {words}.")
    check(type(target) is int, f"{place}: 'target' must be a whole number, found {target!r:.60}.")
    return {"key": _key(nums, target), "nums": nums, "target": target}
