"""Over-optimisation: what becomes of the true goal while a learned reward is maximised.

    python tools/overoptimize.py --best_of=16            the SFT model's best of 16 → scorecard.json
    python tools/overoptimize.py --variants=weak,strong  → overoptimize.json, overoptimize.svg

A reward model is only a *proxy* for what one wants, the *gold* score, which here is the rubric's.
Gao et al. (2022, "Scaling laws for reward model overoptimization") follow both while a model is
tuned to please the proxy, over its distance d = √KL from the SFT model. The proxy only rises; gold
rises, turns and falls, the earlier the weaker the reward model. Of the two methods compared here,

    best-of-n   samples n responses and keeps the one that the reward model scores highest;
                gold follows d (α - β d)
    PPO         goes far without the KL penalty; gold follows d (α - β log d)

A variant NAME is reward-NAME.pt with ppo.py's run on it, --variant=NAME --reward=NAME; the comment
in configs/overoptimize.toml has all commands.
"""

import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from model import (LanguageModel, Run, RunConfig, ScalarModel, load_checkpoint,  # noqa: E402
                   load_config, option, replacing, restore)
from prepare import (join, load_tokenizer, measure, prompt_ids, read_judged,  # noqa: E402
                     respond, rubric_score, scorecard_table, update_scorecard)
from tools.report import NO_MATPLOTLIB, Chart, Curve, read_log, render  # noqa: E402


@dataclass
class OveroptimizeConfig(RunConfig):
    table = "overoptimize"
    best_of: int = option(0, "measure the best of so many responses on the held-out prompts", low=0)
    reward: str = option("", "the variant of the reward model that chooses them, reward-NAME.pt")
    variants: str = option("", "variants of reward.py and ppo.py whose curves to draw, by commas")
    n_prompts: int = option(100, "held-out prompts for the curves of best-of-n", low=1)
    n_responses: int = option(128, "responses to each: the largest n", low=4)

    def check(self):
        if not self.best_of and not self.variants:
            return "nothing to do: give --best_of=16, or --variants=weak,strong"


def load_reward_model(run, tokenizer, variant):
    name, command = "reward.pt", "python reward.py"
    if variant:
        name, command = f"reward-{variant}.pt", f"{command} --variant={variant}"
    checkpoint = load_checkpoint(run.path(name), command, tokenizer.hash)
    return restore(ScalarModel, checkpoint, run.device)


def score(run, tokenizer, reward_model, records, responses):
    """The reward model's score of each response (lists of ids) to its record's prompt: (N,)."""
    prompts = [prompt_ids(tokenizer, record["prompt"]) for record in records]
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    order, scores = np.argsort(lengths, kind="stable"), np.zeros(len(records))
    for start in range(0, len(order), 256):  # like lengths together: little padding
        rows = order[start:start + 256]
        tokens, _, ends = join([prompts[i] for i in rows], [responses[i] for i in rows], run.device)
        with run.evaluating(reward_model):
            scores[rows] = reward_model(tokens, ends).tolist()
    return scores


# --------------------------------------------------------------------------------------------------
# Best of n

def best_of_n_bound(n):
    """What KL of best-of-n from the model that it samples from is at most, in nats.

    It would be this if no two samples were alike (Stiennon et al. 2020, G.3); where they repeat,
    best-of-n is nearer than that (Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def best_of_n_kl(responses, scores, n):
    """KL of best-of-n in nats, measured: the mean over prompts, from N ≥ n samples for each.

    responses: a list of N for each prompt; scores: as many numbers. A response y that c of N
    samples say has p(y) = c/N. With F(y), the probability of a response that scores no better than
    y, best-of-n says y with the probability F(y)^n - (F(y) - p(y))^n: all n are no better than y,
    and not all are worse. It is exact for the N samples, and slightly too small for the model, as
    no response can be rarer than 1/N."""
    total = 0.0
    for row, row_scores in zip(responses, scores):
        score_of = {tuple(ids): score for ids, score in zip(row, row_scores)}
        counts = Counter(map(tuple, row))
        p = np.array([counts[ids] for ids in sorted(counts, key=score_of.get)]) / len(row)
        F = p.cumsum()
        q = F**n - np.maximum(F - p, 0) ** n
        total += float((q * np.log(np.maximum(q, 1e-300) / p)).sum())
    return total / len(responses)


def best_of_n_means(proxy, values, n):
    """The expected value of the best of n responses by proxy, without bias, from N ≥ n samples.

    proxy, values: (prompts, N). It is the mean over all subsets of n. The sample above i others is
    the best of C(i, n - 1) of the C(N, n) subsets (Nakano et al. 2021, appendix I)."""
    N = proxy.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
    values = np.take_along_axis(values, proxy.argsort(axis=1), axis=1)  # the worst by proxy first
    return float((values * weights).sum(axis=1).mean())


def best_of(run, tokenizer, sft, records):
    """Measure the SFT model's best of n as the stages are measured; a row of the scorecard."""
    n = run.config.best_of
    reward_model = load_reward_model(run, tokenizer, run.config.reward)
    repeated = [record for record in records for _ in range(n)]
    responses = respond(sft, tokenizer, repeated, run, ("best of n",))
    scores = score(run, tokenizer, reward_model, repeated, responses).reshape(-1, n)
    best = [responses[row * n + i] for row, i in enumerate(scores.argmax(axis=1))]
    name = f"best-of-{n}"
    if run.config.reward:
        name += f"-{run.config.reward}"
    figures = measure(tokenizer, records, best)
    rows = [responses[i:i + n] for i in range(0, len(responses), n)]
    kl, bound = best_of_n_kl(rows, scores, n), best_of_n_bound(n)
    figures |= dict(kl=round(kl, 3), kl_bound=round(bound, 3),
                    reward=round(float(scores.max(axis=1).mean()), 3),
                    seconds=round(time.time() - run.started, 1))
    print(scorecard_table(update_scorecard(run.config.out_dir, name, figures)))
    print(f"{name}: KL from the SFT model {kl:.2f} nats; it would be log n - (n - 1)/n = "
          f"{bound:.2f} if no two samples were alike")


# --------------------------------------------------------------------------------------------------
# Curves. A curve is a list of dict(d, proxy, gold), in the order of d. Those of best-of-n also
# hold d_bound, what d would be if no two samples were alike.

def terms(d, method):
    """The terms of Gao et al.'s forms, (N, 3): gold = start + α d - β d² for best-of-n, and
    start + α d - β d log d for PPO. They measure gold from the SFT model's; `start` is that."""
    d = np.asarray(d, float)
    bend = d * d if method == "best-of-n" else d * np.log(np.maximum(d, 1e-9))
    return np.stack([np.ones_like(d), d, -bend], axis=1)


def fit_gold(d, gold, method):
    """The coefficients (start, α, β) that fit gold over d best, by least squares."""
    return np.linalg.lstsq(terms(d, method), np.asarray(gold), rcond=None)[0]


def ppo_curve(log, variant):
    """The iterations of the last run of PPO on a variant of the reward model."""
    options, steps = log.get(f"ppo-{variant}", ({}, []))
    curve = [dict(d=max(0.0, step["kl"]) ** 0.5, proxy=step["reward"], gold=step["gold"])
             for step in steps if step.get("gold") is not None]
    if options.get("reward") != variant or len(curve) < 3:
        raise SystemExit(f"log.jsonl has no run of PPO on reward-{variant}.pt: run python ppo.py "
                         f"--variant={variant} --reward={variant} --kl_coefficient=0 first")
    return sorted(curve, key=lambda point: point["d"])


def best_of_n_curves(run, tokenizer, sft, records, variants):
    """The curve of best-of-n for each variant, n = 1, 2, 4, …; all choose from the same samples."""
    N = run.config.n_responses
    repeated = [record for record in records[:run.config.n_prompts] for _ in range(N)]
    responses = respond(sft, tokenizer, repeated, run, ("over-optimisation",))
    gold = np.array([rubric_score(record, tokenizer.text(ids), tokenizer.end in ids)
                     for record, ids in zip(repeated, responses)]).reshape(-1, N)
    rows, curves = [responses[i:i + N] for i in range(0, len(responses), N)], {}
    for variant, reward_model in variants.items():
        proxy = score(run, tokenizer, reward_model, repeated, responses).reshape(-1, N)
        curves[variant] = []
        for n in (2**i for i in range(N.bit_length())):
            curves[variant].append(dict(n=n, d=best_of_n_kl(rows, proxy, n) ** 0.5,
                                        d_bound=best_of_n_bound(n) ** 0.5,
                                        proxy=best_of_n_means(proxy, proxy, n),
                                        gold=best_of_n_means(proxy, gold, n)))
    return curves


def smoothed(curve, method):
    """(d, proxy, gold) of a curve. A point of PPO is a mean over one batch and too noisy to show
    where gold turns, so the mean of 9 neighbours takes its place."""
    width = min(9, len(curve)) if method == "PPO" else 1
    return [np.convolve([point[name] for point in curve], np.ones(width) / width, "valid")
            for name in ("d", "proxy", "gold")]


def describe(variant, method, curve):
    """Fit a curve and print a line about it; returns what overoptimize.json holds of it."""
    start, alpha, beta = fit_gold([p["d"] for p in curve], [p["gold"] for p in curve], method)
    d, proxy, gold = smoothed(curve, method)
    peak_at = d[gold.argmax()]
    form = f"{start:.2f} + d ({alpha:.2f} - {beta:.2f} {'d' if method == 'best-of-n' else 'log d'})"
    print(f"{variant:12}{method:11}{d[-1]:7.2f}{proxy[0]:8.2f} →{proxy[-1]:6.2f}{gold[0]:9.2f}"
          f"{gold.max():8.2f}{peak_at:8.2f}{gold[-1]:8.2f}   {form}")
    return dict(curve=curve, fit=dict(start=start, alpha=alpha, beta=beta),
                summary=dict(first=gold[0], peak=gold.max(), peak_at=peak_at, last=gold[-1]))


def chart(method, found):
    """One method's curves of all variants: proxy, gold, and the fit to gold."""
    curves = []
    for i, (variant, methods) in enumerate(found.items()):
        curve, fit, color = methods[method]["curve"], methods[method]["fit"], f"C{i}"
        d = np.linspace(curve[0]["d"], curve[-1]["d"], 100)
        fitted = terms(d, method) @ [fit["start"], fit["alpha"], fit["beta"]]
        at, proxy, _ = smoothed(curve, method)
        if method == "best-of-n":
            at_bound = [(p["d_bound"], p["gold"]) for p in curve]
            curves.append(Curve(f"{variant}: gold over the bound of d", at_bound, ":", color))
        curves += [Curve(f"{variant}: proxy", list(zip(at, proxy)), "--", color),
                   Curve(f"{variant}: gold", [(p["d"], p["gold"]) for p in curve], "none", color),
                   Curve(f"{variant}: gold, fitted", list(zip(d, fitted)), "-", color)]
    return Chart(method, "d = √KL from the SFT model", "mean score", curves)


def study(run, tokenizer, sft, records):
    """Proxy and gold over d, for both methods and all variants."""
    variants = [name.strip() for name in run.config.variants.split(",") if name.strip()]
    log = read_log(run.config.out_dir)
    by_ppo = {variant: ppo_curve(log, variant) for variant in variants}
    models = {variant: load_reward_model(run, tokenizer, variant) for variant in variants}
    by_best_of_n = best_of_n_curves(run, tokenizer, sft, records, models)
    print("variant     method      last d         proxy   gold 1st    peak    at d    last   fit")
    found = {}
    for variant in variants:
        found[variant] = {"best-of-n": describe(variant, "best-of-n", by_best_of_n[variant]),
                          "PPO": describe(variant, "PPO", by_ppo[variant])}
    with replacing(run.path("overoptimize.json")) as f:
        f.write(json.dumps(found, indent=1) + "\n")
    try:
        picture = render([chart("best-of-n", found), chart("PPO", found)], 2, share_y=True)
    except ImportError:
        print(NO_MATPLOTLIB)
    else:
        with replacing(run.path("overoptimize.svg"), "wb") as f:
            f.write(picture)
        print(f"{run.path('overoptimize.svg')}: the curves; python tools/report.py shows them, too")


def main():
    config = load_config(OveroptimizeConfig, __doc__)
    sys.stdout.reconfigure(errors="replace")  # a console may lack a letter
    tokenizer = load_tokenizer(config.out_dir)
    run = Run(config)
    checkpoint = load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash)
    sft = restore(LanguageModel, checkpoint, run.device)
    records = read_judged(os.path.join(config.out_dir, "eval.jsonl"))
    if not records:
        raise SystemExit(f"no prompt in {run.path('eval.jsonl')} has a rubric, the gold score here")
    if config.variants:
        study(run, tokenizer, sft, records)
    if config.best_of:
        best_of(run, tokenizer, sft, records)


if __name__ == "__main__":
    main()
