"""results/exercises.md: each patch fits the code as it stands, and does what is said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

HERE = Path(__file__).with_name("exercises")
PATCHES = sorted(path.stem for path in HERE.glob("*.patch"))
RUN = "--steps 3 --batch_size 6 --pool_problems 30 --eval_n 2 --eval_every 0 --lr 1e-3 "
RUN += "--reflection_tokens 64"
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git applies the patches")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a copy of the program, patched or not: (metrics, episodes)."""
    home = tmp_path_factory.mktemp("exercises")

    def run(name=None, *options):
        folder, out = home / str(name), home / f"{name}{options}"
        if not folder.exists():
            folder.mkdir()
            for path in ROOT.glob("*.py"):
                shutil.copy(path, folder)
            for part in ("tasks", "tiny"):
                shutil.copytree(ROOT / part, folder / part)
            if name:
                patch = HERE / f"{name}.patch"
                subprocess.run(["git", "apply", patch], cwd=folder, check=True)
        pool = ["--pool", home / "None()" / "pool.jsonl"] if name else []
        command = [sys.executable, "train.py", *RUN.split(), *options, *pool]
        subprocess.run([*command, "--out", out], cwd=folder, check=True)
        files = (out / "metrics.jsonl", out / "episodes.jsonl")
        return [[json.loads(line) for line in f.read_text().splitlines()] for f in files]

    run.plain, _ = run()
    return run


def test_each_is_told_and_is_small():
    text = (ROOT / "results" / "exercises.md").read_text()
    assert len(PATCHES) == 5
    for name in PATCHES:
        assert f"tests/exercises/{name}.patch" in text
        lines = (HERE / f"{name}.patch").read_text().splitlines()
        changed = [x for x in lines if x[0] in "+-" and x[:3] not in ("+++", "---")]
        assert len(changed) <= 10


def test_1_leave_one_out_only_scales(run):
    """By G / (G - 1), to the last digits of a rounding."""
    metrics, _ = run("1-leave-one-out")
    ratio = metrics[0]["grad_norm"] / run.plain[0]["grad_norm"]
    assert ratio == pytest.approx(8 / 7, rel=1e-3)


def test_2_a_price_for_length_gives_every_group_a_signal(run):
    metrics, episodes = run("2-a-price-for-length")
    assert metrics[0]["groups_with_signal"] == 6 >= run.plain[0]["groups_with_signal"]
    first = [e for e in episodes if e["step"] == 1]
    for e in first:
        right = e["retry_verdicts"][0]["ok"]
        assert e["reward"] == pytest.approx(right - 0.002 * len(e["reflection"]["ids"]))


def test_3_without_a_baseline_nothing_is_pushed_down(run):
    metrics, episodes = run("3-no-baseline")
    assert {e["advantage"] for e in episodes} == {0.0, 1.0}
    assert metrics[0]["trained_tokens"] == run.plain[0]["trained_tokens"]


def test_4_a_mask_that_leaks_is_seen_in_the_gap(run):
    metrics, _ = run("4-train-the-glue")
    assert metrics[0]["trained_tokens"] > run.plain[0]["trained_tokens"]
    assert metrics[0]["gap_mean"] > 1000 * run.plain[0]["gap_mean"]


def test_5_another_kl_pulls_where_there_is_nothing_to_pull(run):
    """At the first step the model is its own reference: k3 has no gradient there."""
    strong = ("--kl_beta", "20")
    metrics, _ = run("5-another-kl", *strong)
    k3, _ = run(None, *strong)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert k3[0]["grad_norm"] == pytest.approx(run.plain[0]["grad_norm"], rel=1e-3)
    assert metrics[0]["grad_norm"] > 2 * k3[0]["grad_norm"]
