"""Draws tokens.

A token depends on the logits, the allowed tokens, the sampling with its seed, and the position, and on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.events import Logprobs, Sampling, Token


@dataclass(frozen=True, slots=True)
class Draw:
    """How one token is drawn, and which logprobs come with it.

    `allowed` has a bit for each token of the tokenizer, in 32-bit words from the lowest bit up; without it every token may
    be drawn. With `top_logprobs` the token comes with its logprob and those of this many likeliest tokens.
    """

    sampling: Sampling
    allowed: NDArray[np.int32] | None = None
    top_logprobs: int | None = None

    @property
    def is_likeliest(self) -> bool:
        """Whether the likeliest of all tokens is drawn, without logprobs."""
        return self.sampling.temperature == 0.0 and self.allowed is None and self.top_logprobs is None


def draw_token(logits: Tensor, wanted: Draw, position: int) -> Token:
    """The token for `position`, drawn from `logits` [vocabulary] float32 as `wanted` says."""
    may = logits if wanted.allowed is None else logits.masked_fill(~allowed_tokens(wanted.allowed, logits), -torch.inf)
    token_id = draw_id(may, wanted.sampling, position)
    if wanted.top_logprobs is None:
        return Token(token_id)
    logprobs = torch.log_softmax(logits, dim=-1)
    top = logprobs.topk(wanted.top_logprobs)
    likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Token(token_id, Logprobs(float(logprobs[token_id]), likeliest))


def allowed_tokens(allowed: NDArray[np.int32], logits: Tensor) -> Tensor:
    """The bits `allowed` as bool [vocabulary]. Tokens that the tokenizer lacks are not allowed."""
    bits = np.unpackbits(allowed.view(np.uint8), bitorder="little", count=len(logits))
    return torch.from_numpy(bits.view(np.bool_)).to(logits.device)


def draw_id(logits: Tensor, sampling: Sampling, position: int) -> int:
    """The token id for `position` from its `logits` [vocabulary], float32.

    Greedy at temperature 0, else by the Gumbel-max trick (arXiv 1411.0030) with noise keyed by seed and position: the result
    does not depend on who draws the token, or when.
    """
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    exact = logits.cpu().double()
    # Relative to the largest, so that dividing by a very low temperature does not overflow.
    scaled = (exact - exact.max()) / sampling.temperature
    noise = torch.from_numpy(gumbel_noise(sampling.seed, position, len(logits)))
    return int((scaled + noise).masked_fill(~candidates(scaled, sampling), -torch.inf).argmax())


def candidates(scaled: Tensor, sampling: Sampling) -> Tensor:
    """The tokens that may be drawn, bool [vocabulary]: the `top_k` likeliest, and of these the fewest that reach `top_p`."""
    count = len(scaled)
    top_k = min(sampling.top_k or count, count)
    if top_k == count and sampling.top_p == 1.0:
        return torch.ones(count, dtype=torch.bool)
    ordered, order = scaled.sort(descending=True, stable=True)
    shares = torch.softmax(ordered[:top_k], dim=-1)
    # A token is kept while those before it have not reached top_p, so the first always is.
    before = shares.cumsum(dim=-1) - shares
    chosen = order[:top_k][before < sampling.top_p]
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, chosen, True)


def gumbel_noise(seed: int, position: int, count: int) -> NDArray[np.float64]:
    """`count` standard Gumbel values from the counter-based generator Philox (doi 10.1145/2063384.2063405)."""
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array([0, position, 0, 0], np.uint64))
    uniform = np.random.Generator(bits).random(count)
    with np.errstate(divide="ignore"):
        noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise
