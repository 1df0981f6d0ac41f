"""The embedded models and the corpora that they were made from."""

import itertools
import json
import random
import re

import pytest
import torch
from conftest import ROOT

from config import parse
from extras import make_tiny, make_tiny_calls
from model import Chat, load
from tasks import in_test
from tasks.countdown import Countdown, evaluate
from tasks.function_calling import FunctionCalling

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
    problems = TASK.problems("train", 100, seed=0)
    states = []
    for _ in range(2):
        model, _ = make_tiny.fresh_model("tiny", tiny_chat.tokenizer)
        stream = make_tiny.batches(problems, TASK, tiny_chat, random.Random(0), rows=4)
        make_tiny.warm_up(model, stream, 3, make_tiny.mean_with_verdicts(tiny_chat))
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


def test_the_embedded_models_are_small_and_spell_digits(tiny_chat):
    files = [path for path in (ROOT / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8 * 10**6
    for chat in (tiny_chat, Chat(ROOT / "tiny-calls")):
        assert len(chat.encode("1234567890")) == 10


# ---- function calling ----
CALLS = FunctionCalling(difficulty="mini")


@pytest.fixture(scope="module")
def calls_chat():
    return Chat(ROOT / "tiny-calls")


@pytest.fixture(scope="module")
def call_conversations():
    """(problem, its turns): of each kind of reflection, and the drills."""
    rng, pairs = random.Random(0), []
    for problem in make_tiny_calls.make_problems(rng, 300):
        for kinds in (make_tiny_calls.KINDS, {"drill": 1}):
            turns = make_tiny_calls.conversation(problem, CALLS, rng, 0, kinds)
            pairs.append((problem, turns))
    return pairs


def test_tiny_means_the_model_of_the_task():
    """Prevents: a Countdown model that is asked for calls, defaults of the other task."""

    def options(words):
        return parse(words.split(), "", "train.py")[0]

    config = options("--task function_calling")
    assert (config.model, config.difficulty) == ("tiny-calls", "mini")
    config = options("--model tiny --task function_calling --difficulty easy")
    assert (config.model, config.difficulty) == ("tiny-calls", "easy")
    config = options("--task function_calling --data d.jsonl")
    assert (config.model, config.difficulty) == ("tiny", "")
    config = options("")
    assert (config.model, config.difficulty) == ("tiny", "3x12")
    model, chat = load("tiny-calls")
    assert chat.native_tools and sum(p.numel() for p in model.parameters()) < 1.5e6


def test_all_working_of_the_call_corpus_is_true(call_conversations):
    """Sums, and times up to minutes over 59. Prevents: working that cannot be trusted."""
    sums = times = 0
    for _, turns in call_conversations:
        reflection = turns[1] if len(turns) == 3 else ""
        for a, b, product, sign, c, value in re.findall(
            r"(\d+)\*(\d+)=(\d+)([-+])(\d+)=(\d+)", reflection
        ):
            assert int(a) * int(b) == int(product)
            assert int(product) + int(sign + c) == int(value)
            sums += 1
        for chain in re.findall(r"\d+:\d+[-+=:\d]*", reflection):
            carried = None  # "18:10=17:70-50=17:20": each side goes on from the one before
            for side in chain.split("="):
                hour, minute, *signed = re.findall(r"[-+]?\d+", side.replace(":", " "))
                start = 60 * int(hour) + int(minute)
                assert carried in (None, start), chain
                carried = start + sum(map(int, signed))
            times += "=" in chain
    assert sums > 300 < times


def test_a_retry_takes_over_what_its_reflection_found(call_conversations):
    """And after a drill it is right. Prevents: a corpus that teaches to ignore reflections,
    an attempt that is right by chance and reflected upon all the same."""
    right = []
    for problem, turns in call_conversations:
        if len(turns) == 3:
            assert not CALLS.verify(problem, turns[0]).ok
            retry = json.loads(turns[2].split("\n")[1])["arguments"]
            for key in problem["values"]:
                if re.search(rf"(^|; ){key}: ", turns[1]):
                    assert retry[key] == problem["values"][key]
            right.append(CALLS.verify(problem, turns[2]).ok)
    assert sum(right[1::2]) > 250 and len(right) - sum(right) > 50


def test_the_kind_of_reflection_does_not_depend_on_what_was_wrong(call_conversations):
    """Prevents: a hint of the right answer in the blame, which only training may find."""
    blamed = {True: 0, False: 0}  # by whether the value was wrong
    for problem, turns in call_conversations[::2]:
        if len(turns) == 3 and turns[1].startswith(("The ", "I doubt")):
            call = json.loads(turns[0].split("\n")[1])
            for key, value in call["arguments"].items():
                if re.search(rf" {key} (should|is)", turns[1]):
                    blamed[value != problem["values"].get(key)] += 1
    assert blamed[True] > 10 and blamed[False] > 10


def test_the_calls_vocabulary_needs_no_bytes(calls_chat):
    """Prompts with tools, right answers, the instructions, the generic reflection of the
    controls: for training and for testing. Prevents: words that the model cannot read."""
    alphabet = set(range(3, 3 + 256))
    single = {calls_chat.encode(text)[0] for text in "0123456789\n :,.?;=+-*/"}
    texts = [CALLS.reflect, CALLS.retry, CALLS.generic_reflection]
    for split in ("train", "test"):
        for problem in CALLS.problems(split, 500, 0):
            messages = CALLS.messages(problem, native_tools=True)
            texts.append(calls_chat.render(messages, CALLS.tools(problem)))
            texts.append(CALLS.answer(problem))
    for text in texts:
        ids = calls_chat.encode(text)
        assert not set(ids) & alphabet - single, text
        assert calls_chat.tokenizer.decode(ids, skip_special_tokens=False) == text
    lengths = [len(calls_chat.encode(text)) for text in texts]
    assert lengths[:2] == [1, 1] and max(lengths) < 60


def test_the_warm_up_for_calls_repeats_itself(calls_chat):
    """Prevents: a random number from elsewhere, prompts or failures that are trained."""
    states = []
    for _ in range(2):
        model, _ = make_tiny.fresh_model("tiny-calls", calls_chat.tokenizer)
        rng = random.Random(0)
        problems = make_tiny_calls.make_problems(rng, 50)
        stream = make_tiny_calls.alternate(
            make_tiny.batches(problems, CALLS, calls_chat, rng, make_tiny_calls.draw, 4),
            make_tiny_calls.drills(rng, calls_chat, 4),
        )
        make_tiny.warm_up(model, stream, 2, lambda losses, targets, rows: losses.mean())
        states.append(model.state_dict())
        for ids, trained in itertools.islice(stream, 16):
            for row, mask in zip(ids.tolist(), trained.tolist()):
                words = calls_chat.decode([i for i, is_in in zip(row, mask) if is_in])
                assert "You can call" not in words and CALLS.retry not in words
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
