"""extras/report.py: the page says what the files say, and obeys nothing that they hold."""

import json
import math
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import CHROMIUM, DRIVER, Browser
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models

import rrr
from config import Config, parse
from extras import report
from model import resolve
from rrr import Episode, Turn

HOSTILE = "</script><script>window.bad = 1</script><img src=x onerror='window.bad = 2'>"
HOSTILE += "\"'&amp;\0\u202edlrow\u200f\x1b[31m\x7f {{data}} 7*6=42"
IN_TOKENS = re.sub("[\u202e\u200f]", 3 * "\ufffd", HOSTILE)  # their bytes are tokens
ACCURACY = {"rel": 1e-5, "abs": 1e-9}  # the page holds six digits


def turn(chat, prompt: str, text: str, seed=0) -> Turn:
    ids = chat.encode(text) + [min(chat.stop_ids)]
    logps = [-((seed * 7 + i * 13) % 40) / 16 - 0.001234567 for i in range(len(ids))]
    return Turn(ids, logps, True, chat.encode(prompt), text)


def failure(chat, step, group, rewards, words="I got 13, not 63: too low."):
    """One failure, and a reflection for each reward."""
    problem = {"key": f"{step},{group}=63"}
    attempt = turn(chat, f"<|im_start|>user\nproblem {step}", "<answer>1+2</answer>", group)
    wrong = {"ok": False, "error": "missed target", "detail": "it gives 3, not 63"}
    right, episodes = {"ok": True, "error": "", "detail": ""}, []
    for i, reward in enumerate(rewards):
        reflection = turn(chat, "\nReflect.", f"{words} {'again ' * (i % 3)}", i)
        retry = turn(chat, "\nRetry.", f"<answer>{i}</answer>", i + 1)
        verdict = right if reward else wrong
        done = {"retries": [retry], "retry_verdicts": [verdict], "reward": reward}
        episodes.append(Episode(problem, group, attempt, wrong, reflection, **done))
    return episodes


def evaluation(share: float) -> dict:
    part = {"n": 40, "rate": share, "low": share / 2, "high": (1 + share) / 2}
    errors = {"no answer": 1, "missed target": 7}
    counts = {"problems": 40, "first_errors": errors, "second_errors": errors}
    return counts | dict.fromkeys(("first_try", "second_try", "retry_success"), part)


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture
def make_run(tmp_path, tiny_chat):
    def make(name="run", steps=6, groups=None, **options):
        run = tmp_path / name
        run.mkdir()
        config, _ = parse(["--model=tiny", "--device=cpu"], "", "train.py")
        config.__dict__.update({"steps": steps} | options)
        config.model = str(ROOT / "tiny")
        (run / "config.json").write_text(json.dumps(asdict(config)))
        metrics, episodes = [], []
        for step in range(1, steps + 1):
            rewards = [[1.0, 0.0, 0.0, 0.0], [0.0] * 4, [1.0, 1.0, 0.0, 0.0]]
            rows = []
            for group, some in enumerate(rewards):
                rows += (groups or failure)(tiny_chat, step, group, some)
            rrr.assign_advantages(rows, config.scale_advantages)
            episodes += [{"step": step} | asdict(e) for e in rows]
            numbers = {"reward": 0.1 * step + 0.01234, "reflection_tokens": 10.0 + step}
            numbers |= {"groups": 3, "groups_with_signal": 2, "first_try": None}
            numbers |= {"seconds": {"sample": 1.5, "train": 0.5}, "kl": 0.001 * step}
            metrics.append({"step": step} | numbers)
        lines(run / "metrics.jsonl", metrics)
        lines(run / "episodes.jsonl", episodes)
        shares = [{"step": 0} | evaluation(0.25), {"step": steps} | evaluation(0.75)]
        lines(run / "eval.jsonl", shares)
        return run

    return make


def hostile(chat, step, group, rewards):
    episodes = failure(chat, step, group, rewards, HOSTILE)
    for e in episodes:
        e.problem["key"] = HOSTILE
        for verdict in (e.attempt_verdict, *e.retry_verdicts):
            verdict["detail"] = HOSTILE
    return episodes


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def to_episode(row: dict) -> Episode:
    row = row | {"retries": [Turn(**turn) for turn in row["retries"]]}
    for name in ("attempt", "reflection"):
        row[name] = row[name] and Turn(**row[name])
    return Episode(**row)


def data_of(page: Path) -> dict:
    """What the page's script reads."""
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    found = re.findall(pattern, page.read_text(), re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


# ---- what the page holds ----
def test_no_text_of_a_model_ends_the_script(make_run):
    """Prevents: a page that runs what a model wrote."""
    page = report.write_page([make_run(groups=hostile)])
    template = (ROOT / "extras/report_page.html").read_text()
    text = page.read_text()
    assert text.count("<") == template.count("<") and text.isascii() == template.isascii()
    (run,) = data_of(page)["runs"]
    first = run["groups"][0][0]
    assert first["problem"]["key"] == first["attempt_verdict"]["detail"] == HOSTILE
    wrote = first["reflection"]["ids"]
    assert IN_TOKENS in "".join(run["vocabulary"][str(i)] for i in wrote)
    assert not re.search(r"(inner|outer)HTML|insertAdj|document\.write|\beval\(", template)
    assert template.count("\n") <= 500  # whoever adds to it finds what can go
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\(", template)


def test_the_numbers_are_those_of_the_files(make_run):
    """Prevents: curves and episodes that are not what was measured."""
    run = make_run()
    (data,) = data_of(report.write_page([run]))["runs"]
    for row, metrics in zip(data["curves"], rows_of(run / "metrics.jsonl"), strict=True):
        assert row["step"] == metrics["step"]
        for name in ("reward", "kl", "reflection_tokens"):
            assert row[name] == pytest.approx(metrics[name], **ACCURACY)
        assert row["sample"] == metrics["seconds"]["sample"]
    rows = {}
    for row in rows_of(run / "episodes.jsonl"):
        rows.setdefault((row["step"], row["group"]), []).append(row)
    assert len(data["groups"]) == 6 * 3
    for group in data["groups"]:
        source = rows[group[0]["step"], group[0]["group"]]
        for e, row in zip(group, source, strict=True):
            assert e["advantage"] == pytest.approx(row["advantage"], **ACCURACY)
            for name in ("problem", "reward", "attempt_verdict", "retry_verdicts"):
                assert e[name] == row[name]
            turns = zip(report.turns_of(e), report.turns_of(row), strict=True)
            for shown, read in turns:
                assert shown["logps"] == pytest.approx(read["logps"], **ACCURACY)
                assert shown | {"logps": None} == read | {"logps": None}
    assert data["evals"] == rows_of(run / "eval.jsonl")


@pytest.mark.parametrize("loss_norm", ["token", "sequence", "constant"])
@pytest.mark.parametrize("train_on", rrr.TRAINED_TURNS)
def test_mask_and_weights_are_those_of_training(make_run, train_on, loss_norm):
    """Prevents: a second account of the mask; weights where a group has no signal, because
    another group holds the same reflection."""
    run = make_run(steps=1, train_on=train_on, loss_norm=loss_norm)
    config = Config(**json.loads((run / "config.json").read_text()))
    rows = rows_of(run / "episodes.jsonl")
    source = [to_episode(row) for row in rows if row.pop("step")]
    tokens = kept = total = 0
    for e in source:
        if e.group != 1:  # that one has no signal
            tokens, kept = tokens + sum(rrr.ids_and_mask(e, train_on)[1]), kept + 1
    for group in report.read_run(run)["groups"]:
        own = [e for e in source if e.group == group[0]["group"]]
        for shown, e in zip(group, own, strict=True):
            _, mask, _ = rrr.ids_and_mask(e, train_on)
            weight = 1 / rrr.denominator(mask, tokens, kept, config) * (e.group != 1)
            found = []
            for i, n in enumerate(shown["mask"]):
                found += n * [shown["weight"] if i % 2 else None]
                total += n * shown["weight"] * (i % 2)
            assert [w is not None for w in found] == mask
            expected = [pytest.approx(weight, **ACCURACY) if m else None for m in mask]
            assert found == expected
    assert loss_norm == "constant" or total == pytest.approx(1, rel=1e-3)


def test_whole_groups_of_steps_spread_evenly(make_run):
    """Prevents: a sample of the best, siblings without their failures, a lost last step."""
    data = report.read_run(make_run(steps=40))
    steps = sorted({group[0]["step"] for group in data["groups"]})
    assert len(steps) == report.STEPS and (steps[0], steps[-1]) == (1, 40)
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert max(gaps) - min(gaps) <= 1
    assert all(len(group) == 4 for group in data["groups"])
    kinds = [group[0]["group"] for group in data["groups"] if group[0]["step"] == 40]
    assert sorted(kinds) == [0, 1, 2]  # with signal, and one without


def test_each_sibling_shows_its_own_attempt(make_run, tiny_chat):
    """Of plain GRPO. Prevents: eight times the first one's answer."""

    def answers(chat, step, group, rewards):
        episodes = failure(chat, step, group, rewards)
        for i, e in enumerate(episodes):
            e.attempt = turn(chat, "problem", f"<answer>{i}</answer>", i)
            e.reflection, e.retries, e.retry_verdicts = None, [], []
        return episodes

    run = make_run(groups=answers, train_on="attempt")
    data = report.read_run(run)
    for group in data["groups"]:
        assert all(report.turns_of(e) == [e["attempt"]] for e in group)
        assert len({str(e["attempt"]["ids"]) for e in group}) == 4
        for e in group:
            attempt = e["attempt"]
            assert e["mask"] == [len(attempt["prompt_ids"]), len(attempt["ids"])]
    report.show_text(run, 1)


def long_failure(chat, step, group, rewards):
    """As long as those of a real model."""
    episodes = failure(chat, step, group, rewards * 2)
    for e in episodes:
        for t, n in ((e.attempt, 512), (e.reflection, 256), (e.retries[0], 512)):
            t.ids, t.logps = (t.ids * n)[:n], (t.logps * n)[:n]
    return episodes


def test_a_page_of_1000_steps_has_3_megabytes_at_most(make_run, tmp_path):
    """Prevents: a page that no browser opens, or no mail takes; an empty viewer."""
    run = make_run(steps=11, groups=long_failure)
    (metrics, *_), rows = (
        rows_of(run / "metrics.jsonl"),
        (run / "episodes.jsonl").read_text(),
    )
    lines(run / "metrics.jsonl", [metrics | {"step": step} for step in range(1, 1001)])
    at = [1 + 999 * i // 11 for i in range(12)]
    for old, new in zip(range(11, 0, -1), at[:0:-1]):  # the page takes these
        rows = rows.replace(f'{{"step": {old},', f'{{"step": {new},')
    (run / "episodes.jsonl").write_text(rows)
    page = report.write_page([run])
    assert page.stat().st_size < 3e6
    steps = {group[0]["step"] for group in data_of(page)["runs"][0]["groups"]}
    assert len(steps) >= 10 and 1000 in steps
    both = report.write_page([run, run], tmp_path / "both.html")
    assert both.stat().st_size < 3e6


def test_numbers_that_json_does_not_know(make_run):
    """Prevents: a page that stays empty because of one NaN."""

    def broken(chat, step, group, rewards):
        episodes = failure(chat, step, group, rewards)
        episodes[0].reflection.logps[0] = -math.inf
        return episodes

    run = make_run(groups=broken)
    rows = rows_of(run / "metrics.jsonl")
    lines(
        run / "metrics.jsonl", [row | {"kl": math.nan, "step": row["step"]} for row in rows]
    )
    (data,) = data_of(report.write_page([run]))["runs"]
    assert data["groups"][0][0]["reflection"]["logps"][0] is None
    assert data["curves"][0]["kl"] is None


def same_form(chat, step, group, rewards):
    return failure(chat, step, group, rewards, f"I got {step}, not {group}.")


def test_reflections_are_counted(make_run):
    """Prevents: a collapse to one template that the page does not tell."""
    first, last = report.read_run(make_run(steps=12, groups=same_form))["ends"]
    assert (first["step"], last["step"]) == (1, 12)
    assert len(first["scores"]) == 12
    assert first["texts"] == 9  # three lengths for each of 3 failures
    assert first["shapes"] == 3 and first["most"] == 6
    assert first["shape"] == "I got #, not #. "
    mean = sum(reward for _, reward in first["scores"]) / 12
    assert mean == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("task", ["countdown", "function_calling"])
def test_an_embedded_models_defaults_are_called_a_change(task, tmp_path):
    """Where the folder had another name than the model, the page took a laptop's defaults
    for real models as the usual ones."""
    config, _ = parse(["--task", task], "", "train.py")
    name, config.model = config.model, f"{resolve(config.model)}/"
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    config, _ = report.open_run(tmp_path)
    assert config.model == name and report.describe(config, [])["options"] == []


def test_options_that_differ_and_no_path_of_a_machine(make_run, tmp_path):
    """Prevents: a page that tells its reader's home folder; one that hides an ablation."""
    run = make_run(kl_beta=0.5, steps=36, pool=str(tmp_path / "secret" / "pool.jsonl"))
    data = report.read_run(run)
    assert data["options"] == [("kl_beta", "0.5", "0.001"), ("pool", "pool.jsonl", "")]
    text = report.write_page([run]).read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text
    hub = tmp_path / "hub" / "models--Qwen--Qwen2.5-1.5B-Instruct" / "snapshots"
    copied = shutil.copytree(ROOT / "tiny", hub / "0123")
    values = json.loads((run / "config.json").read_text()) | {"model": str(copied)}
    (run / "config.json").write_text(json.dumps(values))
    assert report.read_run(run)["facts"]["model"] == "Qwen/Qwen2.5-1.5B-Instruct"


def test_runs_that_are_not_whole(make_run, tmp_path, tiny_chat):
    """Prevents: no page where a run was killed, has no signal, or was only evaluated."""
    run = make_run()
    with open(run / "episodes.jsonl", "a") as file:
        file.write('{"step": 6, "problem": {"ke')
    assert len(report.read_run(run)["groups"]) == 18
    (run / "eval.jsonl").unlink()
    assert report.read_run(run)["evals"] == []
    (run / "episodes.jsonl").write_text("")
    assert report.read_run(run)["groups"] == []
    for name in ("metrics.jsonl", "episodes.jsonl"):
        (run / name).unlink()
    solved = Episode({"key": "x"}, 0, turn(tiny_chat, "p", "a"), {"ok": True})
    rows = failure(tiny_chat, 1, 0, [1.0]) + failure(tiny_chat, 1, 0, [0.0]) + [solved]
    lines(run / "eval_episodes.jsonl", map(asdict, rows))  # ids of groups come again
    content = {"config": asdict(Config()), "report": evaluation(0.5) | {"controls": {}}}
    (run / "eval.json").write_text(json.dumps(content))
    (run / "config.json").unlink()
    groups = report.read_run(run)["groups"]
    assert [[e["reward"] for e in group] for group in groups] == [[1.0], [0.0]]
    assert [group[0]["group"] for group in groups] == [0, 1]
    with pytest.raises(SystemExit, match="it is not a run"):
        report.main([str(tmp_path)])


def test_a_token_keeps_its_space():
    """Prevents: words run together, since a decoder drops the space that begins a text."""
    words = {"<unk>": 0, "a": 1, "\u2581a": 2, "\u2581the": 3, "<0xE2>": 4}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    chat = SimpleNamespace(tokenizer=tokenizer, encode=lambda text: [2])
    attempt = {"prompt_ids": [1, 2], "ids": [3, 4]}
    groups = [[{"attempt": attempt, "reflection": None, "retries": []}]]
    assert report.vocabulary(groups, chat) == {1: "a", 2: " a", 3: " the", 4: "\ufffd"}


def test_a_page_that_fails_loses_no_run(make_run, capsys, monkeypatch):
    """Prevents: an exit code of hours of training that a full disk decides; half a page in
    place of the one before."""
    run = make_run()
    page = report.write_page([run])
    before = page.read_text()

    def full_disk(path, text, **_):
        path.write_bytes(text[:9].encode())
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        report.at_the_end(run)
    assert "There is no page" in capsys.readouterr().out and page.read_text() == before
    page.unlink()
    (run / "report.html").mkdir()  # cannot be replaced
    report.at_the_end(run)
    assert "There is no page" in capsys.readouterr().out
    (run / "metrics.jsonl").write_text("[1, 2]\n{]\n")
    report.at_the_end(run)
    assert "There is no page" in capsys.readouterr().out


# ---- the terminal ----
def test_text_for_pipes_and_terminals(make_run, capsys, monkeypatch):
    """Prevents: colour codes in a file; a model's text that steers the terminal."""
    run = make_run(groups=hostile)
    report.main([str(run), "--text", "2"])
    plain = capsys.readouterr().out
    assert not set("\x1b\0\x7f\u202e\u200f") & set(plain)
    assert "\\x1b[31m" in plain and "\\u202edlrow" in plain
    assert plain.count("Reflect.[[</script>") == 2 == plain.count("]]")
    assert plain.count("advantage 1.73") == 2  # the highest
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    report.main([str(run), "--text", "1"])
    coloured = capsys.readouterr().out
    assert coloured.count("\x1b[1;36m") == 1 == coloured.count("\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    report.main([str(run), "--text", "1"])
    assert "\x1b" not in capsys.readouterr().out


# ---- in a browser ----
@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver here: the page is not looked at")
    with Browser() as browser:
        yield browser


def seen(browser, selector):
    return browser.run(f"return document.querySelector('{selector}').textContent")


def test_a_click_through_the_page(browser, make_run):
    """Prevents: a viewer that shows another episode than its address says, a number that is
    not the file's, a page that needs the network, or complains."""
    run = make_run()
    page = report.write_page([run])
    browser.look()
    browser.open(page)
    rows = rows_of(run / "episodes.jsonl")
    last = rows_of(run / "metrics.jsonl")[-1]

    # 1. the reward of the last step, as the curve reads
    assert f"step 6: {last['reward']:.4g}" in seen(browser, "figcaption")
    # 2. what is shown first was preferred most: its advantage and its reward
    assert "Step 6, failure 0, reflection 1 of 4" in seen(browser, "#episode h3")
    (row,) = [r for r in rows if (r["step"], r["group"], r["reward"]) == (6, 0, 1.0)]
    assert f"trained, advantage +{row['advantage']:.2f}" in seen(browser, "#episode")
    assert "mean of all 4 siblings: 0.25" in seen(browser, "#episode p")
    # 3. a token's log-prob, where it is focused; its neighbour by an arrow key
    token = "document.querySelectorAll('.reflection .token')[1]"
    browser.run(f"{token}.focus()")
    told = seen(browser, "#detail")
    logp, own = row["reflection"]["logps"][1], row["reflection"]["ids"][1]
    assert f"id {own}; log-prob \u2212{-logp:.4g}" in told and "weight" in told
    browser.keys("\ue014")  # the right arrow
    assert f"id {row['reflection']['ids'][2]};" in seen(browser, "#detail")

    # what is coloured is what was trained
    marked = "return [...document.querySelectorAll('.up, .down')].filter(t => "
    marked += "t.closest('.turn')).map(t => t.closest('.turn').classList[1])"
    assert browser.run(marked) == ["reflection"] * len(row["reflection"]["ids"])
    browser.click("#show-mask")
    assert browser.run("return document.querySelectorAll('.turn .one').length") == len(
        row["reflection"]["ids"]
    )
    browser.click("#show-probability")
    assert browser.run("return document.querySelectorAll('.turn .likely').length") == sum(
        len(t["ids"]) for t in (row["attempt"], row["reflection"], row["retries"][0])
    )
    # next, a sibling, and back by its address
    browser.click("#next")
    assert "reflection 2 of 4" in seen(browser, "#episode h3")
    assert browser.run("return document.activeElement.id") == "next"
    browser.keys("jk")
    browser.click("#sibling-3")
    address = browser.run("return location.hash")
    assert "episode=6-0-4" in address and "show=probability" in address
    browser.open(page, address)
    assert "reflection 4 of 4" in seen(browser, "#episode h3")
    # filters, and an order
    browser.open(page, "#step=3&outcome=rewarded&order=advantage%2C+highest")
    assert "episode 1 of 3" in seen(browser, "#steer")
    assert "Step 3, failure 0, reflection 1" in seen(browser, "#episode h3")
    browser.open(page, "#words=problem+5")
    assert "of 12" in seen(browser, "#steer")
    browser.click("#words")
    browser.keys("000")
    assert "0 episodes" in seen(browser, "#steer")
    for odd in (
        "#run=9&show=constructor&order=constructor",
        "#run=length",
        "#%E0%A4%A",
        "#=",
    ):
        browser.open(page, odd)
        assert "reflection 1 of 4" in seen(browser, "#episode h3")
    loaded = "return performance.getEntriesByType('resource').length"
    assert browser.run(loaded) == 0 and browser.complaints() == []


def test_the_page_tells_how_reflections_were_counted(browser, make_run):
    run = make_run(steps=12, groups=same_form)
    browser.look()
    browser.open(report.write_page([run]))
    table = "return [...document.querySelectorAll('#choice tr')].map(row => "
    table += "[...row.cells].map(cell => cell.textContent))"
    (_, *steps), *rows = browser.run(table)
    assert steps == ["step 1", "step 12"]
    found = {name: first for name, first, _ in rows}
    assert found["reflections"] == "12"
    assert found["distinct"] == "75.0%"  # three lengths for each of 3 failures
    assert found["distinct, whatever their numbers"] == "25.0%"
    assert found["share of the commonest form"] == "50.0%"
    assert seen(browser, "#choice .mono").strip() == "I got #, not #."
    rewards = {}
    for row in rows_of(run / "episodes.jsonl"):
        if row["step"] == 1:
            rewards.setdefault(len(row["reflection"]["ids"]), []).append(row["reward"])
    n = 0
    for name, first in found.items():
        if ranged := re.match(r"mean reward, (\d+) to (\d+) tokens", name):
            low, high = map(int, ranged.groups())
            own = sum([rewards.get(m, []) for m in range(low, high + 1)], [])
            n += len(own)
            if own:
                assert first == f"{sum(own) / len(own):.4g} (n = {len(own)})"
    assert n == 12
    assert browser.complaints() == []


def test_hostile_text_is_shown_and_not_obeyed(browser, make_run):
    """Prevents: markup that runs, marks that turn a line around, a NUL that ends it."""
    browser.look()
    browser.open(report.write_page([make_run(groups=hostile)]))
    for selector, words in [
        (".reflection .tokens", IN_TOKENS),
        (".attempt header", HOSTILE),
        ("#episode h3", HOSTILE),
    ]:
        shown = re.sub(r"[\0\x1b\x7f\u202e\u200f]", lambda c: f"\\u{ord(c[0]):04x}", words)
        assert shown in seen(browser, selector)
    assert browser.run("return [window.bad, document.images.length]") == [None, 0]
    assert browser.run("return document.querySelectorAll('script').length") == 2
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_two_runs_fit_every_width(browser, make_run, width, dark):
    """Prevents: a page that must be pushed sideways; one run's curve under another's name;
    text that cannot be read on its colour."""
    runs = [make_run("one"), make_run("two", steps=9)]
    browser.look(width, 900, dark)
    browser.open(report.write_page(runs))
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert "one, reward 0.9123" not in seen(browser, "figcaption")
    assert "two, reward 0.9123" in seen(browser, "figcaption")
    assert browser.run("return document.querySelectorAll('#figures table').length") == 4
    browser.run("document.getElementById('finder').open = true")
    browser.run("document.querySelector('#pick-run option:nth-child(2)').selected = true")
    browser.run("document.getElementById('pick-run').dispatchEvent(new Event('change'))")
    assert "Step 9" in seen(browser, "#episode h3")
    assert browser.complaints() == []
    for mode in ("advantage", "probability", "mask"):
        browser.click(f"#show-{mode}")
        assert min(browser.run(CONTRAST)) >= 4.5, mode
    browser.complaints()  # of the canvas


# Of the text of all kinds of tokens, on what is behind it, as WCAG defines it.
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d");
function seen(...colours) {
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  const light = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
}
const page = getComputedStyle(document.body).backgroundColor, ratios = [];
for (const node of document.querySelectorAll(".token, .quiet, th, button, b, label")) {
  const behind = [], style = n => getComputedStyle(n);
  for (let n = node; n; n = n.parentElement) behind.unshift(style(n).backgroundColor);
  const a = seen(page, ...behind), b = seen(page, ...behind, style(node).color);
  ratios.push((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
}
return ratios;
"""


def test_a_large_page_opens_at_once(browser, make_run):
    """Prevents: more than two seconds before anything can be read."""
    run = make_run(steps=15, groups=long_failure)
    browser.look()
    browser.open(report.write_page([run]))
    took = "const [n] = performance.getEntriesByType('navigation'); return n.loadEventEnd"
    assert 0 < browser.run(took) < 2000
