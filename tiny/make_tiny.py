"""Make the embedded default model.  python tiny/make_tiny.py --out NEW_FOLDER

RRR can only reward what sometimes happens, so this warm-up teaches the three turns, at mixed
quality that does not depend on the problem:

    attempt     a guess with its arithmetic, right or wrong
    reflection  vague: "I should check my work next time."
                a diagnosis: "I got 33, not 43: too low."
                a search: "12+3=15, 15+7=22=43 no; 12*3=36, 36+7=43=43 yes"
    retry       what the search found; after any other reflection, a guess like the attempt

Which kind of reflection comes, and how many candidates a search tries, is left to chance: that is
what training can choose. All arithmetic is spelled out and true, so that a check can be trusted.
No test problem is in the corpus.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Chat, Decoder, ModelConfig, save
from tasks.countdown import Countdown

DIFFICULTY = "3x12"
MAX_NUMBER = 12
RIGHT = 0.6  # attempts (and guessed retries) that are right
KINDS = {"vague": 0.4, "diagnosis": 0.3, "search": 0.3}
HIT = 0.5  # candidates of a search that lead to the target
VAGUE = [
    "I made a mistake and should be more careful.",
    "I was careless. I will think before I answer.",
    "My answer was wrong. I will try something else.",
    "I should check my work next time.",
    "I need to look at the problem again and do better.",
]
PIECES = r"</?answer>|[0-9]|[-+*/()=]| ?(?:[A-Za-z]+ ?){1,4}[.,:;]*[ \n]?|[.,:;]+ ?"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"  # around a prompt


def first_steps(nums):
    """Every first step a op b = m with the number c that is left over: [(text, m, c)]."""
    steps = {}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b = max(nums[i], nums[j]), min(nums[i], nums[j])
        c = nums[3 - i - j]
        results = [("+", a + b), ("*", a * b), ("-", a - b)]
        if b > 1 and a % b == 0:
            results.append(("/", a // b))
        for operator, m in results:
            if 0 < m < 120:
                steps[f"{a}{operator}{b}", m, c] = None
    return list(steps)


def second_step(m, c, target):
    """The operator that makes the target of m and c, or None."""
    if m + c == target:
        return "+"
    if m - c == target:
        return "-"
    if m * c == target:
        return "*"
    if c - m == target:
        return "reversed -"
    return None


def compose(text, operator, c):
    """The whole expression, with the parentheses that it needs."""
    if operator == "reversed -":
        return f"{c}-({text})"
    if operator == "*" and ("+" in text or "-" in text):
        return f"({text})*{c}"
    return f"{text}{operator}{c}"


def right_steps(steps, target):
    """(first step, operator) of every way to the target, in two steps."""
    good = [(step, second_step(*step[1:], target)) for step in steps]
    return [(step, operator) for step, operator in good if operator]


def any_step(steps, rng):
    """A first step and some operator for the second."""
    step = rng.choice(steps)
    _, m, c = step
    return step, rng.choice("++-*" if m >= c else ["+", "+", "*", "reversed -"])


def work(step, operator):
    """Both steps, spelled out, and their result."""
    text, m, c = step
    value = {"+": m + c, "-": m - c, "*": m * c, "reversed -": c - m}[operator]
    second = f"{c}-{m}" if operator == "reversed -" else f"{m}{operator}{c}"
    return f"{text}={m}, {second}={value}", value


def answer(step, operator):
    text, _, c = step
    return f"{work(step, operator)[0]} <answer>{compose(text, operator, c)}</answer>"


def guess(target, steps, rng, right):
    """An attempt: two steps and the answer."""
    good = right_steps(steps, target)
    if right and good:
        return answer(*rng.choice(good))
    (text, m, c), operator = any_step(steps, rng)
    if rng.random() < 0.15:
        c = rng.randint(1, min(m, MAX_NUMBER))  # not given, or the same one twice
    return answer((text, m, c), operator)


def search(target, steps, rng, checked):
    """Candidates until one makes the target or patience ends: the text, and what it found.
    checked: the target stands beside each result, which makes the verdict easy to trust."""
    good, lines, tried = right_steps(steps, target), [], []
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 5, 6))):
        candidate = rng.choice(good) if good and rng.random() < HIT else any_step(steps, rng)
        if candidate in tried:
            continue
        tried.append(candidate)
        line, value = work(*candidate)
        asked = f"={target}" if checked else ""
        lines.append(f"{line}{asked} {'yes' if value == target else 'no'}")
        if value == target:
            return "; ".join(lines), candidate
    return "; ".join(lines), None


def conversation(problem, task, rng, right=RIGHT, kinds=KINDS, checked=False):
    """The assistant's turns for one problem: [attempt] or [attempt, reflection, retry]."""
    nums, target = problem["nums"], problem["target"]
    steps = first_steps(nums)
    attempt = guess(target, steps, rng, rng.random() < right)
    if task.verify(problem, attempt).ok:
        return [attempt]
    retry = guess(target, steps, rng, rng.random() < RIGHT)
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "vague":
        reflection = rng.choice(VAGUE)
    elif kind == "diagnosis":
        result = attempt.split(" <")[0].split("=")[-1]
        how = "too low" if int(result) < target else "too high"
        how = how if int(result) != target else "with wrong numbers"
        reflection = f"I got {result}, not {target}: {how}."
    else:
        reflection, found = search(target, steps, rng, checked)
        if found:
            retry = answer(*found)
    return [attempt, reflection, retry]


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
    end = tokenizer.token_to_id("<|im_end|>")
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
        "generation_config.json": {"eos_token_id": end, "pad_token_id": 0},
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "eos_token_id": end,
            "torch_dtype": "float32",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def encode(problem, turns, task, chat, glues, given):
    """ids, and for each id whether it is trained: those of the assistant's turns, with their ends,
    but for the first `given`."""
    ids = chat.encode(HEAD + task.messages(problem)[0]["content"] + TAIL)
    trained = [False] * len(ids)
    for i, text in enumerate(turns):
        answer = chat.encode(text + "<|im_end|>")
        glue = glues[i] if i + 1 < len(turns) else []
        skipped = len(answer) if i == 0 and given else i == 1 and given > 1
        ids += answer + glue
        trained += [False] * skipped + [True] * (len(answer) - skipped) + [False] * len(glue)
    return ids, trained


def batches(problems, task, chat, rng, checked, rows=32):
    """Endless batches of conversations of like length: ids (B, T), trained (B, T), right-padded.

    Some conversations are about a failure that is given (1), not learnt: reflections and retries
    need the practice, and the share of right attempts stays what it is. In the second course some
    are drills of the search, its first token given as well (2): so does the share of each kind."""
    end = chat.encode("<|im_end|>")[0]
    glues = [chat.glue(instruction, end) for instruction in (task.reflect, task.retry)]
    while True:
        pool = []
        for problem in rng.choices(problems, k=rows * 16):
            problem = problem | {"nums": rng.sample(problem["nums"], 3)}
            lot = rng.random()
            given = int(lot < (2 / 3 if checked else 1 / 2)) + int(checked and lot < 1 / 3)
            kinds = {"search": 1} if given == 2 else KINDS
            turns = conversation(problem, task, rng, 0 if given else RIGHT, kinds, checked)
            pool.append(encode(problem, turns, task, chat, glues, given))
        pool.sort(key=lambda pair: len(pair[0]))
        groups = [pool[i : i + rows] for i in range(0, len(pool), rows)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in group])  # (B, T)
            trained = torch.tensor([row + [False] * (longest - len(row)) for _, row in group])
            yield ids, trained


def course(model, stream, steps, muon_lr):
    """Next-token training on a stream of batches, with a warm-up and a cosine. Muon learns these
    small matrices in half the steps that AdamW needs; embedding and norms are AdamW's."""
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named.items() if name not in matrices]
    muon = torch.optim.Muon([named[name] for name in matrices], weight_decay=0.01)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    progress = tqdm(range(steps), desc="warm-up")
    for step in progress:
        scale = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        muon.param_groups[0]["lr"] = muon_lr * scale
        adamw.param_groups[0]["lr"] = muon_lr / 10 * scale
        ids, trained = next(stream)
        B, T = ids.shape
        positions = torch.arange(T).expand(B, T)
        hidden = model(ids, positions)[:, :-1][trained[:, 1:]]  # (N, C): the next id is trained
        loss = cross_entropy(model.logits(hidden), ids[:, 1:][trained[:, 1:]])
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
    task = Countdown(difficulty=DIFFICULTY)
    problems = task.problems("train", 10**6, seed=0)
    build = Path(tempfile.mkdtemp())
    texts = []
    for problem in problems:
        turns = conversation(problem, task, rng) + [task.reflect, task.retry]
        texts += [HEAD + task.messages(problem)[0]["content"] + TAIL, *turns]
    make_tokenizer(texts, build)
    chat = Chat(build)
    model = Decoder(ModelConfig.from_dict(json.loads((build / "config.json").read_text())))
    model.set_context(1024)  # of the conversations here
    example = task.messages(problems[0])
    assert chat.prompt(example) == chat.encode(HEAD + example[0]["content"] + TAIL)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(problems):,} problems")

    course(model, batches(problems, task, chat, rng, False), 4500, muon_lr=0.02)
    rng = random.Random(args.seed + 1)
    course(model, batches(problems, task, chat, rng, True), 1600, muon_lr=0.01)
    save(model, chat, args.out)
    print(f"saved to {args.out}; now: python eval.py --model {args.out}")


if __name__ == "__main__":
    main()
