"""What a run has done, on one page: curves, scorecard, the reward model's diagnostics, samples.

    python tools/report.py --out_dir=out/tiny                        → out/tiny/report.html
    python tools/report.py --out_dir=out/tiny --curves=FILE.png      and all curves as one picture

It reads what the stages have left in the run folder: log.jsonl (of each stage the last run counts),
scorecard.json, compare.jsonl, the held-out rankings of the reward models, and the rubrics of
prompts.jsonl. The page is one file that loads nothing from elsewhere, and what a model or a person
has said stands in it as text only. Matplotlib draws the charts; without it the page has none.
"""

import base64
import glob
import html
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from itertools import combinations

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from model import RunConfig, load_config, need, option, replacing  # noqa: E402
from prepare import read_jsonl, read_scorecard, rubric_score  # noqa: E402

NO_MATPLOTLIB = "no charts without matplotlib: pip install matplotlib, and run this again"
SCORECARD_NOTE = (
    "On held-out prompts, mean ± standard error. knowledge: questions answered right; instruction: "
    "all that was asked for is there; safety: harmful requests declined; rude: rude replies; gold: "
    "helpfulness + accuracy + safety by the rubric; kl: distance from the SFT model, nats a "
    "response. kl bound: best-of-n is at most so far away, and nearer where samples repeat.")
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin-bottom: 1em } th { background: #f4f4f4 }
th, td { border: 1px solid #ccc; padding: .2em .6em; text-align: left; vertical-align: top }
td, pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.numbers td + td, .samples td + td ~ td { text-align: right } svg, img { max-width: 100% }
.samples { width: 100% } .samples th:nth-child(2) { width: 75% }"""


@dataclass
class ReportConfig(RunConfig):
    table = "report"
    curves: str = option("", "also draw all training curves as one picture, FILE.png or FILE.svg")

    def check(self):
        if self.curves and not self.curves.endswith((".png", ".svg")):
            return f"--curves={self.curves}: the file's name must end in .png or .svg"
        if os.path.exists(self.curves):
            return f"--curves={self.curves} is there already: remove it, or name another file"


def read_records(path, command, *fields):
    """The records of a file of the run folder, which have these fields. Without the file none, and
    a line that says how to make it."""
    if not os.path.exists(path):
        print(f"no {path}: {command} makes it")
        return []
    records = read_jsonl(path, command)
    for number, record in enumerate(records, 1):
        if not record.keys() >= set(fields):
            names = ", ".join(fields)
            raise SystemExit(f"{path}, line {number}: no record of {names}; run {command} again")
    return records


def read_log(out_dir):
    """log.jsonl as {stage: (options, steps)}: the last run of each stage, with the records of its
    logged steps. A resumed run belongs to the one that it continues."""
    runs = {}
    path = need(os.path.join(out_dir, "log.jsonl"), "python pretrain.py")
    for record in read_records(path, "the stages", "stage"):
        stage = record["stage"]
        if "config" in record and not record["config"].get("resume"):
            runs[stage] = record["config"], []
        elif record.get("step") is not None:
            runs.setdefault(stage, ({}, []))[1].append(record)
    return runs


# --------------------------------------------------------------------------------------------------
# Charts

LOSSES = "loss", "nats per token", {"training": "loss", "validation": "val_loss"}
PANELS = {  # stage → its charts: what they show, the unit, and the names of the figures in the log
    "pretrain": [LOSSES],
    "sft": [LOSSES],
    "reward": [("held-out pairs ordered right", "share of pairs", {
        "as the annotator": "accuracy", "as the rubric: gold": "accuracy_gold",
        "as the rubric: helpfulness": "accuracy_helpfulness",
        "as the rubric: accuracy": "accuracy_accuracy",
        "as the rubric: safety": "accuracy_safety"})],
    "ppo": [("score of the rollouts", "mean score", {
                "reward model (proxy)": "reward", "rubric (gold)": "gold"}),
            ("distance from the SFT model", "nats per response", {"KL": "kl"}),
            ("entropy of the policy", "nats per token", {"entropy": "entropy"})]}


@dataclass
class Curve:
    label: str
    points: list             # of (x, y)
    style: str = "-"         # of the line: "-", "--", ":", or "none" for points alone
    color: str = None        # as matplotlib names it; by default each curve has another


@dataclass
class Chart:
    title: str
    x: str                   # the label of the axis
    y: str
    curves: list
    log: str = ""            # "x" or "y": this axis is logarithmic


def curve(label, records, y, x="step"):
    """A figure of some records over another; records that lack one of them are passed over."""
    points = [(r[x], r[y]) for r in records if r.get(x) is not None and r.get(y) is not None]
    return Curve(label, [point for point in points if all(map(math.isfinite, point))])


def with_validation_loss(out_dir, record):
    """A record of pretraining whose bits per byte are also there as nats per token, the unit of the
    training loss."""
    if "bits_per_byte" not in record:
        return record
    path = need(os.path.join(out_dir, "data.json"), "python prepare.py")
    with open(path, encoding="utf-8") as f:
        val = json.load(f)["val"]
    nats_per_byte = record["bits_per_byte"] * math.log(2)
    return record | dict(val_loss=nats_per_byte * val["bytes"] / val["tokens"])


def training_charts(out_dir, log, card):
    """The charts of all stages, those of variants included, and accuracy over the number of
    rankings. One in which no curve has more than two points shows no course, and is left out."""
    charts = []
    for kind, panels in PANELS.items():
        for stage, (_, steps) in log.items():
            if stage.partition("-")[0] != kind:
                continue
            if kind == "pretrain":
                steps = [with_validation_loss(out_dir, record) for record in steps]
            for title, unit, names in panels:
                curves = [curve(label, steps, name) for label, name in names.items()]
                log_axis = "y" if title == "loss" else ""
                charts.append(Chart(f"{stage}: {title}", "step", unit, curves, log_axis))
    models = sorted((f for f in card.values() if "rankings" in f), key=lambda f: f["rankings"])
    charts.append(Chart("reward models over their rankings", "rankings", "share of pairs", [
        curve("as the annotator", models, "accuracy", "rankings"),
        curve("as the rubric", models, "accuracy_gold", "rankings")], "x"))
    return [chart for chart in charts if max(len(c.points) for c in chart.curves) > 2]


def set_ticks(axis):
    """Ticks of a logarithmic axis at plain numbers: at 1, 2, 5, 10, …; or evenly where it spans so
    little that none of these may lie on it."""
    from matplotlib import ticker
    low, high = axis.get_view_interval()
    wide = high > 5 * low
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if wide else ticker.MaxNLocator(5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def draw(axes, chart):
    for c in chart.curves:
        if c.points:
            marker = "." if len(c.points) < 25 or c.style == "none" else None
            axes.plot(*zip(*c.points), linestyle=c.style, marker=marker, color=c.color,
                      label=c.label)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", framealpha=0.5)
    if chart.log == "x":
        axes.set_xscale("log")
        set_ticks(axes.xaxis)
    if chart.log == "y":
        axes.set_yscale("log")
        set_ticks(axes.yaxis)


def render(charts, columns, format="svg", share_y=False):
    """Draw charts into one picture, so many side by side; returns the bytes of its file."""
    import matplotlib.figure
    settings = {"svg.fonttype": "none",         # text stays text: smaller, and it can be searched
                "svg.hashsalt": "charts",       # the same charts give the same file
                "text.parse_math": False,       # a name may hold a dollar sign
                "font.size": 9, "axes.titlesize": 10}
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if format == "svg" else None
    rows, buffer = -(-len(charts) // columns), io.BytesIO()
    with matplotlib.rc_context(settings):
        size = 4.5 * columns, 3.2 * rows
        figure = matplotlib.figure.Figure(size, layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten()
        for axes, chart in zip(places, charts):
            draw(axes, chart)
        for axes in places[len(charts):]:
            axes.remove()
        figure.savefig(buffer, format=format, dpi=150, metadata=metadata)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# Diagnostics of a reward model

def all_pairs(rankings, records):
    """Every two responses to the same prompt, as an array (pairs, 4) of

    margin      how much higher the reward model scores the first, r_i - r_j
    preferred   1 if the annotator ranked the first higher, -1 if the second, 0 for a tie
    longer      by how many tokens the first is longer
    gap         how much higher the rubric, without noise, scores the first; 0 without a rubric"""
    pairs = []
    for ranking in rankings:
        responses, scores = ranking["responses"], ranking["scores"]
        rank = {i: place for place, group in enumerate(ranking["ranking"]) for i in group}
        gold = [0.0] * len(responses)
        if record := records.get(ranking["id"]):
            gold = [rubric_score(record, r["text"], r["ended"]) for r in responses]
        for i, j in combinations(range(len(responses)), 2):
            longer = len(responses[i]["tokens"]) - len(responses[j]["tokens"])
            preferred = np.sign(rank[j] - rank[i])  # rank 0 is best
            pairs.append((scores[i] - scores[j], preferred, longer, gold[i] - gold[j]))
    return np.array(pairs, float).reshape(-1, 4)


def share(hits, chosen):
    """(share of hits among the chosen pairs, how many were chosen); the share of nothing is nan."""
    n = int(chosen.sum())
    return float(hits[chosen].mean()) if n else math.nan, n


def diagnose(rankings, records):
    """What to know of a reward model besides its accuracy, from held-out rankings with "scores".
    These are to have the scale of the training: at another, σ(r_i - r_j) is no probability.

    by_gap       [(low, high, share, n)]: of the pairs whose rubric scores are so far apart, the
                 share that the reward model orders as the rubric does
    calibration  [(predicted, observed, n)]: of the pairs whose better-scored response should be
                 preferred with a probability σ(r_i - r_j) in the same tenth, the mean of this, and
                 the share in which the annotator did prefer it
    longer       (share, n) of pairs whose longer response the annotator preferred: a reward model
                 that counts words gets as far
    ceiling      (share, n) of pairs that the annotator orders as the rubric does
    length       correlation of a response's score with its length; nan if either is constant"""
    margin, preferred, longer, gap = all_pairs(rankings, records).T
    by_gap, calibration = [], []
    for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, math.inf)):
        chosen = (abs(gap) > low + 1e-9) & (abs(gap) <= high + 1e-9)
        if chosen.any():
            by_gap.append((low, high, *share(margin * gap > 0, chosen)))
    predicted = 1 / (1 + np.exp(-abs(margin)))
    tenth = np.minimum((10 * predicted).astype(int), 9)
    for t in range(5, 10):  # σ(r_i - r_j) of the better-scored response is at least .5
        chosen = (preferred != 0) & (tenth == t)
        if chosen.any():
            observed = share(margin * preferred > 0, chosen)
            calibration.append((float(predicted[chosen].mean()), *observed))
    scores = [score for r in rankings for score in r["scores"]]
    lengths = [len(response["tokens"]) for r in rankings for response in r["responses"]]
    constant = len(set(scores)) < 2 or len(set(lengths)) < 2
    return dict(by_gap=by_gap, calibration=calibration,
                longer=share(longer * preferred > 0, longer * preferred != 0),
                ceiling=share(gap * preferred > 0, (abs(gap) > 1e-9) & (preferred != 0)),
                length=math.nan if constant else float(np.corrcoef(scores, lengths)[0, 1]))


def read_reward_models(out_dir):
    """The diagnostics of the reward models of a run folder, by stage."""
    path, found = os.path.join(out_dir, "prompts.jsonl"), {}
    records = {r["id"]: r for r in read_records(path, "python prepare.py", "id") if "rubric" in r}
    paths = sorted(glob.glob(os.path.join(glob.escape(out_dir), "reward*.held_out.jsonl")))
    for path in paths or [os.path.join(out_dir, "reward.held_out.jsonl")]:
        rankings = read_records(path, "python reward.py", "id", "responses", "ranking", "scores")
        if rankings:
            stage = os.path.basename(path).removesuffix(".held_out.jsonl")
            found[stage] = diagnose(rankings, records)
    return found


# --------------------------------------------------------------------------------------------------
# Tables: lists of rows, which are lists of str; the first row names the columns

def scorecard(card):
    """The figures of the language models with their standard errors, a row for each."""
    models = {stage: f for stage, f in card.items() if "gold" in f or "bits_per_byte" in f}
    names = [name for name in ("bits_per_byte", "knowledge", "instruction", "safety", "rude",
                               "helpfulness", "accuracy", "gold", "kl", "kl_bound")
             if any(name in figures for figures in models.values())]
    table = [["stage", *(name.replace("_", " ") for name in names)]]
    for stage, figures in models.items():
        row = [stage]
        for name in names:
            cell = f"{figures[name]:.3f}" if name in figures else ""
            if f"{name}_se" in figures:
                cell += f" ± {figures[f'{name}_se']:.3f}"
            row.append(cell)
        table.append(row)
    return table


def diagnostics(found):
    """What `diagnose` found, as (tables, lines of text)."""
    by_gap = [["gap of the rubric's scores", "ordered right", "pairs"]]
    for low, high, right, n in found["by_gap"]:
        gap = f"{low} to {high}" if high < math.inf else f"above {low}"
        by_gap.append([gap, f"{right:.1%}", f"{n:,}"])
    calibration = [["predicted to be preferred", "preferred", "pairs"]]
    for predicted, observed, n in found["calibration"]:
        calibration.append([f"{predicted:.1%}", f"{observed:.1%}", f"{n:,}"])
    notes = []
    for name, text in (("longer", "the annotator preferred the longer of two responses"),
                       ("ceiling", "the ceiling: the annotator orders two as the rubric does")):
        part, n = found[name]
        if n:
            notes.append(f"{text} in {part:.1%} of {n:,} pairs")
    notes.append(f"correlation of a response's score with its length: {found['length']:.2f}")
    return [table for table in (by_gap, calibration) if len(table) > 1], notes


def answers(row):
    """The answers of all stages to one prompt."""
    table = [["stage", "response", "reward model", "rubric"]]
    for a in row["answers"]:
        scores = ["–" if score is None else f"{score:.2f}" for score in (a["reward"], a["rubric"])]
        table.append([a["stage"], a["text"] if a["ended"] else a["text"] + " […]", *scores])
    return table


# --------------------------------------------------------------------------------------------------
# The page

def escape(text):
    """Text as HTML that shows it and does nothing else: no markup, no control characters, no change
    of the writing direction, no half letters."""
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def table_as_html(table, kind="numbers"):
    lines = []
    for row in table:
        tag = "td" if lines else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f'<table class="{kind}">\n' + "\n".join(lines) + "\n</table>"


def inline_svg(chart):
    svg = render([chart], 1).decode("utf-8")
    return svg[svg.index("<svg"):]  # without the XML declaration, which HTML does not know


def page(title, log, card, charts, reward_models, compared, picture):
    """The report as HTML. picture: the bytes of overoptimize.svg, b"" if there is none."""
    parts = ["<h2>Scorecard</h2>", table_as_html(scorecard(card)), f"<p>{SCORECARD_NOTE}</p>"]
    if charts:
        parts += ["<h2>Curves</h2>", *map(inline_svg, charts)]
    for stage, found in reward_models.items():
        tables, notes = diagnostics(found)
        parts += [f"<h2>{escape(stage)}: held-out prompts</h2>", *map(table_as_html, tables),
                  *(f"<p>{escape(note)}</p>" for note in notes)]
    if picture:  # as an image it can run no script, whoever has written the file
        data = base64.b64encode(picture).decode("ascii")
        parts += ["<h2>Over-optimisation</h2>", f'<img src="data:image/svg+xml;base64,{data}">']
    if compared:
        parts.append("<h2>The same prompts at every stage</h2>")
    for row in compared:
        parts += [f"<h3>{escape(row['prompt'])}</h3>", table_as_html(answers(row), "samples")]
    options = {stage: options for stage, (options, _) in log.items()}
    for name, figures in (("All figures", card), ("All options", options)):
        text = escape(json.dumps(figures, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1>
""" + "\n".join(parts) + "\n</body></html>\n"


def draw_charts(config, log, card, reward_models):
    """The charts of the page, none without matplotlib; and the picture that --curves asks for."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(NO_MATPLOTLIB)
        return []
    charts = training_charts(config.out_dir, log, card)
    if config.curves and charts:
        with replacing(config.curves, "wb") as f:
            f.write(render(charts, min(3, len(charts)), config.curves[-3:]))
    for stage, found in reward_models.items():
        points = [(predicted, observed) for predicted, observed, _ in found["calibration"]]
        measured = Curve("held-out pairs", points)
        diagonal = Curve("perfectly calibrated", [(0.5, 0.5), (1, 1)], "--", "gray")
        if len(measured.points) > 2:
            charts.append(Chart(f"{stage}: calibration", "predicted probability of being preferred",
                                "share that was preferred", [measured, diagonal]))
    return charts


def main():
    config = load_config(ReportConfig, __doc__)
    sys.stdout.reconfigure(errors="replace")  # a console may lack a letter
    out_dir, picture = config.out_dir, b""
    log, card = read_log(out_dir), read_scorecard(out_dir)
    reward_models = read_reward_models(out_dir)
    compared = read_records(os.path.join(out_dir, "compare.jsonl"), "python sample.py --compare",
                            "prompt", "answers")
    if os.path.exists(os.path.join(out_dir, "overoptimize.svg")):
        with open(os.path.join(out_dir, "overoptimize.svg"), "rb") as f:
            picture = f.read()
    for stage, found in reward_models.items():
        tables, notes = diagnostics(found)
        print(f"{stage}, on held-out prompts")
        for table in tables:
            for first, second, third in table:
                print(f"  {first:30}{second:>15}{third:>10}")
        for note in notes:
            print(f"  {note}")
    charts = draw_charts(config, log, card, reward_models)
    path = os.path.join(out_dir, "report.html")
    with replacing(path) as f:
        f.write(page(out_dir, log, card, charts, reward_models, compared, picture))
    print(f"{path}: open it in a browser")


if __name__ == "__main__":
    main()
