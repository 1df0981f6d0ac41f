"""The embedded model and the two corpora that it was made from."""

import itertools
import json
import random
import re

import pytest
import torch
from conftest import ROOT

from config import parse
from extras import corpus, make_tiny
from model import load
from tasks import in_test
from tasks.countdown import evaluate

COUNTDOWN, CALLS = corpus.CountdownCorpus(), corpus.CallsCorpus()
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
CHECK = re.compile(r"=(\d+)=(\d+)\? (yes|no)")


@pytest.fixture(scope="module")
def conversations():
    rng = random.Random(0)
    pairs = []
    for i in range(600):
        right = (0.6, 0)[i % 2]
        pairs.append(corpus.conversation(COUNTDOWN, rng, right, COUNTDOWN.KINDS))
    return pairs


def test_no_test_problem_is_in_the_corpus():
    """Prevents: figures on problems that the warm-up has seen."""
    problems = COUNTDOWN.problems
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
            assert COUNTDOWN.task.verify(problem, turns[2]).ok
            assert (
                turns[2].split(" <")[0]
                == turns[1].split("; ")[-1].split(f"={problem['target']}?")[0]
            )
            found += 1
        if len(turns) == 3:
            assert not COUNTDOWN.task.verify(problem, turns[0]).ok
    assert found > 40


def test_the_kind_of_reflection_does_not_depend_on_the_problem(conversations):
    """Prevents: a corpus in which the good reflections stand beside the easy problems."""
    kinds = {True: [], False: []}  # by whether the target is small
    for problem, turns in conversations:
        if len(turns) == 3:
            kinds[problem["target"] < 30].append("?" in turns[1])
    small, large = (sum(some) / len(some) for some in kinds.values())
    wanted = COUNTDOWN.KINDS["search"]
    assert abs(small - wanted) < 0.1 > abs(large - wanted)


def rows_of(chat, rng, arithmetic_rows=0):
    corpora = {"countdown": COUNTDOWN, "calls": CALLS}
    return make_tiny.encoded_rows(corpora, chat, rng, arithmetic_rows)


def test_the_warm_up_repeats_itself(tiny_chat):
    """Same seed, same weights. Prevents: a random number from elsewhere."""
    states = []
    for _ in range(2):
        model, _ = make_tiny.fresh_model(tiny_chat.tokenizer)
        rng = random.Random(0)
        stream = make_tiny.batches(rows_of(tiny_chat, rng, 4), 4, rng)
        make_tiny.warm_up(model, tiny_chat, stream, 3)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_only_the_assistants_turns_are_trained(tiny_chat):
    """Prevents: a model that learns to write prompts, or the share of its own failures."""
    rows = rows_of(tiny_chat, random.Random(0))
    trained = 0
    for ids, mask in itertools.islice(rows, 500):
        assert len(ids) == len(mask)
        words = tiny_chat.decode(ids[mask].tolist())
        assert "Use the numbers" not in words and "You can call" not in words
        for task in (COUNTDOWN.task, CALLS.task):
            assert task.retry not in words and task.reflect not in words
        trained += bool(mask.any())
    assert trained > 400


def test_what_is_given_is_not_trained(tiny_chat, monkeypatch):
    """Behind a failure that is given, its reflection and its retry are; of a drill not the
    first token. Prevents: a share of failures, or of kinds, that drills move."""
    header = tiny_chat.encode("assistant\n")[-1]
    rng = random.Random(0)
    for given, before in (("failure", 1), ("drill", 2)):
        monkeypatch.setattr(make_tiny, "GIVEN", {given: 1})
        for own in [COUNTDOWN, CALLS] * 50:
            ids, mask = make_tiny.encode(own, tiny_chat, rng)
            turns = (ids == header).nonzero().flatten().tolist()
            if len(turns) == 3:  # else the attempt was right by chance
                assert mask.nonzero()[0] == turns[1] + before and mask[-1]
            else:
                assert not mask.any()


def test_tiny_is_small_and_spells_digits(tiny_chat):
    files = [path for path in (ROOT / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8 * 10**6
    assert len(tiny_chat.encode("1234567890")) == 10
    model, chat = load("tiny")
    assert chat.native_tools and sum(p.numel() for p in model.parameters()) < 1.5e6


# ---- function calling ----
@pytest.fixture(scope="module")
def call_conversations():
    """(problem, its turns): of each kind of reflection, and the drills."""
    rng, pairs = random.Random(0), []
    for _ in range(300):
        for kinds in (CALLS.KINDS, {CALLS.DRILL: 1}):
            pairs.append(corpus.conversation(CALLS, rng, 0, kinds))
    return pairs


def test_tiny_has_problems_of_its_size_for_each_task():
    """Prevents: problems beyond it, defaults of the other task."""

    def options(words):
        return parse(words.split(), "", "train.py")[0]

    config = options("--task function_calling")
    assert (config.model, config.difficulty) == ("tiny", "mini")
    config = options("--model tiny --task function_calling --difficulty easy")
    assert (config.model, config.difficulty) == ("tiny", "easy")
    config = options("--task function_calling --data d.jsonl")
    assert (config.model, config.difficulty) == ("tiny", "")
    config = options("")
    assert (config.model, config.difficulty) == ("tiny", "3x12")


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
            assert not CALLS.task.verify(problem, turns[0]).ok
            retry = json.loads(turns[2].split("\n")[1])["arguments"]
            for key in problem["values"]:
                if re.search(rf"(^|; ){key}: ", turns[1]):
                    assert retry[key] == problem["values"][key]
            right.append(CALLS.task.verify(problem, turns[2]).ok)
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


def test_the_vocabulary_needs_no_bytes(tiny_chat):
    """Prompts (with tools), right answers, the instructions, the generic reflection of the
    controls: for training and for testing. Prevents: words that the model cannot read."""
    alphabet = set(range(3, 3 + 256))
    single = {tiny_chat.encode(text)[0] for text in "0123456789\n :,.?;=+-*/()"}
    for task in (COUNTDOWN.task, CALLS.task):
        texts = [task.reflect, task.retry, task.generic_reflection]
        for split in ("train", "test"):
            for problem in task.problems(split, 500, 0):
                messages = task.messages(problem, native_tools=True)
                texts.append(tiny_chat.render(messages, task.tools(problem)))
                texts.append(task.answer(problem))
        for text in texts:
            ids = tiny_chat.encode(text)
            assert not set(ids) & alphabet - single, text
            assert tiny_chat.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert max(len(tiny_chat.encode(text)) for text in texts) < 60
