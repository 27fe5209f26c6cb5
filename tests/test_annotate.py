"""People's rankings: the terminal, driven by its standard input; what is read; agreement."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tools import annotate

SCRIPT = annotate.__file__
FIELDS = ["id", "prompt", "responses", "ranking", "annotator", "display_order", "skipped",
          "flagged", "repeat", "seconds", "time"]


def make_sample(i, n_responses=3):
    responses = [dict(text=f"answer {i}.{j}", ended=j != 1, tokens=[i + 1, j + 1, 0])
                 for j in range(n_responses)]
    return dict(id=f"p{i}", prompt=f"question {i}", responses=responses)


def make_ranking(id="p0", ranking=((0,), (1,)), annotator="ann", **changes):
    n = sum(map(len, ranking))
    responses = [dict(text=str(i), ended=True, tokens=[i + 1, 0]) for i in range(n)]
    record = dict(id=id, prompt="1", responses=responses, annotator=annotator,
                  ranking=[list(group) for group in ranking])
    return dict(record, **changes)


def write_lines(path, records):
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode())


def read_lines(path):
    text = path.read_bytes().decode("utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.fixture
def samples(tmp_path):
    """40 samples in the run folder tmp_path."""
    samples = [make_sample(i) for i in range(40)]
    write_lines(tmp_path / "samples.jsonl", samples)
    return samples


@pytest.fixture
def rank(tmp_path, monkeypatch, capsys):
    """rank(answer, …) types these lines, after which the input ends; returns what was printed."""
    def rank(*answers, name="ann"):
        typed = b"".join(a if isinstance(a, bytes) else a.encode() + b"\n" for a in answers)
        stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        annotate.main(["terminal", f"--out_dir={tmp_path}", f"--name={name}"])
        return capsys.readouterr().out
    return rank


def fail(*arguments):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as stopped:
        annotate.main([str(argument) for argument in arguments])
    message = stopped.value.code
    assert isinstance(message, str) and "\n" not in message
    return message


# -------------------------------------------------------------------------------------------------
# The terminal

@pytest.mark.parametrize("text, n, groups", [
    ("2>0=3>1", 4, [[2], [0, 3], [1]]), (" 1 > 0 ", 2, [[1], [0]]), ("0=1", 2, [[0, 1]]),
    (">".join(map(str, range(12))), 12, [[i] for i in range(12)])])
def test_parse_ranking(text, n, groups):
    assert annotate.parse_ranking(text, n) == groups


@pytest.mark.parametrize("text", ["", "0>1", "0>1>1", "0>1>2>", "0>1>3", "00>1>2", "0,1,2", "a",
                                  "0>1>２", "-0>1>2", "0>1>2>2", "0==1>2"])
def test_parse_ranking_refuses(text):
    """What does not name each number once is refused with an example."""
    with pytest.raises(ValueError, match="name each of 0, 1, 2 once, as in 2>1>0"):
        annotate.parse_ranking(text, 3)


def test_session(samples, rank, tmp_path):
    """Ranking, skip, a mistake, flag, undo, a tie, the end of the input; the next session starts
    where this one ended, and another annotator at the beginning, in a file of their own."""
    out = rank("1>0=2", "s", "nonsense", "0>1", "f", "2>1>0", "2>1>0", "u", "0=1=2")
    assert out.count("name each of 0, 1, 2 once") == 2 and "(flagged) ranking>" in out
    path = tmp_path / "rankings-ann.jsonl"
    lines = read_lines(path)
    assert [line["id"] for line in lines] == ["p0", "p1", "p2", "p3"]
    assert [line["skipped"] for line in lines] == [False, True, False, False]
    assert [line["flagged"] for line in lines] == [False, False, True, False]
    for line, sample, typed in zip(lines, samples, ("1>0=2", "", "2>1>0", "0=1=2")):
        assert list(line) == FIELDS
        assert {key: line[key] for key in sample} == sample
        order = line["display_order"]              # what was shown as 0 is display_order[0]
        shown = annotate.parse_ranking(typed, 3) if typed else []
        assert line["ranking"] == [sorted(order[number] for number in group) for group in shown]
        assert sorted(order) == [0, 1, 2]
        assert line["annotator"] == "ann" and line["repeat"] is False and line["seconds"] >= 0
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"])
        texts = [sample["responses"][index]["text"] for index in order]
        marks = ["" if sample["responses"][index]["ended"] else " […]" for index in order]
        numbered = "".join(f"   {i}  {texts[i]}{marks[i]}\n" for i in range(3))
        assert f"{sample['prompt']}\n{numbered}" in out
    assert len({tuple(line["display_order"]) for line in lines}) > 1         # shuffled

    before = path.read_bytes()
    assert "[5/" in rank("2>1>0", "2>1>0", "q", "2>1>0")
    assert path.read_bytes().startswith(before)
    assert [line["id"] for line in read_lines(path)[4:]] == ["p4", "p5"]
    rank("0>1>2", "0>1>2", name="bo-2_ü")
    others = read_lines(tmp_path / "rankings-bo-2_ü.jsonl")
    assert [line["id"] for line in others] == ["p0", "p1"]
    assert {line["annotator"] for line in others} == {"bo-2_ü"} and len(read_lines(path)) == 6


def test_prompts_that_come_twice(samples, rank, tmp_path):
    """Every tenth prompt or so is asked again, some prompts later, in another order, and marked;
    skipped and flagged ones are not. Many short sessions ask the same as a long one."""
    out = rank("0>1>2", "s", *["0>1>2"] * 9, "f", *["0>1>2"] * 60)
    assert "nothing more to rank" in out
    lines = read_lines(tmp_path / "rankings-ann.jsonl")
    first = {line["id"]: i for i, line in enumerate(lines) if not line["repeat"]}
    repeats = [i for i, line in enumerate(lines) if line["repeat"]]
    assert list(first) == [sample["id"] for sample in samples]
    assert [lines[i]["id"] for i in repeats] == ["p21", "p31"]    # p1 is skipped, p11 flagged
    for i in repeats:
        earlier = lines[first[lines[i]["id"]]]
        assert i - first[lines[i]["id"]] > 3
        assert lines[i]["display_order"] != earlier["display_order"]

    rank(*["0>1>2"] * 60, name="bo")
    lines = read_lines(tmp_path / "rankings-bo.jsonl")
    assert [line["id"] for line in lines if line["repeat"]] == ["p1", "p11", "p21", "p31"]
    (tmp_path / "rankings-bo.jsonl").unlink()
    while len(rank("0>1>2", "0>1>2", "u", "0>1>2", name="bo").split("ranking>")) > 2:
        pass
    again = read_lines(tmp_path / "rankings-bo.jsonl")
    same = ("id", "repeat", "display_order", "ranking")
    assert [[a[key] for key in same] for a in again] == [[b[key] for key in same] for b in lines]
    assert "nothing more to rank" in rank(name="bo")


def test_other_samples_are_asked_again(samples, rank, tmp_path):
    """What has been ranked is known by its words: after new sampling, the same id with another
    prompt or another response is asked again. A last line that somebody's editor has left open
    gets no line glued to it."""
    path = tmp_path / "rankings-ann.jsonl"
    rank(*["2>1>0"] * 3)
    lines = read_lines(path)
    path.write_bytes(path.read_bytes().rstrip())
    samples[0]["prompt"] += "?"
    samples[1]["responses"][0]["text"] += "!"
    write_lines(tmp_path / "samples.jsonl", samples)
    rank(*["2>1>0"] * 3)
    assert read_lines(path)[:3] == lines
    assert [line["id"] for line in read_lines(path)[3:]] == ["p0", "p1", "p3"]


def test_undo_takes_back_this_session_only(samples, rank, tmp_path):
    """Earlier sessions' lines stay, and so does what another program has appended meanwhile."""
    path = tmp_path / "rankings-ann.jsonl"
    rank("2>1>0", "2>1>0")
    before = path.read_bytes()
    out = rank("u", "2>1>0", "2>1>0", "u", "u", "u")
    assert path.read_bytes() == before and out.count("nothing to take back") == 2
    assert "0 rankings added" in out

    file = annotate.RankingsFile(str(path), samples, "ann")
    file.append(make_ranking())
    with open(path, "ab") as f:
        f.write(b"another line\n")
    longer = path.read_bytes()
    file.undo()
    assert path.read_bytes() == longer


def test_every_line_reaches_the_disk(samples, rank, tmp_path, monkeypatch):
    """When a line is flushed to the disk, the file holds it and all earlier ones."""
    path, sizes = tmp_path / "rankings-ann.jsonl", []
    monkeypatch.setattr(annotate.os, "fsync", lambda _: sizes.append(len(read_lines(path))))
    rank("0>1>2", "s", "2>1>0")
    assert sizes == [1, 2, 3]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGINT to a process")
def test_ctrl_c_keeps_what_was_ranked(samples, tmp_path):
    """Ctrl-C in the middle of a session ends it without a traceback; every line is whole."""
    command = [sys.executable, SCRIPT, "terminal", f"--out_dir={tmp_path}", "--name=ann"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)
    process.stdin.write("0>1>2\n1>0>2\n")
    process.stdin.flush()
    shown = ""
    while "[3/" not in shown:
        character = process.stdout.read(1)
        assert character, process.stderr.read()
        shown += character
    process.send_signal(signal.SIGINT)
    process.wait(30)                               # though its input is still open
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == "" and "2 rankings added" in out
    assert [line["id"] for line in read_lines(tmp_path / "rankings-ann.jsonl")] == ["p0", "p1"]


def test_what_is_not_utf8(samples, rank, tmp_path, capsys):
    """Bytes that are no UTF-8 are a wrong answer when typed, and a line that is named and passed
    over in a file; the other lines count."""
    path = tmp_path / "rankings-ann.jsonl"
    assert "name each of" in rank(b"\xff\xfe>1\n", "0>1>2")
    with open(path, "ab") as f:
        f.write(b"\xff\xfe{\n")
    samples_path = tmp_path / "samples.jsonl"
    samples_path.write_bytes(b'{"id": "\xe9"}\n' + samples_path.read_bytes())
    out = rank("0>1>2")
    assert f"{samples_path}, line 1: passed over" in out and f"{path}, line 2: passed over" in out
    records = path.read_bytes().split(b"\n")
    assert [json.loads(records[i])["id"] for i in (0, 2)] == ["p0", "p1"]


def test_console_without_the_letters(tmp_path):
    """A console that knows ASCII only shows ? for other letters, and what is saved has them."""
    sample = make_sample(0)
    sample["prompt"], sample["responses"][0]["text"] = "Grüße, 狐?", "🦊"
    write_lines(tmp_path / "samples.jsonl", [sample])
    command = [sys.executable, SCRIPT, "terminal", f"--out_dir={tmp_path}", "--name=ann"]
    environment = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = subprocess.run(command, input=b"0>1>2\n", capture_output=True, env=environment)
    assert done.returncode == 0 and b"Gr??e, ??" in done.stdout, done.stderr
    line, = read_lines(tmp_path / "rankings-ann.jsonl")
    assert line["prompt"] == sample["prompt"] and line["responses"] == sample["responses"]


def test_what_is_shown(rank, tmp_path):
    """Conversations are shown turn by turn, further lines of a response are indented, an empty
    one is named, and control characters cannot move the cursor. A prompt with one response, or
    with none, is not asked."""
    sample = make_sample(0)
    sample["prompt"] = [dict(role="system", content="Be brief."), dict(role="user", content="Hi")]
    for response, text in zip(sample["responses"], ("\x1b[2Jhello\rx\x9b", "one\ntwo", "")):
        response["text"] = text
    alone, none = make_sample(1, 1), make_sample(2, 0)
    write_lines(tmp_path / "samples.jsonl", [alone, none, sample])
    out = rank("0>1>2")
    assert "[1/1]  system: Be brief.\nuser: Hi\n" in out and "[2/" not in out
    assert "  \ufffd[2Jhello\ufffdx\ufffd\n" in out and "  one\n      two […]\n" in out
    assert "  (empty)\n" in out and "\x1b" not in out and "\r" not in out
    line, = read_lines(tmp_path / "rankings-ann.jsonl")
    assert line["responses"] == sample["responses"]                          # as they were


@pytest.mark.parametrize("name", ["a/b", "..", "a.b", "a b", "", "x" * 61, "a\n", "simulated"])
def test_names_refused(samples, tmp_path, name):
    """Names become part of a file name; the simulated annotator's is taken."""
    with pytest.raises(SystemExit, match="--name="):
        annotate.main(["terminal", f"--out_dir={tmp_path}", f"--name={name}"])
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_one_line_errors(tmp_path):
    """What users do wrong ends in one line that names the remedy."""
    out_dir = f"--out_dir={tmp_path}"
    for command in (["terminal", out_dir, "--name=ann"], ["page", out_dir]):
        message = fail(*command)
        assert "samples.jsonl" in message and "python reward.py --steps=sample" in message
        write_lines(tmp_path / "samples.jsonl", [make_sample(0, 1)])
        assert "no prompt" in fail(*command) and "two responses" in fail(*command)
        (tmp_path / "samples.jsonl").unlink()
    assert "--name" in fail("terminal", out_dir)
    assert "--help" in fail("pages", out_dir)
    assert "--out" in fail("terminal", "--out=x", "--name=ann")              # not abbreviated
    assert "nowhere.jsonl" in fail("agreement", tmp_path / "nowhere.jsonl")
    assert str(tmp_path) in fail("agreement", tmp_path)                      # a folder


# -------------------------------------------------------------------------------------------------
# Files of rankings

FAULTS = {
    "cut off": '{"id": "p0", "prom',
    "a list": "[1, 2]",
    "a number": "3",
    "nothing": "",
    "deep": "[" * 100_000,
    "no annotator": {key: value for key, value in make_ranking().items() if key != "annotator"},
    "a number as annotator": make_ranking(annotator=3),
    "a number as id": make_ranking(id=3),
    "a number as prompt": make_ranking(prompt=3),
    "a prompt without content": make_ranking(prompt=[dict(role="user")]),
    "no responses": make_ranking(responses=None),
    "a number as text": make_ranking(responses=[dict(text=1), dict(text="b")]),
    "half a surrogate pair": make_ranking(prompt="\ud83e"),
    "one missing": make_ranking(ranking=[[0], [1]], responses=[dict(text=t) for t in "abc"]),
    "one instead of another": make_ranking(ranking=[[0], [0]]),
    "one twice": make_ranking(ranking=[[0], [1], [0]], responses=[dict(text=t) for t in "ab"]),
    "one too many": make_ranking(responses=[dict(text="a")]),
    "numbers as text": make_ranking(ranking=["0", "1"]),
    "no groups": make_ranking() | dict(ranking=[0, 1]),
    "null": make_ranking() | dict(ranking=None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_lines_are_named(fault, tmp_path, capsys):
    """Whatever is wrong with a line, it is named, and the lines around it are read; a byte order
    mark and further fields are no faults."""
    line = FAULTS[fault] if isinstance(FAULTS[fault], str) else json.dumps(FAULTS[fault])
    good = [make_ranking("p1", mood="fine"), make_ranking("p2", [], skipped=True)]
    path = tmp_path / "rankings.jsonl"
    path.write_text(f"\ufeff{json.dumps(good[0])}\n{line}\n{json.dumps(good[1])}", "utf-8")
    assert annotate.read_rankings(path) == good
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 and out[0].startswith(f"{path}, line 2: passed over (")


# -------------------------------------------------------------------------------------------------
# Agreement

def test_preferences():
    """Pairs i < j that are ordered, and how; ties are no preference."""
    ranking = make_ranking(ranking=[[2], [0, 3], [1]])
    assert annotate.preferences(ranking) == {
        (0, 1): True, (0, 2): False, (1, 2): False, (1, 3): False, (2, 3): True}
    assert annotate.preferences(make_ranking(ranking=[])) == {}


def report(capsys, *paths):
    annotate.main(["agreement", *map(str, paths)])
    return capsys.readouterr().out.splitlines()


def test_agreement_by_hand(tmp_path, capsys):
    """Ties of either side, prompts of one side only, and other responses to the same prompt are
    left out: what is left are two of three pairs of p0, and p2."""
    ann, bo = tmp_path / "ann.jsonl", tmp_path / "bo.jsonl"
    write_lines(ann, [
        make_ranking("p0", [[0], [1], [2]]), make_ranking("p1", [[0, 1]]),
        make_ranking("p2", [[1], [0]]), make_ranking("p3", [[1], [0]]), make_ranking("p4"),
        make_ranking("p5", [[1], [0]])])
    write_lines(bo, [
        make_ranking("p0", [[0], [2], [1]], "bo"), make_ranking("p1", [[0], [1]], "bo"),
        make_ranking("p2", [[1], [0]], "bo"), make_ranking("p3", [[2], [1], [0]], "bo"),
        make_ranking("p5", [[0, 1]], "bo")])
    assert report(capsys, ann, bo) == ["ann and bo: 75.0% of 4 pairs alike"]
    assert report(capsys, ann, bo, bo) == ["ann and bo: 75.0% of 4 pairs alike"]


def test_agreement_report(tmp_path, capsys):
    """Every two annotators, the simulated one among them when its file is named, and each with
    themselves on what came twice; repeats count for nothing else."""
    people, simulated = tmp_path / "people.jsonl", tmp_path / "rankings.jsonl"
    write_lines(people, [
        make_ranking("p0"), make_ranking("p1"), make_ranking("p0", [[1], [0]], repeat=True),
        make_ranking("p0", annotator="bo"), make_ranking("p1", [[1], [0]], "bo"),
        make_ranking("p9", annotator="cy")])
    write_lines(simulated, [make_ranking("p1", annotator="simulated")])
    assert report(capsys, people, simulated) == [
        "ann and bo: 50.0% of 2 pairs alike",
        "ann and cy: no pair in common",
        "ann and simulated: 100.0% of 1 pairs alike",
        "bo and cy: no pair in common",
        "bo and simulated: 0.0% of 1 pairs alike",
        "cy and simulated: no pair in common",
        "ann when asked twice: 0.0% of 1 pairs alike"]
    line, = report(capsys, simulated)
    assert "nothing to compare" in line


# -------------------------------------------------------------------------------------------------
# Writing the page

def test_page_is_never_overwritten(samples, tmp_path, capsys):
    """A page is written, and the same one may be written again; another page of that name stays
    as it is, and --to writes elsewhere."""
    path, other = tmp_path / "rank.html", tmp_path / "other.html"
    annotate.main(["page", f"--out_dir={tmp_path}"])
    assert f"{path}: 40 prompts" in capsys.readouterr().out
    html = path.read_bytes()
    annotate.main(["page", f"--out_dir={tmp_path}"])
    message = fail("page", f"--out_dir={tmp_path}", "--n=3")
    assert str(path) in message and "--to=" in message
    assert path.read_bytes() == html and b"answer 39.2" in html and b"__SAMPLES__" not in html
    annotate.main(["page", f"--out_dir={tmp_path}", "--n=3", f"--to={other}"])
    assert b"question 2" in other.read_bytes() and b"question 3" not in other.read_bytes()
    assert "--n=0" in fail("page", f"--out_dir={tmp_path}", "--n=0")
    assert str(tmp_path / "no") in fail(
        "page", f"--out_dir={tmp_path}", f"--to={tmp_path / 'no' / 'rank.html'}")
