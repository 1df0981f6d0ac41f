"""Here for a lesson: one failure of tiny on its way to a gradient, worked out by hand.

    python -m extras.trace [--seed 1] [any option of train.py]

No batches, no shared prefix: each sibling is one plain pass. A test compares with rrr.py.
"""

import sys

import torch

import rrr
from config import open_model, parse, plain_errors
from model import check
from train import sample_step


def find_group(rollout, config) -> list[rrr.Episode]:
    """The reflections on the first failure whose retries did not all end alike."""
    episodes, _ = sample_step(0, rollout, config, None)
    able = [group for group in rrr.by_group(episodes) if rrr.has_signal(group)]
    check(able, "no failure has reflections of different rewards: try another --seed.")
    return able[0]


def trace(model, group, temperature) -> dict:
    """All figures, by hand. The gradient is left in the weights."""
    rewards = [e.reward for e in group]
    mean = sum(rewards) / len(rewards)
    deviation = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    weight = 1 / sum(len(e.reflection.ids) for e in group)  # --loss_norm token
    siblings = []
    model.zero_grad()
    for e in group:
        advantage = (e.reward - mean) / (deviation + 1e-4)
        before = e.attempt.prompt_ids + e.attempt.ids + e.reflection.prompt_ids
        ids = before + e.reflection.ids
        mask = [False] * len(before) + [True] * len(e.reflection.ids)
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])  # (1, T, C)
        logits = model.logits(hidden)[0, :-1]  # (T - 1, V): each predicts the next id
        logits.retain_grad()
        logps = (logits / temperature).log_softmax(-1)  # (T - 1, V)
        logps = logps[torch.arange(len(ids) - 1), ids[1:]]  # (T - 1,)
        trained = logps[torch.tensor(mask[1:])]  # (n,)
        ratio = torch.exp(trained - trained.detach())  # 1: the weights have not moved
        loss = -(weight * ratio * advantage).sum()
        loss.backward()
        own = {"ids": ids, "mask": mask, "logps": logps.detach(), "grads": logits.grad}
        siblings.append(own | {"advantage": advantage, "loss": loss.item()})
    return {"mean": mean, "deviation": deviation, "weight": weight, "siblings": siblings}


def show(figures, group, chat):
    print(f"\nproblem     {group[0].problem['key']}\nattempt     {group[0].attempt.text}")
    print(f"\nmean reward {figures['mean']:.3f}, deviation {figures['deviation']:.3f}")
    for e, own in zip(group, figures["siblings"]):
        told = f"reward {e.reward:.0f}, advantage {own['advantage']:+.3f}"
        print(f"{told}: {e.reflection.text!r}")
    best = max(figures["siblings"], key=lambda own: own["advantage"])
    ids, mask, start = best["ids"], best["mask"], best["mask"].index(True)
    print(f"\nThe first preferred one, {len(ids)} ids, {sum(mask)} trained: position, id,")
    print("mask, logp; how descent moves its logit, and all others together")
    for t in range(start - 3, min(start + 5, len(ids))):
        text = chat.tokenizer.decode([ids[t]], skip_special_tokens=False)
        grad, every = best["grads"][t - 1, ids[t]], best["grads"][t - 1].sum()
        logp = f"{best['logps'][t - 1]:9.4f}  {-grad:+.5f} {grad - every:+.5f}"
        print(f"{t:5} {ids[t]:5} {text!r:24} {mask[t]:d} {logp}")
    loss = sum(own["loss"] for own in figures["siblings"])
    print(f"\nweight of a trained token {figures['weight']:.6f}, loss of all {loss:+.6f}")


def main(argv):
    with plain_errors("extras.trace"):
        argv = ["--device", "cpu", "--group_size", "4", *argv]
        config, _ = parse(argv, __doc__, "-m extras.trace")
        model, chat, task = open_model(config)
        group = find_group(rrr.Rollout(model, chat, task, config), config)
        show(trace(model, group, config.temperature), group, chat)


if __name__ == "__main__":
    main(sys.argv[1:])
