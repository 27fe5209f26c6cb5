"""Rankings by people: the terminal tool, driven by its standard input; faulty files; agreement; what is trained on."""

import json
import math
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import reward
from helpers import Digits
from test_chain import (INPUTS, OPTIONS, PIPES, command, copy, fail, folder, load, run, succeed)  # noqa: F401


def line(id="p0", ranking=((0,), (1,)), annotator="ann", n=None, **more):
    """A judgement of `n` responses (as many as the ranking names), as rank.html saves it."""
    n = n or sum(map(len, ranking))
    responses = [dict(text=str(i), tokens=[i + 1, 0], ended=True) for i in range(n)]
    return dict(id=id, prompt="1", responses=responses, ranking=[list(g) for g in ranking], annotator=annotator) | more


# ---------------------------------------------------------------------------------------------------------------------
# Faulty lines

FAULTS = {
    "cut off": ('{"id": "p0", "prom', "no ranking (JSONDecodeError"),
    "no object": ("[1, 2]", "no ranking (TypeError"),
    "a number": ("3", "no ranking (TypeError"),
    "nothing": ("", "no ranking (JSONDecodeError"),
    "no annotator": (json.dumps({k: v for k, v in line().items() if k != "annotator"}), "'annotator'"),
    "id is a number": (json.dumps(line(id=3)), "must be text"),
    "one missing": (json.dumps(line(ranking=[[0]], n=2)), "each response once"),
    "one twice": (json.dumps(line(ranking=[[0], [0, 1]], n=2)), "each response once"),
    "one too many": (json.dumps(line(ranking=[[0], [2], [1]], n=2)), "each response once"),
    "as text": (json.dumps(line(ranking=[["0"], ["1"]], n=2)), "each response once"),
    "groups missing": (json.dumps(line() | dict(ranking=[0, 1])), "no ranking (TypeError"),
    "a strange token": (json.dumps(line() | dict(responses=[dict(text="a", tokens=[19]), dict(text="b", tokens=[1])])),
                        "tokens that this tokenizer does not have"),
    "no tokens": (json.dumps(line() | dict(responses=[dict(text="a", tokens=[]), dict(text="b", tokens=[1])])),
                  "a response without text, or with tokens"),
    "no end": (json.dumps(line() | dict(responses=[dict(text="0", tokens=[1]) for t in "ab"])), "'ended'"),
    "of another tokenizer": (json.dumps(line() | dict(responses=[dict(text=t, tokens=[3, 0], ended=True) for t in "23"])),
                             "another tokenizer's"),
    "an empty group": (json.dumps(line(ranking=[[0], [], [1]], n=2)), "each response once"),
    "no responses": (json.dumps(line() | dict(responses=[], ranking=[[], []])), "each response once"),
    "deep": ("[" * 100_000, "no ranking (RecursionError"),
    "skipped, but null": (json.dumps(line(skipped=True) | dict(ranking=None)), "no ranking (TypeError"),
    "a truth value": (json.dumps(line() | dict(responses=[dict(text="a", tokens=[True]), dict(text="b", tokens=[1])])),
                      "tokens that this tokenizer does not have"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faulty_line_is_named(kind):
    """Whatever is wrong with a line is said in words, never raised."""
    text, words = FAULTS[kind]
    assert words in reward.fault(text, Digits())


@pytest.mark.parametrize("good", [line(), line(ranking=[[1, 0]]), line(ranking=[], n=3, skipped=True),
                                  line(ranking=[[2], [0, 3], [1]], flagged=True, extra="is allowed")])
def test_good_line_has_no_fault(good):
    """Ties, skipped lines and further fields are no faults."""
    assert reward.fault(json.dumps(good), Digits()) == ""


def test_good_lines_survive_bad_ones(tmp_path, capsys):
    """The lines of several files come in order; each dropped one is named with its file and number, also when it is
    not even UTF-8."""
    p1, p2 = (json.dumps(line(id)).encode() for id in ("p1", "p2"))
    (tmp_path / "a.jsonl").write_bytes(p1 + b"\n\xff\xfe{\n" + p2)
    (tmp_path / "b.jsonl").write_text('\ufeff{"id"\n' + json.dumps(line("p3", annotator="bo")) + "\n", encoding="utf-8")
    found = reward.read_rankings([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], Digits())
    assert [(r["id"], r["annotator"]) for r in found] == [("p1", "ann"), ("p2", "ann"), ("p3", "bo")]
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and "a.jsonl, line 2: dropped" in out[0] and "b.jsonl, line 1: dropped" in out[1]
    (tmp_path / "c.jsonl").write_text("\ufeff" + json.dumps(line()), encoding="utf-8")
    assert len(reward.read_rankings([tmp_path / "c.jsonl"], Digits())) == 1  # a mark at its beginning is no fault


# ---------------------------------------------------------------------------------------------------------------------
# Agreement

def test_preferences():
    """Pairs i < j that are ordered, and how; ties are no preference."""
    assert reward.preferences(line(ranking=[[2], [0, 3], [1]])) == {
        (0, 1): True, (0, 2): False, (1, 2): False, (1, 3): False, (2, 3): True}


def test_agreement_by_hand():
    """Ties of either side, prompts of one side only and other responses to the same prompt are left out."""
    ann = [line("p0", [[0], [1], [2]]), line("p1", [[0, 1]]), line("p2", [[1], [0]]), line("p3", [[1], [0]])]
    bo = [line("p0", [[0], [2], [1]]), line("p1", [[0], [1]]), line("p2", [[1], [0]]), line("p3", [[2], [1], [0]])]
    assert reward.agreement(ann, bo) == (3 / 4, 4)              # two of three in p0, and p2
    assert math.isnan(reward.agreement(ann, [])[0]) and reward.agreement(ann, [])[1] == 0


def test_report_of_agreement(capsys):
    """Every two annotators, each and the simulated one, and each with himself on what came twice."""
    ann = [line("p0", [[0], [1]]), line("p1", [[0], [1]]), line("p0", [[1], [0]], repeat=True)]
    bo = [line("p0", [[0], [1]], "bo"), line("p1", [[1], [0]], "bo")]
    reward.report_agreement(ann + bo + [line("p1", [[0], [1]], "simulated")])
    out = capsys.readouterr().out
    assert "ann and bo: agree on 50.0% of 2 pairs" in out
    assert "ann and simulated: agree on 100.0% of 1 pairs" in out
    assert "bo and simulated: agree on 0.0% of 1 pairs" in out
    assert "ann when asked twice: the same for 0.0% of 1 pairs" in out and "bo when" not in out
    reward.report_agreement([line(annotator="simulated")])      # nobody to agree with
    assert capsys.readouterr().out == ""


def test_repeats():
    """About one prompt in ten comes again, a few prompts after it was first seen, and nothing is lost."""
    queue = reward.with_repeats(list(range(60)))
    first, again = [s for s, repeat in queue if not repeat], [s for s, repeat in queue if repeat]
    assert first == list(range(60)) and len(again) == len(set(again)) == 6
    for sample in again:
        assert 3 <= queue.index((sample, True)) - queue.index((sample, False)) <= 8


# ---------------------------------------------------------------------------------------------------------------------
# What a reward model is told about itself

def test_pairs_and_inspection_by_hand():
    """Three responses of which the annotator ties two: three pairs with their margins, preferences and gaps; accuracy
    by gap, calibration and ceiling are shares that can be counted on one hand."""
    rubric = dict(mentions=["yes"], truths=["true"], wrong=["false"], unsafe=False, min_words=0, max_words=9,
                  rude=["fool"], decline=["cannot"], kind=["why not"])
    texts = ("yes true", "yes false", "fool")       # gold: 1 + 1 + 0, 1 - 1 + 0, 0 + 0 - 1
    ranking = dict(id="p0", responses=[dict(text=t, ended=True, tokens=t.split()) for t in texts], ranking=[[0], [1, 2]])
    pairs = reward.all_pairs([ranking], [[0.5, 1.5, -2.0]], dict(p0=dict(rubric=rubric)))
    expected = dict(margin=[-1, 2.5, 3.5], preferred=[1, 1, 0], longer=[0, 1, 1], gold=[2, 3, 1], helpfulness=[0, 1, 1],
                    accuracy=[2, 1, -1], safety=[0, 1, 1])
    assert pairs.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_allclose(pairs[name], column, err_msg=name)
    assert reward.accuracies(pairs) == dict(accuracy=0.5, accuracy_gold=0.6667, accuracy_helpfulness=1.0,
                                            accuracy_accuracy=0.3333, accuracy_safety=1.0)
    found = reward.inspect(pairs)
    assert found["accuracy_by_gap"] == {"0.5–1": [1.0, 1], "1–2": [0.0, 1], "2–9": [1.0, 1]}
    p = [1 / (1 + math.exp(-m)) for m in (1, 2.5)]              # .731, .924; the tied pair says nothing
    assert found["calibration"] == [[round(p[0], 4), 0.0, 1], [round(p[1], 4), 1.0, 1]]
    assert found["ceiling"] == found["longer_wins"] == 1.0


def test_prompts_are_split_not_rankings():
    """All rankings of a prompt, whoever made them, stand on one side; n_rankings shortens the training side alone."""
    rankings = [line(f"p{i}", annotator=who) for i in range(20) for who in ("ann", "bo")]
    config = SimpleNamespace(seed=1, val_share=0.15, n_rankings=0)
    train, val = reward.split_by_prompt(rankings, config)
    assert len(train) == 34 and len(val) == 6 and not {r["id"] for r in train} & {r["id"] for r in val}
    few, same = reward.split_by_prompt(rankings, SimpleNamespace(**{**vars(config), "n_rankings": 7}))
    assert few == train[:7] and same == val


# ---------------------------------------------------------------------------------------------------------------------
# The terminal

@pytest.fixture
def sampled(folder, tmp_path):
    """A run folder in which responses wait to be ranked, and what to type to rank them all in the order shown."""
    out_dir = copy(folder, tmp_path / "out", (*INPUTS["reward"], "samples.jsonl"))
    return out_dir, [json.loads(s) for s in (out_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def rank(out_dir, typed, name="ann", steps="rank"):
    """The terminal tool with these lines as its standard input, which then ends."""
    process = subprocess.Popen(command("reward", out_dir, *OPTIONS["reward"], f"--steps={steps}", "--annotator=human",
                                       f"--name={name}"), stdin=subprocess.PIPE, start_new_session=True, **PIPES)
    out, errors = process.communicate("".join(t + "\n" for t in typed), timeout=60)
    assert process.returncode == 0 and not errors, errors[-2000:]
    return out


def saved(out_dir):
    return [json.loads(text) for text in (out_dir / "rankings.jsonl").read_text(encoding="utf-8").splitlines()]


def test_terminal_session(sampled):
    """Ranking, tie, skip, flag, a mistake, undo, the end of input; then the same command goes on where it stopped, and
    another annotator begins at the beginning."""
    out_dir, samples = sampled
    out = rank(out_dir, ["1>0=2", "s", "nonsense", "0>1", "f", "2>1>0", "2>1>0", "u", "0=1=2"])
    assert "name each of 0, 1, 2 once" in out and "(flagged)" in out and "5 prompts" not in out
    lines = saved(out_dir)
    assert [r["id"] for r in lines] == [s["id"] for s in samples[:4]]
    assert [r["skipped"] for r in lines] == [False, True, False, False]
    assert [r["flagged"] for r in lines] == [False, False, True, False]
    for r, typed in zip(lines, ("1>0=2", "", "2>1>0", "0=1=2")):        # what was shown as 0 is display_order[0]
        order, groups = r["display_order"], reward.parse_ranking(typed, 3) if typed else []
        assert r["ranking"] == [[order[shown] for shown in group] for group in groups]
        assert sorted(order) == [0, 1, 2] and r["annotator"] == "ann" and r["schema"] == 1 and not r["repeat"]
    assert len({tuple(r["display_order"]) for r in lines}) > 1          # shuffled
    for r in lines:                                                     # numbered in that order, as text
        shown = "".join(f"   {i}  {r['responses'][index]['text']}\n" for i, index in enumerate(r["display_order"]))
        assert f"{r['prompt']}\n{shown}" in out.replace(" […]", "").replace("  (flagged)", "")

    rank(out_dir, ["2>1>0"] * 4)
    assert [r["id"] for r in saved(out_dir)] == [s["id"] for s in samples[:8]]
    rank(out_dir, ["2>1>0"] * 2, name="bo")
    again = saved(out_dir)[8:]
    assert [r["id"] for r in again] == [s["id"] for s in samples[:2]] and {r["annotator"] for r in again} == {"bo"}
    assert saved(out_dir)[:4] == lines                                  # what was there is untouched


def test_prompts_that_come_twice(sampled):
    """Typed through, every tenth prompt or so has a second judgement, marked, in another order; training leaves it and
    the flagged and skipped ones out, says so by their number, and tells how often people agreed with themselves."""
    out_dir, samples = sampled
    out = rank(out_dir, ["f", "0>1>2", "s"] + ["0>1>2"] * 60, steps="rank,train")
    lines = saved(out_dir)
    repeats = [r for r in lines if r["repeat"]]
    assert len(lines) == len(samples) + len(repeats) and 3 <= len(repeats) <= 6
    assert "ann when asked twice" in out and "ann and simulated" in out and "ann: " in out
    held_out = max(1, round(40 * 0.15))
    assert f"{40 - held_out} rankings to learn from, {held_out} held out, by ann" in out
    assert load(out_dir / "reward.pt")["step"] == 3 * math.ceil((40 - held_out) / 4)


def test_other_samples_are_offered_again(sampled):
    """What has been ranked is known by its words, not by its number alone: another world's prompt or another sample of the
    same number is asked for. A file whose last line somebody has left open gets no line glued to it."""
    out_dir, samples = sampled
    rank(out_dir, ["2>1>0"] * 2)
    lines = saved(out_dir)
    (out_dir / "rankings.jsonl").write_bytes((out_dir / "rankings.jsonl").read_bytes().rstrip())
    samples[0]["prompt"] += "?"
    samples[1]["responses"][0]["text"] += "!"
    (out_dir / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    assert "[1/" in rank(out_dir, ["2>1>0"] * 3)
    assert saved(out_dir)[:2] == lines and [r["id"] for r in saved(out_dir)[2:]] == [s["id"] for s in samples[:3]]


def test_ctrl_c_keeps_what_was_ranked(sampled):
    """Ctrl-C in the middle of a session: every ranking so far is in the file as a whole line, and nothing is thrown."""
    if sys.platform == "win32":
        pytest.skip("no SIGINT for another process on Windows")
    out_dir, samples = sampled
    process = subprocess.Popen(command("reward", out_dir, "--steps=rank", "--annotator=human", "--name=ann"),
                               stdin=subprocess.PIPE, **PIPES)
    process.stdin.write("0>1>2\n1>0>2\n")
    process.stdin.flush()
    shown = ""
    while "[3/" not in shown:
        shown += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.wait(30)  # though its input is still open
    out, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors and "2 rankings added" in out, (out, errors)
    assert [r["id"] for r in saved(out_dir)] == [s["id"] for s in samples[:2]]


# ---------------------------------------------------------------------------------------------------------------------
# Files of several people

def test_merged_rankings_are_trained_on(sampled, tmp_path):
    """--rankings merges the files of two people, names the faulty line, reports agreement, and trains on people alone,
    though a simulated ranking stands among them."""
    out_dir, samples = sampled
    for name, order in (("ann", [[0], [1], [2]]), ("bo", [[0], [2], [1]])):
        lines = [json.dumps(reward.make_ranking(s, order, name, [0, 1, 2])) for s in samples[:20]]
        lines[3] = lines[3][:40]
        (tmp_path / f"rankings-{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with open(tmp_path / "rankings-bo.jsonl", "a", encoding="utf-8") as f:
        f.write("\n" + json.dumps(reward.make_ranking(samples[30], [[0], [1], [2]], "simulated", [0, 1, 2])))
    files = ",".join(str(tmp_path / f"rankings-{name}.jsonl") for name in ("ann", "bo"))
    out = succeed("reward", out_dir, *OPTIONS["reward"], f"--rankings={files}").stdout
    assert "rankings-ann.jsonl, line 4: dropped" in out and "rankings-bo.jsonl, line 4: dropped" in out
    assert "ann and bo: agree on 66.7% of 57 pairs" in out
    assert "by ann, bo" in out and "simulated" in out                   # the agreement with it, not its rankings
    assert "32 rankings to learn from, 6 held out" in out
    card = json.loads((out_dir / "scorecard.json").read_text(encoding="utf-8"))
    assert card["reward"]["annotators"] == "ann, bo" and card["reward"]["rankings"] == 32


@pytest.mark.parametrize("text, words", [("", "too few"), ('{"half', "too few")])
def test_nothing_to_train_on(sampled, tmp_path, text, words):
    """Files without a usable ranking end in one line that says what to do."""
    (tmp_path / "r.jsonl").write_text(text)
    message = fail("reward", sampled[0], *OPTIONS["reward"], f"--rankings={tmp_path / 'r.jsonl'}")
    assert words in message and "rank more prompts" in message


def test_missing_file_of_rankings(sampled):
    """A file that is not there is named."""
    done = run("reward", sampled[0], "--rankings=nowhere.jsonl")
    assert done.returncode and "nowhere.jsonl" in done.stderr and len(done.stderr.strip().splitlines()) == 1
