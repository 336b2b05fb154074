"""One query of a five-token sentence by hand: scores, softmax, weighted sum; and the kernels give the same numbers.

python examples/attention_by_hand.py
"""

import math

import torch

import llmfast

TOKENS = ["人工", "智能", "理解", "语言", "。"]
D = 4
q, k, v = torch.randn(3, len(TOKENS), D, generator=torch.Generator().manual_seed(0)).unbind()  # (5, 4) each
row = 3  # the query of 语言, which sees itself and the tokens before it

scores = [sum(float(q[row, d]) * float(k[j, d]) for d in range(D)) / math.sqrt(D) for j in range(row + 1)]
largest = max(scores)
exponents = [math.exp(s - largest) for s in scores]
weights = [e / sum(exponents) for e in exponents]
o = [sum(w * float(v[j, d]) for j, w in enumerate(weights)) for d in range(D)]

print(f"the query of {TOKENS[row]}")
for token, s, w in zip(TOKENS, scores, weights, strict=False):
    print(f"  {token}\tscore {s:+.4f}   weight {w:.4f}")
print(f"  the weights sum to {sum(weights):.6f}")
print("weighted sum of the values ", [round(x, 5) for x in o])

batch = [t[None, None] for t in (q, k, v)]  # (B, H, N, D) = (1, 1, 5, 4)
kernel_o = llmfast.attention(*batch, causal=True)[0, 0, row]
kernel_weights = llmfast.softmax(torch.tensor(scores))
print("llmfast.attention          ", [round(x, 5) for x in kernel_o.tolist()])
assert torch.allclose(kernel_o, torch.tensor(o), atol=1e-6)
assert torch.allclose(kernel_weights, torch.tensor(weights), atol=1e-6)
