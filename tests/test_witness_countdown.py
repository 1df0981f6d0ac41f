"""tasks/countdown.py against exact arithmetic and the scorers that others train with.

Three judges beside ours: `honest`, exact arithmetic on a parser of its own; `published`,
which behaves as the scorer of TinyZero and its many copies does; and reasoning-gym's
countdown, its own code, where it is installed:

    pip install --no-deps reasoning-gym==0.1.25      (and sympy, numpy, pyyaml, if missing)

Every disagreement has a name, and its cases are counted.
"""

import ast
import importlib
import importlib.util
import operator
import random
import re
import sys
import types
from collections import Counter
from fractions import Fraction

import pytest

from tasks.countdown import Countdown

TASK = Countdown()
NO_VALUE = (SyntaxError, KeyError, AttributeError, TypeError, ArithmeticError)
FOUR = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def ours(text, nums, target):
    """Either "yes" or the category of the error."""
    verdict = TASK.verify({"nums": list(nums), "target": target}, text)
    return "yes" if verdict.ok else verdict.error


# ---- the other judges ----


def honest(answer, nums, target):
    """Exact arithmetic by recursive descent (ours walks the tree of Python's parser): whole
    numbers, + - * / with signs anywhere, each number once."""
    tokens, used = [*re.findall(r"[0-9]+|\S", answer), "end"], []

    def factor():
        token = tokens.pop(0)
        if token in "+-":
            return factor() if token == "+" else -factor()
        if token == "(":
            inner = terms()
            if tokens.pop(0) != ")":
                raise SyntaxError
            return inner
        if not token.isdigit():
            raise SyntaxError
        used.append(int(token))
        return Fraction(token)

    def product():
        result = factor()
        while tokens[0] in "*/":
            operation = FOUR[tokens.pop(0)]
            result = operation(result, factor())
        return result

    def terms():
        result = product()
        while tokens[0] in "+-":
            operation = FOUR[tokens.pop(0)]
            result = operation(result, product())
        return result

    try:
        right = terms() == target and tokens == ["end"]
    except (SyntaxError, ArithmeticError):
        return "no"
    return "yes" if right and sorted(used) == sorted(nums) else "no"


class Endless(Exception):
    """Python would compute for a very long time."""


def python_value(answer):
    """What Python makes of digits, points, brackets and + - * /, so of ** and // as well.
    Raises one of NO_VALUE, or Endless."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
    operators |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}
    operators |= {ast.Pow: operator.pow}

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return (
                -value(node.operand)
                if isinstance(node.op, ast.USub)
                else +value(node.operand)
            )
        a, b = value(node.left), value(node.right)
        whole = isinstance(node.op, ast.Pow) and type(a) is type(b) is int
        if whole and a.bit_length() * b > 10**6:
            raise Endless
        return operators[type(node.op)](a, b)

    return value(ast.parse(answer.strip(), mode="eval").body)


def published(text, nums, target):
    """The widespread scorer, by its behaviour: the last line only; the answer's characters
    from a list; numbers are runs of digits wherever they stand; Python computes; 1e-5 is
    close enough."""
    _, opened, rest = text.split("\n")[-1].rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    if not (opened and closed and re.fullmatch(r"[\d\s.()*/+-]+", answer)):
        return "no"
    if sorted(map(int, re.findall(r"\d+", answer))) != sorted(nums):
        return "no"
    try:
        return "yes" if abs(python_value(answer) - target) < 1e-5 else "no"
    except Endless:
        return "hangs"
    except NO_VALUE:
        return "no"


@pytest.fixture(scope="session")
def gym():
    """reasoning-gym's judgement of a text. Only its countdown is imported: the package as a
    whole asks for a dozen others that countdown has no use for."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None:
        pytest.skip("pip install --no-deps reasoning-gym==0.1.25")
    package = types.ModuleType("reasoning_gym")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["reasoning_gym"] = package
    try:
        countdown = importlib.import_module("reasoning_gym.games.countdown")
        extract = importlib.import_module("reasoning_gym.utils").extract_answer
    except ImportError as error:
        pytest.skip(
            f"reasoning-gym's countdown needs {error.name}: pip install {error.name}"
        )
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
            del sys.modules[name]
    scorer = countdown.CountdownDataset(countdown.CountdownConfig(seed=0, size=1))

    def judge(text, nums, target):
        entry = {"metadata": {"numbers": list(nums), "target": target}}
        return "yes" if scorer.score_answer(extract(text), entry) == 1 else "no"

    return judge


# ---- a table of single answers ----

NONE, NUMBERS, MISSED = "not an equation", "wrong numbers", "missed target"
DEEP, LONG = "(" * 21 + "17" + ")" * 21, "+".join(["1"] * 101)
TABLE = [
    # answer, numbers, target, ours, published, reasoning-gym, who is right
    # Right answers that others refuse.
    ("3*4+5 = 17", [3, 4, 5], 17, "yes", "no", "no", "ours: a true claim"),
    (
        "17 = 3*4+5",
        [3, 4, 5],
        17,
        "yes",
        "no",
        "no",
        "ours: a true claim, in this order too",
    ),
    ("3*4\n+5", [3, 4, 5], 17, "yes", "no", "no", "ours: a line break changes nothing"),
    (
        "<answer>3*4+5</answer>\nIt is 17.",
        [3, 4, 5],
        17,
        "yes",
        "no",
        "yes",
        "ours: it is there",
    ),
    ("3 × 4 + 5", [3, 4, 5], 17, "yes", "no", "no", "ours: × is how people write it"),
    ("4*5 − 3", [3, 4, 5], 17, "yes", "no", "no", "ours: so is the minus sign"),
    (
        "3\u00a0*\u00a04+5",
        [3, 4, 5],
        17,
        "yes",
        "no",
        "no",
        "ours: a no-break space is a space",
    ),
    (
        "03*4+5",
        [3, 4, 5],
        17,
        "yes",
        "no",
        "no",
        "taste: 03 is 3; Python's grammar has no 03",
    ),
    # Wrong answers that others accept.
    ("2.5*4", [2, 5, 4], 10, NONE, "yes", "yes", "ours: 2.5 was not given"),
    ("3**2+1", [3, 2, 1], 10, NONE, "yes", "yes", "ours: ** is not among + - * /"),
    ("7//2+8", [7, 2, 8], 11, NONE, "yes", "yes", "ours: // is not among + - * /"),
    (
        "50-1/(98*97*96)",
        [50, 1, 98, 97, 96],
        50,
        MISSED,
        "yes",
        "yes",
        "ours: it is not 50",
    ),
    (
        "50-1/(98*97)",
        [50, 1, 98, 97],
        50,
        MISSED,
        "no",
        "yes",
        "ours: it is not 50 by 0.0001",
    ),
    ("3+4+1e1", [3, 4], 17, NONE, "no", "yes", "ours: 1e1 hides from \\b\\d+\\b"),
    ("3+4+1_0", [3, 4], 17, NONE, "no", "yes", "ours: 1_0 hides too"),
    ("3+4+0xA", [3, 4], 17, NONE, "no", "yes", "ours: 0xA hides too"),
    (
        "3*4+5+pi/pi",
        [3, 4, 5],
        18,
        NONE,
        "no",
        "yes",
        "ours: constants by name reach any target",
    ),
    ("3+4+ord('\\n')", [3, 4], 17, NONE, "no", "yes", "ours: the answer is run as code"),
    ("sqrt(9)+14", [9, 14], 17, NONE, "no", "yes", "ours: no functions"),
    ("3!+4+7", [3, 4, 7], 17, NONE, "no", "yes", "ours: no factorials"),
    ("7%4+14", [7, 4, 14], 17, NONE, "no", "yes", "ours: no remainders"),
    ("3^2+16", [3, 2, 16], 17, NONE, "no", "yes", "ours: that is 3 xor 18"),
    ("3*4+5+x-x", [3, 4, 5], 17, NONE, "no", "yes", "ours: no letters"),
    # Nobody is wrong: ours has no decimals and no comments, and it has bounds.
    ("3.*4+5", [3, 4, 5], 17, NONE, "yes", "yes", "taste: ours has no decimals at all"),
    ("3*4+5 # so", [3, 4, 5], 17, NONE, "no", "yes", "taste: ours has no comments"),
    (
        DEEP,
        [17],
        17,
        NONE,
        "yes",
        "yes",
        "bound: 20 brackets, or time could be bought",
    ),
    (LONG, [1] * 101, 101, NONE, "yes", "yes", "bound: 200 characters"),
    # All agree.
    ("3*4+5", [3, 4, 5], 17, "yes", "yes", "yes", ""),
    ("(3*4)+5", [5, 4, 3], 17, "yes", "yes", "yes", ""),
    ("-3+4*5", [3, 4, 5], 17, "yes", "yes", "yes", ""),
    ("4*5-(-3)", [3, 4, 5], 23, "yes", "yes", "yes", ""),
    ("4*5--3", [3, 4, 5], 23, "yes", "yes", "yes", ""),
    ("+3*4+5", [3, 4, 5], 17, "yes", "yes", "yes", ""),
    ("3*-4+29", [3, 4, 29], 17, "yes", "yes", "yes", ""),
    ("-3*-4+-(-5)", [3, 4, 5], 17, "yes", "yes", "yes", ""),
    ("18 = 3*4+5", [3, 4, 5], 17, NONE, "no", "no", ""),
    ("12/(3/4)", [12, 3, 4], 16, "yes", "yes", "yes", ""),
    ("6/(1-3/4)", [6, 1, 3, 4], 24, "yes", "yes", "yes", ""),
    ("3*4+5 = 18", [3, 4, 5], 17, NONE, "no", "no", ""),
    ("3*4+6", [3, 4, 5], 18, NUMBERS, "no", "no", ""),
    ("34-17", [3, 4, 17], 17, NUMBERS, "no", "no", ""),
    ("3+4+5", [3, 4, 5], 17, MISSED, "no", "no", ""),
    ("٣*4+5", [3, 4, 5], 17, NONE, "no", "no", ""),
    ("3(4)+5", [3, 4, 5], 17, NONE, "no", "no", ""),
    ("3 4+5", [3, 4, 5], 17, NONE, "no", "no", ""),
    ("5/(4-3-1)", [5, 4, 3, 1], 17, NONE, "no", "no", ""),
    ("3*4+5,", [3, 4, 5], 17, NONE, "no", "no", ""),
    ("()", [3], 3, NONE, "no", "no", ""),
]
NAMES = [re.sub(r"\s+", " ", row[0])[:30] for row in TABLE]


def in_tags(answer):
    return answer if "<answer>" in answer else f"Let me see.\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    "answer, nums, target, mine, copied, theirs, who", TABLE, ids=NAMES
)
def test_the_table_ours_and_published(answer, nums, target, mine, copied, theirs, who):
    """Prevents: the known mistakes of published scorers in ours. Rows without a reason are
    those where all agree."""
    assert ours(in_tags(answer), nums, target) == mine
    assert published(in_tags(answer), nums, target) == copied
    assert (len({mine == "yes", copied == "yes", theirs == "yes"}) == 1) == (not who)


@pytest.mark.parametrize(
    "answer, nums, target, mine, copied, theirs, who", TABLE, ids=NAMES
)
def test_the_table_reasoning_gym(gym, answer, nums, target, mine, copied, theirs, who):
    """Prevents: a table that says of the other scorer what it does not do."""
    assert gym(in_tags(answer), nums, target) == theirs


def test_a_tower_of_powers():
    """The published scorer would compute 97**96**95**94 for ever; ours does not know **.
    (Nor is it given to reasoning-gym, which computes it as well.) Prevents: a trainer that
    stands still."""
    problem = "<answer>97**96**95**94</answer>", [97, 96, 95, 94], 10
    assert published(*problem) == "hangs" and ours(*problem) == NONE


# ---- thousands of answers, right and corrupted ----


def random_tree(rng, nums):
    """(operator, left, right), or a number."""
    if len(nums) == 1:
        return nums[0]
    cut = rng.randint(1, len(nums) - 1)
    return rng.choice("+-*/"), random_tree(rng, nums[:cut]), random_tree(rng, nums[cut:])


def value_of(tree):
    """Exact; None for a division by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    symbol, a, b = tree[0], value_of(tree[1]), value_of(tree[2])
    if a is None or b is None or (symbol == "/" and b == 0):
        return None
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[symbol]


# The operators of an operand that stands in brackets, on the left and on the right of an
# operator.
LEFT = {"+": "", "-": "", "*": "+-", "/": "+-"}
RIGHT = {"+": "", "-": "+-", "*": "+-", "/": "+-*/"}


def written(tree, few=True, space=""):
    """With the brackets that are needed, or with all."""
    if isinstance(tree, int):
        return str(tree)

    def operand(child, needed):
        text = written(child, few, space)
        return (
            f"({text})"
            if isinstance(child, tuple) and (child[0] in needed or not few)
            else text
        )

    symbol, left, right = tree
    return space.join([operand(left, LEFT[symbol]), symbol, operand(right, RIGHT[symbol])])


def without_last(tree):
    """The tree less its last number."""
    symbol, left, right = tree
    return left if isinstance(right, int) else (symbol, left, without_last(right))


def plus_one_last(tree):
    """The tree with its last number one larger."""
    return tree + 1 if isinstance(tree, int) else (*tree[:2], plus_one_last(tree[2]))


def solved_problems(n):
    """Trees over 3 or 4 numbers from 1 to 99 whose value is whole and from 10 to 99."""
    rng, found = random.Random("solved problems"), []
    while len(found) < n:
        tree = random_tree(rng, [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))])
        value = value_of(tree)
        if value is not None and value.denominator == 1 and 10 <= value <= 99:
            found.append((tree, int(value)))
    return found


def numbers_of(tree):
    return [tree] if isinstance(tree, int) else numbers_of(tree[1]) + numbers_of(tree[2])


def cases(n):
    """For each of n problems: (kind, text, numbers, target, is it right)."""
    for tree, target in solved_problems(n):
        nums, few = numbers_of(tree), written(tree)
        symbol, left, right = tree
        other = ("+-*/"["+-*/".index(symbol) - 1], left, right)
        flat = re.sub(r"[()]", "", few)
        typeset = few.translate(str.maketrans("*/-", "×÷−"))
        broken = re.sub(r"([-+*/])", r"\1\n", few, count=1)
        zero = re.sub(r"\d+", r"0\g<0>", few, count=1)
        rows = [
            # Right, and all agree.
            ("all brackets", written(tree, few=False), target, True),
            ("few brackets", few, target, True),
            ("spaces", f" {written(tree, space=' ')} ", target, True),
            (
                "the last answer",
                f"<answer>1+1</answer>\n<answer>{few}</answer>",
                target,
                True,
            ),
            # Wrong, and all agree.
            ("off by one", few, target + 1, False),
            ("a number changed", written(plus_one_last(tree)), target, False),
            ("a number left out", written(without_last(tree)), target, False),
            ("a number too many", f"{few}+1-1", target, False),
            ("a bracket lost", f"({few}", target, False),
            ("words", f"{few} is the answer", target, False),
            ("nothing", "", target, False),
            ("an untrue claim", f"{few} = {target + 1}", target, False),
            # Right or wrong, as it happens.
            ("another operator", written(other), target, value_of(other) == target),
            ("no brackets", flat, target, honest(flat, nums, target) == "yes"),
            # Right, and not for all.
            ("a claim", f"{few} = {target}", target, True),
            ("a line break", broken, target, True),
            ("text below", f"<answer>{few}</answer>\nThat is {target}.", target, True),
            ("typeset", typeset, target, True),
            ("a leading zero", zero, target, True),
        ]
        for kind, answer, wanted, right in rows:
            yield kind, in_tags(answer), nums, wanted, right


def disagreements(judge, n):
    """Counts by kind: judged right though it is wrong, judged wrong though it is right."""
    accepted, refused = Counter(), Counter()
    for kind, text, nums, target, right in cases(n):
        verdict = judge(text, nums, target)
        assert verdict in ("yes", "no")
        accepted[kind] += verdict == "yes" and not right
        refused[kind] += verdict == "no" and right
    return {k: v for k, v in accepted.items() if v}, {k: v for k, v in refused.items() if v}


PROBLEMS = 500  # 19 answers each
TYPESET = 463  # of them have a sign to typeset


def test_ours_is_exact_on_right_and_corrupted_answers():
    """Prevents: a right answer refused or a wrong one accepted, and a wrong category.
    Whether an answer is right is known from how it was made."""
    right, errors = 0, {}
    for kind, text, nums, target, expected in cases(PROBLEMS):
        verdict = ours(text, nums, target)
        assert (verdict == "yes") == expected, (kind, text, nums, target)
        right += expected
        errors.setdefault(kind, set()).add(verdict)
    assert right == 9 * PROBLEMS + 356  # "no brackets" and "another operator", now and then
    assert errors["off by one"] == {MISSED}
    assert errors["a number changed"] == {NUMBERS, NONE}  # once it makes a division by zero
    assert errors["a number left out"] == errors["a number too many"] == {NUMBERS}
    assert errors["a bracket lost"] == errors["words"] == errors["nothing"] == {NONE}
    assert errors["an untrue claim"] == {NONE}
    assert errors["no brackets"] == errors["another operator"] == {"yes", MISSED}


def test_published_refuses_forms_and_nothing_else():
    """9,500 answers: the published scorer accepts nothing that is wrong here, and refuses
    five forms of right answers. Prevents: rewards for layout instead of arithmetic."""
    every = dict.fromkeys(
        ("a claim", "a line break", "text below", "a leading zero"), PROBLEMS
    )
    assert disagreements(published, PROBLEMS) == ({}, every | {"typeset": TYPESET})


def test_reasoning_gym_refuses_forms_and_nothing_else(gym):
    """The same answers, judged by other people's code: four forms, a line break only
    outside brackets. Prevents: a mistake in how this file itself decides what is right."""
    every = dict.fromkeys(("a claim", "a leading zero"), PROBLEMS)
    forms = every | {"typeset": TYPESET, "a line break": 483}
    assert disagreements(gym, PROBLEMS) == ({}, forms)


# ---- answers made to deceive ----


def deceptions(n):
    """n of each kind: (kind, answer, numbers, target). Every one is wrong."""
    pick = random.Random("deceptions").randint
    for tree, target in solved_problems(n):
        a, b, c = pick(1, 9), pick(1, 9), 10 * pick(1, 9)
        yield "a decimal point", f"{a}.{b}*{c}", [a, b, c], (10 * a + b) * c // 10
        a, b, c = pick(2, 9), pick(2, 3), pick(1, 50)
        yield "a power", f"{a}**{b}+{c}", [a, b, c], a**b + c
        a, b, c = pick(20, 99), pick(3, 9), pick(10, 50)
        a += a % b == 0
        yield "division rounded down", f"{a}//{b}+{c}", [a, b, c], a // b + c
        yield "a remainder", f"{a}%{b}+{c}", [a, b, c], a % b + c
        yield "a hidden number", f"{a}+{b}+1e1", [a, b], a + b + 10
        yield "a constant", f"{written(tree)}+pi/pi", numbers_of(tree), target + 1
        nums = [pick(50, 99) for _ in range(3)]
        a = pick(90, 99)
        yield "nearly, 4 numbers", f"{a}-1/({nums[0]}*{nums[1]})", [a, 1, *nums[:2]], a
        many = "*".join(map(str, nums))
        yield "nearly, 5 numbers", f"{a}-1/({many})", [a, 1, *nums], a


DECEPTIONS = 300
PUBLISHED = ("a decimal point", "a power", "division rounded down", "nearly, 5 numbers")
GYM = (*PUBLISHED, "a remainder", "a hidden number", "a constant", "nearly, 4 numbers")


def deceived(judge):
    rows = list(deceptions(DECEPTIONS))
    verdicts = [(kind, judge(in_tags(answer), *problem)) for kind, answer, *problem in rows]
    return Counter(kind for kind, verdict in verdicts if verdict == "yes")


def test_nothing_deceives_ours():
    """Prevents: a reward for what the problem forbids, which training would find."""
    assert deceived(ours) == {} and deceived(lambda text, *problem: "yes").total() == 2400


def test_what_deceives_the_published_scorer():
    """Runs of digits, eval and a tolerance. (1e-5 does no harm with up to 4 numbers up to
    99.)"""
    assert deceived(published) == dict.fromkeys(PUBLISHED, DECEPTIONS)


def test_what_deceives_reasoning_gym(gym):
    """The same, and names; its tolerance, 1e-5 of the target, reaches 4 numbers too."""
    assert deceived(gym) == dict.fromkeys(GYM, DECEPTIONS)


# ---- one random character ----


def edits(n):
    """Right answers with one character inserted, removed or replaced, each on its own
    problem and, where there is one, on the problem that the published scorer's reading of
    it would solve: its runs of digits the numbers, Python's value the target."""
    rng = random.Random("edits")
    problems = solved_problems(PROBLEMS)
    for _ in range(n):
        tree, target = rng.choice(problems)
        answer = written(tree)
        edit, place = (
            rng.choice(("insert", "remove", "replace")),
            rng.randrange(len(answer)),
        )
        char = "" if edit == "remove" else rng.choice("0123456789+-*/(). ")
        answer = answer[:place] + char + answer[place + (edit != "insert") :]
        yield answer, numbers_of(tree), target
        try:
            value = python_value(answer)
            if abs(value - round(value)) < 1e-9:
                yield (
                    answer,
                    [int(digits) for digits in re.findall(r"\d+", answer)],
                    round(value),
                )
        except (Endless, *NO_VALUE):
            pass


KINDS = {
    "a power": r"\*\*",
    "division rounded down": r"//",
    "a decimal point": r"\.",
    "a leading zero": r"(?<!\d)0\d",
    "a second sign": r"[-+*/]\s*[-+]",
    "a plus in front": r"(^|\()\s*\+",
}


def edited(judge):
    """Where the judge and ours differ: counts by kind, of what only ours accepts, and of
    what only ours refuses. Anything of no kind is counted by itself, so it shows."""
    accepted, refused = Counter(), Counter()
    for answer, nums, target in edits(4000):
        text = in_tags(answer)
        if published(text, nums, target) == "hangs":
            continue
        mine, theirs = ours(text, nums, target) == "yes", judge(text, nums, target) == "yes"
        kind = next((kind for kind in KINDS if re.search(KINDS[kind], answer)), answer)
        accepted[kind] += mine and not theirs
        refused[kind] += theirs and not mine
    return {k: v for k, v in accepted.items() if v}, {k: v for k, v in refused.items() if v}


ONLY_OURS = {"a leading zero": 23}
ONLY_OTHERS = {  # of 6,898 answers, 2,721 of them right
    "a decimal point": 86,
    "a power": 5,
    "division rounded down": 3,
}


def test_one_character_against_exact_arithmetic():
    """Prevents: a slip in how our own answers are read, such as 3 4 read as 34, a bracket
    closed for free. The verdicts are the same, all of them."""

    def judge(text, nums, target):
        answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
        return honest(answer, nums, target)

    assert edited(judge) == ({}, {})


def test_one_character_against_the_published_scorer():
    """Prevents: a kind of disagreement that has no name yet."""
    assert edited(published) == (ONLY_OURS, ONLY_OTHERS)


def test_one_character_against_reasoning_gym(gym):
    """The same kinds and counts, by other people's code."""
    assert edited(gym) == (ONLY_OURS, ONLY_OTHERS)
