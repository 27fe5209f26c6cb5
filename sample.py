"""Stage 5, use: talk to the model of any stage, look inside, compare the stages.

    python sample.py                                              chat in the terminal with the newest model
    python sample.py --prompt="Where does Milo live?"             one answer (--checkpoint=sft for another stage)
    python sample.py --next="One cold evening, the"               the likeliest next tokens of the pretrained model
    python sample.py --compare                                    the same held-out prompts through every stage, with
                                                                  the reward model's and the rubric's score of each
                                                                  answer; the scorecard; report.html
    python sample.py --compare --best_of=16                       … and the SFT model's best of 16 by the reward model
    python sample.py --overoptimize=weak,strong                   how far the score of a reward model can be trusted

It writes report.html, overoptimize.svg and the scorecard's row of best-of-n, and changes nothing else.
"""

import codecs
import html
import math
import os
from dataclasses import dataclass

import numpy as np
import torch

from model import (KVCache, LanguageModel, Run, RunConfig, generate, load_checkpoint, load_config, load_reward_model,
                   need, option, pad, restore, write_file)
from prepare import (as_text, check_prompt, fitting, held_out_prompts, load_tokenizer, measure, prompt_ids, read_jsonl,
                     read_scorecard, render, respond, rubric_score, scorecard_table, update_scorecard)

STAGES = dict(pretrain="pretrain.py", sft="sft.py", ppo="ppo.py")


@dataclass
class SampleConfig(RunConfig):
    table = "sample"
    checkpoint: str = option("", "pretrain, sft or ppo, or a file; default: the newest stage there is")
    prompt: str = option("", "answer this and exit")
    next: str = option("", "show the most probable next tokens after this text and exit")
    compare: bool = option(False, "show all stages side by side and write report.html")
    n_compare: int = option(8, "prompts to compare on", low=1)
    best_of: int = option(0, "the response that the reward model likes best of so many; 0: the first", low=0)
    reward: str = option("", "the variant of the reward model to use, reward-NAME.pt")
    overoptimize: str = option("", "variants of reward.py and ppo.py whose over-optimisation to measure and draw")
    n_overoptimize: int = option(128, "responses per prompt for its best-of-n", low=4)
    temperature: float = option(1.0, "0: always the likeliest token", low=0)
    top_k: int = option(0, "a chat or --prompt draws from the k likeliest tokens only; 0: from all", low=0)
    top_p: float = option(1.0, "likewise: from the likeliest that together reach this probability", low=0.001, high=1)


def load_model(run, tokenizer, stage):
    """The language model of a stage (or of a file), ready to generate."""
    path = stage if stage.endswith(".pt") else run.path(stage + ".pt")
    checkpoint = load_checkpoint(path, f"python {STAGES.get(stage, 'ppo.py')}", tokenizer.hash)
    if "lm_head.weight" not in checkpoint["model"]:
        raise SystemExit(f"{path} is no language model: choose one of {', '.join(STAGES)}, or a file of theirs")
    return restore(LanguageModel, checkpoint, run.device).eval()


@torch.no_grad()
def proxy_scores(reward_model, tokenizer, records, responses):
    """The reward model's score of each response (a list of ids) to its record's prompt."""
    scores = []
    for i in range(0, len(records), 256):
        whole = [prompt_ids(tokenizer, r["prompt"]) + ids for r, ids in zip(records[i:i + 256], responses[i:i + 256])]
        device = reward_model.score.weight.device
        scores += reward_model(pad(whole).to(device), torch.tensor([len(ids) for ids in whole], device=device)).tolist()
    return scores


def best_of(model, reward_model, tokenizer, records, run, n, key):
    """For each record the one of n responses of the model that the reward model likes best."""
    many = [record for record in records for _ in range(n)]
    responses = respond(model, tokenizer, many, run, key, run.config.temperature)
    scores = proxy_scores(reward_model, tokenizer, many, responses)
    return [max(zip(scores[i:i + n], responses[i:i + n]))[1] for i in range(0, len(many), n)]


def newest_stage(run, default=""):
    """The stage asked for by --checkpoint, or the last one of the chain that has a checkpoint."""
    newest = next((s for s in reversed(STAGES) if os.path.exists(run.path(s + ".pt"))), "pretrain")
    return run.config.checkpoint or default or newest


def stream(run, tokenizer, model, ids, key, cache=None):
    """Continue ids and print each token as it comes; returns the text. Bytes wait for the rest of their character."""
    config, decoder, text = run.config, codecs.getincrementaldecoder("utf-8")("replace"), []

    def show(row, token):
        if token < tokenizer.end_of_text:
            text.append(decoder.decode(tokenizer.encoding.decode_single_token_bytes(token)))
            print(text[-1], end="", flush=True)

    stop = tokenizer.end if tokenizer.start in ids else tokenizer.end_of_text
    generate(model, [ids], config.max_new_tokens, stop, run.uniforms(1, config.max_new_tokens, 8, key),
             config.temperature, config.top_k, config.top_p, show, cache)
    print()
    return "".join(text)


def show_next(run, tokenizer, model, text, n=10):
    """The n most probable next tokens after a text, with their probabilities."""
    ids = [tokenizer.end_of_text] + tokenizer.encode(text)
    with torch.no_grad():
        logits = model(torch.tensor([ids[-model.model.config.block_size:]], device=run.device))[0, -1].float()
    for p, token in zip(*(x.tolist() for x in logits.softmax(-1).topk(n))):
        print(f"  {p:6.1%}  {'█' * round(40 * p):40}  {tokenizer.decode([token])!r}")


def chat(run, tokenizer, model):
    """A conversation; the oldest turns are forgotten when it outgrows the context."""
    print("Type a message; an empty line starts over, Ctrl-D or Ctrl-C ends.")
    messages, turn = [], 0
    cache = KVCache(model.model.config, 1, model.model.config.block_size, run.device)  # of the turns so far
    while True:
        try:
            text = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if not text:
            messages = []
            continue
        messages.append(dict(role="user", content=text))
        room = model.model.config.block_size - min(run.config.max_new_tokens, model.model.config.block_size // 2)
        while len(ids := render(tokenizer, messages, reply=True)[0]) > room and len(messages) > 1:
            messages = messages[2:]
        if len(ids) > room:
            print(f"that is {len(ids)} tokens, and the context has room for {room}: say it shorter")
            messages = []
            continue
        print("model> ", end="")
        messages.append(dict(role="assistant", content=stream(run, tokenizer, model, ids, turn, cache)))
        turn += 1


def answer(run, tokenizer, stage):
    """One answer to --prompt, or the best of several; a base model continues the text, for it knows no chat."""
    config, model = run.config, load_model(run, tokenizer, stage)
    if config.best_of:
        reward_model = load_reward_model(run, tokenizer, config.reward)
        ids = best_of(model, reward_model, tokenizer, [dict(prompt=config.prompt)], run, config.best_of, 0)[0]
        print(tokenizer.text(ids))
    elif stage == "pretrain":
        print(config.prompt, end="")
        stream(run, tokenizer, model, [tokenizer.end_of_text] + tokenizer.encode(config.prompt), 0)
    else:
        stream(run, tokenizer, model, prompt_ids(tokenizer, config.prompt), 0)


def compare(run, tokenizer):
    """Print the same held-out prompts through all stages, and the scorecard, and write report.html."""
    models = {stage: load_model(run, tokenizer, stage) for stage in STAGES if os.path.exists(run.path(stage + ".pt"))}
    if not models:
        need(run.path("pretrain.pt"), "python pretrain.py")
    block_size = min(m.model.config.block_size for m in models.values())
    records, kinds = [], {}
    # As many of each kind as there is room for, in turn.
    for record in fitting(read_jsonl(run.path("eval.jsonl"), check=check_prompt), tokenizer, run, block_size):
        kinds.setdefault(record.get("kind"), []).append(record)
    while len(records) < run.config.n_compare and any(kinds.values()):
        records += [some.pop(0) for some in kinds.values() if some]
    records, n = records[:run.config.n_compare], run.config.best_of
    has_reward = n or run.config.reward or os.path.exists(run.path("reward.pt"))
    reward_model = load_reward_model(run, tokenizer, run.config.reward) if has_reward else None
    answers = {stage: respond(model, tokenizer, records, run, 9, run.config.temperature)
               for stage, model in models.items()}
    if n:
        sft, held_out = models.get("sft") or load_model(run, tokenizer, "sft"), held_out_prompts(run.config.out_dir)
        answers[f"best-of-{n}"] = best_of(sft, reward_model, tokenizer, records, run, n, 9)
        figures = measure(tokenizer, held_out, best_of(sft, reward_model, tokenizer, held_out, run, n, 1))
        update_scorecard(run.config.out_dir, f"best-of-{n}", dict(figures, kl=round(best_of_n_kl(n), 3)))
    rows = [(as_text(record["prompt"]), []) for record in records]
    for stage, responses in answers.items():
        proxies = proxy_scores(reward_model, tokenizer, records, responses) if reward_model else [None] * len(records)
        for (_, shown), record, ids, proxy in zip(rows, records, responses, proxies):
            text, ended = tokenizer.text(ids), tokenizer.end in ids
            gold = rubric_score(record, text, ended) if "rubric" in record else None
            shown.append((stage, text if ended else text + " […]", proxy, gold))
    for prompt, answers in rows:
        print("\n" + prompt)
        for stage, text, proxy, gold in answers:
            print(f"  {stage:10} reward {number(proxy)}  rubric {number(gold)}   {text!r}")
    card = read_scorecard(run.config.out_dir)
    print("\n" + scorecard_table(card))
    write_report(run, rows, card)
    print(f"curves and samples: {run.path('report.html')}")


def number(x):
    return "     –" if x is None else f"{x:6.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# Over-optimisation: what the reward model promises (proxy) and what the rubric says (gold), over the distance from the
# SFT model, d = √KL (Gao et al. 2022)

def best_of_n_kl(n):
    """KL of best-of-n to the model that it samples from, in nats: log n - (n - 1)/n (Stiennon et al. 2020, G.3)."""
    return math.log(n) - (n - 1) / n


def best_of_n_means(proxy, values, n):
    """Expected value of the best of n by proxy, from N ≥ n samples a prompt, without bias (Nakano et al. 2021, I).

    proxy, values (prompts, N). The i-th sample from the worst is the best of a random n of the N with probability
    C(i - 1, n - 1) / C(N, n)."""
    N = proxy.shape[1]
    weight = np.array([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
    return float((np.take_along_axis(values, proxy.argsort(1), 1) * weight).sum(1).mean())


def fit_gold(d, gold, kind):
    """Least squares for Gao et al.'s forms, with gold(0) as a third coefficient: gold(0) + d (α - β d) for best-of-n,
    gold(0) + d (α - β log d) for reinforcement learning. Returns the coefficients and the fitted values."""
    bend = d * d if kind == "best-of-n" else d * np.log(np.maximum(d, 1e-9))
    terms = np.stack([np.ones_like(d), d, -bend], 1)
    coefficients = np.linalg.lstsq(terms, gold, rcond=None)[0]
    return coefficients, terms @ coefficients


def overoptimization(run, tokenizer, variants):
    """Curves (variant, method) → rows of dict(d, proxy, gold, fit), and a line on each."""
    sft, N = load_model(run, tokenizer, "sft"), run.config.n_overoptimize
    records = [r for r in held_out_prompts(run.config.out_dir) for _ in range(N)][:100 * N]
    if not records:
        raise SystemExit("--overoptimize holds the reward model against rubrics, and no held-out prompt has one")
    responses = respond(sft, tokenizer, records, run, 10)
    gold = np.array([rubric_score(r, tokenizer.text(ids), tokenizer.end in ids) for r, ids in zip(records, responses)])
    log, curves, ns = read_log(run.path("log.jsonl")), {}, [2 ** i for i in range(N.bit_length()) if 2 ** i <= N]
    for variant in variants:
        proxy = np.array(proxy_scores(load_reward_model(run, tokenizer, variant), tokenizer, records, responses))
        proxy, values = proxy.reshape(-1, N), gold.reshape(-1, N)
        curves[variant, "best-of-n"] = [dict(d=best_of_n_kl(n) ** 0.5, proxy=best_of_n_means(proxy, proxy, n),
                                             gold=best_of_n_means(proxy, values, n)) for n in ns]
        curves[variant, "PPO"] = sorted((dict(d=max(0.0, r["kl"]) ** 0.5, proxy=r["reward"], gold=r["gold"])
                                         for r in log.get(f"ppo-{variant}", []) if "gold" in r), key=lambda r: r["d"])
    for (variant, method), rows in curves.items():
        if len(rows) < 3:
            raise SystemExit(f"log.jsonl has no run of PPO on {variant}: run python ppo.py --variant={variant} first")
        d, values = (np.array([r[name] for r in rows]) for name in ("d", "gold"))
        (start, alpha, beta), fit = fit_gold(d, values, method)
        for row, value in zip(rows, fit):
            row["fit"] = float(value)
        width = min(9, len(values))
        smooth = values if method == "best-of-n" else np.convolve(values, np.ones(width) / width, "valid")
        print(f"{variant:8} {method:9}  d to {d.max():.1f}  proxy {rows[0]['proxy']:.2f} → {rows[-1]['proxy']:.2f}  "
              f"gold {smooth[0]:.2f}, at most {smooth.max():.2f}, at the end {smooth[-1]:.2f}  "
              f"fit {start:.2f} + d ({alpha:.2f} - {beta:.2f} {'d' if method == 'best-of-n' else 'log d'})")
    return curves


# ---------------------------------------------------------------------------------------------------------------------
# report.html

def read_log(path):
    """stage → records of its last run, by log.jsonl; resumed runs go on with the records before."""
    log = {}
    for record in read_jsonl(path, "the stages", lambda r: r["stage"]) if os.path.exists(path) else []:
        if "config" in record and not record["config"].get("resume"):
            log[record["stage"]] = []
        elif record.get("step") is not None:
            log.setdefault(record["stage"], []).append(record)
    return log


def chart(title, records, *names, x="step"):
    """Some figures over x as a line chart in SVG, each line labelled with its name and last value."""
    curves = {n: [(r[x], r[n]) for r in records if isinstance(r.get(n), (int, float))] for n in names}
    points = [p for curve in curves.values() for p in curve]
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    w, h = 400, 150
    lines = [f'<text x="0" y="-12" font-weight="bold">{html.escape(title)}</text>'
             f'<rect width="{w}" height="{h}" fill="none" stroke="#ccc"/>'
             f'<text x="-6" y="10" text-anchor="end">{y1:.3g}</text>'
             f'<text x="-6" y="{h}" text-anchor="end">{y0:.3g}</text>'
             f'<text x="{w}" y="{h + 16}" text-anchor="end">{html.escape(x)} {x1:.3g}</text>']
    for i, (name, curve) in enumerate((n, c) for n, c in curves.items() if c):
        colour = ("#06c", "#c40", "#283", "#939")[i % 4]
        path = " ".join(f"{w * (x - x0) / max(1e-9, x1 - x0):.1f},{h - h * (y - y0) / max(1e-9, y1 - y0):.1f}"
                        for x, y in curve)
        label = f"{name.replace('_', ' ')} {curve[-1][1]:.3g}"
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                     f'<text x="{w + 8}" y="{14 + 18 * i}" fill="{colour}">{label}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-60 -28 620 204" width="620" height="204" '
            f'font-family="sans-serif" font-size="12">{"".join(lines)}</svg>')


def draw_overoptimization(curves):
    """One SVG of a chart for each curve, below one another."""
    charts = [chart(f"{variant} reward model, {method}, over d = √KL", rows, "proxy", "gold", "fit", x="d")
              for (variant, method), rows in curves.items()]
    placed = "".join(c.replace("<svg ", f'<svg y="{204 * i}" ', 1) for i, c in enumerate(charts))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="620" height="{204 * len(charts)}">'
            f'<rect width="100%" height="100%" fill="white"/>{placed}</svg>')


def write_report(run, rows, card):
    """report.html: one file that loads nothing from elsewhere; what models have said stands in it as text only."""
    log = read_log(run.path("log.jsonl"))
    charts = [chart("Pretraining: loss", log.get("pretrain", []), "loss"),
              chart("Pretraining: validation", log.get("pretrain", []), "bits_per_byte"),
              chart("Fine-tuning: loss", log.get("sft", []), "loss", "val_loss"),
              chart("Reward model: held-out accuracy", log.get("reward", []), "accuracy", "accuracy_gold",
                    "accuracy_accuracy", "accuracy_safety"),
              chart("PPO: learned reward (proxy) and rubric score (gold)", log.get("ppo", []), "reward", "gold"),
              chart("PPO: KL to the SFT model, nats a response", log.get("ppo", []), "kl", "entropy"),
              chart("Reward models: held-out accuracy over comparisons", sorted(
                  (f for f in card.values() if "rankings" in f), key=lambda f: f["rankings"]),
                  "accuracy", "accuracy_gold", x="rankings")]
    samples = "".join(
        f"<h3>{html.escape(prompt)}</h3><table><tr><th>stage<th>response<th>reward model<th>rubric</tr>" + "".join(
            f"<tr><td>{stage}<td>{html.escape(text)}<td>{number(proxy)}<td>{number(gold)}</tr>"
            for stage, text, proxy, gold in answers) + "</table>" for prompt, answers in rows)
    other = "\n".join(f"{stage:14} {name.replace('_', ' '):20} {value}" for stage, figures in card.items()
                      for name, value in figures.items() if "gold" not in figures)
    if os.path.exists(run.path("overoptimize.svg")):
        with open(run.path("overoptimize.svg"), encoding="utf-8") as f:
            charts += ["<h2>Over-optimisation</h2>", f.read()]
    title = html.escape(run.config.out_dir)
    write_file(run.path("report.html"), f"""<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.5 sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; width: 100% }} td:nth-child(2) {{ width: 70% }}
td, th {{ border: 1px solid #ccc; padding: .3em .6em; text-align: left }}
pre {{ background: #f4f4f4; padding: 1em; overflow-x: auto }}
</style><h1>{title}</h1><h2>Scorecard</h2><pre>{html.escape(scorecard_table(card))}</pre>
<details><summary>All other figures</summary><pre>{html.escape(other)}</pre></details><h2>Curves</h2>{"".join(charts)}
<h2>The same prompts at every stage</h2>{samples}
""")


def main():
    config = load_config(SampleConfig, __doc__)
    with Run(config, "sample", graceful=False) as run:
        tokenizer = load_tokenizer(config.out_dir)
        if config.overoptimize:
            curves = overoptimization(run, tokenizer, config.overoptimize.split(","))
            write_file(run.path("overoptimize.svg"), draw_overoptimization(curves))
            print(f"drawn in {run.path('overoptimize.svg')}")
        if config.compare:
            compare(run, tokenizer)
        elif config.next:
            show_next(run, tokenizer, load_model(run, tokenizer, newest_stage(run, "pretrain")), config.next)
        elif config.prompt:
            answer(run, tokenizer, newest_stage(run))
        elif not config.overoptimize:
            chat(run, tokenizer, load_model(run, tokenizer, newest_stage(run)))


if __name__ == "__main__":
    main()
