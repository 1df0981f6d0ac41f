"""Countdown: reach a target from a few numbers, each used once, with + - * / and ( ).

`problems` makes the published kind (Jiayi-Pan/Countdown-Tasks-3to4): targets from 10 to 99.
"""

import ast
import operator
import random
import re
from fractions import Fraction

from model import check
from tasks import Task, Verdict, in_test, load_rows, without_thinking

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS |= {ast.Div: operator.truediv, ast.UAdd: operator.pos, ast.USub: operator.neg}
DIFFICULTY = re.compile(r"([2-6])(?:-([2-6]))?x([5-9]|[1-9][0-9]{1,2})")
TYPESET = str.maketrans("×∗⋅·÷∕⁄−–—（）＝", "****///---()=")


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

    def __init__(self, data="", difficulty=""):
        """difficulty: "3-4x99" (the default) is 3 to 4 numbers up to 99, "3x12" 3 to 12."""
        match = DIFFICULTY.fullmatch(difficulty or "3-4x99")
        check(match, f"countdown has no difficulty '{difficulty}': write 3x12 or 3-4x99.")
        fewest, most, largest = match.groups()
        self.counts = range(int(fewest), int(most or fewest) + 1)
        self.max_number = int(largest)
        check(self.counts, f"difficulty {difficulty} wants {fewest} to {most} numbers.")
        self.rows = []
        for place, row in enumerate(load_rows(data) if data else [], 1):
            nums, target = row.get("nums"), row.get("target")
            right = isinstance(nums, list) and {type(x) for x in [*nums, target]} == {int}
            wanted = "lacks whole 'nums' and 'target'"
            check(right, f"{data}, row {place} {wanted}: {row!r:.100}.")
            self.rows.append(problem_of(nums, target))

    def problems(self, split, n, seed):
        if self.rows:
            return super().problems(split, n, seed)
        rng = random.Random(f"countdown {split} {seed}")
        found, misses = {}, 0
        while len(found) < n and misses < 2000:  # few numbers have few problems
            count = rng.choice(self.counts)
            nums = [rng.randint(1, self.max_number) for _ in range(count)]
            target, text = random_result(nums, rng)
            problem = problem_of(nums, target) | {"answer": text}
            key = problem["key"]
            misses += 1
            wanted = in_test(key) == (split == "test")
            if wanted and key not in found and 10 <= target <= 99:
                found[key] = problem
                misses = 0
        return list(found.values())

    def messages(self, problem, native_tools=False):
        nums = ", ".join(map(str, problem["nums"]))
        text = (
            f"Use the numbers {nums} to write an expression that equals "
            f"{problem['target']}. Use each number exactly once, with + - * / and "
            "parentheses. Show your steps in short, then write the expression alone "
            "between <answer> and </answer>."
        )
        return [{"role": "user", "content": text}]

    def answer(self, problem):
        known = problem.get("answer")  # of our own problems
        return known and f"<answer>{known}</answer>"

    def verify(self, problem, text):
        """The last <answer> counts; it may claim its value, and typeset its operators."""
        nums, target = problem["nums"], problem["target"]
        answers = re.findall(r"<answer>([^<]*)</answer>", without_thinking(text))
        if not answers:
            return Verdict(False, "no answer", "there is no <answer>...</answer>")
        claim = rf"^\s*{target}\s*=|=\s*{target}\s*$"  # "17 = 3*4+5", "3*4+5 = 17"
        answer = re.sub(claim, "", answers[-1].translate(TYPESET), count=1)
        try:
            value, used = evaluate(answer)
        except (ValueError, SyntaxError, ZeroDivisionError) as error:
            return Verdict(False, "not an equation", str(error))
        if sorted(used) != sorted(nums):
            return Verdict(False, "wrong numbers", f"used {used}, was given {nums}")
        if value != target:
            return Verdict(False, "missed target", f"it gives {value}, not {target}")
        return Verdict(True)


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and the numbers in it. ValueError, SyntaxError or
    ZeroDivisionError if it is too long, too deep, or more than arithmetic."""
    allowed = re.fullmatch(r"[-+*/()0-9\s]{1,200}", text)
    if not allowed or text.count("(") > 20:
        raise ValueError("it is too long, or holds more than numbers, + - * / and ( )")
    # Python only parses this. 03 becomes 3, and 2**3 becomes 2 * * 3, which is no syntax.
    tokens = re.findall(r"[1-9][0-9]*|0\b|[-+*/()]", text)
    numbers = [int(token) for token in tokens if token.isdigit()]
    return value_of(ast.parse(" ".join(tokens), mode="eval").body), numbers


def value_of(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if not isinstance(node, (ast.UnaryOp, ast.BinOp)):
        raise ValueError("an operator is missing")
    binary = isinstance(node, ast.BinOp)
    operands = [node.left, node.right] if binary else [node.operand]
    return OPERATORS[type(node.op)](*map(value_of, operands))


def problem_of(nums, target):
    key = f"{','.join(map(str, sorted(nums)))}={target}"
    return {"key": key, "nums": nums, "target": target}


def random_result(nums, rng):
    """Combine the numbers two by two with random operators, whole positive results only:
    what comes out, and the expression."""
    terms = [(n, str(n)) for n in nums]
    while len(terms) > 1:
        rng.shuffle(terms)
        (a, x), (b, y) = terms.pop(), terms.pop()
        results = [(a + b, f"({x}+{y})"), (a * b, f"({x}*{y})")]
        if a > b:
            results.append((a - b, f"({x}-{y})"))
        if a % b == 0:
            results.append((a // b, f"({x}/{y})"))
        terms.append(rng.choice(results))
    return terms[0]
