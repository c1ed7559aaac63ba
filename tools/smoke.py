"""Trains with the installed package for a moment: the check that a wheel is whole."""

import torch

import flatstep

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = flatstep.AdamW(model.parameters(), lr=0.01)
inputs = torch.randn(64, 8)
losses = []
for _ in range(100):
    optimizer.zero_grad()
    loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"flatstep on {flatstep.cpu_isa()}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.2 * losses[0]
