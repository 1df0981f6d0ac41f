"""Here because what the embedded model has learnt, and has not, should be open to all.

    python -m extras.make_tiny NEW_FOLDER

RRR can only reward what sometimes happens. So this warm-up teaches attempts (a guess with
its arithmetic), reflections (vague, a diagnosis or a search) and retries (what was found,
or another guess). The kind does not depend on the problem; all arithmetic is true.
"""

import math
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import Chat, Decoder, ModelConfig, read_json, resolve, save
from tasks.countdown import Countdown

MAX_NUMBER = 15
LARGEST = 150  # results of a step: few enough for the arithmetic to be learnt
RIGHT = 0.45  # attempts (and guessed retries) that are right
KINDS = {"vague": 0.45, "diagnosis": 0.3, "search": 0.25}
STEPS, SEED = 5000, 0
VAGUE = """I made a mistake and should be more careful.
I was careless. I will think before I answer.
My answer was wrong. I will try something else.
I should check my work next time.
I need to look at the problem again and do better.""".split("\n")
# One token each: a tag, a digit, an operator, up to four words.
PIECES = r"</?answer>|[0-9]|[-+*/()=]| ?(?:[A-Za-z]+ ?){1,4}[.,:;]*[ \n]?|[.,:;]+ ?"


def operations(a, b):
    """[(operator, result)] of a >= b: whole, positive and not too large."""
    results = [("+", a + b), ("-", a - b), ("*", a * b)]
    if b > 1 and a % b == 0:
        results.append(("/", a // b))
    return [pair for pair in results if 0 < pair[1] <= LARGEST]


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


def guess(nums, target, rng, right):
    """An attempt: some way. Of the wrong ones some use a number that was not given."""
    if rng.random() < 0.15 * (1 - right):
        return pick(ways([*nums[:2], rng.randint(1, MAX_NUMBER)]), target, rng, 0)
    return pick(ways(nums), target, rng, right)


def search(nums, target, rng):
    """Candidates until one makes the target or patience ends: the text, what it found."""
    left, lines = ways(nums), []
    for _ in range(min(len(left), rng.choice((1, 1, 2, 2, 3, 4, 6, 8)))):
        way = pick(left, target, rng, 0.5)  # half of them lead to the target
        left.remove(way)
        lines.append(f"{way[0]}={target}? {'yes' if way[2] == target else 'no'}")
        if way[2] == target:
            return "; ".join(lines), way
    return "; ".join(lines), None


def conversation(problem, task, rng, right=RIGHT, kinds=KINDS):
    """The assistant's turns for one problem: [attempt] or [attempt, reflection, retry]."""
    nums, target = problem["nums"], problem["target"]
    _, attempt, result = guess(nums, target, rng, right)
    if task.verify(problem, attempt).ok:
        return [attempt]
    retry = guess(nums, target, rng, RIGHT)
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "vague":
        reflection = rng.choice(VAGUE)
    elif kind == "diagnosis":
        how = "too low" if result < target else "too high"
        how = "with wrong numbers" if result == target else how
        reflection = f"I got {result}, not {target}: {how}."
    else:
        reflection, found = search(nums, target, rng)
        retry = found or retry
    return [attempt, reflection, retry[1]]


def draw(problem, task, rng):
    """The problem, its turns, and what is given: nothing (0), the failure (1), the failure
    and a search's first token (2)."""
    problem = problem | {"nums": rng.sample(problem["nums"], 3)}
    given = rng.randrange(3)
    kinds = {"search": 1} if given == 2 else KINDS
    return problem, conversation(problem, task, rng, 0 if given else RIGHT, kinds), given


def encode(problem, turns, given, task, chat, glues):
    """ids, and which are trained: the assistant's turns with their ends, given ones not."""
    pieces = [chat.prompt(task.messages(problem, True), task.tools(problem))]
    for text, glue in zip(turns, [*glues, []]):
        pieces += [chat.encode(text + "<|im_end|>"), glue]
    start = len(sum(pieces[:3], [])) + given - 1 if given else 0
    ids, trained = [], []
    for i, piece in enumerate(pieces[:-1]):
        for token in piece:
            trained.append(i % 2 == 1 and len(ids) >= start)
            ids.append(token)
    return torch.tensor(ids), torch.tensor(trained)


def batches(problems, task, chat, rng, draw=draw, rows=32):
    """Endless batches of conversations of like length: ids, trained, both (B, T)."""
    end = chat.encode("<|im_end|>")[0]
    glues = [chat.glue(instruction, end) for instruction in (task.reflect, task.retry)]
    while True:
        pool = []
        for problem in rng.choices(problems, k=rows * 16):
            pool.append(encode(*draw(problem, task, rng), task, chat, glues))
        pool.sort(key=lambda pair: len(pair[0]))
        groups = [pool[i : i + rows] for i in range(0, len(pool), rows)]
        rng.shuffle(groups)
        for group in groups:
            yield [pad_sequence(column, batch_first=True) for column in zip(*group)]


def make_tokenizer(texts, pieces):
    """All pieces of the texts are tokens; a piece that was not seen is spelled in bytes."""
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
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


def fresh_model(name, tokenizer):
    """(model, chat): of that embedded model's shape and template, with this tokenizer."""
    folder = Path(shutil.copytree(resolve(name), tempfile.mkdtemp(), dirs_exist_ok=True))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = read_json(folder / "config.json")
    config["vocab_size"] = tokenizer.get_vocab_size()
    model = Decoder(ModelConfig.from_dict(config), context=1024)
    torch.manual_seed(SEED)
    for p in model.parameters():
        if p.dim() == 2:  # norms begin at 1
            nn.init.normal_(p, std=0.02)
    return model, Chat(folder)


def mean_with_verdicts(chat):
    """The loss: a mean in which verdicts, on which all hangs, count eight times."""
    verdicts = torch.tensor([chat.encode(word)[1] for word in ("? yes", "? no", "? no; ")])

    def mean(losses, targets, rows):
        weights = 1 + 7 * torch.isin(targets, verdicts)  # (N,)
        return (weights * losses).sum() / weights.sum()

    return mean


def warm_up(model, stream, steps, reduce):
    """Next-token training. Muon learns these small matrices in half of AdamW's steps."""
    named = dict(model.named_parameters())
    others = [p for name, p in named.items() if p.dim() < 2 or "embed" in name]
    matrices = [p for name, p in named.items() if p.dim() == 2 and "embed" not in name]
    muon = torch.optim.Muon(matrices, weight_decay=0.01)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    for step in tqdm(range(steps), "warm-up"):
        scale = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        ids, trained = next(stream)  # (B, T)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        hidden = model(ids, positions)[:, :-1][trained[:, 1:]]  # (N, C)
        targets = ids[:, 1:][trained[:, 1:]]  # (N,)
        losses = F.cross_entropy(model.logits(hidden), targets, reduction="none")
        loss = reduce(losses, targets, len(ids))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in ((muon, 0.02), (adamw, 0.002)):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()


def main(folder):
    rng, task = random.Random(SEED), Countdown(difficulty=f"3x{MAX_NUMBER}")
    problems, texts = task.problems("train", 10**6, seed=0), []
    chat = Chat(resolve("tiny"))
    for problem in problems:
        asked = chat.render(task.messages(problem))
        texts += [asked, *conversation(problem, task, rng), task.reflect, task.retry]
    model, chat = fresh_model("tiny", make_tokenizer(texts, PIECES))
    stream = batches(problems, task, chat, rng)
    warm_up(model, stream, STEPS, mean_with_verdicts(chat))
    save(model, chat, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
