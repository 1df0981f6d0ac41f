"""The batch, its mask, the shared-prefix pass and the loss: against plain loops and float64."""

import copy
import math
import random

import pytest
import torch

import rrr
from conftest import close, random_model
from rrr import Episode, Turn, assign_advantages, grpo_loss, make_batches, spans, trained_logps


def turn(rng, prompt, n):
    ids = [rng.randrange(97) for _ in range(n)]
    return Turn(
        [rng.randrange(97) for _ in range(prompt)], ids, [-rng.random() for _ in ids], "", True
    )


def make_episodes(groups=3, G=4, seed=0, rewards=None):
    """Uneven in everything: prefixes, reflections, retries."""
    rng = random.Random(seed)
    episodes = []
    for group in range(groups):
        attempt, glue = turn(rng, rng.randint(5, 30), rng.randint(1, 15)), rng.randint(2, 5)
        prompt_ids = turn(rng, glue, 0).prompt_ids
        for g in range(G):
            reflection, retry = turn(rng, 0, rng.randint(1, 20)), turn(rng, 3, rng.randint(1, 9))
            reflection.prompt_ids = prompt_ids
            reward = rewards[group][g] if rewards else float(g % 2 if group % 2 else g % 3 == 0)
            episodes.append(Episode({}, group, attempt, {}, reflection, [retry], [{}], reward))
    assign_advantages(episodes)
    return episodes


def plain_logps(model, episode, train_on, temperature=1.0):
    """One full, uncached, unshared, unpadded pass of one episode: its trained tokens' log-probs."""
    turns = [episode.attempt, episode.reflection, *episode.retries]
    ids, trained = [], []
    for i, t in enumerate(turns):
        ids += t.prompt_ids + t.ids
        trained += [False] * len(t.prompt_ids) + [i in rrr.TRAINED_TURNS[train_on]] * len(t.ids)
    hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
    logps = torch.log_softmax(model.logits(hidden[:-1]) / temperature, -1)
    return logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][torch.tensor(trained[1:])]


def total_loss(model, batches, temperature=1.0, **more):
    loss = 0.0
    for batch in batches:
        logps = trained_logps(model, batch, temperature)
        loss = loss + grpo_loss(logps, logps.detach(), batch.advantages, batch.weights, **more)[0]
    return loss


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(what, a, b):
    for name in a:
        scale = b[name].abs().max().clamp(min=1e-6)
        close(what, (a[name] - b[name]).abs().max() / scale, 1e-5)


def test_the_trained_tokens_are_exactly_the_reflections():
    """Batch's own example. Prevents: a mask that is shifted by one, a lost stop token."""
    a, b, c, x, y, stop, z = range(1, 8)
    attempt = Turn([a], [b], [0.0], "", True)
    retry = Turn([9, 9], [9], [0.0], "", True)
    episodes = [
        Episode(
            {},
            0,
            attempt,
            {},
            Turn([c], [x, y, stop], [-1.0, -2.0, -3.0], "", True),
            [retry],
            [{}],
            1.0,
        ),
        Episode(
            {}, 0, attempt, {}, Turn([c], [z, stop], [-4.0, -5.0], "", True), [retry], [{}], 0.0
        ),
    ]
    assign_advantages(episodes)
    [batch] = make_batches(episodes, "reflection", "token", 0, 100)
    assert batch.ids.tolist() == [[a, b, c, x, y, c, z]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.targets.tolist() == [[0, 0, x, y, stop, z, stop]]
    assert batch.mask.tolist() == [[False, False, True, True, True, True, True]]
    assert batch.sampled_logps.tolist() == [[0, 0, -1, -2, -3, -4, -5]]
    assert torch.allclose(batch.weights, batch.mask / 5)
    expected = torch.tensor([0.0, 0, 1, 1, 1, -1, -1])
    assert torch.allclose(batch.advantages[0], expected, atol=1e-3)


def test_padding_is_no_segment_and_trains_nothing():
    """Prevents: padding that is trained, or that is taken for a piece of the prefix (0)."""
    [batch] = make_batches(make_episodes(groups=6), "everything", "token", 0, 10**6)
    padding = batch.segments == -1
    assert padding.any() and not padding.all(1).any()
    assert (padding[:, 1:] >= padding[:, :-1]).all()  # on the right
    assert not batch.mask[padding].any() and not batch.weights[padding].any()


def test_nothing_outside_the_reflections_meets_the_head(small):
    """Prevents: training the attempt, the instructions or the retry. The head sees one position for
    each reflection token, and changing every retry changes neither loss nor gradient by a bit."""
    episodes = make_episodes()
    seen = []
    logits, small.logits = small.logits, lambda hidden: seen.append(len(hidden)) or logits(hidden)
    batches = make_batches(episodes, "reflection", "token", 0, 10**6)
    before = gradient(small, total_loss(small, batches))
    trained = [e for e in episodes if len({o.reward for o in episodes if o.group == e.group}) > 1]
    assert max(seen) == sum(len(e.reflection.ids) for e in trained)
    for episode in episodes:
        episode.retries[0].ids = [1] * 7
    after = gradient(
        small, total_loss(small, make_batches(episodes, "reflection", "token", 0, 10**6))
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_gradient_at_untrained_positions_is_exactly_zero(small):
    """Log-probs outside the mask get gradient 0, those inside
    exactly weight x advantage. Prevents: a mask that leaks into glue, padding or prefix."""
    batches = make_batches(make_episodes(), "reflection", "token", 0, 10**6)
    for batch in batches:
        logps = trained_logps(small, batch, 1.0).detach().requires_grad_()
        loss, _ = grpo_loss(logps, logps.detach(), batch.advantages, batch.weights)
        loss.backward()
        assert (logps.grad[~batch.mask] == 0).all()
        expected = -(batch.weights * batch.advantages)
        assert torch.allclose(logps.grad, expected, atol=1e-8) and (expected[batch.mask] != 0).all()


@pytest.mark.parametrize("train_on", ["reflection", "reflection+retry", "everything"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_shared_prefix_pass_equals_the_plain_pass(train_on, checkpointing, monkeypatch):
    """Prevents: a reflection that sees its siblings or the prefix's padding, wrong positions; a
    gradient of the head, which is written by hand, that differs from autograd's; lost chunks."""
    monkeypatch.setattr(rrr, "HEAD_CHUNK", 7)
    model = random_model()
    episodes = make_episodes(seed=1)
    batches = make_batches(episodes, train_on, "token", 0, 10**6)
    assert len(batches) == 1
    model.checkpointing = checkpointing
    shared = gradient(model, total_loss(model, batches, temperature=0.8))
    model.checkpointing = False
    plain = [plain_logps(model, e, train_on, 0.8) for e in episodes]
    tokens = sum(map(len, plain))
    loss = (
        -sum((torch.exp(p - p.detach()) * e.advantage).sum() for p, e in zip(plain, episodes))
        / tokens
    )
    assert_same("gradient, shared prefix and plain", shared, gradient(model, loss))
    for batch in batches:  # the log-probs too, token for token
        got = trained_logps(model, batch, 0.8)[batch.mask]
        assert torch.allclose(torch.sort(got)[0], torch.sort(torch.cat(plain))[0], atol=1e-4)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_in_bfloat16_the_gradient_points_where_it_does_in_float32(precision, monkeypatch):
    """Prevents: a gradient of the head in the wrong dtype; products of the head that round their
    result to bfloat16, at the precision that eval.py asks for."""
    monkeypatch.setattr(rrr, "HEAD_CHUNK", 50)
    batches = make_batches(make_episodes(seed=1), "reflection", "token", 0, 10**6)
    coarse = random_model().bfloat16()
    exact = copy.deepcopy(coarse).float()  # the same weights
    flat = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for model in (coarse, exact):
            grads = gradient(model, total_loss(model, batches, temperature=0.8))
            flat.append(torch.cat([grad.flatten().double() for grad in grads.values()]))
        hidden = torch.randn(64, 32).bfloat16()
        with torch.no_grad():
            logits = coarse.logits(hidden)
    finally:
        torch.set_float32_matmul_precision(before)
    angle = 1 - torch.cosine_similarity(*flat, dim=0)
    close("gradient, bfloat16 and float32, 1 - cosine", angle, 0.02)
    close("its length", abs(flat[0].norm() / flat[1].norm() - 1), 0.05)
    true = hidden.double() @ coarse.head.weight.double().t()
    close("logits of bfloat16 weights", (logits - true).abs().max() / true.abs().max(), 1e-5)


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_the_gradient(small, norm):
    """Prevents: a denominator per micro-batch."""
    episodes = make_episodes(groups=6)
    whole = make_batches(episodes, "reflection", norm, 20, 10**6)
    parts = make_batches(episodes, "reflection", norm, 20, 1)
    assert len(whole) == 1 and len(parts) == 6
    cut, uncut = (gradient(small, total_loss(small, batches)) for batches in (parts, whole))
    assert_same("gradient, micro-batches and one batch", cut, uncut)


def test_the_order_of_episodes_does_not_change_the_gradient(small):
    episodes = make_episodes(groups=4)
    shuffled = random.Random(0).sample(episodes, len(episodes))
    a, b = (make_batches(some, "reflection", "token", 0, 10**6) for some in (episodes, shuffled))
    a, b = (gradient(small, total_loss(small, batches)) for batches in (a, b))
    assert_same("gradient, another order of episodes", a, b)


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
def test_the_denominators(norm):
    episodes = make_episodes(groups=2, G=4)
    [batch] = make_batches(episodes, "reflection", norm, 20, 10**6)
    own = [batch.segments == g for g in range(1, 5)]  # by episode of each group
    sums = torch.stack([(batch.weights * some).sum(1) for some in own])  # (G, N)
    sizes = torch.stack([(batch.mask * some).sum(1) for some in own])
    if norm == "token":
        assert torch.allclose(sums, sizes / sizes.sum())
    if norm == "sequence":
        assert torch.allclose(sums, torch.full_like(sums, 1 / 8))
    if norm == "constant":
        assert torch.allclose(sums, sizes / (20 * 8))


def test_groups_without_signal_are_left_out():
    episodes = make_episodes(groups=3, rewards=[[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    [batch] = make_batches(episodes, "reflection", "token", 0, 10**6)
    assert len(batch.ids) == 1 and math.isclose(batch.weights.sum().item(), 1, rel_tol=1e-5)
    assert make_batches(episodes[:8], "reflection", "token", 0, 10**6) == []


def test_the_token_budget_is_kept():
    episodes = make_episodes(groups=8, seed=3)
    for budget in (1, 150, 300, 10**6):
        batches = make_batches(episodes, "reflection", "token", 0, budget)
        assert sum(len(batch.ids) for batch in batches) == 8
        for batch in batches:
            assert len(batch.ids) == 1 or batch.ids.numel() <= budget


def test_advantages():
    """Prevents: groups found by comparing prompts, a division by zero, the reward overwritten."""
    episodes = make_episodes(groups=2, rewards=[[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]])
    std = math.sqrt(0.25 * 0.75)
    assert [e.advantage for e in episodes[:4]] == pytest.approx(
        [0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3
    )
    assert [e.advantage for e in episodes[4:]] == [0] * 4
    assert [e.reward for e in episodes[:4]] == [1, 0, 0, 0]
    assign_advantages(episodes, scale=False)
    assert [e.advantage for e in episodes[:4]] == [0.75, -0.25, -0.25, -0.25]


def test_the_loss_equals_a_slow_loop_of_the_formulas_in_float64():
    """One token at a time. Prevents: a sign, the clip on the wrong side, KL the wrong way."""
    torch.manual_seed(0)
    shape = (2, 3, 5)
    logps, old, ref = (-torch.rand(shape, dtype=torch.float64) * 3 for _ in range(3))
    old, ref = logps + (old - old.mean()) * 0.3, logps + (ref - ref.mean()) * 0.3
    advantages = torch.randn(2, 3, 1, dtype=torch.float64)
    weights = torch.rand(shape, dtype=torch.float64) * (torch.rand(shape) > 0.3)
    beta, low, high = 0.07, 0.2, 0.28
    expected, clips = 0.0, 0
    for n in range(2):
        for g in range(3):
            for t in range(5):
                lp, lo, lr = (x[n, g, t].item() for x in (logps, old, ref))
                rho, a = math.exp(lp - lo), advantages[n, g, 0].item()
                clipped = min(max(rho, 1 - low), 1 + high)
                kl = math.exp(lr - lp) - (lr - lp) - 1
                expected += weights[n, g, t].item() * (-min(rho * a, clipped * a) + beta * kl)
                clips += clipped * a < rho * a and weights[n, g, t].item() > 0
    loss, seen = grpo_loss(logps, old, advantages, weights, ref, beta, low, high)
    close("loss, vectors and a float64 loop", abs(loss.item() / expected - 1), 1e-12)
    assert clips > 2 and seen["clip_fraction"].sum() == clips


def test_the_gradient_by_finite_differences():
    """The whole road in float64: prefix, head, clip, KL. Prevents: a detach too many."""
    model = random_model(layers=1).double()
    model.logits = lambda hidden: torch.nn.functional.linear(
        hidden, model.model.embed_tokens.weight
    )
    model.cos, model.sin = model.cos.double(), model.sin.double()
    episodes = make_episodes(groups=2, seed=5)
    batches = make_batches(episodes, "reflection", "token", 0, 10**6)
    torch.manual_seed(0)
    olds = [
        trained_logps(model, b, 0.9).detach() + 0.05 * torch.randn(b.mask.shape) for b in batches
    ]
    refs = [old + 0.1 * torch.randn(old.shape) for old in olds]

    def value():
        loss = 0.0
        for batch, old, ref in zip(batches, olds, refs):
            logps = trained_logps(model, batch, 0.9)
            loss = loss + grpo_loss(logps, old, batch.advantages, batch.weights, ref, 0.1)[0]
        return loss

    grads = gradient(model, value())
    for name in (
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
    ):
        p = model.get_parameter(name)
        direction = torch.randn(p.shape, dtype=p.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-4 * direction
                values.append(value().item())
                p -= sign * 1e-4 * direction
        numeric = (values[0] - values[1]) / 2e-4
        exact = (grads[name] * direction).sum().item()
        close("gradient, finite differences", abs(numeric / exact - 1), 2e-3)


def test_on_policy_the_loss_is_about_zero_and_its_gradient_is_not(small):
    """The sentence of the README: a loss of 0 is expected on-policy."""
    episodes = make_episodes(groups=2)
    batches = make_batches(episodes, "reflection", "sequence", 0, 10**6)
    loss = total_loss(small, batches)
    assert abs(loss.item()) < 1e-5
    assert max(g.abs().max() for g in gradient(small, loss).values()) > 1e-3


def test_spans_keep_every_id_in_order():
    """Prevents: a piece of the conversation lost or doubled between prefix and suffix."""
    episode = make_episodes(groups=1, G=1)[0]
    turns = [episode.attempt, episode.reflection, *episode.retries]
    for train_on, last in (("reflection", 1), ("reflection+retry", 2), ("everything", 2)):
        prefix, ids, mask, logps = spans(copy.deepcopy(episode), train_on)
        assert prefix + ids == [i for t in turns[: last + 1] for i in t.prompt_ids + t.ids]
        assert len(ids) == len(mask) == len(logps)
        assert sum(mask) == sum(len(turns[i].ids) for i in rrr.TRAINED_TURNS[train_on])
