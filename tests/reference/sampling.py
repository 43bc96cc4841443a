"""Which tokens top_k and top_p leave, by their definitions, in plain Python."""

import math


def kept_tokens(logits: list[float], top_k: int, top_p: float, slack: float = 1e-9) -> tuple[set[int], set[int]]:
    """The tokens that must be kept and those that may be: they differ only where a share ends within `slack` of top_p.

    The `top_k` likeliest (all if 0; of equals the first), and of these, likeliest first, the fewest that reach `top_p`.
    """
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    candidates = order[: top_k or len(order)]
    weights = [math.exp(logits[token] - logits[order[0]]) for token in candidates]
    must: set[int] = set()
    may: set[int] = set()
    for index, token in enumerate(candidates):
        share_before = math.fsum(weights[:index]) / math.fsum(weights)
        if index == 0 or share_before < top_p - slack:
            must.add(token)
        if index == 0 or share_before < top_p + slack or top_p == 1.0:
            may.add(token)
    return must, may
