"""One update of each stage in float64, run by test_chain.py in one process and, under torchrun, in two.

    python update.py FILE            writes the gradients of SFT, the reward model, the policy and the value function"""

import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import ppo
import reward
import sft
from helpers import Digits, Recorder, float64, gradients, tiny
from model import IGNORE, LanguageModel, Run, ScalarModel
from ppo import PPOConfig


def update(path):
    config = PPOConfig(out_dir=os.path.dirname(path), device="cpu", dtype="float32", epochs=2, minibatch_size=5,
                       micro_batch_size=2, gradient_clip=1e9, gae_lambda=0.9, whiten_rewards=True)
    with Run(config, "ppo") as run, float64():
        policy, reference, value, judge = (tiny(c, i) for i, c in enumerate([LanguageModel] * 2 + [ScalarModel] * 2))
        trained, trained_value, tokenizer = run.wrap(policy), run.wrap(value), Digits()
        rng, found = np.random.default_rng(0), {}
        answers = [[int(t) for t in rng.integers(1, 18, n)] for n in (3, 9, 1, 6, 2, 7, 8)]     # 7 do not halve

        ids, targets = sft.make_batch([([2, 3, *a], [IGNORE, *a, 0]) for a in answers], run.device)
        run.backward(trained, 7, 2, lambda rows: trained(ids[rows], targets[rows]).sum() / (targets != IGNORE).sum())
        found["sft"] = gradients(policy)
        policy.zero_grad()

        rankings = [dict(prompt="12"[:n % 3], responses=[dict(tokens=answers[(n + i) % 7]) for i in range(2 + n % 3)],
                         ranking=[[i] for i in range(2 + n % 3)]) for n in range(5)]
        run.backward(trained_value, 5, 2, lambda rows:
                     reward.batch_loss(trained_value, rankings[rows], tokenizer, run.device) / 5)
        found["reward"] = gradients(value)
        value.zero_grad()

        prompts = [[18, *a[:2]] for a in answers]
        rows = ppo.score_rollout(run, config, tokenizer, (policy, reference, value, judge), *(
            [x[i] for i in range(7)] for x in (prompts, answers)))
        recorders = Recorder(policy), Recorder(value)
        ppo.ppo_step(run, config, (trained, trained_value), recorders, rows, 0, 1.0, np.random.default_rng(0), 0.2)
        found.update(zip(("policy", "value"), (torch.stack(r.seen) for r in recorders)))
        if run.main:
            torch.save(found, path)


if __name__ == "__main__":
    update(sys.argv[1])
