"""The sampler against the plainest thing: a full forward pass, without a cache, for each token."""

import random

import pytest
import torch

import sampler
from conftest import close, random_model
from model import UserError
from sampler import Conversations, draw

STOPS = frozenset({3, 5, 8})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def naive_greedy(model, ids, max_tokens, stops):
    ids, new = list(ids), []
    while len(new) < max_tokens:
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])
        new.append(int(model.logits(hidden[0, -1]).argmax()))
        ids.append(new[-1])
        if new[-1] in stops:
            break
    return new


@torch.no_grad()
def full_logps(model, ids, n, temperature):
    """Log-probs of the last n ids, by one plain forward pass."""
    hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
    logps = torch.log_softmax(model.logits(hidden) / temperature, -1)
    return logps[:-1].gather(1, torch.tensor(ids)[1:, None])[-n:, 0]


def random_prompts(n, seed=0, low=1, high=40):
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(rng.randint(low, high))] for _ in range(n)]


@pytest.mark.parametrize("seed", range(3))
def test_three_ragged_turns_with_fork_and_compaction_equal_uncached_greedy(seed):
    """Prevents: wrong positions after padding, rows mixed up when finished ones are
    moved, the pending id fed twice or not at all."""
    model = random_model(seed=seed)
    rng = random.Random(seed)
    prompts = random_prompts(13, seed)
    conversations = Conversations(model, 13, 400)
    conversations.extend(prompts)
    texts = [list(p) for p in prompts]
    lengths = set()
    for turn in range(3):
        sampled = conversations.sample(24, STOPS, generator(), temperature=0)
        for text, s in zip(texts, sampled):
            assert s.ids == naive_greedy(model, text, 24, STOPS)
            assert s.stopped == (s.ids[-1] in STOPS)
            text += s.ids
            lengths.add(len(s.ids))
        if turn == 0:
            conversations = conversations.fork(3)
            texts = [list(text) for text in texts for _ in range(3)]
        if turn == 1:
            rows = rng.sample(range(39), 20)
            conversations = conversations.select(rows)
            texts = [texts[row] for row in rows]
        glue = random_prompts(len(texts), seed + turn + 1, 1, 12)
        conversations.extend(glue)
        for text, piece in zip(texts, glue):
            text += piece
    assert len(lengths) > 3, (
        "the rows must finish at different times for this test to mean anything"
    )


@pytest.mark.parametrize("G", [1, 2])
def test_a_fork_does_not_share_memory(G):
    """Prevents: two reflections of one failure, or an evaluation's controls (a fork of one), that
    write into one cache."""
    model = random_model()
    start = Conversations(model, 2, 100)
    start.extend([[1, 2, 4], [7, 9]])
    fork = start.fork(G)
    pieces = [[11], [12, 13, 14, 15], [11], [16]][: 2 * G]
    fork.extend(pieces)
    texts = [([1, 2, 4], [7, 9])[i // G] + piece for i, piece in enumerate(pieces)]
    sampled = fork.sample(8, STOPS, generator(), temperature=0)
    start.extend([[20], [21]])
    for s, text in zip(
        start.sample(8, STOPS, generator(), temperature=0), ([1, 2, 4, 20], [7, 9, 21])
    ):
        assert s.ids == naive_greedy(model, text, 8, STOPS)
    fork.extend([[5]] * len(texts))  # what the parent wrote meanwhile is not the fork's
    again = fork.sample(8, STOPS, generator(), temperature=0)
    for first, second, text in zip(sampled, again, texts):
        assert second.ids == naive_greedy(model, [*text, *first.ids, 5], 8, STOPS)


def test_a_row_does_not_depend_on_its_neighbours():
    """Prevents: padding that is attended to. The same uniform numbers, alone and in a crowd."""
    model = random_model()
    prompts = random_prompts(9)
    crowd = Conversations(model, 9, 200)
    crowd.extend(prompts)
    together = crowd.sample(20, STOPS, generator(1), temperature=0)
    for prompt, expected in zip(prompts, together):
        alone = Conversations(model, 1, 200)
        alone.extend([prompt])
        [got] = alone.sample(20, STOPS, generator(2), temperature=0)
        assert got.ids == expected.ids
        assert torch.allclose(torch.tensor(got.logps), torch.tensor(expected.logps), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logps_are_those_of_the_sampled_distribution(temperature):
    """Prevents: log-probs without the temperature, of another token, without the stop token."""
    model = random_model()
    prompts = random_prompts(8)
    conversations = Conversations(model, 8, 300)
    conversations.extend(prompts)
    texts = [list(p) for p in prompts]
    for _ in range(2):
        for text, s in zip(texts, conversations.sample(16, STOPS, generator(), temperature)):
            text += s.ids
            expected = full_logps(model, text, len(s.ids), temperature)
            difference = (torch.tensor(s.logps) - expected).abs().max()
            close("log-probs of sampled tokens, cached and full", difference, 1e-4)
        conversations.extend([[1, 2]] * 8)
        texts = [text + [1, 2] for text in texts]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_ids_follow_the_distribution(temperature):
    """Chi-square against softmax(logits / T). Prevents: a forgotten temperature."""
    logits = torch.randn(20, generator=generator(3)) * 2
    logits[7] = -torch.inf  # must never be drawn
    n = 40_000
    uniform = torch.rand(n, generator=generator(4))
    ids, logps = draw(logits.expand(n, 20), uniform, temperature)
    expected = torch.softmax(logits / temperature, -1)
    counts = torch.bincount(ids, minlength=20).float()
    assert counts[7] == 0
    keep = expected > 0
    chi2 = ((counts - n * expected)[keep] ** 2 / (n * expected[keep])).sum()
    assert chi2 < 43.8  # the 99.9% point of chi-square with 19 degrees of freedom; 18 here
    assert torch.allclose(logps, expected.log()[ids], atol=1e-5)


def test_top_k_and_top_p_keep_what_they_should():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(4000, 4)
    uniform = torch.rand(4000, generator=generator())
    assert set(draw(logits, uniform, 1.0, top_k=2)[0].tolist()) == {0, 1}
    assert set(draw(logits, uniform, 1.0, top_p=0.6)[0].tolist()) == {0, 1}
    assert set(draw(logits, uniform, 1.0, top_p=0.49)[0].tolist()) == {0}
    ids, logps = draw(logits, uniform, 1.0, top_k=2)
    assert abs((ids == 0).float().mean() - 2 / 3) < 0.03
    assert torch.allclose(logps, logits.gather(1, ids[:, None])[:, 0]), (
        "log-probs stay those of the full distribution"
    )


def test_the_extremes_of_the_uniform_number_draw_possible_ids():
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    assert draw(logits, torch.tensor([0.0]), 1.0)[0].item() == 1
    assert draw(logits, torch.tensor([1 - 2**-24]), 1.0)[0].item() == 2


def test_the_seed_repeats_a_run_and_another_seed_does_not():
    model = random_model()

    def once(seed):
        conversations = Conversations(model, 4, 100)
        conversations.extend(random_prompts(4))
        return [s.ids for s in conversations.sample(30, STOPS, generator(seed))]

    assert once(1) == once(1)
    assert once(1) != once(2)


def test_overrunning_the_context_is_refused_before_anything_is_sampled():
    model = random_model()
    with pytest.raises(UserError, match="context"):
        Conversations(model, 2, 513)
    conversations = Conversations(model, 2, 64)
    conversations.extend([[1] * 60, [1]])
    with pytest.raises(UserError, match="cannot take 5 more"):
        conversations.sample(5, STOPS, generator())
    conversations.sample(4, STOPS, generator())  # exactly fits
    with pytest.raises(UserError, match="cannot take"):
        Conversations(model, 1, 8).extend([[1] * 9])


def test_the_cap_cuts_and_says_so():
    model = random_model()
    conversations = Conversations(model, 6, 100)
    conversations.extend(random_prompts(6))
    for s in conversations.sample(5, frozenset(), generator()):
        assert len(s.ids) == 5 and not s.stopped and len(s.logps) == 5


@pytest.mark.parametrize("seed", range(3))
def test_the_road_of_cuda_graphs_gives_the_same(seed, monkeypatch):
    """On a CPU, with a recorder that simply repeats the step. Prevents: a step that reads or makes
    something outside its fixed tensors, rows lost on the way to the desk and back, a desk that is
    too small for the next conversation, graphs of another drawing or other stop ids."""

    def three_turns():
        model = random_model(seed=seed)
        conversations = Conversations(model, 9, 300)
        conversations.extend(random_prompts(9, seed))
        turns = conversations.sample(20, STOPS, generator())
        conversations.extend(random_prompts(9, seed + 1, high=9))
        conversations = conversations.fork(3)
        turns += conversations.sample(40, STOPS, generator(1), temperature=0.8)
        conversations.extend([[7, 7]] * 27)
        return model, turns + conversations.sample(30, frozenset({11}), generator(2), top_k=20)

    _, plain = three_turns()
    recorded = []
    monkeypatch.setattr(sampler, "uses_graphs", lambda cache: True)
    monkeypatch.setattr(sampler, "record", lambda step: recorded.append(step) or step)
    monkeypatch.setattr(sampler, "LOOK_EVERY", {"cpu": 3})
    monkeypatch.setattr(sampler, "ROWS_BY", {"cpu": 4})
    model, by_graphs = three_turns()
    for one, other in zip(plain, by_graphs, strict=True):
        assert one.ids == other.ids and one.stopped == other.stopped
        close("log-probs by graphs", max(map(gap, one.logps, other.logps)), 1e-4)
    assert len(model.desk.counts) == 27 and model.desk.max_tokens == 40
    kinds = list(model.desk.graphs)
    assert len(recorded) > len(kinds) > 2  # those of the first, smaller desk went with it
    assert len({stops for *_, stops, _ in kinds}) == 2, "each set of stop ids has its own graphs"


def gap(a, b):
    return abs(a - b)


def test_a_changed_weight_is_seen():
    """Prevents: sampling on with the blocked copy of a weight that the optimizer has moved."""
    model = random_model()
    before = sample_greedily(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    after = sample_greedily(model)
    assert after == naive_greedy(model, [1, 2, 3], 12, STOPS) != before


def sample_greedily(model):
    conversations = Conversations(model, 1, 40)
    conversations.extend([[1, 2, 3]])
    return conversations.sample(12, STOPS, generator(), temperature=0)[0].ids


def test_bfloat16_stays_near_the_full_pass():
    """Prevents: a path of the cache that loses more than bfloat16 must."""
    model = random_model(layers=4).bfloat16()
    conversations = Conversations(model, 24, 200)
    prompts = random_prompts(24)
    conversations.extend(prompts)
    gaps = []
    for prompt, s in zip(prompts, conversations.sample(60, STOPS, generator())):
        gaps.append(full_logps(model, prompt + s.ids, len(s.ids), 1.0) - torch.tensor(s.logps))
    close("log-probs in bfloat16, cached and full, mean", torch.cat(gaps).abs().mean(), 0.05)
    close("log-probs in bfloat16, cached and full, bias", torch.cat(gaps).mean().abs(), 0.02)
