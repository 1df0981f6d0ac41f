"""The batch, its mask, the shared-prefix pass and the loss: against plain loops and
float64."""

import copy
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import close, random_model

import rrr
from config import Config
from rrr import (
    TRAINED_TURNS,
    Episode,
    Turn,
    assign_advantages,
    backward,
    explore,
    grpo_loss,
    ids_and_mask,
    make_batches,
    trained_logps,
    visible,
)


def settings(**changes) -> Config:
    """All in one micro-batch and no KL term, unless a test asks otherwise."""
    plain = {"micro_batch_tokens": 10**6, "kl_beta": 0.0, "reflection_tokens": 20}
    plain["device"] = "cpu"
    return Config(**(plain | changes))


def turn(rng, prompt, n):
    prompt_ids = [rng.randrange(97) for _ in range(prompt)]
    ids = [rng.randrange(97) for _ in range(n)]
    return Turn(ids, [-rng.random() for _ in ids], True, prompt_ids, "")


def make_episodes(groups=3, G=4, seed=0, rewards=None):
    """Uneven in everything: prefixes, reflections, retries."""
    rng = random.Random(seed)
    episodes = []
    for group in range(groups):
        attempt = turn(rng, rng.randint(5, 30), rng.randint(1, 15))
        glue = turn(rng, rng.randint(2, 5), 0).prompt_ids
        for g in range(G):
            reflection = turn(rng, 0, rng.randint(1, 20))
            retry = turn(rng, 3, rng.randint(1, 9))
            reflection.prompt_ids = glue
            reward = float(g % 2 if group % 2 else g % 3 == 0)
            if rewards:
                reward = rewards[group][g]
            episode = Episode({}, group, attempt, {}, reflection, [retry], [{}], reward)
            episodes.append(episode)
    assign_advantages(episodes)
    return episodes


def plain_logps(model, episode, train_on, temperature=1.0):
    """One full, uncached, unshared, unpadded pass of one episode: its trained tokens'
    log-probs."""
    ids, trained = [], []
    for i, t in enumerate([episode.attempt, episode.reflection, *episode.retries]):
        ids += t.prompt_ids + t.ids
        trained += [False] * len(t.prompt_ids)
        trained += [i in TRAINED_TURNS[train_on]] * len(t.ids)
    hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
    logps = torch.log_softmax(model.logits(hidden[:-1]) / temperature, -1)
    return logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][torch.tensor(trained[1:])]


def sampled_logps(episode, train_on):
    """What the sampler said of the same tokens."""
    turns = [episode.attempt, episode.reflection, *episode.retries]
    return torch.tensor([x for i in TRAINED_TURNS[train_on] for x in turns[i].logps])


def total_loss(model, batches, config):
    loss = 0.0
    for batch in batches:
        logps = trained_logps(model, batch, config.temperature)
        loss = loss + grpo_loss(logps, logps.detach(), None, batch, config)[0]
    return loss


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(what, a, b):
    for name in a:
        scale = b[name].abs().max().clamp(min=1e-6)
        close(what, (a[name] - b[name]).abs().max() / scale, 1e-5)


# ---- the batch and its mask ----


def the_example():
    """The episodes of Batch's own example: prefix "a b c", reflections "x y." and "z."."""
    a, b, c, x, y, stop, z = range(1, 8)
    attempt = Turn([b], [0.0], True, [a], "")
    retry = Turn([9], [0.0], True, [9, 9], "")
    long = Turn([x, y, stop], [-1.0, -2.0, -3.0], True, [c], "")
    short = Turn([z, stop], [-4.0, -5.0], True, [c], "")
    episodes = []
    for reflection, reward in ((long, 1.0), (short, 0.0)):
        episodes.append(Episode({}, 0, attempt, {}, reflection, [retry], [{}], reward))
    assign_advantages(episodes)
    return episodes


def test_the_trained_tokens_are_exactly_the_reflections():
    """Batch's own example. Prevents: a mask that is shifted by one, a lost stop token."""
    a, b, c, x, y, stop, z = range(1, 8)
    [batch] = make_batches(the_example(), settings())
    assert batch.ids.tolist() == [[a, b, c, x, y, c, z]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.targets.tolist() == [[0, 0, x, y, stop, z, stop]]
    assert batch.mask.tolist() == [[False, False, True, True, True, True, True]]
    assert batch.sampled_logps.tolist() == [[0, 0, -1, -2, -3, -4, -5]]
    assert torch.allclose(batch.weights, batch.mask / 5)
    expected = torch.tensor([0.0, 0, 1, 1, 1, -1, -1])
    assert torch.allclose(batch.advantages[0], expected, atol=1e-3)


def test_a_token_sees_the_prefix_and_its_own_past():
    """The same example, key by key. Prevents: a reflection that sees its sibling or its
    future."""
    [batch] = make_batches(the_example(), settings())
    rows = ["a......", "ab.....", "abc....", "abcx...", "abcxy..", "ab...c.", "ab...cz"]
    seen = [[letter != "." for letter in row] for row in rows]
    assert visible(batch.segments).tolist() == [seen]


def test_padding_is_no_segment_and_trains_nothing():
    """Prevents: padding that is trained, or that is taken for a piece of the prefix (0), or
    that sees nothing at all, which would be NaN."""
    [batch] = make_batches(make_episodes(groups=6), settings(train_on="everything"))
    padding = batch.segments == -1
    assert padding.any() and not padding.all(1).any()
    assert (padding[:, 1:] >= padding[:, :-1]).all()  # on the right
    assert not batch.mask[padding].any() and not batch.weights[padding].any()
    mask = visible(batch.segments)
    assert mask.any(-1).all()
    n, query, key = mask.nonzero().T
    assert (padding[n, query] | ~padding[n, key]).all(), "nobody else sees padding"


@pytest.mark.parametrize("train_on", TRAINED_TURNS)
def test_ids_and_mask_keep_every_id_in_order(train_on):
    """Prevents: a piece of the conversation lost or doubled, glue that is trained, a
    sampled id (the stop token is one) that is not; a stop token made up where the cap cut a
    turn."""
    episode = make_episodes(groups=1, G=1)[0]
    episode.reflection.stopped = False
    turns = [episode.attempt, episode.reflection, *episode.retries]
    ids, mask, logps = ids_and_mask(copy.deepcopy(episode), train_on)
    expected_ids, expected_mask = [], []
    for i, t in enumerate(turns[: max(TRAINED_TURNS[train_on]) + 1]):
        expected_ids += t.prompt_ids + t.ids
        expected_mask += [0] * len(t.prompt_ids)
        expected_mask += [int(i in TRAINED_TURNS[train_on])] * len(t.ids)
    assert ids == expected_ids and mask == expected_mask
    kept = [logp for logp, trained in zip(logps, mask, strict=True) if trained]
    assert kept == [x for i in TRAINED_TURNS[train_on] for x in turns[i].logps]


def test_nothing_outside_the_reflections_meets_the_head(small):
    """Prevents: training the attempt, the instructions or the retry. The head sees one
    position for each reflection token, and changing every retry changes neither loss nor
    gradient by a bit."""
    episodes, config, seen = make_episodes(), settings(), []
    logits = small.logits

    def counting(hidden):
        seen.append(len(hidden))
        return logits(hidden)

    small.logits = counting
    before = gradient(small, total_loss(small, make_batches(episodes, config), config))
    groups = [group for group in rrr.by_group(episodes) if rrr.has_signal(group)]
    assert max(seen) == sum(len(e.reflection.ids) for group in groups for e in group)
    for episode in episodes:
        episode.retries[0].ids = [1] * 7
    after = gradient(small, total_loss(small, make_batches(episodes, config), config))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_gradient_at_untrained_positions_is_exactly_zero(small):
    """Log-probs outside the mask get gradient 0, those inside
    exactly weight x advantage. Prevents: a mask that leaks into glue, padding or prefix."""
    for batch in make_batches(make_episodes(), settings()):
        logps = trained_logps(small, batch, 1.0).detach().requires_grad_()
        loss, _, _ = grpo_loss(logps, logps.detach(), None, batch, settings())
        loss.backward()
        assert (logps.grad[~batch.mask] == 0).all()
        expected = -(batch.weights * batch.advantages)
        assert torch.allclose(logps.grad, expected, atol=1e-8)
        assert (expected[batch.mask] != 0).all()


# ---- the training pass ----


@pytest.mark.parametrize("train_on", TRAINED_TURNS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_shared_prefix_pass_equals_the_plain_pass(train_on, checkpointing, monkeypatch):
    """Prevents: a reflection that sees its siblings, wrong positions; a head that computes
    something else when its logits are recomputed; lost chunks."""
    monkeypatch.setattr(rrr, "HEAD_CHUNK", 7)
    model, episodes = random_model(), make_episodes(seed=1)
    if train_on == "attempt":  # then each sibling has its own
        for e in episodes:
            e.attempt = replace(e.attempt, ids=e.reflection.ids, logps=e.reflection.logps)
    config = settings(train_on=train_on, temperature=0.8)
    batches = make_batches(episodes, config)
    assert len(batches) == 1
    model.checkpointing = checkpointing
    shared = gradient(model, total_loss(model, batches, config))
    model.checkpointing = False
    plain = [plain_logps(model, e, train_on, 0.8) for e in episodes]
    loss = 0.0
    for logps, episode in zip(plain, episodes):
        ratio = torch.exp(logps - logps.detach())
        loss = loss - (ratio * episode.advantage).sum() / sum(map(len, plain))
    assert_same("gradient, shared prefix and plain", shared, gradient(model, loss))
    for batch in batches:  # the log-probs too, token for token
        got = trained_logps(model, batch, 0.8)[batch.mask]
        assert torch.allclose(got.sort()[0], torch.cat(plain).sort()[0], atol=1e-4)


def test_no_logits_are_kept_for_the_backward_pass(small):
    """Prevents: a head that keeps (tokens, vocabulary) numbers, the largest tensor there
    is."""
    shapes = []

    def keep(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    [batch] = make_batches(make_episodes(), settings())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trained_logps(small, batch, 1.0)
    assert len(shapes) > 20 and not [shape for shape in shapes if shape[-1:] == (97,)]


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_in_bfloat16_the_gradient_points_where_it_does_in_float32(precision, monkeypatch):
    """Prevents: a gradient of the head in the wrong dtype; products of the head that round
    their result to bfloat16, at the precision that config.py asks for."""
    monkeypatch.setattr(rrr, "HEAD_CHUNK", 50)
    config = settings(temperature=0.8)
    batches = make_batches(make_episodes(seed=1), config)
    coarse = random_model().bfloat16()
    exact = copy.deepcopy(coarse).float()  # the same weights
    flat = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for model in (coarse, exact):
            grads = gradient(model, total_loss(model, batches, config))
            flat.append(torch.cat([grad.flatten().double() for grad in grads.values()]))
        hidden = torch.randn(64, 32).bfloat16()
        with torch.no_grad():
            logits = coarse.logits(hidden)
    finally:
        torch.set_float32_matmul_precision(before)
    angle = 1 - torch.cosine_similarity(*flat, dim=0)
    close("gradient, bfloat16 and float32, 1 - cosine", angle, 0.02)
    close("its length", abs(flat[0].norm() / flat[1].norm() - 1), 0.05)
    true = hidden.double() @ coarse.model.embed_tokens.weight.double().t()
    error = (logits - true).abs().max() / true.abs().max()
    close("logits of bfloat16 weights", error, 1e-5)


# ---- denominators and micro-batches ----


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_the_gradient(small, norm):
    """Prevents: a denominator per micro-batch."""
    episodes, config = make_episodes(groups=6), settings(loss_norm=norm)
    whole = make_batches(episodes, config)
    parts = make_batches(episodes, settings(loss_norm=norm, micro_batch_tokens=1))
    assert len(whole) == 1 and len(parts) == 6
    cut = gradient(small, total_loss(small, parts, config))
    uncut = gradient(small, total_loss(small, whole, config))
    assert_same("gradient, micro-batches and one batch", cut, uncut)


def test_the_order_of_episodes_does_not_change_the_gradient(small):
    episodes, config = make_episodes(groups=4), settings()
    shuffled = random.Random(0).sample(episodes, len(episodes))
    a = gradient(small, total_loss(small, make_batches(episodes, config), config))
    b = gradient(small, total_loss(small, make_batches(shuffled, config), config))
    assert_same("gradient, another order of episodes", a, b)


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
def test_the_denominators(norm):
    [batch] = make_batches(make_episodes(groups=2, G=4), settings(loss_norm=norm))
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
    [batch] = make_batches(episodes, settings())
    assert len(batch.ids) == 1 and math.isclose(batch.weights.sum().item(), 1, rel_tol=1e-5)
    assert make_batches(episodes[:8], settings()) == []


def test_the_token_budget_is_kept():
    episodes = make_episodes(groups=8, seed=3)
    for budget in (1, 150, 300, 10**6):
        batches = make_batches(episodes, settings(micro_batch_tokens=budget))
        assert sum(len(batch.ids) for batch in batches) == 8
        for batch in batches:
            assert len(batch.ids) == 1 or batch.ids.numel() <= budget


def test_advantages():
    """Prevents: groups found by comparing prompts, a division by zero, the reward
    overwritten."""
    episodes = make_episodes(groups=2, rewards=[[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]])
    std = math.sqrt(0.25 * 0.75)
    expected = [0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3
    assert [e.advantage for e in episodes[:4]] == pytest.approx(expected)
    assert [e.advantage for e in episodes[4:]] == [0] * 4
    assert [e.reward for e in episodes[:4]] == [1, 0, 0, 0]
    assign_advantages(episodes, scale=False)
    assert [e.advantage for e in episodes[:4]] == [0.75, -0.25, -0.25, -0.25]


# ---- the loss ----


def test_the_loss_equals_a_slow_loop_of_the_formulas_in_float64():
    """One token at a time. Prevents: a sign, the clip on the wrong side, KL the wrong
    way."""
    torch.manual_seed(0)
    shape = (2, 3, 5)
    logps, old, ref = (-torch.rand(shape, dtype=torch.float64) * 3 for _ in range(3))
    old, ref = logps + (old - old.mean()) * 0.3, logps + (ref - ref.mean()) * 0.3
    advantages = torch.randn(2, 3, 1, dtype=torch.float64)
    weights = torch.rand(shape, dtype=torch.float64) * (torch.rand(shape) > 0.3)
    beta, low, high = 0.07, 0.2, 0.28
    expected, clips, kls = 0.0, 0, 0.0
    for n in range(2):
        for g in range(3):
            for t in range(5):
                lp, lo, lr = (x[n, g, t].item() for x in (logps, old, ref))
                rho, a = math.exp(lp - lo), advantages[n, g, 0].item()
                w = weights[n, g, t].item()
                clipped = min(max(rho, 1 - low), 1 + high)
                kl = math.exp(lr - lp) - (lr - lp) - 1
                expected += w * (-min(rho * a, clipped * a) + beta * kl)
                clips += clipped * a < rho * a and w > 0
                kls += kl * (w > 0)
    batch = SimpleNamespace(advantages=advantages, weights=weights, mask=weights > 0)
    config = settings(kl_beta=beta, clip_low=low, clip_high=high)
    loss, kl, is_clipped = grpo_loss(logps, old, ref, batch, config)
    close("loss, vectors and a float64 loop", abs(loss.item() / expected - 1), 1e-12)
    close(
        "KL, vectors and a float64 loop", abs(kl[batch.mask].sum().item() / kls - 1), 1e-12
    )
    assert clips > 2 and is_clipped.sum() == clips


def test_the_gradient_by_finite_differences():
    """The whole road in float64: prefix, head, clip, KL. Prevents: a detach too many."""
    model = random_model(layers=1).double()
    weight = model.model.embed_tokens.weight
    model.logits = lambda hidden: torch.nn.functional.linear(hidden, weight)
    model.cos, model.sin = model.cos.double(), model.sin.double()
    config = settings(kl_beta=0.1)
    batches = make_batches(make_episodes(groups=2, seed=5), config)
    torch.manual_seed(0)
    olds, refs = [], []
    for batch in batches:
        logps = trained_logps(model, batch, 0.9).detach()
        olds.append(logps + 0.05 * torch.randn(logps.shape))
        refs.append(olds[-1] + 0.1 * torch.randn(logps.shape))

    def value():
        loss = 0.0
        for batch, old, ref in zip(batches, olds, refs):
            logps = trained_logps(model, batch, 0.9)
            loss = loss + grpo_loss(logps, old, ref, batch, config)[0]
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
    config = settings(loss_norm="sequence")
    loss = total_loss(small, make_batches(make_episodes(groups=2), config), config)
    assert abs(loss.item()) < 1e-5
    assert max(g.abs().max() for g in gradient(small, loss).values()) > 1e-3


# ---- the method on one screen ----


def nearby(model, seed):
    """The model with its weights moved a little: one from before, or a reference."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return other


@pytest.mark.parametrize("train_on", TRAINED_TURNS)
def test_backward_equals_a_plain_computation(small, train_on):
    """Figures and gradient off-policy, with a reference, in one micro-batch and in many,
    against one plain pass of each episode and the formulas. Prevents: a figure of the last
    micro-batch only, a mean over padding or over micro-batches, a gap against the wrong
    log-probs, a gradient that is not the loss's or that replaces what earlier micro-batches
    gave."""
    config = settings(train_on=train_on, temperature=0.8, kl_beta=0.3)
    before, reference = nearby(small, 1), nearby(small, 2)
    episodes = make_episodes(groups=5, seed=2)
    new = [plain_logps(small, e, train_on, 0.8) for e in episodes]
    with torch.no_grad():
        olds = [plain_logps(before, e, train_on, 0.8) for e in episodes]
        refs = [plain_logps(reference, e, train_on, 0.8) for e in episodes]
    A = torch.cat([torch.full(p.shape, e.advantage) for p, e in zip(new, episodes)])
    logps, old, ref = torch.cat(new), torch.cat(olds), torch.cat(refs)
    ratio = torch.exp(logps - old)
    clipped = ratio.clamp(0.8, 1.2)
    kl = torch.exp(ref - logps) - (ref - logps) - 1
    loss = (0.3 * kl - torch.minimum(ratio * A, clipped * A)).mean()
    gap = logps - torch.cat([sampled_logps(e, train_on) for e in episodes])
    expected = {
        "loss": loss,
        "kl": kl.mean(),
        "clip_fraction": (clipped * A < ratio * A).float().mean(),
        "gap_mean": gap.abs().mean(),
        "gap_kl": -gap.mean(),
        "gap_max": gap.abs().max(),
    }
    assert 0.1 < expected["clip_fraction"] < 0.9 and expected["kl"] > 1e-3
    plain = gradient(small, loss)

    for micro_batch_tokens in (1, 10**6):
        config.micro_batch_tokens = micro_batch_tokens
        batches = make_batches(episodes, config)
        assert len(batches) == (5 if micro_batch_tokens == 1 else 1)
        with torch.no_grad():
            olds = [trained_logps(before, batch, 0.8) for batch in batches]
            refs = [trained_logps(reference, batch, 0.8) for batch in batches]
        small.zero_grad()
        figures = backward(small, batches, olds, refs, config)
        assert figures.keys() == expected.keys()
        for name, value in expected.items():
            close(f"backward, {name}", abs(figures[name] / value.item() - 1), 2e-5)
        assert_same("gradient, backward and plain", gradients(small), plain)


def test_backward_at_the_first_update_has_ratio_one_and_adds_to_what_is_there(small):
    """Prevents: the sampler's log-probs in the ratio's denominator, gradients that are
    dropped."""
    config = settings(kl_beta=0.3)
    batches = make_batches(make_episodes(), config)
    with torch.no_grad():
        own = [trained_logps(small, batch, 1.0) for batch in batches]
    small.zero_grad()
    given = backward(small, batches, own, own, config)
    once = gradients(small)
    figures = backward(small, batches, None, own, config)
    assert figures == given and figures["clip_fraction"] == 0 and figures["kl"] == 0
    for name, grad in gradients(small).items():
        assert torch.allclose(grad, 2 * once[name], rtol=1e-4, atol=1e-7)
    without = backward(small, batches, None, None, config)  # no reference: no KL
    assert without["kl"] == 0 and without["loss"] == figures["loss"]


def test_explore_forks_reflects_retries_and_scores():
    """With a rollout that only notes what it is asked. Prevents: retries that go on from
    the failures' conversations instead of the reflections', G and R swapped, a scale that
    is lost."""
    asked = []

    class Noting:
        def reflect(self, failures, conversations, G, generator):
            asked.append(("reflect", conversations, G, generator))
            episodes = []
            for failure in failures:
                episodes += [copy.copy(failure) for _ in range(G)]
            return episodes, "reflected"

        def retry(self, episodes, conversations, R, generator):
            asked.append(("retry", conversations, R, generator))
            for i, episode in enumerate(episodes):
                episode.reward = float(i == 0)
            return episodes, "retried"

    failures = [Episode({}, group, None, {}) for group in (4, 7)]
    config = settings(group_size=4, retries_per_reflection=2, scale_advantages=False)
    episodes = explore(failures, "read", Noting(), config, "draws")
    assert asked == [("reflect", "read", 4, "draws"), ("retry", "reflected", 2, "draws")]
    assert [e.group for e in episodes] == [4] * 4 + [7] * 4
    assert [e.advantage for e in episodes] == [0.75, -0.25, -0.25, -0.25] + [0] * 4
