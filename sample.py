"""Stage 5, use: talk to the model of any stage, look inside, compare the stages.

    python sample.py                                              chat in the terminal with the newest model
    python sample.py --prompt="Where does Milo live?"             one answer (--checkpoint=sft for another stage)
    python sample.py --next="One cold evening, the"               the likeliest next tokens of the pretrained model
    python sample.py --compare                                    the same held-out prompts through every stage, with
                                                                  the reward model's and the rubric's score of each
                                                                  answer; the scorecard; report.html

It changes nothing but report.html.
"""

import codecs
import html
import json
import os
from dataclasses import dataclass

import torch

from model import (LanguageModel, Run, RunConfig, ScalarModel, generate, load_checkpoint, load_config, option,
                   write_file)
from prepare import (load_tokenizer, prompt_ids, read_jsonl, render, respond, rubric_score, scorecard_table)

STAGES = dict(pretrain="pretrain.py", sft="sft.py", ppo="ppo.py")


@dataclass
class SampleConfig(RunConfig):
    table = "sample"
    checkpoint: str = option("", "pretrain, sft or ppo, or a file; default: the newest stage there is")
    prompt: str = option("", "answer this and exit")
    next: str = option("", "show the most probable next tokens after this text and exit")
    compare: bool = option(False, "show all stages side by side and write report.html")
    n_compare: int = option(8, "prompts to compare on", low=1)
    temperature: float = option(1.0, "0: always the likeliest token", low=0)
    top_k: int = option(0, "draw from the k likeliest tokens only; 0: from all", low=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that together reach this probability", low=0.001, high=1)


def load_model(run, tokenizer, stage):
    """The language model of a stage (or of a file), ready to generate."""
    path = stage if stage.endswith(".pt") else run.path(stage + ".pt")
    checkpoint = load_checkpoint(path, f"python {STAGES.get(stage, 'pretrain.py')}", tokenizer.hash)
    model = LanguageModel(checkpoint["model_config"]).to(run.device).eval()
    model.load_state_dict(checkpoint["model"])
    return model


def newest_stage(run, default=""):
    """The stage asked for by --checkpoint, or the last one of the chain that has a checkpoint."""
    if run.config.checkpoint or default:
        return run.config.checkpoint or default
    return next((s for s in reversed(STAGES) if os.path.exists(run.path(s + ".pt"))), "pretrain")


def stream(run, tokenizer, model, ids, key):
    """Continue ids and print each token as it comes; returns the text. Bytes wait for the rest of their character."""
    config, decoder, text = run.config, codecs.getincrementaldecoder("utf-8")("replace"), []

    def show(row, token):
        if token < tokenizer.end_of_text:
            text.append(decoder.decode(tokenizer.encoding.decode_single_token_bytes(token)))
            print(text[-1], end="", flush=True)

    stop = tokenizer.end if ids[-1] != tokenizer.end_of_text and tokenizer.start in ids else tokenizer.end_of_text
    generate(model, [ids], config.max_new_tokens, stop, run.uniforms(1, config.max_new_tokens, 8, key),
             config.temperature, config.top_k, config.top_p, show)
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
        messages.append(dict(role="assistant", content=stream(run, tokenizer, model, ids, turn)))
        turn += 1


def compare(run, tokenizer):
    """The same held-out prompts through all stages: rows of (prompt, [(stage, text, proxy score, gold score)])."""
    records, kinds = [], {}
    for record in read_jsonl(run.path("eval.jsonl")):  # as many of each kind as there is room for, in turn
        kinds.setdefault(record.get("kind"), []).append(record)
    while len(records) < run.config.n_compare and any(kinds.values()):
        records += [some.pop(0) for some in kinds.values() if some]
    records, reward_model = records[:run.config.n_compare], None
    if os.path.exists(run.path("reward.pt")):
        checkpoint = load_checkpoint(run.path("reward.pt"), "python reward.py", tokenizer.hash)
        reward_model = ScalarModel(checkpoint["model_config"]).to(run.device).eval()
        reward_model.load_state_dict(checkpoint["model"])
    rows = [(record["prompt"], []) for record in records]
    for stage in STAGES:
        if not os.path.exists(run.path(stage + ".pt")):
            continue
        responses = respond(load_model(run, tokenizer, stage), tokenizer, records, run, 9, run.config.temperature)
        for (_, answers), record, (text, ended) in zip(rows, records, responses):
            ids = prompt_ids(tokenizer, record["prompt"]) + tokenizer.encode(text) + [tokenizer.end] * ended
            with torch.no_grad():
                proxy = reward_model(torch.tensor([ids], device=run.device))[0, -1].item() if reward_model else None
            gold = rubric_score(record, text, ended) if "rubric" in record else None
            answers.append((stage, text + "" if ended else text + " […]", proxy, gold))
    return rows


def number(x):
    return "     –" if x is None else f"{x:6.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# report.html

def read_log(path):
    """stage → records of its last run, by log.jsonl; resumed runs go on with the records before."""
    log = {}
    for record in read_jsonl(path) if os.path.exists(path) else []:
        if "config" in record and not record["config"].get("resume"):
            log[record["stage"]] = []
        elif record.get("step") is not None:
            log.setdefault(record["stage"], []).append(record)
    return log


def chart(title, records, *names):
    """Some figures over the steps as a line chart in SVG, each line labelled with its name and last value."""
    curves = {n: [(r["step"], r[n]) for r in records if isinstance(r.get(n), (int, float))] for n in names}
    points = [p for curve in curves.values() for p in curve]
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    w, h = 400, 150
    lines = [f'<text x="0" y="-12" font-weight="bold">{html.escape(title)}</text>'
             f'<rect width="{w}" height="{h}" fill="none" stroke="#ccc"/>'
             f'<text x="-6" y="10" text-anchor="end">{y1:.3g}</text>'
             f'<text x="-6" y="{h}" text-anchor="end">{y0:.3g}</text>'
             f'<text x="{w}" y="{h + 16}" text-anchor="end">step {x1}</text>']
    for i, (name, curve) in enumerate((n, c) for n, c in curves.items() if c):
        colour = ("#06c", "#c40", "#283", "#939")[i % 4]
        path = " ".join(f"{w * (x - x0) / max(1, x1 - x0):.1f},{h - h * (y - y0) / max(1e-9, y1 - y0):.1f}"
                        for x, y in curve)
        label = f"{name.replace('_', ' ')} {curve[-1][1]:.3g}"
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                     f'<text x="{w + 8}" y="{14 + 18 * i}" fill="{colour}">{label}</text>')
    return f'<svg viewBox="-60 -28 620 204" width="620" height="204">{"".join(lines)}</svg>'


def write_report(run, rows, card):
    """report.html: one file that loads nothing from elsewhere; what models have said stands in it as text only."""
    log = read_log(run.path("log.jsonl"))
    charts = [chart("Pretraining: loss", log.get("pretrain", []), "loss"),
              chart("Pretraining: validation", log.get("pretrain", []), "bits_per_byte"),
              chart("Fine-tuning: loss", log.get("sft", []), "loss", "val_loss"),
              chart("Reward model: held-out accuracy", log.get("reward", []), "accuracy", "accuracy_gold",
                    "accuracy_accuracy", "accuracy_safety"),
              chart("PPO: learned reward (proxy) and rubric score (gold)", log.get("ppo", []), "reward", "gold"),
              chart("PPO: KL to the SFT model, nats a response", log.get("ppo", []), "kl", "entropy")]
    samples = "".join(
        f"<h3>{html.escape(prompt)}</h3><table><tr><th>stage<th>response<th>reward model<th>rubric</tr>" + "".join(
            f"<tr><td>{stage}<td>{html.escape(text)}<td>{number(proxy)}<td>{number(gold)}</tr>"
            for stage, text, proxy, gold in answers) + "</table>" for prompt, answers in rows)
    other = {stage: figures for stage, figures in card.items() if stage in ("prepare", "reward")}
    title = html.escape(run.config.out_dir)
    write_file(run.path("report.html"), f"""<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; width: 100% }} td:nth-child(2) {{ width: 70% }} svg text {{ font: 12px sans-serif }}
td, th {{ border: 1px solid #ccc; padding: .3em .6em; text-align: left }} pre {{ background: #f4f4f4; padding: 1em }}
</style><h1>{title}</h1><h2>Scorecard</h2><pre>{html.escape(scorecard_table(card))}

{html.escape(json.dumps(other, indent=1))}</pre><h2>Curves</h2>{"".join(charts)}
<h2>The same prompts at every stage</h2>{samples}
""")


def main():
    config = load_config(SampleConfig, __doc__)
    with Run(config, "sample", graceful=False) as run:
        tokenizer = load_tokenizer(config.out_dir)
        if config.compare:
            rows = compare(run, tokenizer)
            for prompt, answers in rows:
                print("\n" + prompt)
                for stage, text, proxy, gold in answers:
                    print(f"  {stage:9} reward {number(proxy)}  rubric {number(gold)}   {text!r}")
            card = {}
            if os.path.exists(run.path("scorecard.json")):
                with open(run.path("scorecard.json"), encoding="utf-8") as f:
                    card = json.load(f)
            print("\n" + scorecard_table(card))
            write_report(run, rows, card)
            print(f"curves and samples: {run.path('report.html')}")
        elif config.next:
            stage = newest_stage(run, "pretrain")
            show_next(run, tokenizer, load_model(run, tokenizer, stage), config.next)
        else:
            stage = newest_stage(run)
            model = load_model(run, tokenizer, stage)
            if not config.prompt:
                chat(run, tokenizer, model)
            elif stage == "pretrain":  # a base model continues; it knows no chat
                print(config.prompt, end="")
                stream(run, tokenizer, model, [tokenizer.end_of_text] + tokenizer.encode(config.prompt), 0)
            else:
                stream(run, tokenizer, model, prompt_ids(tokenizer, config.prompt), 0)


if __name__ == "__main__":
    main()
