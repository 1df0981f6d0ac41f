"""The road on a GPU, without one: run by test_gpu_road.py in a process of its own."""

from contextlib import nullcontext

import pytest
import torch
from conftest import random_model
from pretended_gpu import GPU, Forbidden, Graph
from test_sampler import STOPS, three_turns
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eval as evaluation
import rrr
import train
from config import Config, seeded
from extras import cuda_graphs
from sampler import DecodingState, KVCache
from train import read_rows


class Strict(TorchDispatchMode):
    """FakeTensorMode refuses what asks the GPU for a number; this, what is on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        devices = {t.device.type for t in leaves if isinstance(t, torch.Tensor)}
        assert "cpu" not in devices, f"{func} meets the CPU in a recorded step"
        return out


@pytest.mark.parametrize("temperature", [0, 1.0, 0.7])
def test_a_step_can_be_recorded(temperature):
    """Prevents: a number that Python needs from the GPU, a tensor made on the CPU."""
    with FakeTensorMode(), torch.device("cuda"):
        model = random_model()
        for p in model.parameters():
            p.data = p.data.bfloat16()
        with torch.inference_mode():
            state = DecodingState(KVCache(model, 48, 300), 40)
            state.cache.grow(300)
            state.begin(torch.rand(48, 40), STOPS, temperature)
            with Strict():
                state.step(32, 256)


@pytest.fixture
def graphs(monkeypatch):
    """Steps are recorded by the pretended GPU. Its tensors do not live in inference
    mode. Lists the pools that record() was given."""
    pools = []

    def record(step, pool):
        pools.append(pool)
        return Graph(step).replay, pool or object()

    monkeypatch.setattr(cuda_graphs, "record", record)
    for name in ("extend", "sample"):
        plain = getattr(KVCache, name).__wrapped__
        monkeypatch.setattr(KVCache, name, torch.no_grad()(plain))
    return pools


def ids_of_three_turns(model):
    turns = three_turns(model, seed=0, G=6, last_temperature=0)
    return [(turn.ids, turn.stopped) for turn in turns]


@torch.no_grad()
def halve(model):
    for p in model.parameters():
        p.mul_(0.5)


def test_three_turns_by_replayed_graphs_equal_the_eager_ones(graphs):
    """Also after the weights have moved. Prevents: a tensor that a step replaces instead of
    writing to, weights that a graph keeps a copy of, a pool for each graph."""
    model, moved = random_model(), random_model()
    expected = ids_of_three_turns(model)
    halve(moved)
    expected_moved = ids_of_three_turns(moved)
    assert expected != expected_moved and not graphs
    with GPU:
        model = model.to("cuda")
        model.set_context(model.context)
        cuda_graphs.sample_by_graphs(model)
        assert ids_of_three_turns(model) == expected
        halve(model)
        assert ids_of_three_turns(model) == expected_moved
    state = model.graphed_state
    assert len(state.graphs) > 3
    of_this_state = graphs[-len(state.graphs) :]
    assert of_this_state[0] is None and set(of_this_state[1:]) == {state.pool}


def test_a_step_that_synchronises_is_refused(graphs, monkeypatch):
    """Prevents: a pretended GPU that would let everything pass."""
    step = DecodingState.step

    def bad(self, n, S):
        step(self, n, S)
        self.alive[:n].any().item()

    monkeypatch.setattr(DecodingState, "step", bad)
    with GPU, pytest.raises(Forbidden):
        model = random_model().to("cuda")
        model.set_context(model.context)
        cuda_graphs.sample_by_graphs(model)
        ids_of_three_turns(model)


QUICK = "--steps 2 --batch_size 4 --group_size 4 --pool_problems 24 --eval_n 16"
QUICK = f"{QUICK} --attempt_tokens 32 --reflection_tokens 24 --retry_tokens 32".split()


def forward_only(model, reference, optimizer, batches, config, step):
    """In place of train.update: the pretended GPU has no backward pass. That and the
    optimizer are tested on a twin on the CPU, in test_train.py and test_loss.py."""
    losses, T = [], config.temperature
    with torch.no_grad():
        for batch in batches:
            logps = rrr.trained_logps(model, batch, T)
            ref_logps = rrr.trained_logps(reference, batch, T) - 0.1
            loss, _, _ = rrr.grpo_loss(logps, logps - 0.1, ref_logps, batch, config)
            losses.append(loss.item())
    return {"loss": sum(losses), "skipped": 0}


ON_THE_CPU = torch.nn.Linear(1, 1)


def seeded_on_the_cpu(model, *names):
    """In place of seeded: there is no CUDA generator, and both shall draw the same."""
    return seeded(ON_THE_CPU, *names)


def story(run):
    """What happened in a run, without times and rounding."""
    turns = []
    for row in read_rows(run / "pool.jsonl") + read_rows(run / "episodes.jsonl"):
        for turn in [row["attempt"], row["reflection"], *row["retries"]]:
            turns.append(turn and (turn["prompt_ids"], turn["ids"], turn["stopped"]))
        turns.append((row["reward"], row["advantage"]))
    return turns, read_rows(run / "eval.jsonl")


def test_a_run_gives_what_it_gives_on_the_cpu(graphs, monkeypatch, tmp_path):
    """train.py on the embedded model: pool, both evaluations, steps, forward passes.
    Prevents: tensors on two devices, anywhere on that road."""
    monkeypatch.setattr(train, "update", forward_only)
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: None)
    for module in (train, evaluation):
        monkeypatch.setattr(module, "seeded", seeded_on_the_cpu)
    train.main([*QUICK, "--device", "cpu", "--out", str(tmp_path / "cpu")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 0)
    with GPU:
        train.main([*QUICK, "--device", "cuda", "--out", str(tmp_path / "gpu")])
    assert graphs, "no step was recorded"
    assert story(tmp_path / "gpu") == story(tmp_path / "cpu")
    losses = {}
    for device in ("cpu", "gpu"):
        metrics = read_rows(tmp_path / device / "metrics.jsonl")
        losses[device] = [row["loss"] for row in metrics if "loss" in row]
    assert losses["cpu"] and losses["gpu"] == pytest.approx(losses["cpu"], abs=1e-5)


@pytest.mark.parametrize("device", ["same", "cpu"])
def test_masters_on_either_device_step_as_on_the_cpu(device):
    """bfloat16 weights, gradients of two micro-batches handed over, a step. Prevents:
    masters that meet their gradients on another device."""
    config = Config(optimizer_device=device, lr=1e-2)
    models = [random_model().bfloat16(), random_model().bfloat16()]
    weights = []
    for model, where in zip(models, ("cpu", "cuda")):
        with GPU if where == "cuda" else nullcontext():
            model = model.to(where)
            optimizer = train.MasterAdamW(model.parameters(), config)
            expected = "cpu" if device == "cpu" else where
            assert {m.device.type for m in optimizer.masters} == {expected}
            for seed in (1, 2):
                draws = torch.Generator().manual_seed(seed)
                for p, master in zip(optimizer.parameters, optimizer.masters):
                    grad = torch.randn(p.shape, generator=draws).bfloat16()
                    p.grad = grad.to(where)
                    optimizer.collect(master, p)
            assert optimizer.step(1e-2, 1.0) is not None
            weights.append([p.detach().cpu().float().tolist() for p in model.parameters()])
    assert weights[0] == weights[1]
