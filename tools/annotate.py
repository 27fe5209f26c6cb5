"""People rank responses: in the terminal, or on a page that can be handed out as one file.

A reward model learns from rankings, and rankings by people are what the simulated annotator of
the tiny world only imitates. Both ways of ranking read the responses that `python reward.py
--steps=sample` has sampled, show them blind and in random order, allow ties, and show about one
prompt in ten a second time: how often annotators agree with themselves bounds what any reward
model can learn from them.

    python tools/annotate.py terminal --out_dir=out/tiny --name=ann   → out/tiny/rankings-ann.jsonl
    python tools/annotate.py page --out_dir=out/tiny                  → out/tiny/rank.html
    python tools/annotate.py agreement FILE…                          how often annotators agree

The page works offline in any browser and saves rankings-NAME.jsonl where the browser saves
downloads. A line of such a file is a sample with what was judged: {"id", "prompt", "responses",
"ranking", "annotator", "display_order", "skipped", "flagged", "repeat", "seconds", "time"}.
"ranking" holds groups of indices into the responses, best first; a group of several is a tie.
"""

import argparse
import json
import os
import random
import re
import sys
import time
from itertools import combinations

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from model import need, replacing  # noqa: E402
from prepare import as_text  # noqa: E402

INSTRUCTIONS = """
Order the responses from best to worst by helpfulness, accuracy and safety, for example 2>0=3>1;
= is a tie. Other answers: s skips the prompt, u takes back your last judgement, f flags a prompt
that nobody should train on (then rank or skip it), q quits. Every judgement is saved at once.
Some prompts come twice."""


# -------------------------------------------------------------------------------------------------
# Samples and rankings

def compared(record):
    """What a sample or a ranking is about: (prompt id, prompt, text of each response)."""
    texts = [response["text"] for response in record["responses"]]
    return record["id"], as_text(record["prompt"]), *texts


def check_sample(record):
    """Raises KeyError, TypeError or ValueError if the record cannot be shown and compared."""
    for text in compared(record):
        if not isinstance(text, str):
            raise ValueError("the id, the prompt and the responses must be text")
        text.encode()  # JSON can hold half a surrogate pair, which UTF-8 cannot


def check_ranking(record):
    """Raises KeyError, TypeError or ValueError if the record is no ranking."""
    check_sample(record)
    if not isinstance(record["annotator"], str):
        raise ValueError("the annotator must be text")
    ranked = sorted(index for group in record["ranking"] for index in group)
    if ranked and ranked != list(range(len(record["responses"]))):
        raise ValueError("the ranking does not name each response once")


def read_records(path, command, check):
    """The records of a file that pass the check. A faulty line, which an editor or a crash may
    have left there, is named and passed over. Without the file: run the command first."""
    records = []
    with open(need(path, command), "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line.decode("utf-8-sig"))
                check(record)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                print(f"{path}, line {number}: passed over ({type(error).__name__}: {error})")
            else:
                records.append(record)
    return records


def read_samples(out_dir):
    """The samples of a run folder that have at least two responses to compare."""
    path, command = os.path.join(out_dir, "samples.jsonl"), "python reward.py --steps=sample"
    samples = read_records(path, command, check_sample)
    samples = [sample for sample in samples if len(sample["responses"]) > 1]
    if not samples:
        raise SystemExit(f"no prompt in {path} has two responses to compare: run {command} again")
    return samples


def read_rankings(path):
    return read_records(path, "python tools/annotate.py terminal", check_ranking)


# -------------------------------------------------------------------------------------------------
# Ranking in the terminal

def pending_tasks(samples, rankings):
    """The tasks (sample, whether it is a repeat) that an annotator with these rankings has left.

    About one prompt in ten comes a second time, a few prompts after the first; not one that was
    skipped or flagged. The tasks follow from the rankings alone, so that whoever stops and goes
    on, or takes a ranking back, is asked the same."""
    done = {(compared(ranking), bool(ranking.get("repeat"))) for ranking in rankings}
    unfit = {compared(ranking) for ranking in rankings
             if ranking.get("skipped") or ranking.get("flagged")}
    tasks = []
    for i, sample in enumerate(samples):
        if (compared(sample), False) not in done:
            tasks.append((sample, False))
        if i % 10 == 5:
            earlier = compared(samples[i - 4])
            if (earlier, True) not in done and earlier not in unfit:
                tasks.append((samples[i - 4], True))
    return tasks


def shuffled_order(sample, repeat, name):
    """The responses' indices in the order in which they are shown: a random one, which is another
    for each annotator and prompt; a repeat shows them the other way round."""
    n = len(sample["responses"])
    order = random.Random(f"{name} {sample['id']}").sample(range(n), n)
    return order[::-1] if repeat else order


class RankingsFile:
    """A person's rankings. The file is only ever appended to; what is taken back is what this
    session has written.

    rankings: this annotator's rankings of these samples, oldest first
    written:  for each line of this session, where in the file it begins and ends (bytes)"""

    def __init__(self, path, samples, name):
        self.path, self.written = path, []
        offered = {compared(sample) for sample in samples}
        earlier = read_rankings(path) if os.path.exists(path) else []
        self.rankings = [ranking for ranking in earlier
                         if ranking["annotator"] == name and compared(ranking) in offered]

    def append(self, ranking):
        line = json.dumps(ranking, ensure_ascii=False).encode() + b"\n"
        with open(self.path, "ab+") as f:
            end = f.seek(0, os.SEEK_END)
            if end > 0:
                f.seek(end - 1)
                if f.read(1) != b"\n":  # an editor may have removed the last line's end
                    f.write(b"\n")
                    end += 1
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
        self.written.append((end, end + len(line)))
        self.rankings.append(ranking)

    def undo(self):
        """Take back the last ranking of this session."""
        if not self.written:
            print("   this session has nothing to take back")
        elif os.path.getsize(self.path) != self.written[-1][1]:
            print(f"   {self.path} has been changed by another program: nothing is taken back")
        else:
            begin, _ = self.written.pop()
            os.truncate(self.path, begin)
            self.rankings.pop()


def parse_ranking(text, n):
    """'2>0=3>1' → [[2], [0, 3], [1]]. ValueError unless each of 0 … n-1 is named once."""
    groups = [[number.strip() for number in group.split("=")] for group in text.split(">")]
    numbers = [str(i) for i in range(n)]
    if sorted(number for group in groups for number in group) != sorted(numbers):
        raise ValueError(f"name each of {', '.join(numbers)} once, as in "
                         f"{'>'.join(reversed(numbers))}, with = for ties; or s, u, f, q")
    return [[int(number) for number in group] for group in groups]


def show(sample, order, heading):
    """Print a prompt and its responses, without control characters, which could move the cursor
    or clear the screen."""
    lines = ["", f"{heading}  {as_text(sample['prompt'])}"]
    for number, index in enumerate(order):
        response = sample["responses"][index]
        unfinished = "" if response.get("ended", True) else " […]"
        text = response["text"].replace("\n", "\n      ") or "(empty)"
        lines.append(f"   {number}  {text}{unfinished}")
    print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", "\n".join(lines)))


def ask(sample, repeat, name, heading):
    """Show a prompt and ask until it is judged: returns the ranking, or the answer "u" or "q"."""
    order = shuffled_order(sample, repeat, name)
    show(sample, order, heading)
    flagged, started = False, time.monotonic()
    while True:
        answer = input("(flagged) ranking> " if flagged else "ranking> ").strip().lower()
        if answer in ("u", "q"):
            return answer
        if answer == "f":
            flagged = not flagged
            continue
        try:
            groups = [] if answer == "s" else parse_ranking(answer, len(order))
        except ValueError as error:
            print(f"   {error}")
            continue
        return dict(
            sample,
            ranking=[sorted(order[number] for number in group) for group in groups],
            annotator=name,
            display_order=order,
            skipped=answer == "s",
            flagged=flagged,
            repeat=repeat,
            seconds=round(time.monotonic() - started, 1),
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def terminal(args):
    """Rank what is left to rank, until everything is, or q, Ctrl-C or the end of the input."""
    if not re.fullmatch(r"[\w-]{1,60}", args.name):
        raise SystemExit(f"--name={args.name}: it becomes part of a file name, so use letters, "
                         "digits, - and _ only, and at most 60 of them")
    if args.name == "simulated":
        raise SystemExit("--name=simulated is the name of the simulated annotator: choose another")
    samples = read_samples(args.out_dir)
    path = os.path.join(args.out_dir, f"rankings-{args.name}.jsonl")
    file = RankingsFile(path, samples, args.name)
    sys.stdin.reconfigure(errors="replace")  # what is no UTF-8 is a wrong answer, not a crash
    print(INSTRUCTIONS)
    try:
        while True:
            tasks = pending_tasks(samples, file.rankings)
            if not tasks:
                print("\nThere is nothing more to rank, thank you.")
                break
            sample, repeat = tasks[0]
            n_done = len(file.rankings)
            heading = f"[{n_done + 1}/{n_done + len(tasks)}]"
            answer = ask(sample, repeat, args.name, heading)
            if answer == "q":
                break
            if answer == "u":
                file.undo()
            else:
                file.append(answer)
    except (EOFError, KeyboardInterrupt):
        print()
    print(f"{len(file.written)} rankings added to {path}. The same command continues from here.")


# -------------------------------------------------------------------------------------------------
# The page

def rank_page(samples):
    """annotate.html with the samples in it. Every < is escaped, so that no response can end the
    element that holds them."""
    with open(os.path.join(ROOT, "tools", "annotate.html"), encoding="utf-8") as f:
        template = f.read()
    data = json.dumps(samples, ensure_ascii=False).replace("<", "\\u003c")
    return template.replace("__SAMPLES__", data)


def page(args):
    """Write the page; one of other content that is already there is left alone."""
    if args.n < 1:
        raise SystemExit(f"--n={args.n}: a page needs at least one prompt")
    samples = read_samples(args.out_dir)[:args.n]
    path = args.to or os.path.join(args.out_dir, "rank.html")
    html = rank_page(samples)
    if os.path.exists(path):
        with open(path, "rb") as f:
            if f.read() != html.encode():
                raise SystemExit(f"{path} exists and has other content: remove it, or name "
                                 "another file with --to=FILE")
    with replacing(path) as f:
        f.write(html)
    print(f"{path}: {len(samples):,} prompts to rank. Hand it out, collect the downloaded "
          "rankings-NAME.jsonl, and compare them with\npython tools/annotate.py agreement FILE…")


# -------------------------------------------------------------------------------------------------
# Agreement

def preferences(ranking):
    """{(i, j): whether response i was ranked above j} for the pairs i < j that are not tied."""
    place = {}
    for position, group in enumerate(ranking["ranking"]):
        for index in group:
            place[index] = position
    pairs = combinations(sorted(place), 2)
    return {(i, j): place[i] < place[j] for i, j in pairs if place[i] != place[j]}


def agreement(mine, yours):
    """Of the pairs of responses that both annotators order (ties of either are left out, as in
    Ouyang et al. 2022, 3.4): how many they order alike, and how many there are.

    mine, yours: {what was compared: preferences}"""
    alike = total = 0
    for key in mine.keys() & yours.keys():
        for pair in mine[key].keys() & yours[key].keys():
            total += 1
            alike += mine[key][pair] == yours[key][pair]
    return alike, total


def report_agreement(args):
    """Print how often each two annotators agree, and each with themselves on repeated prompts."""
    first, again = {}, {}  # of each annotator: {what was compared: preferences}
    for path in args.files:
        for ranking in read_rankings(path):
            judgements = again if ranking.get("repeat") else first
            by_annotator = judgements.setdefault(ranking["annotator"], {})
            by_annotator.setdefault(compared(ranking), preferences(ranking))
    pairs = [(f"{a} and {b}", first[a], first[b]) for a, b in combinations(sorted(first), 2)]
    for name in sorted(first.keys() & again.keys()):
        pairs.append((f"{name} when asked twice", first[name], again[name]))
    for who, mine, yours in pairs:
        alike, total = agreement(mine, yours)
        share = f"{alike / total:.1%} of {total:,} pairs alike" if total else "no pair in common"
        print(f"{who}: {share}")
    if not pairs:
        print("nothing to compare: the files hold one annotator at most, and nothing ranked twice")


# -------------------------------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, for options written in full."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        raise SystemExit(f"{message}; see python tools/annotate.py --help")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sessions = commands.add_parser("terminal", help="rank samples.jsonl in the terminal")
    sessions.add_argument("--out_dir", default="out/tiny", help="the run folder")
    sessions.add_argument("--name", required=True, help="your name, as in rankings-NAME.jsonl")
    sessions.set_defaults(run=terminal)
    pages = commands.add_parser("page", help="write a page on which others rank samples.jsonl")
    pages.add_argument("--out_dir", default="out/tiny", help="the run folder")
    pages.add_argument("--n", type=int, default=200, help="so many of the prompts")
    pages.add_argument("--to", help="the page's file; default: rank.html in the run folder")
    pages.set_defaults(run=page)
    reports = commands.add_parser("agreement", help="how often annotators agree")
    reports.add_argument("files", nargs="+", metavar="FILE", help="files of rankings")
    reports.set_defaults(run=report_agreement)
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # a console may lack the letters of a response
    try:
        args.run(args)
    except OSError as error:  # a full disk, a folder in place of a file, …: it names the file
        raise SystemExit(str(error))


if __name__ == "__main__":
    main()
