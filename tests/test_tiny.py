"""The embedded model and the corpus that it was made from."""

import itertools
import random
import re

import pytest
import torch
from conftest import ROOT

from extras import make_tiny
from model import Decoder, ModelConfig, read_json
from tasks import in_test
from tasks.countdown import Countdown, evaluate

TASK = Countdown(difficulty=f"3x{make_tiny.MAX_NUMBER}")
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
CHECK = re.compile(r"=(\d+)=(\d+)\? (yes|no)")


@pytest.fixture(scope="module")
def conversations():
    rng = random.Random(0)
    problems = TASK.problems("train", 300, seed=0)
    pairs = []
    for problem in problems:
        for right in (0.6, 0):
            pairs.append((problem, make_tiny.conversation(problem, TASK, rng, right)))
    return pairs


def test_no_test_problem_is_in_the_corpus():
    """Prevents: figures on problems that the warm-up has seen."""
    problems = TASK.problems("train", 10**6, seed=0)
    assert len(problems) > 4000 and not any(in_test(p["key"]) for p in problems)


def test_all_arithmetic_and_every_verdict_are_true(conversations):
    """Prevents: a model that learns checks that cannot be trusted."""
    steps = verdicts = 0
    for problem, turns in conversations:
        for a, operator, b, result in STEP.findall(" ".join(turns)):
            value, _ = evaluate(f"{a}{operator}{b}")
            assert value == int(result)
            steps += 1
        for result, target, verdict in CHECK.findall(" ".join(turns)):
            assert int(target) == problem["target"]
            assert verdict == ("yes" if result == target else "no")
            verdicts += 1
    assert steps > 1000 and verdicts > 100


def test_answers_are_what_their_working_says(conversations):
    """An expression gives the result of its steps; what a search found solves the problem,
    and is what the retry answers. Prevents: parentheses left out, a retry that ignores its
    reflection."""
    found = 0
    for problem, turns in conversations:
        for text in turns[::2]:
            working, expression = re.fullmatch(r"(.*) <answer>(.*)</answer>", text).groups()
            assert evaluate(expression)[0] == int(working.split("=")[-1])
        if len(turns) == 3 and turns[1].endswith("yes"):
            assert TASK.verify(problem, turns[2]).ok
            assert (
                turns[2].split(" <")[0]
                == turns[1].split("; ")[-1].split(f"={problem['target']}?")[0]
            )
            found += 1
        if len(turns) == 3:
            assert not TASK.verify(problem, turns[0]).ok
    assert found > 40


def test_the_kind_of_reflection_does_not_depend_on_the_problem(conversations):
    """Prevents: a corpus in which the good reflections stand beside the easy problems."""
    kinds = {True: [], False: []}  # by whether the target is small
    for problem, turns in conversations:
        if len(turns) == 3:
            kinds[problem["target"] < 30].append("?" in turns[1])
    small, large = (sum(some) / len(some) for some in kinds.values())
    assert (
        abs(small - make_tiny.KINDS["search"])
        < 0.1
        > abs(large - make_tiny.KINDS["search"])
    )


def test_the_warm_up_repeats_itself(tiny_chat):
    """Same seed, same weights. Prevents: a random number from elsewhere."""
    config = ModelConfig.from_dict(read_json(ROOT / "tiny" / "config.json"))
    problems = TASK.problems("train", 100, seed=0)
    states = []
    for _ in range(2):
        model = Decoder(config, 1024)
        make_tiny.initialise(model)
        stream = make_tiny.batches(problems, TASK, tiny_chat, random.Random(0), rows=4)
        make_tiny.warm_up(model, tiny_chat, stream, steps=3)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_only_the_assistants_turns_are_trained(tiny_chat):
    """Prevents: a model that learns to write prompts, or the share of its own failures."""
    rng = random.Random(0)
    problems = TASK.problems("train", 50, seed=0)
    for ids, trained in itertools.islice(
        make_tiny.batches(problems, TASK, tiny_chat, rng), 16
    ):
        for row, mask in zip(ids.tolist(), trained.tolist()):
            words = tiny_chat.decode([i for i, is_trained in zip(row, mask) if is_trained])
            assert "Use the numbers" not in words
            assert TASK.retry not in words and TASK.reflect not in words


def test_the_embedded_model_is_small_and_spells_digits(tiny_chat):
    folder = ROOT / "tiny"
    assert (
        sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) < 8 * 10**6
    )
    assert len(tiny_chat.encode("1234567890")) == 10
