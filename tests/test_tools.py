"""Over-optimisation and the report: by hand, on small files, and on the miniature run."""

import base64
import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from chain import INPUTS, copy, one_line, read_lines, run, succeed
from tools import overoptimize, report

RUBRIC = dict(skill="knowledge", mentions=["yes"], truths=["true"], wrong=["false"], unsafe=False,
              min_words=0, max_words=9, rude=["fool"], decline=["cannot"], kindness=["why not"])
HOSTILE = ["<script>alert(1)</script>", "</td></table><h1>gone", "&lt;b&gt; & \"quoted\" 'too'",
           "\x00\x07\x1b[2J bell", "\u202eright to left\u202c", "half a letter \ud800",
           "<img src=https://example.com/x.png onerror=alert(1)>", "$\\frac{1}{0}$ {x:g} %s",
           "", "\n\n"]


def call(monkeypatch, tool, *options):
    """A tool as its user calls it, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", *map(str, options)])
    tool.main()


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def steps(stage, n, **figures):
    """The log of a run of n steps, whose figures are functions of the step."""
    records = [dict(stage=stage, step=None, config=dict(reward="", resume=False))]
    for step in range(1, n + 1):
        records.append(dict(stage=stage, step=step) | {k: f(step) for k, f in figures.items()})
    return records


def ranking(texts, groups, scores, id="p0"):
    responses = [dict(text=text, ended=True, tokens=text.split()) for text in texts]
    return dict(id=id, prompt="Is it?", responses=responses, ranking=groups, annotator="ann",
                scores=scores)


@pytest.fixture
def by_hand(tmp_path):
    """A run folder of small files: every input of the report."""
    pretrain = steps("pretrain", 30, loss=lambda s: 6 / s)
    pretrain += [dict(stage="pretrain", step=s, bits_per_byte=1 / s) for s in (15, 30)]
    write_lines(tmp_path / "log.jsonl", *pretrain,
                *steps("sft", 5, loss=lambda s: 3 / s, val_loss=lambda s: 3.5 / s),
                *steps("reward", 4, accuracy=lambda s: s / 10, accuracy_gold=lambda s: s / 8),
                *steps("ppo", 6, reward=lambda s: s, gold=lambda s: s / 2, kl=lambda s: s**2,
                       entropy=lambda s: 1 / s))
    (tmp_path / "data.json").write_text('{"val": {"bytes": 300, "tokens": 100}}')
    card = dict(pretrain=dict(bits_per_byte=0.5, gold=-0.94, gold_se=0.048, n=9),
                reward=dict(accuracy=0.9, rankings=100),
                ppo=dict(bits_per_byte=0.6, gold=1.692, gold_se=0.029, kl=2.1))
    (tmp_path / "scorecard.json").write_text(json.dumps(card))
    write_lines(tmp_path / "prompts.jsonl", dict(id="p0", prompt="Is it?", rubric=RUBRIC))
    pairs = [ranking(["yes true", "no"], [[0], [1]], [d, 0.0]) for d in (0.1, 0.7, 1.0, 1.5, 9.0)]
    write_lines(tmp_path / "reward.held_out.jsonl", *pairs)
    answers = [dict(stage="sft", text=text, ended=i % 2 == 0, reward=None, rubric=1.5)
               for i, text in enumerate(HOSTILE)]
    write_lines(tmp_path / "compare.jsonl", dict(prompt="<b>bold?</b>", answers=answers))
    return tmp_path


class Page(HTMLParser):
    """What a browser makes of the report: the elements with their attributes, the cells of all
    tables, and the texts."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.cells, self.texts, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def tags(self):
        return [tag for tag, _ in self.elements]


# --------------------------------------------------------------------------------------------------
# Best of n, and the curves of over-optimisation

def test_bound_of_best_of_n_by_hand():
    """log 4 - 3/4 = 1.3863 - 0.75; the best of one is the model itself."""
    assert overoptimize.best_of_n_bound(4) == pytest.approx(0.6363, abs=5e-5)
    assert overoptimize.best_of_n_bound(1) == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_kl_of_best_of_n_by_enumeration(n):
    """A model that says A, B and C with the probabilities 1/2, 1/4 and 1/4: the distribution of the
    best of n, by all 3^n draws, and its KL from the model (catches a bound in place of the value,
    ties broken by count, KL the other way round)."""
    probability, quality = dict(A=0.5, B=0.25, C=0.25), dict(A=0.0, B=2.0, C=1.0)
    best = dict.fromkeys("ABC", 0.0)
    for draws in itertools.product("ABC", repeat=n):
        best[max(draws, key=quality.get)] += math.prod(probability[d] for d in draws)
    expected = sum(q * math.log(q / probability[y]) for y, q in best.items())
    ids = dict(A=[1], B=[2, 3], C=[4])
    row = [ids[y] for y in "ABAC" * 2]
    scores = [quality[y] for y in "ABAC" * 2]
    found = overoptimize.best_of_n_kl([row, row], [scores, scores], n)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found <= overoptimize.best_of_n_bound(n) + 1e-12 and (n == 1 or found > 0.05)


def test_kl_of_best_of_n_reaches_its_bound():
    """Where no two of many samples are alike it is log n - (n - 1)/n; where all are, it is 0."""
    row = [[i] for i in range(4000)]
    found = overoptimize.best_of_n_kl([row], [range(4000)], 8)
    assert found == pytest.approx(overoptimize.best_of_n_bound(8), abs=2e-3)
    assert overoptimize.best_of_n_kl([[[7]] * 9], [[1.0] * 9], 8) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """Of each subset of n of the N samples counts the value of the one that the proxy likes best
    (catches means over the n best, and an order by value instead of by proxy)."""
    proxy, values = np.random.default_rng(0).normal(size=(2, 3, 6))
    brute = np.mean([[values[row, max(subset, key=lambda i: proxy[row, i])]
                      for subset in itertools.combinations(range(6), n)] for row in range(3)])
    assert overoptimize.best_of_n_means(proxy, values, n) == pytest.approx(brute, abs=1e-12)


@pytest.mark.parametrize("method, bend", [("best-of-n", lambda d: d * d),
                                          ("PPO", lambda d: d * np.log(d))])
def test_fit_finds_the_coefficients_again(method, bend):
    """From noiseless curves of Gao et al.'s forms the fit finds their coefficients, and with the
    form of the other method it does not. A distance of 0 is allowed."""
    d = np.linspace(0.1, 4, 12)
    gold = 0.3 + 1.7 * d - 0.45 * bend(d)
    found = overoptimize.fit_gold(d, gold, method)
    np.testing.assert_allclose(found, (0.3, 1.7, 0.45), atol=1e-9)
    np.testing.assert_allclose(overoptimize.terms(d, method) @ found, gold, atol=1e-9)
    other = overoptimize.fit_gold(d, gold, "PPO" if method == "best-of-n" else "best-of-n")
    assert abs(other - (0.3, 1.7, 0.45)).max() > 0.05
    again = overoptimize.fit_gold(np.append(0, d), np.append(0.3, gold), method)
    np.testing.assert_allclose(again, (0.3, 1.7, 0.45), atol=1e-9)


def test_ppo_curve_is_of_the_reward_model_that_it_names():
    """The iterations in the order of √KL. A missing run, one on another reward model, and one
    without gold scores end in one line with the command that makes it."""
    def log(reward, gold):
        points = [dict(kl=kl, reward=kl / 2, gold=gold) for kl in (-0.01, 4.0, 9.0, 1.0)]
        return {"ppo-weak": (dict(reward=reward), points)}

    curve = overoptimize.ppo_curve(log("weak", 0.5), "weak")
    assert [point["d"] for point in curve] == [0, 1, 2, 3] and curve[3]["proxy"] == 4.5
    for missing in ({}, log("strong", 0.5), log("weak", None)):
        message = one_line(overoptimize.ppo_curve, missing, "weak")
        assert "python ppo.py --variant=weak --reward=weak --kl_coefficient=0" in message


def test_log_of_the_last_run(tmp_path):
    """A run that begins anew replaces the one before; a resumed one continues it."""
    first, second = steps("ppo", 3, kl=lambda s: 1), steps("ppo", 2, kl=lambda s: 2)
    resumed = [dict(stage="ppo", step=None, config=dict(resume=True)),
               dict(stage="ppo", step=3, kl=3),
               dict(stage="ppo", step=None, scorecard="ppo", gold=1.0)]
    write_lines(tmp_path / "log.jsonl", *first, *second, *resumed)
    options, records = report.read_log(str(tmp_path))["ppo"]
    assert [r["kl"] for r in records] == [2, 2, 3] and options["resume"] is False


def test_peak_is_read_off_the_smoothed_gold(capsys):
    """PPO's gold is noisy: one lucky batch is not its peak."""
    curve = [dict(d=float(i), proxy=float(i), gold=1.0) for i in range(30)]
    curve[7]["gold"] = 10.0
    found = overoptimize.describe("weak", "PPO", curve)["summary"]
    assert found["peak"] == pytest.approx(2.0) and found["last"] == pytest.approx(1.0)
    assert 4 <= found["peak_at"] <= 11
    assert overoptimize.describe("weak", "best-of-n", curve)["summary"]["peak"] == 10.0


# --------------------------------------------------------------------------------------------------
# The reward model's diagnostics

def test_diagnostics_by_hand():
    """Three responses, of which the annotator ties two, with gold 2, 0 and -1: three pairs with
    their margins, preferences, differences of length, and gaps."""
    rankings = [ranking(["yes true", "yes false", "fool"], [[0], [1, 2]], [0.5, 1.5, -2.0])]
    records = dict(p0=dict(rubric=RUBRIC))
    pairs = report.all_pairs(rankings, records)
    np.testing.assert_allclose(pairs, [[-1, 1, 0, 2], [2.5, 1, 1, 3], [3.5, 0, 1, 1]])
    found = report.diagnose(rankings, records)
    assert found["by_gap"] == [(0.5, 1, 1.0, 1), (1, 2, 0.0, 1), (2, math.inf, 1.0, 1)]
    first, second = (1 / (1 + math.exp(-margin)) for margin in (1, 2.5))       # .731 and .924
    assert found["calibration"] == [(pytest.approx(first), 0.0, 1), (pytest.approx(second), 1.0, 1)]
    assert found["longer"] == (1.0, 1) and found["ceiling"] == (1.0, 2)
    assert found["length"] == pytest.approx(np.corrcoef([0.5, 1.5, -2.0], [2, 2, 1])[0, 1])


def test_diagnostics_without_rubric_or_difference():
    """People's comparisons have no rubric: what needs one is left out, and nothing is nan but what
    cannot be known."""
    found = report.diagnose([ranking(["a b", "b a"], [[1], [0]], [1.0, 1.0])], {})
    assert found["by_gap"] == [] and found["calibration"] == [(0.5, 0.0, 1)]
    assert math.isnan(found["length"])
    tables, notes = report.diagnostics(found)
    assert len(tables) == 1 and not any("ceiling" in note or "longer" in note for note in notes)


def test_diagnostics_are_printed(by_hand, monkeypatch, capsys):
    call(monkeypatch, report, f"--out_dir={by_hand}")
    out = capsys.readouterr().out
    assert re.search(r"ordered right +pairs\n +1 to 2 +100.0% +5\n", out)      # gold 2 and 0.5
    assert re.search(r"predicted to be preferred +preferred +pairs\n +52.5% +100.0% +1\n", out)
    assert "the longer of two responses in 100.0% of 5 pairs" in out
    assert "orders two as the rubric does in 100.0% of 5 pairs" in out


# --------------------------------------------------------------------------------------------------
# The page

def test_what_was_said_is_text_and_nothing_is_loaded(by_hand, monkeypatch):
    """Every response stands in a cell of its own, letter by letter but for what would garble the
    page; no markup of theirs has become an element, and no element loads anything."""
    (by_hand / "overoptimize.svg").write_text("<svg><script>alert(1)</script></svg>")
    call(monkeypatch, report, f"--out_dir={by_hand}")
    page = Page(by_hand / "report.html")
    garbled = "[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800]"
    for i, text in enumerate(HOSTILE):
        shown = re.sub(garbled, lambda m: "?" if m[0] == "\ud800" else "\ufffd", text)
        assert shown + (" […]" if i % 2 else "") in page.cells
    assert "<b>bold?</b>" in page.texts
    assert not {"script", "b", "iframe", "link", "object"} & set(page.tags())
    assert page.tags().count("h1") == page.tags().count("img") == 1
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml;base64,"))
    picture = next(a["src"] for tag, a in page.elements if tag == "img").partition(",")[2]
    assert b"alert" in base64.b64decode(picture)  # in an image no script runs
    policy = [a["content"] for tag, a in page.elements if "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_scorecard_is_a_table_with_standard_errors(by_hand, monkeypatch):
    call(monkeypatch, report, f"--out_dir={by_hand}")
    cells = Page(by_hand / "report.html").cells
    assert cells[:4] == ["stage", "bits per byte", "gold", "kl"]
    assert cells[4:12] == ["pretrain", "0.500", "-0.940 ± 0.048", "",
                           "ppo", "0.600", "1.692 ± 0.029", "2.100"]


def test_all_charts_with_axes(by_hand, monkeypatch):
    """One SVG for each chart, with a title, labels and a legend."""
    pytest.importorskip("matplotlib")
    call(monkeypatch, report, f"--out_dir={by_hand}")
    page = Page(by_hand / "report.html")
    assert page.tags().count("svg") == 7
    for text in ("pretrain: loss", "sft: loss", "reward: held-out pairs ordered right",
                 "ppo: score of the rollouts", "ppo: distance from the SFT model",
                 "ppo: entropy of the policy", "reward: calibration", "nats per token", "step",
                 "validation", "as the rubric: gold", "rubric (gold)"):
        assert text in page.texts


def test_validation_has_the_unit_of_the_training_loss(by_hand):
    """1/15 and 1/30 bits a byte, at 3 bytes a token and log 2 nats a bit."""
    log = report.read_log(str(by_hand))
    chart = report.training_charts(str(by_hand), log, {})[0]
    points = [(15, pytest.approx(math.log(2) / 5)), (30, pytest.approx(math.log(2) / 10))]
    assert chart.title == "pretrain: loss" and chart.curves[1].points == points
    assert chart.log == "y" and len(chart.curves[0].points) == 30


def test_no_chart_of_two_points(by_hand, monkeypatch):
    """Two points, or values that are missing or infinite, make no chart; nor does no point."""
    write_lines(by_hand / "log.jsonl", *steps("pretrain", 2, loss=lambda s: 1 / s),
                *steps("sft", 0),
                *steps("ppo", 9, reward=lambda s: None, gold=lambda s: s if s > 7 else None,
                       kl=lambda s: math.inf))
    write_lines(by_hand / "reward.held_out.jsonl", ranking(["yes", "no"], [[0], [1]], [1.0, 0.0]))
    assert report.training_charts(str(by_hand), report.read_log(str(by_hand)), {}) == []
    call(monkeypatch, report, f"--out_dir={by_hand}")
    assert "svg" not in Page(by_hand / "report.html").tags()


def test_learning_curve_over_rankings():
    """The reward models in the order of their rankings; three of them, for two make no curve."""
    card = {f"reward-n{n}": dict(rankings=n, accuracy=n / 5000, accuracy_gold=n / 4000)
            for n in (1600, 100, 400)}
    chart, = report.training_charts("", {}, card)
    assert [x for x, _ in chart.curves[0].points] == [100, 400, 1600] and chart.log == "x"
    del card["reward-n400"]
    assert report.training_charts("", {}, card) == []


@pytest.mark.parametrize("name, beginning", [("all.png", b"\x89PNG"), ("all.svg", b"<?xml")])
def test_all_curves_as_one_picture(by_hand, name, beginning, monkeypatch):
    """A file that is there is left alone, and so is a name of another kind."""
    pytest.importorskip("matplotlib")
    picture = by_hand / name
    options = f"--out_dir={by_hand}", f"--curves={picture}"
    call(monkeypatch, report, *options)
    contents = picture.read_bytes()
    assert contents.startswith(beginning)
    assert "is there already" in one_line(call, monkeypatch, report, *options)
    assert ".png or .svg" in one_line(call, monkeypatch, report, "--curves=picture.jpg")
    assert picture.read_bytes() == contents


def test_names_with_signs_of_matplotlib(by_hand, monkeypatch):
    """A variant may have any name that a file can have: no letter of it is a formula."""
    pytest.importorskip("matplotlib")
    write_lines(by_hand / "log.jsonl", *steps("ppo-$x^{$ <b>", 4, reward=lambda s: s))
    call(monkeypatch, report, f"--out_dir={by_hand}")
    page = Page(by_hand / "report.html")
    assert "ppo-$x^{$ <b>: score of the rollouts" in page.texts and "b" not in page.tags()


def test_without_matplotlib(by_hand, monkeypatch, capsys):
    """Tables and samples are there, and a line says how to get the charts."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    call(monkeypatch, report, f"--out_dir={by_hand}", f"--curves={by_hand}/all.png")
    assert capsys.readouterr().out.count("pip install matplotlib") == 1
    page = Page(by_hand / "report.html")
    assert "svg" not in page.tags() and page.tags().count("table") == 4
    assert not (by_hand / "all.png").exists()


def test_missing_inputs(by_hand, monkeypatch, capsys):
    """Without a log there is nothing to report; each of the others is missed in one line."""
    for name in ("scorecard.json", "compare.jsonl", "prompts.jsonl", "reward.held_out.jsonl"):
        (by_hand / name).unlink()
    call(monkeypatch, report, f"--out_dir={by_hand}")
    *missing, last = capsys.readouterr().out.splitlines()
    assert "report.html" in last and (by_hand / "report.html").exists()
    assert [line.partition(": ")[2] for line in missing if "matplotlib" not in line] == [
        "python prepare.py makes it", "python reward.py makes it",
        "python sample.py --compare makes it"]
    write_lines(by_hand / "compare.jsonl", dict(prompt="Why?"))
    message = one_line(call, monkeypatch, report, f"--out_dir={by_hand}")
    assert "compare.jsonl, line 1: no record of prompt, answers" in message
    (by_hand / "log.jsonl").unlink()
    message = one_line(call, monkeypatch, report, f"--out_dir={by_hand}")
    assert message.endswith("log.jsonl: run python pretrain.py first")


# --------------------------------------------------------------------------------------------------
# On the miniature run

def test_report_of_a_run(folder, tmp_path):
    """The report on a run as it is: every stage is in the scorecard and in the samples."""
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".jsonl")]
    copy(folder, tmp_path / "out", names)
    done = succeed("tools/report", tmp_path / "out")
    assert "reward, on held-out prompts" in done.stdout and not done.stderr
    page = Page(tmp_path / "out/report.html")
    samples = read_lines(folder / "compare.jsonl")
    for stage in ("pretrain", "sft", "ppo"):
        assert page.cells.count(stage) == 1 + len(samples)


def test_best_of_n_of_a_run(folder, tmp_path):
    """A row of the scorecard, beside those of the stages: of 6 responses the best is liked better
    than of 1."""
    out_dir = copy(folder, tmp_path / "out", (*INPUTS["ppo"], "scorecard.json"))
    for n in (1, 6):
        done = succeed("tools/overoptimize", out_dir, f"--best_of={n}")
    assert "it would be log n - (n - 1)/n = 0.96 if no two samples were alike" in done.stdout
    before = json.loads((folder / "scorecard.json").read_text())
    card = json.loads((out_dir / "scorecard.json").read_text())
    assert list(card) == [*before, "best-of-1", "best-of-6"]
    one, six = card["best-of-1"], card["best-of-6"]
    assert one["kl"] == one["kl_bound"] == 0 and 0.1 < six["kl"] < six["kl_bound"] == 0.958
    assert six["reward"] > one["reward"] + 0.3
    assert six["n"] == before["sft"]["n"] and "gold_se" in six


def test_scores_are_the_reward_models(folder):
    """A response is scored behind its prompt, at its own last token, whatever stands beside it."""
    tokenizer = overoptimize.load_tokenizer(str(folder))
    config = overoptimize.OveroptimizeConfig(out_dir=str(folder), device="cpu", dtype="float32")
    machine = overoptimize.Run(config)
    model = overoptimize.load_reward_model(machine, tokenizer, "")
    records = [dict(prompt="Where is it?"), dict(prompt="Why?"), dict(prompt="Tell me a story.")]
    responses = [tokenizer.encode("In the old mill.") + [tokenizer.end], [tokenizer.end], [65] * 9]
    scores = overoptimize.score(machine, tokenizer, model, records, responses)
    for record, ids, found in zip(records, responses, scores):
        text = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        tokens = torch.tensor([tokenizer.encoding.encode(text, allowed_special="all") + ids])
        assert found == pytest.approx(model(tokens)[0, -1].item(), abs=1e-5)


def test_overoptimization_of_a_run(folder, tmp_path):
    """Both methods on two reward models; a missing run is one line; numbers, picture and report."""
    pytest.importorskip("matplotlib")
    out_dir = copy(folder, tmp_path / "out", (*INPUTS["ppo"], "log.jsonl", "scorecard.json"))
    options = "--variants=weak,strong", "--n_responses=8", "--n_prompts=5"
    done = run("tools/overoptimize", out_dir, *options)
    assert done.returncode and "python ppo.py --variant=weak --reward=weak" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    for name in ("weak", "strong"):
        (out_dir / f"reward-{name}.pt").write_bytes((folder / "reward.pt").read_bytes())
        with open(out_dir / "log.jsonl", "a", encoding="utf-8") as f:
            for record in read_lines(folder / "log.jsonl"):
                if record["stage"] == "ppo":
                    if "config" in record:
                        record["config"]["reward"] = name
                    f.write(json.dumps(record | dict(stage=f"ppo-{name}")) + "\n")
    done = succeed("tools/overoptimize", out_dir, *options)
    assert len(re.findall(r"^(weak|strong) +(best-of-n|PPO) .* \+ d \(", done.stdout, re.M)) == 4
    found = json.loads((out_dir / "overoptimize.json").read_text())
    assert list(found) == ["weak", "strong"] and found["weak"] == found["strong"]
    curve = found["weak"]["best-of-n"]["curve"]
    assert [point["n"] for point in curve] == [1, 2, 4, 8] and curve[0]["d"] == 0
    assert all(point["d"] <= point["d_bound"] for point in curve)
    assert all(a["proxy"] < b["proxy"] for a, b in itertools.pairwise(curve))
    assert len(found["weak"]["PPO"]["curve"]) == 6
    svg = (out_dir / "overoptimize.svg").read_text(encoding="utf-8")
    for text in ("weak: proxy", "strong: gold, fitted", "√KL", "over the bound"):
        assert text in svg
    succeed("tools/report", out_dir)
    assert "Over-optimisation" in Page(out_dir / "report.html").texts
    message = run("tools/overoptimize", out_dir).stderr
    assert "--best_of=16, or --variants=weak,strong" in message and message.count("\n") == 1
