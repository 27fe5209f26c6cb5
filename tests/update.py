"""The gradients of each stage's training in float64, which test_chain.py compares between one
process and two, under torchrun.

    python update.py FILE

writes the gradients of every step of sft.py's and reward.py's own loops, and of ppo.update for the
policy and the value function. Batches are shared in pieces of unequal size, and the responses
differ in length, so that a mean of means would differ from the mean. """

import functools
import os
import sys
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import ppo
import reward
import sft
from helpers import (BYTES, Recorder, float64, gradients_of_sft, ranking, tiny, write_run_folder)
from model import LanguageModel, Run, ScalarModel
from ppo import PPOConfig
from reward import RewardConfig
from sft import SFTConfig

SHAPE = dict(vocab_size=BYTES.size, block_size=64)
OPTIONS = dict(device="cpu", dtype="float32", gradient_clip=1e9, micro_batch_size=2)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# No two are alike: if the processes had the same rows, nothing would need to be exchanged.
ANSWERS = [LETTERS[i:i + 1 + 7 * i % 12] for i in range(12)]


def become(run, config):
    """The run of another stage. All stages share one, as a process joins the others only once."""
    run.config, run.stage = config, config.table
    return run


def sft_gradients(run, folder):
    """Two batches of six conversations: 2, 2 and 2 at once in one process; in two, 2 and 1 each."""
    write_run_folder(become(run, SFTConfig(out_dir=folder)), ANSWERS)
    with mock.patch.object(sft, "Run", functools.partial(become, run)):
        return gradients_of_sft(folder, batch_size=6, epochs=1, micro_batch_size=2)


def reward_gradients(run, folder):
    """Two batches of six rankings of two, three or four responses."""
    config = RewardConfig(out_dir=folder, batch_size=6, epochs=1, **OPTIONS)
    rankings = []
    for n in range(12):
        K = 2 + n % 3
        rankings.append(ranking(str(n), (ANSWERS[n:] + ANSWERS)[:K], [[i] for i in range(K)]))
    model = tiny(ScalarModel, **SHAPE)
    recorder = Recorder(model)
    reward.train(become(run, config), config, BYTES, model, recorder, rankings, rankings[:3], {})
    return recorder.seen


def ppo_gradients(run):
    """Four minibatches of six of the same twelve responses, of which some have not ended."""
    config = PPOConfig(epochs=2, minibatch_size=6, gae_lambda=0.9, kl_coefficient=0.2,
                       **OPTIONS)
    policy, reference = tiny(LanguageModel, 0), tiny(LanguageModel, 1)
    value, judge = tiny(ScalarModel, 2), tiny(ScalarModel, 3)
    rng = np.random.default_rng(0)
    responses = [rng.integers(0, 18, n).tolist() for n in (3, 9, 1, 6, 2, 7, 8, 12, 1, 1, 5, 20)]
    prompts = [[18, *response[:2]] for response in responses]
    models = policy, reference, value, judge
    rollout = ppo.score_rollout(become(run, config), config, models, prompts, responses, end=0)
    recorders = Recorder(policy), Recorder(value)
    wrapped = run.wrap(policy), run.wrap(value)
    ppo.update(run, config, wrapped, recorders, rollout, 0)
    return recorders[0].seen, recorders[1].seen


def main(path):
    folder = os.path.dirname(os.path.abspath(path))
    run = Run(PPOConfig(out_dir=folder, **OPTIONS))
    with float64():
        found = dict(sft=sft_gradients(run, folder), reward=reward_gradients(run, folder))
        found["policy"], found["value"] = ppo_gradients(run)
    if run.main:
        torch.save({name: torch.stack(steps) for name, steps in found.items()}, path)


if __name__ == "__main__":
    main(sys.argv[1])
