"""Stage 3, reward model: a smaller model learns from rankings what people like.

    --steps=sample   K responses of the SFT model to each prompt     → samples.jsonl, and rank.html for people
    --steps=rank     an annotator orders each prompt's responses     → rankings.jsonl
    --steps=train    one number r(prompt, response) that explains the rankings    → reward.pt

    loss of a prompt = -1/pairs · Σ log σ(r_i - r_j)     over all pairs of which i was ranked above j

(Ouyang et al. 2022, eq. 1; the Bradley–Terry model: σ(r_i - r_j) is the probability that i is preferred.) Left to
itself the script does all three with a *simulated* annotator, which ranks by the rubric of prepare.py and errs like
people do. People rank in the terminal, or in a browser with rank.html, which can be handed out as a file:

    python reward.py                                                  everything, simulated annotator
    python reward.py --steps=rank,train --annotator=human             rank in the terminal, then train on that
    python reward.py --rankings='rankings-ann.jsonl,rankings-bo.jsonl'  train on what people ranked in rank.html
    torchrun --nproc_per_node=8 reward.py --config=…
"""

import contextlib
import getpass
import json
import os
import random
import signal
import time
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F

from model import (LanguageModel, Optimizers, Run, ScalarModel, TrainConfig, epoch_batches,
                   learning_rate_factor, load_checkpoint, load_config, need, option, pad, restore, write_file)
from prepare import (as_text, as_user, beside, check_prompt, judge, load_tokenizer, prompt_ids, read_jsonl,
                     read_prompts, respond, rubric_score, to_jsonl, update_scorecard)

CRITERIA = ("helpfulness", "accuracy", "safety")


@dataclass
class RewardConfig(TrainConfig):
    table = "reward"
    steps: str = option("sample,rank,train", "which steps to run, separated by commas")
    annotator: str = option("simulated", "who ranks", choices=("simulated", "human"))
    annotator_noise: float = option(0.1, "Gumbel noise on the simulated annotator's scores; 0: it never errs", low=0)
    name: str = option("", "a human annotator's name; default: the login name")
    rankings: str = option("", "files of people's rankings, separated by commas: only train, and on these")
    n_rankings: int = option(0, "train on so many rankings only; 0: on all", low=0)
    n_for_people: int = option(200, "prompts in rank.html", low=1)
    variant: str = option("", "a name for this reward model, reward-NAME.pt, beside others in the run folder")
    n_samples: int = option(4, "responses per prompt (K)", low=2)
    temperature: float = option(1.0, "of the sampled responses", low=0.01)
    n_reward_layer: int = option(2, "blocks of the reward model, taken from the bottom of the SFT model", low=1)
    epochs: int = option(5, "passes over the rankings", low=1)
    batch_size: int = option(16, "prompts a step, over all processes, each with all its responses", low=1)
    micro_batch_size: int = option(16, "prompts a process computes at once; the rest is accumulated", low=1)
    muon_learning_rate: float = option(0.005, "peak rate of Muon (matrices of the blocks); 0: AdamW for all", low=0)
    weight_decay: float = option(0.01, "decay of the matrices", low=0)
    val_share: float = option(0.15, "share of the ranked prompts held out to measure accuracy", low=0.001, high=0.5)

    def check(self):
        for step in self.steps.split(","):
            if step not in ("sample", "rank", "train"):
                return f"--steps={self.steps}: {step!r} is none of sample, rank, train"
        if self.name == "simulated":
            return "--name=simulated is the simulated annotator's name: choose another"


# ---------------------------------------------------------------------------------------------------------------------
# sample

def sample_responses(run, config, tokenizer):
    """K responses of the SFT model to each prompt reserved for comparisons; identical ones are merged."""
    model = restore(LanguageModel, load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash), run.device)
    records = read_prompts(run, tokenizer, model.model.config.block_size, "compare")
    K = config.n_samples
    responses = respond(model, tokenizer, [r for r in records for _ in range(K)], run, 2, config.temperature)
    if run.main:
        samples = []
        for i, record in enumerate(records):
            different = sorted(set(map(tuple, responses[i * K:(i + 1) * K])))
            samples.append(dict(id=record["id"], prompt=record["prompt"], responses=[
                dict(text=tokenizer.text(r), tokens=list(r), model="sft.pt", ended=tokenizer.end in r,
                     temperature=config.temperature, seed=config.seed) for r in different]))
        page = rank_page(samples[:config.n_for_people])
        for name, text in (("samples.jsonl", to_jsonl(samples)), ("rank.html", page)):
            write_file(run.path(name + ".tmp"), text)
            run.publish(name)
        print(f"sampled {K} responses to each of {len(samples):,} prompts ({run.elapsed():.0f} s); people can rank the "
              f"first {min(len(samples), config.n_for_people)} in {run.path('rank.html')}")
        for response in samples[0]["responses"]:
            print(f"  {as_text(samples[0]['prompt'])}  →  {response['text']}")


def rank_page(samples):
    """rank.html: the page of configs/rank.html with the samples in it. Every < is escaped, so that no response can end
    the element that holds them."""
    with open(beside("configs/rank.html"), encoding="utf-8") as f:
        return f.read().replace("__SAMPLES__", json.dumps(samples, ensure_ascii=False).replace("<", "\\u003c"))


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


def simulated_annotator(samples, records, config):
    """Rank by rubric score + Gumbel noise, whose larger value is i's with probability σ((score_i - score_j)/noise):
    close calls are often wrong, clear ones seldom, as with people (Luce 1959). What comes out alike is tied. Samples of
    prompts without a rubric are passed over."""
    rng, rankings = np.random.default_rng((config.seed, 3)), []
    for sample in (s for s in samples if s["id"] in records):
        scores = [rubric_score(records[sample["id"]], r["text"], r["ended"]) for r in sample["responses"]]
        groups = group_ties([s - config.annotator_noise * np.log(-np.log(rng.uniform(1e-12, 1))) for s in scores])
        rankings.append(make_ranking(sample, groups, "simulated", list(range(len(scores)))))
    return rankings


def parse_ranking(text, n):
    """'2>0=3>1' → [[2], [0, 3], [1]]: every one of the numbers 0 … n-1 once; else ValueError says what is wrong."""
    groups = [[i.strip() for i in group.split("=")] for group in text.split(">")]
    if sorted(i for group in groups for i in group) != sorted(map(str, range(n))):
        raise ValueError(f"name each of {', '.join(map(str, range(n)))} once, as in " +
                         ">".join(map(str, reversed(range(n)))) + " or with ties 1=0")
    return [[int(i) for i in group] for group in groups]


def with_repeats(samples):
    """(sample, is a repeat): about one in ten comes a second time, some prompts later, to measure self-consistency."""
    queue = []
    for i, sample in enumerate(samples):
        queue.append((sample, False))
        if i % 10 == 5:
            queue.append((samples[i - 4], True))
    return queue


def check_sample(record):
    """Fails where a line of samples.jsonl, or of a file of rankings, lacks what ranking it takes."""
    record["id"], as_user(record["prompt"]), [(r["text"], r["tokens"], r["ended"]) for r in record["responses"]]


def compared(record):
    """What a sample or a ranking is about."""
    return record["id"], as_text(record["prompt"]), *(r["text"] for r in record["responses"])


def human_annotator(samples, path, name):
    """Show each prompt with its responses in random order and take down the ranking; every line is saved at once."""
    earlier = read_jsonl(path, "python reward.py", check_sample) if os.path.exists(path) else []
    if earlier:
        with open(path, "rb+") as f:
            f.seek(-1, os.SEEK_END)
            f.write(b"\n" if f.read() != b"\n" else b"")  # somebody's editor may have taken the last line's end
    done = {compared(r) for r in earlier if r.get("annotator") == name}
    todo = with_repeats([s for s in samples if compared(s) not in done and len(s["responses"]) > 1])
    print(f"\n{name}: {len(todo)} prompts to rank. Order the responses from best to worst by helpfulness, accuracy\n"
          "and safety, for example 2>0=3>1 (= is a tie). s skips, u takes the last one back, f flags a prompt that\n"
          "nobody should train on, q stops; all is kept. Some prompts come twice.")
    i, saved, flagged = 0, [], False
    graceful = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends the session, at once
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while i < len(todo):
            sample, repeat = todo[i]
            responses = sample["responses"]
            rng = random.Random(f"{name} {sample['id']} {repeat}")
            order = rng.sample(range(len(responses)), len(responses))                            # blind and shuffled
            print(f"\n[{i + 1}/{len(todo)}]  {as_text(sample['prompt'])}" + "  (flagged)" * flagged)
            for shown, index in enumerate(order):
                print(f"   {shown}  {responses[index]['text']}" + ("" if responses[index]["ended"] else " […]"))
            started = time.time()
            answer = input("ranking> ").strip().lower()
            if answer == "q":
                break
            if answer == "f":
                flagged = not flagged
            if answer == "u" and saved:
                os.truncate(path, saved.pop())
                i -= 1
            if answer in ("f", "u"):
                continue
            try:
                groups = [] if answer == "s" else parse_ranking(answer, len(order))
            except ValueError as error:
                print(f"   {error}")
                continue
            line = make_ranking(sample, [[order[shown] for shown in group] for group in groups], name, order,
                                time.time() - started, skipped=answer == "s", flagged=flagged, repeat=repeat)
            with open(path, "ab", buffering=0) as f:
                saved.append(f.tell())
                f.write(to_jsonl([line]).encode())
                os.fsync(f.fileno())
            i, flagged = i + 1, False
    signal.signal(signal.SIGINT, graceful)
    print(f"\n{len(saved)} rankings added to {path}; the same command goes on where you stopped")


def make_ranking(sample, ranking, annotator, order, seconds=0.0, skipped=False, flagged=False, repeat=False):
    """One line of rankings.jsonl: groups of indices into the responses, best first; a group of several is a tie."""
    return dict(id=sample["id"], prompt=sample["prompt"], responses=sample["responses"], ranking=ranking,
                display_order=order, annotator=annotator, criteria=CRITERIA, skipped=skipped, flagged=flagged,
                repeat=repeat, seconds=round(seconds, 1), time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                schema=1)


def rank_responses(run, config):
    samples = read_jsonl(run.path("samples.jsonl"), "python reward.py --steps=sample", check_sample)
    if config.annotator == "human":
        return human_annotator(samples, run.path("rankings.jsonl"), config.name or getpass.getuser())
    rankings = simulated_annotator(samples, read_rubrics(run), config)
    if not rankings:
        raise SystemExit("the simulated annotator ranks by rubrics, and no prompt has one: use --annotator=human, or "
                         "people's comparisons by --rankings=FILE")
    write_file(run.path("rankings.jsonl.tmp"), to_jsonl(rankings))
    run.publish("rankings.jsonl")
    print(f"a simulated annotator (noise {config.annotator_noise}) ranked the responses to {len(rankings):,} prompts")


def read_rubrics(run):
    return {r["id"]: r for r in read_jsonl(run.path("prompts.jsonl"), check=check_prompt) if "rubric" in r}


# ---------------------------------------------------------------------------------------------------------------------
# Reading rankings, and how well annotators agree

def fault(line, tokenizer):
    """What is wrong with a line of a rankings file, or "" if it can be used."""
    try:
        r = json.loads(line)
        responses, ranking = r["responses"], r["ranking"]
        if not all(isinstance(text, str) for text in (r["id"], r["annotator"], *(m["role"] + m["content"] for m in
                                                                                as_user(r["prompt"])))):
            return "id, prompt and annotator must be text"
        if not all(isinstance(x["text"], str) and x["tokens"] and
                   all(type(t) is int and 0 <= t < tokenizer.size for t in x["tokens"]) for x in responses):
            return "a response without text, or with tokens that this tokenizer does not have"
        if any(tokenizer.text(x["tokens"]) != x["text"] for x in responses):
            return "tokens that are not those of their text: they are another tokenizer's"
        if not all(type(x["ended"]) is bool for x in responses):
            return "a response that does not say whether it ended"
        named = sorted(i for group in ranking for i in group)
        if (named != list(range(len(responses))) or not all(ranking)) and not (r.get("skipped") and ranking == []):
            return "the ranking does not name each response once"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"no ranking ({type(error).__name__}: {error})"
    return ""


def read_rankings(paths, tokenizer):
    """The usable lines of all files; malformed ones are dropped, each named with what is wrong."""
    rankings = []
    for path in paths:
        with open(need(path, "python reward.py --steps=sample,rank"), encoding="utf-8-sig", errors="replace") as f:
            for number, line in enumerate(f, 1):
                if wrong := fault(line, tokenizer):
                    print(f"{path}, line {number}: dropped, {wrong}")
                else:
                    rankings.append(json.loads(line))
    return rankings


def preferences(ranking):
    """{(i, j): whether i was ranked above j} for the pairs i < j that are not tied."""
    place = {i: rank for rank, group in enumerate(ranking["ranking"]) for i in group}
    return {(i, j): place[i] < place[j] for i, j in combinations(sorted(place), 2) if place[i] != place[j]}


def agreement(some, others):
    """Share of the pairs ordered by both that are ordered alike, and their number. some, others: lists of rankings,
    matched by prompt and responses; pairs that either has tied are left out (Ouyang et al. 2022, 3.4)."""
    known, alike = {compared(r): preferences(r) for r in others}, []
    for r in some:
        theirs = known.get(compared(r), {})
        alike += [first == theirs[pair] for pair, first in preferences(r).items() if pair in theirs]
    return (float(np.mean(alike)) if alike else float("nan")), len(alike)


def report_agreement(rankings):
    """Print how well each two annotators agree, and each with himself on prompts that came twice."""
    by = {}
    for r in rankings:
        by.setdefault(r["annotator"], []).append(r)
    first = {name: [r for r in some if not r.get("repeat")] for name, some in by.items()}
    for a, b in combinations(sorted(first), 2):
        share, n = agreement(first[a], first[b])
        print(f"  {a} and {b}: agree on {share:.1%} of {n} pairs" if n else f"  {a} and {b}: no pair in common")
    for name, some in by.items():
        share, n = agreement([r for r in some if r.get("repeat")], first[name])
        if n:
            print(f"  {name} when asked twice: the same for {share:.1%} of {n} pairs")


# ---------------------------------------------------------------------------------------------------------------------
# train

def ranking_loss(scores, ranks):
    """The K-wise loss of each prompt (Ouyang et al. 2022, eq. 1): mean of -log σ(r_i - r_j) over its ordered pairs.

    scores (P, K): r of each response. ranks (P, K): 0 is best, equal numbers are ties, negative ones are padding. Tied
    pairs are left out, also from the divisor. Returns (P,), 0 for a prompt without an ordered pair."""
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] >= 0)                 # (P, K, K): i above j
    margin = scores[:, :, None] - scores[:, None, :]                                            # (P, K, K): r_i - r_j
    return -(F.logsigmoid(margin) * better).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


def make_batch(rankings, tokenizer, device):
    """Rankings → tokens (N, T) and lengths (N,) of all their responses, ranks (P, K): -1 where a prompt has fewer."""
    K = max(len(r["responses"]) for r in rankings)
    sequences, ranks = [], []
    for r in rankings:
        prompt = prompt_ids(tokenizer, r["prompt"])
        sequences += [prompt + response["tokens"] for response in r["responses"]]
        place = {i: rank for rank, group in enumerate(r["ranking"]) for i in group}
        ranks.append([place.get(i, -1) for i in range(K)])
    lengths = torch.tensor([len(s) for s in sequences])
    sequences += [[]] * (-len(sequences) % 8)  # few different shapes, as in `pad`
    return pad(sequences).to(device), lengths.to(device), torch.tensor(ranks, device=device)


def length(ranking, tokenizer):
    """Tokens of a prompt with the longest of its responses."""
    return len(prompt_ids(tokenizer, ranking["prompt"])) + max(len(x["tokens"]) for x in ranking["responses"])


def batch_loss(model, rankings, tokenizer, device):
    """Σ ranking_loss over some prompts."""
    tokens, lengths, ranks = make_batch(rankings, tokenizer, device)
    scores = model(tokens, lengths)                                                             # (N,)
    return ranking_loss(torch.zeros(ranks.shape, device=device).masked_scatter(ranks >= 0, scores), ranks).sum()


def score_all(model, rankings, tokenizer, run):
    """The scores of all responses, a list for each prompt."""
    def scores(part):
        tokens, lengths, ranks = make_batch([rankings[i] for i in part], tokenizer, run.device)
        return [row.tolist() for row in model(tokens, lengths).split((ranks >= 0).sum(1).tolist())]

    return run.evaluate(scores, len(rankings), 16)


def all_pairs(rankings, scores, records):
    """Every two responses to one prompt, as columns: margin r_i - r_j; preferred, 1, 0 (tied) or -1; longer, by so many
    tokens; and how far apart the rubric without noise puts them, in gold and each criterion (0 without a rubric)."""
    rows = []
    for r, s in zip(rankings, scores):
        above, record = preferences(r), records.get(r["id"])
        verdicts = [judge(record, x["text"], x["ended"]) for x in r["responses"]] if record else None
        for i, j in combinations(range(len(s)), 2):
            gaps = [verdicts[i][c] - verdicts[j][c] if verdicts else 0.0 for c in ("gold", *CRITERIA)]
            longer = len(r["responses"][i]["tokens"]) - len(r["responses"][j]["tokens"])
            rows.append([s[i] - s[j], 2 * above[i, j] - 1 if (i, j) in above else 0, longer, *gaps])
    return dict(zip(("margin", "preferred", "longer", "gold", *CRITERIA), np.array(rows, float).reshape(-1, 7).T))


def share(hits, among):
    """The share of hits among the chosen pairs, None if there is none."""
    return round(float(hits[among].mean()), 4) if among.any() else None


def known(figures):
    return {name: figure for name, figure in figures.items() if figure is not None}


def accuracies(pairs):
    """Share of pairs that the reward model orders as the annotator did, and as the rubric without noise does, the
    latter also for pairs that differ in one of the criteria. Strict: equal scores are an error."""
    columns = dict(accuracy="preferred", accuracy_gold="gold", **{"accuracy_" + c: c for c in CRITERIA})
    return known({name: share(pairs["margin"] * pairs[column] > 0, np.abs(pairs[column]) > 1e-9)
                  for name, column in columns.items()})


def inspect(pairs):
    """What to know of a reward model besides its accuracy, on held-out pairs: accuracy by the size of the gap in gold;
    calibration, the probability σ(r_i - r_j) that it gives to the better-scored of two against the share that the
    annotator preferred; the share of pairs whose longer response he preferred, which a reward model has to beat; and
    the ceiling, the share of pairs on which the annotator himself agrees with the rubric."""
    margin, gold, preferred = np.abs(pairs["margin"]), np.abs(pairs["gold"]), pairs["preferred"]
    right, predicted, ordered = pairs["margin"] * pairs["gold"] > 0, 1 / (1 + np.exp(-margin)), preferred != 0
    agreed, tenth = np.sign(pairs["margin"]) == preferred, np.minimum((10 * predicted).astype(int), 9)
    gaps = {f"{low}–{high}": (gold > low + 1e-9) & (gold <= high + 1e-9)
            for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, 9))}
    tenths = [ordered & (tenth == t) for t in range(5, 10)]  # predictions of .5–.6, .6–.7, …
    return known(dict(
        accuracy_by_gap={gap: [share(right, c), int(c.sum())] for gap, c in gaps.items() if c.any()},
        calibration=[[share(predicted, c), share(agreed, c), int(c.sum())] for c in tenths if c.any()],
        longer_wins=share(pairs["longer"] * preferred > 0, ordered & (pairs["longer"] != 0)),
        ceiling=share(pairs["gold"] * preferred > 0, ordered & (gold > 1e-9))))


def split_by_prompt(rankings, config):
    """(train, held out): all rankings of a prompt stand on one side, so no held-out prompt has been seen; the first
    n_rankings of the training side are used, and the held-out side is the same whatever their number."""
    ids = sorted({r["id"] for r in rankings})
    random.Random(config.seed).shuffle(ids)
    place, n_held_out = {key: i for i, key in enumerate(ids)}, max(1, round(len(ids) * config.val_share))
    train = sorted((r for r in rankings if place[r["id"]] >= n_held_out), key=lambda r: place[r["id"]])
    return train[:config.n_rankings or None], [r for r in rankings if place[r["id"]] < n_held_out]


def train_reward_model(run, config, tokenizer):
    parent = load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash)
    if config.n_reward_layer > parent["model_config"].n_layer:
        raise SystemExit(f"--n_reward_layer={config.n_reward_layer}: the SFT model has only "
                         f"{parent['model_config'].n_layer} blocks to start from")
    model_config = replace(parent["model_config"], n_layer=config.n_reward_layer)
    paths = [path.strip() for path in config.rankings.split(",")] if config.rankings else [run.path("rankings.jsonl")]
    people, records = bool(config.rankings) or config.annotator == "human", read_rubrics(run)
    rankings = [r for r in read_rankings(paths, tokenizer) if not people or r["annotator"] != "simulated"]
    if run.main and people:
        report_agreement(rankings + simulated_annotator({r["id"]: r for r in rankings}.values(), records, config))
    usable = [r for r in rankings if len(r["ranking"]) > 1 and not r.get("repeat") and not r.get("flagged")]
    if len(usable) < len(rankings) and run.main:
        print(f"{len(rankings) - len(usable):,} of {len(rankings):,} rankings prefer nothing (one response, all tied, "
              "skipped), are flagged, or repeat another, and are left out")
    rankings, fit = usable, [r for r in usable if length(r, tokenizer) <= model_config.block_size]
    if len(fit) < len(rankings) and run.main:
        print(f"{len(rankings) - len(fit):,} of {len(rankings):,} rankings do not fit the context of "
              f"{model_config.block_size} tokens and are left out")
    train, val = split_by_prompt(fit, config)
    if not train:
        raise SystemExit(f"{len(fit)} rankings with a preference in them are too few: rank more prompts first")

    lengths = [length(r, tokenizer) for r in train]
    steps_per_epoch = -(-len(train) // config.batch_size)
    steps = config.epochs * steps_per_epoch
    torch.manual_seed(config.seed)  # the new head does not depend on whether sampling came first
    model = ScalarModel(model_config).to(run.device)
    missing, _ = model.load_state_dict(parent["model"], strict=False)  # of a deeper trunk, the lower blocks
    assert missing == ["score.weight", "score.bias"], missing
    optimizer = Optimizers(model, config.learning_rate, config.muon_learning_rate, config.weight_decay)
    step = run.start(tokenizer, "sft: sft.pt", model=model, optimizer=optimizer)["step"]
    trained = run.wrap(model)
    if run.main:
        who = ", ".join(sorted({r["annotator"] for r in fit}))
        print(f"{len(train):,} rankings to learn from, {len(val):,} held out, by {who}; reward model of "
              f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.n_reward_layer} of "
              f"{parent['model_config'].n_layer} blocks")

    while step < steps:
        epoch, index = divmod(step, steps_per_epoch)
        batch = [train[i] for i in epoch_batches(lengths, config.batch_size, (config.seed, 4, epoch))[index]]
        # Each process pads and scores only its own prompts: a prompt, with all its pairs, is one element of the batch.
        loss = run.backward(trained, len(batch), config.micro_batch_size, lambda rows:
                            batch_loss(trained, batch[rows], tokenizer, run.device) / len(batch))
        run.update(model, optimizer, loss, step, config, learning_rate_factor(step, steps, config.warmup_steps))
        step += 1
        if step % 40 == 0 or step == 1:
            run.log(step, f"step {step:4}/{steps}  loss {loss:.4f}", loss=loss)
        if due := step % steps_per_epoch == 0:
            figures = accuracies(all_pairs(val, score_all(model, val, tokenizer, run), records))
            run.log(step, f"step {step:4}/{steps}  held out: " + "  ".join(
                f"{k.replace('_', ' by ')} {v:.3f}" for k, v in figures.items()), **figures)
        run.pause(step, steps, due)

    pairs = all_pairs(val, score_all(model, val, tokenizer, run), records)
    # Only differences of scores have meaning so far. Shift and scale them to mean 0 and standard deviation 1 over some
    # of the SFT model's samples, so that PPO's KL coefficient means the same for every one (Stiennon et al. 2020).
    some = train[:1000]
    scores = np.concatenate([np.array(s) for s in score_all(model, some, tokenizer, run)])
    mean, std = float(scores.mean()), float(scores.std())
    with torch.no_grad():
        model.score.weight.div_(std)
        model.score.bias.sub_(mean).div_(std)
    run.save(f"{run.stage}.pt", step, score_mean=mean, score_std=std)
    if run.main:
        tokens = [len(x["tokens"]) for r in some for x in r["responses"]]
        figures = dict(accuracies(pairs), **inspect(pairs), n=len(val), pairs=len(pairs["gold"]), rankings=len(train),
                       annotators=who, seconds=round(run.elapsed(), 1))
        figures["length_correlation"] = round(float(np.corrcoef(scores, tokens)[0, 1]), 4) if np.std(tokens) else 0.0
        update_scorecard(config.out_dir, run.stage, figures)
        if "ceiling" in figures:
            print("held-out pairs, by the gap of their rubric scores: " + ", ".join(
                f"{gap} {share:.1%} of {n}" for gap, (share, n) in figures["accuracy_by_gap"].items())
                + f"; the annotator agrees with the rubric on {figures['ceiling']:.1%}")
        print("calibration, predicted → preferred: " + ", ".join(
            f"{p:.2f} → {q:.2f}" for p, q, _ in figures["calibration"]) + (
            f"; the longer one was preferred in {figures['longer_wins']:.1%}" if "longer_wins" in figures else ""))
        print(f"scores normalised (mean {mean:.2f}, standard deviation {std:.2f} before); correlation with length "
              f"{figures['length_correlation']:.2f}; next: python ppo.py")


def main():
    config = load_config(RewardConfig, __doc__)
    with Run(config, "reward") as run:
        tokenizer = load_tokenizer(config.out_dir)
        steps = config.steps.split(",") if not (config.resume or config.rankings) else ("train",)
        if "sample" in steps:
            sample_responses(run, config, tokenizer)
        if "rank" in steps and run.main:
            rank_responses(run, config)
        run.barrier()
        if "train" in steps:
            train_reward_model(run, config, tokenizer)


if __name__ == "__main__":
    main()
