"""Here because what the second embedded model has learnt should be open to all, too.

    python -m extras.make_tiny_calls NEW_FOLDER

Function calling of difficulty mini. Like make_tiny.py it teaches attempts, reflections
(vague, blaming one parameter, or parameter by parameter) and retries (what was found, the
rest guessed), with faults on purpose. And drills: behind a failure that is given, all is
worked out and the retry is right. No reflection depends on what was wrong.
"""

import itertools
import json
import random
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from extras import make_mini as mini
from extras.make_calls import as_offered
from extras.make_tiny import VAGUE, batches, fresh_model, make_tokenizer, warm_up
from model import Chat, resolve, save
from tasks.function_calling import FunctionCalling

RIGHT = 0.55  # attempts (and what a retry has to guess) that are right
KINDS = {"vague": 0.4, "blame": 0.3, "parameters": 0.3}
GIVEN = {0: 2, 1: 0.5, 2: 1.5}  # weights: nothing, a failure, a drill
LEFT_OUT = 0.1  # of faults; the others are wrong values
PROBLEMS, STEPS, ROWS, SEED = 60_000, 7000, 16, 0
DRILLS = 800  # steps of arithmetic alone, before the turns
DRILLED_SUMS = range(3, 10), range(6, 21), "+-", range(2, 18)
TOKENS = 25  # about as many are trained in a conversation
# One token each: an instruction, a tool's head, a parameter with its description, what is
# between two values of a call, a frame, a name, a digit, up to six words.
PIECES = r"""You tried this[^<]*
Now try again[^<]*
You can call these tools:\n
\{"type": "function"[^\n]*?"properties": \{
"[a-z_]+": \{"type": "[a-z]+"[^{}]*\}(?:, )?
\}, "required": [^\n<]*\n?
<tool_call>\n\{"name": "[a-z_]+", "arguments": \{
"?, "[a-z_]+": "?
"[a-z_]+": "?
"?\}+\n</tool_call>
(?:Please|Could you|Can you|I want you to)[ ]
 ?[A-Z][a-z]+
[0-9]
 ?(?:[a-z_]+ ?|I ){1,6}[.,:;?]*[ \n]?
[-+*/=]
[.,:;?]+ ?""".replace("\n", "|")


def write(call):
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def guess(problem, rng, right, known=()):
    """A call, right or with one fault, which is in none of the known parameters."""
    name, arguments = problem["answers"][0]["name"], dict(problem["values"])
    unknown = [key for key in arguments if key not in known]
    if unknown and rng.random() >= right:
        hard = [key for key in unknown if "=" in problem["work"][key]]
        key = rng.choice(hard if hard and rng.random() < 0.85 else unknown)
        wrong = [value for value in problem["near"][key] if value != arguments[key]]
        arguments[key] = rng.choice(wrong)
        if rng.random() < LEFT_OUT:
            del arguments[key]
    return {"name": name, "arguments": arguments}


def conversation(problem, task, rng, right=RIGHT, kinds=KINDS):
    """The assistant's turns for one problem: [attempt] or [attempt, reflection, retry]."""
    call, work = guess(problem, rng, right), problem["work"]
    if task.verify(problem, write(call)).ok:
        return [write(call)]
    kind, known = rng.choices(list(kinds), list(kinds.values()))[0], []
    if kind == "vague":
        reflection = rng.choice([*VAGUE, task.generic_reflection])
    elif kind == "blame":
        key, value = rng.choice(list(call["arguments"].items()))
        reflection = rng.choice(["The {} should not be {}.", "I doubt that the {} is {}."])
        reflection = reflection.format(key, value)
    else:
        is_drill, known = kind == "drill", list(work)
        if not is_drill and rng.random() < 0.4:
            some = [key for key in known if rng.random() < 0.6]
            known = some or [rng.choice(known)]
        found = []
        for key in known:
            worked = is_drill or rng.random() < 0.8
            found.append(f"{key}: {work[key] if worked else problem['values'][key]}")
        reflection = "; ".join(found) + "."
    return [write(call), reflection, write(guess(problem, rng, RIGHT, known))]


def draw(problem, task, rng):
    """The problem, its turns, and what is given: see GIVEN."""
    given = rng.choices(list(GIVEN), list(GIVEN.values()))[0]
    kinds = {"drill": 1} if given == 2 else KINDS
    return problem, conversation(problem, task, rng, 0 if given else RIGHT, kinds), given


def make_problems(rng, count):
    """For training, with what the corpus needs: values, work, near (wrong values)."""
    problems = []
    for _ in range(count):
        problem, work, near = mini.make_problem(rng, "train")
        values = {k: v for k, [v] in problem["answers"][0]["arguments"].items()}
        tools = [as_offered(mini.TOOLS[name]) for name in problem["tools"]]
        problem |= {"tools": tools, "values": values, "work": work, "near": near}
        problems.append(problem)
    return problems


def drills(rng, chat, rows):
    """Batches of drills, all of it trained: ids, trained, both (B, T)."""
    while True:
        texts, masks = [], []
        for _ in range(rows):
            text = "; ".join(drill(rng) for _ in range(8)) + "."
            texts.append(torch.tensor(chat.encode(text)))
            masks.append(torch.ones(len(texts[-1]), dtype=torch.bool))
        yield [pad_sequence(column, batch_first=True) for column in (texts, masks)]


def drill(rng):
    """A sum or a time, worked out, or in words and at once. Of more sums than problems
    have, and of none that is for testing."""
    if rng.random() < 0.5:
        a, b, sign, c = mini.pick(rng, "train", *DRILLED_SUMS)
        work, _ = mini.number(a, b, sign, c)
        tool = mini.TOOLS[rng.choice(list(mini.TOOLS))]
        said = mini.in_words(tool["numbers"], sign, a=a, b=b, c=c)
    else:
        t, sign, m = mini.pick(rng, "train", *mini.TIMES)
        work, _ = mini.time(t, sign, m)
        said = mini.in_words(rng.choice(mini.WORDS["times"]), sign, m=m, t=mini.clock(t))
    at_once = f"{said}: {work.split('=')[-1]}"
    return work if rng.random() < 0.5 else at_once


def alternate(conversations, drilled):
    """First drills alone, then one in eight."""
    for step in itertools.count():
        yield next(drilled if step < DRILLS or step % 8 == 0 else conversations)


def main(folder):
    rng, task, texts = random.Random(SEED), FunctionCalling(difficulty="mini"), []
    problems, chat = make_problems(rng, PROBLEMS), Chat(resolve("tiny-calls"))
    for problem in problems[:10_000]:
        texts.append(chat.render(task.messages(problem, True), task.tools(problem)))
        texts += [*conversation(problem, task, rng), task.reflect, task.retry]
    model, chat = fresh_model("tiny-calls", make_tokenizer(texts, PIECES))
    conversations = batches(problems, task, chat, rng, draw, ROWS)
    stream = alternate(conversations, drills(rng, chat, ROWS))
    # No mean: in batches of long conversations, those with faults, all would count less.
    warm_up(model, stream, STEPS, lambda losses, _, rows: losses.sum() / (TOKENS * rows))
    save(model, chat, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
