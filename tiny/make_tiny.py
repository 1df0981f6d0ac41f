"""Make the embedded default model.  python tiny/make_tiny.py --out NEW_FOLDER

RRR can only reward what sometimes happens, so this warm-up teaches the three turns, at mixed
quality that does not depend on the problem:

    attempt     a guess with its arithmetic, right or wrong
    reflection  vague: "I should check my work next time."
                a diagnosis: "I got 33, not 43: too low."
                a search: "12+3=15, 15+7=22=43? no; 12*3=36, 36+7=43=43? yes"
    retry       what the search found; after any other reflection, a guess like the attempt

Which kind of reflection comes, and how many candidates a search tries, is left to chance: that is
what training can choose. All arithmetic is spelled out and true, so that a check can be trusted.
No test problem is in the corpus.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm

HERE = Path(__file__).resolve().parent  # config.json and its like beside are written by hand
sys.path.insert(0, str(HERE.parent))

from model import Chat, Decoder, ModelConfig, save
from tasks.countdown import Countdown

MAX_NUMBER = 15
LARGEST = 150  # results of a step: few enough for the arithmetic to be learnt
RIGHT = 0.6  # attempts (and guessed retries) that are right
KINDS = {"vague": 0.4, "diagnosis": 0.3, "search": 0.3}
STEPS = 7000
VERDICT = 8  # times that a verdict counts in the loss: one token a candidate, and all hangs on it
HIT = 0.5  # candidates of a search that lead to the target
VAGUE = [
    "I made a mistake and should be more careful.",
    "I was careless. I will think before I answer.",
    "My answer was wrong. I will try something else.",
    "I should check my work next time.",
    "I need to look at the problem again and do better.",
]
PIECES = r"</?answer>|[0-9]|[-+*/()=]| ?(?:[A-Za-z]+ ?){1,4}[.,:;]*[ \n]?|[.,:;]+ ?"
HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"  # around a prompt


def operations(a, b):
    """(operator, result) of a and b, a >= b: whole, positive and not too large."""
    results = [("+", a + b), ("-", a - b), ("*", a * b)]
    if b > 1 and a % b == 0:
        results.append(("/", a // b))
    return [(operator, result) for operator, result in results if 0 < result <= LARGEST]


def ways(nums):
    """Every way to use three numbers in two steps: [(working, expression, result)]."""
    found = {}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b, c = max(nums[i], nums[j]), min(nums[i], nums[j]), nums[3 - i - j]
        for first, m in operations(a, b):
            for second, result in operations(max(m, c), min(m, c)):
                inner = f"{a}{first}{b}"
                if second in "*/" and first in "+-" or second in "-/" and m < c:
                    inner = f"({inner})"
                step = f"{m}{second}{c}" if m >= c else f"{c}{second}{m}"
                whole = f"{inner}{second}{c}" if m >= c else f"{c}{second}{inner}"
                found[f"{a}{first}{b}={m}, {step}={result}", whole, result] = None
    return list(found)


def pick(some, target, rng, share):
    """One of the ways; a right one, if there is any, in this share of cases."""
    right = [way for way in some if way[2] == target]
    return rng.choice(right if right and rng.random() < share else some)


def answer(way):
    working, expression, _ = way
    return f"{working} <answer>{expression}</answer>"


def guess(nums, target, rng, right):
    """An attempt: a way and its answer. Some of the wrong ones use a number that was not given."""
    slip = rng.random() < 0.15 * (1 - right)
    nums = [*nums[:2], rng.randint(1, MAX_NUMBER)] if slip else nums
    return pick(ways(nums), target, rng, 0 if slip else right)


def search(nums, target, rng):
    """Candidates until one makes the target or patience ends: the text, and what it found. The
    target stands beside each result, which makes the verdict easy to trust."""
    some, lines = ways(nums), []
    for _ in range(min(len(some), rng.choice((1, 1, 2, 2, 3, 4, 6, 8)))):
        way = pick(some, target, rng, HIT)
        some.remove(way)
        lines.append(f"{way[0]}={target}? {'yes' if way[2] == target else 'no'}")
        if way[2] == target:
            return "; ".join(lines), way
    return "; ".join(lines), None


def conversation(problem, task, rng, right=RIGHT, kinds=KINDS):
    """The assistant's turns for one problem: [attempt] or [attempt, reflection, retry]."""
    nums, target = problem["nums"], problem["target"]
    attempt = guess(nums, target, rng, right)
    if task.verify(problem, answer(attempt)).ok:
        return [answer(attempt)]
    retry = guess(nums, target, rng, RIGHT)
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    result = attempt[2]
    if kind == "vague":
        reflection = rng.choice(VAGUE)
    elif kind == "diagnosis":
        how = "too low" if result < target else "too high"
        how = "with wrong numbers" if result == target else how
        reflection = f"I got {result}, not {target}: {how}."
    else:
        reflection, found = search(nums, target, rng)
        retry = found or retry
    return [answer(attempt), reflection, answer(retry)]


def make_tokenizer(texts, folder):
    """Byte-level BPE in which digits, operators and tags stand alone, and up to four words may make
    one token: prompts are short, and arithmetic is spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(HERE / name, folder)
    return tokenizer.get_vocab_size()


def encode(problem, turns, task, chat, glues, given):
    """ids, and for each id whether it is trained: those of the assistant's turns, with their ends.
    given 1: but for the attempt. 2: and for the reflection's first token."""
    ids = chat.encode(HEAD + task.messages(problem)[0]["content"] + TAIL)
    trained = [False] * len(ids)
    for i, text in enumerate(turns):
        written = chat.encode(text + "<|im_end|>")
        glue = glues[i] if i + 1 < len(turns) else []
        skipped = len(written) if i == 0 and given else int(i == 1 and given == 2)
        ids += written + glue
        trained += [False] * skipped + [True] * (len(written) - skipped) + [False] * len(glue)
    return ids, trained


def batches(problems, task, chat, rng, rows=32):
    """Endless batches of conversations of like length: ids (B, T), trained (B, T), right-padded.

    A third of the conversations are about a failure that is given (1), not learnt: reflections and
    retries need the practice, and the share of right attempts stays what it is. Another third are
    drills of the search, whose first token is given as well (2): the share of each kind stays."""
    end = chat.encode("<|im_end|>")[0]
    glues = [chat.glue(instruction, end) for instruction in (task.reflect, task.retry)]
    while True:
        pool = []
        for problem in rng.choices(problems, k=rows * 16):
            problem = problem | {"nums": rng.sample(problem["nums"], 3)}
            given = rng.randrange(3)
            kinds = {"search": 1} if given == 2 else KINDS
            turns = conversation(problem, task, rng, 0 if given else RIGHT, kinds)
            pool.append(encode(problem, turns, task, chat, glues, given))
        pool.sort(key=lambda pair: len(pair[0]))
        groups = [pool[i : i + rows] for i in range(0, len(pool), rows)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in group])  # (B, T)
            trained = torch.tensor([row + [False] * (longest - len(row)) for _, row in group])
            yield ids, trained


def warm_up(model, chat, stream, steps, muon_lr=0.02):
    """Next-token training on a stream of batches, with a warm-up and a cosine. Muon learns these
    small matrices in half the steps that AdamW needs; embedding and norms are AdamW's."""
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named.items() if name not in matrices]
    muon = torch.optim.Muon([named[name] for name in matrices], weight_decay=0.01)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    verdicts = torch.tensor([chat.encode(f"?{word}")[1] for word in (" yes", " no", " no; ")])
    progress = tqdm(range(steps), desc="warm-up")
    for step in progress:
        scale = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        muon.param_groups[0]["lr"] = muon_lr * scale
        adamw.param_groups[0]["lr"] = muon_lr / 10 * scale
        ids, trained = next(stream)
        B, T = ids.shape
        positions = torch.arange(T).expand(B, T)
        hidden = model(ids, positions)[:, :-1][trained[:, 1:]]  # (N, C): the next id is trained
        targets = ids[:, 1:][trained[:, 1:]]  # (N,)
        weights = 1 + (VERDICT - 1) * torch.isin(targets, verdicts)  # (N,)
        losses = cross_entropy(model.logits(hidden), targets, reduction="none")  # (N,)
        loss = (weights * losses).sum() / weights.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="a new folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    task = Countdown(difficulty=f"3x{MAX_NUMBER}")
    problems = task.problems("train", 10**6, seed=0)
    build = Path(tempfile.mkdtemp())
    texts = []
    for problem in problems:
        turns = conversation(problem, task, rng) + [task.reflect, task.retry]
        texts += [HEAD + task.messages(problem)[0]["content"] + TAIL, *turns]
    vocab_size = make_tokenizer(texts, build)
    chat = Chat(build)
    config = json.loads((build / "config.json").read_text()) | {"vocab_size": vocab_size}
    model = Decoder(ModelConfig.from_dict(config))
    model.set_context(1024)  # of the conversations here
    example = task.messages(problems[0])
    assert chat.prompt(example) == chat.encode(HEAD + example[0]["content"] + TAIL)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(problems):,} problems")

    warm_up(model, chat, batches(problems, task, chat, rng), STEPS)
    save(model, chat, args.out)
    print(f"saved to {args.out}; now: python eval.py --model {args.out}")


if __name__ == "__main__":
    main()
