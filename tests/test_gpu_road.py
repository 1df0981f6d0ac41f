"""The road on a GPU where there is none: gpu_road.py on the pretended GPU, which changes
torch for good and so has a process of its own."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

cpu_build = sys.platform == "linux" and torch.version.cuda is None


@pytest.mark.skipif(not cpu_build, reason="it pretends inside a CPU build on Linux")
def test_the_road_on_a_gpu_holds_on_a_pretended_one():
    """A step can be recorded for every way of drawing; three turns by replayed graphs, also
    after the weights have moved; a step that synchronises is refused; a run's sampling,
    pool, evaluations and forward passes equal the CPU's; the optimizer steps alike."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "gpu_road.py"], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout + done.stderr
