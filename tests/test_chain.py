"""The whole chain as a user runs it: the scripts as processes, at a miniature size, in a folder of
their own. What it leaves behind; stopping and resuming; two processes; a user's mistakes."""

import dataclasses
import importlib
import json
import math
import re
import shlex
import shutil
import signal
import sys
import tomllib

import numpy as np
import pytest
import torch
from chain import (CHECKPOINTS, INPUTS, OPTIONS, PREPARED, ROOT, STAGES, TORCHRUN, TRAIN_ONLY,
                   Process, assert_identical, command, copy, fail, finish, load, needs_forks,
                   needs_torchrun, one_line, one_line_of, prepare_options, read_json, read_lines,
                   read_log, run, succeed, two_processes)

import sample
from model import ModelConfig, Run, RunConfig, load_config
from prepare import load_tokenizer
from pretrain import PretrainConfig
from sft import SFTConfig

# --------------------------------------------------------------------------------------------------
# What the chain leaves behind

def test_every_file_is_there(folder):
    """All files of the run folder's table exist and are not empty; nothing temporary is left over,
    and nothing was moved aside, as nothing was there before."""
    wanted = {*PREPARED, *CHECKPOINTS, *(f"{stage}.last.pt" for stage in STAGES), "samples.jsonl",
              "rankings.jsonl", "reward.held_out.jsonl", "compare.jsonl", "log.jsonl",
              "scorecard.json"}
    found = {path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size}
    assert wanted <= found, wanted - found
    assert not [name for name in found if name.endswith(".tmp") or ".old." in name]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_plain_dicts(folder, name):
    """What the next stage reads loads without unpickling code, holds the weights and what they
    belong to, and no optimizer."""
    checkpoint = load(folder / name)
    assert checkpoint.keys() == {"model", "model_config", "config", "step", "dtype", "tokenizer",
                                 "parent"}
    assert checkpoint["tokenizer"] == load_tokenizer(folder).hash
    assert checkpoint["tokenizer"] == read_json(folder / "data.json")["tokenizer"]
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    config = ModelConfig(**checkpoint["model_config"])
    assert config.n_layer == (1 if name == "reward.pt" else 2)
    assert config.n_embd == 32 and config.vocab_size == 512
    assert checkpoint["step"] > 0 and checkpoint["config"]["out_dir"] == str(folder)
    assert checkpoint["dtype"] == "float32"
    parents = {"pretrain.pt": "train.bin", "sft.pt": "pretrain.pt", "reward.pt": "pretrain.pt",
               "ppo.pt": "sft.pt"}
    assert checkpoint["parent"] == parents[name]


@pytest.mark.parametrize("stage", STAGES)
def test_last_checkpoints_hold_what_resuming_needs(folder, stage):
    """STAGE.last.pt is a checkpoint, too, of the last step, with all state that training goes on
    from."""
    checkpoint = load(folder / f"{stage}.last.pt")
    more = {"pretrain": {"best"}, "sft": {"best"}, "reward": set(),
            "ppo": {"value_model", "value_optimizer", "figures"}}[stage]
    more |= {"optimizer", "random_state"}
    assert checkpoint.keys() == load(folder / f"{stage}.pt").keys() | more
    steps = {line["step"] for line in read_lines(folder / "log.jsonl") if line["stage"] == stage}
    assert checkpoint["step"] == max(steps - {None})
    assert any(part["state"] for part in checkpoint["optimizer"])


def test_stages_change_the_model(folder):
    """Each stage really trains: no weight is what it was in the parent, the reward model's
    included."""
    models = {name: load(folder / name)["model"] for name in CHECKPOINTS}
    for parent, child in (("pretrain.pt", "sft.pt"), ("pretrain.pt", "reward.pt"),
                          ("sft.pt", "ppo.pt")):
        for name in models[parent].keys() & models[child].keys():
            assert not torch.equal(models[parent][name], models[child][name]), (parent, child, name)


def test_log_is_whole_lines_of_json(folder):
    """Every line is one JSON object with its stage; a stage begins with its config, its steps
    ascend, all figures are finite, and pretraining has learned something."""
    lines = read_lines(folder / "log.jsonl")
    for stage in STAGES:
        mine = [line for line in lines if line["stage"] == stage]
        assert mine[0]["config"]["seed"] == 1 and mine[0]["config"]["out_dir"] == str(folder)
        steps = [line["step"] for line in mine if line["step"] is not None]
        assert steps and steps == sorted(steps)
    assert all(line["seconds"] >= 0 for line in lines)
    figures = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert all(map(math.isfinite, figures))
    losses = read_log(folder, "pretrain", "loss")
    assert losses[40] < losses[1] - 0.5


def test_scorecard_of_every_stage(folder):
    """Every stage has filed finite numbers; means over prompts come with standard error and count;
    the log has the same figures."""
    card = read_json(folder / "scorecard.json")
    assert card.keys() == {"prepare", *STAGES}
    for stage, figures in card.items():
        assert all(math.isfinite(v) for v in figures.values() if not isinstance(v, str)), stage
        assert stage == "reward" or figures["seconds"] > 0
    for stage in ("pretrain", "sft", "ppo"):
        for name in ("knowledge", "instruction", "safety", "gold"):
            assert name in card[stage] and 0 <= card[stage][name + "_se"] < 1, (stage, name)
        assert 0 < card[stage]["bits_per_byte"] < 8 and card[stage]["n"] == 20
    for name in ("accuracy", "accuracy_gold"):
        assert 0 <= card["reward"][name] <= 1
    assert card["reward"]["n"] > 0 and card["reward"]["rankings"] > 0
    assert card["reward"]["annotators"] == "simulated"
    for line in read_lines(folder / "log.jsonl"):
        if "scorecard" in line:
            filed = card[line["scorecard"]]
            assert {name: value for name, value in line.items() if name in filed} == filed


def test_samples_and_rankings(folder):
    """Every prompt kept for comparisons was sampled and ranked, and no other; a ranking names each
    response once, and no two responses of a prompt are equal."""
    prompts, samples, rankings = (read_lines(folder / f"{name}.jsonl")
                                  for name in ("prompts", "samples", "rankings"))
    compared = [p["id"] for p in prompts if p["use"] == "compare"]
    assert len(compared) == 49 and len(prompts) == 70
    assert compared == [s["id"] for s in samples] == [r["id"] for r in rankings]
    for sample, ranking in zip(samples, rankings):
        assert 1 <= len(sample["responses"]) <= 4 and ranking["responses"] == sample["responses"]
        assert all(r.keys() == {"text", "ended", "tokens"} for r in sample["responses"])
        assert len({tuple(r["tokens"]) for r in sample["responses"]}) == len(sample["responses"])
        named = sorted(i for group in ranking["ranking"] for i in group)
        assert named == list(range(len(sample["responses"])))
        assert ranking["annotator"] == "simulated"


def test_held_out_rankings_have_scores(folder):
    """reward.held_out.jsonl has a number for each response, and from them follows the accuracy
    that the scorecard gives: the share of ordered pairs that the scores order alike."""
    records = read_lines(folder / "reward.held_out.jsonl")
    card = read_json(folder / "scorecard.json")["reward"]
    assert len(records) == card["n"]
    hits = []
    for record in records:
        assert len(record["scores"]) == len(record["responses"])
        for place, better in enumerate(record["ranking"]):
            worse = [j for group in record["ranking"][place + 1:] for j in group]
            hits += [record["scores"][i] > record["scores"][j] for i in better for j in worse]
    assert card["accuracy"] == pytest.approx(sum(hits) / len(hits), abs=1e-4)


def test_comparison_of_the_stages(folder):
    """compare.jsonl has, for each of eight prompts, the answer of each language model with both
    scores."""
    rows = read_lines(folder / "compare.jsonl")
    assert len(rows) == 8
    for row in rows:
        assert row.keys() == {"prompt", "answers"}
        assert [a["stage"] for a in row["answers"]] == ["pretrain", "sft", "ppo"]
        for answer in row["answers"]:
            assert answer.keys() == {"stage", "text", "ended", "reward", "rubric"}
            assert math.isfinite(answer["reward"]) and math.isfinite(answer["rubric"])


# --------------------------------------------------------------------------------------------------
# sample.py

@pytest.fixture(scope="module")
def talk(folder, tmp_path_factory):
    """A run folder with what sample.py reads, and the scorecard."""
    names = [*INPUTS["sample"], "scorecard.json"]
    return copy(folder, tmp_path_factory.mktemp("talk") / "out", names)


def test_sample_answers_a_prompt(talk):
    """--prompt answers with the last stage's model and exits; the same answer every time, and by
    another stage's model another one. A pretrained model continues the text."""
    question = "--prompt=Where does Milo live?"
    answers = [succeed("sample", talk, question, f"--checkpoint={name}").stdout
               for name in ("", "ppo", "sft", "pretrain")]
    assert answers[0].strip() and answers[0] == answers[1] != answers[2]
    assert answers[3].startswith("Where does Milo live?")


def test_sample_shows_the_next_tokens(talk):
    """--next prints the ten likeliest tokens after a text, the likeliest first, with
    probabilities."""
    lines = succeed("sample", talk, "--next=One cold evening, the").stdout.splitlines()
    shares = [float(line.split("%")[0]) for line in lines]
    assert len(lines) == 10 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1


@pytest.mark.parametrize("typed, replies", [
    ("", 0), ("Where does Milo live?\n\nHello", 2), ("猫はどこ? مرحبا 🐈\n", 1),
    ("live " * 5000 + "\nHello\n", 1), ("Where does Milo live?\n" * 12, 12), (b"\xe4 Milo\n", 1)])
def test_chat_until_the_end_of_file(talk, typed, replies):
    """A chat answers each message, in any script, also bytes that are no text, forgets the oldest
    turns when it outgrows the context, refuses a message that does so alone, and ends with the
    input."""
    done = finish(command("sample", talk), typed)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    assert done.stdout.count("model> ") == replies
    assert ("say it shorter" in done.stdout) == (len(typed) > 1000)


@pytest.mark.parametrize("where", ["builtins.input", "sample.stream"])
def test_chat_ends_with_ctrl_c(talk, monkeypatch, where):
    """Ctrl-C ends a chat without a traceback, while it waits for a message or gives an answer."""
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", lambda prompt: "Hello")
    monkeypatch.setattr(where, interrupted)
    config = sample.SampleConfig(out_dir=str(talk), device="cpu", dtype="float32", max_new_tokens=4)
    run, tokenizer = Run(config), load_tokenizer(talk)
    model = sample.load_model(run, tokenizer, "ppo")
    try:
        sample.chat(run, tokenizer, model)
    except KeyboardInterrupt:  # which would end pytest
        pytest.fail("Ctrl-C ends the chat with a traceback")


def test_variants_stand_side_by_side(folder, tmp_path):
    """--variant=NAME names a second reward model and a second policy; each goes on from the one
    that it is told, and those without a name stay as they are. sample.py can be told of them."""
    out_dir = copy(folder, tmp_path / "out", {*INPUTS["sample"], "rankings.jsonl", "log.jsonl"})
    before = {name: (out_dir / name).read_bytes() for name in CHECKPOINTS}
    small = "--variant=small"
    succeed("reward", out_dir, *OPTIONS["reward"], "--steps=train", small, "--n_rankings=8")
    succeed("ppo", out_dir, *OPTIONS["ppo"], "--max_steps=1", "--reward=small", small)
    assert before == {name: (out_dir / name).read_bytes() for name in CHECKPOINTS}
    small, plain = load(out_dir / "reward-small.pt")["model"], load(out_dir / "reward.pt")["model"]
    assert not torch.equal(small["score.weight"], plain["score.weight"])
    value = load(out_dir / "ppo-small.last.pt")["value_model"]
    def distance(model):
        return (value["score.weight"] - model["score.weight"]).abs().max()

    assert distance(small) < distance(plain)  # the value function began as the reward model named
    card = read_json(out_dir / "scorecard.json")
    assert card.keys() == {"reward-small", "ppo-small"} and card["reward-small"]["rankings"] == 8
    assert read_log(out_dir, "ppo-small", "kl").keys() == {1}
    assert succeed("sample", out_dir, "--checkpoint=ppo-small", "--prompt=Why?").stdout.strip()
    message = fail("ppo", out_dir, "--reward=large")
    assert "reward-large.pt" in message and "python reward.py" in message


# --------------------------------------------------------------------------------------------------
# Stop and resume

# The line of output at which a stage is stopped, and how: by Ctrl-C, or as a cluster does it.
STOPS = {"pretrain": ("step    20", signal.SIGINT), "sft": ("step    1", signal.SIGTERM),
         "reward": ("reward: cpu", signal.SIGTERM), "ppo": ("step   1", signal.SIGINT)}


@pytest.fixture(scope="module", params=STAGES)
def interrupted(request, folder, tmp_path_factory):
    """A stage that was stopped midway; then continued in two copies of its folder. In one, with
    the command that it printed. In the other, with nothing but --resume, and with the log of a run
    that had gone on, as if it had been killed later. A dict of what happened."""
    if sys.platform == "win32":
        pytest.skip("no SIGINT for another process on Windows")
    stage = request.param
    line, number = STOPS[stage]
    out_dir = copy(folder, tmp_path_factory.mktemp("resume") / "out", INPUTS[stage])
    process = Process(command(stage, out_dir, *OPTIONS[stage]))
    process.until(line)
    process.send_signal(number)
    done = process.finish()
    forgetful = copy(out_dir, out_dir.parent / "forgetful", [p.name for p in out_dir.iterdir()])
    stopped = dict(stage=stage, out_dir=out_dir, forgetful=forgetful, done=done,
                   checkpoint=load(out_dir / f"{stage}.last.pt"))
    shutil.copy(folder / "log.jsonl", forgetful / "log.jsonl")
    printed = done.stdout.splitlines()[-1].partition("Continue with: python ")[2]
    stopped["resumed"] = finish([sys.executable, *shlex.split(printed)])
    short = [f"{stage}.py", f"--out_dir={forgetful}", "--resume"]
    stopped["resumed_forgetful"] = finish([sys.executable, *short])
    return stopped


def test_interrupted_run_says_how_to_continue(interrupted, folder):
    """Ctrl-C and SIGTERM let the step end, save, and exit with 130, without a traceback; the last
    line is the command that continues."""
    done, checkpoint = interrupted["done"], interrupted["checkpoint"]
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 130 and done.stderr == ""
    assert last.startswith("stopped") and f"--out_dir={interrupted['out_dir']}" in last
    assert last.endswith("--resume") and f"step {checkpoint['step']}" in last
    through = load(folder / f"{interrupted['stage']}.last.pt")
    assert 1 <= checkpoint["step"] < through["step"]  # it really was stopped midway


@pytest.mark.parametrize("how", ["resumed", "resumed_forgetful"])
def test_resume_is_bit_exact(interrupted, folder, how):
    """Stopped midway and resumed, a stage ends with the very weights and optimizer of the run that
    went through. The options need not be given again, as the checkpoint has them."""
    stage, done = interrupted["stage"], interrupted[how]
    out_dir = interrupted["out_dir" if how == "resumed" else "forgetful"]
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (f"{stage}.last.pt", f"{stage}.pt"):
        through, resumed = load(folder / name), load(out_dir / name)
        for key in through.keys() - {"config", "random_state"}:
            assert_identical(through[key], resumed[key], f"{name}: {key}")
        for key in through["config"].keys() - {"out_dir", "resume", "device"}:
            assert through["config"][key] == resumed["config"][key], key


def test_resumed_log_has_no_step_twice(interrupted, folder):
    """The log of a resumed run has the steps and figures of one that went through, once, also if
    the log was ahead of the checkpoint; the lines of other stages stay."""
    def figures(path):
        timings = ("seconds", "tokens_per_s", "mfu")
        return [{name: value for name, value in line.items() if name not in timings}
                for line in read_lines(path / "log.jsonl")
                if line["stage"] == interrupted["stage"] and line["step"]]

    assert figures(interrupted["out_dir"]) == figures(interrupted["forgetful"]) == figures(folder)
    for line in read_lines(folder / "log.jsonl"):
        if line["stage"] != interrupted["stage"]:
            assert line in read_lines(interrupted["forgetful"] / "log.jsonl")


def test_stopping_does_not_choose_the_best_model(interrupted, folder):
    """Where a run happened to be stopped has no say in which model is the best: only the regular
    evaluations have."""
    stage, checkpoint = interrupted["stage"], interrupted["checkpoint"]
    if stage in ("pretrain", "sft"):
        figures = read_log(folder, stage, "bits_per_byte" if stage == "pretrain" else "val_loss")
        regular = [value for step, value in figures.items() if step <= checkpoint["step"]]
        assert checkpoint["best"] == min(regular, default=math.inf)


@pytest.mark.parametrize("stage", STAGES)
def test_resume_after_the_last_step(folder, tmp_path, stage):
    """Killed between the last step and the end, a stage still finishes with --resume, and writes
    the same model and the same scorecard."""
    names = {*INPUTS[stage], f"{stage}.last.pt", "rankings.jsonl", "log.jsonl"}
    if stage in ("pretrain", "sft"):  # written with the best evaluation
        names.add(f"{stage}.pt")
    out_dir = copy(folder, tmp_path / "out", names)
    succeed(stage, out_dir, "--resume")
    models = [load(path / f"{stage}.pt")["model"] for path in (folder, out_dir)]
    assert_identical(*models, stage)
    before, after = (read_json(path / "scorecard.json")[stage] for path in (folder, out_dir))
    for name in before.keys() - {"seconds"}:
        assert before[name] == after[name], name


def test_resume_keeps_the_options_of_the_checkpoint(folder, tmp_path):
    """With --resume the options are the checkpoint's, also where a forgotten --config had given
    them, and so is the dtype that `auto` came to. What changes no result may be given anew."""
    out_dir = copy(folder, tmp_path / "out", ["sft.last.pt"])
    checkpoint = load(out_dir / "sft.last.pt")
    checkpoint["config"].update(learning_rate=3e-3, dtype="auto")
    torch.save(checkpoint | dict(dtype="bfloat16"), out_dir / "sft.last.pt")
    where = f"--out_dir={out_dir}"
    kept = SFTConfig(**checkpoint["config"])
    kept = dataclasses.replace(kept, out_dir=str(out_dir), resume=True, dtype="bfloat16")
    assert load_config(SFTConfig, "", [where, "--resume"]) == kept
    assert load_config(SFTConfig, "", [where, "--resume", "--batch_size=8"]) == kept  # the same
    free = load_config(SFTConfig, "", [where, "--resume", "--micro_batch_size=3", "--device=auto"])
    assert free == dataclasses.replace(kept, micro_batch_size=3, device="auto")


def test_resume_refuses_a_different_option(folder, tmp_path):
    """A different option, on the command line or in a config file, is an error that names both
    values."""
    out_dir = copy(folder, tmp_path / "out", [*PREPARED, "pretrain.pt", "sft.last.pt"])
    (tmp_path / "c.toml").write_text("[sft]\nlearning_rate = 0.5\n")
    for option, words in (("--epochs=9", ("epochs=4", "9")), ("--seed=2", ("seed=1", "2")),
                          ("--dtype=bfloat16", ("dtype=float32", "bfloat16")),
                          (f"--config={tmp_path}/c.toml", ("learning_rate=0.002", "0.5"))):
        message = one_line(load_config, SFTConfig, "", [f"--out_dir={out_dir}", "--resume", option])
        assert "sft.last.pt" in message and all(word in message for word in words), message
    assert "epochs=4" in fail("sft", out_dir, "--resume", "--epochs=9")


def test_resume_where_nothing_was_begun(tmp_path):
    """--resume without a checkpoint names the command to begin with."""
    message = one_line(load_config, SFTConfig, "", [f"--out_dir={tmp_path}", "--resume"])
    assert message.startswith("no ") and "sft.last.pt" in message and "python sft.py" in message


def test_fresh_run_moves_the_earlier_model_aside(folder, tmp_path):
    """A second run without --resume keeps the first one's model as STAGE.old.pt, and says so."""
    out_dir = copy(folder, tmp_path / "out", (*INPUTS["sft"], "sft.pt"))
    done = succeed("sft", out_dir, *OPTIONS["sft"], "--epochs=1")
    assert "sft.old.pt" in done.stdout
    assert (out_dir / "sft.old.pt").read_bytes() == (folder / "sft.pt").read_bytes()


# --------------------------------------------------------------------------------------------------
# Two processes

FIGURES = {"pretrain": ("loss", "gradient_norm", "bits_per_byte"), "sft": ("loss", "val_loss"),
           "reward": ("loss", "accuracy"),
           "ppo": ("reward", "gold", "kl", "entropy", "policy_loss", "value_loss", "clip_fraction",
                   "length", "explained_variance")}


def assert_same_training(stage, one, two):
    """The figures in two folders are equal to 1e-4, and the weights to 1e-3."""
    for name in FIGURES[stage]:
        a, b = read_log(one, stage, name), read_log(two, stage, name)
        assert a.keys() == b.keys() and a, name
        for step in a:
            assert b[step] == pytest.approx(a[step], abs=1e-4), (name, step)
    a, b = load(one / f"{stage}.pt")["model"], load(two / f"{stage}.pt")["model"]
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-3, msg=name)


@needs_torchrun
def test_torchrun_equals_one_process(folder, tmp_path):
    """`torchrun --nproc_per_node=2 pretrain.py` has the losses and the weights of one process, and
    ends without a complaint."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["pretrain"])
    done = succeed("pretrain", out_dir, *OPTIONS["pretrain"], python=TORCHRUN)
    assert "2 process" in done.stdout
    assert_same_training("pretrain", folder, out_dir)


@needs_forks
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_two_processes_equal_one(folder, tmp_path, stage):
    """Two gloo processes have the figures of one to 1e-4, its weights to 1e-3, and, where a stage
    samples, its responses word for word.

    Catches a forward pass beside the DDP wrapper, means of the processes' means, whitening within a
    process, random numbers of a process's own."""
    out_dir = copy(folder, tmp_path / "out", INPUTS[stage])
    first, second = two_processes(command(stage, out_dir, *OPTIONS[stage]))
    assert first.returncode == second.returncode == 0, first.stderr[-3000:] + second.stderr[-3000:]
    assert "2 process" in first.stdout and not second.stdout  # only one of them talks
    assert_same_training(stage, folder, out_dir)
    if stage == "reward":
        for name in ("samples.jsonl", "rankings.jsonl"):
            assert (out_dir / name).read_bytes() == (folder / name).read_bytes(), name


@needs_forks
def test_two_processes_are_quiet(folder, tmp_path):
    """Nothing is written on stderr where nothing is wrong (catches what torch has deprecated)."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["sft"])
    for done in two_processes(command("sft", out_dir, *OPTIONS["sft"], "--epochs=1")):
        assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]


@needs_forks
def test_gradients_of_two_processes_equal_one(tmp_path):
    """In float64, two processes have the gradients of one to 1e-12, in SFT, reward model, policy
    and value function, with shares of unequal numbers of tokens (catches means of the processes'
    means, advantages or rewards whitened within a process, gradients that are not exchanged)."""
    paths = [tmp_path / "one/gradients.pt", tmp_path / "two/gradients.pt"]
    for path in paths:
        path.parent.mkdir()
    script = str(ROOT / "tests/update.py")
    for done in (finish([sys.executable, script, paths[0]]),
                 *two_processes([sys.executable, script, paths[1]])):
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = map(load, paths)
    assert one.keys() == two.keys() == {"sft", "reward", "policy", "value"}
    for name in one:
        assert one[name].dtype == torch.float64 and one[name].abs().max() > 1e-3
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-12, msg=name)


@needs_forks
def test_resume_with_two_processes(folder, tmp_path):
    """Begun by one process and continued by two, pretraining goes on with the same batches: it has
    the losses and weights of one."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["pretrain"])
    process = Process(command("pretrain", out_dir, *OPTIONS["pretrain"]))
    process.until("step    20")
    process.send_signal(signal.SIGINT)
    assert process.finish().returncode == 130
    assert 20 <= load(out_dir / "pretrain.last.pt")["step"] < 40
    for done in two_processes(command("pretrain", out_dir, "--resume")):
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_training("pretrain", folder, out_dir)


@needs_forks
def test_two_processes_stop_together(folder, tmp_path):
    """A signal that reaches one of two processes stops both after the same step, and is saved."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["pretrain"])
    def stop_one(first, second):
        first.until("step ")
        second.send_signal(signal.SIGTERM)

    options = [*OPTIONS["pretrain"], "--max_steps=9999"]
    first, second = two_processes(command("pretrain", out_dir, *options), stop_one)
    assert first.returncode == second.returncode == 130, first.stderr + second.stderr
    assert "Continue with" in first.stdout and not second.stdout.strip()
    assert load(out_dir / "pretrain.last.pt")["step"] >= 1


@needs_forks
@pytest.mark.parametrize("stage, option, size", [
    ("pretrain", "--batch_size", 7), ("sft", "--batch_size", 7), ("reward", "--batch_size", 3),
    ("ppo", "--minibatch_size", 3)])
def test_batch_that_two_processes_cannot_share(folder, tmp_path, stage, option, size):
    """A batch of odd size is refused in one line by each of two processes."""
    out_dir = copy(folder, tmp_path / "out", {*INPUTS[stage], "rankings.jsonl"})
    options = [*OPTIONS[stage], f"{option}={size}", *TRAIN_ONLY.get(stage, ())]
    for done in two_processes(command(stage, out_dir, *options)):
        assert done.returncode == 1
        message = done.stderr.strip().splitlines()[-1]
        assert "2 processes" in message and f"batch of {size}" in message, done.stderr
        assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("script, present, options, remedy", [
    ("pretrain", (), (), "prepare.py"), ("sft", PREPARED, (), "pretrain.py"),
    ("reward", PREPARED, (), "sft.py"),
    ("reward", (*PREPARED, "pretrain.pt"), ["--steps=train"], "reward.py"),
    ("ppo", PREPARED, (), "sft.py"), ("ppo", (*PREPARED, "sft.pt"), (), "reward.py"),
    ("sample", (), (), "prepare.py"), ("sample", PREPARED, ["--compare"], "pretrain.py")])
def test_missing_input_names_its_command(folder, tmp_path, script, present, options, remedy):
    """Where an input is missing, one line names it and the command that makes it."""
    message = fail(script, copy(folder, tmp_path / "out", present), *options)
    assert message.startswith("no ") and message.endswith("first")
    assert f"run python {remedy}" in message


@pytest.mark.parametrize("script, option, words", [
    ("pretrain", "--lerning_rate=1", ("--lerning_rate", "--learning_rate?")),
    ("sft", "--epochs=many", ("--epochs", "int", "many")),
    ("pretrain", "--n_embd=130", ("n_head=4", "n_embd=130")),
    ("ppo", "--batch_size=0", ("--batch_size", "1")),
    ("reward", "--steps=sample,tain", ("tain", "sample", "rank", "train")),
    ("sample", "--top_p=2", ("--top_p", "1")),
    ("prepare", "--demonstrations=pairs.jsonl", ("demonstrations", "--text")),
    ("reward", "--config=nowhere.toml", ("nowhere.toml",))])
def test_wrong_options(tmp_path, script, option, words):
    """A wrong option is named with what would be right, and nothing is written."""
    message = fail(script, tmp_path / "out", option)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, words", [
    ("[sft]\nepoch = 3", ("epoch", "did you mean", "epochs")),
    ("[sft]\nepochs = 'many'", ("epochs", "many")), ("[sft]\nepochs = 0", ("epochs", "1")),
    ("[sftt]\nepochs = 3", ("[sftt]", "[sft]")), ("sed = 3", ("sed", "seed")),
    ("seed == 3", ("c.toml",))])
def test_config_file_with_a_mistake(tmp_path, text, words):
    """What is wrong in a config file is one line that names the file and the closest valid name."""
    (tmp_path / "c.toml").write_text(text)
    message = one_line(load_config, SFTConfig, "", [f"--config={tmp_path}/c.toml"])
    assert "c.toml" in message and all(word in message for word in words), message


def test_config_file_has_a_table_for_each_stage(tmp_path):
    """A stage takes the top level and its own table of a file; pretraining takes [model], too. The
    tables of others are not its concern, nor a new stage's; the command line wins."""
    path = tmp_path / "c.toml"
    path.write_text("seed = 5\n[model]\nn_layer = 7\n[pretrain]\nmax_steps = 9\nrecompute = true\n"
                    "[sft]\nepochs = 8\n[distill]\nanything = [1]\n")
    pretraining = load_config(PretrainConfig, "", [f"--config={path}", "--max_steps=10"])
    assert pretraining == PretrainConfig(seed=5, n_layer=7, max_steps=10, recompute=True)
    tuning = load_config(SFTConfig, "", [f"--config={path}", "--seed=6"])
    assert tuning == SFTConfig(seed=6, epochs=8)


def test_config_file_of_the_layout_before(tmp_path):
    """A file whose [prepare] still counts creatures is refused in one line, not half believed."""
    (tmp_path / "c.toml").write_text("[prepare]\ncreatures = 12\nmegabytes = 3.0\n")
    message = fail("prepare", tmp_path / "out", f"--config={tmp_path}/c.toml")
    assert "c.toml" in message and "creatures" in message
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_the_layout_before(folder, tmp_path):
    """A checkpoint that does not say its dtype is refused in one line that names it and the
    command."""
    out_dir = copy(folder, tmp_path / "out", (*INPUTS["sft"], "sft.last.pt", "log.jsonl"))
    for name, options, remedy in (("sft.last.pt", ["--resume"], "sft.py"),
                                  ("pretrain.pt", [], "pretrain.py")):
        checkpoint = load(out_dir / name)
        del checkpoint["dtype"]
        torch.save(checkpoint, out_dir / name)
        message = fail("sft", out_dir, *options)
        assert name in message and remedy in message, message


def test_model_that_does_not_fit(talk):
    """sample.py names a model that is none of language, and what would be."""
    message = fail("sample", talk, "--checkpoint=reward", "--prompt=Why?")
    assert "reward.pt" in message and "no language model" in message and "sft" in message


@pytest.mark.parametrize("answers", [[], ["Because of it. " * 200] * 3])
def test_demonstrations_that_are_missing_or_too_long(folder, tmp_path, answers):
    """Where too few examples are left the line says what helps."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["sft"])
    with open(out_dir / "sft.jsonl", "w", encoding="utf-8") as f:
        for answer in answers:
            messages = [dict(role="user", content="Why?"), dict(role="assistant", content=answer)]
            f.write(json.dumps(dict(messages=messages)) + "\n")
    message = fail("sft", out_dir, *OPTIONS["sft"])
    assert f"only 0 of {len(answers)} examples" in message
    assert "--block_size" in message and "--demonstrations" in message


def test_checkpoint_that_is_not_there(talk):
    """A file that is not there, or a name that is no stage's, is called that; a stage that has not
    run is named with its command."""
    for name in ("mine.pt", "sft.best.pt", "sfft"):
        message = fail("sample", talk, f"--checkpoint={name}", "--prompt=Why?")
        path = name if name.endswith(".pt") else talk / f"{name}.pt"
        assert message.endswith(f"no {path}: run the script that writes it first"), message
    message = fail("sample", talk, "--checkpoint=ppo-wide", "--prompt=Why?")
    assert message.endswith("ppo-wide.pt: run python ppo.py first"), message


def test_damaged_checkpoint_of_no_stage(talk, tmp_path):
    """A file of another name that is damaged is not said to come from a script of that name."""
    (tmp_path / "mine.pt").write_text("no checkpoint")
    message = fail("sample", talk, f"--checkpoint={tmp_path}/mine.pt", "--prompt=Why?")
    assert "is damaged" in message and "the script that writes it" in message, message
    assert "mine.pt.py" not in message, message


def test_run_folder_that_is_none(tmp_path):
    """A file in the place of the run folder is named, and left as it is."""
    (tmp_path / "out").write_text("mine")
    message = fail("prepare", tmp_path / "out")
    assert str(tmp_path / "out") in message and (tmp_path / "out").read_text() == "mine"


def test_no_demonstrations(folder, tmp_path):
    """Without a demonstration sft.py says so."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["sft"])
    (out_dir / "sft.jsonl").write_text("")
    assert "sft.jsonl" in fail("sft", out_dir)


def test_batch_larger_than_the_data(folder, tmp_path):
    """A batch larger than the data shrinks to it, and the stage says so."""
    out_dir = copy(folder, tmp_path / "out", {*INPUTS["reward"], "pretrain.pt", "rankings.jsonl"})
    done = succeed("sft", out_dir, "--batch_size=1000", "--epochs=1")
    n = re.search(r"(\d+) conversations", done.stdout).group(1)
    assert re.search(rf"batch\D*{n}\b|\b{n}\D*a step", done.stdout)
    done = succeed("reward", out_dir, "--steps=train", "--batch_size=1000", "--epochs=1",
                   "--n_reward_layer=1")
    n = read_json(out_dir / "scorecard.json")["reward"]["rankings"]
    assert f" of {n}\n" in done.stdout


def test_text_that_the_rules_do_not_fit(tmp_path):
    """Text of another language than English loses all to one rule: the report says which rule it
    was, and all of it is kept."""
    pages = [f"Der Fuchs Nummer {i} wohnt im alten Turm neben der Burg." for i in range(40)]
    (tmp_path / "de.txt").write_text("<|endoftext|>".join(pages))
    options = [f"--text={tmp_path}/de.txt", "--vocab_size=300", "--val_share=0.3"]
    said = succeed("prepare", tmp_path / "out", *options).stdout
    assert "not language" in said and "So all is kept" in said
    assert read_json(tmp_path / "out/data.json")["documents_kept"] == 40


def test_checkpoints_of_another_tokenizer_are_refused(folder, tmp_path):
    """After another seed's preparation no stage takes a model of before: its tokens mean nothing
    now."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["sample"])
    succeed("prepare", out_dir, *prepare_options(out_dir), "--seed=2")
    for stage, name in (("sft", "pretrain"), ("reward", "sft"), ("ppo", "sft"), ("sample", "ppo")):
        message = fail(stage, out_dir)
        assert "another tokenizer" in message
        assert f"{name}.pt" in message and f"{name}.py" in message


def test_data_of_another_tokenizer_is_refused(folder, tmp_path):
    """train.bin and tokenizer.tiktoken must be of one run."""
    out_dir = copy(folder, tmp_path / "out", PREPARED)
    lines = (out_dir / "tokenizer.tiktoken").read_text().splitlines()
    (a, b), tail = (line.split()[0] for line in lines[300:302]), lines[302:]
    swapped = [*lines[:300], f"{b} 300", f"{a} 301", *tail]
    (out_dir / "tokenizer.tiktoken").write_text("\n".join(swapped) + "\n")
    message = fail("pretrain", out_dir, *OPTIONS["pretrain"])
    assert "tokenizer" in message and "python prepare.py" in message


def test_context_shorter_than_the_prompts(folder, tmp_path):
    """A context that holds neither the prompts nor the conversations is what the one line names."""
    out_dir = copy(folder, tmp_path / "out", PREPARED)
    message = fail("pretrain", out_dir, *OPTIONS["pretrain"], "--block_size=16", "--max_steps=2")
    assert "prompt" in message and "context" in message
    message = fail("sft", out_dir, *OPTIONS["sft"])
    assert "sft.jsonl" in message and "context" in message


@pytest.mark.parametrize("script, options", [
    ("ppo", ["--help"]), ("prepare", ["--help"]), ("reward", OPTIONS["reward"]),
    ("ppo", OPTIONS["ppo"])])
def test_terminal_without_the_letters(folder, tmp_path, script, options):
    """An output that knows few letters, as a file on Windows does, is no reason to stop (catches
    arrows and Greek in the help, and generated text)."""
    out_dir = copy(folder, tmp_path / "out", INPUTS.get(script, ()))
    done = finish(command(script, out_dir, *options), PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and done.stdout, done.stderr[-3000:]


# --------------------------------------------------------------------------------------------------
# The files of configs/

CONFIGS = dict(prepare="PrepareConfig", pretrain="PretrainConfig", sft="SFTConfig",
               reward="RewardConfig", ppo="PPOConfig", sample="SampleConfig")


def config_class(script):
    return getattr(importlib.import_module(script), CONFIGS[script])


@pytest.mark.parametrize("script", ["model", *CONFIGS])
def test_tiny_toml_spells_out_the_defaults(script):
    """Every option stands in its table of configs/tiny.toml with its default, and nothing else
    does."""
    with open(ROOT / "configs/tiny.toml", "rb") as f:
        file = tomllib.load(f)
    cls = ModelConfig if script == "model" else config_class(script)
    shared = {f.name: f.default for f in dataclasses.fields(RunConfig)}
    elsewhere = set(shared) | {"resume"}  # which is not a setting of a run
    if script == "pretrain":
        elsewhere |= {f.name for f in dataclasses.fields(ModelConfig)}
    own = {f.name: f.default for f in dataclasses.fields(cls)
           if f.metadata and f.name not in elsewhere}
    top = {name: value for name, value in file.items() if not isinstance(value, dict)}
    for place, table, defaults in (("top level", top, shared), (f"[{script}]", file[script], own)):
        assert table.keys() == defaults.keys(), place
        for name in table:
            assert table[name] == defaults[name], (place, name)
            assert type(table[name]) is type(defaults[name]), (place, name)
    if script != "model":
        assert load_config(cls, "", [f"--config={ROOT / 'configs/tiny.toml'}"]) == cls()


@pytest.mark.parametrize("script", ["model", *CONFIGS])
def test_tiny_toml_repeats_the_help_texts(script):
    """The comment behind an option of configs/tiny.toml is the option's line of --help."""
    cls = ModelConfig if script == "model" else config_class(script)
    texts = {f.name: f.metadata["help"] for f in dataclasses.fields(cls) if f.metadata}
    table, found = "", {}
    for line in (ROOT / "configs/tiny.toml").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif table in ("", script) and " = " in line:
            name, (_, comment) = line.split(" = ")[0], line.rsplit("  # ", 1)
            found[name] = comment
    shared = {f.name: f.metadata["help"] for f in dataclasses.fields(RunConfig)}
    assert found == {name: (shared | texts)[name] for name in found}
    assert len(found) >= 5


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.toml")))
def test_every_config_fits_every_script(name):
    """Each file of configs/ can be given to each script: no key is unknown, no value impossible."""
    for script in CONFIGS:
        load_config(config_class(script), "", [f"--config={ROOT / 'configs' / name}"])


# --------------------------------------------------------------------------------------------------
# The first text of one's own

LETTERS = np.random.default_rng(0)
OWN_TEXTS = {
    "prose": " ".join(f"On day {n} the old fisherman rowed out to the reef, but he came back with "
                      f"nothing but {n * n} small crabs." for n in range(22)),
    "verse": "\n".join(f"O {x}, my {y},\nthe {y} of the {x}," for x, y in zip(
        "moon sea rose wind night star leaf rain snow fire".split() * 6,
        "heart sorrow road dream song mirror".split() * 10)),
    "code": "\n".join(f"def f{n}(x, y={n}):\n    return {{x: y + {n}, {n}: [x, y]}}"
                      for n in range(45)),
    "one line": "the sea was calm and the old man sat in the boat and " * 40,
    "names": "\n".join("".join(LETTERS.choice(["an", "mi", "lo", "ra"], 3)) for _ in range(330)),
    "Chinese": "".join(map(chr, LETTERS.integers(0x4e00, 0x4f00, 700))),
    "DNA": "".join(LETTERS.choice(list("ACGT"), 2100)),
}


@pytest.mark.parametrize("kind", OWN_TEXTS)
def test_any_first_text_trains(kind, tmp_path):
    """A single file of 2 kB of whatever kind goes through prepare.py and pretrain.py with their
    default sizes, keeps at least nine tenths of itself, and has a part to validate on."""
    path = tmp_path / "mine.txt"
    path.write_text(OWN_TEXTS[kind], encoding="utf-8")
    size = path.stat().st_size
    assert 2000 <= size < 6000
    out = tmp_path / "run"
    said = succeed("prepare", out, f"--text={path}").stdout
    data = read_json(out / "data.json")
    assert data["train"]["bytes"] + data["val"]["bytes"] > 0.9 * size and data["val"]["tokens"] > 8
    assert load_tokenizer(out).size < 450  # no more than so little text supports
    if kind in ("prose", "DNA"):
        assert ("all is kept" in said) == (kind == "DNA")  # none of the rules for prose fits
    log = succeed("pretrain", out, "--max_steps=2", "--n_layer=1").stdout
    assert "validation" in log


def test_context_fits_little_text(tmp_path):
    """A text with fewer tokens than the context shortens the context, and says so; the run can be
    continued with the options it was given. Of next to nothing nothing is trained."""
    path, out = tmp_path / "mine.txt", tmp_path / "run"
    path.write_text(OWN_TEXTS["prose"], encoding="utf-8")
    succeed("prepare", out, f"--text={path}")
    options = ["--max_steps=2", "--n_layer=1", "--block_size=2048"]
    said = succeed("pretrain", out, *options).stdout
    length = load(out / "pretrain.pt")["model_config"]["block_size"]
    assert 100 < length < 2048 and f"only a context of {length} fits" in said
    succeed("pretrain", out, *options, "--resume")
    path.write_text("a" * 200)
    succeed("prepare", out, f"--text={path}")
    assert "too few" in fail("pretrain", out)
