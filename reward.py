"""Stage 3, reward model: a smaller model learns from rankings what people like.

    --steps=sample   K responses of the SFT model to each prompt                  → samples.jsonl
    --steps=rank     a simulated annotator orders each prompt's responses         → rankings.jsonl
    --steps=train    one number r(prompt, response) that explains the rankings    → reward.pt

    loss of a prompt = -1/pairs · Σ log σ(r_i - r_j)      over all pairs with i ranked above j

(Ouyang et al. 2022, eq. 1. In the Bradley–Terry model σ(r_i - r_j) is the probability that a person
prefers i to j.) The script alone does all three steps. The simulated annotator ranks by rubric and
errs as people do; the reward model, which sees many rankings and no rubric, becomes better than it.
People rank with tools/annotate.py, in the terminal or on a page:

    python reward.py                                             everything, simulated annotator
    python reward.py --rankings=out/tiny/rankings-ann.jsonl      train on what a person has ranked
    torchrun --nproc_per_node=8 reward.py --config=…
"""

import zlib
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F

from model import (LanguageModel, Optimizer, Run, ScalarModel, TrainConfig, clip_gradients,
                   learning_rate_factor, load_checkpoint, load_config, option, pad, restore)
from prepare import (CRITERIA, as_text, epoch_batches, judge, load_tokenizer, prompt_ids,
                     random_stream, read_judged, read_jsonl, read_prompts, read_rankings, respond,
                     rubric_score, update_scorecard, write_jsonl)

@dataclass
class RewardConfig(TrainConfig):
    table = "reward"
    steps: str = option("sample,rank,train", "which steps to run, separated by commas")
    annotator_noise: float = option(1.0, "noise on the annotator's scores; 0: it never errs", low=0)
    rankings: str = option("", "comma-separated files of people's rankings: only train, on these")
    n_rankings: int = option(0, "train on this many rankings; 0: on all", low=0)
    variant: str = option("", "a name: the model becomes reward-NAME.pt, beside others")
    n_samples: int = option(8, "responses per prompt (K)", low=2)
    temperature: float = option(1.0, "of the sampled responses", low=0.01)
    n_reward_layer: int = option(2, "blocks, copied from the pretrained model's first ones", low=1)
    epochs: int = option(3, "passes over the rankings", low=1)
    batch_size: int = option(16, "prompts a step, each with all its responses", low=1)
    micro_batch_size: int = option(16, "prompts that a process computes at once", low=1)
    muon_learning_rate: float = option(0.005, "peak rate of Muon; 0: AdamW for all weights", low=0)
    weight_decay: float = option(0.1, "decay of the matrices", low=0)
    val_share: float = option(0.15, "share of the prompts that is held out", low=0.001, high=0.5)

    def check(self):
        if set(self.steps.split(",")) - {"sample", "rank", "train"}:
            return f"steps={self.steps} must be some of sample,rank,train"

# --------------------------------------------------------------------------------------------------
# Sample and rank

def sample_responses(run, config, tokenizer):
    """K responses of the SFT model to each prompt that is kept for comparisons → samples.jsonl.
    Equal ones are merged: nobody can order them. ("samples",) is the purpose for random_stream."""
    sft = load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash)
    model = restore(LanguageModel, sft, run.device)
    records = read_prompts(run, tokenizer, model.model.config.block_size, "compare")
    K = config.n_samples
    repeated = [record for record in records for _ in range(K)]
    responses = respond(model, tokenizer, repeated, run, ("samples",), config.temperature)
    samples = []
    for i, record in enumerate(records):
        different = sorted({tuple(response) for response in responses[i * K:(i + 1) * K]})
        different = [dict(text=tokenizer.text(ids), ended=tokenizer.end in ids, tokens=list(ids))
                     for ids in different]
        samples.append(dict(id=record["id"], prompt=record["prompt"], responses=different))
    if run.main:
        write_jsonl(run.path("samples.jsonl"), samples)
        print(f"sampled {K} responses to each of {len(samples):,} prompts, such as")
        for response in samples[0]["responses"]:
            print(f"  {as_text(samples[0]['prompt'])}  →  {response['text']}")

def group_ties(values, width=0.25):
    """Indices from the best value to the worst, as groups: what is within `width` of the best of a
    group is tied with it."""
    groups = []
    for i in sorted(range(len(values)), key=lambda i: -values[i]):
        if groups and values[groups[-1][0]] - values[i] < width:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups

def simulated_annotator(samples, records, config):
    """Rank by rubric score plus Gumbel noise, then tie what is close. The difference of two Gumbels
    is logistic: i comes above j with the probability σ((score_i - score_j) / noise) (Luce 1959), so
    clear calls are seldom wrong.

    records: id → record with a rubric; samples of other prompts are passed over."""
    rng, rankings = random_stream(config.seed, "annotator"), []
    for sample in samples:
        if record := records.get(sample["id"]):
            scores = [rubric_score(record, r["text"], r["ended"]) for r in sample["responses"]]
            noisy = scores + config.annotator_noise * rng.gumbel(size=len(scores))
            rankings.append(sample | dict(ranking=group_ties(noisy), annotator="simulated"))
    return rankings

def rank_responses(run, config):
    samples = read_jsonl(run.path("samples.jsonl"), "python reward.py --steps=sample")
    rankings = simulated_annotator(samples, read_rubrics(run), config)
    if not rankings:
        raise SystemExit("no prompt has a rubric to rank by: rank with tools/annotate.py")
    write_jsonl(run.path("rankings.jsonl"), rankings)
    print(f"a simulated annotator ranked the responses to {len(rankings):,} prompts")

def read_rubrics(run):
    return {r["id"]: r for r in read_judged(run.path("prompts.jsonl"))}

# --------------------------------------------------------------------------------------------------
# Train

def ranking_loss(scores, ranks):
    """The loss of each prompt (Ouyang et al. 2022, eq. 1): the mean of -log σ(r_i - r_j) over its
    ordered pairs.

    scores (P, K): r of each response. ranks (P, K): 0 is best, equal numbers are ties, negative
    ones padding. Ties count in neither sum nor divisor. Returns (P,), 0 if nothing is ordered."""
    above = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] >= 0)         # (P, K, K)
    margin = scores[:, :, None] - scores[:, None, :]                                   # r_i - r_j
    return -(F.logsigmoid(margin) * above).sum((1, 2)) / above.sum((1, 2)).clamp(min=1)

def ranks_of(record):
    """The rank of each response: [[2], [0, 1]] → [1, 1, 0]."""
    rank = {i: place for place, group in enumerate(record["ranking"]) for i in group}
    return [rank[i] for i in range(len(record["responses"]))]

def make_batch(rankings, tokenizer, device):
    """P rankings → one row for each: its prompt, which is read only once, then its K responses, one
    behind the other. As the mask lets a token see nothing but the prompt and its own response, and
    the positions of each response begin where the prompt ends, each is read as if it were alone.

    Gives tokens and positions (P, T), mask (P, 1, T, T), ends (P, K), the index in the row of each
    response's last token, and ranks (P, K), -1 where a prompt has fewer. `pad` rounds up K, too."""
    rows, branches, positions, ends, ranks = [], [], [], [], []
    for r in rankings:
        parts = [prompt_ids(tokenizer, r["prompt"])] + [x["tokens"] for x in r["responses"]]
        lengths = [len(part) for part in parts]
        rows.append(sum(parts, []))
        branches.append(np.repeat(range(len(parts)), lengths))  # 0 0 0 of the prompt, 1 1 2 2 2 …
        starts = [0] + [lengths[0]] * len(r["responses"])  # the prompt's, then all behind it
        positions.append([start + t for start, n in zip(starts, lengths) for t in range(n)])
        ends.append(np.cumsum(lengths)[1:] - 1)
        ranks.append(ranks_of(r))
    branch = pad(branches, -1)                                                         # (P, T)
    own = branch[:, :, None] == branch[:, None]                                        # (P, T, T)
    mask = (own | (branch[:, None] == 0)).tril()[:, None]
    batch = pad(rows), pad(positions), mask, pad(ends), pad(ranks, -1)
    return [x.to(device) for x in batch]

def score_batch(model, rankings, tokenizer, device):
    """The scores of all responses to some prompts, and their ranks, both (P, K)."""
    tokens, positions, mask, ends, ranks = make_batch(rankings, tokenizer, device)
    return model(tokens, positions=positions, mask=mask).gather(1, ends), ranks

def batch_loss(model, rankings, tokenizer, device):
    """The sum of the ranking losses of some prompts."""
    return ranking_loss(*score_batch(model, rankings, tokenizer, device)).sum()

def score_all(model, rankings, tokenizer, run):
    """The scores of all responses, a list for each ranking."""
    mine = [rankings[i] for i in run.share(len(rankings))]
    scores = []
    for start in range(0, len(mine), 16):
        batch = mine[start:start + 16]
        with run.evaluating(model):
            found, _ = score_batch(model, batch, tokenizer, run.device)                # (P, K)
        scores += [row[:len(r["responses"])] for row, r in zip(found.tolist(), batch)]
    return run.gather(scores)

def accuracies(rankings, scores, records):
    """The share of pairs that the reward model orders as the annotator (accuracy), as the rubric's
    sum (accuracy_gold) and as each of its criteria (accuracy_safety, …). Ties of the annotator or
    the rubric are left out; equal scores of the reward model count as an error."""
    hits = {}
    for ranking, s in zip(rankings, scores):
        ranks, record = ranks_of(ranking), records.get(ranking["id"])
        better = dict(accuracy=[-rank for rank in ranks])  # name → how good each response is
        if record:
            verdicts = [judge(record, r["text"], r["ended"]) for r in ranking["responses"]]
            for name in ("gold", *CRITERIA):
                better[f"accuracy_{name}"] = [verdict[name] for verdict in verdicts]
        for name, values in better.items():
            for i, j in combinations(range(len(s)), 2):
                if abs(values[i] - values[j]) > 1e-9:
                    hit = (s[i] - s[j]) * (values[i] - values[j]) > 0
                    hits.setdefault(name, []).append(hit)
    return {name: round(float(np.mean(h)), 4) for name, h in hits.items()}

def load_rankings(run, config, tokenizer, block_size):
    """The usable rankings as (training, held out): no repeats (shown twice to test the annotator),
    none that a person has flagged. In the order of a hash of their prompts' ids the first val_share
    are held out, whatever the seed; n_rankings shortens the training side only."""
    paths = config.rankings.split(",") if config.rankings else [run.path("rankings.jsonl")]
    rankings, usable = read_rankings(paths, tokenizer), []
    for r in rankings:
        n_prompt = len(prompt_ids(tokenizer, r["prompt"]))
        fits = all(n_prompt + len(response["tokens"]) <= block_size for response in r["responses"])
        if fits and len(r["ranking"]) > 1 and not r.get("repeat") and not r.get("flagged"):
            usable.append(r)
    usable.sort(key=lambda r: zlib.crc32(str(r["id"]).encode()))
    ids = list(dict.fromkeys(r["id"] for r in usable))
    held_out = set(ids[:max(1, round(len(ids) * config.val_share))])
    train = [r for r in usable if r["id"] not in held_out]
    if not train:
        raise SystemExit(f"{len(usable)} rankings are too few: rank more prompts first")
    return train[:config.n_rankings or None], [r for r in usable if r["id"] in held_out]

def train(run, config, tokenizer, model, optimizer, rankings, held_out, records):
    """The loop. Returns the step it ended at."""
    origin = dict(tokenizer=tokenizer.hash, parent="pretrain.pt")
    step = run.start(tokenizer.hash, model=model, optimizer=optimizer).get("step", 0)
    ddp_model = run.wrap(model)
    lengths = [len(prompt_ids(tokenizer, r["prompt"]))
               + sum(len(response["tokens"]) for response in r["responses"]) for r in rankings]
    batch_size = min(config.batch_size, len(rankings))
    steps_per_epoch = len(rankings) // batch_size
    steps, batches = config.epochs * steps_per_epoch, None
    while step < steps:
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0 or batches is None:  # an epoch begins, or --resume landed inside one
            rng = random_stream(config.seed, "reward", epoch)
            batches = epoch_batches(lengths, batch_size, rng)
        batch = [rankings[i] for i in batches[index]]
        loss = 0.0
        for rows in run.micro_batches(batch_size, ddp_model):
            with run.autocast():
                part = batch_loss(ddp_model, batch[rows], tokenizer, run.device) / batch_size
            (part * run.world).backward()  # DDP averages gradients; we want their sum
            loss += part.detach()
        clip_gradients(model, config.gradient_clip, step)
        optimizer.step(learning_rate_factor(step, steps, config.warmup_steps))
        step += 1

        if step % 40 == 0 or step == 1:
            loss = float(run.sum(loss))
            run.log(step, f"step {step:4}/{steps}  loss {loss:.4f} of {batch_size}", loss=loss)
        due = step % steps_per_epoch == 0
        if due:
            figures = accuracies(held_out, score_all(model, held_out, tokenizer, run), records)
            text = "  ".join(f"{k.replace('_', ' by ')} {v:.3f}" for k, v in figures.items())
            run.log(step, f"step {step:4}/{steps}  held out: {text}", **figures)
        run.save_last(due, model, step, optimizer=optimizer.state_dict(), **origin)
    return step

@torch.no_grad()
def normalise(model, scores):
    """Shift and scale the reward model so that these scores get mean 0 and standard deviation 1.
    Only differences of scores have a meaning so far; now PPO's KL coefficient means the same for
    every reward model (Ziegler et al. 2019; Stiennon et al. 2020)."""
    mean, std = float(np.mean(scores)), max(float(np.std(scores)), 1e-6)
    model.score.weight.div_(std)
    model.score.bias.sub_(mean).div_(std)

def train_reward_model(run, config, tokenizer):
    # Not from the SFT model: that has learned the demonstrations' errors, too.
    base = load_checkpoint(run.path("pretrain.pt"), "python pretrain.py", tokenizer.hash)
    n_layer = base["model_config"].n_layer
    if config.n_reward_layer > n_layer:
        raise SystemExit(f"--n_reward_layer: the pretrained model has only {n_layer} blocks")
    model_config = replace(base["model_config"], n_layer=config.n_reward_layer)
    rankings, held_out = load_rankings(run, config, tokenizer, model_config.block_size)
    records = read_rubrics(run)
    torch.manual_seed(config.seed)  # the new head does not depend on whether sampling came first
    model = ScalarModel(model_config).to(run.device)
    model.load_state_dict(base["model"], strict=False)  # the lower blocks; `score` is new
    optimizer = Optimizer(model, config.learning_rate, config.muon_learning_rate,
                          config.weight_decay, dtype=run.dtype)
    annotators = ", ".join(sorted({r["annotator"] for r in rankings}))
    if run.main:
        print(f"{len(rankings):,} usable rankings, {len(held_out):,} held out, by {annotators}")
    step = train(run, config, tokenizer, model, optimizer, rankings, held_out, records)

    scores = score_all(model, held_out, tokenizer, run)  # unscaled: σ(r_i - r_j) is a probability
    normalise(model, np.concatenate(score_all(model, rankings[:1000], tokenizer, run)))
    run.save(f"{run.stage}.pt", model, step, tokenizer=tokenizer.hash, parent="pretrain.pt")
    if run.main:
        figures = accuracies(held_out, scores, records)
        figures |= dict(n=len(held_out), rankings=len(rankings), annotators=annotators)
        update_scorecard(config.out_dir, run.stage, figures)
        write_jsonl(run.path(f"{run.stage}.held_out.jsonl"),
                    [r | dict(scores=s) for r, s in zip(held_out, scores)])

def main():
    config = load_config(RewardConfig, __doc__)
    tokenizer = load_tokenizer(config.out_dir)
    run = Run(config)
    steps = ["train"] if config.resume or config.rankings else config.steps.split(",")
    if "sample" in steps:
        sample_responses(run, config, tokenizer)
    if "rank" in steps and run.main:
        rank_responses(run, config)
    run.sum(0.0)  # all processes wait for the rankings
    if "train" in steps:
        train_reward_model(run, config, tokenizer)

if __name__ == "__main__":
    main()
