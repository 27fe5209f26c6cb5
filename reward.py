"""Stage 3, reward model: a smaller model learns from rankings what people like.

    --steps=sample   K responses of the SFT model to each prompt                  → samples.jsonl
    --steps=rank     an annotator orders each prompt's responses, ties allowed   → rankings.jsonl
    --steps=train    one number r(prompt, response) that explains the rankings    → reward.pt

    loss of a prompt = -1/pairs · Σ log σ(r_i - r_j)     over all pairs of which i was ranked above j

(Ouyang et al. 2022, eq. 1; the Bradley–Terry model: σ(r_i - r_j) is the probability that i is preferred.) Left to
itself the script does all three with a *simulated* annotator, which ranks by the rubric of prepare.py and errs like
people do. --annotator=human puts you in its place:

    python reward.py                                          everything, simulated annotator
    python reward.py --steps=rank,train --annotator=human     rank in the terminal, then train on your rankings
    torchrun --nproc_per_node=8 reward.py --config=…
"""

import getpass
import json
import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from model import (LanguageModel, Optimizers, Run, RunConfig, ScalarModel, epoch_batches, generate,
                   learning_rate_factor, load_checkpoint, load_config, option, pad)
from prepare import (judge, load_tokenizer, prompt_ids, read_jsonl, rubric_score, to_jsonl, update_scorecard)


@dataclass
class RewardConfig(RunConfig):
    table = "reward"
    steps: str = option("sample,rank,train", "which steps to run, separated by commas")
    annotator: str = option("simulated", "who ranks", choices=("simulated", "human"))
    annotator_noise: float = option(0.1, "Gumbel noise on the simulated annotator's scores; 0: it never errs", low=0)
    name: str = option("", "a human annotator's name; default: the login name")
    n_samples: int = option(4, "responses per prompt (K)", low=2)
    temperature: float = option(1.0, "of the sampled responses", low=0.01)
    n_reward_layer: int = option(2, "blocks of the reward model, taken from the bottom of the SFT model", low=1)
    epochs: int = option(4, "passes over the rankings", low=1)
    batch_size: int = option(32, "prompts a step, over all processes, each with all its responses", low=1)
    micro_batch_size: int = option(16, "prompts a process computes at once", low=1)
    learning_rate: float = option(1e-3, "peak rate of AdamW", low=0)
    muon_learning_rate: float = option(0.01, "peak rate of Muon (matrices of the blocks); 0: AdamW for all", low=0)
    weight_decay: float = option(0.01, "decay of the matrices", low=0)
    warmup_steps: int = option(10, "steps of linear warm-up; afterwards linear decay to 0", low=0)
    gradient_clip: float = option(1.0, "largest norm of the gradient", low=1e-9)
    val_share: float = option(0.15, "share of the ranked prompts held out to measure accuracy", low=0.001, high=0.5)
    resume: bool = option(False, "go on with step train from reward.last.pt")

    def check(self):
        for step in self.steps.split(","):
            if step not in ("sample", "rank", "train"):
                return f"--steps={self.steps}: {step!r} is none of sample, rank, train"


# ---------------------------------------------------------------------------------------------------------------------
# sample

def sample_responses(run, config, tokenizer):
    """K responses of the SFT model to each prompt reserved for comparisons; identical ones are merged."""
    parent = load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash)
    model = LanguageModel(parent["model_config"]).to(run.device).eval()
    model.load_state_dict(parent["model"])
    records = [r for r in read_jsonl(run.path("prompts.jsonl")) if r.get("use", "compare") == "compare"]
    if not records:
        raise SystemExit(f"{run.path('prompts.jsonl')} holds no prompts to compare on: run python prepare.py with some")
    K, mine = config.n_samples, list(run.share(len(records)))
    uniforms = run.uniforms(len(records) * K, config.max_new_tokens, 2).view(len(records), K, -1)
    samples = []
    for i in range(0, len(mine), 64):
        rows = mine[i:i + 64]
        prompts = [prompt_ids(tokenizer, records[row]["prompt"]) for row in rows for _ in range(K)]
        responses, _ = generate(model, prompts, config.max_new_tokens, tokenizer.end, uniforms[rows].flatten(0, 1),
                                config.temperature)
        for j, row in enumerate(rows):
            different = sorted(set(map(tuple, responses[j * K:(j + 1) * K])))
            samples.append(dict(id=records[row]["id"], prompt=records[row]["prompt"], responses=[
                dict(text=tokenizer.text(r), tokens=list(r), model="sft.pt", ended=tokenizer.end in r,
                     temperature=config.temperature, seed=config.seed) for r in different]))
    samples = run.gather(samples)
    if run.main:
        with open(run.path("samples.jsonl.tmp"), "w", encoding="utf-8", newline="\n") as f:
            f.write(to_jsonl(samples))
        run.publish("samples.jsonl")
        print(f"sampled {K} responses to each of {len(samples):,} prompts ({run.elapsed():.0f} s)")
        for response in samples[0]["responses"]:
            print(f"  {samples[0]['prompt']}  →  {response['text']}")


# ---------------------------------------------------------------------------------------------------------------------
# rank

def group_ties(values, width=0.25):
    """Indices from the best value to the worst; those within `width` of the best of their group are tied."""
    groups = []
    for i in sorted(range(len(values)), key=lambda i: -values[i]):
        if groups and values[groups[-1][0]] - values[i] < width:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def simulated_annotator(samples, records, noise, rng):
    """Rank by rubric score + Gumbel noise, whose larger value is i's with probability σ((score_i - score_j)/noise):
    close calls are often wrong, clear ones seldom, as with people (Luce 1959). What comes out alike is tied."""
    for sample in samples:
        scores = [rubric_score(records[sample["id"]], r["text"], r["ended"]) for r in sample["responses"]]
        yield group_ties([s + noise * -np.log(-np.log(rng.uniform(1e-12, 1))) for s in scores])


def parse_ranking(text, n):
    """'2>0=3>1' → [[2], [0, 3], [1]]: every one of the numbers 0 … n-1 once; else ValueError says what is wrong."""
    groups = [[int(i) if i.strip().isdecimal() else i.strip() for i in group.split("=")] for group in text.split(">")]
    named = [i for group in groups for i in group]
    if sorted(map(str, named)) != sorted(map(str, range(n))):
        raise ValueError(f"name each of {', '.join(map(str, range(n)))} once, as in " +
                         ">".join(map(str, reversed(range(n)))) + " or with ties 1=0")
    return groups


def human_annotator(samples, path, name):
    """Show each prompt with its responses in random order and take down the ranking; every line is saved at once."""
    done = {(r["id"], r["annotator"]) for r in (read_jsonl(path) if os.path.exists(path) else [])}
    todo = [s for s in samples if (s["id"], name) not in done and len(s["responses"]) > 1]
    print(f"\n{name}: {len(todo)} prompts to rank. Order the responses from best to worst by helpfulness, accuracy\n"
          "and safety, for example 2>0=3>1 (= is a tie). s skips, u takes the last one back, q stops; all is kept.")
    i, saved = 0, []
    while i < len(todo):
        sample = todo[i]
        responses = sample["responses"]
        order = random.Random(f"{name} {sample['id']}").sample(range(len(responses)), len(responses))  # blind, shuffled
        print(f"\n[{i + 1}/{len(todo)}]  {sample['prompt']}")
        for shown, index in enumerate(order):
            print(f"   {shown}  {responses[index]['text']}" + ("" if responses[index]["ended"] else " […]"))
        started = time.time()
        try:
            answer = input("ranking> ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            answer = "q"
        if answer == "q":
            break
        if answer == "u":
            if saved:
                with open(path, "r+", encoding="utf-8") as f:
                    f.truncate(saved.pop())
                i -= 1
            continue
        try:
            groups = [] if answer == "s" else parse_ranking(answer, len(order))
        except ValueError as error:
            print(f"   {error}")
            continue
        line = make_ranking(sample, [[order[shown] for shown in group] for group in groups], name, order,
                            time.time() - started, skipped=answer == "s")
        with open(path, "a", encoding="utf-8", newline="\n") as f:
            f.seek(0, os.SEEK_END)
            saved.append(f.tell())
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
            f.flush()
            os.fsync(f.fileno())
        i += 1
    print(f"\n{len(saved)} rankings added to {path}; the same command goes on where you stopped")


def make_ranking(sample, ranking, annotator, order, seconds, skipped=False):
    """One line of rankings.jsonl: groups of indices into the responses, best first; a group of several is a tie."""
    return dict(id=sample["id"], prompt=sample["prompt"], responses=sample["responses"], ranking=ranking,
                display_order=order, annotator=annotator, criteria=["helpfulness", "accuracy", "safety"],
                skipped=skipped, seconds=round(seconds, 1), time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                schema=1)


def rank_responses(run, config):
    samples = read_jsonl(run.path("samples.jsonl"), "python reward.py --steps=sample")
    if config.annotator == "human":
        return human_annotator(samples, run.path("rankings.jsonl"), config.name or getpass.getuser())
    records = {r["id"]: r for r in read_jsonl(run.path("prompts.jsonl")) if "rubric" in r}
    samples = [s for s in samples if s["id"] in records]
    if not samples:
        raise SystemExit("the simulated annotator ranks by rubrics, and no prompt has one: use --annotator=human")
    rankings = [make_ranking(sample, groups, "simulated", list(range(len(sample["responses"]))), 0.0)
                for sample, groups in zip(samples, simulated_annotator(samples, records, config.annotator_noise,
                                                                       np.random.default_rng((config.seed, 3))))]
    with open(run.path("rankings.jsonl.tmp"), "w", encoding="utf-8", newline="\n") as f:
        f.write(to_jsonl(rankings))
    run.publish("rankings.jsonl")
    print(f"a simulated annotator (noise {config.annotator_noise}) ranked the responses to {len(rankings):,} prompts")


# ---------------------------------------------------------------------------------------------------------------------
# train

def ranking_loss(scores, ranks):
    """The K-wise loss of each prompt (Ouyang et al. 2022, eq. 1): mean of -log σ(r_i - r_j) over its ordered pairs.

    scores (P, K): r of each response. ranks (P, K): 0 is best, equal numbers are ties, negative ones are padding. Tied
    pairs are left out, also from the divisor. Returns (P,), 0 for a prompt without an ordered pair."""
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] >= 0)                 # (P, K, K): i above j
    margin = scores[:, :, None] - scores[:, None, :]                                            # (P, K, K): r_i - r_j
    return -(F.logsigmoid(margin) * better).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


def last_token_score(model, tokens, lengths):
    """r of whole sequences: the scalar at each one's last token. tokens (N, T) padded, lengths (N,) → (N,)."""
    return model(tokens).gather(1, lengths[:, None] - 1).squeeze(1)


def make_batch(rankings, tokenizer, device):
    """Rankings → tokens (P·K, T), lengths (P·K,), ranks (P, K), where K is the largest number of responses."""
    K = max(len(r["responses"]) for r in rankings)
    sequences, ranks = [], []
    for r in rankings:
        prompt = prompt_ids(tokenizer, r["prompt"])
        sequences += [prompt + response["tokens"] for response in r["responses"]]
        sequences += [prompt] * (K - len(r["responses"]))
        place = {i: rank for rank, group in enumerate(r["ranking"]) for i in group}
        ranks.append([place.get(i, -1) for i in range(K)])
    lengths = torch.tensor([len(s) for s in sequences])
    return pad(sequences).to(device), lengths.to(device), torch.tensor(ranks, device=device)


@torch.no_grad()
def score_all(model, rankings, tokenizer, run):
    """The scores of all responses, a list for each prompt; shared among the processes."""
    model.eval()
    mine, scores = [rankings[i] for i in run.share(len(rankings))], []
    for i in range(0, len(mine), 16):
        tokens, lengths, ranks = make_batch(mine[i:i + 16], tokenizer, run.device)
        with run.autocast():
            rows = last_token_score(model, tokens, lengths).view(ranks.shape).tolist()
        scores += [row[:len(r["responses"])] for row, r in zip(rows, mine[i:i + 16])]
    model.train()
    return run.gather(scores)


def accuracies(rankings, scores, records):
    """Share of pairs that the reward model orders as the annotator did, and as the rubric without noise does; the
    latter also for the pairs that differ in one of the three criteria."""
    hits = defaultdict(list)
    for r, s in zip(rankings, scores):
        place = {i: rank for rank, group in enumerate(r["ranking"]) for i in group}
        record = records.get(r["id"])
        verdicts = [judge(record, x["text"], x["ended"]) for x in r["responses"]] if record else None
        for i in range(len(s)):
            for j in range(i):
                if place.get(i, 0) != place.get(j, 0):
                    hits["accuracy"].append((s[i] - s[j]) * (place[j] - place[i]) > 0)
                for name in ("gold", "helpfulness", "accuracy", "safety") if verdicts else ():
                    a, b = verdicts[i][name], verdicts[j][name]
                    if abs(a - b) > 1e-9:
                        hits["accuracy_" + name].append((s[i] - s[j]) * (a - b) > 0)
    return {name: round(float(np.mean(values)), 4) for name, values in sorted(hits.items())}


def train_reward_model(run, config, tokenizer):
    parent = load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash)
    if config.n_reward_layer > parent["model_config"].n_layer:
        raise SystemExit(f"--n_reward_layer={config.n_reward_layer}: the SFT model has only "
                         f"{parent['model_config'].n_layer} blocks to start from")
    model_config = replace(parent["model_config"], n_layer=config.n_reward_layer)
    rankings = [r for r in read_jsonl(run.path("rankings.jsonl"), "python reward.py --steps=sample,rank")
                if len(r["ranking"]) > 1 and (config.annotator == "simulated" or r["annotator"] != "simulated")]
    records = {r["id"]: r for r in read_jsonl(run.path("prompts.jsonl")) if "rubric" in r}
    ids = sorted({r["id"] for r in rankings})
    random.Random(config.seed).shuffle(ids)  # held out by prompt: no response to a held-out prompt is trained on
    held_out = set(ids[:max(1, round(len(ids) * config.val_share))])
    train, val = [r for r in rankings if r["id"] not in held_out], [r for r in rankings if r["id"] in held_out]
    if not train:
        raise SystemExit(f"{len(rankings)} rankings with a preference in them are too few: rank more prompts first")

    lengths = [max(len(x["tokens"]) for x in r["responses"]) for r in train]
    steps_per_epoch = -(-len(train) // config.batch_size)
    steps = config.epochs * steps_per_epoch
    torch.manual_seed(config.seed)  # the new head does not depend on whether sampling came first
    model = ScalarModel(model_config).to(run.device)
    model.adopt(parent["model"])
    optimizer = Optimizers(model, config.learning_rate, config.muon_learning_rate, config.weight_decay)
    step = run.start(model, optimizer, tokenizer.hash)["step"]
    trained = run.wrap(model)
    if run.main:
        who = sorted({r["annotator"] for r in rankings})
        print(f"{len(train):,} rankings to learn from, {len(val):,} held out, by {', '.join(who)}; reward model of "
              f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.n_reward_layer} of "
              f"{parent['model_config'].n_layer} blocks")

    def save(name, **more):
        run.save(name, model, optimizer, step=step, best=None, tokenizer=tokenizer.hash, parent="sft: sft.pt", **more)

    while step < steps:
        epoch, index = divmod(step, steps_per_epoch)
        batch = [train[i] for i in epoch_batches(lengths, config.batch_size, (config.seed, 4, epoch))[index]]
        # Each process pads and scores only its own prompts: a prompt, with all its pairs, is one element of the batch.
        loss = run.backward(trained, len(batch), config.micro_batch_size, lambda rows:
                            batch_loss(trained, batch[rows], tokenizer, run.device) / len(batch))
        run.update(model, optimizer, loss, step, config, learning_rate_factor(step, steps, config.warmup_steps))
        step += 1
        stop = run.stopping()
        if step % 40 == 0 or step == 1:
            run.log(step, f"step {step:4}/{steps}  loss {loss:.4f}", loss=loss)
        if step % steps_per_epoch == 0 or stop:
            figures = accuracies(val, score_all(model, val, tokenizer, run), records)
            run.log(step, f"step {step:4}/{steps}  held out: " + "  ".join(
                f"{k.replace('_', ' by ')} {v:.3f}" for k, v in figures.items()), **figures)
            save("reward.last.pt")
        if stop and step < steps:
            run.stopped("reward.last.pt")

    figures = accuracies(val, score_all(model, val, tokenizer, run), records)

    # Only differences of scores have meaning so far. Shift and scale them to mean 0 and standard deviation 1 over the
    # SFT model's samples, so that PPO's KL coefficient means the same for every reward model (Stiennon et al. 2020).
    scores = np.concatenate([np.array(s) for s in score_all(model, train, tokenizer, run)])
    mean, std = float(scores.mean()), float(scores.std())
    with torch.no_grad():
        model.score.weight.div_(std)
        model.score.bias.sub_(mean).div_(std)
    save("reward.pt", score_mean=mean, score_std=std)
    if run.main:
        tokens = [len(x["tokens"]) for r in train for x in r["responses"]]
        figures["length_correlation"] = round(float(np.corrcoef(scores, tokens)[0, 1]), 4) if np.std(tokens) else 0.0
        update_scorecard(config.out_dir, "reward", dict(figures, n=len(val), rankings=len(train),
                                                        seconds=round(run.elapsed(), 1)))
        print(f"scores normalised (mean {mean:.2f}, standard deviation {std:.2f} before); correlation with length "
              f"{figures['length_correlation']:.2f}; next: python ppo.py")


def batch_loss(model, rankings, tokenizer, device):
    """Σ ranking_loss over some prompts."""
    tokens, lengths, ranks = make_batch(rankings, tokenizer, device)
    return ranking_loss(last_token_score(model, tokens, lengths).view(ranks.shape), ranks).sum()


def main():
    config = load_config(RewardConfig, __doc__)
    with Run(config, "reward") as run:
        tokenizer = load_tokenizer(config.out_dir)
        for step in config.steps.split(",") if not config.resume else ("train",):
            if step == "sample":
                sample_responses(run, config, tokenizer)
            elif step == "rank" and run.main:
                rank_responses(run, config)
            elif step == "train":
                run.barrier()
                train_reward_model(run, config, tokenizer)


if __name__ == "__main__":
    main()
