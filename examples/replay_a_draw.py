"""Replaying a draw: which data a call took, by its seed, layer and step alone.

A run went wrong at step 1234 in layer 7? What was drawn there is a pure function of those numbers. Run it:
python examples/replay_a_draw.py
"""

import numpy as np

import sbncore as sbn

sampler = sbn.FeatureSampling(1 / 8, "runs")
x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)

plan = sampler.plan(x.shape, seed=42, layer=7, step=1234)
print(plan, "\n")

y, saved = sbn.forward(x, plan=plan)
again = sampler.plan(x.shape, seed=42, layer=7, step=1234)  # another process, another day, a GPU
print("the same draw:", again == plan)
print("the same bits:", bool((sbn.forward(x, plan=again)[0] == y).all()))

p = plan.weights()  # of each position of each sample
print("\nwhat the first sample lends:")
print("\n".join("".join("#" if weight else "." for weight in row) for row in p[0]))

mean = (p[:, None] * x).sum((0, 2, 3), dtype=np.float64)
print("\nmean by hand: ", np.round(mean, 6))
print("mean of saved:", np.round(saved.statistics.mean.astype(np.float64), 6))
