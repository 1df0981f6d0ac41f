"""Here because how the embedded model was made should be open to all.

    python -m extras.make_tiny NEW_FOLDER

The tokenizer has the pieces of corpus.py; what is trained are the assistant's turns.
"""

import math
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from extras.corpus import WORDS, CallsCorpus, CountdownCorpus, arithmetic, conversation
from model import Chat, Decoder, ModelConfig, read_json, resolve, save

STEPS, ROWS, SEED = 6500, 36, 0
TOKENS = 45  # about as many are trained in a row
ARITHMETIC_ROWS = 20_000  # of arithmetic alone, before all else
SHARES = {"countdown": 0.5, "calls": 0.4, "arithmetic": 0.1}  # of the rows behind them
# What is given and not trained: nothing, the failure, or also the first token of a drill.
GIVEN = {"nothing": 0.5, "failure": 0.125, "drill": 0.375}


def make_tokenizer(texts):
    """All pieces of the texts are tokens; a piece that was not seen is spelled in bytes."""
    split = pre_tokenizers.Split(Regex("|".join(WORDS["pieces"])), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces, seen = pre_tokenizers.Sequence([split, as_bytes]), Counter()
    for text in texts:
        for part in re.split(r"<\|im_start\|>|<\|im_end\|>", text):
            seen.update(piece for piece, _ in pieces.pre_tokenize_str(part))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *sorted(seen)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model = models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def fresh_model(tokenizer):
    """(model, chat): of tiny's shape and template, with this tokenizer."""
    folder = tempfile.mkdtemp()
    folder = Path(shutil.copytree(resolve("tiny"), folder, dirs_exist_ok=True))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = read_json(folder / "config.json")
    config["vocab_size"] = tokenizer.get_vocab_size()
    model = Decoder(ModelConfig.from_dict(config), context=1024)
    torch.manual_seed(SEED)
    for p in model.parameters():
        if p.dim() == 2:  # norms begin at 1
            nn.init.normal_(p, std=0.02)
    return model, Chat(folder)


def encoded_rows(corpora, chat, rng, arithmetic_rows):
    """Endless ids, and which of them are trained, both (T,): first arithmetic alone."""
    for i in count():
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if i < arithmetic_rows or kind == "arithmetic":
            ids = torch.tensor(chat.encode(arithmetic(rng)))
            yield ids, torch.ones_like(ids, dtype=torch.bool)
        else:
            yield encode(corpora[kind], chat, rng)


def encode(corpus, chat, rng):
    """The assistant's turns are trained, with their ends; what is given is not."""
    given = rng.choices(list(GIVEN), list(GIVEN.values()))[0]
    right = corpus.RIGHT if given == "nothing" else 0
    kinds = {corpus.DRILL: 1} if given == "drill" else corpus.KINDS
    problem, turns = conversation(corpus, rng, right, kinds)
    task, end = corpus.task, chat.encode("<|im_end|>")[0]
    pieces = [chat.prompt(task.messages(problem, True), task.tools(problem))]
    for text, instruction in zip(turns, [task.reflect, task.retry, ""]):
        pieces += [chat.encode(text) + [end], chat.glue(instruction, end)]
    ids, trained = [], []
    for i, piece in enumerate(pieces[: 2 * len(turns)]):
        ids += piece
        trained += [i % 2 == 1] * len(piece)
    trained = torch.tensor(trained)  # (T,)
    if given != "nothing":
        trained[: sum(map(len, pieces[:3])) + (given == "drill")] = False
    return torch.tensor(ids), trained


def batches(rows, size, rng):
    """Endless batches of rows of like length: ids, trained, both (B, T)."""
    while True:
        pool = sorted(islice(rows, 16 * size), key=lambda row: len(row[0]))
        groups = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(groups)
        for group in groups:
            # Few lengths: for each shape oneDNN makes a kernel of its own.
            short = -len(group[-1][0]) % 16 + 1  # one more: the last has no target
            ids, trained = zip(*group)
            ids, trained = pad_sequence(ids, True), pad_sequence(trained, True)
            yield F.pad(ids, (0, short)), F.pad(trained, (0, short))


def warm_up(model, chat, stream, steps):
    """Muon learns these small matrices in half of AdamW's steps."""
    # In a search all hangs on the verdicts, one token in twenty: they count eight times.
    verdicts = torch.tensor([chat.encode(word)[1] for word in ("? yes", "? no", "? no; ")])
    named = dict(model.named_parameters())
    others = [p for name, p in named.items() if p.dim() < 2 or "embed" in name]
    matrices = [p for name, p in named.items() if p.dim() == 2 and "embed" not in name]
    muon = torch.optim.Muon(matrices, weight_decay=0.01)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    fast = torch.cpu._is_avx512_bf16_supported()
    for step in tqdm(range(steps), "warm-up"):
        scale = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        ids, trained = next(stream)  # (B, T + 1)
        ids, targets, trained = ids[:, :-1], ids[:, 1:], trained[:, 1:]  # (B, T)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = model.logits(model(ids, positions))  # (B, T, V)
        losses = F.cross_entropy(logits.mT.float(), targets, reduction="none")  # (B, T)
        weights = trained * (1 + 7 * torch.isin(targets, verdicts))  # (B, T)
        # No mean: in batches of long rows, those with faults, all would count less.
        loss = (weights * losses).sum() / (TOKENS * len(ids))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in ((muon, 0.02), (adamw, 0.002)):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()


def main(folder):
    rng, chat, texts = random.Random(SEED), Chat(resolve("tiny")), []
    corpora = {"countdown": CountdownCorpus(), "calls": CallsCorpus()}
    for corpus in corpora.values():
        task = corpus.task
        for _ in range(10_000):
            problem, turns = conversation(corpus, rng, corpus.RIGHT, corpus.KINDS)
            texts.append(chat.render(task.messages(problem, True), task.tools(problem)))
            texts += [*turns, task.reflect, task.retry, arithmetic(rng)]
    model, chat = fresh_model(make_tokenizer(texts))
    rows = encoded_rows(corpora, chat, rng, ARITHMETIC_ROWS)
    warm_up(model, chat, batches(rows, ROWS, rng), STEPS)
    save(model, chat, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
