"""Here because what the embedded model has read, and has not, should be open to all.

RRR can only reward what sometimes happens. So tiny's warm-up teaches attempts with faults
on purpose, reflections (vague, about one thing, or worked out) and retries that take over
what was worked out and guess the rest. No kind of reflection depends on the problem or on
what was wrong, and all working is true. Behind a DRILL more retries are right.
"""

import json
from pathlib import Path

from extras import make_calls as calls
from tasks.countdown import Countdown
from tasks.function_calling import FunctionCalling

WORDS = json.loads(Path(__file__).with_name("tiny.json").read_text(encoding="utf-8"))


# ---- Countdown: three numbers in two steps ----
class CountdownCorpus:
    MAX_NUMBER = 15
    LARGEST = 150  # results of a step: few enough for the arithmetic to be learnt
    RIGHT, RIGHT_RETRY = 0.95, 0.45  # shares of guesses that are right
    KINDS = {"vague": 0.45, "diagnosis": 0.3, "search": 0.25}
    DRILL = "search"

    def __init__(self):
        self.task = Countdown(difficulty=f"3x{self.MAX_NUMBER}")
        self.problems = self.task.problems("train", 10**6, seed=0)
        self.vague = [*WORDS["vague"], self.task.generic_reflection]

    def problem(self, rng):
        problem = rng.choice(self.problems)
        return problem | {"nums": rng.sample(problem["nums"], 3)}

    def attempt(self, problem, rng, right):
        """Some way. Of the wrong ones some use a number that was not given."""
        nums, target = problem["nums"], problem["target"]
        if rng.random() < 0.15 * (1 - right):
            other = rng.randint(1, self.MAX_NUMBER)
            return pick(ways([*nums[:2], other]), target, rng, 0)[1]
        return pick(ways(nums), target, rng, right)[1]

    def mend(self, problem, attempt, kind, rng):
        """The reflection, and the retry."""
        target = problem["target"]
        retry = self.attempt(problem, rng, self.RIGHT_RETRY)
        if kind == "vague":
            return rng.choice(self.vague), retry
        if kind == "search":
            reflection, found = search(problem["nums"], target, rng)
            return reflection, found or retry
        result = int(attempt.split(" <")[0].split("=")[-1])
        how = "too low" if result < target else "too high"
        how = "with wrong numbers" if result == target else how
        return f"I got {result}, not {target}: {how}.", retry


def operations(a, b):
    """[(operator, result)] of a >= b: whole, positive and not too large."""
    results = [("+", a + b), ("-", a - b), ("*", a * b)]
    if b > 1 and a % b == 0:
        results.append(("/", a // b))
    return [pair for pair in results if 0 < pair[1] <= CountdownCorpus.LARGEST]


def ways(nums):
    """Every way to use three numbers in two steps: [(working, answer, result)]."""
    found = {}  # a dict, since two orders may give one way
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b, c = max(nums[i], nums[j]), min(nums[i], nums[j]), nums[3 - i - j]
        for first, m in operations(a, b):
            for second, result in operations(max(m, c), min(m, c)):
                inner = f"{a}{first}{b}"
                if second in "*/" and first in "+-" or second in "-/" and m < c:
                    inner = f"({inner})"
                step = f"{m}{second}{c}" if m >= c else f"{c}{second}{m}"
                whole = f"{inner}{second}{c}" if m >= c else f"{c}{second}{inner}"
                working = f"{a}{first}{b}={m}, {step}={result}"
                found[working, f"{working} <answer>{whole}</answer>", result] = True
    return list(found)


def pick(some_ways, target, rng, share):
    """One of the ways; a right one, if there is any, in this share of cases."""
    right = [way for way in some_ways if way[2] == target]
    return rng.choice(right if right and rng.random() < share else some_ways)


def search(nums, target, rng):
    """Candidates until one makes the target or patience ends: the text, what it found."""
    left, lines = ways(nums), []
    for _ in range(min(len(left), rng.choice((1, 1, 2, 2, 3, 4, 6, 8)))):
        way = pick(left, target, rng, 0.5)  # half of them lead to the target
        left.remove(way)
        lines.append(f"{way[0]}={target}? {'yes' if way[2] == target else 'no'}")
        if way[2] == target:
            return "; ".join(lines), way[1]
    return "; ".join(lines), None


# ---- function calling of difficulty mini ----
class CallsCorpus:
    RIGHT = 0.48  # attempts (and what a retry has to guess) that are right
    LEFT_OUT = 0.1  # of faults; the others are wrong values
    KINDS = {"vague": 0.4, "blame": 0.3, "parameters": 0.3}
    DRILL = "all of it"

    def __init__(self):
        self.task = FunctionCalling(difficulty="mini")
        self.vague = [*WORDS["vague"], self.task.generic_reflection]

    def problem(self, rng):
        """With its values, how each is worked out, and wrong ones that are near."""
        problem, work, near = calls.mini_problem(rng, "train")
        values = {k: v for k, [v] in problem["answers"][0]["arguments"].items()}
        tools = [calls.as_offered(calls.MINI_TOOLS[name]) for name in problem["tools"]]
        return problem | {"tools": tools, "values": values, "work": work, "near": near}

    def attempt(self, problem, rng, right, known=()):
        """A call, right or with one fault, which is in none of the known parameters."""
        arguments = dict(problem["values"])
        unknown = [key for key in arguments if key not in known]
        if unknown and rng.random() >= right:
            hard = [key for key in unknown if "=" in problem["work"][key]]
            key = rng.choice(hard if hard and rng.random() < 0.85 else unknown)
            wrong = [value for value in problem["near"][key] if value != arguments[key]]
            arguments[key] = rng.choice(wrong)
            if rng.random() < self.LEFT_OUT:
                del arguments[key]
        call = {"name": problem["answers"][0]["name"], "arguments": arguments}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"

    def mend(self, problem, attempt, kind, rng):
        """The reflection, and the retry."""
        work, known = problem["work"], []
        if kind == "vague":
            reflection = rng.choice(self.vague)
        elif kind == "blame":
            arguments = json.loads(attempt.split("\n")[1])["arguments"]
            key, value = rng.choice(list(arguments.items()))
            reflection = rng.choice(WORDS["blame"]).format(key, value)
        else:
            is_drill, known = kind == self.DRILL, list(work)
            if not is_drill and rng.random() < 0.4:
                some = [key for key in known if rng.random() < 0.6]
                known = some or [rng.choice(known)]
            found = []
            for key in known:
                worked = is_drill or rng.random() < 0.8
                found.append(f"{key}: {work[key] if worked else problem['values'][key]}")
            reflection = "; ".join(found) + "."
        return reflection, self.attempt(problem, rng, self.RIGHT, known)


DRILLED_SUMS = range(3, 10), range(6, 21), "+-", range(2, 18)  # more than problems have


def arithmetic(rng):
    """Four sums and times, worked out, or in words and at once; none is for testing."""
    drills = []
    for _ in range(4):
        if rng.random() < 0.5:
            a, b, sign, c = calls.pick(rng, "train", *DRILLED_SUMS)
            work, _ = calls.number(a, b, sign, c)
            tool = calls.MINI_TOOLS[rng.choice(list(calls.MINI_TOOLS))]
            said = calls.worded(tool["numbers"], sign, a=a, b=b, c=c)
        else:
            t, sign, m = calls.pick(rng, "train", *calls.TIMES)
            work, _ = calls.time(t, sign, m)
            both = rng.choice(calls.MINI["times"])
            said = calls.worded(both, sign, m=m, t=calls.clock(t))
        at_once = f"{said}: {work.split('=')[-1]}"
        drills.append(work if rng.random() < 0.5 else at_once)
    return "; ".join(drills) + "."


# ---- both ----
def conversation(corpus, rng, right, kinds):
    """A problem and the assistant's turns: [attempt] or [attempt, reflection, retry]."""
    problem = corpus.problem(rng)
    attempt = corpus.attempt(problem, rng, right)
    if corpus.task.verify(problem, attempt).ok:
        return problem, [attempt]
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    return problem, [attempt, *corpus.mend(problem, attempt, kind, rng)]
