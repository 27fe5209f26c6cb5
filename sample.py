"""Stage 5, use: talk to the model of any stage, look inside, compare the stages.

    python sample.py                                   chat in the terminal, with the last stage
    python sample.py --prompt="Where does Nora live?"  one answer; --checkpoint=sft: another stage's
    python sample.py --next="One cold evening, the"    the likeliest next tokens after a text
    python sample.py --compare                         the same held-out prompts through all stages,
                                                       with the reward model's and the rubric's
                                                       score of each answer; the scorecard

It changes nothing in the run folder, but for compare.jsonl, which tools/report.py reads.
"""

import codecs, os, sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch

from model import (LanguageModel, Run, RunConfig, ScalarModel, generate_tokens, load_checkpoint,
                   load_config, option, restore)
from prepare import (as_text, join, load_tokenizer, prompt_ids, random_stream, read_jsonl,
                     read_scorecard, respond, rubric_score, scorecard_table, write_jsonl)

STAGES = ("pretrain", "sft", "ppo")

@dataclass
class SampleConfig(RunConfig):
    table = "sample"
    checkpoint: str = option("", "pretrain, sft, ppo or a file; default: last (--next: pretrain)")
    prompt: str = option("", "answer this and exit")
    next: str = option("", "show the likeliest next tokens after this text and exit")
    compare: bool = option(False, "show all stages side by side")
    n_compare: int = option(8, "prompts to compare on", low=1)
    temperature: float = option(1.0, "0: always the likeliest token", low=0)
    top_k: int = option(0, "not in --compare: only the k likeliest tokens; 0: all", low=0)
    top_p: float = option(1.0, "not in --compare: the likeliest, to this sum", low=0.001, high=1)

def chosen_stage(run):
    """The stage or file asked for, or the last stage of the chain that has a checkpoint."""
    there = [stage for stage in STAGES if os.path.exists(run.path(f"{stage}.pt"))]
    return run.config.checkpoint or (there or ["pretrain"])[-1]  # none: loading says what to do

def load_model(run, tokenizer, stage):
    """The language model of a stage, or of a file, ready to generate."""
    path = stage if stage.endswith(".pt") else run.path(f"{stage}.pt")
    script = stage.partition("-")[0]  # "ppo" of a variant's "ppo-NAME"
    command = f"python {script}.py" if script in STAGES else "the script that writes it"
    checkpoint = load_checkpoint(path, command, tokenizer.hash)
    if "lm_head.weight" not in checkpoint["model"]:
        raise SystemExit(f"{path} is no language model: choose pretrain, sft or ppo")
    return restore(LanguageModel, checkpoint, run.device).eval()

def stream(run, tokenizer, model, ids, turn=0):
    """Continue ids and print each token as it comes; returns the text. `turn` seeds the draws."""
    config, text = run.config, ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may be several tokens
    stop = tokenizer.end if tokenizer.start in ids else tokenizer.end_of_text
    uniforms = random_stream(config.seed, "chat", turn).random((1, config.max_new_tokens), "f4")
    for rows, (token,) in generate_tokens(model, [ids], config.max_new_tokens, stop,
                                          torch.from_numpy(uniforms), config.temperature,
                                          config.top_k, config.top_p):
        if token < tokenizer.end_of_text:  # not a special one
            piece = decoder.decode(tokenizer.encoding.decode_single_token_bytes(token))
            print(piece, end="", flush=True)
            text += piece
    print()
    return text

def chat(run, tokenizer, model):
    """A conversation; the oldest turns are forgotten when it outgrows the context."""
    print("Type a message; an empty line starts over, Ctrl-D or Ctrl-C ends.")
    block_size = model.model.config.block_size
    room = block_size - min(run.config.max_new_tokens, block_size // 2)
    messages, turn = [], 0
    try:
        while True:
            text = input("\nyou> ").strip()
            if not text:
                messages = []
                continue
            messages.append(dict(role="user", content=text))
            while len(ids := prompt_ids(tokenizer, messages)) > room and len(messages) > 1:
                messages = messages[2:]
            if len(ids) > room:
                print(f"that is {len(ids)} tokens, and there is room for {room}: say it shorter")
                messages = []
                continue
            print("model> ", end="", flush=True)
            messages += [dict(role="assistant", content=stream(run, tokenizer, model, ids, turn))]
            turn += 1
    except (EOFError, KeyboardInterrupt):
        print()

def answer(run, tokenizer):
    """One answer to --prompt. A pretrained model continues the text, for it knows no chat."""
    stage = chosen_stage(run)
    model = load_model(run, tokenizer, stage)
    if os.path.basename(stage).startswith("pretrain"):
        print(run.config.prompt, end="")
        stream(run, tokenizer, model, [tokenizer.end_of_text] + tokenizer.encode(run.config.prompt))
    else:
        stream(run, tokenizer, model, prompt_ids(tokenizer, run.config.prompt))

def show_next(run, tokenizer, n=10):
    """The n likeliest next tokens after a text, with their probabilities."""
    model = load_model(run, tokenizer, run.config.checkpoint or "pretrain")
    ids = [tokenizer.end_of_text] + tokenizer.encode(run.config.next)
    ids = ids[-model.model.config.block_size:]
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=run.device))[0, -1]                  # (V,)
    likeliest = logits.float().softmax(-1).topk(n)
    for p, token in zip(likeliest.values.tolist(), likeliest.indices.tolist()):
        print(f"  {p:6.1%}  {'█' * round(40 * p):40}  {tokenizer.decode([token])!r}")

def choose_prompts(run, tokenizer, n, block_size):
    """n held-out prompts: of each skill in turn, so that all are seen."""
    by_skill = defaultdict(list)
    for record in read_jsonl(run.path("eval.jsonl"), fields=("id", "prompt")):
        if len(prompt_ids(tokenizer, record["prompt"])) < block_size:
            by_skill[record.get("rubric", {}).get("skill")].append(record)
    return [record for turn in zip_longest(*by_skill.values()) for record in turn if record][:n]

def proxy_scores(run, tokenizer, records, responses):
    """The reward model's score of each response, or None where there is no reward model."""
    if not records or not os.path.exists(run.path("reward.pt")):
        return [None] * len(records)
    checkpoint = load_checkpoint(run.path("reward.pt"), "python reward.py", tokenizer.hash)
    model = restore(ScalarModel, checkpoint, run.device)
    prompts = [prompt_ids(tokenizer, record["prompt"]) for record in records]
    tokens, _, lengths = join(prompts, responses, run.device)
    with run.evaluating(model):
        return model(tokens, lengths).tolist()

def compare(run, tokenizer):
    """The same held-out prompts through all stages, side by side, and the scorecard."""
    there = [stage for stage in STAGES if os.path.exists(run.path(f"{stage}.pt"))]
    models = {stage: load_model(run, tokenizer, stage) for stage in there or ["pretrain"]}
    block_size = min(model.model.config.block_size for model in models.values())
    records = choose_prompts(run, tokenizer, run.config.n_compare, block_size)
    rows = [dict(prompt=as_text(record["prompt"]), answers=[]) for record in records]
    for stage, model in models.items():
        responses = respond(model, tokenizer, records, run, ("compare",), run.config.temperature)
        rewards = proxy_scores(run, tokenizer, records, responses)
        for row, record, ids, reward in zip(rows, records, responses, rewards):
            text, ended = tokenizer.text(ids), tokenizer.end in ids
            rubric = rubric_score(record, text, ended) if "rubric" in record else None
            answer = dict(stage=stage, text=text, ended=ended, reward=reward, rubric=rubric)
            row["answers"].append(answer)
    write_jsonl(run.path("compare.jsonl"), rows)
    for row in rows:
        print("\n" + row["prompt"])
        for a in row["answers"]:
            text = a["text"] if a["ended"] else a["text"] + " […]"
            reward, rubric = np.array([a["reward"], a["rubric"]], float)  # None becomes nan
            print(f"  {a['stage']:10} reward {reward:6.2f}  rubric {rubric:6.2f}   {text!r}")
    print("\n" + scorecard_table(read_scorecard(run.config.out_dir)))
    print("next: python tools/report.py draws the curves")

def main():
    sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8
    config = load_config(SampleConfig, __doc__)
    tokenizer = load_tokenizer(config.out_dir)
    run = Run(config)
    if config.compare:
        compare(run, tokenizer)
    elif config.next:
        show_next(run, tokenizer)
    elif config.prompt:
        answer(run, tokenizer)
    else:
        chat(run, tokenizer, load_model(run, tokenizer, chosen_stage(run)))

if __name__ == "__main__":
    main()
