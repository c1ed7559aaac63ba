"""A few updates on a GPU, for compute-sanitizer: every rule, norms, odd sizes, misalignment."""

import torch

import flatstep

RULES = [
    (flatstep.Adam, {"amsgrad": True}),
    (flatstep.AdamW, {"fused": True}),
    (flatstep.AdamW, {"max_grad_norm": 0.5, "ema_decay": 0.9}),
    (flatstep.RMSprop, {"momentum": 0.9, "centered": True}),
    (flatstep.SGD, {"momentum": 0.9, "nesterov": True}),
]
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for build, options in RULES:
        for sizes in ((1, 7, 64, 1001, 5003), [3] * 70):
            params = [torch.nn.Parameter(torch.ones(n, dtype=dtype, device="cuda")) for n in sizes]
            for place, param in enumerate(params):
                offset = place % 4
                room = torch.ones(param.numel() + offset, dtype=dtype, device="cuda")
                param.grad = room[offset:]
            opt = build(params, lr=0.01, **options)
            for _ in range(2):
                opt.step()
            assert all(bool((param < 1).all()) for param in params)
print("done")
