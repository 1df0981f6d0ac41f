"""Here because what the second embedded model has learnt should be open to all, too.

    python -m extras.make_tiny_calls NEW_FOLDER

Function calling of difficulty mini. Like make_tiny.py it teaches attempts, reflections
(vague, blaming one parameter, or parameter by parameter) and retries (what was found, the
rest guessed), with faults on purpose. And drills: behind a failure that is given, all is
worked out and the retry is right. No reflection depends on what was wrong.
"""

import json
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from extras.make_calls import as_offered
from extras.make_mini import TOOLS, make_problem
from extras.make_tiny import VAGUE, batches, initialise, warm_up
from model import Chat, Decoder, ModelConfig, read_json, resolve, save
from tasks.function_calling import FunctionCalling

RIGHT = 0.35  # attempts (and what a retry has to guess) that are right
KINDS = {"vague": 0.4, "blame": 0.3, "parameters": 0.3}
GIVEN = {0: 1, 1: 0.5, 2: 2}  # weights: nothing, a failure, a drill
FAULTS = {"value": 0.78, "as text": 0.08, "other tool": 0.08, "left out": 0.06}
PROBLEMS, STEPS, ROWS, SEED = 60_000, 2800, 16, 0
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
    call = {"name": name, "arguments": arguments}
    unknown = [key for key in arguments if key not in known]
    if not unknown or rng.random() < right:
        return call
    fault = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
    if fault == "other tool" and not known:
        return with_other_tool(problem, call)
    hard = [key for key in unknown if "=" in problem["work"][key]]
    key = rng.choice(hard if hard and rng.random() < 0.85 else unknown)
    if fault == "as text" and isinstance(arguments[key], int):
        arguments[key] = str(arguments[key])
    elif fault != "left out":
        arguments[key] = rng.choice(problem["near"][key])
    if arguments == problem["values"] or fault == "left out":
        del arguments[key]
    return call


def with_other_tool(problem, call):
    """The same values, as far as they fit, for the parameters of the other tool."""
    [other] = {tool["function"]["name"] for tool in problem["tools"]} - {call["name"]}
    values = {}  # by kind; a place may stand for a person, and the other way round
    for key, spec in TOOLS[call["name"]]["parameters"].items():
        kind = spec["values"].replace("place", "person")
        values[kind] = problem["values"][key]
    arguments = {}
    for key, spec in TOOLS[other]["parameters"].items():
        arguments[key] = values[spec["values"].replace("place", "person")]
    return {"name": other, "arguments": arguments}


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
        problem, work, near = make_problem(rng, "train")
        values = {k: v for k, [v] in problem["answers"][0]["arguments"].items()}
        tools = [as_offered(TOOLS[name]) for name in problem["tools"]]
        problem |= {"tools": tools, "values": values, "work": work, "near": near}
        problems.append(problem)
    return problems


def make_tokenizer(texts):
    """All pieces of the texts are tokens; a piece that was not seen is spelled in bytes."""
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces, count = pre_tokenizers.Sequence([split, as_bytes]), Counter()
    for text in texts:
        for part in re.split(r"<\|im_start\|>|<\|im_end\|>", text):
            count.update(piece for piece, _ in pieces.pre_tokenize_str(part))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *sorted(count)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model = models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def main(folder):
    rng, task, texts = random.Random(SEED), FunctionCalling(difficulty="mini"), []
    problems = make_problems(rng, PROBLEMS)
    build = Path(
        shutil.copytree(resolve("tiny-calls"), tempfile.mkdtemp(), dirs_exist_ok=True)
    )
    chat = Chat(build)
    for problem in problems[:10_000]:
        texts.append(chat.render(task.messages(problem, True), task.tools(problem)))
        texts += [*conversation(problem, task, rng), task.reflect, task.retry]
    tokenizer = make_tokenizer(texts)
    tokenizer.save(str(build / "tokenizer.json"))
    chat = Chat(build)
    config = read_json(build / "config.json") | {"vocab_size": tokenizer.get_vocab_size()}
    model = Decoder(ModelConfig.from_dict(config), context=1024)
    initialise(model)
    stream = batches(problems, task, chat, rng, draw, ROWS)
    # No mean: in batches of long conversations, those with faults, all would count less.
    warm_up(model, stream, STEPS, lambda losses, _, rows: losses.sum() / (TOKENS * rows))
    save(model, chat, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
