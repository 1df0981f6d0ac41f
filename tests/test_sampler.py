"""The sampler against the plainest thing: a full forward pass, without a cache, for each
token."""

import random

import pytest
import torch
from conftest import close, random_model

import sampler
from extras import cuda_graphs
from model import Decoder, UserError
from sampler import DecodingState, KVCache, draw_ids

STOPS = frozenset({3, 5, 8})


def tensors(cache):
    return [cache.lengths, cache.hidden, *cache.keys, *cache.values]


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
    cache = KVCache(model, 13, 400)
    cache.extend(prompts)
    texts = [list(p) for p in prompts]
    lengths = set()
    for turn in range(3):
        sampled = cache.sample(24, STOPS, generator(), temperature=0)
        for text, s in zip(texts, sampled):
            assert s.ids == naive_greedy(model, text, 24, STOPS)
            assert s.stopped == (s.ids[-1] in STOPS)
            text += s.ids
            lengths.add(len(s.ids))
        if turn == 0:
            cache = cache.fork(3)
            texts = [list(text) for text in texts for _ in range(3)]
        if turn == 1:
            rows = rng.sample(range(39), 20)
            cache = cache.select(rows)
            texts = [texts[row] for row in rows]
        glue = random_prompts(len(texts), seed + turn + 1, 1, 12)
        cache.extend(glue)
        for text, piece in zip(texts, glue):
            text += piece
    assert len(lengths) > 3, (
        "the rows must finish at different times for this test to mean anything"
    )


def test_after_a_turn_rows_stand_in_the_callers_order():
    """The cache itself, place by place, against one that has read the same ids. Prevents: a
    row that was moved when it finished and not put back, in one of the cache's tensors."""
    model = random_model()
    cache, prompts = KVCache(model, 13, 100), random_prompts(13)
    cache.extend(prompts)
    sampled = cache.sample(24, STOPS, generator(1))
    counts = [len(s.ids) for s in sampled]
    assert counts != sorted(counts, reverse=True), "else nothing had to be moved"
    read = KVCache(model, 13, 100)
    read.extend([prompt + s.ids[:-1] for prompt, s in zip(prompts, sampled)])
    ours, theirs = cache, read
    assert torch.equal(ours.lengths, theirs.lengths)
    assert cache.unread == [s.ids[-1:] for s in sampled]
    for row, n in enumerate(ours.lengths.tolist()):
        for mine, plain in zip(ours.keys + ours.values, theirs.keys + theirs.values):
            difference = (mine[row, :, :n] - plain[row, :, :n]).abs().max()
            close("keys and values, decoded and read", difference, 1e-4)


def test_moved_rows_are_put_back_with_all_that_is_theirs():
    """The state by itself. Prevents: a tensor that is forgotten, a swap that loses a
    row."""
    cache = KVCache(random_model(), 7, 50)
    cache.extend(random_prompts(7))
    with torch.inference_mode():
        state = DecodingState(cache, 5)
        state.begin(torch.rand(7, 5, generator=generator()), STOPS, 1.0)
        state.ids += torch.arange(7)[:, None]
        everything = [*tensors(state.cache), state.uniform]
        before = [tensor.clone() for tensor in everything]
        for n, finished in ((7, [0, 1, 5]), (4, [2])):
            state.alive[finished] = False
            n_alive = int(state.alive[:n].sum())
            state.move_alive_forward(n, n_alive)
            assert state.alive[:n].tolist() == [True] * n_alive + [False] * (n - n_alive)
            assert state.ids[:, 0].tolist() == state.rows.tolist()
            assert torch.equal(state.uniform, before[-1][state.rows])
        assert state.rows.tolist() != list(range(7))
        state.end()
    assert state.rows.tolist() == state.ids[:, 0].tolist() == list(range(7))
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


@pytest.mark.parametrize("G", [1, 2])
def test_a_fork_does_not_share_memory(G):
    """Prevents: two reflections of one failure, or an evaluation's controls (a fork of
    one), that write into one cache."""
    model = random_model()
    start = KVCache(model, 2, 100)
    start.extend([[1, 2, 4], [7, 9]])
    fork = start.fork(G)
    pieces = [[11], [12, 13, 14, 15], [11], [16]][: 2 * G]
    fork.extend(pieces)
    texts = [([1, 2, 4], [7, 9])[i // G] + piece for i, piece in enumerate(pieces)]
    sampled = fork.sample(8, STOPS, generator(), temperature=0)
    start.extend([[20], [21]])
    parents = start.sample(8, STOPS, generator(), temperature=0)
    for s, text in zip(parents, ([1, 2, 4, 20], [7, 9, 21])):
        assert s.ids == naive_greedy(model, text, 8, STOPS)
    fork.extend([[5]] * len(texts))  # what the parent wrote meanwhile is not the fork's
    again = fork.sample(8, STOPS, generator(), temperature=0)
    for first, second, text in zip(sampled, again, texts):
        assert second.ids == naive_greedy(model, [*text, *first.ids, 5], 8, STOPS)


def test_a_row_does_not_depend_on_its_neighbours():
    """Prevents: padding that is attended to. The same uniform numbers, alone and in a
    crowd."""
    model = random_model()
    prompts = random_prompts(9)
    crowd = KVCache(model, 9, 200)
    crowd.extend(prompts)
    together = crowd.sample(20, STOPS, generator(1), temperature=0)
    for prompt, expected in zip(prompts, together):
        alone = KVCache(model, 1, 200)
        alone.extend([prompt])
        [got] = alone.sample(20, STOPS, generator(2), temperature=0)
        assert got.ids == expected.ids
        assert torch.allclose(
            torch.tensor(got.logps), torch.tensor(expected.logps), atol=1e-5
        )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logps_are_those_of_the_sampled_distribution(temperature):
    """Prevents: log-probs without the temperature, of another token, without the stop
    token."""
    model = random_model()
    prompts = random_prompts(8)
    cache = KVCache(model, 8, 300)
    cache.extend(prompts)
    texts = [list(p) for p in prompts]
    for _ in range(2):
        sampled = cache.sample(16, STOPS, generator(), temperature)
        for text, s in zip(texts, sampled):
            text += s.ids
            expected = full_logps(model, text, len(s.ids), temperature)
            difference = (torch.tensor(s.logps) - expected).abs().max()
            close("log-probs of sampled tokens, cached and full", difference, 1e-4)
        cache.extend([[1, 2]] * 8)
        texts = [text + [1, 2] for text in texts]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_ids_follow_the_distribution(temperature):
    """Chi-square against softmax(logits / T). Prevents: a forgotten temperature."""
    logits = torch.randn(20, generator=generator(3)) * 2
    logits[7] = -torch.inf  # must never be drawn
    n = 40_000
    uniform = torch.rand(n, 1, generator=generator(4))
    ids, logps = draw_ids(logits.expand(n, 20), uniform, temperature)
    ids, logps = ids[:, 0], logps[:, 0]
    expected = torch.softmax(logits / temperature, -1)
    counts = torch.bincount(ids, minlength=20).float()
    assert counts[7] == 0
    keep = expected > 0
    chi2 = ((counts - n * expected)[keep] ** 2 / (n * expected[keep])).sum()
    assert chi2 < 43.8  # the 99.9% point of chi-square with 19 degrees of freedom; 18 here
    assert torch.allclose(logps, expected.log()[ids], atol=1e-5)


def test_the_extremes_of_the_uniform_number_draw_possible_ids():
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    assert draw_ids(logits, torch.tensor([[0.0]]), 1.0)[0].item() == 1
    assert draw_ids(logits, torch.tensor([[1 - 2**-24]]), 1.0)[0].item() == 2


@pytest.mark.parametrize("V", [7, 50_000])
def test_a_sum_that_misses_1_draws_no_impossible_id(V):
    """Prevents: the last id, of probability 0, where the sums of many small numbers fall
    short of the uniform number or beyond it."""
    logits = torch.randn(4, V, generator=generator())
    logits[:, -3:] = -torch.inf
    for u in (1 - 2**-24, 1 - 2**-20, 0.0):
        ids, logps = draw_ids(logits, torch.full((4, 1), u), 1.0)
        assert (ids < V - 3).all() and logps.isfinite().all()


def test_at_temperature_0_the_likeliest_id_is_drawn():
    """With its log-prob in the full distribution at temperature 1, whatever the number."""
    logits = torch.randn(5, 20, generator=generator())
    ids, logps = draw_ids(logits, torch.rand(5, 1, generator=generator()), 0)
    assert ids[:, 0].tolist() == logits.argmax(-1).tolist()
    assert torch.allclose(logps[:, 0], logits.log_softmax(-1).max(-1)[0], atol=1e-6)


def test_the_seed_repeats_a_run_and_another_seed_does_not():
    model = random_model()

    def once(seed):
        cache = KVCache(model, 4, 100)
        cache.extend(random_prompts(4))
        return [s.ids for s in cache.sample(30, STOPS, generator(seed))]

    assert once(1) == once(1)
    assert once(1) != once(2)


def test_overrunning_the_context_is_refused_before_anything_is_sampled():
    model = random_model()
    with pytest.raises(UserError, match="only 512"):  # its context
        KVCache(model, 2, 600).extend([[1] * 513, [1]])
    cache = KVCache(model, 2, 64)
    cache.extend([[1] * 60, [1]])
    with pytest.raises(UserError, match="no room for"):
        cache.sample(5, STOPS, generator())
    cache.sample(4, STOPS, generator())  # exactly fits
    with pytest.raises(UserError, match="no room for"):
        KVCache(model, 1, 8).extend([[1] * 9])


@pytest.mark.parametrize("length", range(1, 17))
def test_a_finished_row_that_stays_has_room_for_its_key(length, monkeypatch):
    """Prevents: a row that is kept to fill a batch of round size, is longer than all that
    live, and writes behind the end of the tensors."""
    monkeypatch.setattr(sampler, "ROWS_BY", {"cpu": 4})
    monkeypatch.setattr(sampler, "BUCKET", {"cpu": 8})
    model = random_model()
    [stop] = naive_greedy(model, [1] * length, 1, ())  # what the longest row writes
    others = [[i] for i in range(97) if naive_greedy(model, [i], 1, ()) != [stop]]
    prompts = [[1] * length] + others[:5]
    cache = KVCache(model, 6, length + 8)
    cache.extend(prompts)
    turns = cache.sample(8, frozenset({stop}), generator(), temperature=0)
    assert turns[0].ids == [stop]
    for prompt, turn in zip(prompts[1:], turns[1:]):
        assert turn.ids == naive_greedy(model, prompt, 8, {stop})


def test_the_cap_cuts_and_says_so():
    model = random_model()
    cache = KVCache(model, 6, 100)
    cache.extend(random_prompts(6))
    for s in cache.sample(5, frozenset(), generator()):
        assert len(s.ids) == 5 and not s.stopped and len(s.logps) == 5


# ---- the road of CUDA graphs, on a CPU, with a recorder that repeats the step ----


@pytest.fixture
def recorded(monkeypatch):
    """Sampling goes over extras/cuda_graphs.py; the fixture lists (step, pool) of each
    graph."""
    graphs = []

    def record(step, pool):
        graphs.append((step, pool))
        return step, pool or object()

    new_state = staticmethod(cuda_graphs.graphed_state)
    monkeypatch.setattr(Decoder, "decoding_state", new_state, raising=False)
    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(sampler, "LOOK_EVERY", {"cpu": 3})
    monkeypatch.setattr(sampler, "ROWS_BY", {"cpu": 4})
    return graphs


def three_turns(model, seed, G=3, last_temperature=0.8):
    cache = KVCache(model, 9, 300)
    cache.extend(random_prompts(9, seed))
    turns = cache.sample(20, STOPS, generator())
    cache.extend(random_prompts(9, seed + 1, high=9))
    cache = cache.fork(G)
    turns += cache.sample(40, STOPS, generator(1), temperature=0.8)
    cache.extend([[7, 7]] * (9 * G))
    turns += cache.sample(30, frozenset({11}), generator(2), last_temperature)
    return turns


@pytest.mark.parametrize("seed", range(3))
def test_the_road_of_cuda_graphs_gives_the_same(seed, request):
    """Prevents: a step that reads or makes something outside its fixed tensors, rows lost
    on the way to the shared state and back, a state too small for the next conversation,
    graphs of another temperature, stop ids of the turn before, a memory pool for each
    graph."""
    plain = three_turns(random_model(seed=seed), seed)
    recorded = request.getfixturevalue("recorded")
    model = random_model(seed=seed)
    by_graphs = three_turns(model, seed)
    for one, other in zip(plain, by_graphs, strict=True):
        assert one.ids == other.ids and one.stopped == other.stopped
        gap = torch.tensor(one.logps) - torch.tensor(other.logps)
        close("log-probs by graphs", gap.abs().max(), 1e-4)
    state = model.graphed_state
    assert len(state.counts) == 27 and state.cache.capacity == 512
    assert state.ids.shape[1] == 64
    # Those of the first, smaller state went with it.
    assert len(recorded) > len(state.graphs) > 2
    pools = [pool for _, pool in recorded[-len(state.graphs) :]]
    assert pools[0] is None and set(pools[1:]) == {state.pool}, "one pool for all graphs"


def greedy_turn(model, prompts, capacity, max_tokens):
    """One turn over the graphs, each row checked against uncached greedy."""
    cache = KVCache(model, len(prompts), capacity)
    cache.extend(prompts)
    sampled = cache.sample(max_tokens, STOPS, generator(), temperature=0)
    for prompt, s in zip(prompts, sampled):
        assert s.ids == naive_greedy(model, prompt, max_tokens, STOPS)
    return cache


def test_a_slightly_larger_conversation_keeps_the_graphs(recorded):
    """Prevents: graphs that are recorded anew whenever a prompt is a token longer."""
    model = random_model()
    greedy_turn(model, random_prompts(9), 100, 20)
    state, n = model.graphed_state, len(recorded)
    greedy_turn(model, random_prompts(8, 1), 130, 24)  # fewer rows, more tokens
    assert model.graphed_state is state and len(recorded) >= n > 0
    greedy_turn(model, random_prompts(9), 100, 20)
    assert model.graphed_state is state and len(set(state.graphs)) == len(recorded)
    greedy_turn(model, random_prompts(9), 300, 20)  # too much: a larger one
    assert model.graphed_state is not state


def test_stale_rows_of_a_longer_conversation_are_left_alone(recorded):
    """Prevents: a cache that grows, when a turn is written back, to the length of rows that
    an earlier conversation left in the shared state."""
    model = random_model()
    greedy_turn(model, [*random_prompts(5), [1] * 200], 250, 8)
    short = greedy_turn(model, random_prompts(3, high=5), 40, 8)
    assert int(model.graphed_state.cache.lengths.max()) >= 200  # it is there
    assert short.keys[0].shape[2] <= 32
    assert len(short.lengths) == 3 and short.lengths.max() < 14
    # What was written back serves the next turn.
    texts = [list(p) for p in random_prompts(3, high=5)]
    cache = greedy_turn(model, texts, 60, 8)
    for text in texts:
        text += naive_greedy(model, text, 8, STOPS) + [9]
    cache.extend([[9]] * 3)
    sampled = cache.sample(8, STOPS, generator(), temperature=0)
    for text, s in zip(texts, sampled):
        assert s.ids == naive_greedy(model, text, 8, STOPS)


def test_a_step_replaces_no_tensor(recorded):
    """A graph remembers addresses. Prevents: `x = x + 1` where `x += 1` is meant."""
    model = random_model()
    greedy_turn(model, random_prompts(9), 100, 20)
    state = model.graphed_state

    def addresses():
        named = [t for t in vars(state).values() if isinstance(t, torch.Tensor)]
        return [t.data_ptr() for t in named + tensors(state.cache)]

    before = addresses()
    greedy_turn(model, random_prompts(9, 1), 100, 20)
    assert addresses() == before and len(before) >= 8 + 2 + 4


def pack(model):
    """extras/fast_cpu.py, as train.py and eval.py use it; skips where it is not there."""
    pytest.importorskip("extras.fast_cpu").pack(model)


@pytest.mark.parametrize("packed", [False, True])
def test_a_changed_weight_is_seen(packed):
    """Prevents: sampling on with the packed copy of a weight that the optimizer has
    moved."""
    model = random_model()
    if packed:
        pack(model)
    before = sample_greedily(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    after = sample_greedily(model)
    assert after == naive_greedy(model, [1, 2, 3], 12, STOPS) != before


def sample_greedily(model):
    cache = KVCache(model, 1, 40)
    cache.extend([[1, 2, 3]])
    return cache.sample(12, STOPS, generator(), temperature=0)[0].ids


def test_bfloat16_stays_near_the_full_pass():
    """Prevents: a path of the cache that loses more than bfloat16 must."""
    model = random_model(layers=4).bfloat16()
    cache = KVCache(model, 24, 200)
    prompts = random_prompts(24)
    cache.extend(prompts)
    gaps = []
    for prompt, s in zip(prompts, cache.sample(60, STOPS, generator())):
        full = full_logps(model, prompt + s.ids, len(s.ids), 1.0)
        gaps.append(full - torch.tensor(s.logps))
    gaps = torch.cat(gaps)
    close("log-probs in bfloat16, cached and full, mean", gaps.abs().mean(), 0.05)
    close("log-probs in bfloat16, cached and full, bias", gaps.mean().abs(), 0.02)
