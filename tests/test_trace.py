"""extras/trace.py: each of its figures, made by hand, is what rrr.py has."""

import re

import pytest
import torch
from conftest import close

import rrr
from config import Config, open_model, parse
from extras import trace


@pytest.fixture(scope="module", params=["countdown", "function_calling"])
def opened(request):
    """(model, chat, rollout, config) of an embedded model."""
    words = ["--task", request.param, "--device", "cpu", "--group_size", "4"]
    config, _ = parse(words, "", "train.py")
    model, chat, task = open_model(config)
    return model, chat, rrr.Rollout(model, chat, task, config), config


def test_every_figure_is_that_of_rrr(opened):
    """Prevents: a lesson that teaches another method than the one that is run."""
    model, _, rollout, config = opened
    group = trace.find_group(rollout, config)
    figures = trace.trace(model, group, config.temperature)
    by_hand = {name: p.grad.clone() for name, p in model.named_parameters()}

    assert len({e.group for e in group}) == 1 and len({e.reward for e in group}) == 2
    tokens, by_plain_pass = 0, []
    for e, own in zip(group, figures["siblings"], strict=True):
        assert own["advantage"] == pytest.approx(e.advantage, rel=1e-9)
        assert (own["ids"], own["mask"]) == rrr.ids_and_mask(e)[:2]
        tokens += sum(own["mask"])
        by_plain_pass.append(own["logps"][torch.tensor(own["mask"][1:])])
    assert figures["weight"] == pytest.approx(1 / tokens)

    (batch,) = rrr.make_batches(group, config)
    logps = rrr.trained_logps(model, batch, config.temperature)  # (1, T)
    shared = logps[batch.mask].detach()  # of all siblings, one after another
    close("trace, log-probs", (shared - torch.cat(by_plain_pass)).abs().max(), 1e-4)
    loss, _, _ = rrr.grpo_loss(logps, logps.detach(), None, batch, config)
    by_hand_loss = sum(own["loss"] for own in figures["siblings"])
    assert by_hand_loss == pytest.approx(loss.item(), abs=1e-6)
    model.zero_grad()
    rrr.backward(model, [batch], None, None, config)
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().clamp(min=1e-6)
        close("trace, gradient", (by_hand[name] - p.grad).abs().max() / scale, 1e-3)


def test_a_trained_token_is_pushed_and_an_untrained_one_is_not(opened):
    """Where a reflection was preferred, descent raises the logit of each of its ids by what
    it takes from all others; nothing moves a logit elsewhere."""
    model, _, rollout, config = opened
    group = trace.find_group(rollout, config)
    figures = trace.trace(model, group, config.temperature)
    for sibling in figures["siblings"]:
        ids, advantage, grads = sibling["ids"], sibling["advantage"], sibling["grads"]
        trained = torch.tensor(sibling["mask"][1:])  # (T - 1,)
        assert (grads[~trained] == 0).all()
        own = grads[torch.arange(len(ids) - 1), ids[1:]][trained]  # (n,)
        assert (own * advantage <= 0).all() and (own != 0).any()
        assert grads.sum(-1).abs().max() < 1e-6


def test_it_is_printed(capsys):
    """The group of the first failure, its ids with their mask; no traceback for a typo."""
    trace.main([])
    out = capsys.readouterr().out
    assert out.count("advantage +") >= 1 and out.count("advantage -") >= 1
    rows = [line.split() for line in out.splitlines() if line[:5].strip().isdigit()]
    trained = min(5, int(re.search(r"(\d+) trained", out)[1]))
    assert trained and [row[-4] for row in rows] == ["0"] * 3 + ["1"] * trained
    assert [row[-2:] for row in rows[:3]] == [["-0.00000", "+0.00000"]] * 3
    with pytest.raises(SystemExit, match="did you mean --group_size"):
        trace.main(["--group_sise", "4"])


def test_without_a_mended_failure_it_says_so(opened):
    *_, rollout, config = opened
    config = Config(**vars(config) | {"seed": 3})
    nothing = {"ok": False, "error": "no answer", "detail": ""}
    rollout = rrr.Rollout(rollout.model, rollout.chat, rollout.task, config)
    rollout.verify = lambda problem, turn: nothing
    with pytest.raises(rrr.UserError, match="try another --seed"):
        trace.find_group(rollout, config)
